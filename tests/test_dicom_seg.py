"""DICOM series in, DICOM SEG out: every voxel of the SEG lies where the label image has it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from highdicom.seg import segread
from monai.bundle import ConfigParser
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from passion_monai import Segmenter
from passion_monai.dicom_seg import main, make_dicom_seg, read_series, segment_series

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "brats_rfnet_passion"
APPLICATION = ROOT / "examples" / "monai_deploy" / "application.py"
IDS = {"roi_size": [32, 32, 32], "spacing": [6.0, 6.0, 6.0], "network_def::width": 4}
CLASSES = {"background": 0, "edema": 2, "enhancing tumour": 4, "resection cavity": 500}
STUDY = {
    "SOPClassUID": MRImageStorage,
    "Modality": "MR",
    "PatientID": "P1",
    "PatientName": "Doe^Jo",
    "PatientBirthDate": "19700101",
    "PatientSex": "O",
    "StudyInstanceUID": generate_uid(),
    "StudyDate": "20260102",
    "StudyTime": "101500",
    "StudyID": "7",
    "AccessionNumber": "A7",
    "FrameOfReferenceUID": generate_uid(),
    "PatientPosition": "HFS",
}
TO_NIFTI = np.diag([-1.0, -1.0, 1.0, 1.0])
# Directions of a row, of a column, and from slice to slice, in the patient's coordinates.
ORIENTATIONS = {
    "axial": np.eye(3),
    "sagittal": np.array([[0.0, 1, 0], [0, 0, -1], [1, 0, 0]]),
    "oblique": np.array([[0.8, 0.6, 0], [-0.48, 0.64, -0.6], [-0.36, 0.48, 0.8]]),
}
SPACING = (2.0, 3.0, 5.0)  # between columns, rows and slices, in mm
SHAPE = (14, 12, 9)  # columns, rows, slices


@pytest.fixture(params=ORIENTATIONS)
def directions(request: pytest.FixtureRequest) -> np.ndarray:
    return ORIENTATIONS[request.param]


def affine_of(directions: np.ndarray, spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    """From (column, row, slice) to millimetres in the patient's coordinates."""
    affine = np.eye(4)
    affine[:3, :3] = directions.T * spacing
    affine[:3, 3] = -40.0, 25.5, -70.25
    return affine


def write_series(folder: Path, voxels: np.ndarray, affine: np.ndarray, **attributes: Any) -> Path:
    """One file for each slice, in an order that is not theirs. Voxels: [columns, rows, slices]."""
    folder.mkdir(parents=True)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    series = {"SeriesInstanceUID": generate_uid(), "SeriesDescription": folder.name} | attributes
    for index in range(voxels.shape[2]):
        image = pydicom.Dataset()
        for name, value in (STUDY | series).items():
            setattr(image, name, value)
        image.SOPInstanceUID = generate_uid()
        image.InstanceNumber = index + 1
        image.ImageOrientationPatient = list((affine[:3, :2] / steps[:2]).T.ravel())
        image.ImagePositionPatient = list((affine @ [0, 0, index, 1])[:3])
        image.PixelSpacing = [steps[1], steps[0]]
        image.SliceThickness = steps[2]
        image.set_pixel_data(np.ascontiguousarray(voxels[..., index].T), "MONOCHROME2", 16)
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(folder / f"{(index * 5) % 7}_{index}.dcm", enforce_file_format=True)
    return folder


def random_label(affine: np.ndarray, shape: tuple[int, ...] = SHAPE) -> nib.Nifti1Image:
    """Classes by chance, with none in the first slices."""
    voxels = np.random.default_rng(0).choice(list(CLASSES.values()), shape).astype(np.int16)
    voxels[..., :2] = 0
    return nib.Nifti1Image(voxels, TO_NIFTI @ affine)


def two_series(folder: Path, affine: np.ndarray, shape: tuple[int, ...] = SHAPE) -> dict[str, Path]:
    """A patient with two sequences of four: a bright brain with zeros around it."""
    inside = np.zeros(shape)
    inside[2:-2, 2:-2, 2:-2] = 1
    rng = np.random.default_rng(0)
    return {
        name: write_series(folder / name, (inside * rng.integers(100, 900, shape)).astype(np.uint16), affine)
        for name in ("flair", "t1")
    }


def places(label: nib.Nifti1Image, value: int) -> np.ndarray:
    """Where a class lies: [voxels, 3], in mm in the patient's coordinates, sorted."""
    return in_order(TO_NIFTI @ label.affine, np.argwhere(np.asarray(label.dataobj) == value))


def places_in_seg(seg: Any, number: int) -> np.ndarray:
    """Where a segment lies, by what the file itself says of its frames."""
    volume = seg.get_volume(segment_numbers=[number], combine_segments=False)
    return in_order(volume.affine, np.argwhere(volume.array[..., 0]))


def in_order(affine: np.ndarray, indices: np.ndarray) -> np.ndarray:
    points = np.round((affine @ np.c_[indices, np.ones(len(indices))].T)[:3].T, 2) + 0.0
    return points[np.lexsort(points.T)]


def check_seg(path: Path, label: nib.Nifti1Image, classes: Mapping[str, int]) -> Any:
    seg = segread(path)
    assert seg.SegmentationType == "BINARY"
    names = [seg.get_segment_description(number).segment_label for number in seg.segment_numbers]
    assert names == list(classes)[1:]
    for number, value in enumerate(list(classes.values())[1:], start=1):
        np.testing.assert_allclose(places_in_seg(seg, number), places(label, value), atol=0.02)
    return seg


@pytest.mark.parametrize(
    "turn",
    [[[0, 1], [1, 1], [2, 1]], [[0, 1], [1, 1], [2, -1]], [[0, 1], [1, -1], [2, 1]], [[2, -1], [0, 1], [1, -1]]],
    ids=["as the slices", "slices the other way round", "rows the other way round", "axes in another order"],
)
def test_every_voxel_lies_where_the_label_image_has_it(tmp_path: Path, directions: np.ndarray, turn: list[list[int]]):
    affine = affine_of(directions)
    series = {name: read_series(folder) for name, folder in two_series(tmp_path, affine).items()}
    label = random_label(affine).as_reoriented(np.array(turn))
    make_dicom_seg(label, series, CLASSES, BUNDLE).save_as(tmp_path / "seg.dcm")
    check_seg(tmp_path / "seg.dcm", label, CLASSES)


def test_frames_refer_to_the_slices_that_they_lie_on(tmp_path: Path, directions: np.ndarray):
    affine = affine_of(directions)
    series = {name: read_series(folder) for name, folder in two_series(tmp_path, affine).items()}
    seg = make_dicom_seg(random_label(affine), series, CLASSES, BUNDLE)
    images = {image.SOPInstanceUID: image for slices in series.values() for image in slices}
    assert seg.NumberOfFrames == 3 * (SHAPE[2] - 2)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        sources = frame.DerivationImageSequence[0].SourceImageSequence
        slices = [images[source.ReferencedSOPInstanceUID] for source in sources]
        assert [image.SeriesDescription for image in slices] == ["flair", "t1"]
        for image in slices:
            place = frame.PlanePositionSequence[0].ImagePositionPatient
            np.testing.assert_allclose(place, image.ImagePositionPatient, atol=1e-3)
    referenced = {item.SeriesInstanceUID for item in seg.ReferencedSeriesSequence}
    assert referenced == {slices[0].SeriesInstanceUID for slices in series.values()}


def test_it_says_who_was_segmented_what_was_found_and_by_what(tmp_path: Path):
    affine = affine_of(ORIENTATIONS["oblique"])
    series = {name: read_series(folder) for name, folder in two_series(tmp_path, affine).items()}
    seg = make_dicom_seg(random_label(affine), series, CLASSES, BUNDLE)
    for name in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert seg[name].value == STUDY[name]
    assert seg.FrameOfReferenceUID == STUDY["FrameOfReferenceUID"]
    assert seg.SeriesInstanceUID not in {slices[0].SeriesInstanceUID for slices in series.values()}
    codes = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in seg.SegmentSequence]
    assert [(code.CodingSchemeDesignator, code.value) for code in codes] == [
        ("SCT", "79654002"),
        ("NCIt", "C113842"),
        ("99PASSION", "resection cavity"),
    ]
    (algorithm,) = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (BUNDLE.name, metadata["version"])
    assert algorithm.AlgorithmParameters == "sequences=flair,t1"


def test_nothing_found_and_nothing_known_of_the_patient_make_a_file_too(tmp_path: Path):
    affine = affine_of(ORIENTATIONS["axial"])
    folder = two_series(tmp_path, affine)["t1"]
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        del image.PatientBirthDate, image.AccessionNumber
        image.save_as(file)
    series = {"t1": read_series(folder)}
    label = nib.Nifti1Image(np.zeros(SHAPE, dtype=np.uint8), TO_NIFTI @ affine)
    seg = make_dicom_seg(label, series, CLASSES, BUNDLE)
    assert not seg.pixel_array.any()
    assert not seg.AccessionNumber


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a small network that was not trained."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.yaml"))
    parser.update({"bundle_root": str(BUNDLE), "device": "cpu", **IDS})
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(parser.get_parsed_content("network").state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def segmenter(weights: str) -> Segmenter:
    return Segmenter(BUNDLE, ckpt_path=weights, **IDS)


def test_the_command_writes_what_the_segmenter_predicts(
    tmp_path: Path, directions: np.ndarray, weights: str, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
):
    folders = two_series(tmp_path, affine_of(directions, (4.0, 5.0, 8.0)), (32, 28, 20))
    words = ["--bundle", str(BUNDLE), "--output", str(tmp_path / "out"), "--ckpt_path", weights]
    main([*words, "--ids", json.dumps(IDS), *[f"{name}={folder}" for name, folder in reversed(folders.items())]])
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert [path] == list((tmp_path / "out").iterdir())
    label = segmenter(folders).label
    assert len(np.unique(label.dataobj)) > 1
    seg = check_seg(path, label, segmenter.classes)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == read_series(folders["flair"])[0].SeriesInstanceUID


def test_series_on_other_grids_count_as_sources_too(tmp_path: Path, weights: str):
    folders = two_series(tmp_path / "fine", affine_of(ORIENTATIONS["oblique"], (4.0, 5.0, 8.0)), (32, 28, 20))
    folders["t1"] = two_series(tmp_path / "coarse", affine_of(ORIENTATIONS["axial"], (6.0, 6.0, 9.0)), (20, 22, 16))[
        "t1"
    ]
    segmenter = Segmenter(BUNDLE, ckpt_path=weights, on_grid_mismatch="resample", **IDS)
    path = segment_series(segmenter, folders, tmp_path / "out")
    seg = check_seg(path, segmenter(folders).label, segmenter.classes)
    uids = [read_series(folders[name])[0].SeriesInstanceUID for name in ("flair", "t1")]
    assert [series.SeriesInstanceUID for series in seg.ReferencedSeriesSequence] == uids
    with pytest.raises(ValueError, match="t1 lies on another grid than flair"):
        segment_series(Segmenter(BUNDLE, ckpt_path=weights, **IDS), folders, tmp_path / "out")


class TestErrors:
    def series(self, folder: Path, **attributes: Any) -> Path:
        voxels = np.ones(SHAPE, dtype=np.uint16)
        return write_series(folder, voxels, affine_of(ORIENTATIONS["oblique"]), **attributes)

    @pytest.mark.parametrize(
        ("shape", "shift", "words"),
        [
            ((14, 12, 8), 0.0, r"has the shape \(14, 12, 8\), but the series \(14, 12, 9\)"),
            ((12, 14, 9), 0.0, r"has the shape \(12, 14, 9\), but the series \(14, 12, 9\)"),
            (SHAPE, 0.1, "on another grid than the series, up to 0.1 mm away"),
        ],
    )
    def test_another_grid(self, tmp_path: Path, shape: tuple[int, ...], shift: float, words: str):
        affine = affine_of(ORIENTATIONS["oblique"])
        affine[1, 3] += shift
        series = {"t1": read_series(self.series(tmp_path / "t1"))}
        with pytest.raises(ValueError, match=words):
            make_dicom_seg(random_label(affine, shape), series, CLASSES, BUNDLE)

    def test_values_of_no_class(self, tmp_path: Path):
        series, label = (
            {"t1": read_series(self.series(tmp_path / "t1"))},
            random_label(affine_of(ORIENTATIONS["oblique"])),
        )
        with pytest.raises(ValueError, match=r"holds \[4\], which are not values of its classes, \[0, 2, 500\]"):
            make_dicom_seg(label, series, {"background": 0, "edema": 2, "cavity": 500}, BUNDLE)

    @pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID", "FrameOfReferenceUID"])
    def test_series_of_two_patients_or_studies(self, tmp_path: Path, segmenter: Segmenter, keyword: str):
        folders = {"flair": self.series(tmp_path / "flair"), "t1": self.series(tmp_path / "t1", **{keyword: "1.2.3"})}
        words = f"flair .* and t1 .* differ in {keyword}, .* against 1.2.3; give series of one patient, study and frame"
        with pytest.raises(ValueError, match=words):
            segment_series(segmenter, folders, tmp_path / "out")

    def test_two_series_in_a_folder(self, tmp_path: Path):
        other = self.series(tmp_path / "t1")
        for index, file in enumerate(self.series(tmp_path / "flair").iterdir()):
            file.rename(other / f"flair{index}.dcm")
        with pytest.raises(ValueError, match=r"differ in SeriesInstanceUID, .*; give files of one series"):
            read_series(other)

    def test_slices_that_lie_nowhere(self, tmp_path: Path):
        folder = self.series(tmp_path / "t1")
        file = min(folder.iterdir())
        image = pydicom.dcmread(file)
        del image.ImagePositionPatient
        image.save_as(file)
        with pytest.raises(ValueError, match=r"has no \['ImagePositionPatient'\]"):
            read_series(folder)

    def test_a_folder_without_dicom(self, tmp_path: Path):
        (tmp_path / "notes.txt").write_text("nothing")
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ValueError, match="holds no DICOM image; give the folder of a series"):
                read_series(folder)

    @pytest.mark.parametrize(
        ("series", "words"),
        [
            (["pet=x"], r"The bundle has no sequence ['pet']; it has ['flair', 't1ce', 't1', 't2']."),
            (["t1=x"], "x holds no DICOM image"),
            (["t1"], "expected NAME=FOLDER, got 't1'"),
            (["t1=x", "t1=y"], "give each sequence once"),
        ],
    )
    def test_the_command_ends_in_words(
        self, tmp_path: Path, series: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ):
        with pytest.raises(SystemExit):
            main(["--bundle", str(BUNDLE), "--output", str(tmp_path / "out"), *series])
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_without_highdicom(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.setitem(sys.modules, "highdicom", None)
        with pytest.raises(SystemExit):
            main(["--bundle", str(BUNDLE), "--output", str(tmp_path), f"t1={self.series(tmp_path / 't1')}"])
        assert 'DICOM SEG needs highdicom: pip install "passion-monai[dicom]"' in capsys.readouterr().err


class TestMonaiDeploy:
    """examples/monai_deploy/, within the SDK where it is installed, and with a stand-in for its names elsewhere."""

    @pytest.fixture
    def application(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        class Operator:
            def __init__(self, fragment: Any, *args: Any, **kwargs: Any) -> None:
                pass

        names = ("CountCondition", "Application", "Fragment", "OperatorSpec")
        names += ("DICOMDataLoaderOperator", "DICOMSeriesSelectorOperator")
        sdk = SimpleNamespace(Operator=Operator, **dict.fromkeys(names, object))
        for module in ("conditions", "core", "operators.dicom_data_loader_operator"):
            monkeypatch.setitem(sys.modules, f"monai.deploy.{module}", sdk)
        monkeypatch.setitem(sys.modules, "monai.deploy.operators.dicom_series_selector_operator", sdk)
        spec = importlib.util.spec_from_file_location("application", APPLICATION)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def selected(self, folder: Path) -> SimpleNamespace:
        """A series as the SDK holds it in memory."""
        images = [pydicom.dcmread(file) for file in folder.iterdir()]
        instances = [SimpleNamespace(get_native_sop_instance=lambda image=image: image) for image in images]
        uid = images[0].SeriesInstanceUID
        return SimpleNamespace(series=SimpleNamespace(SeriesInstanceUID=uid, get_sop_instances=lambda: instances))

    def compute(self, application: ModuleType, segmenter: Any, output: Path, *selections: dict[str, Any]) -> None:
        operator = application.PassionOperator(None, segmenter=segmenter, output=output)
        studies = [SimpleNamespace(series_by_selection_name=selection) for selection in selections]
        operator.compute(SimpleNamespace(receive=lambda name: studies), None, None)

    def test_the_operator_writes_a_seg_for_each_study(
        self, tmp_path: Path, application: ModuleType, segmenter: Segmenter
    ):
        folders = two_series(tmp_path / "in", affine_of(ORIENTATIONS["oblique"], (4.0, 5.0, 8.0)), (32, 28, 20))
        selection = {name: [self.selected(folder)] for name, folder in folders.items()}
        self.compute(application, segmenter, tmp_path / "out", selection, {"t1": selection["t1"]})
        files = {
            segread(file).ReferencedSeriesSequence[0].SeriesInstanceUID: file for file in (tmp_path / "out").iterdir()
        }
        for given in (folders, {"t1": folders["t1"]}):
            first = read_series(next(iter(given.values())))[0].SeriesInstanceUID
            check_seg(files.pop(first), segmenter(given).label, segmenter.classes)
        assert not files

    def test_what_the_rules_select_must_be_clear(self, tmp_path: Path, application: ModuleType):
        folders = two_series(tmp_path / "in", affine_of(ORIENTATIONS["axial"]))
        flair, t1 = map(self.selected, folders.values())
        with pytest.raises(ValueError, match="No series fits any of the rules"):
            self.compute(application, None, tmp_path / "out")
        for selection in ({"flair": [flair, t1]}, {"flair": [flair], "t2": [flair], "t1": [t1]}):
            with pytest.raises(ValueError, match="The rules must select one series for each sequence"):
                self.compute(application, None, tmp_path / "out", selection)

    @pytest.mark.parametrize(
        ("description", "sequence"),
        [
            ("AX T2 FLAIR", "flair"),
            ("t1_mprage_space_sag", "t1"),
            ("T1 MPRAGE post Gd", "t1ce"),
            ("t1ce", "t1ce"),
            ("t1_ce_tra", "t1ce"),
            *[(f"T1{name}", "t1ce") for name in ("C", " +C", " C+", "+ C", " GAD", " KM", "_post_contrast", "C_tra")],
            *[(f"T1{name}", "t1") for name in ("", " cor", "_cerebrum", " SE tra", " nativ")],
            ("t2_tse_tra", "t2"),
        ],
    )
    def test_a_description_fits_one_rule(self, description: str, sequence: str):
        rules = json.loads((APPLICATION.parent / "rules.json").read_text())["selections"]
        fits = [rule["name"] for rule in rules if re.search(rule["conditions"]["SeriesDescription"], description, re.I)]
        assert fits == [sequence]

    @pytest.mark.skipif(importlib.util.find_spec("holoscan") is None, reason="needs monai-deploy-app-sdk")
    def test_the_application_runs_in_the_sdk(self, tmp_path: Path, weights: str, segmenter: Segmenter):
        bundle = shutil.copytree(BUNDLE, tmp_path / BUNDLE.name)
        config = bundle / "configs" / "inference.yaml"
        small = config.read_text().replace("80, 80, 80", "32, 32, 32").replace("1.0, 1.0, 1.0", "6.0, 6.0, 6.0")
        config.write_text(small.replace("width: 8", "width: 4"))
        (bundle / "models").mkdir(exist_ok=True)
        shutil.copy(weights, bundle / "models" / "model.pt")
        folders = two_series(tmp_path / "in", affine_of(ORIENTATIONS["oblique"], (4.0, 5.0, 8.0)), (32, 28, 20))
        (tmp_path / "out").mkdir()
        words = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(bundle)]
        subprocess.run([sys.executable, str(APPLICATION), *words], check=True)
        (file,) = (tmp_path / "out").iterdir()
        check_seg(file, segmenter(folders).label, segmenter.classes)
