"""The contract of all backbones, and the code that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from passion_monai.devices import send
from passion_monai.networks.blocks import is_exporting, sum_maps

__all__ = [
    "Backbone",
    "DecoderOutput",
    "Features",
    "find_presence",
    "masked_features",
    "mean_of_present",
    "select_rows",
]

Features = tuple[tuple[Tensor, ...] | None, ...]
"""For each of the M modalities its encoded maps [B, C, h, w(, d)], zero for samples that lack it; None if all do."""


class DecoderOutput(NamedTuple):
    """Output of a fusion decoder for one set of modalities.

    Attributes:
        logits: [B, K, H, W(, D)], level l = 0 of the paper.
        auxiliary: logits of the coarser levels l = 1..L, from fine to coarse, each at its own resolution.
        features: [B, C, H, W(, D)], the last full-resolution feature map, before the segmentation head; z of
            Eqs. (4)-(8).
    """

    logits: Tensor
    auxiliary: tuple[Tensor, ...]
    features: Tensor


def find_presence(image: Tensor) -> Tensor:
    """Find the presence, bool [B, M], from the image [B, M, ...] alone.

    A modality is present unless it is 0 everywhere, which a normalised image never is.
    """
    return (image != 0).flatten(2).any(dim=2)


def select_rows(maps: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Select samples of each map [B, ...] by `rows`, bool [B]; copies nothing if all are selected."""
    if bool(rows.all()):
        return maps
    (indices,) = rows.nonzero(as_tuple=True)
    return tuple(map_.index_select(0, send(indices, map_.device)) for map_ in maps)


def masked_features(features: Features, presence: Tensor) -> dict[int, tuple[Tensor, ...]]:
    """Maps of the modalities in `presence`, zero for samples that lack them; modalities that all lack are left out.

    Args:
        features: maps of M modalities.
        presence: bool [B, M] or [1, M]. On a GPU, this waits for its values.

    Raises:
        ValueError: when a modality in `presence` was not encoded.
    """
    if is_exporting():
        return {modality: _mask(maps, presence[:, modality]) for modality, maps in enumerate(features) if maps}
    present = {}
    for modality, rows in enumerate(presence.cpu().unbind(dim=1)):
        maps = features[modality]
        if maps is None:
            if rows.any():
                raise ValueError(f"presence has modality {modality}, which was not encoded.")
        elif rows.any():
            present[modality] = maps if rows.all() else _mask(maps, rows)
    return present


def mean_of_present(features: Features, presence: Tensor) -> list[Tensor]:
    """Average each map over the modalities that a sample has: the simplest fusion.

    Args:
        features: maps of M modalities, equally many of each.
        presence: bool [B, M] or [1, M].

    Raises:
        ValueError: when a modality in `presence` was not encoded.
    """
    present = masked_features(features, presence)
    maps = list(zip(*present.values(), strict=True))
    count = send(presence.sum(dim=1), maps[0][0].device)
    return [sum_maps(parts) / count.view(-1, *[1] * (parts[0].ndim - 1)) for parts in maps]


def _mask(maps: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(_zero_where_absent(map_, rows) for map_ in maps)


def _zero_where_absent(map_: Tensor, rows: Tensor) -> Tensor:
    return torch.where(send(rows, map_.device).view(-1, *[1] * (map_.ndim - 1)), map_, 0.0)


class Backbone(nn.Module, ABC):
    """A segmentation network with one encoder per modality and a fusion decoder for any subset of modalities.

    A student of the distillation is `decode` with a one-hot presence; a combination is `decode` with its presence.
    All use the same features, so nothing is encoded twice. The m-th encoder belongs to the m-th channel.

    Args:
        spatial_dims: 2 or 3.
        num_modalities: M, the number of image channels.
        num_classes: K, background included.
        img_size: spatial size of the network's input (the training crop), an int or one per axis.
        stride: factor by which the deepest level is smaller than the input, for all axes or for each; `img_size` must
            be a multiple of it.

    Raises:
        ValueError: when an argument is out of range.
    """

    # Regular expressions for the names of the parameters of one modality, with which weights are transferred to other
    # modalities (passion_monai.networks.pretrained).
    modality_modules: tuple[str, ...] = (r"encoders\.(\d+)\.",)
    """Modules of one modality; the first group is its index."""
    modality_axes: ClassVar[Mapping[str, int]] = {}
    """Parameters with one block per modality along an axis; one common entry may follow the blocks."""
    modality_mixing: tuple[str, ...] = ()
    """Parameters that mix the modalities otherwise; they fit only the modalities that they were trained with."""
    # The same for classes.
    class_modules: tuple[str, ...] = ()
    """Modules of one class; the first group is its index."""
    class_axes: ClassVar[Mapping[str, int]] = {r".*\.heads?\.(?:\d+\.)?(?:weight|bias)$": 0}
    """Parameters with one block per class along an axis."""

    takes_any_size: ClassVar[bool] = False
    """Whether images may be of another size than the one that the network was built for."""

    def __init__(
        self,
        spatial_dims: int,
        num_modalities: int,
        num_classes: int,
        img_size: Sequence[int] | int,
        *,
        stride: Sequence[int] | int,
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
        self.strides = tuple(ensure_tuple_rep(stride, spatial_dims))
        self.stride = max(self.strides)
        self._check_size("img_size", self.img_size)

    @abstractmethod
    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Maps [B, C, h, w(, d)] of a modality's image [B, 1, H, W(, D)]: all that does not depend on others.

        If the maps of a sample are set to zero afterwards, this must mean that the modality is absent.
        """

    @abstractmethod
    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Fused prediction from the modalities in `presence`, bool [B, M] or [1, M]; other features are masked."""

    @abstractmethod
    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """A modality's own prediction by the decoder that all modalities share: its maps -> logits [B, K, H, W(, D)].

        It sees no other modality and no fusion, and is used in training only (L_reg of Eq. 2).
        """

    def encode(self, image: Tensor, presence: Tensor) -> Features:
        """Encode each modality on the samples that have it; absent modalities are never computed.

        Args:
            image: [B, M, H, W(, D)]; the values of absent modalities are not read.
            presence: bool [B, M], at least one True per row, or [1, M] for all samples alike. On a GPU, this waits for
                its values.

        Returns:
            Maps of each modality, [B, C, h, w(, d)], zero for samples that lack it; None if all samples lack it.

        Raises:
            ValueError: when shapes do not fit the network or a sample has no modality.
        """
        if is_exporting():
            return self._encode_all(image, presence)
        presence = self._checked_presence(image, presence.cpu())
        return tuple(
            self._encode_rows(image[:, m : m + 1], presence[:, m], m) if presence[:, m].any() else None
            for m in range(self.num_modalities)
        )

    def _encode_rows(self, image: Tensor, rows: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Encode some samples; the others' maps are zero."""
        if rows.all():
            return self.encode_modality(image, modality)
        (selected,) = select_rows((image,), rows)
        encoded = self.encode_modality(selected, modality)
        (indices,) = rows.nonzero(as_tuple=True)
        channels_last = [map_.movedim(1, -1) for map_ in encoded]
        return tuple(
            map_.new_zeros(len(rows), *map_.shape[1:]).index_copy(0, send(indices, map_.device), map_).movedim(-1, 1)
            for map_ in channels_last
        )

    def _encode_all(self, image: Tensor, presence: Tensor) -> Features:
        """The same without branches that depend on `presence`, so that an exported graph serves every combination."""
        encoded = []
        for modality in range(self.num_modalities):
            rows = presence[:, modality]
            # Zeros before and after the encoder: NaN in an absent modality would survive a multiplication.
            maps = self.encode_modality(_zero_where_absent(image[:, modality : modality + 1], rows), modality)
            encoded.append(_mask(maps, rows))
        return tuple(encoded)

    def forward(self, image: Tensor, presence: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W(, D)] from the modalities in `presence`, by default from all of them."""
        if presence is None:
            presence = torch.ones(image.shape[:2], dtype=torch.bool)
        return self.decode(self.encode(image, presence), presence).logits

    def _check_size(self, name: str, size: tuple[int, ...]) -> None:
        least = tuple(2 * stride for stride in self.strides)
        if any(length % stride or length < 2 * stride for length, stride in zip(size, self.strides, strict=True)):
            stride, least = (values[0] if len({*values}) == 1 else values for values in (self.strides, least))
            raise ValueError(f"{name} must be multiples of {stride}, at least {least}, got {size}.")

    def _checked_presence(self, image: Tensor, presence: Tensor) -> Tensor:
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.num_modalities:
            axes = "H, W, D"[: 3 * self.spatial_dims - 2]
            raise ValueError(f"image must be [B, {self.num_modalities}, {axes}], got {tuple(image.shape)}.")
        if self.takes_any_size:
            self._check_size("the image's spatial size", tuple(image.shape[2:]))
        elif tuple(image.shape[2:]) != self.img_size:
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
