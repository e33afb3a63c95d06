"""Background of 0, by which the crop to the brain and the normalisation inside it go, and predictions are cleared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from numpy.typing import NDArray
from torch import Tensor

from passion_monai.presence import combinations

__all__ = ["ClearBackgroundd", "ZeroBackgroundd"]

_FOREGROUNDS = ("nonzero", "constant_border", "otsu", "unchecked")
_MOST = 0.9  # of a volume is never brain: in BraTS it is less than half of the box around it, 0.76 of a slab of 2 cm
_HALF = 0.5  # of the border has one value where that is the background, however much of the brain touches the border
_EQUAL = 1e-5  # of an image's range lies between values that are the same but for rounding
_OUTLIERS = 99  # percent of the voxels are darker than the brightest, which would stretch the histogram


class ZeroBackgroundd(MapTransform):
    """Make sure that the images of a case are 0 where there is no brain, as the transforms after it take for granted.

    An image is in doubt when its border has another value, as after a z-score of the whole volume, or when hardly any
    voxel is 0, as with noise in the air. One that is in order is never changed.

    Args:
        keys: names of the M modalities.
        foreground: what to do with images in doubt. "nonzero": they are an error. "constant_border": the value of the
            border is subtracted. "otsu": what is outside of the head is set to 0; the head is the largest part that is
            brighter than Otsu's threshold (IEEE Trans. SMC 9(1), 1979), with what it encloses. The skull stays.
            "unchecked": nothing, every voxel that is not 0 is foreground.

    Raises:
        ValueError: for an image that is in doubt still; the message names case, key, file and remedy.
    """

    def __init__(self, keys: Sequence[str], *, foreground: str = "nonzero") -> None:
        super().__init__(keys, allow_missing_keys=True)
        if foreground not in _FOREGROUNDS:
            raise ValueError(f"foreground must be one of {list(_FOREGROUNDS)}, got {foreground!r}.")
        self.foreground = foreground

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        zeroed = dict(data)
        if self.foreground == "unchecked":
            return zeroed
        for key in self.key_iterator(zeroed):
            if _doubt(data[key]):
                zeroed[key] = self._zero(data[key])
            if doubt := _doubt(zeroed[key]):
                raise ValueError(
                    f"Case {data.get('case')}: {key} file {data['files'][key]} {doubt}, so that background would be "
                    f"taken for brain (foreground is {self.foreground!r}). Give images that are skull-stripped and 0 "
                    "outside, or set foreground to 'constant_border', to subtract the border's value; to 'otsu', for 0 "
                    "outside of the head; or to 'unchecked', where all of it is brain."
                )
        return zeroed

    def _zero(self, image: Tensor) -> Tensor:
        """The image with a background of 0, as far as the remedy goes."""
        if self.foreground == "constant_border":
            value, background = _border_value(image)
            return image if value is None else (image - value) * ~background
        if self.foreground == "otsu":
            return image * torch.from_numpy(_head(image.numpy()[0]))
        return image


class ClearBackgroundd(MapTransform):
    """Let predicted probabilities say background wherever the images show none of the head.

    That is where every modality that a prediction is made from is 0. It is no part of PASSION: a network has learned of
    the air from crops that hold some of it, and may see a tumour there.

    Args:
        keys: key of the probabilities, [K, ...], or [P, K, ...] for all combinations, class 0 being the background.
            They are changed in place, as those of all combinations take much memory.
        image_key: the image [M, ...] that they were computed from.
        presence_key: which of its channels are there, bool [M].
    """

    def __init__(self, keys: str = "pred", *, image_key: str = "image", presence_key: str = "presence") -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.presence_key = presence_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, presence = torch.as_tensor(data[self.image_key]).cpu(), data[self.presence_key].cpu()
        heads = image != 0  # [M, ...]
        for key in self.keys:
            if data[key].ndim == image.ndim:
                _clear(data[key], outside=~heads.any(dim=0))
                continue
            for probabilities, row in zip(data[key], combinations(len(image)), strict=True):
                if bool(presence[row].all()):  # all others are NaN, and stay so
                    _clear(probabilities, outside=~heads[row].any(dim=0))
        return dict(data)


def _clear(probabilities: Tensor, *, outside: Tensor) -> None:
    """Put the background into probabilities [K, ...], in place."""
    probabilities.masked_fill_(outside.to(probabilities.device), 0)
    probabilities[0].masked_fill_(outside.to(probabilities.device), 1)


def _doubt(image: Tensor) -> str:
    """Why the background of an image is hardly 0; empty where it is."""
    value, _ = _border_value(image)
    if value:
        return f"has the value {value:g} at its border and not 0"
    share = int(image.count_nonzero()) / image.numel()
    return f"is not 0 in {share:.0%} of its voxels" if share > _MOST else ""


def _border_value(image: Tensor) -> tuple[float | None, Tensor]:
    """The value that most of the border of an image [1, ...] has, None if there is none; and where the image has it."""
    value = _border(image).median()
    equal = (image - value).abs() <= _EQUAL * (image.max() - image.min())
    return (float(value) if _border(equal).float().mean() > _HALF else None), equal


def _border(image: Tensor) -> Tensor:
    """The voxels of all faces of an image [1, ...]."""
    return torch.cat([image.select(axis, end).flatten() for axis in range(1, image.ndim) for end in (0, -1)])


def _head(volume: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The largest part of a volume that is brighter than Otsu's threshold, and what it encloses."""
    import itk  # large, and needed by nobody else for NIfTI
    from scipy import ndimage

    clipped = np.ascontiguousarray(np.minimum(volume, np.percentile(volume, _OUTLIERS)), dtype=np.float32)
    image = itk.image_view_from_array(clipped)
    bright = np.asarray(itk.otsu_threshold_image_filter(image, inside_value=0, outside_value=1)) > 0
    parts, _ = ndimage.label(bright)
    head: NDArray[np.bool_] = ndimage.binary_fill_holes(parts == np.bincount(parts.ravel())[1:].argmax() + 1)
    return head
