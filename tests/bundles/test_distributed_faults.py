"""Two processes of which one is killed, anywhere in a training: the other ends too, and both go on as if never stopped.

They are forked instead of started by torchrun, which would end the other process by itself.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import create_workflow

from passion_monai.datasets import discover, get_spec
from passion_monai.datasets.cache import FileCacheDataset
from passion_monai.datasets.datalist import write_datalist
from passion_monai.datasets.phantom import write_phantom
from passion_monai.datasets.splitting import split_cases
from passion_monai.handlers import TrainingLog
from passion_monai.resume import LastCheckpoint, _CheckpointFiles

PROCESSES = multiprocessing.get_context("fork")
SECONDS_TO_END = 60
Patch = Callable[[], None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.parametrize("bundle", ["myops_rfnet_passion"], indirect=True),
]


class Cohort:
    """Trainings of a bundle by two processes on the same few cases."""

    def __init__(self, bundle: Any, folder: Path) -> None:
        self.folder = folder
        self.config = [str(bundle.folder / "configs" / f"{name}.yaml") for name in ("train", "multi_gpu_train")]
        phantom = bundle.small["phantom"] | {"num_cases": 10, "shape": [40, 40, 1]}
        write_phantom(bundle.dataset, folder / "data", **phantom)
        splits = split_cases(discover(bundle.dataset, folder / "data"), sizes=(7, 3, 0), seed=0)
        write_datalist(folder / "list.json", splits, spec=get_spec(bundle.dataset), root=folder / "data")
        self.settings = {name: value for name, value in bundle.small.items() if name != "phantom"} | {
            "datalist": str(folder / "list.json"),
            "cache_dir": str(folder / "cache"),
            "bundle_root": str(bundle.folder),
            "epochs": 2,
            "val_interval": 1,
        }

    def train(
        self, output: Path, *, count: int = 2, patches: dict[int, Patch] | None = None, **settings: Any
    ) -> list[Any]:
        """Start the processes, or one alone; patches are made in some of them."""
        output.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = self.settings | {"output_dir": str(output)} | settings
        processes = [
            PROCESSES.Process(target=self._run, args=(rank, count, port, output, options, (patches or {}).get(rank)))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        return processes

    def _run(
        self, rank: int, count: int, port: int, output: Path, options: dict[str, Any], patch: Patch | None
    ) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = (output / f"log{rank}.txt").open("w", buffering=1)
        logging.basicConfig(force=True)  # to there, instead of to the tests
        if patch is not None:
            patch()
        workflow = create_workflow(config_file=self.config[:count], logging_file=False, run_id="training", **options)
        workflow.run()
        workflow.finalize()

    def finish(self, output: Path, **settings: Any) -> Path:
        """A training that must not fail."""
        processes = self.train(output, **settings)
        for rank, process in enumerate(processes):
            process.join(300)
            assert process.exitcode == 0, (output / f"log{rank}.txt").read_text()[-3000:]
        return output


@pytest.fixture(scope="module")
def cohort(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(bundle, tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def reference(cohort: Cohort) -> dict[str, Any]:
    """What a training leaves that nothing happened to."""
    return results(cohort.finish(cohort.folder / "reference"))


def results(output: Path) -> dict[str, Any]:
    """All that a training leaves, bit by bit."""
    files = {name: torch.load(output / "models" / f"{name}.pt", weights_only=True) for name in ("last", "model")}
    return flat(files) | {"training.csv": (output / "training.csv").read_text()}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every number in nested containers, a tensor as its bytes."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: entry for key, item in items for path, entry in flat(item, f"{name}/{key}").items()}
    return {name: repr(value)}


def at_call(owner: type, method: str, count: int, number_of_signal: int = signal.SIGKILL) -> Patch:
    """Send the process a signal when a method is called for the n-th time."""

    def patch() -> None:
        before, number = getattr(owner, method), iter(range(1, 1000))

        def call(*arguments: Any, **more: Any) -> Any:
            if next(number) == count:
                os.kill(os.getpid(), number_of_signal)
            return before(*arguments, **more)

        setattr(owner, method, call)

    return patch


MOMENTS: dict[str, tuple[int, type, str, int]] = {
    "in an epoch": (1, LastCheckpoint, "_after_iteration", 5),
    "the first in an epoch": (0, LastCheckpoint, "_after_iteration", 5),
    "before validation": (1, LastCheckpoint, "_before_validation", 2),
    "after validation": (0, LastCheckpoint, "_after_validation", 1),
    "writing a checkpoint": (0, _CheckpointFiles, "write", 2),
    "at the end of an epoch": (1, TrainingLog, "_write", 2),
}


@pytest.mark.parametrize(
    "moment", ["in an epoch", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MOMENTS)[1:])]
)
def test_one_is_killed_the_other_ends_and_both_go_on(
    cohort: Cohort, reference: dict[str, Any], tmp_path: Path, moment: str
):
    rank, *where = MOMENTS[moment]
    processes = cohort.train(tmp_path, patches={rank: at_call(*where)}, resume=True)
    killed, other = processes[rank], processes[1 - rank]
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / f"log{rank}.txt").read_text()[-3000:]
    other.join(SECONDS_TO_END)
    assert other.exitcode == 1, f"exit code {other.exitcode} after {SECONDS_TO_END} s"
    assert "--resume True continues from there" in (tmp_path / f"log{1 - rank}.txt").read_text()
    assert results(cohort.finish(tmp_path, resume=True)) == reference


def test_one_is_killed_while_cases_are_preprocessed(cohort: Cohort, tmp_path: Path):
    settings = {"cache_dir": str(tmp_path / "cache"), "epochs": 1}
    processes = cohort.train(tmp_path, patches={1: at_call(FileCacheDataset, "_try", 2)}, **settings)
    processes[1].join(300)
    assert processes[1].exitcode == -signal.SIGKILL
    processes[0].join(SECONDS_TO_END)
    assert processes[0].exitcode == 1
    cohort.finish(tmp_path, **settings)
    assert not list((tmp_path / "cache").glob(".*"))


def test_fewer_samples_than_processes_are_an_error_in_both(cohort: Cohort, tmp_path: Path):
    content = json.loads((cohort.folder / "list.json").read_text())
    content["training"] = content["training"][:1]
    (tmp_path / "list.json").write_text(json.dumps(content))
    settings = {"datalist": str(tmp_path / "list.json"), "simulate_missing": False}
    for rank, process in enumerate(cohort.train(tmp_path, **settings)):
        process.join(300)
        assert process.exitcode == 1
        assert "1 training samples are too few for 2 processes" in (tmp_path / f"log{rank}.txt").read_text()


def test_a_batch_that_not_all_samples_of_a_process_fill(cohort: Cohort, tmp_path: Path):
    """Two samples for each process, in batches of three."""
    cohort.finish(tmp_path, epochs=1, batch_size=3)
    (row,) = (tmp_path / "training.csv").read_text().splitlines()[1:]
    assert row.startswith("1,")


def test_another_number_of_processes_within_an_epoch_is_refused(cohort: Cohort, tmp_path: Path):
    terminate = at_call(LastCheckpoint, "_after_iteration", 2, signal.SIGTERM)
    for process in cohort.train(tmp_path, patches={1: terminate}):
        process.join(300)
        assert process.exitcode == -signal.SIGTERM
    (alone,) = cohort.train(tmp_path, count=1, resume=True)
    alone.join(300)
    assert alone.exitcode == 1
    said = (tmp_path / "log0.txt").read_text()
    assert re.search(r"within an epoch, with epoch_length 3 instead of \d, processes 2 instead of 1: go on with", said)
