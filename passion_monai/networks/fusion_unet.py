"""FusionUNet: a U-Net that fuses the available modalities at every level.

Papers:
    F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
    Nature Methods 18, 2021, https://doi.org/10.1038/s41592-020-01008-z: blocks, widths, deep supervision.
    M. Havaei et al., "HeMIS: Hetero-Modal Image Segmentation", MICCAI 2016, https://arxiv.org/abs/1607.05194: fusion
    by mean and variance.
    C. Chen et al., "Robust Multimodal Brain Tumor Segmentation via Feature Disentanglement and Gated Fusion", MICCAI
    2019, https://arxiv.org/abs/2002.09708: fusion by gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock, UnetUpBlock, get_conv_layer
from monai.networks.nets import DynUNet
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from passion_monai.devices import send
from passion_monai.networks.base import Backbone, DecoderOutput, Features, masked_features
from passion_monai.networks.blocks import head, sum_maps, use_fast_convolutions

__all__ = ["FusionUNet"]

FUSIONS = ("mean_variance", "gated")
MAX_CHANNELS = {2: 512, 3: 320}  # nnU-Net's
LEVELS = 5
NORM = ("instance", {"affine": True})


class FusionUNet(Backbone):
    """A U-Net with an encoder per modality, for any number of modalities and any size, in 2-D and 3-D.

    The network fuses the features of the present modalities at every level. One decoder continues from there, with
    logits at every level but the deepest, as in nnU-Net. Nothing depends on the size of the crop, so inference may use
    larger windows than training.

    Args:
        spatial_dims: 2 or 3.
        num_modalities: M, the number of image channels.
        num_classes: K, background included.
        img_size: spatial size of the crop, multiples of the product of the strides.
        width: channels of the finest level; each further one has twice as many, up to 512 in 2-D and 320 in 3-D.
        strides: strides between levels, for all axes or for each; ``[[1, 2, 2], 2, 2, 2]`` where the voxels of the
            first axis are twice as long. There is one level more than strides.
        kernel_sizes: kernel sizes of the convolutions, one for all levels or one for each.
        fusion: "mean_variance", or "gated" for a mean with weights, learned from each modality's features, that add up
            to 1 over those present.
        residual: blocks with a residual connection in the encoders.

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M].
        - Output: logits [B, K, H, W(, D)]. `decode` adds auxiliary logits of the levels between the finest and the
          deepest, and the last feature map, [B, width, H, W(, D)].

    Raises:
        ValueError: when an argument is out of range.

    Example:
        >>> network = FusionUNet(2, num_modalities=3, num_classes=4, img_size=32)
        >>> network(torch.zeros(1, 3, 64, 32), torch.tensor([[True, False, True]])).shape
        torch.Size([1, 4, 64, 32])
    """

    takes_any_size = True
    modality_modules = (r"encoders\.(\d+)\.", r"gates\.(\d+)\.")

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        *,
        img_size: Sequence[int] | int,
        width: int = 32,
        strides: Sequence[Sequence[int] | int] = (2,) * (LEVELS - 1),
        kernel_sizes: Sequence[Sequence[int] | int] | int = 3,
        fusion: str = "mean_variance",
        residual: bool = False,
    ) -> None:
        per_axis = [tuple(ensure_tuple_rep(stride, spatial_dims)) for stride in strides]
        total = [math.prod(sizes) for sizes in zip(*per_axis, strict=True)]
        super().__init__(spatial_dims, num_modalities, num_classes, img_size, stride=total)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {FUSIONS}, got {fusion!r}.")
        levels = len(per_axis) + 1
        kernels = [kernel_sizes] * levels if isinstance(kernel_sizes, int) else list(kernel_sizes)
        if len(kernels) != levels:
            raise ValueError(f"kernel_sizes must be one, or one for each of {levels} levels, got {kernel_sizes}.")
        channels = [min(width * 2**level, MAX_CHANNELS[spatial_dims]) for level in range(levels)]
        shape = (spatial_dims, channels, kernels, per_axis)
        block = UnetResBlock if residual else UnetBasicBlock
        self.levels = levels
        self.encoders = nn.ModuleList(_encoder(*shape, block=block) for _ in range(num_modalities))
        self.gates = nn.ModuleList()
        if fusion == "gated":
            self.gates.extend(_gates(spatial_dims, channels) for _ in range(num_modalities))
        inputs = [c if fusion == "gated" else 2 * c for c in channels]
        self.fusions = nn.ModuleList(
            UnetBasicBlock(spatial_dims, given, c, 1, 1, norm_name=NORM)
            for given, c in zip(inputs, channels, strict=True)
        )
        self.decoder = SupervisedDecoder(*shape, num_classes=num_classes)
        self.modality_decoder = SupervisedDecoder(*shape, num_classes=num_classes, deep_supervision=False)
        self.apply(DynUNet.initialize_weights)
        use_fast_convolutions(self)

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Features of every level and, for gated fusion, the gate of each position."""
        maps = []
        for block in cast("nn.ModuleList", self.encoders[modality]):
            image = block(image)
            maps.append(image)
        gates = cast("nn.ModuleList", self.gates[modality]) if len(self.gates) else nn.ModuleList()
        return (*maps, *(gate(x) for gate, x in zip(gates, maps, strict=False)))

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Fuse the modalities in `presence` at every level and decode; see the base class."""
        present = masked_features(features, presence)
        rows = presence[:, list(present)]
        fuse = self._gated if len(self.gates) else self._mean_and_variance
        return self.decoder([fusion(fuse(present, rows, level)) for level, fusion in enumerate(self.fusions)])

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """One modality's own prediction; see the base class."""
        logits: Tensor = self.modality_decoder(list(maps[: self.levels])).logits
        return logits

    def _mean_and_variance(self, present: Mapping[int, tuple[Tensor, ...]], rows: Tensor, level: int) -> Tensor:
        """Over the modalities present, [B, 2 C, ...]; the variance of a single one is 0."""
        maps = [maps[level] for maps in present.values()]
        weights = _per_map(rows, maps[0])
        count = sum_maps(weights)
        mean = sum_maps(maps) / count
        deviations = [weight * (x - mean) ** 2 for weight, x in zip(weights, maps, strict=True)]
        return torch.cat([mean, sum_maps(deviations) / (count - 1).clamp(min=1)], dim=1)

    def _gated(self, present: Mapping[int, tuple[Tensor, ...]], rows: Tensor, level: int) -> Tensor:
        """Mean over the modalities present, weighted at every position by a softmax of their gates, [B, C, ...]."""
        maps = [maps[level] for maps in present.values()]
        there = torch.stack(_per_map(rows, maps[0]))
        gates = torch.stack([maps[self.levels + level] for maps in present.values()])
        weights = gates.masked_fill(there == 0, -torch.inf).softmax(dim=0)
        return sum_maps([weight * x for weight, x in zip(weights, maps, strict=True)])


class SupervisedDecoder(nn.Module):
    """Decoder of a U-Net, with logits at every level but the deepest, or at the finest alone.

    Shape:
        - Input: maps of all levels, from fine to coarse.
        - Output: :class:`DecoderOutput`.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        kernel_sizes: Sequence[Sequence[int] | int],
        strides: Sequence[Sequence[int]],
        *,
        num_classes: int,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            UnetUpBlock(spatial_dims, coarse, fine, kernel, 1, upsample_kernel_size=stride, norm_name=NORM)
            for coarse, fine, kernel, stride in zip(channels[1:], channels, kernel_sizes, strides, strict=False)
        )
        supervised = channels[:-1] if deep_supervision else channels[:1]
        self.heads = nn.ModuleList(head(spatial_dims, c, num_classes) for c in supervised)

    def forward(self, maps: Sequence[Tensor]) -> DecoderOutput:
        x, coarse_to_fine = maps[-1], []
        for level in reversed(range(len(self.stages))):
            x = self.stages[level](x, maps[level])
            if level < len(self.heads):
                coarse_to_fine.append(self.heads[level](x))
        logits, *auxiliary = reversed(coarse_to_fine)
        return DecoderOutput(logits, tuple(auxiliary), x)


def _encoder(
    spatial_dims: int,
    channels: Sequence[int],
    kernel_sizes: Sequence[Sequence[int] | int],
    strides: Sequence[Sequence[int]],
    *,
    block: type[nn.Module],
) -> nn.ModuleList:
    """One block per level; all but the first reduce the size."""
    inputs, first = [1, *channels], (1,) * spatial_dims
    return nn.ModuleList(
        block(spatial_dims, given, c, kernel, stride, norm_name=NORM)
        for given, c, kernel, stride in zip(inputs, channels, kernel_sizes, [first, *strides], strict=False)
    )


def _gates(spatial_dims: int, channels: Sequence[int]) -> nn.ModuleList:
    """One convolution per level, with one number per position."""
    return nn.ModuleList(get_conv_layer(spatial_dims, c, 1, kernel_size=1, bias=True) for c in channels)


def _per_map(rows: Tensor, like: Tensor) -> list[Tensor]:
    """Presence [B or 1, P] as a factor [B or 1, 1, ...] for each of P maps."""
    factors = send(rows, like.device).to(like.dtype)
    return [column.view(-1, *[1] * (like.ndim - 1)) for column in factors.unbind(dim=1)]
