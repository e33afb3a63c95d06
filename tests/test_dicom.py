"""DICOM series in, DICOM segmentation out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from passion_monai import Segmenter
from passion_monai.datasets import get_spec
from passion_monai.dicom import _segments, dicom_segmentation, main, read_series
from passion_monai.networks import RFNet

BUNDLE = Path(__file__).parents[1] / "bundles" / "brats_rfnet_passion"
APPLICATION = BUNDLE.parents[1] / "examples" / "monai_deploy"
SMALL = {"roi_size": [32, 32, 32], "spacing": [4.0, 4.0, 4.0], "network_def::width": 4}
ROWS, COLUMNS, SLICES = 30, 34, 12
# Of a slab that is tilted about two axes: directions of a row and a column, in DICOM's coordinates.
OBLIQUE = [0.9848, 0.0, -0.1736, 0.0302, 0.9848, 0.1710]
AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def a_study(**changes: Any) -> pydicom.Dataset:
    """What the slices of all its series have in common."""
    slice_ = pydicom.Dataset()
    slice_.file_meta = pydicom.dataset.FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID = MRImageStorage
    slice_.PatientID, slice_.PatientName, slice_.Modality, slice_.SeriesNumber = "1", "Phantom^Jo", "MR", 3
    slice_.PatientBirthDate, slice_.PatientSex, slice_.AccessionNumber, slice_.StudyID = "", "", "", "1"
    slice_.StudyInstanceUID, slice_.FrameOfReferenceUID = generate_uid(), generate_uid()
    slice_.StudyDate, slice_.StudyTime, slice_.PositionReferenceIndicator = "20240101", "120000", ""
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
    slice_.update(changes)
    return slice_


def write_series(
    folder: Path, study: pydicom.Dataset, seed: int, orientation: list[float], description: str = ""
) -> Path:
    """A made-up head: noise in an ellipsoid, 0 around it, in anisotropic voxels."""
    folder.mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in (SLICES, ROWS, COLUMNS)], indexing="ij"))
    head = (grid**2).sum(axis=0) < 0.8
    voxels = np.random.default_rng(seed).integers(200, 1000, head.shape).astype(np.uint16) * head
    normal = np.cross(orientation[:3], orientation[3:])
    series = generate_uid()
    for index in range(SLICES):
        slice_ = copy.deepcopy(study)
        slice_.SeriesInstanceUID, slice_.SOPInstanceUID, slice_.InstanceNumber = series, generate_uid(), index + 1
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.SeriesDescription = description
        slice_.PixelSpacing, slice_.SliceThickness, slice_.ImageOrientationPatient = [4.0, 3.5], 9.0, orientation
        slice_.ImagePositionPatient = [
            round(float(x), 3) for x in np.array([-60.0, -55.0, 10.0]) + 9.0 * index * normal
        ]
        slice_.Rows, slice_.Columns, slice_.PixelData = ROWS, COLUMNS, voxels[index].tobytes()
        slice_.save_as(folder / f"{SLICES - index:02}.dcm", enforce_file_format=True)  # names in the other direction
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network that was not trained: it labels something, which is all that is asked of it here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    network = RFNet(3, num_modalities=4, num_classes=4, img_size=SMALL["roi_size"], width=SMALL["network_def::width"])
    torch.save(network.state_dict(), path)
    return SMALL | {"ckpt_path": str(path)}


def voxels_by_place(segmentation: Path, number: int) -> set[tuple[float, ...]]:
    """Where a segment's voxels lie in the patient, in DICOM's coordinates."""
    volume = highdicom.seg.segread(segmentation).get_volume(segment_numbers=[number], combine_segments=True)
    return {tuple(np.round(place, 1)) for place in volume.map_indices_to_reference(np.argwhere(volume.array))}


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE], ids=["axial", "oblique"])
def test_segments_lie_where_the_label_image_has_them(ids: dict[str, Any], tmp_path: Path, orientation: list[float]):
    study = a_study()
    series = {
        name: write_series(tmp_path / name, study, seed, orientation) for seed, name in enumerate(("t1", "flair"))
    }
    path = tmp_path / "seg.dcm"
    arguments = [f"{name}={folder}" for name, folder in series.items()]
    main([*arguments, "--bundle", str(BUNDLE), "--output", str(path), "--ids", json.dumps(ids)])
    written = highdicom.seg.segread(path)
    assert (written.PatientID, written.StudyInstanceUID) == (study.PatientID, study.StudyInstanceUID)
    label = Segmenter(BUNDLE, **ids)({name: str(folder) for name, folder in series.items()}).label
    assert written.number_of_segments == 3
    assert np.asarray(label.dataobj).any()
    for number, value in enumerate((1, 2, 4), start=1):
        indices = np.argwhere(np.asarray(label.dataobj) == value)
        places = nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ label.affine, indices)
        assert voxels_by_place(path, number) == {tuple(np.round(place, 1)) for place in places}


def test_a_viewer_is_told_what_the_segments_are_and_which_slices_they_are_on(ids: dict[str, Any], tmp_path: Path):
    study = a_study()
    folders = {name: write_series(tmp_path / name, study, 0, AXIAL) for name in ("t1", "flair")}
    result = Segmenter(BUNDLE, **ids)({name: str(folder) for name, folder in folders.items()})
    series = {name: read_series(folder) for name, folder in folders.items()}
    dataset = dicom_segmentation(result, series, algorithm="brats_rfnet_passion", version="0.1.0")
    segments = [dataset.get_segment_description(number) for number in (1, 2, 3)]
    assert [segment.segment_label for segment in segments] == list(result.record["labels"])[1:]
    assert [segment.segmented_property_type.value for segment in segments] == ["6574001", "79654002", "C113842"]
    assert segments[0].algorithm_identification.name == "brats_rfnet_passion"
    referenced = {
        str(reference.SeriesInstanceUID): len(reference.ReferencedInstanceSequence)
        for reference in dataset.ReferencedSeriesSequence
    }
    assert referenced == {str(slices[0].SeriesInstanceUID): SLICES for slices in series.values()}


def test_codes_are_those_of_dicoms_context_group():
    known = {tuple(getattr(codes.cid7168, name))[:3] for name in codes.cid7168.dir()}
    assert set(get_spec("brats").dicom_codes.values()) <= known
    assert set(get_spec("brats").dicom_codes) <= set(get_spec("brats").class_names)


def test_classes_without_a_code_of_dicom_get_one_of_ours():
    scar = _segments({"background": 0, "left ventricular blood pool": 500}, "bundle", "1")[0]
    assert scar.segmented_property_type.scheme_designator == "99PASSION"
    assert scar.segmented_property_type.meaning == "left ventricular blood pool"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PatientID": "2"}, "different values of PatientID"),
        ({"StudyInstanceUID": "1.2.3"}, "different values of StudyInstanceUID"),
        ({"FrameOfReferenceUID": "1.2.3"}, "different values of FrameOfReferenceUID"),
    ],
)
def test_series_that_do_not_belong_together_are_refused(
    changes: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study = a_study()
    write_series(tmp_path / "t1", study, 0, AXIAL)
    other = copy.deepcopy(study)
    for name, value in changes.items():
        setattr(other, name, value)
    write_series(tmp_path / "t2", other, 0, AXIAL)
    with pytest.raises(SystemExit):
        main([f"t1={tmp_path / 't1'}", f"t2={tmp_path / 't2'}", "--bundle", str(BUNDLE), "--output", "x.dcm"])
    assert said in capsys.readouterr().err


def test_a_folder_holds_one_series(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="empty holds 0 series of slices"):
        read_series(tmp_path / "empty")
    write_series(tmp_path / "a", a_study(), 0, AXIAL)
    for path in write_series(tmp_path / "b", a_study(), 0, AXIAL).iterdir():
        path.rename(tmp_path / "a" / f"b{path.name}")
    with pytest.raises(ValueError, match="a holds 2 series of slices"):
        read_series(tmp_path / "a")


def test_a_label_that_is_not_on_the_slices_is_refused(ids: dict[str, Any], tmp_path: Path):
    study = a_study()
    result = Segmenter(BUNDLE, **ids)({"t1": str(write_series(tmp_path / "t1", study, 0, AXIAL))})
    tilted = read_series(write_series(tmp_path / "tilted", study, 0, OBLIQUE))
    with pytest.raises(ValueError, match="does not lie on the slices"):
        dicom_segmentation(result, {"t1": tilted}, algorithm="x", version="1")
    fewer = sorted(read_series(tmp_path / "t1"), key=lambda slice_: slice_.InstanceNumber)[:-1]
    with pytest.raises(ValueError, match=f"the series .* on {SLICES - 1} slices"):
        dicom_segmentation(result, {"t1": fewer}, algorithm="x", version="1")
    with pytest.raises(ValueError, match="no stack of evenly spaced slices"):
        dicom_segmentation(result, {"t1": [fewer[0], fewer[1], fewer[5]]}, algorithm="x", version="1")


@pytest.mark.slow
def test_the_application_for_monai_deploy(ids: dict[str, Any], tmp_path: Path):
    pytest.importorskip("monai.deploy", reason="MONAI Deploy's SDK is not installed")
    study = a_study()
    for name in ("t1", "flair"):
        write_series(tmp_path / "input" / name, study, 0, AXIAL, description=f"ax {name.upper()} 3 mm")
    (tmp_path / "output").mkdir()
    code = "import json, sys, app; app.PassionApp(ids=json.loads(sys.argv.pop())).run()"
    command = [sys.executable, "-c", code, "-i", str(tmp_path / "input"), "-o", str(tmp_path / "output")]
    command += ["-m", str(BUNDLE), json.dumps(ids)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(APPLICATION), *sys.path])})
    (written,) = (tmp_path / "output").iterdir()
    assert highdicom.seg.segread(written).ContentDescription == "From flair, t1"
