"""Our backbones and the released objective give the numbers of the authors' models, from the same weights."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss
from passion_monai.networks import BACKBONES, Backbone
from passion_monai.networks.checkpoints import load_reference_checkpoint, translate_reference_state

REFERENCE = Path(__file__).parent / "reference"
NAMES = [path.stem for path in sorted(REFERENCE.glob("*.npz"))]
AVAILABILITY = [1 / 0.8, 1 / 0.6, 1 / 0.4, 1 / 0.2]


@cache
def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal values that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    values = normal(name, shape)
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.1 * values + (1 if name.endswith("weight") else 0)
    return torch.from_numpy(values.astype(np.float32))


@cache
def reference_state(name: str) -> dict[str, Tensor]:
    """A checkpoint with the authors' names and shapes."""
    content = numbers(name)
    shapes = [tuple(map(int, text.split())) for text in content["state_shapes"]]
    return {key: weight(key, shape) for key, shape in zip(content["state_names"].tolist(), shapes, strict=True)}


@cache
def case() -> tuple[Tensor, Tensor]:
    """Image [1, 4, 32, 32, 32] of noise with nested spheres, and their classes as label [1, 1, 32, 32, 32]."""
    axis = np.linspace(-1, 1, 32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    radius = np.linalg.norm(grid - [0.1, -0.1, 0.05], axis=-1)
    label = np.select([radius < 0.25, radius < 0.4, radius < 0.6], [1, 3, 2])
    contrast = np.array([0.5, 0.8, -0.3, 0.4]).reshape(4, 1, 1, 1)
    image = normal("case-0", (4, 32, 32, 32)) + contrast * label
    return torch.from_numpy(image.astype(np.float32))[None], torch.from_numpy(label)[None, None]


def build(name: str, img_size: int = 32, **kwargs: Any) -> Backbone:
    return BACKBONES[name](3, num_modalities=4, num_classes=4, img_size=img_size, **kwargs).eval()


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Backbone]:
    network = build(request.param)
    report = load_reference_checkpoint(reference_state(request.param), backbone=network)
    assert (report.missing, report.unused, report.interpolated) == ((), (), ())
    return request.param, network


def presence_of(mask: str) -> Tensor:
    return torch.tensor([[digit == "1" for digit in mask]])


def test_every_backbone_of_the_authors_has_reference_numbers():
    assert sorted(NAMES) == sorted({*BACKBONES} - {"fusionunet"})  # which is ours


@torch.no_grad()
def test_predictions_of_every_combination(loaded: tuple[str, Backbone]):
    name, network = loaded
    features = network.encode(case()[0], presence_of("1111"))
    masks = [key.split("/")[-1] for key in numbers(name) if "/eval/" in key]
    assert len(masks) == 15
    for mask in masks:
        probabilities = network.decode(features, presence_of(mask)).logits.softmax(dim=1)
        expected = torch.from_numpy(numbers(name)[f"seed0/eval/{mask}"])
        torch.testing.assert_close(probabilities[0, :, ::4, ::4, ::4], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mask", ["1111", "1010", "0111", "1001", "0001"])
def test_terms_of_the_released_objective(loaded: tuple[str, Backbone], mask: str):
    name, network = loaded
    expected = {
        key.split("/")[-1]: torch.from_numpy(np.asarray(value, dtype=np.float64))
        for key, value in numbers(name).items()
        if f"/train/{mask}/" in key
    }
    presence = presence_of(mask)
    loss = PassionLoss.released(4, 4, availability=AVAILABILITY)
    with torch.no_grad():
        total = loss(SelfDistillation(network, own_predictions="all")(case()[0], presence), case()[1])
    terms = {
        "fuse and prm": (loss.terms["loss_segmentation"][0], expected["fuse"] + expected["prm"]),
        "sep": (loss.terms["loss_regularisation"][presence], expected["sep_m"][presence[0]]),
        # Theirs is a mean over the four classes, ours a sum.
        "kl": (loss.terms["loss_pixel"][presence] / 4, expected["kl_m"][presence[0]]),
        "proto": (loss.terms["loss_prototype"][presence], expected["proto_m"][presence[0]]),
        "dist": (loss.terms["gap"][presence], expected["dist_m"][presence[0]]),
        "rp_mask": (loss.terms["relative_preference"][presence] < 0, expected["rp_mask"][presence[0]]),
        "loss": (total, expected["loss"]),
    }
    for term, (ours, theirs) in terms.items():
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6, msg=lambda text, t=term: f"{t}: {text}")


@pytest.mark.parametrize("mask", ["1111", "1010", "0001"])
def test_gradient_norms_of_the_released_objective(loaded: tuple[str, Backbone], mask: str):
    name, network = loaded
    network.zero_grad(set_to_none=True)
    loss = PassionLoss.released(4, 4, availability=AVAILABILITY)
    loss(
        SelfDistillation(network, own_predictions="neglected")(case()[0], presence_of(mask), case()[1]), case()[1]
    ).backward()
    names = numbers(name)["param_names"].tolist()
    expected = numbers(name)[f"seed0/train/{mask}/grad_norms"]
    # Numbers take the way of the weights: which of their parameters ends up where in ours.
    places = {key: torch.tensor([index]) for index, key in enumerate(names)}
    translated, unused = translate_reference_state(places, backbone=network)
    assert unused == ()
    norms = np.full(len(names), np.nan)
    for key, indices in translated.items():
        gradient = network.get_parameter(key).grad
        parts = [None] * len(indices) if gradient is None else gradient.reshape(len(indices), -1)
        for index, part in zip(indices.tolist(), parts, strict=True):
            norms[index] = 0.0 if part is None else float(part.norm())
    np.testing.assert_allclose(norms, expected, rtol=1e-2, atol=1e-4 * expected.max())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_file_in_the_authors_format(name: str, tmp_path: Path):
    state = {f"module.{key}": value for key, value in reference_state(name).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model_last.pth")
    network = build(name)
    report = load_reference_checkpoint(tmp_path / "model_last.pth", backbone=network)
    assert len(report.loaded) == len(network.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_another_crop_interpolates_positions_only(name: str):
    network = build(name, img_size=48)
    report = load_reference_checkpoint(reference_state(name), backbone=network)
    assert report.missing == report.unused == ()
    shapes = {key: value.shape for key, value in build(name).state_dict().items()}
    changed = {key for key, value in network.state_dict().items() if value.shape != shapes[key]}
    assert set(report.interpolated) == changed
    for key in changed:  # linear interpolation keeps the mean of a grid that doubles or grows by half, almost
        small = build(name)
        load_reference_checkpoint(reference_state(name), backbone=small)
        mean, expected = network.state_dict()[key].mean(), small.state_dict()[key].mean()
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_listed(name: str):
    state = reference_state(name) | {"surplus": torch.zeros(1)}
    removed = next(key for key in state if key.startswith("decoder_sep"))
    del state[removed]
    network = BACKBONES[name](3, num_modalities=4, num_classes=3, img_size=32)
    report = load_reference_checkpoint(state, backbone=network)
    assert "surplus" in report.unused
    head = "modality_decoder.head.weight"
    assert head in report.missing
    assert not set(report.missing) & set(report.loaded)
    assert set(report.missing) | set(report.loaded) == set(network.state_dict())


def test_a_foreign_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="Nothing in the checkpoint fits MMFormer"):
        load_reference_checkpoint({"conv.weight": torch.zeros(1)}, backbone=build("mmformer"))
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load_reference_checkpoint(tmp_path / "none.pth", backbone=build("mmformer"))
