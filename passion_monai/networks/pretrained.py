"""Starts a training from the weights of a bundle, for other modalities, classes or another crop."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from passion_monai.networks.base import Backbone
from passion_monai.networks.checkpoints import fit_positions, read_state_dict
from passion_monai.run_record import trained_settings

__all__ = ["TransferReport", "bundle_channels", "load_pretrained", "transfer_weights"]

logger = logging.getLogger(__name__)


class TransferReport(NamedTuple):
    """Which parameters of a network were transferred, and which keep their initial values.

    Attributes:
        transferred: those that were transferred completely.
        partial: those with a part per modality or class, of which the common parts were transferred.
        fresh: the others, which keep their initial values, each with the reason.
    """

    transferred: tuple[str, ...]
    partial: tuple[str, ...]
    fresh: Mapping[str, str]


def load_pretrained(
    network: Backbone,
    *,
    bundle: str | Path,
    weights: str | Path,
    modalities: Sequence[str],
    classes: Sequence[str],
    modality_names: Mapping[str, str] | None = None,
) -> TransferReport:
    """Load a bundle's weights into a network for your own cohort; see :func:`transfer_weights`.

    Args:
        network: the network to train, of the same backbone.
        bundle: folder of the bundle, whose metadata name its modalities and classes.
        weights: file of the weights; its training's ``run.json``, if there is one, says which of them it is for.
        modalities: names of the network's modalities.
        classes: names of the network's classes, background first.
        modality_names: the bundle's names of those modalities that it names differently.
    """
    trained = trained_settings(
        weights,
        modalities=bundle_channels(bundle, "inputs", "image"),
        class_names=bundle_channels(bundle, "outputs", "pred"),
    )
    return transfer_weights(
        network,
        read_state_dict(weights),
        modalities=modalities,
        pretrained_modalities=trained["modalities"],
        classes=classes,
        pretrained_classes=trained["class_names"],
        modality_names=modality_names,
    )


def bundle_channels(bundle: str | Path, section: str, tensor: str) -> list[str]:
    """Names of the channels of a bundle's image (the modalities) or prediction (the classes), from its metadata.

    Args:
        bundle: folder of the bundle.
        section: "inputs" or "outputs" of the network.
        tensor: name of the tensor in it, "image" or "pred".

    Raises:
        FileNotFoundError: when the folder has no metadata.
        ValueError: when they do not name the channels.
    """
    path = Path(bundle) / "configs" / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a bundle.")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        channels = metadata["network_data_format"][section][tensor]["channel_def"]
        names = [channels[str(index)] for index in range(len(channels))]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not say what the channels of {tensor} are ({error!r}).") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must name each channel of {tensor}, got {names}.")
    return names


def transfer_weights(
    network: Backbone,
    state: Mapping[str, Tensor],
    *,
    modalities: Sequence[str],
    pretrained_modalities: Sequence[str],
    classes: Sequence[str],
    pretrained_classes: Sequence[str],
    modality_names: Mapping[str, str] | None = None,
) -> TransferReport:
    """Transfer weights that were trained with other modalities and classes, matched by name.

    Parameters of one modality go to the modality of that name. Of parameters that mix modalities, the parts of the
    common ones are transferred: RFNet and M2FTrans for fewer modalities start like the pretrained network with the
    others absent. Parameters of a class, and those of RFNet for a region, go to the class of that name. Values per
    position are interpolated to the new crop. Other parameters whose shape differs keep their initial values, and so
    do those of a new modality or class. The report and the log list all of this.

    Args:
        network: the network to load into.
        state: the pretrained weights.
        modalities: names of the network's modalities, in the order of its channels.
        pretrained_modalities: those of the pretrained network.
        classes: names of the network's classes, background first.
        pretrained_classes: those of the pretrained network.
        modality_names: pretrained names of those modalities that have another name here.

    Raises:
        ValueError: when names do not fit, no modality is in common, or the weights are of another kind of network.
    """
    matches = _match(modalities, pretrained_modalities, modality_names or {})
    of_modality = (network.modality_modules, network.modality_axes, matches, len(pretrained_modalities))
    indices = _indices(classes, pretrained_classes)
    of_class = (network.class_modules, network.class_axes, indices, len(pretrained_classes))
    parts = (_Parts("modality", *of_modality), _Parts("class", *of_class))
    if len(modalities) != network.num_modalities:
        raise ValueError(f"modalities must name {network.num_modalities} channels, got {list(modalities)}.")
    if len(classes) != network.num_classes:
        raise ValueError(f"classes must name {network.num_classes} classes, got {list(classes)}.")
    target = network.state_dict()
    loaded: dict[str, Tensor] = {}
    partial, fresh = [], {}
    for name, value in target.items():
        source_name, new = _source_name(name, parts)
        if new:
            fresh[name] = f"belongs to a {new} that is new"
        elif source_name not in state:
            fresh[name] = "is not in the weights"
        elif parts[0].unlike and any(re.match(pattern, name) for pattern in network.modality_mixing):
            fresh[name] = "mixes the modalities, which are others"
        else:
            blocks = [(part, axis) for part in parts if (axis := part.axis(name)) is not None]
            pretrained = fit_positions(state[source_name], value, network, groups=parts[0].axis(name) is not None)
            fitted = _fit(pretrained, value, blocks)
            if fitted is None:
                fresh[name] = f"has the shape {tuple(value.shape)}, in the weights {tuple(pretrained.shape)}"
                continue
            loaded[name] = fitted
            if any(part.unlike for part, _ in blocks):
                partial.append(name)
    _check_common(network, loaded, target)
    network.load_state_dict(loaded, strict=False)
    report = TransferReport(tuple(name for name in loaded if name not in partial), tuple(partial), fresh)
    matched = _pairs(modalities, pretrained_modalities, matches) + _pairs(classes, pretrained_classes, indices)
    _log(report, target, matched)
    if None in indices:
        logger.warning(
            f"The weights are of the classes {', '.join(pretrained_classes)}: a class of exactly such a name keeps its "
            "weights, another one starts from scratch."
        )
    return report


class _Parts(NamedTuple):
    """The modalities, or the classes, that parts of a network belong to.

    Attributes:
        what: what to call them in the report.
        modules: patterns of the modules of one of them, see :class:`passion_monai.networks.base.Backbone`.
        axes: patterns of parameters with one block for each, likewise.
        sources: index of the pretrained counterpart of each, None if it has none.
        num_pretrained: their number in pretraining.
    """

    what: str
    modules: Sequence[str]
    axes: Mapping[str, int]
    sources: list[int | None]
    num_pretrained: int

    @property
    def unlike(self) -> bool:
        """Whether they, or their order, differ from those of pretraining."""
        return self.sources != list(range(self.num_pretrained))

    def axis(self, name: str) -> int | None:
        """The axis of a parameter along which each of them has a block."""
        return next((axis for pattern, axis in self.axes.items() if re.match(pattern, name)), None)


def _indices(names: Sequence[str], pretrained: Sequence[str]) -> list[int | None]:
    """Index of each name among the pretrained ones, None if it is not there."""
    order = list(pretrained)
    return [order.index(name) if name in order else None for name in names]


def _match(
    modalities: Sequence[str], pretrained_modalities: Sequence[str], modality_names: Mapping[str, str]
) -> list[int | None]:
    """Index of the pretrained counterpart of each modality, None if it has none."""
    unknown = [name for name in modality_names if name not in modalities]
    unknown += [name for name in modality_names.values() if name not in pretrained_modalities]
    if unknown:
        raise ValueError(
            f"modality_names must map names of {list(modalities)} to names of {list(pretrained_modalities)}, got "
            f"{dict(modality_names)}."
        )
    names = [modality_names.get(name, name) for name in modalities]
    if len(set(names)) < len(names):
        raise ValueError(f"modality_names must not map two modalities to one, got {dict(modality_names)}.")
    sources = _indices(names, pretrained_modalities)
    if all(source is None for source in sources):
        raise ValueError(
            f"None of the modalities {list(modalities)} is among the pretrained {list(pretrained_modalities)}; say "
            "with modality_names which is which."
        )
    return sources


def _source_name(name: str, parts: Sequence[_Parts]) -> tuple[str, str | None]:
    """The pretrained name of a parameter, and "modality" or "class" if it belongs to one without counterpart."""
    for part in parts:
        match = next((match for pattern in part.modules if (match := re.match(pattern, name))), None)
        if match:
            source = part.sources[int(match[1])]
            if source is None:
                return name, part.what
            name = f"{name[: match.start(1)]}{source}{name[match.end(1) :]}"
    return name, None


def _fit(pretrained: Tensor, initial: Tensor, blocks: Sequence[tuple[_Parts, int]]) -> Tensor | None:
    """A pretrained parameter with the network's blocks; None if its shape still differs."""
    fitted: Tensor | None = pretrained
    for part, axis in blocks:
        if part.unlike and fitted is not None:
            fitted = _select_blocks(fitted, initial, axis, part.sources, part.num_pretrained)
    return fitted if fitted is not None and fitted.shape == initial.shape else None


def _select_blocks(
    pretrained: Tensor, initial: Tensor, axis: int, sources: Sequence[int | None], num_pretrained: int
) -> Tensor | None:
    """Assemble a parameter from one block per modality or class along an axis, and common entries that may follow.

    Returns None if the pretrained parameter has other blocks.
    """
    size = pretrained.shape[axis] // num_pretrained if pretrained.ndim == initial.ndim else 0
    shape = list(pretrained.shape)
    if size:
        shape[axis] += size * (len(sources) - num_pretrained)
    if not size or shape != list(initial.shape):
        return None
    blocks = list(pretrained.split(size, dim=axis))
    own = list(initial.split(size, dim=axis))
    chosen = [own[index] if source is None else blocks[source] for index, source in enumerate(sources)]
    return torch.cat([*chosen, *blocks[num_pretrained:]], dim=axis)


def _check_common(network: Backbone, loaded: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    encoders = [name for name in target if name.startswith("encoders.")]
    if not any(name in loaded for name in encoders):
        raise ValueError(
            f"The weights have no encoder that fits this {type(network).__name__}: they are of another backbone, width "
            "or number of dimensions."
        )


def _pairs(names: Sequence[str], pretrained: Sequence[str], sources: Sequence[int | None]) -> list[str]:
    return [
        f"{name} is new" if source is None else f"{name} from {pretrained[source]}"
        for name, source in zip(names, sources, strict=True)
    ]


def _log(report: TransferReport, target: Mapping[str, Tensor], matched: Sequence[str]) -> None:
    total = sum(value.numel() for value in target.values())
    taken = sum(target[name].numel() for name in (*report.transferred, *report.partial))
    logger.info(
        f"Pretrained weights: {', '.join(matched)}. {len(report.transferred)} of {len(target)} parameters were taken "
        f"over whole, {len(report.partial)} in part; these are {100 * taken / total:.1f} % of the network."
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in report.fresh.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        logger.warning(f"Not transferred: {len(names)} parameters, such as {names[0]}, each because it {reason}.")
