"""The mark of phantoms in the header of their files, in a module without the packages that simulate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib

from passion_monai.files import split_volume

__all__ = ["PHANTOM_MARK", "is_phantom"]

PHANTOM_MARK = "PHANTOM, not a patient"
"""Stands in the header of every image of a phantom cohort."""


def is_phantom(path: str | Path) -> bool:
    """Whether the header of an image file marks it as a phantom."""
    path, _ = split_volume(path)
    if not path.name.lower().endswith(".nii.gz"):
        return False
    image: Any = nib.load(path)
    return PHANTOM_MARK.encode() in image.header["descrip"].item()
