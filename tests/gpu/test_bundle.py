"""The bundles' own commands and configurations, on a phantom of hearts that needs no data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.bundle import create_workflow
from monai_command import printed, run_command

CONFIGS = Path(__file__).parents[2] / "bundles" / "myops_rfnet_passion" / "configs"
SMALL: dict[str, Any] = {
    "roi_size": [32, 32],
    "spacing": [6.0, 6.0],
    "phantom": {"num_cases": 10, "shape": [40, 40, 3], "spacing": [5.0, 5.0, 10.0], "seed": 0},
    "network_def::width": 4,
    "epochs": 2,
    "val_interval": 1,
}
# A training with algorithms that give the same each time, which kills itself once so many epochs are saved.
DETERMINISTIC = """
import os, runpy, signal, sys
import torch
from passion_monai.resume import LastCheckpoint

torch.use_deterministic_algorithms(True)
last = int(sys.argv.pop(1))
save = LastCheckpoint._save

def save_and_die(self, trainer, epochs, iterations):
    save(self, trainer, epochs, iterations)
    if (epochs, iterations) == (last, 0):
        os.kill(os.getpid(), signal.SIGKILL)

LastCheckpoint._save = save_and_die
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


def words(workflow: str, device: torch.device, **settings: Any) -> list[str]:
    """Those of a command after `python -m monai.bundle`."""
    names = ["run", "training"] if workflow == "train" else ["run"]
    known = {
        name: value for name, value in SMALL.items() if workflow == "train" or name not in ("epochs", "val_interval")
    }
    settings = {
        "config_file": CONFIGS / f"{workflow}.yaml",
        "device": f"$torch.device('{device}')",
        **known,
        **settings,
    }
    return [*names, *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


def test_the_commands_train_evaluate_and_infer(device: torch.device, tmp_path: Path):
    for workflow in ("train", "evaluate", "inference"):
        weights = {"ckpt_path": tmp_path / "models" / "model.pt"} if workflow == "inference" else {}
        command = words(workflow, device, output_dir=tmp_path, num_workers=1, **weights)
        printed(run_command(command, CONFIGS.parents[2]))
    assert len(pd.read_csv(tmp_path / "training.csv")) == 2
    assert pd.read_csv(tmp_path / "evaluation" / "scores.csv")["dice"].between(0, 1).all()
    assert list((tmp_path / "predictions").glob("*_seg.nii.gz"))


def train_deterministically(device: torch.device, folder: Path, *, kill_after: int = -1, resume: bool = False) -> int:
    command = words("train", device, output_dir=folder, num_workers=0, resume=resume, epochs=3)
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC, str(kill_after), *command],
        cwd=CONFIGS.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode in (0, -signal.SIGKILL), process.stderr[-8000:]
    return process.returncode


def test_a_killed_training_goes_on_bit_for_bit(device: torch.device, tmp_path: Path):
    assert train_deterministically(device, tmp_path / "whole") == 0
    assert train_deterministically(device, tmp_path / "killed", kill_after=1) == -signal.SIGKILL
    assert train_deterministically(device, tmp_path / "killed", resume=True) == 0
    whole, resumed = (
        torch.load(tmp_path / name / "models" / "last.pt", map_location="cpu", weights_only=True)
        for name in ("whole", "killed")
    )
    assert whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    assert torch.equal(whole["loss"]["beta"], resumed["loss"]["beta"])
    logs = [(tmp_path / name / "training.csv").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def set_sync_debug_mode(device: torch.device, mode: str) -> None:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_iterations_wait_for_nothing(device: torch.device, tmp_path: Path):
    """All of a bundle's training, its logs and its progress bar, but for one in ten iterations, which reads values."""
    settings = {**SMALL, "epochs": 1, "device": device, "num_workers": 1, "output_dir": str(tmp_path)}
    workflow = create_workflow(
        workflow_type="train", config_file=str(CONFIGS / "train.yaml"), bundle_root=str(CONFIGS.parent), **settings
    )
    trainer = workflow.parser.get_parsed_content("train::trainer")
    modes = []
    for iteration, mode in ((2, "error"), (10, "default")):
        trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration), set_sync_debug_mode, device, mode)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration), modes.append, mode)
    try:
        workflow.run()
    finally:
        set_sync_debug_mode(device, "default")
    assert modes == ["error", "default"]
