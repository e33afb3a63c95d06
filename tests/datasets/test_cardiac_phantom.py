from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from passion_monai.datasets.cardiac_phantom import cardiac_phantom, draw_slices
from passion_monai.datasets.myops import SPEC

NORMAL, LEFT, RIGHT, EDEMA, SCAR = 200, 500, 600, 1220, 2221

Case = tuple[dict[str, NDArray[np.int16]], NDArray[np.uint16]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """A cohort at 2 mm, seeds 0, 1, ..."""
    return [cardiac_phantom((128, 128, 4), (2, 2, 10), seed) for seed in range(20)]


def test_equal_seeds_give_equal_cases(cases: list[Case]) -> None:
    images, label = cardiac_phantom((128, 128, 4), (2, 2, 10), 3)
    assert np.array_equal(label, cases[3][1])
    assert all(np.array_equal(images[name], cases[3][0][name]) for name in images)
    assert not np.array_equal(label, cases[4][1])


def test_modalities_and_label_values_are_those_of_myops(cases: list[Case]) -> None:
    assert {value for _, label in cases for value in np.unique(label)} == set(SPEC.label_values)
    for images, label in cases:
        assert tuple(images) == SPEC.modalities
        assert label.dtype == np.uint16
        assert all(
            image.dtype == np.int16 and image.shape == label.shape and image.min() >= 1 for image in images.values()
        )


def test_volumes_are_plausible(cases: list[Case]) -> None:
    """Millilitres in four slices of 10 mm, which are less than half of a heart."""
    millilitres = np.array([[(label == value).sum() * 0.04 for value in (NORMAL, LEFT, RIGHT)] for _, label in cases])
    assert (millilitres > (20, 25, 20)).all()
    assert (millilitres < (100, 130, 150)).all()
    infarct = [np.isin(label, (EDEMA, SCAR)).sum() * 0.04 for _, label in cases]
    assert 2 < min(infarct) < max(infarct) < 60


def test_the_left_ventricle_lies_in_a_closed_ring(cases: list[Case]) -> None:
    for _, label in cases:
        for plane in np.moveaxis(label, 2, 0):
            ring = np.isin(plane, (NORMAL, EDEMA, SCAR))
            assert (ndimage.binary_fill_holes(ring) >= (plane == LEFT)).all()


def test_the_heart_gets_smaller_towards_the_apex(cases: list[Case]) -> None:
    for _, label in cases:
        assert (label[..., 0] == LEFT).sum() > (label[..., -1] == LEFT).sum()


def test_the_right_ventricle_is_on_the_right_of_the_patient(cases: list[Case]) -> None:
    for _, label in cases:
        assert np.argwhere(label == RIGHT)[:, 0].mean() < np.argwhere(label == LEFT)[:, 0].mean()


def ratio(cases: list[Case], name: str, value: int) -> float:
    """Intensity of a part relative to normal myocardium, in the middle of the cohort."""
    values = []
    for images, label in cases:
        if (label == value).sum() > 10:
            values.append(np.median(images[name][label == value]) / np.median(images[name][label == NORMAL]))
    return float(np.median(values))


@pytest.mark.parametrize(
    ("name", "value", "least", "most"),
    [
        ("bssfp", LEFT, 2, 4),
        ("bssfp", EDEMA, 0.8, 1.2),
        ("bssfp", SCAR, 0.8, 1.2),
        ("lge", LEFT, 3, 20),
        ("lge", SCAR, 4, 20),
        ("lge", EDEMA, 0.8, 3),
        ("t2", LEFT, 0.2, 0.8),
        ("t2", EDEMA, 1.2, 2),
        ("t2", SCAR, 1.2, 2),
    ],
)
def test_each_modality_shows_its_own_regions(
    cases: list[Case], name: str, value: int, least: float, most: float
) -> None:
    assert least < ratio(cases, name, value) < most


def test_some_infarcts_have_no_scar_and_every_scar_has_edema_around(cases: list[Case]) -> None:
    without = sum(not (label == SCAR).any() for _, label in cases)
    assert 0 < without < 8
    assert all((label == EDEMA).any() for _, label in cases)


def test_number_of_slices_varies() -> None:
    drawn = {draw_slices((64, 64, 6), (0, number))[2] for number in range(40)}
    assert drawn == {3, 4, 5, 6}
    assert draw_slices((64, 64, 1), 0) == (64, 64, 1)


@pytest.mark.parametrize(("shape", "spacing"), [((350, 340, 5), (0.73, 0.75, 12)), ((16, 16, 1), (12, 12, 10))])
def test_any_size_and_spacing(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    images, label = cardiac_phantom(shape, spacing, 0)
    assert label.shape == shape
    assert (label > 0).any()
    assert all(image.std() > 0 for image in images.values())
