"""Images whose background is not 0, what each remedy makes of them; and predictions in the background."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, NormalizeIntensityd

from passion_monai.datasets.brain_phantom import brain_phantom
from passion_monai.foreground import ClearBackgroundd, ZeroBackgroundd
from passion_monai.presence import combinations
from passion_monai.transforms import CropToForegroundd

RNG = np.random.default_rng(0)
REMEDIES = ("nonzero", "constant_border", "otsu", "unchecked")


def ball(shape: tuple[int, ...] = (24, 28, 20), fill: float = 0.8) -> np.ndarray:
    """An ellipsoid of tissue in a background of 0, over this part of each axis."""
    grid = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    inside = sum((axis / fill) ** 2 for axis in grid) <= 1
    return np.where(inside, RNG.normal(500, 80, shape), 0).astype(np.float32)


def case_of(**images: np.ndarray) -> dict[str, Any]:
    """A case as it is loaded."""
    files = {name: f"/data/x_{name}.nii.gz" for name in images}
    return {"case": "x", "files": files, **{name: MetaTensor(image[None]) for name, image in images.items()}}


def apply(foreground: str, **images: np.ndarray) -> dict[str, np.ndarray]:
    zeroed = ZeroBackgroundd(("a", "b"), foreground=foreground)(case_of(**images))
    return {name: zeroed[name].numpy()[0] for name in images}


def z_scored(image: np.ndarray, background: float = -5) -> np.ndarray:
    brain = image[image != 0]
    return np.where(image != 0, (image - brain.mean()) / brain.std(), background).astype(np.float32)


def noisy(image: np.ndarray, scale: float = 8) -> np.ndarray:
    """With the noise of a magnitude image everywhere."""
    return (image + RNG.rayleigh(scale, image.shape)).astype(np.float32)


def tight(image: np.ndarray) -> np.ndarray:
    """Cropped so that the brain touches all six faces."""
    box = np.argwhere(image)
    return image[tuple(map(slice, box.min(0), box.max(0) + 1))]


def saturated(image: np.ndarray) -> np.ndarray:
    return np.where(image > 0, 32767, image).astype(np.float32)


IN_ORDER: dict[str, Callable[[], np.ndarray]] = {
    "a brain in the air": ball,
    "cropped to the brain": lambda: tight(ball()),
    "a slab of few slices": lambda: tight(ball((40, 40, 40))[:, :, 16:24]),
    "saturated and cropped": lambda: saturated(tight(ball())),
    "negative values": lambda: z_scored(ball(), background=0),
    "a phantom": lambda: brain_phantom((32, 32, 32), (6, 6, 6), 0)[0]["t1"].astype(np.float32),
    "a phantom cropped to its brain": lambda: tight(brain_phantom((32, 32, 32), (6, 6, 6), 1)[0]["t2"]).astype("f4"),
}


@pytest.mark.parametrize("foreground", REMEDIES)
@pytest.mark.parametrize("image", IN_ORDER)
def test_what_is_in_order_is_not_touched(image: str, foreground: str):
    array = IN_ORDER[image]()
    assert np.array_equal(apply(foreground, a=array)["a"], array)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (z_scored(ball()), "has the value -5 at its border and not 0"),
        (z_scored(tight(ball())) + 7, "has the value 2 at its border and not 0"),
        (noisy(ball()), "is not 0 in 100% of its voxels"),
        (np.rint(noisy(ball())), r"is not 0 in (9\d|100)% of its voxels"),
    ],
    ids=["z-scored", "cropped", "noise", "whole numbers"],
)
def test_doubt_is_an_error_that_names_case_file_and_remedy(image: np.ndarray, said: str):
    with pytest.raises(ValueError, match=f"Case x: b file /data/x_b.nii.gz {said}, .*taken for brain") as error:
        apply("nonzero", a=ball(), b=image)
    assert re.search("'constant_border'.*'otsu'.*'unchecked'", str(error.value))
    assert np.array_equal(apply("unchecked", b=image)["b"], image)


@pytest.mark.parametrize("rounding", [0, 1e-5], ids=["exact", "rounded"])
def test_the_border_is_subtracted_and_the_network_sees_what_it_sees_of_zero_background(rounding: float):
    plain, other = ball(), ball()
    shifted = z_scored(plain) + RNG.uniform(-rounding, rounding, plain.shape).astype(np.float32)
    keys = ("a", "b")
    after = [CropToForegroundd(keys), NormalizeIntensityd(keys, nonzero=True, allow_missing_keys=True)]
    remedied = Compose([ZeroBackgroundd(keys, foreground="constant_border"), *after])(case_of(a=shifted, b=other))
    expected = Compose([ZeroBackgroundd(keys), *after])(case_of(a=plain, b=other))
    assert remedied["a"].shape == expected["a"].shape != (1, *plain.shape)
    for key in keys:
        torch.testing.assert_close(remedied[key].as_tensor(), expected[key].as_tensor(), rtol=0, atol=1e-4)
        assert torch.equal(remedied[key] == 0, expected[key] == 0)
        assert torch.equal(remedied[key].affine, expected[key].affine)


def test_a_border_that_is_not_constant_cannot_be_subtracted():
    with pytest.raises(ValueError, match=r"is not 0 in 100% of its voxels.*foreground is 'constant_border'"):
        apply("constant_border", a=noisy(ball()))


@pytest.mark.parametrize("spike", [0, 1e6], ids=["even", "a spike"])
@pytest.mark.parametrize("change", [noisy, z_scored], ids=["noise", "constant"])
def test_otsu_clears_what_is_outside_of_the_head(change: Callable[[np.ndarray], np.ndarray], spike: float):
    """With all that the head encloses, be it dark; and without a bright speck outside."""
    head = ball()
    inside = head > 0
    image = change(head)
    image[11:14, 12:16, 9:11] = image[~inside].min()  # a ventricle
    image[1, 1, 1] = image.max() + spike
    found = apply("otsu", a=image)["a"]
    assert (found != 0)[~inside].mean() == 0
    assert (found != 0)[inside].mean() > 0.98
    assert np.array_equal(found[found != 0], image[found != 0])


def test_a_missing_modality_is_not_looked_for():
    assert apply("nonzero", b=ball()).keys() == {"b"}


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match=r"foreground must be one of \['nonzero', .*\], got 'zero'"):
        ZeroBackgroundd(("a",), foreground="zero")


class TestClearBackground:
    SHAPE = (6, 7, 5)

    def image(self) -> torch.Tensor:
        """Two modalities, the second of a larger head; voxel 0 is air in both, and (2, 2, 2) is 0 in the first only."""
        image = torch.zeros(2, *self.SHAPE)
        image[0, 1:4, 1:4, 1:4] = 1
        image[1, 1:5, 1:6, 1:4] = -1
        image[0, 2, 2, 2] = 0
        return image

    def clear(self, probabilities: torch.Tensor, image: torch.Tensor, presence: list[bool]) -> torch.Tensor:
        data = {"pred": probabilities.clone(), "image": MetaTensor(image), "presence": torch.tensor(presence)}
        cleared: torch.Tensor = ClearBackgroundd()(data)["pred"]
        return cleared

    def tumour(self, *leading: int) -> torch.Tensor:
        """Class 1 everywhere."""
        return torch.tensor([0.1, 0.9])[:, None, None, None].expand(*leading, 2, *self.SHAPE)

    def test_outside_of_all_modalities_is_background(self):
        cleared = self.clear(self.tumour(), self.image(), [True, True])
        larger = torch.zeros(self.SHAPE, dtype=torch.bool)
        larger[1:5, 1:6, 1:4] = True
        assert torch.equal(cleared.argmax(dim=0) == 1, larger)
        assert torch.equal(cleared[:, larger], self.tumour()[:, larger])
        assert torch.equal(cleared.sum(dim=0), torch.ones(self.SHAPE))

    def test_each_combination_goes_by_its_own_modalities(self):
        """The head that a modality shows is not known to combinations without it."""
        cleared = self.clear(self.tumour(3), self.image(), [True, True])
        assert (cleared.argmax(dim=1) == 1).sum(dim=(1, 2, 3)).tolist() == [26, 60, 60]
        for row, found in zip(combinations(2), cleared, strict=True):
            alone = self.image() * torch.from_numpy(row)[:, None, None, None]
            assert torch.equal(found, self.clear(self.tumour(), alone, row.tolist()))

    def test_what_is_not_there_stays_nan(self):
        image = self.image()
        image[1] = 0
        predicted = self.tumour(3).clone()
        predicted[1:] = torch.nan
        cleared = self.clear(predicted, image, [True, False])
        assert cleared.isnan().all(dim=(1, 2, 3, 4)).tolist() == [False, True, True]
        assert int((cleared[0].argmax(dim=0) == 1).sum()) == 26
