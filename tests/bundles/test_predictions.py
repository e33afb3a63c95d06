"""What inference and evaluation can do with predictions: average them over flips and checkpoints, and write them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Bundle
from monai.bundle import ConfigWorkflow

pytestmark = pytest.mark.parametrize("bundle", ["brats_rfnet_passion"], indirect=True)


def workflow(bundle: Bundle, name: str | list[str], **overrides: Any) -> ConfigWorkflow:
    settings = bundle.small | {"bundle_root": str(bundle.folder)} | overrides
    files = [str(bundle.config(one)) for one in ([name] if isinstance(name, str) else name)]
    return ConfigWorkflow(files, workflow_type=None, logging_file=False, **settings)


def run(bundle: Bundle, name: str | list[str], **overrides: Any) -> None:
    running = workflow(bundle, name, **overrides)
    running.initialize()
    running.run()


@pytest.fixture
def checkpoints(bundle: Bundle, tmp_path: Path) -> list[str]:
    """Weights that nobody trained, of two seeds."""
    paths = []
    for seed in (1, 2):
        started = workflow(bundle, "inference", seed=seed)
        started.initialize()
        network = started.parser.get_parsed_content("network_def")
        paths.append(str(tmp_path / f"{seed}.pt"))
        torch.save(network.state_dict(), paths[-1])
    return paths


def probabilities(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: nib.load(path).get_fdata() for path in sorted((folder / "predictions").glob("*_prob.nii.gz"))}


def test_probabilities_of_flips_and_checkpoints(bundle: Bundle, checkpoints: list[str], tmp_path: Path):
    settings: dict[str, Any] = {"save_probabilities": True, "phantom::num_cases": 2, "missing_rates": None}
    runs = {"first": checkpoints[0], "second": checkpoints[1], "both": checkpoints}
    for name, path in runs.items():
        run(bundle, "inference", output_dir=str(tmp_path / name), ckpt_path=path, **settings)
    first, second, both = (probabilities(tmp_path / name) for name in runs)
    assert len(first) == 2
    for name, mean in both.items():
        np.testing.assert_allclose(mean, (first[name] + second[name]) / 2, atol=1e-3)
        assert not np.allclose(first[name], second[name], atol=1e-3)
        segmentation = nib.load(tmp_path / "both" / "predictions" / name.replace("_prob", "_seg"))
        assert mean.shape == (*segmentation.shape, 4)
        np.testing.assert_allclose(mean.sum(axis=-1), 1, atol=1e-3)
        agree = np.array([0, 1, 2, 4])[mean.argmax(axis=-1)] == segmentation.get_fdata()
        assert agree.mean() > 0.999  # rounding makes ties

    run(bundle, "inference", output_dir=str(tmp_path / "flips"), ckpt_path=checkpoints[0], flip_test=True, **settings)
    for name, mean in probabilities(tmp_path / "flips").items():
        assert not np.allclose(mean, first[name], atol=1e-3)


def test_evaluation_of_flips_and_checkpoints(bundle: Bundle, checkpoints: list[str], tmp_path: Path):
    scores = []
    for settings in ({"ckpt_path": checkpoints[0]}, {"ckpt_path": checkpoints, "flip_test": True}):
        run(bundle, "evaluate", output_dir=str(tmp_path), calibration=False, **settings)
        scores.append((tmp_path / "evaluation" / "scores.csv").read_text())
    before, after = (list(csv.DictReader(text.splitlines())) for text in scores)
    assert len(before) == len(after) > 0
    assert before != after  # and not gone on with


def test_calibrated_probabilities(bundle: Bundle, checkpoints: list[str], tmp_path: Path):
    weights = tmp_path / "run" / "models" / "model.pt"
    weights.parent.mkdir(parents=True)
    Path(checkpoints[0]).rename(weights)
    folder = weights.parents[1]
    settings: dict[str, Any] = {"save_probabilities": True, "phantom::num_cases": 2, "missing_rates": None}
    settings |= {"ckpt_path": str(weights)}
    with pytest.raises(RuntimeError) as error:
        run(bundle, "inference", output_dir=str(tmp_path / "none"), calibrated=True, **settings)
    assert "no temperatures for calibration at" in str(last_cause(error.value))

    cohort = {"phantom::num_cases": 12}  # one of them for validation
    run(bundle, ["evaluate", "calibrate"], output_dir=str(folder), **cohort)
    assert not (folder / "evaluation" / "scores.csv").exists()
    fitted = json.loads((folder / "evaluation" / "temperatures.json").read_text())["combinations"]
    assert len(fitted) == 15
    run(bundle, "evaluate", output_dir=str(folder), calibrated=True, **cohort)
    table = pd.read_csv(folder / "evaluation" / "calibration.csv")
    assert table["ece_calibrated"].mean() < table["ece"].mean()  # nobody trained it, and it is far too sure or unsure

    for name, calibrated in (("plain", False), ("calibrated", True)):
        run(bundle, "inference", output_dir=str(tmp_path / name), calibrated=calibrated, **settings)
    plain, scaled = (probabilities(tmp_path / name) for name in ("plain", "calibrated"))
    for name, before in plain.items():
        assert not np.allclose(before, scaled[name], atol=1e-3)
        paths = [tmp_path / run / "predictions" / name.replace("_prob", "_seg") for run in ("plain", "calibrated")]
        classes = [nib.load(path).get_fdata() for path in paths]
        np.testing.assert_array_equal(*classes)
        record = json.loads(paths[1].with_name(name.replace("_prob.nii.gz", "_seg.json")).read_text())
        assert record["calibration"]["temperature"] == fitted["flair+t1ce+t1+t2"]["temperature"]


def last_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else last_cause(error.__cause__)
