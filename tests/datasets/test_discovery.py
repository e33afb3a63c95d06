"""What the data sets' own tests do not show: formats other than NIfTI, and images that are called otherwise."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from passion_monai.datasets.discovery import Naming, discover_cases

NAMING = Naming({"{case}_a": "a", "{case}_b": "b", "{case}_seg": "label"}, (0, 1))


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


@pytest.mark.parametrize("extension", [".NII.GZ", ".nii.GZ", ".Nii", ".NRRD", ".MHA"])
def test_an_extension_may_be_in_capitals(tmp_path: Path, extension: str) -> None:
    image = touch(tmp_path / f"x_a{extension}")
    assert discover(tmp_path)[0]["a"] == str(image)


class TestOtherNames:
    """An image that is called like no modality is never left out in silence."""

    def whole(self, root: Path) -> Path:
        for key in ("a", "b", "seg"):
            touch(root / "x" / f"x_{key}.nii.gz")
        return root / "x"

    def test_are_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = self.whole(tmp_path)
        for number in range(6):
            touch(folder / f"x_a{number}.nii")
        touch(folder / ".x_a7.nii")
        touch(folder / "x_A" / "1.dcm")
        touch(folder / "x_A" / "2.dcm")
        touch(folder / "x_b" / "1.dcm")  # lies beside the file of that name, and is an error
        with pytest.raises(ValueError, match="has two files for b"):
            discover(tmp_path)
        assert (
            "there are 7 other image(s): x/x_a0.nii, x/x_a1.nii, x/x_a2.nii, x/x_a3.nii, x/x_a4.nii, ..." in caplog.text
        )
        assert "Names are *_a (a), *_b (b), *_seg (label)" in caplog.text
        assert "--modality NAME=PATTERN" in caplog.text

    def test_nothing_is_said_where_all_are_known(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.whole(tmp_path)
        with caplog.at_level(logging.WARNING):
            discover(tmp_path)
        assert not caplog.records

    @pytest.mark.parametrize("name", ["x_B.nii.gz", "x_bw.NII", "x_B_brain.nrrd", "x_B/1.dcm"])
    def test_beside_a_modality_that_no_case_has_are_refused(self, tmp_path: Path, name: str) -> None:
        folder = self.whole(tmp_path)
        (folder / "x_b.nii.gz").unlink()
        touch(folder / name)
        with pytest.raises(ValueError, match=rf"No case .* has b, but there are 1 other image\(s\): x/{name[:3]}"):
            discover_cases(tmp_path, [NAMING], title="test", modalities=("a", "b"), keep_faulty=True)

    @pytest.mark.parametrize("name", ["x/x_brain_mask.nii.gz", "x/x_tumour-seg2.nii", "atlas/brain.nii"])
    def test_that_are_no_modality_are_said_only(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = self.whole(tmp_path)
        (folder / "x_b.nii.gz").unlink()
        touch(tmp_path / name)
        assert "b" not in discover(tmp_path)[0]
        assert f"1 other image(s): {name}" in caplog.text

    def test_a_modality_that_no_case_has_is_fine(self, tmp_path: Path) -> None:
        touch(tmp_path / "x_a.nii")
        assert discover(tmp_path)[0].keys() == {"case", "patient", "a", "label_values"}

    def test_where_there_is_no_case_are_named(self, tmp_path: Path) -> None:
        touch(tmp_path / "x_T1w.nii.gz")
        with pytest.raises(FileNotFoundError, match=r"holds no test case; .*; found 1 other image\(s\): x_T1w\.nii"):
            discover(tmp_path)
