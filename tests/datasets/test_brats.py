"""BraTS: finding cases of all years, in all layouts, with anything missing; the command line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose

from passion_monai.datasets import brats, check_classes, get_spec
from passion_monai.datasets import discover as discover_by_name
from passion_monai.datasets.brats import SPEC, discover, main
from passion_monai.datasets.datalist import modality_counts, read_datalist
from passion_monai.presence import read_presence
from passion_monai.transforms import (
    AlignModalitiesd,
    LabelsToClassesd,
    LoadCased,
    SaveSegmentationd,
    StackModalitiesd,
)

OLD = ("_flair", "_t1ce", "_t1", "_t2", "_seg")
NEW = ("-t2f", "-t1c", "-t1n", "-t2w", "-seg")
KEYS = ("flair", "t1ce", "t1", "t2", "label")


def write_case(folder: Path, case: str, suffixes: tuple[str, ...] = OLD, extension: str = ".nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        (folder / f"{case}{suffix}{extension}").touch()
    return folder


def write_images(folder: Path, case: str, label: np.ndarray) -> Path:
    """A case with images of noise; the path of its label."""
    folder.mkdir()
    noise = np.random.default_rng(0).random(label.shape, dtype=np.float32)
    for suffix in NEW[:-1]:
        nib.save(nib.Nifti1Image(noise, np.eye(4)), folder / f"{case}{suffix}.nii.gz")
    nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{case}-seg.nii.gz")
    return folder / f"{case}-seg.nii.gz"


class TestDiscover:
    @pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("parent", [".", "HGG", "MICCAI_BraTS_2019_Data_Training/LGG"])
    @pytest.mark.parametrize(
        "case", ["Brats18_CBICA_AAB_1", "BraTS19_2013_10_1", "BraTS20_Training_001", "BraTS2021_00000"]
    )
    def test_before_2023(self, tmp_path: Path, case: str, parent: str, extension: str) -> None:
        folder = write_case(tmp_path / parent / case, case, extension=extension)
        files = {key: str(folder / f"{case}{suffix}{extension}") for key, suffix in zip(KEYS, OLD, strict=True)}
        assert discover(tmp_path) == [{"case": case, "patient": case, **files, "label_values": [0, 1, 2, 4]}]

    @pytest.mark.parametrize(
        ("case", "patient"),
        [
            ("BraTS-GLI-00001-000", "BraTS-GLI-00001"),
            ("BraTS-GLI-00001-101", "BraTS-GLI-00001"),
            ("BraTS-GLI-00005-100", "BraTS-GLI-00005"),
            ("BraTS-SSA-00002-000", "BraTS-SSA-00002"),
            ("BraTS-PED-00001-000", "BraTS-PED-00001"),
            ("BraTS-MEN-00004-000", "BraTS-MEN-00004"),
            ("BraTS-MET-00002-000", "BraTS-MET-00002"),
            ("BraTS-GLI-00001", "BraTS-GLI-00001"),
        ],
    )
    def test_since_2023(self, tmp_path: Path, case: str, patient: str) -> None:
        folder = write_case(tmp_path / case, case, NEW)
        files = {key: str(folder / f"{case}{suffix}.nii.gz") for key, suffix in zip(KEYS, NEW, strict=True)}
        assert discover(tmp_path) == [{"case": case, "patient": patient, **files, "label_values": [0, 1, 2, 3]}]

    @pytest.mark.parametrize("case", ["BraTS-GLI-00005-100", "BraTS-MET-00002-000"])
    def test_a_fifth_class_is_declared_by_its_value(self, tmp_path: Path, case: str) -> None:
        """From the label of a post-treatment case to classes, and from these to a segmentation with its regions."""
        values, names = [0, 1, 2, 3, 4], [*SPEC.class_names, "resection cavity"]
        regions = {**SPEC.regions, "RC": (4,)}
        check_classes(values, names, regions)
        label = np.zeros((8, 8, 8), dtype=np.uint8)
        label[2:6, 2:6, 2:6] = np.arange(64).reshape(4, 4, 4) % 5
        folder = write_images(tmp_path / case, case, label)
        keys = list(SPEC.modalities)
        load = Compose([LoadCased(keys), AlignModalitiesd(keys, label_key="label")])
        data = load(discover(tmp_path)[0])
        with pytest.raises(ValueError, match=r"holds the values \[4.0\], known are \[0, 1, 2, 3\], .* --label_values"):
            LabelsToClassesd("label", values=SPEC.label_values)(data)
        data = StackModalitiesd(keys)(LabelsToClassesd("label", values=values)(data))
        assert np.array_equal(data["label"][0], label)
        save = SaveSegmentationd(
            output_dir=tmp_path, modalities=keys, values=values, class_names=names, regions=regions
        )
        save(data | {"pred": data["label"]})
        assert np.array_equal(nib.load(tmp_path / f"{case}_seg.nii.gz").dataobj, nib.load(folder).dataobj)
        record = json.loads((tmp_path / f"{case}_seg.json").read_text())
        assert record["labels"]["resection cavity"] == 4
        assert record["region_volumes_ml"]["RC"] == pytest.approx((label == 4).sum() / 1000, abs=1e-3)
        assert record["region_volumes_ml"]["WT"] == pytest.approx(((label > 0) & (label < 4)).sum() / 1000, abs=1e-3)

    def test_order_is_that_of_the_ids(self, tmp_path: Path) -> None:
        for parent, case in (("a", "BraTS20_Training_010"), ("z", "BraTS20_Training_002"), ("b", "BraTS-GLI-1-0")):
            write_case(tmp_path / parent / case, case, NEW if "-" in case else OLD)
        assert [case["case"] for case in discover(tmp_path)] == [
            "BraTS-GLI-1-0",
            "BraTS20_Training_002",
            "BraTS20_Training_010",
        ]

    def test_the_file_names_count_not_the_folder(self, tmp_path: Path) -> None:
        write_case(tmp_path / "renamed", "BraTS20_Training_001")
        assert discover(tmp_path)[0]["case"] == "BraTS20_Training_001"

    def test_root_is_a_case_folder(self, tmp_path: Path) -> None:
        write_case(tmp_path, "BraTS20_Training_001")
        assert [case["case"] for case in discover(tmp_path)] == ["BraTS20_Training_001"]

    def test_all_cases_in_one_folder(self, tmp_path: Path) -> None:
        for number in range(3):
            write_case(tmp_path, f"BraTS2021_{number:05d}")
        assert len(discover(tmp_path)) == 3

    def test_missing_modalities(self, tmp_path: Path) -> None:
        write_case(tmp_path / "x", "x", ("_flair", "_seg"))
        write_case(tmp_path / "y", "y", ("_t1", "_flair", "_t2", "_seg"))
        x, y = discover(tmp_path)
        assert list(x) == ["case", "patient", "flair", "label", "label_values"]
        assert list(y) == ["case", "patient", "flair", "t1", "t2", "label", "label_values"]
        assert modality_counts([x, y], SPEC.modalities) == {"flair": 2, "t1ce": 0, "t1": 1, "t2": 1}

    def test_no_labels(self, tmp_path: Path) -> None:
        write_case(tmp_path / "x", "x", OLD[:-1])
        [case] = discover(tmp_path)
        assert "label" not in case
        assert case["label_values"] == [0, 1, 2, 4]

    @pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
    def test_misnamed_label_of_kaggle(self, tmp_path: Path, extension: str) -> None:
        folder = write_case(tmp_path / "BraTS20_Training_355", "BraTS20_Training_355", OLD[:-1], extension)
        (folder / f"W39_1998.09.19_Segm{extension}").touch()
        [case] = discover(tmp_path)
        assert case["case"] == "BraTS20_Training_355"
        assert case["label"] == str(folder / f"W39_1998.09.19_Segm{extension}")

    @pytest.mark.parametrize(
        "name",
        [
            "._x_t1.nii.gz",
            ".hidden/y_t1.nii.gz",
            "x_t1.nii.gz.part",
            "x_t1.json",
            "x_brain.nii.gz",
            "x_t1n.nii.gz",
            "x-flair.nii.gz",
            "_t1.nii.gz",
            "name_mapping.csv",
        ],
    )
    def test_other_files_are_left_out(self, tmp_path: Path, name: str) -> None:
        write_case(tmp_path / "x", "x")
        expected = discover(tmp_path)
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).touch()
        assert discover(tmp_path) == expected

    def test_link_loops_are_not_followed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = write_case(tmp_path / "x", "x")
        (folder / "loop").symlink_to(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert [case["case"] for case in discover(tmp_path)] == ["x"]
        assert "loop is a link, links to folders are not followed" in caplog.text

    def test_linked_root_and_files(self, tmp_path: Path) -> None:
        store = write_case(tmp_path / "store", "blob")
        folder = tmp_path / "data" / "x"
        folder.mkdir(parents=True)
        for suffix in OLD:
            (folder / f"x{suffix}.nii.gz").symlink_to(store / f"blob{suffix}.nii.gz")
        (tmp_path / "link").symlink_to(tmp_path / "data")
        [case] = discover(tmp_path / "link")
        assert case["t1"] == str(tmp_path / "link" / "x" / "x_t1.nii.gz")

    def test_relative_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_case(tmp_path / "data" / "x", "x")
        monkeypatch.chdir(tmp_path)
        assert Path(discover("data")[0]["t1"]) == tmp_path / "data" / "x" / "x_t1.nii.gz"

    def test_by_name(self, tmp_path: Path) -> None:
        write_case(tmp_path / "x", "x")
        assert discover_by_name("brats", tmp_path) == discover(tmp_path)


class TestDiscoverErrors:
    def test_two_files_for_one_modality(self, tmp_path: Path) -> None:
        write_case(tmp_path / "x", "x")
        (tmp_path / "x" / "x_t1ce.nii").touch()
        with pytest.raises(ValueError, match=r"Case 'x' has two files for t1ce, .*x_t1ce\.nii and .*x_t1ce\.nii\.gz"):
            discover(tmp_path)

    def test_two_labels_of_case_355(self, tmp_path: Path) -> None:
        write_case(tmp_path, "BraTS20_Training_355", extension=".nii")
        (tmp_path / "W39_1998.09.19_Segm.nii").touch()
        with pytest.raises(ValueError, match=r"'BraTS20_Training_355' has two files for label"):
            discover(tmp_path)

    def test_two_folders(self, tmp_path: Path) -> None:
        write_case(tmp_path / "data" / "x", "x", OLD[:-1])
        write_case(tmp_path / "predictions", "x", ("_seg",))
        with pytest.raises(ValueError, match=r"Case 'x' lies in 2 folders, .*/data/x, .*/predictions; keep one"):
            discover(tmp_path)

    def test_two_namings(self, tmp_path: Path) -> None:
        write_case(tmp_path, "x", (*OLD[:2], "-t1n"))
        with pytest.raises(ValueError, match=r"Case 'x' mixes the namings .*x-t1n.nii.gz, x_flair.nii.gz"):
            discover(tmp_path)

    def test_label_only(self, tmp_path: Path) -> None:
        write_case(tmp_path, "x", ("_seg",))
        with pytest.raises(ValueError, match=r"Case 'x' has a label but no image, only .*x_seg.nii.gz"):
            discover(tmp_path)

    def test_broken_link(self, tmp_path: Path) -> None:
        write_case(tmp_path, "x", OLD[1:])
        (tmp_path / "x_flair.nii.gz").symlink_to(tmp_path / "gone")
        with pytest.raises(ValueError, match=r"Case 'x': .*x_flair.nii.gz is a broken link"):
            discover(tmp_path)

    def test_nothing_found(self, tmp_path: Path) -> None:
        (tmp_path / "scan.nii.gz").touch()
        with pytest.raises(FileNotFoundError, match=r"holds no BraTS case; looked for .*\*_t1ce\.nii.*\*-t2w\.nii"):
            discover(tmp_path)

    @pytest.mark.parametrize("name", ["nowhere", "file"])
    def test_root_is_no_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match=f"root .*{name} is not a folder"):
            discover(tmp_path / name)


def test_spec() -> None:
    assert get_spec("brats") is SPEC
    assert SPEC.modalities == ("flair", "t1ce", "t1", "t2")
    assert SPEC.reference_split == (219, 50, 100)
    enhancing = SPEC.class_names.index("enhancing tumour")
    assert SPEC.label_values[enhancing] == 4
    assert SPEC.regions == {"WT": (1, 2, enhancing), "TC": (1, enhancing), "ET": (enhancing,)}


def test_split_file_of_the_authors(tmp_path: Path) -> None:
    """The ids of a split file, without the grade before them, are those of the cases."""
    (tmp_path / "split.csv").write_text(
        "data_name,mask_id,mask,pos_mask_ids\n"
        'HG_BraTS20_Training_010,9,"[True, True, False, False]","[1, 3, 9]"\n'
        'LG_BraTS20_Training_267,2,"[False, False, True, False]",[2]\n'
        'Brats18_2013_10_1,0,"[False, False, False, True]",[0]\n'
    )
    presence = read_presence(
        tmp_path / "split.csv",
        ("t1", "t1ce", "flair", "t2"),
        csv_modalities=SPEC.csv_modalities,
        csv_prefixes=SPEC.csv_prefixes,
    )
    assert {case: row.astype(int).tolist() for case, row in presence.items()} == {
        "BraTS20_Training_010": [0, 1, 1, 0],
        "BraTS20_Training_267": [1, 0, 0, 0],
        "Brats18_2013_10_1": [0, 0, 0, 1],
    }


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Six patients of 2023, the last one seen twice; the first has no T2, case 6 is one without a label."""
    root = tmp_path / "cohort"
    for number in range(6):
        case = f"BraTS-GLI-0000{number}-000"
        write_case(root / case, case, tuple(suffix for suffix in NEW if number or suffix != "-t2w"))
    write_case(root / "second", "BraTS-GLI-00005-001", NEW)
    write_case(root / "new", "BraTS-GLI-00006-000", NEW[:-1])
    return root


class TestCommand:
    def test_drawn_split(self, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "out" / "datalist.json"
        main(["--root", str(cohort), "--output", str(path), "--sizes", "3", "2", "1", "--seed", "1"])
        printed = capsys.readouterr().out
        assert "Found 8 cases of 7 patients" in printed
        assert "with flair: 8\n  with t1ce: 8\n  with t1: 8\n  with t2: 7\n  with label: 7\n" in printed
        assert str(path) in printed
        sections = {
            section: read_datalist(path, section, modalities=SPEC.modalities)
            for section in ("training", "validation", "test", "inference")
        }
        patients = {section: {case["patient"] for case in cases} for section, cases in sections.items()}
        assert [len(members) for members in patients.values()] == [3, 2, 1, 1]
        assert len(set.union(*patients.values())) == 7
        counts = ", ".join(f"{section} {len(cases)}" for section, cases in sections.items())
        assert f"Split into {counts}\n" in printed

    @pytest.mark.parametrize("complete", [True, False])
    def test_says_how_to_train(
        self, cohort: Path, tmp_path: Path, complete: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Sequences are hidden of complete cases only."""
        if complete:
            (cohort / "BraTS-GLI-00000-000" / "BraTS-GLI-00000-000-t2w.nii.gz").touch()
        main(["--root", str(cohort), "--output", str(tmp_path / "list.json"), "--sizes", "1", "0", "0"])
        said = capsys.readouterr().out
        assert "run training --config_file bundles/brats_mmformer_passion/configs/train.yaml" in said
        assert said.endswith(f"{'' if complete else ' --simulate_missing False'}\n")
        assert "--modalities" not in said

    def test_same_arguments_same_file(self, cohort: Path, tmp_path: Path) -> None:
        texts = []
        for seed in ("0", "0", "1"):
            main(["--root", str(cohort), "--output", str(tmp_path / "list.json"), "--seed", seed])
            texts.append((tmp_path / "list.json").read_text())
        assert texts[0] == texts[1] != texts[2]

    def test_listed_split(self, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "train.txt").write_text("BraTS-GLI-00003-000\r\n\r\n  BraTS-GLI-00001-000\n")
        (tmp_path / "test.txt").write_text("BraTS-GLI-00000-000")
        path = tmp_path / "datalist.json"
        lists = ["--training-ids", str(tmp_path / "train.txt"), "--test-ids", str(tmp_path / "test.txt")]
        main(["--root", str(cohort), "--output", str(path), *lists])
        content = json.loads(path.read_text())
        assert [case["case"] for case in content["training"]] == ["BraTS-GLI-00001-000", "BraTS-GLI-00003-000"]
        assert [case["case"] for case in content["test"]] == ["BraTS-GLI-00000-000"]
        assert content["validation"] == []
        assert "Split into training 2, validation 0, test 1, inference 1, unused 4" in capsys.readouterr().out

    def test_no_labels_at_all(self, tmp_path: Path) -> None:
        write_case(tmp_path / "data", "x", OLD[:-1])
        main(["--root", str(tmp_path / "data"), "--output", str(tmp_path / "list.json")])
        [case] = read_datalist(tmp_path / "list.json", "inference", modalities=SPEC.modalities)
        assert case["case"] == "x"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--root", "nowhere"], "nowhere is not a folder"),
            (["--training-ids", "nowhere.txt"], "nowhere.txt"),
            (["--training-ids", "empty.txt"], "empty.txt holds no case id"),
            (["--training-ids", "wrong.txt"], "names 1 of 1 cases that were not found"),
            (["--sizes", "0", "0", "0"], "sizes must be three numbers"),
        ],
    )
    def test_errors(
        self,
        cohort: Path,
        tmp_path: Path,
        arguments: list[str],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "wrong.txt").write_text("BraTS20_Training_001\n")
        with pytest.raises(SystemExit) as error:
            main(["--root", str(cohort), "--output", "list.json", *arguments])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "list.json").exists()

    def test_run_as_a_module(self) -> None:
        """Also shows that the package does not import the module first, of which Python would warn."""
        command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "passion_monai.datasets.brats", "--help"]
        project = Path(brats.__file__).parents[2]
        result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        for word in ("--training-ids", "examples:", "inference", "<case>-t2f.nii.gz", "219"):
            assert word in result.stdout
