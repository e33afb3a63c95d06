from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("nilearn")

from passion_monai.datasets import brain_phantom as simulation
from passion_monai.datasets.brain_phantom import brain_phantom

SMALL: Mapping[str, Any] = {"shape": (40, 40, 40), "spacing": (5, 5, 5)}
SEEDS = range(12)
NAMES = ("flair", "t1ce", "t1", "t2")

Case = tuple[dict[str, NDArray[np.int16]], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """A small cohort at 3 mm, seeds 0, 1, ..."""
    return [brain_phantom((64, 64, 64), (3, 3, 3), seed) for seed in SEEDS]


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
        assert tuple(images) == NAMES
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
    levels = [np.median(images[name][images[name] > 0]) for images, _ in cases for name in NAMES]
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


def test_missing_nilearn_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_nilearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("nilearn"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_nilearn)
    with pytest.raises(ImportError, match=r'pip install "passion-monai\[demo\]"'):
        simulation._template.__wrapped__()
