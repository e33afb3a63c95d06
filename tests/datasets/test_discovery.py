"""What the data sets' own tests do not show: formats other than NIfTI."""

from __future__ import annotations

from pathlib import Path

import pytest

from passion_monai.datasets.discovery import Naming, discover_cases

NAMING = Naming("_", {"a": "a", "b": "b", "seg": "label"}, (0, 1))


def discover(root: Path) -> list[dict[str, object]]:
    return discover_cases(root, [NAMING], title="test", modalities=("a", "b"))


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_formats_may_be_mixed_within_a_case(tmp_path: Path) -> None:
    image, label = touch(tmp_path / "x" / "x_a.nrrd"), touch(tmp_path / "x" / "x_seg.mha")
    touch(tmp_path / "x" / "x_b" / "slice1.dcm")
    touch(tmp_path / "x" / "x_b" / "slice2")
    [case] = discover(tmp_path)
    assert case["a"] == str(image)
    assert case["b"] == str(tmp_path / "x" / "x_b")
    assert case["label"] == str(label)


def test_the_raw_part_of_a_metaimage_is_no_second_file(tmp_path: Path) -> None:
    touch(tmp_path / "x_a.raw")
    header = touch(tmp_path / "x_a.mhd")
    assert discover(tmp_path)[0]["a"] == str(header)


def test_a_folder_that_holds_images_is_no_series(tmp_path: Path) -> None:
    """As in copies of BraTS in which every file lies in a folder of its name."""
    image = touch(tmp_path / "x_a" / "x_a.nii")
    assert discover(tmp_path)[0]["a"] == str(image)


def test_an_empty_folder_is_no_series(tmp_path: Path) -> None:
    touch(tmp_path / "x_a.nii")
    (tmp_path / "x_b").mkdir()
    assert "b" not in discover(tmp_path)[0]


def test_two_formats_of_one_modality_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "x_a.nii")
    touch(tmp_path / "x_a.nrrd")
    with pytest.raises(ValueError, match="Case 'x' has two files for a"):
        discover(tmp_path)
