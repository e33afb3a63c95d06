"""Bad cases and bad weights in the workflows of a bundle, within this process, and without a network."""

from __future__ import annotations

import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from passion_monai.datasets.phantom import write_phantom

pytestmark = pytest.mark.parametrize("bundle", ["brats_rfnet_passion"], indirect=True)


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def small(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle with a small network, whose process cannot connect to anything."""

    def refuse(*_: Any) -> None:
        raise OSError("nothing is fetched at run time")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return bundle


def run(bundle: Any, *files: str, run_id: str = "run", **overrides: Any) -> str:
    """What a workflow ends with: nothing, or the text of the first error."""
    settings = bundle.small | {"bundle_root": str(bundle.folder)} | overrides
    config = [str(bundle.folder / "configs" / f"{name}.yaml") for name in files]
    workflow = ConfigWorkflow(config, workflow_type=None, logging_file=False, run_id=run_id, **settings)
    try:
        workflow.initialize()
        workflow.run()
    except (RuntimeError, ValueError) as error:
        while error.__cause__ is not None and not str(error).startswith(("Checkpoint", "1 case", "2 case", "3 case")):
            error = error.__cause__
        return str(error)
    return ""


def spoil(data: Path, case: str) -> None:
    (data / case / f"{case}_t1.nii.gz").write_bytes(b"no image")


def test_bad_cases_from_training_to_inference(small: Any, tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom("brats", data, **(small.small["phantom"] | {"num_cases": 6}))
    places = {"dataset_dir": str(data), "output_dir": str(out)}
    training = {"run_id": "training", "epochs": 1, "val_interval": 1, **places}
    assert run(small, "train", run_id="check", **places) == ""
    assert run(small, "train", **training) == ""
    datalist = json.loads((out / "datalist.json").read_text())
    bad, good = (entry["case"] for entry in datalist["test"])
    spoil(data, bad)

    said = run(small, "evaluate", **places)
    assert f"1 case(s) cannot be used:\nCase {bad}: t1 file" in said
    scores = list(csv.DictReader((out / "evaluation" / "scores.csv").read_text().splitlines()))
    assert {row["case"] for row in scores} == {good}
    assert len(scores) == 15 * 3
    assert "1 cases." in (out / "evaluation" / "table.md").read_text()
    (fault,) = csv.DictReader((out / "evaluation" / "failed_cases.csv").read_text().splitlines())
    assert (fault["case"], fault["file"]) == (bad, str(data / bad / f"{bad}_t1.nii.gz"))

    said = run(small, "inference", ckpt_path=str(out / "models" / "model.pt"), **places)
    assert f"1 case(s) cannot be used:\nCase {bad}: t1 file" in said
    assert len(list((out / "predictions").glob("*_seg.nii.gz"))) == 5

    for section in ("training", "validation"):
        spoil(data, datalist[section][0]["case"])
    said = run(small, "train", missing_rates=[0.0] * 4, **training)
    assert "2 case(s) cannot be used" in said
    assert all(datalist[section][0]["case"] in said for section in ("training", "validation"))
    said = run(small, "train", run_id="check", **places)
    assert "3 case(s) cannot be used" in said
    assert "the other 3 cases are in order" in said


@pytest.mark.parametrize("where", ["evaluate", "inference", "finetune", "resume"])
def test_weights_with_code_are_refused_and_do_not_run(small: Any, tmp_path: Path, where: str):
    (tmp_path / "models").mkdir()
    for name in ("model.pt", "last.pt"):
        torch.save({"model": Harmful(tmp_path / "ran")}, tmp_path / "models" / name)
    weights = str(tmp_path / "models" / "model.pt")
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "phantom::num_cases": 6}
    if where in ("evaluate", "inference"):
        said = run(small, where, ckpt_path=weights, **settings)
    elif where == "finetune":
        said = run(small, "train", "finetune", pretrained_weights=weights, **settings)
    else:
        said = run(small, "train", resume=True, epochs=1, **settings)
    assert "cannot be read as tensors" in said or "Weights only load failed" in said
    assert not (tmp_path / "ran").exists()
