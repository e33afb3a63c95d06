"""Cases that an evaluation keeps, to look at: images, label and the class maps of all combinations in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientation, SpatialResample
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor

from passion_monai.files import complete_file

__all__ = ["KeptCase", "keep_case", "read_kept_case"]

_GREY_LEVELS = 255
_SHOWN_PERCENTILES = (1, 99.5)


@dataclass(frozen=True)
class KeptCase:
    """A case on the grid of its label, with axes to the right, to the front and up; the arrays of its file by name.

    It has M modalities, and P combinations of them.

    Attributes:
        images: grey levels from 0 to 255, uint8 [M, H, W, D]; 0 outside the brain or crop and for a missing modality.
        presence: which modalities the case has, bool [M].
        modalities: their names.
        label: class map, uint8 [H, W, D].
        predictions: class maps, uint8 [P, H, W, D].
        combinations: their names.
        spacing: size of a voxel along each axis, in mm.
    """

    images: NDArray[np.uint8]
    presence: NDArray[np.bool_]
    modalities: NDArray[Any]
    label: NDArray[np.uint8]
    predictions: NDArray[np.uint8]
    combinations: NDArray[Any]
    spacing: NDArray[np.float64]


def keep_case(
    path: str | Path,
    *,
    image: MetaTensor,
    presence: Sequence[bool],
    modalities: Sequence[str],
    label: MetaTensor,
    predictions: Tensor,
    combinations: Sequence[str],
) -> None:
    """Write a case, its images resampled to the label's grid.

    Args:
        path: an ``.npz`` file; its folder is made.
        image: what the network was given, on its grid.
        presence: which of the M modalities the case has.
        modalities: their names.
        label: class map on the grid that the predictions have.
        predictions: class maps of P combinations.
        combinations: their names.

    Shape:
        - image: [M, H, W, D]; label: int [1, H', W', D']; predictions: int [P, H', W', D'].
    """
    to_ras = Orientation(axcodes="RAS", labels=None)
    classes: Any = to_ras(label.cpu())  # a MetaTensor, though typed as any tensor
    maps = to_ras(MetaTensor(predictions.cpu(), affine=label.affine.cpu()))
    grey = MetaTensor(torch.stack([_grey(convert_to_tensor(volume)) for volume in image.cpu()]), affine=image.affine)
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
    images = resample(grey.cpu(), dst_affine=classes.affine, spatial_size=classes.shape[1:])
    case = KeptCase(
        images=images.round().numpy().astype(np.uint8),
        presence=np.asarray(presence, dtype=bool),
        modalities=np.array(modalities),
        label=classes[0].numpy().astype(np.uint8),
        predictions=maps.numpy().astype(np.uint8),
        combinations=np.array(combinations),
        spacing=affine_to_spacing(classes.affine).numpy(),
    )
    with complete_file(path) as unfinished:
        np.savez_compressed(unfinished, **asdict(case))


def read_kept_case(path: str | Path) -> KeptCase:
    """Read a case that :func:`keep_case` wrote.

    Raises:
        ValueError: naming the file when it is something else.
    """
    try:
        with Path(path).open("rb") as file, np.load(file) as arrays:
            return KeptCase(**arrays)
    except (BadZipFile, EOFError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no kept case ({error}); evaluate with --keep_cases again.") from error


def _grey(volume: Tensor) -> Tensor:
    """Grey levels of a normalised volume; what is exactly 0 lies outside what was normalised, and is black."""
    inside = volume != 0
    if not inside.any():
        return torch.zeros_like(volume)
    low, high = np.percentile(volume[inside].numpy(), _SHOWN_PERCENTILES)
    share: Tensor = (volume - low) / max(high - low, 1e-6)
    return share.clamp(0, 1).where(inside, 0) * _GREY_LEVELS
