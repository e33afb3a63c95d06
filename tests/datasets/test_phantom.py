from __future__ import annotations

import builtins
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("nilearn")

from passion_monai.datasets import phantom
from passion_monai.datasets.phantom import brain_phantom, main, write_brain_phantom

SMALL: Mapping[str, Any] = {"shape": (40, 40, 40), "spacing": (5, 5, 5)}
SEEDS = range(12)
NAMES = ("flair", "t1ce", "t1", "t2", "seg")

Case = tuple[dict[str, NDArray[np.int16]], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """A small cohort at 3 mm, seeds 0, 1, ..."""
    return [brain_phantom((64, 64, 64), (3, 3, 3), seed) for seed in SEEDS]


def volumes(folder: Path) -> dict[str, NDArray]:
    return {name: np.asarray(nib.load(folder / f"{folder.name}_{name}.nii.gz").dataobj) for name in NAMES}


def equal(first: Mapping[str, NDArray], second: Mapping[str, NDArray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_equal_seeds_give_equal_cases(cases: list[Case]) -> None:
    images, label = brain_phantom((64, 64, 64), (3, 3, 3), 1)
    assert equal(images, cases[1][0])
    assert np.array_equal(label, cases[1][1])
    assert not equal(images, cases[2][0])
    assert not np.array_equal(label, cases[2][1])


def test_all_modalities_share_one_brain_mask(cases: list[Case]) -> None:
    for images, label in cases:
        brain = images["t1"] > 0
        assert tuple(images) == NAMES[:4]
        assert label.dtype == np.uint8
        assert set(np.unique(label)) <= {0, 1, 2, 4}
        assert brain[label > 0].all()
        for image in images.values():
            assert image.dtype == np.int16
            assert np.array_equal(image > 0, brain)
            assert np.array_equal(image != 0, brain)


def test_volumes_are_plausible(cases: list[Case]) -> None:
    voxel_ml = 0.027
    for images, label in cases:
        whole, core = (label > 0).sum() * voxel_ml, ((label == 1) | (label == 4)).sum() * voxel_ml
        assert 30 <= whole <= 152
        assert 0.12 * whole <= core <= 0.6 * whole
        assert 1100 <= (images["t1"] > 0).sum() * voxel_ml <= 1900


def test_some_cases_lack_enhancing_tumour() -> None:
    enhancing = [(brain_phantom(seed=(7, seed), **SMALL)[1] == 4).any() for seed in range(60)]
    assert 1 <= 60 - sum(enhancing) <= 15


def medians(image: NDArray, label: NDArray) -> dict[str, float]:
    """Median intensity of the tumour's parts, relative to that of the healthy brain, which is mostly parenchyma."""
    healthy = np.median(image[(image > 0) & (label == 0)])
    parts = {"necrosis": 1, "edema": 2, "enhancing": 4}
    return {name: float(np.median(image[label == value]) / healthy) for name, value in parts.items()}


def test_each_modality_shows_its_own_regions(cases: list[Case]) -> None:
    enhancing_cases = [(images, label) for images, label in cases if (label == 4).sum() > 20]
    assert len(enhancing_cases) >= 6
    for images, label in enhancing_cases:
        flair, t1ce, t1, t2 = (medians(image, label) for image in images.values())
        assert flair["edema"] > 1.1
        assert t2["edema"] > 1.1
        assert 0.8 < t1["edema"] < 1.15
        assert t1ce["enhancing"] > 1.1
        assert t1["enhancing"] < 1.05
        assert t1["necrosis"] < 0.95
        assert t1ce["necrosis"] < 0.8 * t1ce["enhancing"]
        assert t2["necrosis"] > 1.3


def test_cerebrospinal_fluid_is_dark_in_flair_and_bright_in_t2(cases: list[Case]) -> None:
    for images, label in cases:
        healthy = (images["t2"] > 0) & (label == 0)
        flair, t2 = images["flair"][healthy], images["t2"][healthy]
        fluid = t2 > np.quantile(t2, 0.98)
        assert np.median(t2[fluid]) > 1.6 * np.median(t2)
        assert np.median(flair[fluid]) < 0.6 * np.median(flair)


def best_threshold_dice(image: NDArray, tumour: NDArray) -> float:
    tumour, image = tumour[image > 0], image[image > 0]
    sides = [side for t in np.quantile(image, np.linspace(0.02, 0.98, 49)) for side in (image > t, image < t)]
    return float(max(2 * (tumour & side).sum() / (tumour.sum() + side.sum()) for side in sides))


@pytest.mark.parametrize(
    ("name", "least", "most"), [("flair", 0.4, 0.88), ("t1ce", 0, 0.5), ("t1", 0, 0.5), ("t2", 0, 0.6)]
)
def test_a_threshold_on_one_modality_does_not_find_the_tumour(
    cases: list[Case], name: str, least: float, most: float
) -> None:
    scores = [best_threshold_dice(images[name], label > 0) for images, label in cases]
    assert least < np.mean(scores) < most


def test_gain_differs_from_scan_to_scan(cases: list[Case]) -> None:
    levels = [np.median(images[name][images[name] > 0]) for images, _ in cases for name in NAMES[:4]]
    assert max(levels) > 3 * min(levels)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((96, 96, 96), (2, 2, 2)),
        ((60, 60, 31), (4, 4, 5)),
        ((9, 40, 30), (3, 5, 6.5)),
        ((32, 32, 32), (1, 1, 1)),
        ((8, 8, 8), (24, 24, 20)),
    ],
)
def test_any_size_and_spacing(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    images, label = brain_phantom(shape, spacing, 3)
    assert label.shape == shape
    assert all(image.shape == shape for image in images.values())
    assert 0 < (label > 0).sum() < (images["t1"] > 0).sum()
    assert ((label == 1) | (label == 4)).any()


@pytest.mark.slow
def test_the_size_of_brats() -> None:
    images, label = brain_phantom((240, 240, 155), (1, 1, 1), 0)
    assert images["flair"].shape == (240, 240, 155)
    assert set(np.unique(label)) == {0, 1, 2, 4}
    # The head fits: nothing but background at the sides.
    assert all(not np.take(images["t1"], edge, axis).any() for axis in (0, 1) for edge in (0, -1))


def test_left_and_posterior_are_where_the_affine_says(tmp_path: Path) -> None:
    (folder,) = write_brain_phantom(tmp_path, num_cases=1, shape=(60, 60, 60), spacing=(3, 3, 3))
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
    folders = write_brain_phantom(tmp_path / "new" / "cohort", num_cases=2, shape=shape, spacing=spacing, seed=4)
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
    few = write_brain_phantom(tmp_path / "few", num_cases=1, seed=3, **SMALL)
    many = write_brain_phantom(tmp_path / "many", num_cases=2, seed=3, **SMALL)
    other = write_brain_phantom(tmp_path / "other", num_cases=1, seed=4, **SMALL)
    assert equal(volumes(few[0]), volumes(many[0]))
    assert not equal(volumes(many[0]), volumes(many[1]))
    assert not equal(volumes(few[0]), volumes(other[0]))


def test_an_interrupted_call_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = write_brain_phantom(tmp_path / "complete", num_cases=2, **SMALL)
    save, calls = nib.save, []

    def interrupted_save(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(phantom.nib, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        write_brain_phantom(tmp_path / "cohort", num_cases=2, **SMALL)
    assert {path.name for path in (tmp_path / "cohort").iterdir()} == {"README.txt", "BraTS20_Training_001"}

    folders = write_brain_phantom(tmp_path / "cohort", num_cases=2, **SMALL)
    assert len(calls) == 8 + 5  # the first case was kept
    assert all(equal(volumes(first), volumes(second)) for first, second in zip(folders, complete, strict=True))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"shape": (41, 40, 40)}, {"spacing": (5, 5, 5.5)}], ids=["seed", "shape", "spacing"]
)
def test_another_cohort_is_never_overwritten(tmp_path: Path, change: dict[str, Any]) -> None:
    (folder,) = write_brain_phantom(tmp_path, num_cases=1, **SMALL)
    before = volumes(folder)
    with pytest.raises(ValueError, match=r"BraTS20_Training_001.*Choose another output_dir"):
        write_brain_phantom(tmp_path, num_cases=1, **{**SMALL, **change})
    assert equal(volumes(folder), before)


def test_a_case_that_lacks_a_file_is_an_error(tmp_path: Path) -> None:
    (folder,) = write_brain_phantom(tmp_path, num_cases=1, **SMALL)
    (folder / f"{folder.name}_t2.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"_t2.nii.gz is missing"):
        write_brain_phantom(tmp_path, num_cases=1, **SMALL)


def test_two_processes_may_write_the_same_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(*args: Any) -> Case:
        monkeypatch.setattr(phantom, "brain_phantom", brain_phantom)
        write_brain_phantom(tmp_path, num_cases=1, **SMALL)
        return brain_phantom(*args)

    monkeypatch.setattr(phantom, "brain_phantom", slower)
    (folder,) = write_brain_phantom(tmp_path, num_cases=1, **SMALL)
    assert set(volumes(folder)) == set(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"README.txt", folder.name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cases": 0}, "num_cases must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shape": (96, 96)}, r"shape must be three whole numbers of at least 8 voxels, got \(96, 96\)"),
        ({"shape": (96, 96, 4)}, "shape must be three"),
        ({"shape": (96, 96, 9.5)}, "shape must be three"),
        ({"spacing": (1, 1)}, "spacing must be three positive"),
        ({"spacing": (1, 1, 0)}, r"spacing must be three positive numbers of millimetres, got \(1, 1, 0\)"),
        ({"spacing": (1, 1, float("nan"))}, "spacing must be three positive"),
    ],
)
def test_unusable_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_brain_phantom(tmp_path / "cohort", **{"num_cases": 1, **arguments})
    assert not (tmp_path / "cohort").exists()


def test_missing_nilearn_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_nilearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("nilearn"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_nilearn)
    with pytest.raises(ImportError, match=r'pip install "passion-monai\[demo\]"'):
        phantom._template.__wrapped__()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path), "--cases", "1", "--size", "40", "--spacing", "5", "5", "5", "--seed", "2"])
    assert "1 PHANTOM cases (not patients)" in capsys.readouterr().out
    (folder,) = write_brain_phantom(tmp_path, num_cases=1, seed=2, **SMALL)
    assert volumes(folder)["seg"].shape == (40, 40, 40)


def test_command_line_reports_unusable_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--size", "40", "40"])
    assert "shape must be three" in capsys.readouterr().err
