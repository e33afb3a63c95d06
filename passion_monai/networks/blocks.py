"""Layers that more than one backbone is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from monai.networks.blocks import MLPBlock
from monai.networks.layers.factories import Act, Conv, Norm
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ConvBlock",
    "ConvNormAct",
    "DecoderStage",
    "Encoder",
    "NormActConv",
    "TransformerLayer",
    "UNetDecoder",
    "conv",
    "upsample",
]

NEGATIVE_SLOPE = 0.2


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
    return layer


class ConvBlock(nn.Sequential):
    """A convolution with instance norm and leaky ReLU, which have no parameters, before or after it.

    Args:
        padding_mode: of the convolution.
    """

    order: tuple[str, ...]

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
        normed = in_channels if self.order[0] == "norm" else out_channels
        parts = {
            "norm": Norm[Norm.INSTANCE, spatial_dims](normed),
            "act": Act[Act.LEAKYRELU](negative_slope=NEGATIVE_SLOPE),
            "conv": conv(
                spatial_dims,
                in_channels,
                out_channels,
                kernel_size=kernel_size,
                stride=stride,
                padding_mode=padding_mode,
            ),
        }
        super().__init__(OrderedDict((name, parts[name]) for name in self.order))


class NormActConv(ConvBlock):
    """Norm, activation, convolution: the order of mmFormer."""

    order = ("norm", "act", "conv")


class ConvNormAct(ConvBlock):
    """Convolution, norm, activation: the order of RFNet and M2FTrans."""

    order = ("conv", "norm", "act")


def upsample(x: Tensor, scale_factor: int | None = None, *, size: Sequence[int] | None = None) -> Tensor:
    """Bi- or trilinear interpolation with aligned corners, by a factor or to a size."""
    mode = {4: "bilinear", 5: "trilinear"}[x.ndim]
    target = None if size is None else list(size)
    return F.interpolate(x, size=target, scale_factor=scale_factor, mode=mode, align_corners=True)


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
        self.head = conv(spatial_dims, width, num_classes, kernel_size=1, padding_mode="zeros")

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
