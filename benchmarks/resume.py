"""Kill trainings at random and compare what they end with: `python -m benchmarks.resume --output runs/resume`.

Each training of a small bundle is killed once, anywhere between its start and its end, and run again with `resume`. The
last and the best checkpoint and training.csv must be those of a training that was never killed, bit for bit. All
trainings are forked from one process, which has imported what they need.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.bundle import create_workflow
from torch import Tensor

from passion_monai.datasets import discover, get_spec
from passion_monai.datasets.datalist import write_datalist
from passion_monai.datasets.phantom import write_phantom
from passion_monai.datasets.splitting import split_cases

__all__: list[str] = []

CONFIG = Path(__file__).parents[1] / "bundles" / "myops_mmformer_passion" / "configs" / "train.yaml"
SMALL: dict[str, Any] = {
    "device": "cpu",  # a GPU cannot be used by a process that was forked
    "roi_size": [32, 32],
    "spacing": [6.0, 6.0],
    "network_def::width": 2,
    "network_def::token_channels": 16,
    "network_def::num_heads": 2,
    "network_def::mlp_channels": 32,
    "val_interval": 2,
}
PHANTOM: dict[str, Any] = {"num_cases": 13, "shape": [40, 40, 1], "spacing": [5.0, 5.0, 10.0], "seed": 0}
FAULTS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGTERM to all": signal.SIGTERM}
"""A cluster may send SIGTERM to the processes that load cases too."""


def train(output: Path, settings: dict[str, Any]) -> None:
    """One training, as the command runs it; what it prints goes to a file."""
    os.setpgrp()
    torch.set_num_threads(1)
    with (output / "log.txt").open("a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        options = SMALL | settings | {"output_dir": str(output), "run_id": "training"}
        workflow = create_workflow(config_file=str(CONFIG), logging_file=False, **options)
        workflow.run()
        workflow.finalize()


def write_cohort(output: Path) -> str:
    """A phantom cohort, and its datalist with cases for validation, which the data set's own split has none of."""
    write_phantom("myops", output / "phantom", **PHANTOM)
    splits = split_cases(discover("myops", output / "phantom"), sizes=(9, 4, 0), seed=0)
    write_datalist(output / "datalist.json", splits, spec=get_spec("myops"), root=output / "phantom")
    return str(output / "datalist.json")


def start(output: Path, settings: dict[str, Any]) -> BaseProcess:
    """A training in a process of its own."""
    output.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(output, settings))
    process.start()
    return process


def finish(output: Path, settings: dict[str, Any]) -> None:
    """A training that must not fail."""
    process = start(output, settings)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"A training ended with {process.exitcode}: see {output / 'log.txt'}.")


def same(left: Any, right: Any) -> bool:
    """Whether nested containers are equal, tensors and NaN bit by bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and bool(left.numpy().tobytes() == right.numpy().tobytes())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


def same_results(left: Path, right: Path) -> bool:
    """Whether two trainings have left the same."""
    names = ("models/last.pt", "models/model.pt")
    states = [
        [torch.load(folder / name, map_location="cpu", weights_only=True) for name in names] for folder in (left, right)
    ]
    logs = [(folder / "training.csv").read_bytes() for folder in (left, right)]
    return same(*states) and logs[0] == logs[1]


def kill_once(folder: Path, settings: dict[str, Any], fault: str, seconds: float) -> bool:
    """Kill a training after some seconds; whether that was before its end."""
    process = start(folder, settings)
    time.sleep(seconds)
    if not process.is_alive() or process.pid is None:
        return False
    (os.killpg if fault == "SIGTERM to all" else os.kill)(process.pid, FAULTS[fault])
    process.join()
    return process.exitcode == -FAULTS[fault]


def attempt(reference: Path, folder: Path, settings: dict[str, Any], fault: str, seconds: float) -> dict[str, Any]:
    """What came of one training that was killed and went on."""
    killed = kill_once(folder, settings, fault, seconds)
    while not killed:  # it had ended before
        shutil.rmtree(folder)
        seconds *= 0.7
        killed = kill_once(folder, settings, fault, seconds)
    try:
        finish(folder, settings)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return {"lost": True, "wrong": False}
    return {"lost": False, "wrong": not same_results(reference, folder)}


def references(output: Path, settings: dict[str, Any]) -> dict[int, tuple[Path, float]]:
    """For each number of workers, a training that was not killed, and its seconds when all cases are cached."""
    found = {}
    for workers in (0, 2):
        folder, again = output / f"reference_{workers}", output / f"again_{workers}"
        finish(folder, settings | {"num_workers": workers})
        began = time.monotonic()
        finish(again, settings | {"num_workers": workers})
        found[workers] = folder, time.monotonic() - began
        if not same_results(folder, again):
            raise RuntimeError(f"Trainings in {folder} and {again} differ without being killed.")
    return found


def main() -> None:
    """Kill and compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/resume"), help="folder, which is emptied")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    torch.optim.AdamW([torch.zeros(1)])  # imports much, once for all
    settings = {"epochs": arguments.epochs, "datalist": write_cohort(output), "cache_dir": str(output / "cache")}
    uninterrupted, rng, rows = references(output, settings), random.Random(arguments.seed), []
    for number in range(arguments.kills):
        workers, fault = (0, 2)[number % 2], ("SIGKILL", "SIGTERM", "SIGKILL", "SIGTERM to all")[number // 2 % 4]
        reference, duration = uninterrupted[workers]
        seconds = rng.uniform(0, duration)
        result = attempt(
            reference, output / str(number), settings | {"num_workers": workers, "resume": True}, fault, seconds
        )
        rows.append({"fault": fault, "workers": workers} | result)
        print(f"{number + 1} of {arguments.kills}: {rows[-1]} after {seconds:.1f} of {duration:.1f} s", file=sys.stderr)
    counts = {
        "tried": ("lost", "size"),
        "lost": ("lost", "sum"),
        "wrong": ("wrong", "sum"),
    }
    print(pd.DataFrame(rows).groupby(["fault", "workers"]).agg(**counts).to_string())


if __name__ == "__main__":
    main()
