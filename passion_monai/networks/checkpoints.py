"""Loads weights, including those that the authors of PASSION trained, into the backbones of this package.

Only this module knows the authors' names. In their checkpoints `decoder_sep` is the decoder that all modalities
share, `prm` a prediction of a coarser level, `RFM` the fusion of the modalities at a level, counted from 1.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn import functional as F

from passion_monai.networks.base import Backbone
from passion_monai.networks.m2ftrans import M2FTrans
from passion_monai.networks.mmformer import MMFormer
from passion_monai.networks.rfnet import RFNet

__all__ = [
    "LoadReport",
    "WeightsLoader",
    "fit_positions",
    "load_reference_checkpoint",
    "load_weights",
    "read_state_dict",
    "translate_reference_state",
]

logger = logging.getLogger(__name__)

Rule = tuple[str, Callable[[re.Match[str]], str]]

_ENCODER_PARTS = ("entry", "first", "second")
_STAGE_PARTS = {"c1": "reduce", "c2": "merge", "out": "project"}
_LAYER_PARTS = {
    "attention_list.fn.norm": "attention_norm",
    "attention_list.fn.fn.qkv": "attention.qkv",
    "attention_list.fn.fn.proj": "attention.project",
    "ffn_list.fn.norm": "mlp_norm",
    "ffn_list.fn.fn.net.0": "mlp.linear1",
    "ffn_list.fn.fn.net.3": "mlp.linear2",
}
_CHANNEL_PARTS = {
    "conv1": 0,
    "norm1": 1,
    "conv2": 3,
    "norm2": 4,
    "conv3": 6,
    "norm3": 7,
    "pwconv1": 0,
    "dwconv": 3,
    "pwconv2": 6,
}


class LoadReport(NamedTuple):
    """Which entries of a checkpoint were loaded, and which were not.

    Attributes:
        loaded: parameters of the network that got a value.
        interpolated: those among them that were interpolated to the network's crop.
        missing: parameters of the network for which the checkpoint has no value, or one of another shape.
        unused: entries of the checkpoint, by their names there, that the network does not have.
    """

    loaded: tuple[str, ...]
    interpolated: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def load_reference_checkpoint(checkpoint: str | Path | Mapping[str, Any], *, backbone: Backbone) -> LoadReport:
    """Load weights of the authors' implementation into a network of this package.

    Values per position (position embeddings, fusion tokens) are interpolated linearly when the crop differs. Parameters
    that do not fit keep their values; the report and the log list them.

    Args:
        checkpoint: a `.pth` file, read as tensors only, or its content: a state dict, or a dictionary with one under
            ``state_dict``; names may begin with ``module.``. The m-th encoder in it becomes the m-th encoder here.
        backbone: the network, of the same kind.

    Raises:
        FileNotFoundError: when there is no such file.
        TypeError: when there is no translation for this kind of network.
        ValueError: when the file cannot be read, or when nothing of the checkpoint fits.
    """
    state = read_state_dict(checkpoint)
    translated, unused = translate_reference_state(state, backbone=backbone)
    target = backbone.state_dict()
    fitting: dict[str, Tensor] = {}
    interpolated = []
    for name, value in translated.items():
        fitted = _fit(value, target[name], backbone)
        if fitted is None:
            continue
        fitting[name] = fitted
        if value.numel() != fitted.numel():
            interpolated.append(name)
    if not fitting:
        raise ValueError(
            f"Nothing in the checkpoint fits {type(backbone).__name__}; its first names are {list(state)[:3]}."
        )
    backbone.load_state_dict(fitting, strict=False)
    report = LoadReport(tuple(fitting), tuple(interpolated), tuple(sorted(target.keys() - fitting.keys())), unused)
    logger.info(f"Loaded {len(report.loaded)} of {len(target)} parameters, {len(interpolated)} interpolated.")
    if report.missing or unused:
        logger.warning(f"Not in the checkpoint or of another shape: {report.missing}; not used from it: {unused}.")
    return report


def translate_reference_state(
    state: Mapping[str, Tensor], *, backbone: Backbone
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The entries of a checkpoint under the names of this package, and the names of those that have none."""
    modalities = list(dict.fromkeys(name.split("_encoder.")[0] for name in state if "_encoder." in name))
    rules = _rules(backbone, modalities)
    known = backbone.state_dict()
    translated: dict[str, Tensor] = {}
    positions: dict[int, Tensor] = {}
    unused = []
    for name, value in state.items():
        if name.endswith("_pos") and name.removesuffix("_pos") in modalities:
            positions[modalities.index(name.removesuffix("_pos"))] = value
            continue
        ours = _translate(name, rules)
        if ours in known:
            translated[ours] = value
        else:
            unused.append(name)
    alike = len({value.shape for value in positions.values()}) == 1
    if "position_embeddings" in known and len(positions) == backbone.num_modalities and alike and positions[0].ndim:
        translated["position_embeddings"] = torch.cat([positions[m] for m in range(len(positions))])
    return translated, tuple(unused)


def read_state_dict(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, or of one under the key ``state_dict`` or ``model``, without the prefix ``module.``.

    Args:
        checkpoint: a file, read as tensors only, or its content.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read, or holds something else.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else _read_tensors(Path(checkpoint))
    state = content
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state = content[key]
    named = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        where = "" if isinstance(checkpoint, Mapping) else f" {checkpoint}"
        raise ValueError(f"Checkpoint{where} must hold named weights, but holds a {type(state).__name__}.")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _read_tensors(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}; train first, or give another file (ckpt_path).")
    read = _safetensors_reader() if path.suffix == ".safetensors" else _read_pickle
    try:
        return read(path)
    # A damaged file may make its readers fail in any way.
    except Exception as error:
        raise ValueError(
            f"Checkpoint {path} cannot be read as tensors: it is damaged, or holds other objects, which are not loaded "
            "because they could run code. Get the file again."
        ) from error


def _read_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors_reader() -> Callable[[Path], dict[str, Tensor]]:
    from safetensors.torch import load_file  # not needed for the .pt files of our own trainings

    return load_file


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load trained weights into the same network; every parameter must be there.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read, or is of another network.
    """
    state, target = read_state_dict(path), network.state_dict()
    strange = sorted(state.keys() ^ target.keys())
    shapes = {name: (tuple(state[name].shape), tuple(target[name].shape)) for name in state.keys() & target.keys()}
    other = [f"{name} is {theirs}, not {ours}" for name, (theirs, ours) in sorted(shapes.items()) if theirs != ours]
    if strange or other:
        raise ValueError(
            f"Checkpoint {path} does not fit this {type(network).__name__}: {len(strange)} of the parameters are only "
            f"in one of them (as {strange[:2]}), {len(other)} have another shape ({'; '.join(other[:2])}). It needs "
            "the backbone, modalities, label_values, roi_size and network_def of its training."
        )
    network.load_state_dict(state)
    logger.info(f"Loaded the weights {path}.")


class WeightsLoader:
    """Loads the weights of a training, or of several for an ensemble, when an engine starts; see :func:`load_weights`.

    Args:
        network: the network.
        path: file of the weights, or a list of files.

    Raises:
        ValueError: when `path` is neither.
    """

    def __init__(self, network: nn.Module, path: str | Path | Sequence[str | Path]) -> None:
        self.network = network
        self.paths = checkpoint_paths(path)
        self._states: list[dict[str, Tensor]] = []

    def attach(self, engine: Engine) -> None:
        """Load when this engine starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self) -> None:
        self._states = []
        for path in self.paths:
            load_weights(self.network, path)
            if len(self.paths) > 1:
                self._states.append({name: value.cpu().clone() for name, value in self.network.state_dict().items()})

    def in_turn(self) -> Iterator[None]:
        """Load the weights of each file in turn; those of a single file are already loaded."""
        if len(self.paths) == 1:
            yield
        for state in self._states:
            self.network.load_state_dict(state)
            yield


def checkpoint_paths(path: Any) -> list[Path]:
    """The files that a ``ckpt_path`` names, which is a path or a list of paths.

    Raises:
        ValueError: when it is neither.
    """
    paths = path if isinstance(path, (list, tuple)) else [path]
    if not paths or not all(isinstance(one, (str, Path)) for one in paths):
        raise ValueError(f"ckpt_path must be a path or a list of paths, got {path!r}.")
    return [Path(one) for one in paths]


def run_folder(path: Any) -> Path:
    """The folder of the training of a ``ckpt_path``, whose ``models/`` contains the (first) file."""
    return checkpoint_paths(path)[0].absolute().parent.parent


def _translate(name: str, rules: Sequence[Rule]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            try:
                return re.sub(pattern, replacement, name, count=1)
            except (ValueError, LookupError):  # a part or a modality that the authors' networks do not have
                return name
    return name


def _fit(value: Tensor, target: Tensor, backbone: Backbone) -> Tensor | None:
    """Fit the value to the shape of the target, by dropping axes of size 1 or interpolating positions; or None."""
    while value.ndim > target.ndim and value.shape[-1] == 1:
        value = value.squeeze(-1)
    if value.shape == target.shape:
        return value
    if value.shape[:1] == (1,) and value.numel() == target.numel() and value.shape[-1:] == target.shape[-1:]:
        return value.reshape(target.shape)  # the authors' values have a batch axis
    fitted = fit_positions(value, target, backbone)
    return fitted if fitted.shape == target.shape else None


def fit_positions(value: Tensor, target: Tensor, backbone: Backbone, *, groups: bool = False) -> Tensor:
    """Interpolate values per position to the network's crop; return other values unchanged.

    Args:
        value: [..., T', C] for T' positions of a crop with equal sides.
        target: the network's own values.
        backbone: the network.
        groups: keep as many groups of positions as `value` has, instead of as many as `target` has.
    """
    grid = tuple(size // backbone.stride for size in backbone.img_size)
    num_tokens = torch.Size(grid).numel()
    if (
        min(value.ndim, target.ndim) < 2
        or not value.numel()
        or value.shape[-2:] == target.shape[-2:]  # of as many positions, or no positions at all
        or value.shape[-1] != target.shape[-1]
        or target.shape[-2] != num_tokens
    ):
        return value
    if groups and value.ndim > 2:
        target = target.new_empty(*value.shape[:-2], num_tokens, value.shape[-1])
    fitted = _interpolate(value, target, grid)
    return value if fitted is None else fitted


def _interpolate(value: Tensor, target: Tensor, grid: tuple[int, ...]) -> Tensor | None:
    """Values per position [..., T', C] on a grid with equal sides, brought to another grid, [..., T, C]."""
    groups = target.numel() // (target.shape[-1] * target.shape[-2])
    num_positions, rest = divmod(value.numel(), groups * value.shape[-1])
    side = round(num_positions ** (1 / len(grid)))
    if rest or side ** len(grid) != num_positions:
        return None
    maps = value.reshape(groups, num_positions, value.shape[-1]).transpose(1, 2)  # [groups, C, T']
    mode = {2: "bilinear", 3: "trilinear"}[len(grid)]
    resized = F.interpolate(maps.unflatten(2, (side,) * len(grid)), size=grid, mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2).reshape(target.shape)


def _rules(backbone: Backbone, modalities: Sequence[str]) -> list[Rule]:
    if isinstance(backbone, MMFormer):
        return _common_rules(modalities, num_levels=5) + _mmformer_rules(modalities)
    if isinstance(backbone, RFNet):
        return _common_rules(modalities, num_levels=4) + _rfnet_rules()
    if isinstance(backbone, M2FTrans):
        return _common_rules(modalities, num_levels=5) + _m2ftrans_rules(modalities)
    raise TypeError(f"backbone must be MMFormer, RFNet or M2FTrans, got {type(backbone).__name__}.")


def _common_rules(modalities: Sequence[str], num_levels: int) -> list[Rule]:
    """Encoders, and the decoder that the modalities share."""
    return [
        (
            r"(\w+)_encoder\.e(\d)_c(\d)\.",
            lambda m: f"encoders.{modalities.index(m[1])}.stages.{int(m[2]) - 1}.{_ENCODER_PARTS[int(m[3]) - 1]}.",
        ),
        (
            r"decoder_sep\.d(\d)_(c1|c2|out)\.",
            lambda m: f"modality_decoder.stages.{num_levels - 1 - int(m[1])}.{_STAGE_PARTS[m[2]]}.",
        ),
        (r"decoder_sep\.seg_layer\.", lambda _: "modality_decoder.head."),
    ]


def _transformer_part(match: re.Match[str], kind: int, rest: int) -> str:
    return _LAYER_PARTS[f"{match[kind]}_list.{match[rest]}"]


def _mmformer_rules(modalities: Sequence[str]) -> list[Rule]:
    layer = r"cross_(attention|ffn)_list\.0\.(fn\.(?:norm|fn\.\w+(?:\.\d)?))"
    return [
        (rf"multimodal_transformer\.{layer}", lambda m: f"inter_transformer.{_transformer_part(m, 1, 2)}"),
        (
            rf"(\w+)_transformer\.{layer}",
            lambda m: f"intra_transformers.{modalities.index(m[1])}.{_transformer_part(m, 2, 3)}",
        ),
        (r"multimodal_decode_conv\.", lambda _: "from_tokens."),
        (r"(\w+)_encode_conv\.", lambda m: f"to_tokens.{modalities.index(m[1])}."),
        (
            r"decoder_fuse\.d(\d)_(c1|c2|out)\.",
            lambda m: f"fusion_decoder.stages.{int(m[1]) - 1}.{_STAGE_PARTS[m[2]]}.",
        ),
        (r"decoder_fuse\.seg_layer\.", lambda _: "fusion_decoder.heads.0."),
        (r"decoder_fuse\.seg_d(\d)\.", lambda m: f"fusion_decoder.heads.{m[1]}."),
        (r"decoder_fuse\.RFM(\d)\.fusion_layer\.", lambda m: f"fusion_decoder.fusions.{int(m[1]) - 1}."),
    ]


def _rfnet_rules() -> list[Rule]:
    parts = {"c1": "reductions.{}", "c2": "merges.{}.0", "out": "merges.{}.1"}
    return [
        (
            r"decoder_fuse\.d(\d)_(c1|c2|out)\.",
            lambda m: f"fusion_decoder.{parts[m[2]].format(int(m[1]) - 1)}.",
        ),
        (r"decoder_fuse\.seg_layer\.", lambda _: "fusion_decoder.head."),
        (
            r"decoder_fuse\.prm_generator(\d)\.embedding_layer\.",
            lambda m: f"fusion_decoder.predictors.{int(m[1]) - 1}.embedding.",
        ),
        (
            r"decoder_fuse\.prm_generator(\d)\.prm_layer\.",
            lambda m: f"fusion_decoder.predictors.{int(m[1]) - 1}.head.",
        ),
        (
            r"decoder_fuse\.RFM(\d)\.modal_fusion\.(\d)\.weight_layer\.",
            lambda m: f"fusion_decoder.fusions.{int(m[1]) - 1}.weightings.{m[2]}.",
        ),
        (
            r"decoder_fuse\.RFM(\d)\.region_fusion\.fusion_layer\.",
            lambda m: f"fusion_decoder.fusions.{int(m[1]) - 1}.fuse_regions.",
        ),
        (
            r"decoder_fuse\.RFM(\d)\.short_cut\.",
            lambda m: f"fusion_decoder.fusions.{int(m[1]) - 1}.fuse_modalities.",
        ),
    ]


def _m2ftrans_rules(modalities: Sequence[str]) -> list[Rule]:
    return [
        (r"pos$", lambda _: "bottleneck.position_embeddings"),
        (r"fusion$", lambda _: "bottleneck.fusion_tokens"),
        (
            r"Bottleneck\.trans_bottle\.cross_(attention|ffn)_list\.(\d)\.(fn\.(?:norm|fn\.\w+(?:\.\d)?))",
            lambda m: f"bottleneck.layers.{m[2]}.{_transformer_part(m, 1, 3)}",
        ),
        (r"decoder_fusion\.seg_layer\.", lambda _: "fusion_decoder.head."),
        (r"decoder_fusion\.d(\d)_c1\.", lambda m: f"fusion_decoder.reductions.{int(m[1]) - 1}."),
        (
            r"decoder_fusion\.d(\d)_(c2|out)\.",
            lambda m: f"fusion_decoder.levels.{int(m[1]) - 1}.{_STAGE_PARTS[m[2]]}.",
        ),
        (r"decoder_fusion\.prm_fusion(\d)\.prm_layer\.", lambda m: f"fusion_decoder.levels.{int(m[1]) - 1}.head."),
        (r"decoder_fusion\.RFM(\d)\.fusion_layer\.", lambda m: f"fusion_decoder.levels.{int(m[1]) - 1}.fusion.layers."),
        (
            r"decoder_fusion\.CT(\d)\.layers\.(\d)\.(ffn1|ffn2|cross_attn\.\w+)\.(\w+)\.",
            lambda m: (
                f"fusion_decoder.levels.{int(m[1]) - 1}.fusion.{_cross_token_part(m, modalities)}."
                f"{_CHANNEL_PARTS[m[4]]}."
            ),
        ),
    ]


def _cross_token_part(match: re.Match[str], modalities: Sequence[str]) -> str:
    block, part = match[2], match[3].removeprefix("cross_attn.")
    if part in ("ffn1", "ffn2"):
        return f"mlps.{block}" if part == "ffn1" else "modality_mlp"
    kind, _, modality = part.partition("_map_")
    if modality:
        return f"attentions.{block}.{kind}s.{modalities.index(modality)}"
    return f"attentions.{block}." + {"query_map": "query", "out_project": "project"}[part]
