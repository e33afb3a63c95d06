"""One grid for all modalities of a case, and the part of it to use."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Hashable, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, MapTransform, Orientation, ResampleToMatch, SpatialCrop

from passion_monai.transforms.case import Data, plain, present_modalities, source_of

__all__ = ["AlignModalitiesd", "CropToForegroundd", "SelectSliced"]

logger = logging.getLogger(__name__)

_SAME_GRID = 0.01  # of a voxel, at any corner: registration tools round
_FLOAT_ROUNDING = 1e-4  # of a voxel: what float32 in a header makes of one grid


class AlignModalitiesd(MapTransform):
    """Make sure that all modalities of a case (and its label) lie on the grid of the first modality present.

    An image with the same grid but other order or direction of axes, as in other file formats, is reordered exactly.
    Grids that differ by up to a hundredth of a voxel, from rounding in registration tools, are accepted as that of the
    first, which is logged.

    Args:
        keys: names of the M modalities.
        label_key: key of the label, which is checked or resampled too where it is given.
        on_mismatch: "raise" an error, or "resample" to the first modality present, images linearly and the label by
            nearest neighbour.

    Raises:
        ValueError: for another grid with "raise"; the message names the case and both grids.
    """

    def __init__(self, keys: Sequence[str], *, label_key: str | None = None, on_mismatch: str = "raise") -> None:
        super().__init__(keys, allow_missing_keys=True)
        if on_mismatch not in ("raise", "resample"):
            raise ValueError(f"on_mismatch must be 'raise' or 'resample', got {on_mismatch!r}.")
        self.label_key = label_key
        self.on_mismatch = on_mismatch

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        aligned = dict(data)
        first, *others = present_modalities(data, self.keys)
        if self.label_key is not None and self.label_key in data:
            others.append(self.label_key)
        turn = Orientation(axcodes="".join(nib.aff2axcodes(data[first].affine)), labels=None)
        for key in others:
            image: MetaTensor = data[key]
            if _distance(data[first], image) > _SAME_GRID:
                image = turn(image)  # type: ignore[assignment]
            distance = _distance(data[first], image)
            aligned[key] = _moved(image, data[first]) if distance <= _SAME_GRID else self._resample(data, key, first)
            if _FLOAT_ROUNDING < distance <= _SAME_GRID:
                logger.warning(
                    f"Case {data.get('case')}: the grid of {key} is up to {distance:.2g} voxels from that of {first}, "
                    f"which is taken for both: {source_of(data[key])}."
                )
        return aligned

    def _resample(self, data: Data, key: Hashable, first: Hashable) -> MetaTensor:
        if self.on_mismatch == "raise":
            raise ValueError(
                f"Case {data.get('case')}: {key} lies on another grid than {first}: {_describe_grid(data[key])} in "
                f"{source_of(data[key])} against {_describe_grid(data[first])}. Register and resample them, or set "
                "on_mismatch to 'resample' if they show the same anatomy in world coordinates."
            )
        mode = "nearest" if key == self.label_key else "bilinear"
        resampled: MetaTensor = ResampleToMatch(mode=mode, padding_mode="zeros")(data[key], data[first])  # type: ignore[assignment]
        return resampled


def _distance(one: MetaTensor, other: MetaTensor) -> float:
    """How far two grids lie apart, in voxels along an axis of the first: the most at any corner of the volume."""
    if one.shape != other.shape:
        return math.inf
    axes = len(one.affine) - 1
    ends = [(0, size - 1) for size in one.shape[1:]] + [(0,)] * (axes + 1 - one.ndim)
    corners = torch.tensor([[*corner, 1] for corner in itertools.product(*ends)], dtype=torch.float64).T
    moved = torch.linalg.solve(one.affine.double(), other.affine.double() @ corners)
    return float((moved - corners).abs().max())


def _moved(image: MetaTensor, reference: MetaTensor) -> MetaTensor:
    """The image on the grid of another, voxel for voxel."""
    moved: MetaTensor = image.clone()
    moved.affine = reference.affine.clone()
    return moved


def _describe_grid(image: MetaTensor) -> str:
    return f"shape {tuple(image.shape[1:])} affine {np.round(image.affine.numpy(), 3).tolist()}"


class CropToForegroundd(MapTransform):
    """Crop a case to the box around everything that is not 0 in any modality present (the brain, skull-stripped).

    The reference implementation takes the box from all modalities, missing ones included: a leak.

    Args:
        keys: names of the M modalities.

    Raises:
        ValueError: when all modalities present are 0 everywhere.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.foreground = CropForeground()

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        cropped = dict(data)
        present = present_modalities(data, self.keys)
        union = torch.stack([data[key].as_tensor() != 0 for key in present]).any(dim=0)
        if not bool(union.any()):
            raise ValueError(
                f"Case {data.get('case')}: the images are 0 everywhere, there is no foreground to crop to."
            )
        start, end = self.foreground.compute_bounding_box(union)
        crop = SpatialCrop(roi_start=start, roi_end=end)
        for key in present:
            cropped[key] = crop(data[key])
        return cropped


class SelectSliced(MapTransform):
    """Take one slice of a volume, as plain tensors [1, H, W] without an affine.

    Args:
        keys: names of the M modalities.
        label_key: key of the label, which a case may lack.
        slice_key: key of the slice's number along the last axis; it is removed.

    Raises:
        ValueError: when the volume has no such slice; the message names the case.
    """

    def __init__(self, keys: Sequence[str], *, label_key: str = "label", slice_key: str = "slice") -> None:
        super().__init__([*keys, label_key], allow_missing_keys=True)
        self.slice_key = slice_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        selected = dict(data)
        index = selected.pop(self.slice_key)
        for key in self.key_iterator(selected):
            if not 0 <= index < data[key].shape[-1]:
                raise ValueError(
                    f"Case {data.get('case')}: {key} has {data[key].shape[-1]} slices, none is number {index}."
                )
            selected[key] = plain(data[key])[..., index]
        return selected
