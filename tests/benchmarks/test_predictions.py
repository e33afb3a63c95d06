from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.predictions import main, make_workflow
from passion_monai.datasets.myops import discover
from passion_monai.datasets.phantom import write_phantom

SETTINGS = {"spacing": [6.0, 6.0], "roi_size": [32, 32], "num_workers": 0, "network_def::width": 4}


@pytest.mark.slow
def test_a_row_for_each_way_to_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cohort = tmp_path / "cohorts" / "myops"
    write_phantom("myops", cohort, num_cases=3, shape=(40, 40, 2), spacing=(5.0, 5.0, 10.0))
    modalities = ["bssfp", "lge", "t2"]
    content = {"dataset": "myops", "modalities": modalities, "root": str(cohort), "test": discover(cohort)}
    cohort.with_suffix(".json").write_text(json.dumps(content, default=str))
    scale = tmp_path / "scale.yaml"
    scale.write_text(yaml.safe_dump({"output": str(tmp_path), "cohorts": {"myops": {"settings": SETTINGS}}}))
    for seed in (1, 2):
        arguments = Namespace(scale=scale, cohort="myops", backbone="rfnet")
        workflow = make_workflow("inference", arguments, seed=seed)
        workflow.initialize()
        (tmp_path / f"run{seed}" / "models").mkdir(parents=True)
        network = workflow.parser.get_parsed_content("network_def")
        torch.save(network.state_dict(), tmp_path / f"run{seed}" / "models" / "model.pt")
    words = [str(tmp_path / "run1"), str(tmp_path / "run2"), "--scale", str(scale), "--backbone", "rfnet"]
    words += ["--flip_axes", "0", "--output", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", ["predictions", *words])
    main()
    names = ["plain", "with save_probabilities", "flips along [0]", "mean of 2 checkpoints"]
    lines = capsys.readouterr().out.splitlines()
    found = {name: line for name in names for line in lines if line.startswith(f"{name}  ")}
    assert list(found) == names
    dice = {name: float(line[33:39]) for name, line in found.items()}
    difference = {name: float(line[40:].split()[0]) for name, line in found.items()}
    assert difference["plain"] == difference["with save_probabilities"] == 0
    assert dice["with save_probabilities"] == dice["plain"]
    assert dice["flips along [0]"] != dice["plain"] != dice["mean of 2 checkpoints"]
    for name in names:
        assert difference[name] == pytest.approx(dice[name] - dice["plain"], abs=0.02), name
    ratios = {name: float(line.split()[-1]) for name, line in found.items()}
    assert ratios["plain"] == 1
    assert ratios["flips along [0]"] > 1
    assert len(list((tmp_path / "output" / "with_save_probabilities" / "predictions").glob("*_prob.nii.gz"))) == 3
