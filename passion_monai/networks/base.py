"""The contract that every backbone keeps, and what is common to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

__all__ = ["Backbone", "DecoderOutput", "Features", "mask_features", "select_rows"]

Features = tuple[Tensor, ...]
"""Encoded modalities: tensors [B, M, C, h, w(, d)], zero where a modality is absent."""


class DecoderOutput(NamedTuple):
    """What a fusion decoder puts out for one set of modalities.

    Attributes:
        logits: [B, K, H, W(, D)], level l = 0 of the paper.
        auxiliary: logits of the coarser levels l = 1..L, from fine to coarse, each at its own resolution.
        features: [B, C, H, W(, D)], the last full-resolution feature map, before the segmentation head; z of
            Eqs. (4)-(8).
    """

    logits: Tensor
    auxiliary: tuple[Tensor, ...]
    features: Tensor


def mask_features(features: Tensor, presence: Tensor) -> Tensor:
    """Zero the modalities that are absent: features [B, M, ...], presence bool [B, M] or [1, M]."""
    return features * presence.view(*presence.shape, *[1] * (features.ndim - 2)).to(features.dtype)


def select_rows(features: Features, rows: Tensor) -> Features:
    """The features of some samples of a batch, `rows` bool [B]; nothing is copied where all are selected."""
    return features if bool(rows.all()) else tuple(level[rows] for level in features)


class Backbone(nn.Module, ABC):
    """A segmentation network with one encoder per modality and a fusion decoder for whatever subset is there.

    A student of the distillation is `decode` with a one-hot presence, a combination is `decode` with its presence:
    the same features serve all of them, nothing is encoded twice. The m-th encoder belongs to the m-th channel.

    Args:
        spatial_dims: 2 or 3.
        num_modalities: M, the number of image channels.
        num_classes: K, background included.
        img_size: spatial size of the network's input (the training crop), an int or one per axis.
        stride: how much smaller than the input the deepest level is; `img_size` must be its multiple.

    Raises:
        ValueError: when an argument is out of range.
    """

    def __init__(
        self, spatial_dims: int, num_modalities: int, num_classes: int, img_size: Sequence[int] | int, *, stride: int
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if num_modalities < 1:
            raise ValueError(f"num_modalities must be at least 1, got {num_modalities}.")
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be at least 2, got {num_classes}.")
        self.spatial_dims = spatial_dims
        self.num_modalities = num_modalities
        self.num_classes = num_classes
        self.img_size = tuple(ensure_tuple_rep(img_size, spatial_dims))
        self.stride = stride
        if any(size % stride or size < 2 * stride for size in self.img_size):
            raise ValueError(f"img_size must be multiples of {stride}, at least {2 * stride}, got {self.img_size}.")

    @abstractmethod
    def encode_modality(self, image: Tensor, modality: int) -> Features:
        """Features of one modality: image [B, 1, H, W(, D)] -> tensors [B, C, h, w(, d)]."""

    @abstractmethod
    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Fused prediction from the modalities in `presence`, bool [B, M] or [1, M]; other features are masked."""

    @abstractmethod
    def decode_modality(self, features: Features, modality: int) -> Tensor:
        """A modality's own prediction by the decoder that all modalities share: logits [B, K, H, W(, D)].

        It sees no other modality and no fusion, and is used in training only (L_reg of Eq. 2).
        """

    def encode(self, image: Tensor, presence: Tensor) -> Features:
        """Encode each modality on the samples that have it; absent modalities are never computed.

        Args:
            image: [B, M, H, W(, D)]; the values of absent modalities are not read.
            presence: bool [B, M], at least one True per row, or [1, M] for all samples alike.

        Returns:
            Tensors [B, M, C, h, w(, d)], zero where a modality is absent.

        Raises:
            ValueError: when shapes do not fit the network or a sample has no modality.
        """
        if _is_exporting():
            return self._encode_all(image, presence)
        presence = self._checked_presence(image, presence)
        encoded = {}
        for modality in range(self.num_modalities):
            rows = presence[:, modality]
            if rows.any():
                encoded[modality] = self.encode_modality(image[rows, modality : modality + 1], modality)
        return _stack_modalities(encoded, presence)

    def _encode_all(self, image: Tensor, presence: Tensor) -> Features:
        """The same without branches that depend on `presence`, so that an exported graph serves every combination."""
        encoded = []
        for modality in range(self.num_modalities):
            rows = presence[:, modality].view(-1, *[1] * (image.ndim - 1))
            # Zeros before and after the encoder: NaN in an absent modality would survive a multiplication.
            levels = self.encode_modality(torch.where(rows, image[:, modality : modality + 1], 0.0), modality)
            encoded.append([torch.where(rows, level, 0.0) for level in levels])
        return tuple(torch.stack(level, dim=1) for level in zip(*encoded, strict=True))

    def forward(self, image: Tensor, presence: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W(, D)] from the modalities in `presence`, by default from all of them."""
        if presence is None:
            presence = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        return self.decode(self.encode(image, presence), presence).logits

    def _checked_presence(self, image: Tensor, presence: Tensor) -> Tensor:
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.num_modalities:
            axes = "H, W, D"[: 3 * self.spatial_dims - 2]
            raise ValueError(f"image must be [B, {self.num_modalities}, {axes}], got {tuple(image.shape)}.")
        if tuple(image.shape[2:]) != self.img_size:
            raise ValueError(
                f"image has spatial size {tuple(image.shape[2:])}, but the network was built for img_size "
                f"{self.img_size}; use windows of that size or build it with another img_size."
            )
        if presence.ndim != 2 or presence.shape[1] != self.num_modalities or presence.shape[0] not in (1, len(image)):
            expected = f"[{len(image)}, {self.num_modalities}]"
            raise ValueError(f"presence must be bool {expected}, got shape {tuple(presence.shape)}.")
        if not bool(presence.any(dim=1).all()):
            raise ValueError("presence has a sample without any modality; every sample needs at least one.")
        return presence.bool().expand(len(image), -1)


def _is_exporting() -> bool:
    """Whether the network is being traced for TorchScript or exported for ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def _stack_modalities(encoded: Mapping[int, Features], presence: Tensor) -> Features:
    """Put per-modality features of the samples that have them into zero tensors [B, M, C, h, w(, d)]."""
    stacked = []
    for level, example in enumerate(next(iter(encoded.values()))):
        features = example.new_zeros(*presence.shape, *example.shape[1:])
        for modality, levels in encoded.items():
            features[presence[:, modality], modality] = levels[level]
        stacked.append(features)
    return tuple(stacked)
