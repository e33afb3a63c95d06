"""From files to images, and what a file may be."""

from __future__ import annotations

import gzip
import logging
import math
import re
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor, NibabelReader
from monai.transforms import LoadImage, MapTransform
from torch import Tensor

from passion_monai.files import split_volume
from passion_monai.transforms.case import Data, present_modalities, where

__all__ = ["MAX_COMPRESSION", "LoadCased", "make_loader"]

_CHUNK = 2**20  # bytes
_LARGEST = 1e15  # whose squares, summed over a volume, float32 still holds
_UNITS = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}
"""Codes of NIfTI's xyzt_units, but for millimetres and for nothing said, with their length in millimetres."""
_VOXELS = (0.01, 100.0)  # millimetres that a voxel may measure if its header has another unit, which is often a mistake
MAX_COMPRESSION = 1032
"""How many times smaller gzip makes data at best."""


class LoadCased(MapTransform):
    """Read the files of the modalities that a case has, and its label if it has one, as float32 [1, H, W(, D)].

    NIfTI is read by nibabel, with a grid in millimetres whatever the unit of its header; NRRD, MetaImage and the folder
    of a DICOM series by ITK. A case may mix formats.
    Also puts ``files`` into the case, the path of each modality that was read.

    Args:
        keys: names of the M modalities.
        label_key: key of the label file.
        spatial_dims: number of axes that a file must have.

    Raises:
        ValueError: for a case without modality, and for a file that cannot be read, has another number of axes, no
            usable affine, holds complex numbers, NaN, infinity or values too large to compute with, or an image that
            is the same everywhere. The message names case, key and file.
    """

    def __init__(self, keys: Sequence[str], *, label_key: str = "label", spatial_dims: int = 3) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.label_key = label_key
        self.spatial_dims = spatial_dims
        self.load = make_loader()
        self.nifti_reader = NibabelReader()

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        loaded = dict(data)
        present = present_modalities(data, self.keys)
        for key in present:
            loaded[key] = self.read(data, key)
            if loaded[key].min() == loaded[key].max():
                raise ValueError(
                    f"{where(data, key)} is {float(loaded[key].min())} everywhere; give the right file or remove the "
                    "entry, so that the modality counts as missing."
                )
        if self.label_key in data:
            loaded[self.label_key] = self.read(data, self.label_key)
        loaded["files"] = {key: str(data[key]) for key in present}
        return loaded

    def read(self, data: Data, key: Hashable) -> MetaTensor:
        """One of a case's files, float32 [1, H, W(, D)].

        Raises:
            ValueError: when it cannot be used, see above; but it may be the same everywhere.
        """
        try:
            image = self._load(str(data[key]))
        except MemoryError:
            raise  # which says nothing of the file
        # Readers of several libraries stand behind this, each with errors of its own.
        except Exception as error:
            raise ValueError(
                f"{where(data, key)} cannot be read ({error}); repair the file, or remove the entry, so that the "
                "modality counts as missing."
            ) from error
        if image.ndim != self.spatial_dims + 1 or image.shape[0] != 1 or not image.numel():
            raise ValueError(
                f"{where(data, key)} must have {self.spatial_dims} axes, got shape {tuple(image.shape[1:])} with "
                f"{image.shape[0]} channel(s)."
            )
        if not _is_invertible(image.affine):
            raise ValueError(
                f"{where(data, key)} has an affine that does not say where its voxels lie, {image.affine.tolist()}; "
                "correct its header."
            )
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"{where(data, key)} holds NaN or infinite values; replace them in the file.")
        if float(image.abs().max()) > _LARGEST:
            raise ValueError(
                f"{where(data, key)} holds values up to {float(image.abs().max()):.3g}, too large to compute their "
                f"variance; scale them down in the file, to {_LARGEST:g} at most."
            )
        return image

    def _load(self, source: str) -> MetaTensor:
        file, volume = split_volume(source)
        path, name = str(file), str(file).lower()  # extensions may be in capitals
        is_nifti = name.endswith((".nii", ".nii.gz"))
        if not file.exists():
            raise FileNotFoundError("it does not exist")
        if file.is_dir() and (count := _count_series(path)) != 1:
            raise ValueError(f"a folder must hold one DICOM series, this one has {count}")
        if name.endswith(".gz"):
            _check_gzip(path)
        if is_nifti:
            _check_header(path)
        # Given with each call, or LoadImage would try all other readers where this one refuses a file.
        image: MetaTensor = self.load(path, reader=self.nifti_reader if is_nifti else _itk_reader(name))
        image = image if volume is None else _volume(image, volume)
        return _in_millimetres(image, path) if is_nifti else image


def make_loader() -> LoadImage:
    """MONAI's loader. It makes all of its readers, and one warns where pydicom lacks a decoder that we do not use."""
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
        return LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float32)


def _volume(image: MetaTensor, index: int) -> MetaTensor:
    """One volume of a 4-D image, whose last axis the reader has made channels."""
    if index >= image.shape[0]:
        raise ValueError(f"it has {image.shape[0]} volume(s), none is number {index}, counted from 0")
    return MetaTensor(image[index : index + 1])


def _itk_reader(name: str) -> ITKReader:
    """The reader of what is not NIfTI; ITK is not imported before such a file is read.

    Args:
        name: of the file, in small letters.
    """
    itk = _import_itk()
    # ITK does not choose its MetaImage reader by itself for .MHA.
    return ITKReader(imageio=itk.MetaImageIO.New()) if name.endswith((".mha", ".mhd")) else ITKReader()


def _import_itk() -> Any:
    try:
        import itk
    except ImportError as error:
        raise ImportError("NRRD, MetaImage and DICOM need ITK: pip install itk") from error
    return itk


def _check_gzip(path: str) -> None:
    """Read a compressed file to its end, where the checksum is: nibabel stops before it, at the last voxel."""
    with gzip.open(path) as file:
        while file.read(_CHUNK):
            pass


def _check_header(path: str) -> None:
    """Refuse a NIfTI file that cannot hold the voxels its header claims, for which memory would be reserved first.

    And one without a finite affine, in the place of which MONAI puts something else, with no more than a warning; and
    one of complex numbers, of which the imaginary part would be dropped, or of colours.
    """
    if not re.search(r"\.(nii|NII)(\.[gG][zZ])?$", path):
        raise ValueError("nibabel reads .nii or .NII, not mixed letters; rename it")
    image: Any = nib.load(path)
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"its voxels are {image.get_data_dtype()}, not one real number each: save their magnitude")
    claimed = math.prod(image.shape) * image.get_data_dtype().itemsize
    size = Path(path).stat().st_size
    if claimed > size * (MAX_COMPRESSION if path.lower().endswith(".gz") else 1):
        raise ValueError(f"its header claims voxels of {claimed} bytes, which a file of {size} bytes cannot hold")
    if not np.isfinite(image.affine).all():
        raise ValueError("its affine is not finite")


def _in_millimetres(image: MetaTensor, path: str) -> MetaTensor:
    """The image with affines in millimetres, whatever the unit of its header; other readers do that by themselves."""
    header: Any = nib.load(path).header
    unit, length = _UNITS.get(int(header["xyzt_units"]) & 7, ("millimetres", 1.0))
    if length == 1.0:
        return image
    scale = np.diag([length, length, length, 1.0])
    original = scale @ np.asarray(image.meta["original_affine"])
    sizes = nib.affines.voxel_sizes(original)
    if not (_VOXELS[0] <= sizes.min() and sizes.max() <= _VOXELS[1]):
        raise ValueError(
            f"its header gives lengths in {unit}, by which its voxels measure {np.round(sizes, 6).tolist()} mm: "
            "correct its xyzt_units"
        )
    image.affine = torch.as_tensor(scale).to(image.affine) @ image.affine
    image.meta["original_affine"] = original
    return image


def _is_invertible(affine: Tensor) -> bool:
    return bool(torch.isfinite(affine).all()) and int(torch.linalg.matrix_rank(affine[:3, :3])) == 3


def _count_series(folder: str) -> int:
    """How many DICOM series a folder holds, told apart as MONAI's reader does, which takes the first of them."""
    names = _import_itk().GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")  # date of the series
    names.SetDirectory(folder)
    return len(names.GetSeriesUIDs())
