"""Masking of modalities, and stacking of the available ones with zeros for the missing ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from passion_monai.transforms.case import Data, plain, present_modalities

__all__ = ["MaskModalitiesd", "RandMaskModalitiesd", "StackModalitiesd"]


class MaskModalitiesd(MapTransform):
    """Remove the modalities that a case's row of the presence matrix says are missing, before anything is read.

    Args:
        keys: names of the M modalities, in the order of the row.
        presence_key: key of the row, M booleans; a case without it keeps all it has. The row is removed.

    Raises:
        ValueError: when the row does not have M entries or leaves no modality.
    """

    def __init__(self, keys: Sequence[str], presence_key: str = "presence") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.presence_key = presence_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        masked = dict(data)
        row = masked.pop(self.presence_key, None)
        if row is None:
            return masked
        if len(row) != len(self.keys):
            raise ValueError(
                f"Case {data.get('case')}: {self.presence_key} must have {len(self.keys)} entries, one for each of "
                f"{self.keys}, got {len(row)}."
            )
        for key, present in zip(self.keys, row, strict=True):
            if not present:
                masked.pop(key, None)
        present_modalities(masked, self.keys)
        return masked


class RandMaskModalitiesd(RandomizableTransform, MapTransform):
    """Keep a random non-empty subset of the modalities that a case has, all subsets being equally likely.

    On complete cases this is PDT, on incomplete ones ModDrop. It draws, then calls :class:`MaskModalitiesd`.

    Args:
        keys: names of the M modalities.
        prob: probability that a subset is drawn at all.
    """

    def __init__(self, keys: Sequence[str], prob: float = 1.0) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys=True)
        RandomizableTransform.__init__(self, prob)
        self.mask = MaskModalitiesd(keys)
        self.row: list[bool] = []

    def randomize(self, data: Data) -> None:
        """Draw which of the case's modalities to keep, as a row of M booleans."""
        super().randomize(None)
        present = present_modalities(data, self.keys)
        # The bits of 1..2^n - 1 run through the non-empty subsets of n modalities.
        subset = self.R.randint(1, 2 ** len(present)) if self._do_transform else 2 ** len(present) - 1
        kept = {key for bit, key in enumerate(present) if subset >> bit & 1}
        self.row = [key in kept for key in self.keys]

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        self.randomize(data)
        return self.mask({**data, self.mask.presence_key: self.row})


class StackModalitiesd(MapTransform):
    """Stack the modalities of a case to ``image`` [M, H, W(, D)] with zeros where missing, and ``presence`` bool [M].

    The image has the grid of the first modality present. The keys of the modalities are removed.

    Args:
        keys: names of the M modalities, in the order of the channels.

    Raises:
        ValueError: when the modalities differ in shape.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        stacked = {key: value for key, value in data.items() if key not in self.keys}
        first, *_ = present = present_modalities(data, self.keys)
        shapes = {key: tuple(data[key].shape) for key in present}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Case {data.get('case')}: the modalities differ in shape: {shapes}; align them first.")
        reference = data[first]
        channels = [plain(data[key] if key in data else torch.zeros_like(reference)) for key in self.keys]
        image = torch.cat(channels)
        stacked["image"] = MetaTensor(image, meta=reference.meta) if isinstance(reference, MetaTensor) else image
        stacked["presence"] = torch.tensor([key in data for key in self.keys])
        return stacked
