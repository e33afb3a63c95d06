"""RFNet: an encoder per modality and a decoder that weighs the modalities anew in every region.

Papers:
    Y. Ding et al., "RFNet: Region-aware Fusion Network for Incomplete Multi-modal Brain Tumor Segmentation", ICCV 2021,
    https://openaccess.thecvf.com/content/ICCV2021/html/Ding_RFNet_Region-Aware_Fusion_Network_for_Incomplete_Multi-Modal_Brain_Tumor_Segmentation_ICCV_2021_paper.html.
    J. Shi et al., "PASSION", ACM MM 2024, https://doi.org/10.1145/3664647.3681543, whose variant (width 8, logits of
    every level put out) this is. Written from the papers and the shapes of the published weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passion_monai.networks.base import Backbone, DecoderOutput, Features, mask_features
from passion_monai.networks.blocks import (
    NEGATIVE_SLOPE,
    ConvNormAct,
    Encoder,
    UNetDecoder,
    conv,
    upsample,
)

__all__ = ["RFNet"]

NUM_LEVELS = 4
BOTTLENECK = 4
"""How much narrower than its features a region predictor is; the width must be its multiple."""


class RFNet(Backbone):
    """RFNet for any number of modalities, in 2-D and 3-D.

    Per modality: a four-level encoder. Then, from the deepest level up, the regions (one per class) are predicted from
    the masked features of all modalities and from what has been decoded so far, and each region fuses the modalities
    with weights of its own. The region predictions are the auxiliary outputs.

    Args:
        spatial_dims: 2 or 3.
        num_modalities: M, the number of image channels.
        num_classes: K, background included; as many regions are fused.
        img_size: spatial size of the crop, multiples of 8 and at least 16; no parameter depends on it.
        width: channels of the finest level, a multiple of 4; the original RFNet has 16.

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M].
        - Output: logits [B, K, H, W(, D)]. `decode` adds auxiliary logits at 1 (full size), 1/2, 1/4 and 1/8 of the
          size and the last feature map, [B, width, H, W(, D)].

    Raises:
        ValueError: when an argument is out of range.

    Example:
        >>> network = RFNet(2, num_modalities=3, num_classes=4, img_size=32)
        >>> network(torch.zeros(1, 3, 32, 32), torch.tensor([[True, False, True]])).shape
        torch.Size([1, 4, 32, 32])
    """

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        *,
        img_size: Sequence[int] | int,
        width: int = 8,
    ) -> None:
        super().__init__(spatial_dims, num_modalities, num_classes, img_size, stride=2 ** (NUM_LEVELS - 1))
        if width < BOTTLENECK or width % BOTTLENECK:
            raise ValueError(f"width must be a positive multiple of {BOTTLENECK}, got {width}.")
        self.encoders = nn.ModuleList(
            Encoder(spatial_dims, width, NUM_LEVELS, block=ConvNormAct) for _ in range(num_modalities)
        )
        self.fusion_decoder = FusionDecoder(spatial_dims, num_modalities, num_classes, width=width)
        self.modality_decoder = UNetDecoder(spatial_dims, width, NUM_LEVELS, num_classes, block=ConvNormAct)

    def encode_modality(self, image: Tensor, modality: int) -> Features:
        """Four levels of convolutional features; see the base class."""
        return tuple(self.encoders[modality](image))

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Fuse the modalities in `presence` region by region at every level; see the base class."""
        return self.fusion_decoder([mask_features(level, presence) for level in features])

    def decode_modality(self, features: Features, modality: int) -> Tensor:
        """One modality's own prediction; see the base class."""
        return self.modality_decoder([level[:, modality] for level in features])


class RegionPredictor(nn.Module):
    """Coarse segmentation at one level, from all modalities and the decoder's feature map ("prm_generator").

    Args:
        use_decoded: whether there is a feature map of the decoder; not so at the deepest level.
        head_channels: channels before the logits.

    Shape:
        - Input: features [B, M, C, h, w(, d)], decoded [B, C, h, w(, d)] or None.
        - Output: logits [B, K, h, w(, d)].
    """

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        *,
        channels: int,
        use_decoded: bool,
        head_channels: int = 16,
    ) -> None:
        super().__init__()
        narrow = channels // BOTTLENECK
        self.embedding = nn.Sequential(
            ConvNormAct(spatial_dims, num_modalities * channels, narrow, kernel_size=1),
            ConvNormAct(spatial_dims, narrow, narrow),
            ConvNormAct(spatial_dims, narrow, channels, kernel_size=1),
        )
        self.head = nn.Sequential(
            ConvNormAct(spatial_dims, (2 if use_decoded else 1) * channels, head_channels, kernel_size=1),
            conv(spatial_dims, head_channels, num_classes, kernel_size=1, padding_mode="zeros"),
        )

    def forward(self, features: Tensor, decoded: Tensor | None) -> Tensor:
        embedded = self.embedding(features.flatten(1, 2))
        return self.head(embedded if decoded is None else torch.cat([decoded, embedded], dim=1))


class RegionFusion(nn.Module):
    """Fuse the modalities of one level with weights that depend on the region ("RFM").

    For region k with probability p_k at every voxel v, which carries no gradient, and features y_m of modality m::

        share_k = mean_v(p_k) + eps
        pooled_k,m = mean_v(p_k * y_m) / share_k
        weight_k,m = sigmoid(MLP_k([pooled_k,1, ..., pooled_k,M, share_k]))
        region_k = p_k * sum_m(weight_k,m * y_m)

    Half of the output is made of all regions, half of all modalities without weights. Absent modalities have zero
    features and add nothing to a sum; the weights of the others are not renormalised.

    Args:
        weight_channels: hidden channels of MLP_k.
        eps: keeps the share of an empty region positive.

    Shape:
        - Input: features [B, M, C, h, w(, d)], logits of the regions [B, K, h, w(, d)].
        - Output: [B, C, h, w(, d)].
    """

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        *,
        channels: int,
        weight_channels: int = 128,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        self.eps = eps

        def linear(in_channels: int, out_channels: int) -> nn.Module:
            return conv(1, in_channels, out_channels, kernel_size=1, padding_mode="zeros")

        def fusion(num_maps: int) -> nn.Module:
            return nn.Sequential(
                ConvNormAct(spatial_dims, num_maps * channels, channels, kernel_size=1),
                ConvNormAct(spatial_dims, channels, channels),
                ConvNormAct(spatial_dims, channels, channels // 2, kernel_size=1),
            )

        self.weightings = nn.ModuleList(
            nn.Sequential(
                linear(num_modalities * channels + 1, weight_channels),
                nn.LeakyReLU(NEGATIVE_SLOPE),
                linear(weight_channels, num_modalities),
                nn.Sigmoid(),
            )
            for _ in range(num_classes)
        )
        self.fuse_regions = fusion(num_classes)
        self.fuse_modalities = fusion(num_modalities)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        regions = self.weigh_regions(features, logits)
        fused = self.fuse_regions(regions.flatten(1, 2)), self.fuse_modalities(features.flatten(1, 2))
        return torch.cat(fused, dim=1)

    def weigh_regions(self, features: Tensor, logits: Tensor) -> Tensor:
        """region_k of all regions, [B, K, C, h, w(, d)]; the size of M times that is never held."""
        # In half precision the sums over voxels would overflow.
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            probabilities = logits.detach().softmax(dim=1, dtype=dtype).flatten(2)  # [B, K, V]
            voxels = features.to(dtype).flatten(3)  # [B, M, C, V]
            share = probabilities.mean(dim=2, keepdim=True) + self.eps  # [B, K, 1]
            pooled = probabilities @ voxels.flatten(1, 2).mT / voxels.shape[-1] / share  # [B, K, M * C]
            weights = self._weights(torch.cat([pooled, share], dim=2))  # [B, K, M]
            mixed = (weights @ voxels.flatten(2)).unflatten(2, voxels.shape[2:])  # [B, K, C, V]
            return (probabilities.unsqueeze(2) * mixed).unflatten(3, features.shape[3:])

    def _weights(self, descriptors: Tensor) -> Tensor:
        """Weight of every modality in every region: [B, K, M * C + 1] -> [B, K, M]."""
        columns = descriptors.unsqueeze(3).unbind(dim=1)  # K times [B, M * C + 1, 1]
        return torch.cat([mlp(x) for mlp, x in zip(self.weightings, columns, strict=True)], dim=2).mT


class FusionDecoder(nn.Module):
    """Decoder that predicts regions and fuses the modalities within them at every level.

    Shape:
        - Input: features [B, M, C_l, ...] of every level l, masked.
    """

    def __init__(self, spatial_dims: int, num_modalities: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        sizes = (spatial_dims, num_modalities, num_classes)
        channels = [width * 2**level for level in range(NUM_LEVELS)]
        self.predictors = nn.ModuleList(
            RegionPredictor(*sizes, channels=c, use_decoded=c != channels[-1]) for c in channels
        )
        self.fusions = nn.ModuleList(RegionFusion(*sizes, channels=c) for c in channels)
        self.reductions = nn.ModuleList(ConvNormAct(spatial_dims, 2 * c, c) for c in channels[:-1])
        self.merges = nn.ModuleList(
            nn.Sequential(ConvNormAct(spatial_dims, 2 * c, c), ConvNormAct(spatial_dims, c, c, kernel_size=1))
            for c in channels[:-1]
        )
        self.head = conv(spatial_dims, width, num_classes, kernel_size=1, padding_mode="zeros")

    def forward(self, features: Sequence[Tensor]) -> DecoderOutput:
        logits = self.predictors[-1](features[-1], None)
        x = self.fusions[-1](features[-1], logits)
        coarse_to_fine = [logits]
        for level in reversed(range(NUM_LEVELS - 1)):
            x = self.reductions[level](upsample(x, 2))
            logits = self.predictors[level](features[level], x)
            skip = self.fusions[level](features[level], logits)
            x = self.merges[level](torch.cat([skip, x], dim=1))
            coarse_to_fine.append(logits)
        return DecoderOutput(self.head(x), tuple(reversed(coarse_to_fine)), x)
