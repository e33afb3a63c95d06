from __future__ import annotations

import json
from pathlib import Path

import pytest

from passion_monai.datasets import get_spec
from passion_monai.datasets.datalist import read_datalist
from passion_monai.datasets.myops import SPEC, discover, main


def write(folder: Path, case: str, *suffixes: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        (folder / f"{case}_{suffix}.nii.gz").touch()


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """25 cases in the layout that the challenge has: images in one folder, labels in another, test cases without."""
    root = tmp_path / "MyoPS2020"
    for number in range(101, 126):
        write(root / "train25", f"myops_training_{number}", "C0", "DE", "T2")
        write(root / "train25_myops_gd", f"myops_training_{number}", "gd")
    write(root / "test20", "myops_test_201", "C0", "DE", "T2")
    return root


class TestDiscover:
    def test_labels_in_a_folder_of_their_own(self, cohort: Path) -> None:
        cases = discover(cohort)
        assert len(cases) == 26
        assert "label" not in cases[0]
        first = cases[1]
        assert (first["case"], first["patient"]) == ("myops_training_101", "myops_training_101")
        names = {key: Path(first[key]).name for key in (*SPEC.modalities, "label")}
        stem = "myops_training_101"
        assert names == {
            "bssfp": f"{stem}_C0.nii.gz",
            "lge": f"{stem}_DE.nii.gz",
            "t2": f"{stem}_T2.nii.gz",
            "label": f"{stem}_gd.nii.gz",
        }
        assert first["label_values"] == list(SPEC.label_values)

    def test_the_other_naming_with_missing_modalities(self, tmp_path: Path) -> None:
        write(tmp_path, "Case1002", "LGE", "gd")
        write(tmp_path, "Case1001", "C0", "LGE", "T2", "gd")
        complete, incomplete = discover(tmp_path)
        assert Path(complete["lge"]).name == "Case1001_LGE.nii.gz"
        assert [key for key in incomplete if key in SPEC.modalities] == ["lge"]

    def test_images_in_two_folders_are_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "a", "Case1", "C0")
        write(tmp_path / "b", "Case1", "T2", "gd")
        with pytest.raises(ValueError, match="Case 'Case1' lies in 2 folders"):
            discover(tmp_path)

    def test_two_files_for_one_modality(self, tmp_path: Path) -> None:
        write(tmp_path, "Case1", "DE", "LGE")
        with pytest.raises(ValueError, match="Case 'Case1' has two files for lge"):
            discover(tmp_path)


def test_spec_scores_the_whole_myocardium() -> None:
    assert get_spec("myops") is SPEC
    by_value = dict(zip(SPEC.label_values, SPEC.class_names, strict=True))
    assert by_value[500].startswith("left")
    assert by_value[600].startswith("right")
    assert [SPEC.label_values[index] for index in SPEC.regions["MYO"]] == [200, 1220, 2221]


def test_the_split_is_that_of_the_paper(cohort: Path, tmp_path: Path) -> None:
    main(["--root", str(cohort), "--output", str(tmp_path / "list.json")])
    content = json.loads((tmp_path / "list.json").read_text())
    assert [len(content[section]) for section in ("training", "validation", "test", "inference")] == [20, 0, 5, 1]


def test_a_split_with_validation_cases(cohort: Path, tmp_path: Path) -> None:
    main(["--root", str(cohort), "--output", str(tmp_path / "list.json"), "--sizes", "16", "4", "5"])
    assert len(read_datalist(tmp_path / "list.json", "validation", modalities=SPEC.modalities)) == 4
