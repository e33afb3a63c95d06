"""From a patient's DICOM series to a DICOM segmentation, with highdicom (`pip install "passion-monai[dicom]"`).

    python -m passion_monai.dicom --bundle bundles/brats_rfnet_passion --output seg.dcm flair=<folder> t1=<folder>

Each folder holds one series. Which series is which sequence is said by name, since DICOM does not say it reliably. The
segmentation lies on the slices of the first sequence present, in the order of the bundle's sequences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from passion_monai import __version__
from passion_monai.datasets import DATASETS, get_spec
from passion_monai.files import complete_file
from passion_monai.segmenter import Segmentation, Segmenter

try:
    import highdicom
    import pydicom
    from pydicom.sr.codedict import codes
except ImportError as error:
    raise ImportError('DICOM segmentations need highdicom: pip install "passion-monai[dicom]"') from error

__all__ = ["dicom_segmentation", "main", "read_series"]

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TOLERANCE = 0.01
"""In mm, of where voxels lie: DICOM holds decimal numbers, of few digits at times."""
_CODES = {name: code for dataset in DATASETS for name, code in get_spec(dataset).dicom_codes.items()}


def read_series(folder: str | Path) -> list[pydicom.Dataset]:
    """The slices of the DICOM series in a folder, without their pixels.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when the folder holds no series, or more than one.
    """
    files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
    datasets = [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in files]
    slices: list[pydicom.Dataset] = [dataset for dataset in datasets if "ImagePositionPatient" in dataset]
    series = {dataset.SeriesInstanceUID for dataset in slices}
    if len(series) != 1:
        raise ValueError(f"{folder} holds {len(series)} series of slices; give a folder with one.")
    return slices


def dicom_segmentation(
    result: Segmentation,
    series: Mapping[str, Sequence[pydicom.Dataset]],
    *,
    algorithm: str,
    version: str,
) -> highdicom.seg.Segmentation:
    """A prediction as a DICOM segmentation, with one binary segment for each class.

    It belongs to the patient and the study of the series, and refers to the slices of the first sequence used.

    Args:
        result: the prediction, on the grid of the first sequence used.
        series: for each sequence used, the slices of its series.
        algorithm: what the segments were made by, such as the name of the bundle.
        version: of the algorithm.

    Raises:
        ValueError: when the series are not of one patient, study and frame of reference, or the prediction does not
            lie on the slices.
    """
    _check_one_study(series)
    slices = series[result.record["modalities_used"][0]]
    return highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=_on_slices(_volume(result, slices[0]), slices),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_segments(result.record["labels"], algorithm, version),
        series_instance_uid=highdicom.UID(),
        series_number=1000 + int(slices[0].SeriesNumber or 0),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="passion-monai",
        manufacturer_model_name=algorithm,
        software_versions=__version__,
        device_serial_number=version,
        content_description=f"From {', '.join(result.record['modalities_used'])}",
        series_description=f"Segmentation by {algorithm}",
        further_source_images=[image for name in result.record["modalities_used"][1:] for image in series[name]],
    )


def _check_one_study(series: Mapping[str, Sequence[pydicom.Dataset]]) -> None:
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        values = {name: str(slices[0].get(keyword, "")) for name, slices in series.items()}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"The series have different values of {keyword}, {values}; give series of one patient and study, "
                "registered to each other."
            )


def _volume(result: Segmentation, slice_: pydicom.Dataset) -> highdicom.Volume:
    """The prediction with the number of a segment at each voxel, 0 for the background, in DICOM's coordinates."""
    values = list(result.record["labels"].values())
    numbers = np.zeros(result.label.shape, dtype=np.uint8)
    for number, value in enumerate(values):
        numbers[np.asarray(result.label.dataobj) == value] = number
    return highdicom.Volume(
        numbers,
        affine=_RAS_TO_LPS @ result.label.affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=slice_.FrameOfReferenceUID,
    )


def _on_slices(volume: highdicom.Volume, slices: Sequence[pydicom.Dataset]) -> highdicom.Volume:
    """The same volume with its axes in the order and direction of the slices."""
    try:
        matched = volume.match_geometry(_geometry(slices), tol=_TOLERANCE)
    except RuntimeError as error:
        raise ValueError(f"The segmentation does not lie on the slices of the series. {error}") from error
    if sorted(matched.spatial_shape) != sorted(volume.spatial_shape):  # it was cropped or padded
        raise ValueError(
            f"The segmentation has {volume.spatial_shape} voxels, the series {matched.spatial_shape[1:]} on "
            f"{matched.spatial_shape[0]} slices."
        )
    return matched


def _geometry(slices: Sequence[pydicom.Dataset]) -> highdicom.VolumeGeometry:
    spacing, positions = highdicom.spatial.get_series_volume_positions(slices)
    if spacing is None or positions is None:
        raise ValueError(f"The series {slices[0].SeriesInstanceUID} is no stack of evenly spaced slices.")
    first = slices[positions.index(0)]
    return highdicom.VolumeGeometry.from_attributes(
        image_position=first.ImagePositionPatient,
        image_orientation=first.ImageOrientationPatient,
        rows=first.Rows,
        columns=first.Columns,
        pixel_spacing=first.PixelSpacing,
        spacing_between_slices=spacing,
        number_of_frames=len(slices),
        coordinate_system="PATIENT",
        frame_of_reference_uid=first.FrameOfReferenceUID,
    )


def _segments(labels: Mapping[str, int], algorithm: str, version: str) -> list[highdicom.seg.SegmentDescription]:
    """What each segment is; the first label is the background's."""
    family = codes.DCM.ArtificialIntelligence
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=_code(name),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(algorithm, family, version),
        )
        for number, name in enumerate(list(labels)[1:], start=1)
    ]


def _code(name: str) -> highdicom.sr.CodedConcept:
    """The code of a class; one of our own where the data set knows none."""
    return highdicom.sr.CodedConcept(*_CODES.get(name, (name.replace(" ", "_")[:16], "99PASSION", name[:64])))


def segment(bundle: Path, folders: Mapping[str, str], output: Path, *, ids: Mapping[str, Any]) -> Segmentation:
    """Segment a patient from folders of DICOM series, and write the DICOM segmentation.

    Args:
        bundle: folder of the bundle.
        folders: of each sequence that there is, by its name, the folder of its series.
        output: path of the file to write.
        ids: those of the bundle's ``inference.yaml`` that are set, such as ``ckpt_path``.

    Raises:
        ValueError: when a folder does not hold one series, series do not belong together, or a name is no sequence.
    """
    series = {name: read_series(folder) for name, folder in folders.items()}
    _check_one_study(series)  # all this before the network is run
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    result = Segmenter(bundle, **ids)(folders)
    dataset = dicom_segmentation(result, series, algorithm=bundle.resolve().name, version=metadata["version"])
    with complete_file(output) as unfinished:
        dataset.save_as(unfinished)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Segment the series that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="+", metavar="SEQUENCE=FOLDER", help="the folder of a DICOM series")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--output", type=Path, required=True, help="the file to write, .dcm")
    parser.add_argument("--ids", type=json.loads, default={}, help="ids of inference.yaml that are set, as JSON")
    arguments = parser.parse_args(argv)
    folders = dict(pair.partition("=")[::2] for pair in arguments.series)
    try:
        result = segment(arguments.bundle, folders, arguments.output, ids=arguments.ids)
    except (OSError, ValueError) as error:
        parser.exit(1, f"Error: {error}\n")
    print(f"From {', '.join(result.record['modalities_used'])}: {arguments.output}")


if __name__ == "__main__":
    main()
