"""Layers that more than one backbone is made of."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from monai.networks.blocks import MLPBlock
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn import functional as F

from passion_monai.networks import cpu
from passion_monai.networks.cpu import is_exporting

__all__ = [
    "ConvBlock",
    "ConvNormAct",
    "DecoderStage",
    "Encoder",
    "ModalityFusion",
    "NormActConv",
    "TransformerLayer",
    "UNetDecoder",
    "conv",
    "fast_convolution",
    "head",
    "is_exporting",
    "pointwise",
    "sum_maps",
    "upsample",
    "upsample_logits",
    "use_fast_convolutions",
]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
NEGATIVE_SLOPE = 0.2
CHANNELS_LAST = {1: torch.preserve_format, 2: torch.channels_last, 3: torch.channels_last_3d}
MIN_CHANNELS = 4
"""Convolutions of fewer channels are filled up with zeros, see :class:`PaddedConv`."""


def conv(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    padding_mode: str,
) -> nn.Module:
    """Convolution with bias that keeps the size at stride 1, with Kaiming-normal weights."""
    layer = Conv[Conv.CONV, spatial_dims](
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        padding_mode=padding_mode,
    )
    nn.init.kaiming_normal_(layer.weight)
    return fast_convolution(layer)


def fast_convolution(layer: Convolution) -> nn.Module:
    """A convolution that keeps the size at stride 1, with the same parameters, in a form that is fast on a CPU too.

    The weights lie in memory with channels last, and so does what comes out, whatever goes in. In that order
    convolutions of few channels, interpolation and products over channels are two to four times faster on a CPU, and it
    is the order that tensor cores want.
    """
    if set(layer.kernel_size) == {1}:
        return Pointwise(layer)
    return PaddedConv(layer.to(memory_format=CHANNELS_LAST[len(layer.kernel_size)]))  # type: ignore[call-overload]


def use_fast_convolutions(network: nn.Module) -> None:
    """Replace the convolutions in another library's blocks by their fast forms; parameters keep names and values."""
    for module in network.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d | nn.Conv3d) and _keeps_size(layer):
                setattr(module, name, fast_convolution(layer))


def _keeps_size(layer: Convolution) -> bool:
    """Whether a convolution's padding and dilation are those of :func:`fast_convolution`."""
    steps = set(layer.stride) if set(layer.kernel_size) == {1} else {1}
    halves = tuple(size // 2 for size in layer.kernel_size)
    return layer.padding == halves and layer.padding_mode == "zeros" and set(layer.dilation) | steps == {1}


def head(spatial_dims: int, in_channels: int, num_classes: int) -> nn.Module:
    """Pointwise convolution to logits, with Kaiming-normal weights."""
    layer = Conv[Conv.CONV, spatial_dims](in_channels, num_classes, kernel_size=1)
    nn.init.kaiming_normal_(layer.weight)
    return LogitsHead(layer)


class Pointwise(nn.Module):
    """A convolution with a kernel of 1, computed as a matrix product over the channels.

    Args:
        layer: the convolution.
    """

    def __init__(self, layer: Convolution) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product over the channels: x [B, C, ...], weight [C_out, C(, 1, ...)] -> [B, C_out, ...], channels last."""
    if cpu.can_multiply(x, weight):
        return cpu.pointwise(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


class LogitsHead(Pointwise):
    """A pointwise convolution that gives logits, with the channels first: the losses go through them class by class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class PaddedConv(nn.Module):
    """A convolution of 2-D or 3-D maps as torch has it, computed in a way that is fast on a CPU too.

    Args:
        layer: the convolution.
    """

    def __init__(self, layer: Convolution) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.stride = layer.stride
        self.groups = layer.groups
        self.padding = [size // 2 for size in layer.kernel_size]
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        if cpu.applies(x, self.weight) and not torch.is_grad_enabled():
            return self._predict(x)
        x = self._pad(x)
        if self.groups > 1 or _is_mixed_precision(x):
            return _convolve(x, self.weight, self.bias, self.stride, self.groups)
        if 1 < x.shape[1] < MIN_CHANNELS:
            return self._convolve_filled(x)
        if _is_small(x) and len(self.weight) % 2 == 0:
            # Two groups of output channels, each from all of x: the same numbers, from another kernel.
            return _convolve(torch.cat([x, x], dim=1), self.weight, self.bias, self.stride, 2)
        return _convolve(x, self.weight, self.bias, self.stride, 1)

    def _predict(self, x: Tensor) -> Tensor:
        """The convolution without a gradient on a CPU."""
        padding = self.padding
        if self.padding_mode == "reflect":
            x, padding = self._pad(x), [0] * len(padding)
        return cpu.convolve(x, self.weight, self.bias, stride=self.stride, padding=padding, groups=self.groups)

    def _pad(self, x: Tensor) -> Tensor:
        if self.padding_mode == "reflect" and cpu.can_reflect(x):
            return cpu.reflect(x, self.padding[0])
        if self.padding_mode == "reflect" and x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return reflect(x, self.padding[0])
        return F.pad(x, [size for size in reversed(self.padding) for _ in range(2)], mode=self.padding_mode)

    def _convolve_filled(self, x: Tensor) -> Tensor:
        """The convolution with channels of zeros added: four are computed several times faster than two."""
        out_channels, in_channels = self.weight.shape[:2]
        kernel = [0] * 2 * len(self.stride)
        fill_in, fill_out = [0, MIN_CHANNELS - in_channels], [0, max(0, MIN_CHANNELS - out_channels)]
        weight = F.pad(self.weight, kernel + fill_in + fill_out)
        bias = None if self.bias is None else F.pad(self.bias, fill_out)
        x = _convolve(F.pad(x, kernel + fill_in), weight, bias, self.stride, 1)
        return x[:, :out_channels]


def reflect(x: Tensor, size: int) -> Tensor:
    """A map [B, C, ...] with borders of `size` that mirror it.

    As torch's `F.pad`, whose gradient on a GPU is not the same each time; but it takes longer.
    """
    for axis in range(2, x.ndim):
        before = x.narrow(axis, 1, size).flip(axis)
        after = x.narrow(axis, x.shape[axis] - 1 - size, size).flip(axis)
        x = torch.cat([before, x, after], dim=axis)
    return x


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], groups: int) -> Tensor:
    return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, stride, groups=groups)


def _is_mixed_precision(x: Tensor) -> bool:
    """Whether a convolution of x runs in half precision on a CPU, where the plain form is the fastest of all."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _is_small(x: Tensor) -> bool:
    """Whether torch would not give a convolution of x to oneDNN but to its own kernel, which is five times slower.

    On a CPU torch 2.13 does so for single samples with no more than 20480 values, not counting the last axis in 3-D,
    unless the convolution has groups. Where another release draws the line elsewhere, the numbers stay the same.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and len(x) == 1 and math.prod(x.shape[1:4]) <= 20480


class NormAct(nn.Module):
    """Instance norm and leaky ReLU, which have no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and cpu.can_norm(x):
            return cpu.norm_act(x, NEGATIVE_SLOPE)
        return F.leaky_relu(instance_norm(x), NEGATIVE_SLOPE, inplace=True)


def instance_norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance of every channel of every sample.

    Batch norm of a single sample is the same, and unlike torch's instance norm it keeps the channels last.
    """
    if is_exporting():
        return F.instance_norm(x)
    samples = [F.batch_norm(sample, None, None, training=True) for sample in x.split(1)]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


class ConvBlock(nn.Sequential):
    """A convolution with instance norm and leaky ReLU, which have no parameters, before or after it.

    Args:
        padding_mode: of the convolution.
    """

    norm_first: bool

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        padding_mode: str = "reflect",
    ) -> None:
        layer = conv(
            spatial_dims, in_channels, out_channels, kernel_size=kernel_size, stride=stride, padding_mode=padding_mode
        )
        parts = [("norm_act", NormAct()), ("conv", layer)]
        super().__init__(OrderedDict(parts if self.norm_first else parts[::-1]))


class NormActConv(ConvBlock):
    """Norm, activation, convolution: the order of mmFormer."""

    norm_first = True


class ConvNormAct(ConvBlock):
    """Convolution, norm, activation: the order of RFNet and M2FTrans."""

    norm_first = False


def upsample(x: Tensor, scale_factor: int) -> Tensor:
    """Bi- or trilinear interpolation of a feature map by a factor, with aligned corners; fast with channels last."""
    mode = {4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, scale_factor=scale_factor, mode=mode, align_corners=True)


def upsample_logits(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bi- or trilinear interpolation to a size, with aligned corners, of a map [B, K, ...] with the channels first.

    Each axis is a product with a small matrix: up to ten times faster than torch's interpolation in that order.
    """
    for axis, length in enumerate(size, start=2):
        matrix = interpolation_matrix(x.shape[axis], length, x.device, x.dtype)
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = (matrix @ x.flatten(axis + 1)).unflatten(-1, after) if after else x @ matrix.mT
        x = x.reshape(*before, length, *after)
    return x


@functools.lru_cache(maxsize=32)
def interpolation_matrix(length: int, new_length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Linear interpolation with aligned corners as a product: [new_length, length]."""
    identity = torch.eye(length, device=device, dtype=dtype)[None]
    return F.interpolate(identity, size=new_length, mode="linear", align_corners=True)[0].mT.contiguous()


class EncoderStage(nn.Module):
    """One level of an encoder: a convolution that may halve the size, then a residual pair at the new size."""

    def __init__(self, entry: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.entry = entry
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return x + self.second(self.first(x))


class Encoder(nn.Module):
    """Encoder of a single modality; the size halves and the width doubles per level.

    Args:
        block: order of the convolution blocks.

    Shape:
        - Input: [B, 1, H, W(, D)].
        - Output: one tensor per level, level l (from 0) is [B, width * 2^l, H / 2^l, W / 2^l(, D / 2^l)].
    """

    def __init__(self, spatial_dims: int, width: int, num_levels: int, *, block: type[ConvBlock]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        # The first convolution sees raw intensities: no norm and activation before it.
        bare = block is NormActConv
        entry = conv(spatial_dims, 1, width, padding_mode="reflect") if bare else block(spatial_dims, 1, width)
        channels = width
        for level in range(num_levels):
            if level > 0:
                entry = block(spatial_dims, channels, 2 * channels, stride=2)
                channels *= 2
            pair = [block(spatial_dims, channels, channels) for _ in range(2)]
            self.stages.append(EncoderStage(entry, *pair))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class DecoderStage(nn.Module):
    """One level of a decoder: up-sample and halve the width, join the skip connection, halve again, project.

    Shape:
        - Input: x [B, 2C, h, w(, d)], skip [B, C, 2h, 2w(, 2d)].
        - Output: [B, C, 2h, 2w(, 2d)].

    Args:
        block: order of the convolution blocks.
        skip_first: whether the skip connection comes first in the channel concatenation. It changes nothing but the
            order of the weights, which the reference implementations do not agree on.
    """

    def __init__(self, spatial_dims: int, channels: int, *, block: type[ConvBlock], skip_first: bool) -> None:
        super().__init__()
        self.reduce = block(spatial_dims, 2 * channels, channels)
        self.merge = block(spatial_dims, 2 * channels, channels)
        self.project = block(spatial_dims, channels, channels, kernel_size=1)
        self.skip_first = skip_first

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.reduce(upsample(x, 2))
        joined = torch.cat([skip, x] if self.skip_first else [x, skip], dim=1)
        return self.project(self.merge(joined))


class ModalityFusion(nn.Sequential):
    """Fuse the maps of M modalities by a pointwise, a 3x3 and a pointwise block.

    The first block's product over the channels of all modalities is the sum of one product per modality. Those do not
    depend on what else is there: :meth:`project` computes each once, for every combination and student.

    Args:
        channels: channels of a modality's map.
        hidden_channels: channels of the two first blocks' output.
        out_channels: channels of the fused map.
        block: order of the convolution blocks.
        padding_mode: of the 3x3 convolution.
    """

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        block: type[ConvBlock],
        padding_mode: str = "reflect",
    ) -> None:
        super().__init__(
            block(spatial_dims, num_modalities * channels, hidden_channels, kernel_size=1),
            block(spatial_dims, hidden_channels, hidden_channels, padding_mode=padding_mode),
            block(spatial_dims, hidden_channels, out_channels, kernel_size=1),
        )
        self.channels = channels

    def project(self, x: Tensor, modality: int) -> Tensor:
        """The part of a modality's map [B, C, ...] in the first product: [B, hidden_channels, ...]; 0 of zeros."""
        first = self[0]
        weight = first.conv.weight.narrow(1, modality * self.channels, self.channels)
        return pointwise(first.norm_act(x) if first.norm_first else x, weight)

    def forward(self, projected: Sequence[Tensor]) -> Tensor:
        """The fused map [B, out_channels, ...] from what :meth:`project` gave for the modalities that are there."""
        first, *others = self
        bias = first.conv.bias
        x = sum_maps(projected) + bias.view(-1, *[1] * (projected[0].ndim - 2))
        x = x if first.norm_first else first.norm_act(x)
        for layer in others:
            x = layer(x)
        return x


def sum_maps(maps: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of the same shape."""
    return functools.reduce(torch.add, maps)


class UNetDecoder(nn.Module):
    """Plain U-Net decoder from one modality's features to logits, shared by all modalities ("decoder_sep").

    Args:
        block: order of the convolution blocks.

    Shape:
        - Input: the output of :class:`Encoder`.
        - Output: [B, num_classes, H, W(, D)].
    """

    def __init__(
        self, spatial_dims: int, width: int, num_levels: int, num_classes: int, *, block: type[ConvBlock]
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            DecoderStage(spatial_dims, width * 2**level, block=block, skip_first=False)
            for level in reversed(range(num_levels - 1))
        )
        self.head = head(spatial_dims, width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *skips, x = features
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        return self.head(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention without bias on queries, keys and values. Shape: [B, T, C] -> [B, T, C].

    What is added to the scores before the softmax, [B or 1, 1, T, T], is -inf where a query must not see a key.
    """

    def __init__(self, channels: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.dropout_rate = dropout_rate
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.project = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout_rate)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [B, heads, T, C / heads]."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, score_bias: Tensor | None = None) -> Tensor:
        query, key, value = self.heads(x)
        dropout_rate = self.dropout_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(
            query, key, value, score_bias, dropout_rate, scale=self.scale
        )  # [B, heads, T, C / heads]
        return self.dropout(self.project(x.transpose(1, 2).flatten(2)))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed-forward(norm(x)). Shape: [B, T, C]."""

    def __init__(self, channels: int, *, num_heads: int, mlp_channels: int, dropout_rate: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, num_heads, dropout_rate)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = MLPBlock(channels, mlp_channels, dropout_rate)

    def forward(self, x: Tensor, score_bias: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), score_bias)
        return x + self.mlp(self.mlp_norm(x))
