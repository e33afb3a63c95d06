"""What the real command ends with: words for what its user can mend, a traceback for the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_NAME, ROOT

BUNDLE = BY_NAME["myops_rfnet_passion"]
TRAIN = ("run", "training")
MISTAKES: list[tuple[tuple[str, ...], str, dict[str, Any], str]] = [
    (TRAIN, "train", {"epoch": 3}, "Unknown ids: epoch (did you mean epochs?)"),
    (TRAIN, "train", {"epochs": "ten"}, "epochs must be a whole number of at least 1, got 'ten'."),
    (TRAIN, "train", {"debug": "yes"}, "debug must be True or False"),
    (TRAIN, "train", {"device": "gpu"}, "device must be cpu, cuda"),
    (TRAIN, "train", {"output_dir": 2020}, "output_dir must be a path, got 2020"),
    (TRAIN, "train", {"label_values": 3}, "label_values must be a list"),
    (TRAIN, "train", {"dataset_dir": "/nowhere"}, "root /nowhere is not a folder"),
    (TRAIN, "train", {"datalist": "/nowhere.json"}, "Datalist /nowhere.json does not exist"),
    (TRAIN, "train", {"network_def::widht": 4}, "RFNet.__init__() got an unexpected keyword argument 'widht'"),
    (("run", "trainin"), "train", {}, "There is nothing called trainin to run (did you mean training?)."),
    (("run", "check"), "train", {"dataset_dir": "/nowhere"}, "root /nowhere is not a folder"),
    (("run",), "evaluate", {"datalist": "/nowhere.json"}, "Datalist /nowhere.json does not exist"),
    (("run",), "inference", {"files": "{'t9': 'x.nii'}"}, "files: unknown key 't9'"),
    (("run",), "inference", {"ckpt_path": "/nowhere.pt"}, "There is no checkpoint /nowhere.pt"),
]


def run(words: tuple[str, ...], workflow: str, output: Path, **overrides: Any) -> Any:
    settings = BUNDLE.small | {"output_dir": output} | overrides
    return BUNDLE.monai(*words, config_file=BUNDLE.config(workflow), **settings)


@pytest.mark.parametrize(("words", "workflow", "overrides", "said"), MISTAKES)
def test_a_mistake_is_the_last_thing_said(
    tmp_path: Path, words: tuple[str, ...], workflow: str, overrides: dict[str, Any], said: str
):
    result = run(words, workflow, tmp_path, **overrides)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {said}")
    assert "Traceback" not in result.stdout + result.stderr


def test_bad_cases_are_the_last_thing_said(tmp_path: Path):
    for name in ("C0", "DE"):
        (tmp_path / f"myops_training_101_{name}.nii.gz").write_bytes(b"no image")
    result = run(("run",), "inference", tmp_path / "out", dataset_dir=tmp_path, ckpt_path=weights(tmp_path))
    assert result.returncode == 1
    said = result.stderr[result.stderr.rindex("\nError: ") :]
    assert said.startswith("\nError: 1 case(s) cannot be used:\nCase myops_training_101: bssfp file ")
    assert said.endswith("all other cases are complete.\n")
    assert "Traceback" not in result.stdout + result.stderr


def weights(folder: Path) -> Path:
    """Those that the small network begins with."""
    import torch
    from monai.bundle import create_workflow

    settings = BUNDLE.small | {"bundle_root": str(BUNDLE.folder)}
    workflow = create_workflow(config_file=BUNDLE.config("inference"), logging_file=False, **settings)
    torch.save(workflow.parser.get_parsed_content("network_def").state_dict(), folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"debug": True, "epoch": 3}, "ValueError: Unknown ids: epoch"), ({"network_def::width": [4]}, "TypeError: ")],
)
def test_tracebacks_of_faults_and_for_who_wants_them(tmp_path: Path, overrides: dict[str, Any], said: str):
    result = run(TRAIN, "train", tmp_path, **overrides)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert said in result.stderr
    assert "\nError: " not in result.stderr


@pytest.mark.slow
def test_every_process_of_several_says_it(tmp_path: Path):
    """As torchrun starts them, which adds a report of its own."""
    options = {"output_dir": tmp_path, "epoch": 3, "config_file": BUNDLE.config("train", "multi_gpu_train")}
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "monai.bundle", "run", "training"]
    words = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "\nError: Unknown ids: epoch (did you mean epochs?)" in result.stderr
    assert "Failed to instantiate" not in result.stderr
