"""M2FTrans: learned fusion tokens that attend to the available modalities, and cross-attention to fuse their maps.

Papers:
    J. Shi et al., "M2FTrans: Modality-Masked Fusion Transformer for Incomplete Multi-Modality Brain Tumor
    Segmentation", IEEE J-BHI 2024, https://doi.org/10.1109/JBHI.2023.3326151.
    J. Shi et al., "PASSION", ACM MM 2024, https://doi.org/10.1145/3664647.3681543, whose variant (width 8, logits of
    every level put out) this is. Written from the papers and the shapes of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passion_monai.devices import send
from passion_monai.networks.base import Backbone, DecoderOutput, Features, masked_features
from passion_monai.networks.blocks import (
    ConvNormAct,
    Encoder,
    ModalityFusion,
    TransformerLayer,
    UNetDecoder,
    conv,
    head,
    upsample,
)

__all__ = ["M2FTrans"]

NUM_LEVELS = 5
NUM_LAYERS = 3
NUM_CONV_LEVELS = 3
"""Levels whose maps are fused by convolutions; the deeper ones are by cross-attention."""
HEAD_CHANNELS = 16


class M2FTrans(Backbone):
    """M2FTrans for any number of modalities, in 2-D and 3-D.

    Per modality: a five-level encoder, whose deepest features are its tokens. A transformer joins them with learned
    fusion tokens, which see the present modalities; the tokens of a modality see only each other. The attention of
    the fusion tokens to a position of a modality weights the features of that modality at every level of the decoder.
    The decoder fuses them by cross-attention at its two deepest levels and by convolutions at the others.

    Args:
        spatial_dims: 2 or 3.
        num_modalities: M, the number of image channels.
        num_classes: K, background included.
        img_size: spatial size of the crop, multiples of 16 and at least 32; it fixes the number of tokens.
        width: channels of the finest level; a token has 16 times as many.
        num_heads: attention heads, a divisor of the token's channels.
        mlp_channels: hidden channels of the transformer's feed-forward part.
        dropout_rate: dropout in the transformers.

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M].
        - Output: logits [B, K, H, W(, D)]. `decode` adds auxiliary logits at 1, 1/2, 1/4, 1/8 and 1/16 of the size
          and the last feature map, [B, width, H, W(, D)].

    Raises:
        ValueError: when an argument is out of range.

    Example:
        >>> network = M2FTrans(2, num_modalities=3, num_classes=4, img_size=32, mlp_channels=64)
        >>> network(torch.zeros(1, 3, 32, 32), torch.tensor([[True, False, True]])).shape
        torch.Size([1, 4, 32, 32])
    """

    modality_modules = (
        r"encoders\.(\d+)\.",
        r"fusion_decoder\.levels\.\d+\.fusion\.attentions\.\d+\.(?:keys|values)\.(\d+)\.",
    )
    modality_axes: ClassVar = {
        r"bottleneck\.position_embeddings$": 0,
        r"fusion_decoder\.levels\.\d+\.fusion\.layers\.0\.conv\.weight$": 1,
    }

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        *,
        img_size: Sequence[int] | int,
        width: int = 8,
        num_heads: int = 8,
        mlp_channels: int = 4096,
        dropout_rate: float = 0.1,
    ) -> None:
        super().__init__(spatial_dims, num_modalities, num_classes, img_size, stride=2 ** (NUM_LEVELS - 1))
        token_channels = width * self.stride
        if token_channels % num_heads:
            raise ValueError(f"num_heads must divide width * {self.stride} = {token_channels}, got {num_heads}.")
        self.encoders = nn.ModuleList(
            Encoder(spatial_dims, width, NUM_LEVELS, block=ConvNormAct) for _ in range(num_modalities)
        )
        self.bottleneck = FusionTransformer(
            num_modalities,
            token_channels,
            grid=[size // self.stride for size in self.img_size],
            num_heads=num_heads,
            mlp_channels=mlp_channels,
            dropout_rate=dropout_rate,
        )
        self.fusion_decoder = FusionDecoder(
            spatial_dims, num_modalities, num_classes, width=width, dropout_rate=dropout_rate
        )
        self.modality_decoder = UNetDecoder(spatial_dims, width, NUM_LEVELS, num_classes, block=ConvNormAct)

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Five levels of convolutional features, then the projections of the levels that convolutions fuse."""
        levels = self.encoders[modality](image)
        fused = zip(self.fusion_decoder.levels[:NUM_CONV_LEVELS], levels, strict=False)
        return (*levels, *(level.fusion.layers.project(x, modality) for level, x in fused))

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Join the modalities in `presence` with the fusion tokens, weight their features, decode; see the base."""
        present = masked_features(features, presence)
        deepest, fused, weights = self.bottleneck({m: maps[NUM_LEVELS - 1] for m, maps in present.items()}, presence)
        weighted = [_weight(deepest, weights)]
        for level in reversed(range(NUM_LEVELS - 1)):
            weights = F.interpolate(weights, scale_factor=2, mode="nearest")
            # A weight common to all channels of a position commutes with the product over the channels.
            index = level + NUM_LEVELS if level < NUM_CONV_LEVELS else level
            weighted.append(_weight({m: maps[index] for m, maps in present.items()}, weights))
        return self.fusion_decoder(fused, weighted[::-1], presence)

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """One modality's own prediction, from its encoder's features alone; see the base class."""
        return self.modality_decoder(maps[:NUM_LEVELS])


def _weight(maps: Mapping[int, Tensor], weights: Tensor) -> dict[int, Tensor]:
    """Multiply the maps [B, C, h, w(, d)] of P modalities by their weights, [B, P, h, w(, d)]."""
    return {m: map_ * weight for (m, map_), weight in zip(maps.items(), weights.split(1, dim=1), strict=True)}


class FusionTransformer(nn.Module):
    """Transformer among the tokens of every modality and the learned fusion tokens ("Bottleneck").

    Args:
        grid: spatial size of the maps, whose T positions are one token each.

    Shape:
        - Input: features of the P present modalities by index, [B, C, h, w(, d)]; presence bool [B or 1, M].
        - Output: their maps likewise, the fusion tokens' map [B, C, h, w(, d)] and the modalities' weights
          [B, P, h, w(, d)].
    """

    def __init__(
        self,
        num_modalities: int,
        channels: int,
        grid: Sequence[int],
        *,
        num_heads: int,
        mlp_channels: int,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.num_tokens = math.prod(grid)
        self.position_embeddings = nn.Parameter(torch.zeros(num_modalities + 1, self.num_tokens, channels))
        self.fusion_tokens = nn.Parameter(torch.randn(self.num_tokens, channels))
        self.layers = nn.ModuleList(
            TransformerLayer(channels, num_heads=num_heads, mlp_channels=mlp_channels, dropout_rate=dropout_rate)
            for _ in range(NUM_LAYERS)
        )

    def forward(self, features: Mapping[int, Tensor], presence: Tensor) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        modalities = list(features)
        maps = torch.stack(list(features.values()), dim=1).flatten(3).transpose(2, 3)  # [B, P, T, C]
        fusion_tokens = self.fusion_tokens.expand(len(maps), 1, -1, -1)
        embeddings = torch.stack([self.position_embeddings[index] for index in (*modalities, -1)])
        tokens = (torch.cat([maps, fusion_tokens], dim=1) + embeddings).flatten(1, 2)
        score_bias = self.score_bias(send(presence[:, modalities], tokens.device), tokens.dtype)
        weights = self.modality_weights(tokens, score_bias)
        for layer in self.layers:
            tokens = layer(tokens, score_bias)
        *joined, fused = tokens.unflatten(1, (-1, self.num_tokens)).transpose(2, 3).unflatten(3, self.grid).unbind(1)
        return dict(zip(modalities, joined, strict=True)), fused, weights

    def score_bias(self, presence: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask of the attention: 0 where a token sees another, otherwise -inf.

        The tokens of a modality see only each other, even if it is absent, because the softmax of a row of -inf is
        undefined. The fusion tokens see themselves and the modalities in `presence`.

        Returns:
            Tensor [B or 1, 1, (M + 1) T, (M + 1) T].
        """
        groups = torch.arange(presence.shape[1] + 1, device=presence.device)
        is_fusion = groups == presence.shape[1]
        available = torch.cat([presence, torch.ones_like(presence[:, :1])], dim=1)  # [B, M + 1]
        visible = (groups[:, None] == groups) | (is_fusion[:, None] & available[:, None])  # [B, M + 1, M + 1]
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)
        bias = bias[:, :, None, :, None].expand(-1, -1, self.num_tokens, -1, self.num_tokens)
        return bias.flatten(3, 4).flatten(1, 2).unsqueeze(1)

    def modality_weights(self, tokens: Tensor, score_bias: Tensor) -> Tensor:
        """How much the fusion tokens attend to every other token in the first layer, without gradient.

        Summed over heads and queries, so that the mean over the present modalities and the fusion tokens is
        num_heads / (number of them), and absent modalities have exactly 0.

        Differs from the reference: dropout of the attention is drawn anew here, because the fused attention kernel
        does not return its weights.

        Returns:
            Tensor [B, M, h, w(, d)].
        """
        layer = cast(TransformerLayer, self.layers[0])
        queries = slice(-self.num_tokens, None)
        # With gradients, as the layer itself calls it: autocast may keep a copy of the weights in half precision, and
        # one made without them would leave the weights untrained.
        query, key, _ = (part.detach() for part in layer.attention.heads(layer.attention_norm(tokens)))
        with torch.no_grad():
            scores = layer.attention.scale * query[:, :, queries] @ key.transpose(2, 3) + score_bias[:, :, queries]
            attention = scores.softmax(dim=-1)  # [B, heads, T, (M + 1) T]
            attention = F.dropout(attention, layer.attention.dropout_rate, self.training)
            weights = attention.sum(dim=(1, 2))[:, : -self.num_tokens]
        return weights.unflatten(1, (-1, *self.grid))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel. Shape: [B, C, h, w(, d)]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GroupedConv(nn.Sequential):
    """Pointwise, grouped 3x3 and pointwise convolution, each with a layer norm. Shape: [B, C, h, w(, d)].

    Args:
        channels: C, and the number of groups.
        expansion: channels per group.
    """

    def __init__(self, spatial_dims: int, channels: int, *, expansion: int = 1) -> None:
        hidden = expansion * channels
        super().__init__(
            conv(spatial_dims, channels, hidden, kernel_size=1, padding_mode="zeros"),
            ChannelNorm(hidden),
            nn.GELU(),
            conv(spatial_dims, hidden, hidden, groups=channels, padding_mode="zeros"),
            ChannelNorm(hidden),
            nn.GELU(),
            conv(spatial_dims, hidden, channels, kernel_size=1, padding_mode="zeros"),
            ChannelNorm(channels),
        )


class CrossAttention(nn.Module):
    """Attention of the fused map's channels to the channels of every modality's map.

    Shape:
        - Input: x [B, C, h, w(, d)], features of the P present modalities by index, [B, C, h, w(, d)], score_bias
          [B or 1, 1, 1, P * C].
        - Output: [B, C, h, w(, d)].
    """

    def __init__(self, spatial_dims: int, num_modalities: int, channels: int) -> None:
        super().__init__()
        self.query = GroupedConv(spatial_dims, channels)
        self.keys = nn.ModuleList(GroupedConv(spatial_dims, channels) for _ in range(num_modalities))
        self.values = nn.ModuleList(GroupedConv(spatial_dims, channels) for _ in range(num_modalities))
        self.project = GroupedConv(spatial_dims, channels)

    def forward(self, x: Tensor, features: Mapping[int, Tensor], score_bias: Tensor) -> Tensor:
        key = torch.cat([self.keys[m](map_) for m, map_ in features.items()], dim=1)
        value = torch.cat([self.values[m](map_) for m, map_ in features.items()], dim=1)
        # A channel is a token and its V pixels are what the token consists of, for a single head.
        query, key, value = (m.flatten(2).unsqueeze(1) for m in (self.query(x), key, value))  # [B, 1, C or P * C, V]
        return self.project(F.scaled_dot_product_attention(query, key, value, score_bias).view(x.shape))


class CrossAttentionFusion(nn.Module):
    """Fuse the modalities' maps into the decoder's by two rounds of cross-attention ("CT").

    Shape:
        - Input: x [B, C, h, w(, d)], features of the present modalities by index, [B, C, h, w(, d)], presence bool
          [B or 1, M].
        - Output: [B, C, h, w(, d)].
    """

    def __init__(self, spatial_dims: int, num_modalities: int, channels: int, *, dropout_rate: float) -> None:
        super().__init__()
        rounds = range(2)
        self.attentions = nn.ModuleList(CrossAttention(spatial_dims, num_modalities, channels) for _ in rounds)
        self.mlps = nn.ModuleList(GroupedConv(spatial_dims, channels, expansion=4) for _ in rounds)
        self.modality_mlp = GroupedConv(spatial_dims, channels, expansion=4)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, features: Mapping[int, Tensor], presence: Tensor) -> Tensor:
        absent = ~send(presence[:, list(features)], x.device).repeat_interleave(x.shape[1], dim=1)[:, None, None]
        score_bias = torch.zeros_like(absent, dtype=x.dtype).masked_fill(absent, -math.inf)  # [B, 1, 1, P * C]
        x = self._round(0, x, features, score_bias)
        features = {modality: F.gelu(map_ + self.modality_mlp(map_)) for modality, map_ in features.items()}
        return self._round(1, x, features, score_bias)

    def _round(self, index: int, x: Tensor, features: Mapping[int, Tensor], score_bias: Tensor) -> Tensor:
        x = x + self.dropout(self.attentions[index](x, features, score_bias))
        return F.gelu(x + self.mlps[index](x))


class ConvFusion(nn.Module):
    """Fuse the modalities' maps by convolutions.

    Inputs and outputs are those of :class:`CrossAttentionFusion`, except that the maps come from `layers.project`.
    """

    def __init__(self, spatial_dims: int, num_modalities: int, channels: int) -> None:
        super().__init__()
        self.layers = ModalityFusion(spatial_dims, num_modalities, channels, channels, channels, block=ConvNormAct)

    def forward(self, x: Tensor, features: Mapping[int, Tensor], presence: Tensor) -> Tensor:
        return self.layers(list(features.values()))


class FusionLevel(nn.Module):
    """One level of the decoder: logits from the map of the level below, then fusion with the modalities' maps.

    Shape:
        - Input: x [B, C, h, w(, d)]; features of the present modalities by index, [B, C, h, w(, d)], as the fusion
          takes them; presence bool [B or 1, M].
        - Output: map [B, C, h, w(, d)], logits [B, K, h, w(, d)].
    """

    def __init__(self, spatial_dims: int, channels: int, num_classes: int, *, fusion: nn.Module) -> None:
        super().__init__()
        self.head = nn.Sequential(
            ConvNormAct(spatial_dims, channels, HEAD_CHANNELS, kernel_size=1),
            head(spatial_dims, HEAD_CHANNELS, num_classes),
        )
        self.fusion = fusion
        self.merge = ConvNormAct(spatial_dims, 2 * channels, channels)
        self.project = ConvNormAct(spatial_dims, channels, channels, kernel_size=1)

    def forward(self, x: Tensor, features: Mapping[int, Tensor], presence: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x)
        joined = torch.cat([self.fusion(x, features, presence), x], dim=1)
        return self.project(self.merge(joined)), logits


class FusionDecoder(nn.Module):
    """Decoder that fuses the weighted modalities and gives logits at every level.

    Shape:
        - Input: fused [B, C_4, ...], the fusion tokens' map; for each level the weighted maps of the present
          modalities, [B, C_l, ...], as its fusion takes them; presence bool [B or 1, M].
    """

    def __init__(
        self, spatial_dims: int, num_modalities: int, num_classes: int, *, width: int, dropout_rate: float
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(NUM_LEVELS)]

        def fusion(level: int) -> nn.Module:
            if level < NUM_CONV_LEVELS:
                return ConvFusion(spatial_dims, num_modalities, channels[level])
            return CrossAttentionFusion(spatial_dims, num_modalities, channels[level], dropout_rate=dropout_rate)

        self.levels = nn.ModuleList(
            FusionLevel(spatial_dims, c, num_classes, fusion=fusion(level)) for level, c in enumerate(channels)
        )
        self.reductions = nn.ModuleList(ConvNormAct(spatial_dims, 2 * c, c) for c in channels[:-1])
        self.head = head(spatial_dims, width, num_classes)

    def forward(self, fused: Tensor, features: Sequence[Mapping[int, Tensor]], presence: Tensor) -> DecoderOutput:
        x, logits = self.levels[-1](fused, features[-1], presence)
        coarse_to_fine = [logits]
        for level in reversed(range(NUM_LEVELS - 1)):
            x = self.reductions[level](upsample(x, 2))
            x, logits = self.levels[level](x, features[level], presence)
            coarse_to_fine.append(logits)
        return DecoderOutput(self.head(x), tuple(reversed(coarse_to_fine)), x)
