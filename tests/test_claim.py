from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest

from passion_monai import claim
from passion_monai.claim import claim_folder
from passion_monai.distributed import Agreement
from passion_monai.evaluation.metrics import CombinationScores

PROCESSES = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
IN_USE = "is in use by the training of process {} on {}. Give another --output_dir; or .* --resume True"


def hold(folder: Path, connection: Connection) -> None:
    """A training with a process that loads cases, which is forked from it and outlives it."""
    claim_folder(folder, resume=False, overwrite=False)
    loader = PROCESSES.Process(target=time.sleep, args=(60,))
    loader.start()
    connection.send(loader.pid)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """A process that trains in `tmp_path`."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=hold, args=(tmp_path, there))
    process.start()
    loader = here.recv()
    yield process
    process.kill()
    os.kill(loader, signal.SIGKILL)


def refused(action: Callable[[], None], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
def test_the_second_of_two_trainings_is_refused(holder: Any, tmp_path: Path, resume: bool):
    said = IN_USE.format(holder.pid, platform.node())
    with pytest.raises(RuntimeError, match=f"{tmp_path} {said}"):
        claim_folder(tmp_path, resume=resume, overwrite=not resume)


def test_a_killed_training_leaves_no_lock_though_a_process_of_it_lives(holder: Any, tmp_path: Path):
    holder.kill()
    holder.join()
    claim_folder(tmp_path, resume=True, overwrite=False)
    assert str(os.getpid()) in (tmp_path / ".training.lock").read_text()


def test_one_process_may_train_in_a_folder_again_and_others_may_not_meanwhile(tmp_path: Path):
    for _ in range(2):
        claim_folder(tmp_path, resume=True, overwrite=False)
    here, there = PROCESSES.Pipe()

    def other() -> None:
        there.send(refused(lambda: claim_folder(tmp_path, resume=True, overwrite=False), RuntimeError))

    process = PROCESSES.Process(target=other)
    process.start()
    process.join()
    assert f"process {os.getpid()} on" in here.recv()


def test_the_second_of_two_evaluations_is_refused(tmp_path: Path):
    def evaluate() -> CombinationScores:
        return CombinationScores(tmp_path, modalities=("flair", "t1"), regions={"tumour": (1,)})

    evaluate()
    evaluate()  # in the same process
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=lambda: there.send(refused(evaluate, RuntimeError)))
    process.start()
    process.join()
    said = here.recv()
    assert said.startswith(f"{tmp_path} is in use by the evaluation of process {os.getpid()} on")
    assert said.endswith("repeat the command: cases that were scored are kept.")


def test_weights_are_not_replaced_unless_it_is_asked_for(tmp_path: Path):
    (tmp_path / "models").mkdir()
    claim_folder(tmp_path, resume=False, overwrite=False)
    for name in ("model.pt", "last.pt"):
        (tmp_path / "models" / name).touch()
    said = refused(lambda: claim_folder(tmp_path, resume=False, overwrite=False), ValueError)
    assert said.startswith(f"{tmp_path / 'models'} holds last.pt, model.pt, which a new training would replace.")
    assert all(remedy in said for remedy in ("--resume True", "another --output_dir", "--overwrite True"))
    claim_folder(tmp_path, resume=True, overwrite=False)
    claim_folder(tmp_path, resume=False, overwrite=True)


def test_a_training_that_cannot_be_resumed_does_not_replace_weights_that_came_from_elsewhere(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").touch()
    for resume in (False, True):
        said = refused(lambda resume=resume: claim_folder(tmp_path, resume=resume, overwrite=False), ValueError)
        assert "--resume" not in said
    claim_folder(tmp_path, resume=True, overwrite=True)


def test_other_processes_of_a_training_fail_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    claim_folder(tmp_path / "there", resume=False, overwrite=False)
    assert not (tmp_path / "there").exists()
    monkeypatch.setattr(Agreement, "any", lambda *_: True)
    with pytest.raises(RuntimeError, match="The first process says why it cannot train in"):
        claim_folder(tmp_path, resume=False, overwrite=False)


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim, "_lock_file", fail)
    with caplog.at_level(logging.WARNING):
        claim_folder(tmp_path, resume=False, overwrite=False)
    assert "cannot be locked (No locks available): start no second training in this folder" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"Cannot write {tmp_path / 'file'}"):
        claim_folder(tmp_path / "file", resume=False, overwrite=False)
