from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from passion_monai.evaluation.temperature import (
    FILE_NAME,
    SampleVoxelsd,
    TemperatureFit,
    fit_temperature,
    read_temperatures,
)

MODALITIES = ("a", "b")
NAMES = ("a", "b", "a+b")


def example(temperature: float, *, voxels: int = 40_000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [K, N] that a temperature makes right, and classes that were drawn by what is right."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, voxels, generator=generator)
    classes = torch.multinomial(logits.softmax(dim=0).T, 1, generator=generator)[:, 0]
    return (logits * temperature).softmax(dim=0), classes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_the_labels_were_drawn_with(temperature: float):
    probabilities, classes = example(temperature)
    assert fit_temperature(probabilities, classes) == pytest.approx(temperature, rel=0.03)
    assert fit_temperature(0.3 * probabilities, classes) == pytest.approx(temperature, rel=0.03)


def test_it_has_the_least_loss_of_all():
    probabilities, classes = example(1.7, voxels=500)
    fitted = fit_temperature(probabilities, classes)

    def loss(temperature: float) -> float:
        scaled = probabilities.double().log().T / temperature
        return float(torch.nn.functional.cross_entropy(scaled, classes))

    others = torch.logspace(math.log10(0.05), math.log10(20), 400).tolist()
    assert loss(fitted) <= min(map(loss, others)) + 1e-9


def test_a_voxel_of_which_the_network_is_wholly_sure_does_not_decide():
    probabilities, classes = example(1.0)
    probabilities[:, 0], classes[0] = torch.tensor([1.0, 0.0, 0.0]), 1
    assert fit_temperature(probabilities, classes) == pytest.approx(1.0, rel=0.03)


def test_no_voxel_is_an_error():
    with pytest.raises(ValueError, match="at least one voxel"):
        fit_temperature(torch.zeros(3, 0), torch.zeros(0, dtype=torch.long))


def sampled(number: int, *, seed: int = 0) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """A case on a network's grid that is a part of the label's, and what is drawn of it; "b" is missing."""
    generator = torch.Generator().manual_seed(1)
    label = MetaTensor(torch.randint(0, 3, (1, 6, 5, 4), generator=generator), affine=torch.eye(4))
    affine = torch.eye(4)
    affine[:3, 3] = 1.0  # begins at voxel 1 of each axis
    probabilities = torch.rand(3, 3, 4, 3, 2, generator=generator)
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    probabilities[1:] = torch.nan
    data = {"pred": probabilities, "image": MetaTensor(torch.zeros(2, 4, 3, 2), affine=affine), "label": label}
    return data, SampleVoxelsd(number=number, seed=seed)(data)


def test_all_voxels_that_the_network_saw_with_their_classes():
    data, result = sampled(1000)
    assert result["pred"].shape == (3, 3, 24)
    inside = data["label"][0, 1:5, 1:4, 1:3].flatten().tolist()
    pairs = sorted(zip(result["label"].tolist(), result["pred"][0, 0].tolist(), strict=True))
    expected = sorted(zip(inside, data["pred"][0, 0].flatten().tolist(), strict=True))
    assert [pair[0] for pair in pairs] == [pair[0] for pair in expected]
    assert [pair[1] for pair in pairs] == pytest.approx([pair[1] for pair in expected], abs=1e-5)
    assert result["pred"][1:].isnan().all()


def test_a_few_voxels_are_drawn_at_random():
    results = [sampled(10, seed=seed)[1] for seed in (0, 0, 1)]
    assert results[0]["pred"].shape == (3, 3, 10)
    assert torch.equal(results[0]["pred"][0], results[1]["pred"][0])
    assert not torch.equal(results[0]["pred"][0], results[2]["pred"][0])


def fit(folder: Path, *, available: tuple[int, ...] = (0, 1, 2), flip_test: bool = False) -> Path:
    """Weights, and temperatures 1, 2 and 3 of "a", "b" and "a+b", fitted on two cases."""
    weights = folder / "models" / "model.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    batches = []
    for seed in range(2):
        examples = [example(1.0 + index, voxels=20_000, seed=seed) for index in range(3)]
        probabilities = torch.full((3, 3, 20_000), torch.nan)
        for index in available:
            probabilities[index] = examples[index][0]
        batches.append([{"pred": probabilities, "label": examples[0][1]}])
    engine = Engine(lambda _, batch: batch)
    path = folder / "evaluation" / FILE_NAME
    TemperatureFit(path, modalities=MODALITIES, weights=weights, flip_test=flip_test, data="two cases").attach(engine)
    engine.run(batches)
    return weights


def test_temperatures_are_kept_with_the_weights(tmp_path: Path):
    found = read_temperatures(fit(tmp_path), flip_test=False)
    assert found["data"] == "two cases"
    assert {name: fitted["cases"] for name, fitted in found["combinations"].items()} == dict.fromkeys(NAMES, 2)
    temperatures = [found["combinations"][name]["temperature"] for name in NAMES]
    assert temperatures == pytest.approx([1, 2, 3], rel=0.05)


def test_a_combination_that_no_case_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        weights = fit(tmp_path, available=(0, 2))
    assert "No case has the modalities of b: these get no temperature" in caplog.text
    assert list(read_temperatures(weights, flip_test=False)["combinations"]) == ["a", "a+b"]


def test_without_a_case_nothing_is_written(tmp_path: Path):
    weights = fit(tmp_path, available=())
    with pytest.raises(FileNotFoundError, match=r"no temperatures for calibration at .*Fit them by"):
        read_temperatures(weights, flip_test=False)


def test_another_place_may_be_named(tmp_path: Path):
    weights = fit(tmp_path)
    moved = (tmp_path / "evaluation" / FILE_NAME).rename(tmp_path / "mine.json")
    assert list(read_temperatures(weights, flip_test=False, path=moved)["combinations"]) == list(NAMES)


def test_those_of_other_weights_or_another_use_of_flips_are_refused(tmp_path: Path):
    weights = fit(tmp_path, flip_test=True)
    with pytest.raises(ValueError, match="was fitted with flip_test True, not with False"):
        read_temperatures(weights, flip_test=False)
    weights.write_bytes(b"others")
    with pytest.raises(ValueError, match=r"is of other weights than .*Fit them"):
        read_temperatures(weights, flip_test=True)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"weights_sha256": ""})])
def test_a_damaged_file_is_named(tmp_path: Path, content: str):
    weights = fit(tmp_path)
    (tmp_path / "evaluation" / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=rf"{FILE_NAME} cannot be read .*Fit them"):
        read_temperatures(weights, flip_test=False)
