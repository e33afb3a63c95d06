"""From the DICOM series of a patient to a DICOM SEG: `python -m passion_monai.dicom_seg` or :func:`segment_series`.

It needs highdicom: ``pip install "passion-monai[dicom]"``.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from passion_monai import __version__
from passion_monai.datasets import DATASETS, get_spec
from passion_monai.errors import find_words
from passion_monai.files import complete_file
from passion_monai.segmenter import Segmenter

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

__all__ = ["main", "make_dicom_seg", "read_series", "segment_series"]

Code = tuple[str, str, str]  # value, coding scheme, meaning

# NIfTI counts from the left to the right and from the back to the front, DICOM the other way round.
_TO_DICOM = np.diag([-1.0, -1.0, 1.0, 1.0])
_SAME_GRID = 0.01  # of a voxel, as for sequences of one case
_MORPHOLOGY: Code = ("49755003", "SCT", "Morphologically Abnormal Structure")
_REGION: Code = ("309825002", "SCT", "Spatial and Relational Concept")
_CODES = {name: code for dataset in DATASETS for name, code in get_spec(dataset).dicom_codes.items()}
_PRIVATE = "99PASSION"  # the standard wants 99 in front of a scheme of one's own
_SERIES_NUMBER = 1000  # behind those of scanners
# Without these a slice has no place, or no patient.
_NEEDED = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")
_GEOMETRY = ("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")
# The standard wants them empty where they are unknown; anonymised files often lack them, which says the same.
_MAY_BE_EMPTY = (
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


def segment_series(segmenter: Segmenter, folders: Mapping[str, str | Path], output: str | Path) -> Path:
    """Segment a patient, and write a DICOM SEG that refers to his series.

    Args:
        segmenter: of a bundle.
        folders: of each sequence that there is, by its name, the folder of its series and of nothing else.
        output: folder for the file, which is called by its SOP instance UID.

    Returns:
        The file.

    Raises:
        ImportError: when highdicom is not installed.
        ValueError: when a name is none of the bundle's sequences, a folder holds no series, or two are not of one
            patient, study and frame of reference; or when the images cannot be used, as the message says.
    """
    _import("highdicom")  # first, since a prediction takes minutes
    if unknown := sorted(set(folders) - set(segmenter.modalities)):
        raise ValueError(f"The bundle has no sequence {unknown}; it has {list(segmenter.modalities)}.")
    names = [name for name in segmenter.modalities if name in folders]
    series = {name: read_series(folders[name]) for name in names}
    _check_same_study(series)
    result = segmenter({name: folders[name] for name in names})
    dataset = make_dicom_seg(result.label, series, segmenter.classes, segmenter.bundle)
    path = Path(output) / f"{dataset.SOPInstanceUID}.dcm"
    with complete_file(path) as unfinished:
        dataset.save_as(unfinished)
    return path


def read_series(folder: str | Path) -> list[Dataset]:
    """The slices of a series, without their voxels.

    Args:
        folder: of the series, one file for each slice. What is no image, as a DICOMDIR, may lie beside them.

    Raises:
        ImportError: when highdicom, which brings pydicom, is not installed.
        ValueError: when there is no such image, one lacks what it must say, or they are of several series.
    """
    files = sorted(path for path in Path(folder).glob("*") if path.is_file())
    slices = [image for path in files if (image := _read_image(path)) is not None]
    if not slices:
        raise ValueError(f"{folder} holds no DICOM image; give the folder of a series.")
    for image in slices:
        if missing := [name for name in _NEEDED + _GEOMETRY if not image.get(name)]:
            raise ValueError(f"{image.filename} has no {missing}; a series needs one file for each slice, with these.")
    _check_same("SeriesInstanceUID", {str(image.filename): image for image in slices}, "files of one series")
    return slices


def _read_image(path: Path) -> Dataset | None:
    """What a file says but for its voxels; nothing where it is no image."""
    pydicom = _import("pydicom")
    try:
        image: Dataset = pydicom.dcmread(path, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
        return None
    for name in set(_MAY_BE_EMPTY) - set(image.dir()):
        setattr(image, name, None)
    return image if "Rows" in image else None


def make_dicom_seg(
    label: nib.Nifti1Image, series: Mapping[str, Sequence[Dataset]], classes: Mapping[str, int], bundle: Path
) -> Dataset:
    """A label image as a DICOM SEG, with one binary segment for each class but the background.

    Args:
        label: on the grid of the first series; its axes may be turned.
        series: of each sequence that was used, by its name, what :func:`read_series` gives.
        classes: names of the classes, background first, each with its value in the label image.
        bundle: folder of the bundle, which is named with its version as the algorithm.

    Returns:
        The DICOM SEG, for its method ``save_as``. It refers to all series, and its frames to the slices of the first.

    Raises:
        ImportError: when highdicom is not installed.
        ValueError: when the label image has another grid, or values of no class.
    """
    highdicom = _import("highdicom")
    first, *others = series.values()
    label, slices = _onto_slices(label, first)
    frames = _segment_numbers(label, list(classes.values()))
    dataset: Dataset = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=frames,
        segmentation_type="BINARY",
        segment_descriptions=_describe_segments(list(classes)[1:], bundle, list(series)),
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER,
        series_description=f"Segmentation by {bundle.name}"[:64],
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="the passion-monai contributors",
        manufacturer_model_name=bundle.name,
        software_versions=__version__,
        device_serial_number="none",
        content_label="SEGMENTATION",
        omit_empty_frames=bool(frames.any()),  # a SEG needs one frame, where nothing is found too
        further_source_images=[image for slices in others for image in slices] or None,
    )
    return dataset


def _onto_slices(label: nib.Nifti1Image, slices: Sequence[Dataset]) -> tuple[nib.Nifti1Image, list[Dataset]]:
    """The label image as [columns, rows, slices], and the slices in its order, on whose planes it must lie."""
    first = _plane(slices[0])
    normal = np.cross(first[:, 0], first[:, 1])
    ordered = sorted(slices, key=lambda image: float(normal @ _plane(image)[:, 2]))
    # Software that makes NIfTI of DICOM may turn the axes round.
    to_slices = np.linalg.inv(np.c_[first[:, :2], normal]) @ (_TO_DICOM @ label.affine)[:3, :3]
    label = label.as_reoriented(nib.io_orientation(nib.affines.from_matvec(to_slices)))
    _check_grid(label, ordered)
    return label, ordered


def _check_grid(label: nib.Nifti1Image, slices: Sequence[Dataset]) -> None:
    shape = (slices[0].Columns, slices[0].Rows, len(slices))
    if label.shape != shape:
        raise ValueError(f"The label image has the shape {label.shape}, but the series {shape}.")
    affine = _TO_DICOM @ label.affine
    planes = [np.c_[affine[:3, :2], affine[:3, 3] + index * affine[:3, 2]] for index in range(len(slices))]
    ends = np.array([(i, j, 1) for i in (0, shape[0] - 1) for j in (0, shape[1] - 1)]).T
    distance = max(np.abs((_plane(image) - plane) @ ends).max() for image, plane in zip(slices, planes, strict=True))
    if distance > _SAME_GRID * np.linalg.norm(affine[:3, :3], axis=0).min():
        raise ValueError(
            f"The label image lies on another grid than the series, up to {distance:.3g} mm away; slices must "
            "be evenly spaced, and the label image on the grid of the first sequence."
        )


def _plane(image: Dataset) -> np.ndarray:
    """The steps along the columns and rows of a slice, and where it begins: [3, 3], in mm in DICOM's coordinates."""
    directions = np.array(image.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    between_rows, between_columns = image.PixelSpacing
    steps = directions.T * [float(between_columns), float(between_rows)]
    plane: np.ndarray = np.c_[steps, np.array(image.ImagePositionPatient, dtype=np.float64)]
    return plane


def _segment_numbers(label: nib.Nifti1Image, values: Sequence[int]) -> np.ndarray:
    """Number of the segment of each voxel, 0 for none: uint8 [slices, rows, columns]."""
    voxels = np.asanyarray(label.dataobj).T
    if unknown := sorted(set(np.unique(voxels).tolist()) - set(values)):
        raise ValueError(f"The label image holds {unknown}, which are not values of its classes, {values}.")
    numbers = np.zeros(voxels.shape, dtype=np.uint8)
    for number, value in enumerate(values[1:], start=1):
        numbers[voxels == value] = number
    return numbers


def _describe_segments(names: Sequence[str], bundle: Path, sequences: Sequence[str]) -> list[SegmentDescription]:
    highdicom = _import("highdicom")
    concept = highdicom.sr.CodedConcept
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=bundle.name,
        family=concept("123110", "DCM", "Artificial Intelligence"),
        version=metadata["version"],
        source="passion-monai",
        parameters={"sequences": ",".join(sequences)},
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=concept(*(_MORPHOLOGY if name in _CODES else _REGION)),
            segmented_property_type=concept(*_CODES.get(name, (name, _PRIVATE, name))),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]


def _check_same_study(series: Mapping[str, Sequence[Dataset]]) -> None:
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        slices = {f"{name} ({image.filename})": image for name, images in series.items() for image in images}
        _check_same(keyword, slices, "series of one patient, study and frame of reference")


def _check_same(keyword: str, images: Mapping[str, Dataset], wanted: str) -> None:
    (first, image), *others = images.items()
    for other, another in others:
        if image[keyword].value != another[keyword].value:
            raise ValueError(
                f"{first} and {other} differ in {keyword}, {image[keyword].value} against {another[keyword].value}; "
                f"give {wanted}."
            )


def _import(name: str) -> Any:
    """A package of the extra `dicom`, which nothing else needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError('DICOM SEG needs highdicom: pip install "passion-monai[dicom]"') from error


def main(argv: Sequence[str] | None = None) -> None:
    """Segment a patient from DICOM series, and write a DICOM SEG."""
    parser = argparse.ArgumentParser(prog="python -m passion_monai.dicom_seg", description=main.__doc__)
    parser.add_argument("series", nargs="+", type=_assignment, metavar="NAME=FOLDER", help="sequence and its series")
    parser.add_argument("--bundle", required=True, help="folder of the bundle")
    parser.add_argument("--output", required=True, help="folder for the DICOM SEG")
    parser.add_argument("--ckpt_path", help="weights, if not those of the bundle")
    parser.add_argument("--ids", type=json.loads, default={}, metavar="JSON", help="other ids of its inference.yaml")
    given = parser.parse_args(argv)
    weights = {} if given.ckpt_path is None else {"ckpt_path": given.ckpt_path}
    if len(folders := dict(given.series)) < len(given.series):
        parser.error("give each sequence once.")
    try:
        path = segment_series(Segmenter(given.bundle, **given.ids, **weights), folders, given.output)
    except Exception as error:
        if not (words := find_words(error)):
            raise
        parser.error(words)
    print(path)  # noqa: T201 (a command line reports by printing)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got {text!r}")
    return name, folder


if __name__ == "__main__":
    main()
