from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("nilearn")

from passion_monai.datasets import DATASETS, discover, get_spec, phantom
from passion_monai.datasets.phantom import main, write_phantom

SMALL: Mapping[str, Any] = {"shape": (40, 40, 40), "spacing": (5, 5, 5)}
NAMES = ("flair", "t1ce", "t1", "t2", "seg")


def volumes(folder: Path) -> dict[str, NDArray]:
    return {name: np.asarray(nib.load(folder / f"{folder.name}_{name}.nii.gz").dataobj) for name in NAMES}


def equal(first: Mapping[str, NDArray], second: Mapping[str, NDArray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_a_phantom_that_is_discovered(dataset: str, tmp_path: Path) -> None:
    folders = write_phantom(dataset, tmp_path, num_cases=2, shape=(40, 40, 8), spacing=(5, 5, 10))
    cases, spec = discover(dataset, tmp_path), get_spec(dataset)
    assert [case["case"] for case in cases] == [folder.name for folder in folders]
    for case in cases:
        assert {*spec.modalities, "label"} <= case.keys()
        assert set(np.unique(nib.load(case["label"]).dataobj)) <= set(spec.label_values)
        assert len({nib.load(case[key]).shape for key in (*spec.modalities, "label")}) == 1


def test_other_data_sets_have_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no phantom of 'lungs', only of \['brats', 'myops'\]"):
        write_phantom("lungs", tmp_path, num_cases=1)


def test_hearts_are_kept_and_hearts_of_another_seed_are_not_overwritten(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"num_cases": 3, "shape": (40, 40, 6), "spacing": (5, 5, 10)}
    folders = write_phantom("myops", tmp_path, **grid)
    times = [folder.stat().st_mtime_ns for folder in folders]
    assert [folder.stat().st_mtime_ns for folder in write_phantom("myops", tmp_path, **grid)] == times
    with pytest.raises(ValueError, match=r"myops_training_101.*Choose another output_dir"):
        write_phantom("myops", tmp_path, **grid, seed=1)


def test_left_and_posterior_are_where_the_affine_says(tmp_path: Path) -> None:
    (folder,) = write_phantom("brats", tmp_path, num_cases=1, shape=(60, 60, 60), spacing=(3, 3, 3))
    image = nib.load(folder / f"{folder.name}_t1.nii.gz")
    brain = nib.as_closest_canonical(image).get_fdata() > 0
    x_width = brain.any((1, 2)).sum()
    y_width = brain.any((0, 2)).sum()
    assert y_width > 1.1 * x_width
    # The cerebellum: low slices are in the posterior half, where high slices are not.
    low = np.argwhere(brain[:, :, : np.flatnonzero(brain.any((0, 1)))[5]]).mean(0)[1]
    assert low < np.argwhere(brain).mean(0)[1] - 2


def test_writes_the_layout_of_brats_and_says_that_it_is_a_phantom(tmp_path: Path) -> None:
    shape, spacing = (40, 44, 30), (5.0, 4.5, 6.0)
    folders = write_phantom("brats", tmp_path / "new" / "cohort", num_cases=2, shape=shape, spacing=spacing, seed=4)
    assert [folder.name for folder in folders] == ["BraTS20_Training_001", "BraTS20_Training_002"]
    assert {path.name for path in (tmp_path / "new" / "cohort").iterdir()} == {"README.txt", *(f.name for f in folders)}
    assert "PHANTOM" in (tmp_path / "new" / "cohort" / "README.txt").read_text(encoding="utf-8")
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {f"{folder.name}_{name}.nii.gz" for name in NAMES}
        for name in NAMES:
            image = nib.load(folder / f"{folder.name}_{name}.nii.gz")
            assert image.shape == shape
            assert image.get_data_dtype() == (np.uint8 if name == "seg" else np.int16)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            assert np.allclose(image.affine[:3, 3], (0, 43 * 4.5, 0))
            assert np.allclose(image.header.get_zooms(), spacing)
            assert image.header["descrip"].item().startswith(b"PHANTOM, not a patient")
            assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)


def test_affine_is_that_of_brats() -> None:
    expected = [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert np.array_equal(phantom._affine((240, 240, 155), (1, 1, 1)), expected)


def test_a_case_does_not_depend_on_the_number_of_cases(tmp_path: Path) -> None:
    few = write_phantom("brats", tmp_path / "few", num_cases=1, seed=3, **SMALL)
    many = write_phantom("brats", tmp_path / "many", num_cases=2, seed=3, **SMALL)
    other = write_phantom("brats", tmp_path / "other", num_cases=1, seed=4, **SMALL)
    assert equal(volumes(few[0]), volumes(many[0]))
    assert not equal(volumes(many[0]), volumes(many[1]))
    assert not equal(volumes(few[0]), volumes(other[0]))


def test_an_interrupted_call_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = write_phantom("brats", tmp_path / "complete", num_cases=2, **SMALL)
    save, calls = nib.save, []

    def interrupted_save(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(phantom.nib, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        write_phantom("brats", tmp_path / "cohort", num_cases=2, **SMALL)
    assert {path.name for path in (tmp_path / "cohort").iterdir()} == {"README.txt", "BraTS20_Training_001"}

    folders = write_phantom("brats", tmp_path / "cohort", num_cases=2, **SMALL)
    assert len(calls) == 8 + 5  # the first case was kept
    assert all(equal(volumes(first), volumes(second)) for first, second in zip(folders, complete, strict=True))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"shape": (41, 40, 40)}, {"spacing": (5, 5, 5.5)}], ids=["seed", "shape", "spacing"]
)
def test_another_cohort_is_never_overwritten(tmp_path: Path, change: dict[str, Any]) -> None:
    (folder,) = write_phantom("brats", tmp_path, num_cases=1, **SMALL)
    before = volumes(folder)
    with pytest.raises(ValueError, match=r"BraTS20_Training_001.*Choose another output_dir"):
        write_phantom("brats", tmp_path, num_cases=1, **{**SMALL, **change})
    assert equal(volumes(folder), before)


def test_a_case_that_lacks_a_file_is_an_error(tmp_path: Path) -> None:
    (folder,) = write_phantom("brats", tmp_path, num_cases=1, **SMALL)
    (folder / f"{folder.name}_t2.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"_t2.nii.gz is missing"):
        write_phantom("brats", tmp_path, num_cases=1, **SMALL)


def test_two_processes_may_write_the_same_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = phantom._LAYOUTS["brats"]

    def slower(*args: Any) -> Any:
        monkeypatch.setitem(phantom._LAYOUTS, "brats", layout)
        write_phantom("brats", tmp_path, num_cases=1, **SMALL)
        return layout.simulate(*args)

    monkeypatch.setitem(phantom._LAYOUTS, "brats", dataclasses.replace(layout, simulate=slower))
    (folder,) = write_phantom("brats", tmp_path, num_cases=1, **SMALL)
    assert set(volumes(folder)) == set(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"README.txt", folder.name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cases": 0}, "num_cases must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shape": (96, 96)}, r"shape must be three integers of at least \(8, 8, 8\) voxels, got \(96, 96\)"),
        ({"shape": (96, 96, 4)}, "shape must be three"),
        ({"shape": (96, 96, 9.5)}, "shape must be three"),
        ({"spacing": (1, 1)}, "spacing must be three positive"),
        ({"spacing": (1, 1, 0)}, r"spacing must be three positive numbers of millimetres, got \(1, 1, 0\)"),
        ({"spacing": (1, 1, float("nan"))}, "spacing must be three positive"),
    ],
)
def test_unusable_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_phantom("brats", tmp_path / "cohort", **{"num_cases": 1, **arguments})
    assert not (tmp_path / "cohort").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "--dataset",
            "brats",
            "--output",
            str(tmp_path),
            "--cases",
            "1",
            "--size",
            "40",
            "--spacing",
            "5",
            "5",
            "5",
            "--seed",
            "2",
        ]
    )
    assert "1 PHANTOM cases (not patients)" in capsys.readouterr().out
    (folder,) = write_phantom("brats", tmp_path, num_cases=1, seed=2, **SMALL)
    assert volumes(folder)["seg"].shape == (40, 40, 40)


def test_command_line_reports_unusable_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--size", "40", "40"])
    assert "shape must be three" in capsys.readouterr().err
