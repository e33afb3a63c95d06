"""From files of one patient's modalities to a stacked image with its presence, and from a prediction back to a file.

Until the last step each modality is its own key, and a modality that is missing is a missing key: nothing of it can be
read by accident. Simulated missing modalities are keys removed; cohorts that are really incomplete never had them. In
the paper's words: IDT masking is fixed before training (:class:`MaskModalitiesd` with the rows of a presence matrix),
PDT and ModDrop draw anew for each sample and iteration (:class:`RandMaskModalitiesd`).
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import math
import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor, NibabelReader
from monai.transforms import (
    CropForeground,
    LoadImage,
    MapTransform,
    Orientation,
    RandomizableTransform,
    ResampleToMatch,
    SpatialCrop,
    SpatialResample,
)
from torch import Tensor

from passion_monai.files import complete_file, split_volume
from passion_monai.presence import combination_name, combinations

__all__ = [
    "FULL_CONFIDENCE",
    "AlignModalitiesd",
    "CropToForegroundd",
    "LabelsToClassesd",
    "LoadCased",
    "MaskModalitiesd",
    "RandMaskModalitiesd",
    "ReplaceSmallClassesd",
    "RestoreClassesd",
    "SaveProbabilitiesd",
    "SaveSegmentationd",
    "SelectSliced",
    "StackModalitiesd",
    "resample_probabilities",
    "seen_voxels",
]

logger = logging.getLogger(__name__)

FULL_CONFIDENCE = 32767
"""The int16 that stands for a confidence of 1. A byte would be off by 0.002, as much as a calibration error may be."""

Data = Mapping[Hashable, Any]
_ON_GRID = 0.5  # of a voxel's interpolation weights lie on the network's grid: its centre does

_CHUNK = 2**20  # bytes
_SHOWN = 8  # of the values that a message lists
_LARGEST = 1e15  # whose squares, summed over a volume, float32 still holds
_LABEL_ROUNDING = 1e-3  # how far a label value may lie from its whole number
_SAME_GRID = 0.01  # of a voxel, at any corner: registration tools round
_FLOAT_ROUNDING = 1e-4  # of a voxel: what float32 in a header makes of one grid
_UNITS = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}
"""Codes of NIfTI's xyzt_units, but for millimetres and for nothing said, with their length in millimetres."""
_VOXELS = (0.01, 100.0)  # millimetres that a voxel may measure if its header has another unit, which is often a mistake
MAX_COMPRESSION = 1032
"""How many times smaller gzip makes data at best."""


def _present(data: Data, modalities: Sequence[Hashable]) -> list[Hashable]:
    """The modalities that a case has; an error when it has none."""
    present = [modality for modality in modalities if modality in data]
    if not present:
        names = ", ".join(map(str, modalities))
        raise ValueError(f"Case {data.get('case')}: none of the modalities {names} is there; at least one is needed.")
    return present


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without MONAI's metadata."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


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
        _present(masked, self.keys)
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
        present = _present(data, self.keys)
        # The bits of 1..2^n - 1 run through the non-empty subsets of n modalities.
        subset = self.R.randint(1, 2 ** len(present)) if self._do_transform else 2 ** len(present) - 1
        kept = {key for bit, key in enumerate(present) if subset >> bit & 1}
        self.row = [key in kept for key in self.keys]

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        self.randomize(data)
        return self.mask({**data, self.mask.presence_key: self.row})


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
        present = _present(data, self.keys)
        for key in present:
            loaded[key] = self._read(data, key)
            if loaded[key].min() == loaded[key].max():
                raise ValueError(
                    f"{_where(data, key)} is {float(loaded[key].min())} everywhere; give the right file or remove the "
                    "entry, so that the modality counts as missing."
                )
        if self.label_key in data:
            loaded[self.label_key] = self._read(data, self.label_key)
        loaded["files"] = {key: str(data[key]) for key in present}
        return loaded

    def _read(self, data: Data, key: Hashable) -> MetaTensor:
        try:
            image = self._load(str(data[key]))
        except MemoryError:
            raise  # which says nothing of the file
        # Readers of several libraries stand behind this, each with errors of its own.
        except Exception as error:
            raise ValueError(
                f"{_where(data, key)} cannot be read ({error}); repair the file, or remove the entry, so that the "
                "modality counts as missing."
            ) from error
        if image.ndim != self.spatial_dims + 1 or image.shape[0] != 1 or not image.numel():
            raise ValueError(
                f"{_where(data, key)} must have {self.spatial_dims} axes, got shape {tuple(image.shape[1:])} with "
                f"{image.shape[0]} channel(s)."
            )
        if not _is_invertible(image.affine):
            raise ValueError(
                f"{_where(data, key)} has an affine that does not say where its voxels lie, {image.affine.tolist()}; "
                "correct its header."
            )
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"{_where(data, key)} holds NaN or infinite values; replace them in the file.")
        if float(image.abs().max()) > _LARGEST:
            raise ValueError(
                f"{_where(data, key)} holds values up to {float(image.abs().max()):.3g}, too large to compute their "
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


def _where(data: Data, key: Hashable) -> str:
    """Which file of which case an error is about."""
    return f"Case {data.get('case')}: {key} file {data[key]}"


def _file(image: Tensor) -> str:
    """Where an image was read from, for a message about it."""
    return str(image.meta.get("filename_or_obj")) if isinstance(image, MetaTensor) else "memory"


class AlignModalitiesd(MapTransform):
    """Make sure that all modalities of a case (and its label) lie on the grid of the first modality present.

    What has the same grid with its axes in another order or direction, as formats differ in it, is turned, exactly.
    Grids that are nowhere more than a hundredth of a voxel apart, as registration tools round them, count as that of
    the first, which is logged.

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
        first, *others = _present(data, self.keys)
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
                    f"which is taken for both: {_file(data[key])}."
                )
        return aligned

    def _resample(self, data: Data, key: Hashable, first: Hashable) -> MetaTensor:
        if self.on_mismatch == "raise":
            raise ValueError(
                f"Case {data.get('case')}: {key} lies on another grid than {first}: {_describe_grid(data[key])} in "
                f"{_file(data[key])} against {_describe_grid(data[first])}. Register and resample them, or set "
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
        present = _present(data, self.keys)
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


def _file_values(data: Data, values: Sequence[int], key: str = "label_values") -> list[int]:
    """File value of each class of a case: its own, unless those for all cases are these and more.

    Then they declare classes that the data set's do not have.
    """
    own = [int(value) for value in data.get(key, values)]
    return list(values) if own == list(values[: len(own)]) else own


class LabelsToClassesd(MapTransform):
    """Turn the label values of a file into classes 0..K-1.

    What is within a thousandth of a whole number is that number: labels that were scaled or written as floats are.

    Args:
        keys: key of the label; a case may lack it.
        values: file value of each class, background first.
        values_key: key of values that the case has of its own, which then hold instead (data sets have changed them),
            unless `values` are these and more.

    Raises:
        ValueError: for a value that is not among them, and for own values of another number; the message names the
            case, the file and the values.
    """

    def __init__(self, keys: str, *, values: Sequence[int], values_key: str = "label_values") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.values = tuple(values)
        self.values_key = values_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        converted = dict(data)
        for key in self.key_iterator(converted):
            label = data[key]
            values = _file_values(data, self.values, self.values_key)
            if len(values) != len(self.values):
                raise ValueError(
                    f"Case {data.get('case')}: {self.values_key} must be {len(self.values)} values, one for each "
                    f"class, got {values}."
                )
            given = label.as_tensor()
            held = torch.where((given - given.round()).abs() <= _LABEL_ROUNDING, given.round(), given)
            unknown = sorted(set(torch.unique(held).tolist()) - set(values))
            if unknown:
                shown = f"{unknown[:_SHOWN]}" + f" and {len(unknown) - _SHOWN} others" * (len(unknown) > _SHOWN)
                raise ValueError(
                    f"Case {data.get('case')}: the {key} holds the values {shown}, known are {values}, in "
                    f"{_file(label)}; give the right file, or the right values as {self.values_key} of the case; "
                    "classes that the data set does not have are declared by --label_values, --class_names, --regions."
                )
            classes = torch.zeros_like(label, dtype=torch.uint8)
            for index, value in enumerate(values):
                classes[held == value] = index
            converted[key] = classes
        return converted


class SelectSliced(MapTransform):
    """Take one slice of a volume, as plain tensors [1, H, W]: a slice by itself has no place in the patient's space.

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
            selected[key] = _plain(data[key])[..., index]
        return selected


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
        first, *_ = present = _present(data, self.keys)
        shapes = {key: tuple(data[key].shape) for key in present}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Case {data.get('case')}: the modalities differ in shape: {shapes}; align them first.")
        reference = data[first]
        channels = [_plain(data[key] if key in data else torch.zeros_like(reference)) for key in self.keys]
        image = torch.cat(channels)
        stacked["image"] = MetaTensor(image, meta=reference.meta) if isinstance(reference, MetaTensor) else image
        stacked["presence"] = torch.tensor([key in data for key in self.keys])
        return stacked


class RestoreClassesd(MapTransform):
    """Turn class probabilities on the network's grid into class maps on the grid that the case came on.

    Probabilities are resampled linearly, then the most likely class is taken; outside the cropped region it is the
    background.

    Args:
        keys: key of the probabilities, [K, ...] or [P, K, ...] for P combinations, on the grid of `image_key`.
        image_key: the image that they were computed from.
        label_key: where the case has it, the maps get the label's grid; otherwise the original grid of the image.
        confidence_key: where to put the probability of the most likely class, if it is wanted.
        probabilities_key: where to put the probabilities themselves, if they are wanted.
        temperatures: what :func:`passion_monai.evaluation.temperature.read_temperatures` gives, by which these
            probabilities are calibrated; confidences too, put beside the plain ones with ``calibrated_`` before their
            key. The class maps do not change. A combination without a temperature keeps its probabilities, and has no
            calibrated confidence.
        modalities: names of the M modalities, if there are temperatures.

    Shape:
        - Output: int16 [1, ...] or [P, ...]; -1 everywhere for a combination whose probabilities are NaN.
        - Confidence: int16, the same; from 1 to `FULL_CONFIDENCE`, and 0 for what the network did not see.
        - Probabilities: float32 [K, ...], of a single combination; outside the cropped region those of background.
    """

    def __init__(
        self,
        keys: str = "pred",
        *,
        image_key: str = "image",
        label_key: str = "label",
        confidence_key: str | None = None,
        probabilities_key: str | None = None,
        temperatures: Mapping[str, Any] | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.label_key = label_key
        self.confidence_key = confidence_key
        self.probabilities_key = probabilities_key
        self.temperatures = temperatures
        self.modalities = tuple(modalities)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        restored = dict(data)
        image = data[self.image_key]
        label = data.get(self.label_key)  # MONAI's evaluator puts None where a case has none
        if label is not None:
            affine, shape = label.affine, label.shape[1:]
        else:
            affine, shape = torch.as_tensor(image.meta["original_affine"]), image.meta["spatial_shape"]
        shape = tuple(int(size) for size in shape)
        for key in self.key_iterator(restored):
            single = data[key].ndim == image.ndim
            volumes = data[key][None] if single else data[key]
            scales = self._scales(data, single=single) if self.temperatures else [None] * len(volumes)
            parts = [
                self._restore(volume, scale, image.affine, affine, shape)
                for volume, scale in zip(volumes, scales, strict=True)
            ]
            maps, confidences, calibrated = zip(*parts, strict=True)
            restored[key] = MetaTensor(torch.stack(maps), affine=affine)
            if self.confidence_key is not None:
                restored[self.confidence_key] = torch.stack(confidences)
                restored |= {f"calibrated_{self.confidence_key}": torch.stack(calibrated)} if self.temperatures else {}
            if self.probabilities_key is not None:
                moved = _normalised(resample_probabilities(data[key], image.affine, affine, shape))
                restored[self.probabilities_key] = MetaTensor(_tempered(moved, scales[0]), affine=affine)
        return restored

    def _scales(self, data: Data, *, single: bool) -> list[float | None]:
        """The temperature of each class map."""
        rows = [data["presence"].tolist()] if single else combinations(len(self.modalities)).tolist()
        return [_find_temperature(self.temperatures, row, self.modalities) for row in rows]

    def _restore(
        self, probabilities: Tensor, temperature: float | None, source: Tensor, affine: Tensor, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Class map and, if they are wanted, its confidence and the calibrated one."""
        if bool(_plain(probabilities).isnan().all()):
            absent = torch.full(tuple(shape), -1, dtype=torch.int16)
            return absent, torch.zeros_like(absent), torch.zeros_like(absent)
        moved = resample_probabilities(probabilities, source, affine, shape)
        classes = moved.argmax(dim=0).to(torch.int16)
        if self.confidence_key is None:
            return classes, None, None
        unknown = torch.zeros_like(classes)
        calibrated = unknown if temperature is None else _confidence(_tempered(moved, temperature), seen_voxels(moved))
        return classes, _confidence(moved, seen_voxels(moved)), calibrated


def resample_probabilities(probabilities: Tensor, source: Tensor, affine: Tensor, shape: Sequence[int]) -> Tensor:
    """Probabilities [K, ...] from the network's grid on another one, linearly, with zeros outside of the first.

    Args:
        probabilities: of K classes.
        source: affine of the network's grid.
        affine: affine of the other one.
        shape: of the other one.
    """
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
    on_network_grid = MetaTensor(_plain(probabilities).cpu(), affine=source.cpu())
    return _plain(resample(on_network_grid, dst_affine=affine.cpu(), spatial_size=shape))


def seen_voxels(probabilities: Tensor) -> Tensor:
    """Where probabilities [K, ...] that :func:`resample_probabilities` gives are from inside the network's grid."""
    return probabilities.sum(dim=0) > _ON_GRID


def _normalised(probabilities: Tensor) -> Tensor:
    """K probabilities [K, ...] that were resampled with zeros around them, so that they add up to 1 everywhere.

    The most likely class stays what it was; where there is nothing but zeros, that is the background.
    """
    total = probabilities.sum(dim=0)
    background = torch.eye(len(probabilities))[0].view(-1, *[1] * total.ndim)
    return (probabilities / total).where(total > 0, background)


def _tempered(probabilities: Tensor, temperature: float | None) -> Tensor:
    """Probabilities [K, ...] calibrated by a temperature; as they are without one.

    ``softmax(log(p) / T) = p^(1 / T) / sum_k p_k^(1 / T)``: Guo et al., Eq. (9), on what the mean over windows and
    flips leaves of the logits.
    """
    if temperature is None:
        return probabilities
    powers = probabilities.pow(1 / temperature)
    return powers / powers.sum(dim=0)


def _find_temperature(
    temperatures: Mapping[str, Any] | None, presence: Sequence[bool], modalities: Sequence[str]
) -> float | None:
    """The temperature of a combination; None where none was fitted."""
    fitted = (temperatures or {"combinations": {}})["combinations"].get(combination_name(presence, modalities))
    return None if fitted is None else float(fitted["temperature"])


def _confidence(probabilities: Tensor, seen: Tensor) -> Tensor:
    """The highest of K probabilities [K, ...], in proportion to their sum, as int16; 0 where they were not seen."""
    share = probabilities.amax(dim=0) / probabilities.sum(dim=0)
    return (share * FULL_CONFIDENCE).round().clamp(1, FULL_CONFIDENCE).where(seen, 0).to(torch.int16)


class ReplaceSmallClassesd(MapTransform):
    """Let a class of which too few voxels are predicted in a class map be another class.

    A habit of challenges where an empty region of the label counts for much: the BraTS challenge scored a single voxel
    of enhancing tumour in a patient without any as wholly wrong. It is no part of PASSION.

    Args:
        keys: key of the class maps, [P, ...]; each is taken by itself.
        minimum_voxels: for each class that this is done to, in this order, the least number of voxels that stays.
        replacement: for each of them the class that fewer voxels become.

    Raises:
        ValueError: when the two are not of the same classes, or a class is to be replaced by itself.
    """

    def __init__(
        self, keys: str = "pred", *, minimum_voxels: Mapping[int, int], replacement: Mapping[int, int]
    ) -> None:
        super().__init__(keys)
        for name, given in (("minimum_voxels", minimum_voxels), ("replacement", replacement)):
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} must give a whole number for each class, as in {{3: 500}}, got {given!r}.")
        # Read from JSON, the classes are texts.
        self.minimum_voxels = {int(index): int(number) for index, number in minimum_voxels.items()}
        self.replacement = {int(index): int(other) for index, other in replacement.items()}
        if set(self.minimum_voxels) != set(self.replacement) or any(k == v for k, v in self.replacement.items()):
            raise ValueError(
                "minimum_voxels and replacement must be of the same classes, and none be replaced by itself, got "
                f"{self.minimum_voxels} and {self.replacement}."
            )

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        replaced = dict(data)
        for key in self.key_iterator(replaced):
            replaced[key] = data[key].clone()
            for classes in _plain(replaced[key]):
                self._replace(classes)
        return replaced

    def _replace(self, classes: Tensor) -> None:
        for index, number in self.minimum_voxels.items():
            mask = classes == index
            if int(mask.count_nonzero()) < number:
                classes[mask] = self.replacement[index]


class SaveSegmentationd(MapTransform):
    """Write a class map as ``<case>_seg.nii.gz`` with the data set's label values, and ``<case>_seg.json`` beside it.

    The JSON file says which modalities were used, which were missing, the file of each (null for a missing one), the
    volume of each region in millilitres, and as ``expected_scores`` what the network reached in its evaluation with
    just these modalities (null where it was not evaluated). ``calibration`` has the temperature by which the
    probabilities were calibrated, null where they were not, then with a note that says why if it was asked for. A file
    under its final name is complete.

    Args:
        keys: key of the class map, int [1, H, W, D] with the affine of the file to write.
        output_dir: folder to write to; it is made.
        modalities: names of the M modalities.
        values: file value of each class, background first; a case's ``label_values`` hold instead, unless these are
            the same and more.
        class_names: name of each class.
        regions: classes of each region, for the volumes.
        expected_scores: what :func:`passion_monai.evaluation.expected.read_expected_scores` gives.
        temperatures: those that the probabilities were calibrated by, as :class:`RestoreClassesd` has them.
    """

    def __init__(
        self,
        keys: str = "pred",
        *,
        output_dir: str | Path,
        modalities: Sequence[str],
        values: Sequence[int],
        class_names: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        expected_scores: Mapping[str, Any] | None = None,
        temperatures: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.modalities = tuple(modalities)
        self.values = tuple(values)
        self.class_names = tuple(class_names)
        self.regions = dict(regions)
        self.expected_scores = expected_scores
        self.temperatures = temperatures

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            self._save(data, data[key])
        return dict(data)

    def _save(self, data: Data, prediction: MetaTensor) -> None:
        classes = prediction.as_tensor()[0].cpu().numpy()
        values = np.asarray(_file_values(data, self.values))
        values = values.astype(np.result_type(*map(np.min_scalar_type, values.tolist())))  # the smallest that holds all
        image = nib.Nifti1Image(values[classes], prediction.affine.cpu().numpy())
        image.header.set_xyzt_units("mm")
        record = self._record(data, classes, float(np.prod(image.header.get_zooms()[:3])), values)
        stem = f"{data['case']}_seg"
        # In this order: an interrupted run leaves no segmentation without its record.
        with complete_file(self.output_dir / f"{stem}.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        with complete_file(self.output_dir / f"{stem}.nii.gz") as unfinished:
            nib.save(image, unfinished)

    def _record(self, data: Data, classes: np.ndarray, voxel_volume: float, values: np.ndarray) -> dict[str, Any]:
        presence = dict(zip(self.modalities, data["presence"].tolist(), strict=True))
        volumes = {name: np.isin(classes, region).sum() * voxel_volume for name, region in self.regions.items()}
        return {
            "case": data["case"],
            "modalities_used": [name for name, present in presence.items() if present],
            "modalities_missing": [name for name, present in presence.items() if not present],
            "files": {name: data["files"].get(name) for name in self.modalities},
            "labels": dict(zip(self.class_names, values.tolist(), strict=True)),
            "region_volumes_ml": {name: round(float(volume) / 1000, 3) for name, volume in volumes.items()},
            "expected_scores": self._expected(list(presence.values())),
            "calibration": self._calibration(data["case"], list(presence.values())),
        }

    def _expected(self, presence: list[bool]) -> dict[str, Any] | None:
        """Scores of the regions with a combination of modalities, and which data they were measured on."""
        name = combination_name(presence, self.modalities)
        if self.expected_scores is None or name not in self.expected_scores["combinations"]:
            return None
        return {"data": self.expected_scores["data"], "regions": self.expected_scores["combinations"][name]}

    def _calibration(self, case: str, presence: list[bool]) -> dict[str, Any] | None:
        """The temperature of a combination of modalities, and which data it was fitted on, or why there is none."""
        if self.temperatures is None:
            return None
        data, temperature = self.temperatures["data"], _find_temperature(self.temperatures, presence, self.modalities)
        if temperature is not None:
            return {"temperature": temperature, "data": data}
        name = combination_name(presence, self.modalities)
        note = (
            f"NOT CALIBRATED: no temperature was fitted for {name}, since no validation case of {data} has it. The "
            "segmentation is not concerned. Run calibrate.yaml on validation cases that have these modalities."
        )
        logger.warning(f"Case {case}: {note}")
        return {"temperature": None, "data": data, "note": note}


class SaveProbabilitiesd(MapTransform):
    """Write class probabilities as ``<case>_prob.nii.gz``, the classes along the last axis.

    NIfTI has no numbers of 16 bits but whole ones: the file holds those from 0 to `FULL_CONFIDENCE`, and the scale by
    which all that read NIfTI make 0 to 1 of them.

    Args:
        keys: key of the probabilities, float [K, H, W, D] with the affine of the file to write.
        output_dir: folder to write to; it is made.
    """

    def __init__(self, keys: str = "probabilities", *, output_dir: str | Path) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            levels = (_plain(data[key]).movedim(0, -1) * FULL_CONFIDENCE).round().to(torch.int16).numpy()
            image = nib.Nifti1Image(levels, data[key].affine.cpu().numpy())
            image.header.set_slope_inter(1 / FULL_CONFIDENCE, 0)
            image.header.set_xyzt_units("mm")
            with complete_file(self.output_dir / f"{data['case']}_prob.nii.gz") as unfinished:
                nib.save(image, unfinished)
        return {key: value for key, value in data.items() if key not in self.keys}  # large, and of no use afterwards
