"""mmFormer: a convolutional encoder and a transformer per modality, joined by a transformer over all of them.

Papers:
    Y. Zhang et al., "mmFormer: Multimodal Medical Transformer for Incomplete Multimodal Learning of Brain Tumor
    Segmentation", MICCAI 2022, https://arxiv.org/abs/2206.02425.
    J. Shi et al., "PASSION", ACM MM 2024, https://doi.org/10.1145/3664647.3681543, whose variant (width 8, logits of
    every level put out) this is. Written from the papers and the shapes of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from passion_monai.networks.base import Backbone, DecoderOutput, Features, masked_features
from passion_monai.networks.blocks import (
    DecoderStage,
    Encoder,
    ModalityFusion,
    NormActConv,
    TransformerLayer,
    UNetDecoder,
    conv,
    head,
)

__all__ = ["MMFormer"]

NUM_LEVELS = 5
TOKEN_ORDERS = ("scrambled", "aligned")


class MMFormer(Backbone):
    """mmFormer for any number of modalities, in 2-D and 3-D.

    Per modality: a five-level encoder, a 1x1 convolution to tokens and one transformer layer among its own tokens
    ("intra"). Then one transformer layer among the tokens of all modalities ("inter"), where those of an absent
    modality are zero but keep their position embedding and are attended to, and a decoder that fuses the masked
    features of all modalities at every level.

    Args:
        spatial_dims: 2 or 3.
        num_modalities: M, the number of image channels.
        num_classes: K, background included.
        img_size: spatial size of the crop, multiples of 16 and at least 32; it fixes the number of tokens.
        width: channels of the finest level.
        token_channels: channels of a token.
        num_heads: attention heads.
        mlp_channels: hidden channels of the transformer's feed-forward part.
        dropout_rate: dropout in the transformers.
        token_order: how the joint tokens become a map again. The authors reshape the M x T tokens so that four
            consecutive tokens of one modality share a position ("scrambled", which their weights need); with
            "aligned" each token keeps its position.

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M].
        - Output: logits [B, K, H, W(, D)]. `decode` adds auxiliary logits at 1/2, 1/4, 1/8 and 1/16 of the size and
          the last feature map, [B, width, H, W(, D)].

    Raises:
        ValueError: when an argument is out of range.

    Example:
        >>> network = MMFormer(2, num_modalities=3, num_classes=4, img_size=32, mlp_channels=64)
        >>> network(torch.zeros(1, 3, 32, 32), torch.tensor([[True, False, True]])).shape
        torch.Size([1, 4, 32, 32])
    """

    modality_modules = (r"encoders\.(\d+)\.", r"to_tokens\.(\d+)\.", r"intra_transformers\.(\d+)\.")
    modality_axes: ClassVar = {r"position_embeddings$": 0, r"fusion_decoder\.fusions\.[0-3]\.0\.conv\.weight$": 1}
    # The tokens of all modalities form one sequence; channels computed from it belong to no modality.
    modality_mixing = (r"from_tokens\.", r"fusion_decoder\.fusions\.4\.0\.")

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        *,
        img_size: Sequence[int] | int,
        width: int = 8,
        token_channels: int = 512,
        num_heads: int = 8,
        mlp_channels: int = 4096,
        dropout_rate: float = 0.1,
        token_order: str = "scrambled",
    ) -> None:
        super().__init__(spatial_dims, num_modalities, num_classes, img_size, stride=2 ** (NUM_LEVELS - 1))
        if token_order not in TOKEN_ORDERS:
            raise ValueError(f"token_order must be one of {TOKEN_ORDERS}, got {token_order!r}.")
        self.token_order = token_order
        self.grid = tuple(size // self.stride for size in self.img_size)
        num_tokens = math.prod(self.grid)
        deepest = width * self.stride

        def transformer() -> TransformerLayer:
            return TransformerLayer(
                token_channels, num_heads=num_heads, mlp_channels=mlp_channels, dropout_rate=dropout_rate
            )

        def pointwise(in_channels: int, out_channels: int) -> nn.Module:
            return conv(spatial_dims, in_channels, out_channels, kernel_size=1, padding_mode="zeros")

        each = range(num_modalities)
        self.encoders = nn.ModuleList(Encoder(spatial_dims, width, NUM_LEVELS, block=NormActConv) for _ in each)
        self.to_tokens = nn.ModuleList(pointwise(deepest, token_channels) for _ in each)
        self.intra_transformers = nn.ModuleList(transformer() for _ in each)
        self.position_embeddings = nn.Parameter(torch.zeros(num_modalities, num_tokens, token_channels))
        self.inter_transformer = transformer()
        self.from_tokens = pointwise(num_modalities * token_channels, num_modalities * deepest)
        self.fusion_decoder = FusionDecoder(spatial_dims, num_modalities, num_classes, width=width)
        self.modality_decoder = UNetDecoder(spatial_dims, width, NUM_LEVELS, num_classes, block=NormActConv)

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Five levels of convolutional features, projections of the first four for the fusion, and the tokens."""
        levels = self.encoders[modality](image)
        fusions = self.fusion_decoder.fusions
        projected = [fusion.project(x, modality) for fusion, x in zip(fusions, levels[:-1], strict=False)]
        tokens = self.to_tokens[modality](levels[-1]).flatten(2).transpose(1, 2)  # [B, T, token_channels]
        return (*levels, *projected, self.intra_transformers[modality](tokens + self.position_embeddings[modality]))

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Join the tokens of the modalities in `presence` and decode; see the base class."""
        present = masked_features(features, presence)
        joint = self._join_tokens({modality: maps[-1] for modality, maps in present.items()})
        return self.fusion_decoder([maps[NUM_LEVELS:-1] for maps in present.values()], joint)

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """One modality's own prediction, from its convolutional features alone; see the base class."""
        return self.modality_decoder(maps[:NUM_LEVELS])

    def _join_tokens(self, tokens: Mapping[int, Tensor]) -> Tensor:
        """Attend among all tokens: [B, T, C] of each present modality -> [B, M * deepest channels, *grid]."""
        batch = len(next(iter(tokens.values())))
        sequence = [
            embedding + tokens[modality] if modality in tokens else embedding.expand(batch, -1, -1)
            for modality, embedding in enumerate(self.position_embeddings)
        ]
        joined = self.inter_transformer(torch.cat(sequence, dim=1))  # [B, M * T, C]
        if self.token_order == "aligned":
            joined = joined.unflatten(1, (self.num_modalities, -1)).transpose(1, 2)  # [B, T, M, C]
        joint = joined.reshape(batch, *self.grid, -1).movedim(-1, 1)  # [B, M * C, *grid]
        return self.from_tokens(joint)


class FusionDecoder(nn.Module):
    """Decoder that fuses the modalities and gives logits at every level.

    Shape:
        - Input: outputs of `fusions[l].project` for levels 0 to 3 of every present modality; joint [B, M * C_4, ...]
          for the deepest.
    """

    def __init__(self, spatial_dims: int, num_modalities: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(NUM_LEVELS)]
        self.fusions = nn.ModuleList(
            ModalityFusion(spatial_dims, num_modalities, c, c, c, block=NormActConv, padding_mode="zeros")
            for c in channels
        )
        self.stages = nn.ModuleList(
            DecoderStage(spatial_dims, c, block=NormActConv, skip_first=True) for c in channels[:-1]
        )
        self.heads = nn.ModuleList(head(spatial_dims, c, num_classes) for c in channels)

    def forward(self, projected: Sequence[tuple[Tensor, ...]], joint: Tensor) -> DecoderOutput:
        deepest = self.fusions[-1]
        x = deepest([deepest.project(part, m) for m, part in enumerate(joint.split(deepest.channels, dim=1))])
        coarse_to_fine = [self.heads[-1](x)]
        for level in reversed(range(NUM_LEVELS - 1)):
            x = self.stages[level](x, self.fusions[level]([maps[level] for maps in projected]))
            coarse_to_fine.append(self.heads[level](x))
        logits, *auxiliary = reversed(coarse_to_fine)
        return DecoderOutput(logits, tuple(auxiliary), x)
