"""Crops and augmentation of nnU-Net: what they do to a case, and what they must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from passion_monai.transforms import (
    NNUNetIntensitiesd,
    NNUNetSpatiald,
    RandForegroundCropd,
    RandMaskModalitiesd,
    StackModalitiesd,
)

MODALITIES = ("a", "b", "c")
SHAPES = {2: (24, 20), 3: (24, 20, 16)}


def make_case(spatial_dims: int = 3, modalities: tuple[str, ...] = MODALITIES) -> dict[str, Any]:
    """Noise in a head with air around it, the same in all modalities, and a label of three classes."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[spatial_dims]
    image = torch.zeros(1, *shape)
    inside = (slice(None), *[slice(3, -4)] * spatial_dims)
    image[inside] = torch.randn(image[inside].shape, generator=generator)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[(slice(None), *[slice(6, 12)] * spatial_dims)] = 1
    label[(slice(None), *[slice(8, 10)] * spatial_dims)] = 2
    return {name: MetaTensor(image.clone()) for name in modalities} | {"label": MetaTensor(label)}


class TestRandForegroundCropd:
    def crop(self, case: dict[str, Any], draws: int = 200, size: int = 5) -> list[dict[str, Any]]:
        transform = RandForegroundCropd(MODALITIES, [size] * 3).set_random_state(0)
        return [transform(case) for _ in range(draws)]

    def test_the_middle_is_of_each_class_equally_often(self):
        middles = [int(case["label"][0, 2, 2, 2]) for case in self.crop(make_case())]
        assert set(middles) == {1, 2}  # class 2 has 8 of 216 voxels
        assert 70 < middles.count(2) < 130

    def test_modalities_and_label_are_cut_alike(self):
        case = make_case()
        case["label"] = case["b"] = MetaTensor(torch.arange(24 * 20 * 16).reshape(1, 24, 20, 16) % 251)
        for cut in self.crop(case, draws=20):
            assert torch.equal(cut["b"], cut["label"])
            assert torch.equal(cut["a"], cut["c"])

    def test_it_does_not_leave_the_image(self):
        case = make_case()
        case["label"].zero_()
        case["label"][0, 0, 0, 15] = 3
        (cut, *_) = cuts = self.crop(case, draws=5)
        assert all(torch.equal(cut["label"], other["label"]) for other in cuts)
        assert int(cut["label"][0, 0, 0, 4]) == 3

    def test_without_a_label_it_lies_anywhere(self):
        case = make_case()
        case["label"].zero_()
        places = MetaTensor(torch.arange(24 * 20 * 16).reshape(1, 24, 20, 16))
        starts = [int(cut["a"].min()) for cut in self.crop(case | {"a": places}, draws=400, size=14)]
        assert {start // 320 for start in starts} == set(range(11))
        assert {start % 16 for start in starts} == set(range(3))

    def test_a_modality_that_is_missing_stays_missing(self):
        assert set(self.crop(make_case(modalities=("b",)), draws=1)[0]) == {"b", "label"}


@pytest.mark.parametrize("spatial_dims", [2, 3])
class TestNNUNetSpatiald:
    def test_modalities_and_label_move_alike(self, spatial_dims: int):
        case = make_case(spatial_dims)
        mask = (case["label"] > 0).float()
        for name in MODALITIES:
            case[name] = mask.clone()
        transform = NNUNetSpatiald(MODALITIES, spatial_dims=spatial_dims, prob=1.0).set_random_state(1)
        for _ in range(10):
            moved = transform(case)
            assert all(torch.equal(moved["a"], moved[name]) for name in MODALITIES)
            assert moved["a"].shape == mask.shape
            agreement = ((moved["a"] > 0.5) == (moved["label"] > 0)).float().mean()
            assert agreement > 0.95

    def test_zoom_is_the_size_of_a_structure(self, spatial_dims: int):
        case = make_case(spatial_dims)
        before = int((case["label"] > 0).sum())
        transform = NNUNetSpatiald(MODALITIES, spatial_dims=spatial_dims, prob=1.0, angle=0.0, zoom=(1.5, 1.5))
        after = int((transform(case)["label"] > 0).sum())
        assert after / before == pytest.approx(1.5**spatial_dims, rel=0.1)

    def test_without_rotation_and_zoom_it_is_the_same(self, spatial_dims: int):
        case = make_case(spatial_dims)
        moved = NNUNetSpatiald(MODALITIES, spatial_dims=spatial_dims, prob=0.0)(case)
        assert all(torch.equal(moved[key].float(), case[key].float()) for key in case)

    def test_labels_have_one_type_whatever_is_drawn(self, spatial_dims: int):
        """A batch is made of cases of which some were turned and others were not."""
        transform = NNUNetSpatiald(MODALITIES, spatial_dims=spatial_dims, prob=0.5).set_random_state(0)
        moved = [transform(make_case(spatial_dims)) for _ in range(20)]
        assert {case["label"].dtype for case in moved} == {torch.float32}
        assert {value for case in moved for value in case["label"].unique().tolist()} == {0, 1, 2}


@pytest.mark.parametrize("spatial_dims", [2, 3])
class TestNNUNetIntensitiesd:
    def draw(self, case: dict[str, Any], spatial_dims: int, draws: int = 60) -> list[dict[str, Any]]:
        transform = NNUNetIntensitiesd(MODALITIES, spatial_dims=spatial_dims).set_random_state(0)
        return [transform(case) for _ in range(draws)]

    def test_what_is_zero_stays_zero_and_the_rest_changes(self, spatial_dims: int):
        case = make_case(spatial_dims)
        air = case["a"] == 0
        drawn = self.draw(case, spatial_dims)
        assert all(float(changed[name][air].abs().max()) == 0 for changed in drawn for name in MODALITIES)
        same = sum(torch.equal(changed["a"], case["a"]) for changed in drawn)
        assert same / len(drawn) == pytest.approx(0.9 * 0.9 * 0.85**2 * 0.875 * 0.9 * 0.7, abs=0.15)

    def test_modalities_change_by_themselves_and_the_label_not_at_all(self, spatial_dims: int):
        case = make_case(spatial_dims)
        drawn = self.draw(case, spatial_dims)
        assert sum(not torch.equal(changed["a"], changed["b"]) for changed in drawn) > len(drawn) / 2
        assert all(torch.equal(changed["label"], case["label"]) for changed in drawn)

    def test_the_case_itself_is_left_as_it_was(self, spatial_dims: int):
        case = make_case(spatial_dims)
        self.draw(case, spatial_dims)
        assert all(torch.equal(case[key], value) for key, value in make_case(spatial_dims).items())

    def test_values_stay_finite_where_a_crop_is_all_air(self, spatial_dims: int):
        case = {name: MetaTensor(torch.zeros(1, *SHAPES[spatial_dims])) for name in MODALITIES}
        assert all(float(changed[name].abs().max()) == 0 for changed in self.draw(case, spatial_dims) for name in case)

    def test_it_is_seeded(self, spatial_dims: int):
        one, two = (self.draw(make_case(spatial_dims), spatial_dims, draws=10) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in MODALITIES)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_missing_sequences_stay_exactly_zero_and_one_is_always_left(spatial_dims: int):
    """As train.yaml has it: sequences are dropped, what is left is augmented, and zeros come last."""
    transforms = Compose(
        [
            RandMaskModalitiesd(MODALITIES),
            NNUNetSpatiald(MODALITIES, spatial_dims=spatial_dims, prob=1.0),
            NNUNetIntensitiesd(MODALITIES, spatial_dims=spatial_dims),
            StackModalitiesd(MODALITIES),
        ]
    ).set_random_state(0)
    combinations = set()
    for _ in range(60):
        case = transforms(make_case(spatial_dims, ("a", "c")))
        combinations.add(tuple(case["presence"].tolist()))
        assert float(case["image"][~case["presence"]].abs().max()) == 0
        assert all(float(channel.abs().max()) > 0 for channel in case["image"][case["presence"]])
    assert combinations == {(True, False, False), (False, False, True), (True, False, True)}
