"""RFNet: an encoder per modality, and a decoder that weights the modalities separately in every region.

Papers:
    Y. Ding et al., "RFNet: Region-aware Fusion Network for Incomplete Multi-modal Brain Tumor Segmentation", ICCV 2021,
    https://openaccess.thecvf.com/content/ICCV2021/html/Ding_RFNet_Region-Aware_Fusion_Network_for_Incomplete_Multi-Modal_Brain_Tumor_Segmentation_ICCV_2021_paper.html.
    J. Shi et al., "PASSION", ACM MM 2024, https://doi.org/10.1145/3664647.3681543, whose variant (width 8, logits of
    every level put out) this is. Written from the papers and the shapes of the published weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from passion_monai.networks.base import Backbone, DecoderOutput, Features, masked_features
from passion_monai.networks.blocks import (
    NEGATIVE_SLOPE,
    ConvNormAct,
    Encoder,
    ModalityFusion,
    UNetDecoder,
    conv,
    head,
    is_exporting,
    upsample,
)
from passion_monai.precision import autocast

__all__ = ["RFNet"]

NUM_LEVELS = 4
VOXELS_AT_ONCE = 2**13
"""Voxels of a part in :class:`RegionMixing`: 1 MB of products for 4 regions of 8 channels."""
BOTTLENECK = 4
"""How much narrower than its features a region predictor is; the width must be its multiple."""


class RFNet(Backbone):
    """RFNet for any number of modalities, in 2-D and 3-D.

    Per modality: a four-level encoder. Then, from the deepest level up, the decoder predicts the regions (one per
    class) from the masked features of all modalities and its own map, and fuses the modalities with separate weights
    in each region. The region predictions are the auxiliary outputs.

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

    modality_modules = (r"encoders\.(\d+)\.",)
    modality_axes: ClassVar = {
        r"fusion_decoder\.predictors\.\d+\.embedding\.0\.conv\.weight$": 1,
        r"fusion_decoder\.fusions\.\d+\.fuse_modalities\.0\.conv\.weight$": 1,
        r"fusion_decoder\.fusions\.\d+\.weightings\.\d+\.0\.weight$": 1,
        r"fusion_decoder\.fusions\.\d+\.weightings\.\d+\.2\.(weight|bias)$": 0,
    }
    class_modules = (r"fusion_decoder\.fusions\.\d+\.weightings\.(\d+)\.",)
    class_axes: ClassVar = {**Backbone.class_axes, r"fusion_decoder\.fusions\.\d+\.fuse_regions\.0\.conv\.weight$": 1}

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

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Four levels of convolutional features, then their projections for the predictor and for the fusion."""
        levels = self.encoders[modality](image)
        decoder = self.fusion_decoder
        predictors = [p.embedding.project(x, modality) for p, x in zip(decoder.predictors, levels, strict=True)]
        fusions = [f.fuse_modalities.project(x, modality) for f, x in zip(decoder.fusions, levels, strict=True)]
        return (*levels, *predictors, *fusions)

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Fuse the modalities in `presence` region by region at every level; see the base class."""
        return self.fusion_decoder(masked_features(features, presence))

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """One modality's own prediction; see the base class."""
        return self.modality_decoder(maps[:NUM_LEVELS])


class RegionPredictor(nn.Module):
    """Coarse segmentation at one level, from all modalities and the decoder's feature map ("prm_generator").

    Args:
        use_decoded: whether the decoder has a feature map yet; False at the deepest level.
        head_channels: channels before the logits.

    Shape:
        - Input: outputs of `embedding.project` for every present modality, [B, C / 4, h, w(, d)]; decoded
          [B, C, h, w(, d)] or None.
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
        self.embedding = ModalityFusion(spatial_dims, num_modalities, channels, narrow, channels, block=ConvNormAct)
        self.head = nn.Sequential(
            ConvNormAct(spatial_dims, (2 if use_decoded else 1) * channels, head_channels, kernel_size=1),
            head(spatial_dims, head_channels, num_classes),
        )

    def forward(self, projected: Sequence[Tensor], decoded: Tensor | None) -> Tensor:
        embedded = self.embedding(projected)
        return self.head(embedded if decoded is None else torch.cat([decoded, embedded], dim=1))


class RegionFusion(nn.Module):
    """Fuse the modalities of one level with weights that depend on the region ("RFM").

    For region k with probability p_k at every voxel v, which carries no gradient, and features y_m of modality m::

        share_k = mean_v(p_k) + eps
        pooled_k,m = mean_v(p_k * y_m) / share_k
        weight_k,m = sigmoid(MLP_k([pooled_k,1, ..., pooled_k,M, share_k]))
        region_k = p_k * sum_m(weight_k,m * y_m)

    Half of the output is made of all regions, half of all modalities without weights. An absent modality adds nothing
    to a sum; the weights of the others are not renormalised.

    Args:
        weight_channels: hidden channels of MLP_k.
        eps: keeps the share of an empty region positive.

    Shape:
        - Input: features, of the present modalities by index [B, C, h, w(, d)]; what `fuse_modalities.project` gives
          for them, likewise; logits of the regions [B, K, h, w(, d)].
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
        self.num_modalities = num_modalities
        self.eps = eps

        def linear(in_channels: int, out_channels: int) -> nn.Module:
            return conv(1, in_channels, out_channels, kernel_size=1, padding_mode="zeros")

        self.weightings = nn.ModuleList(
            nn.Sequential(
                linear(num_modalities * channels + 1, weight_channels),
                nn.LeakyReLU(NEGATIVE_SLOPE),
                linear(weight_channels, num_modalities),
                nn.Sigmoid(),
            )
            for _ in range(num_classes)
        )
        # Its first product, over the maps of all regions, is what `project_regions` computes.
        self.fuse_regions = ModalityFusion(
            spatial_dims, num_classes, channels, channels, channels // 2, block=ConvNormAct
        )
        self.fuse_modalities = ModalityFusion(
            spatial_dims, num_modalities, channels, channels, channels // 2, block=ConvNormAct
        )

    def forward(self, features: Mapping[int, Tensor], projected: Sequence[Tensor], logits: Tensor) -> Tensor:
        regions = self.project_regions(features, logits)
        return torch.cat([self.fuse_regions([regions]), self.fuse_modalities(projected)], dim=1)

    def project_regions(self, features: Mapping[int, Tensor], logits: Tensor) -> Tensor:
        """The first product of `fuse_regions` on region_k of all regions, without its bias: [B, C, h, w(, d)].

        ``sum_k U_k (p_k * sum_m(weight_k,m * y_m)) = sum_k p_k * ((U_k weight_k,m)_m (y_m)_m)``: the products of all
        regions are one, and no map of a region of its own is needed.
        """
        # In half precision the sums over voxels would overflow.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        with autocast(logits.device, "float32"):
            probabilities = logits.detach().softmax(dim=1, dtype=dtype).flatten(2)  # [B, K, V]
            voxels = [y.to(dtype).movedim(1, -1).flatten(1, -2) for y in features.values()]  # P times [B, V, C]
            weights = self.region_weights(list(features), voxels, probabilities)  # [B, K, P]
            mixing = self.fuse_regions[0].conv.weight.to(dtype).flatten(1).unflatten(1, (len(self.weightings), -1))
            products = torch.einsum("bkp,okc->bpcko", weights, mixing).flatten(1, 2)  # [B, P C, K, C_out]
            mix = mix_regions if is_exporting() else RegionMixing.apply
            mixed = mix(probabilities, products, *voxels)  # [B, V, C_out]
        return mixed.unflatten(1, logits.shape[2:]).movedim(-1, 1)

    def region_weights(self, modalities: Sequence[int], voxels: Sequence[Tensor], probabilities: Tensor) -> Tensor:
        """weight_k,m of the P present modalities: voxels P times [B, V, C], probabilities [B, K, V] -> [B, K, P]."""
        share = probabilities.mean(dim=2, keepdim=True) + self.eps  # [B, K, 1]
        pooled = {m: probabilities @ y / y.shape[1] / share for m, y in zip(modalities, voxels, strict=True)}
        absent = torch.zeros_like(pooled[modalities[0]])
        descriptors = [pooled.get(modality, absent) for modality in range(self.num_modalities)]
        columns = torch.cat([*descriptors, share], dim=2).unsqueeze(3).unbind(dim=1)  # K times [B, M * C + 1, 1]
        weights = torch.cat([mlp(x) for mlp, x in zip(self.weightings, columns, strict=True)], dim=2).mT
        return torch.stack([weights[:, :, modality] for modality in modalities], dim=2)


def mix_regions(probabilities: Tensor, weights: Tensor, *voxels: Tensor) -> Tensor:
    """``sum_k p_k * (sum_m W_k,m y_m)`` of every voxel.

    Shape:
        - Input: p [B, K, V]; W [B, P * C, K, C_out]; P times y [B, V, C].
        - Output: [B, V, C_out].
    """
    products = torch.cat(voxels, dim=2) @ weights.flatten(2)
    return (products.unflatten(2, weights.shape[2:]) * probabilities.mT.unsqueeze(3)).sum(dim=2)


class RegionMixing(torch.autograd.Function):
    """:func:`mix_regions` with a gradient for all but p, a few voxels at a time.

    The products of all regions are K times as large as the output, and would take most memory and time of the whole
    network. In parts they stay in the cache, and the backward pass computes them again.
    """

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, weights: Tensor, *voxels: Tensor) -> Tensor:
        """The output of :func:`mix_regions`."""
        ctx.save_for_backward(probabilities, weights, *voxels)
        parts = _parts(voxels[0])
        return torch.cat(
            [mix_regions(probabilities[:, :, part], weights, *[y[:, part] for y in voxels]) for part in parts], dim=1
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weights and voxels."""
        probabilities, weights, *voxels = ctx.saved_tensors
        to_weights = torch.zeros_like(weights).flatten(2)
        to_voxels = [torch.empty_like(y) for y in voxels]
        for part in _parts(gradient):
            shares = probabilities[:, :, part].mT.unsqueeze(3)
            to_products = (gradient[:, part].unsqueeze(2) * shares).flatten(2)  # [B, V, K * C_out]
            to_weights += torch.cat([y[:, part] for y in voxels], dim=2).mT @ to_products
            for target, source in zip(
                to_voxels, (to_products @ weights.flatten(2).mT).chunk(len(voxels), 2), strict=True
            ):
                target[:, part] = source
        return None, to_weights.view_as(weights), *to_voxels


def _parts(voxels: Tensor) -> Iterator[slice]:
    """Slices of the voxels of [B, V, C] for :class:`RegionMixing`: a single slice on a GPU, where more do not help."""
    step = VOXELS_AT_ONCE if voxels.device.type == "cpu" else voxels.shape[1]
    return (slice(start, start + step) for start in range(0, voxels.shape[1], step))


class FusionDecoder(nn.Module):
    """Decoder that predicts regions and fuses the modalities within them at every level.

    Shape:
        - Input: outputs of `RFNet.encode_modality` for each present modality, by its index.
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
        self.head = head(spatial_dims, width, num_classes)

    def forward(self, features: Mapping[int, tuple[Tensor, ...]]) -> DecoderOutput:
        x, logits = self._level(NUM_LEVELS - 1, features, None)
        coarse_to_fine = [logits]
        for level in reversed(range(NUM_LEVELS - 1)):
            x = self.reductions[level](upsample(x, 2))
            skip, logits = self._level(level, features, x)
            x = self.merges[level](torch.cat([skip, x], dim=1))
            coarse_to_fine.append(logits)
        return DecoderOutput(self.head(x), tuple(reversed(coarse_to_fine)), x)

    def _level(
        self, level: int, features: Mapping[int, tuple[Tensor, ...]], decoded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The fused map of one level and the logits of its regions."""
        maps, for_predictor, for_fusion = (
            {modality: levels[level + part * NUM_LEVELS] for modality, levels in features.items()} for part in range(3)
        )
        logits = self.predictors[level](list(for_predictor.values()), decoded)
        return self.fusions[level](maps, list(for_fusion.values()), logits), logits
