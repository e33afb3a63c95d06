"""Starting a training from the weights of a bundle, on a cohort with other modalities, classes or another crop."""

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

__all__ = ["TransferReport", "bundle_modalities", "load_pretrained", "transfer_weights"]

logger = logging.getLogger(__name__)


class TransferReport(NamedTuple):
    """What became of every parameter of a network.

    Attributes:
        transferred: those that were taken over whole.
        partial: those that mix modalities, of which the parts for the modalities in common were taken over.
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
    modality_names: Mapping[str, str] | None = None,
) -> TransferReport:
    """Load a bundle's weights into a network for a cohort of one's own; see :func:`transfer_weights`.

    Args:
        network: the network to train, of the same backbone.
        bundle: folder of the bundle; its metadata say which modalities the weights are for.
        weights: file of the weights.
        modalities: names of the network's modalities.
        modality_names: what the bundle calls those of them that it calls otherwise.
    """
    return transfer_weights(
        network,
        read_state_dict(weights),
        modalities=modalities,
        pretrained_modalities=bundle_modalities(bundle),
        modality_names=modality_names,
    )


def bundle_modalities(bundle: str | Path) -> list[str]:
    """Names of the image channels of a bundle, from its metadata.

    Raises:
        FileNotFoundError: when the folder has no metadata.
        ValueError: when they do not name the channels.
    """
    path = Path(bundle) / "configs" / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a bundle.")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        channels = metadata["network_data_format"]["inputs"]["image"]["channel_def"]
        names = [channels[str(index)] for index in range(len(channels))]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not say which modality a channel of the image is ({error!r}).") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must name the modality of each channel of the image, got {names}.")
    return names


def transfer_weights(
    network: Backbone,
    state: Mapping[str, Tensor],
    *,
    modalities: Sequence[str],
    pretrained_modalities: Sequence[str],
    modality_names: Mapping[str, str] | None = None,
) -> TransferReport:
    """Take over what fits of the weights of a network for other modalities, matched by their names.

    What belongs to one modality goes to the modality of that name. Of what mixes the modalities, the parts for those in
    common are taken over, so that RFNet and M2FTrans for fewer modalities start as the pretrained network does when the
    others are absent. Values per position are interpolated to another crop. What has another shape for another reason,
    such as the prediction of other classes, keeps its initial values, as does all of a modality that is new. All of it
    is in the report and logged.

    Args:
        network: the network to load into.
        state: the pretrained weights.
        modalities: names of the network's modalities, in the order of its channels.
        pretrained_modalities: those of the pretrained network.
        modality_names: pretrained names of those modalities that are called otherwise here.

    Raises:
        ValueError: when names do not fit, no modality is in common, or the weights are of another kind of network.
    """
    sources = _match(modalities, pretrained_modalities, modality_names or {})
    if len(modalities) != network.num_modalities:
        raise ValueError(f"modalities must name {network.num_modalities} channels, got {list(modalities)}.")
    unlike = sources != list(range(len(pretrained_modalities)))
    target = network.state_dict()
    loaded: dict[str, Tensor] = {}
    partial, fresh = [], {}
    for name, value in target.items():
        source_name = _source_name(name, network.modality_modules, sources)
        if source_name is None:
            fresh[name] = "belongs to a modality that is new"
        elif source_name not in state:
            fresh[name] = "is not in the weights"
        elif unlike and any(re.match(pattern, name) for pattern in network.modality_mixing):
            fresh[name] = "mixes the modalities, which are others"
        else:
            axis = next((axis for pattern, axis in network.modality_axes.items() if re.match(pattern, name)), None)
            pretrained = fit_positions(state[source_name], value, network, groups=axis is not None)
            blocks = None if axis is None or not unlike else (axis, sources, len(pretrained_modalities))
            fitted = _select_blocks(pretrained, value, *blocks) if blocks else pretrained
            if fitted is None or fitted.shape != value.shape:
                fresh[name] = f"has the shape {tuple(value.shape)}, in the weights {tuple(pretrained.shape)}"
                continue
            loaded[name] = fitted
            if blocks:
                partial.append(name)
    _check_common(network, loaded, target)
    network.load_state_dict(loaded, strict=False)
    report = TransferReport(tuple(name for name in loaded if name not in partial), tuple(partial), fresh)
    _log(report, target, dict(zip(modalities, sources, strict=True)), pretrained_modalities)
    return report


def _match(
    modalities: Sequence[str], pretrained_modalities: Sequence[str], modality_names: Mapping[str, str]
) -> list[int | None]:
    """For each modality the index of its pretrained counterpart, None where it has none."""
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
    order = list(pretrained_modalities)
    sources = [order.index(name) if name in order else None for name in names]
    if all(source is None for source in sources):
        raise ValueError(
            f"None of the modalities {list(modalities)} is among the pretrained {order}; say with modality_names which "
            "is which."
        )
    return sources


def _source_name(name: str, modality_modules: Sequence[str], sources: Sequence[int | None]) -> str | None:
    """The pretrained name of a parameter; None for one of a modality that has no counterpart."""
    for pattern in modality_modules:
        match = re.match(pattern, name)
        if match:
            source = sources[int(match[1])]
            return None if source is None else f"{name[: match.start(1)]}{source}{name[match.end(1) :]}"
    return name


def _select_blocks(
    pretrained: Tensor, initial: Tensor, axis: int, sources: Sequence[int | None], num_pretrained: int
) -> Tensor | None:
    """Assemble a parameter with one block per modality along an axis, after which there may be what is of none.

    None where the pretrained one has other blocks.
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


def _log(
    report: TransferReport, target: Mapping[str, Tensor], matched: Mapping[str, int | None], pretrained: Sequence[str]
) -> None:
    total = sum(value.numel() for value in target.values())
    taken = sum(target[name].numel() for name in (*report.transferred, *report.partial))
    pairs = ", ".join(
        f"{name} is new" if source is None else f"{name} from {pretrained[source]}" for name, source in matched.items()
    )
    logger.info(
        f"Pretrained weights: {pairs}. {len(report.transferred)} of {len(target)} parameters were taken over, "
        f"{len(report.partial)} in part, together {100 * taken / total:.1f} % of the values."
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in report.fresh.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        logger.warning(f"Initialised anew, because it {reason}: {', '.join(names)}")
