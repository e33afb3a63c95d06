"""Crops and augmentation of nnU-Net, for a case of which each modality that is there is a key.

In the words of F. Isensee et al., nnU-Net, Nature Methods 18, 2021: a third of the patches is "foreground oversampled",
and what a training sees is "augmented on the fly". Probabilities and ranges are those of the package `nnunetv2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandRotated,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    RandZoomd,
    SpatialCrop,
)
from torch import Tensor

from passion_monai.transforms.case import Data, plain

__all__ = ["NNUNetIntensitiesd", "NNUNetSpatiald", "RandForegroundCropd"]

_LINEAR = {2: "bilinear", 3: "trilinear"}  # what torch calls one interpolation, by spatial_dims


class RandForegroundCropd(Randomizable, MapTransform):
    """Crop a case around a labelled voxel: of a class drawn among those that it has, a voxel drawn among its voxels.

    The voxel is in the middle of the crop as far as the image reaches. Where nothing is labelled, the crop lies
    anywhere. It draws, then calls :class:`monai.transforms.SpatialCrop`.

    Args:
        keys: names of the M modalities.
        roi_size: voxels of the crop along each axis, no more than the image has.
        label_key: key of the label [1, H, W(, D)], whose class 0 is background; it is cropped too.
    """

    def __init__(self, keys: Sequence[str], roi_size: Sequence[int], *, label_key: str = "label") -> None:
        MapTransform.__init__(self, [*keys, label_key], allow_missing_keys=True)
        self.roi_size = tuple(roi_size)
        self.label_key = label_key
        self.start: list[int] = []

    def randomize(self, label: Tensor) -> None:
        """Draw where the crop starts."""
        last = [length - size for length, size in zip(label.shape[1:], self.roi_size, strict=True)]
        classes = [value for value in label.unique().tolist() if value]
        if classes:
            voxels = torch.nonzero(label[0] == classes[self.R.randint(len(classes))])
            center = voxels[self.R.randint(len(voxels))].tolist()
            first = [place - size // 2 for place, size in zip(center, self.roi_size, strict=True)]
            self.start = [min(max(start, 0), end) for start, end in zip(first, last, strict=True)]
        else:
            self.start = [self.R.randint(end + 1) for end in last]

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        cropped = dict(data)
        self.randomize(plain(data[self.label_key]))
        ends = [start + size for start, size in zip(self.start, self.roi_size, strict=True)]
        crop = SpatialCrop(roi_start=self.start, roi_end=ends)
        for key in self.key_iterator(cropped):
            cropped[key] = crop(data[key])
        return cropped


class NNUNetSpatiald(Compose):
    """Rotate and scale a case as nnU-Net does, all modalities and the label alike; what comes from without is 0.

    Differs from nnU-Net: the crop is cut before, so that its corners may turn to 0; a slice is rotated by 30 degrees at
    most, since a heart stands upright; and the label is taken from the nearest voxel.

    Args:
        keys: names of the M modalities.
        label_key: key of the label.
        spatial_dims: 2 or 3.
        prob: probability of a rotation, and of a scaling.
        angle: the largest one about each axis, in radians.
        zoom: the smallest and the largest size of a structure, as a multiple of its own.
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        label_key: str = "label",
        spatial_dims: int = 3,
        prob: float = 0.2,
        angle: float = math.pi / 6,
        zoom: tuple[float, float] = (0.7, 1.4),
    ) -> None:
        everything: dict[str, Any] = {"keys": [*keys, label_key], "prob": prob, "allow_missing_keys": True}
        planes = spatial_dims * (spatial_dims - 1) // 2
        angles: dict[str, Any] = dict.fromkeys(["range_x", "range_y", "range_z"][:planes], angle)
        modes = [*["bilinear"] * len(keys), "nearest"]  # of grid_sample, whatever spatial_dims are
        rotation = RandRotated(**everything, **angles, mode=modes, padding_mode="zeros")
        modes = [*[_LINEAR[spatial_dims]] * len(keys), "nearest-exact"]
        scaling = RandZoomd(**everything, min_zoom=zoom[0], max_zoom=zoom[1], mode=modes, padding_mode="constant")
        super().__init__([rotation, scaling])


class NNUNetIntensitiesd(Randomizable, MapTransform):
    """Change noise, blur, brightness, contrast, resolution and gamma of each modality by itself, as nnU-Net does.

    What is 0 in an image is 0 afterwards, as nnU-Net does it where it normalises within the head: that is the air
    outside of the head, and what a crop reaches beyond the image. A modality that is missing is a missing key, and
    nothing here makes one.

    Args:
        keys: names of the M modalities, each [1, H, W(, D)] with about zero mean and unit variance.
        spatial_dims: 2 or 3.
    """

    def __init__(self, keys: Sequence[str], *, spatial_dims: int = 3) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys=True)
        self.changes = Compose([change for key in keys for change in _intensity_changes(key, _LINEAR[spatial_dims])])

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> NNUNetIntensitiesd:
        """Seed all changes."""
        self.changes.set_random_state(seed, state)
        return self

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        background = {key: data[key] == 0 for key in self.key_iterator(dict(data))}
        changed: dict[Hashable, Any] = self.changes(data)
        return changed | {key: changed[key].masked_fill(zero, 0) for key, zero in background.items()}


def _intensity_changes(key: str, linear: str) -> list[Callable[..., Any]]:
    """nnU-Net's, in its order. Blur and resolution have 0.2 and 0.25 there, with 0.5 for each channel."""
    one: dict[str, Any] = {"keys": key, "allow_missing_keys": True}
    return [
        RandGaussianNoised(**one, prob=0.1, std=0.1**0.5),  # a variance up to 0.1
        RandGaussianSmoothd(**one, prob=0.1, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        RandScaleIntensityd(**one, prob=0.15, factors=(-0.25, 0.25)),
        RandScaleIntensityFixedMeand(**one, prob=0.15, factors=(-0.25, 0.25), preserve_range=True),
        RandSimulateLowResolutiond(**one, prob=0.125, zoom_range=(0.5, 1.0), upsample_mode=linear),
        RandAdjustContrastd(**one, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd(**one, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]
