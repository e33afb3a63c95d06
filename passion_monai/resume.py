"""A training that may be killed at any moment, and goes on as if it had not been."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import multiprocessing
import signal
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile, ZipFile

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint
from ignite.utils import manual_seed
from monai.data.utils import set_rnd
from monai.engines import Workflow
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from passion_monai.distributed import Agreement
from passion_monai.faults import explain
from passion_monai.files import remove_unfinished, save_complete

__all__ = ["LastCheckpoint", "PolynomialLR", "Seeding"]

logger = logging.getLogger(__name__)
_BROKEN = (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)
"""What `zipfile` raises for files that are cut off or damaged."""


class Seeding:
    """Makes all that is drawn in training a function of the seed, the epoch, the iteration and the process.

    The samples' order and augmentation come from what is set when an epoch starts, and what the network draws from what
    is set when an iteration starts, so that no state of a generator is needed to repeat either. The augmentation also
    depends on the number of workers.

    Args:
        seed: of the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Workflow) -> None:
        """Seed the epochs and iterations of a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._seed_iteration)

    def _seed_epoch(self, engine: Workflow) -> None:
        seed = self._derive(engine.state.epoch)
        manual_seed(seed)
        # The transforms of this process; a worker's come from torch's generator as it now is.
        set_rnd(getattr(engine.data_loader, "dataset", None), seed)

    def _seed_iteration(self, engine: Workflow) -> None:
        manual_seed(self._derive(engine.state.epoch, engine.state.iteration))

    def _derive(self, *position: int) -> int:
        return int(np.random.SeedSequence([self.seed, idist.get_rank(), *position]).generate_state(1)[0])


class PolynomialLR(lr_scheduler.PolynomialLR):
    """torch's with a linear warm-up; a resumed run with another `total_iters` has what a new one would have by then.

    In step e the learning rate is ``base * (1 - e / total_iters)^power * min(1, (e + 1) / (warmup_iters + 1))``.

    Args:
        optimizer: whose learning rate it is.
        total_iters: steps until it is 0.
        power: of the decay.
        warmup_iters: steps in which it is less than the decay would have it.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int, power: float, *, warmup_iters: int = 0) -> None:
        self.warmup_iters = warmup_iters
        super().__init__(optimizer, total_iters, power)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group of parameters; from the end of the warm-up on it is torch's."""
        return self._learning_rates() if self.last_epoch <= self.warmup_iters > 0 else super().get_lr()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, with the `total_iters` of this object; load the optimiser's state before."""
        total_iters = self.total_iters
        super().load_state_dict(state_dict)
        if self.total_iters == total_iters:
            return
        self.total_iters = total_iters
        self._last_lr = self._learning_rates()
        for group, learning_rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = learning_rate

    def _learning_rates(self) -> list[Any]:
        remaining = max(0.0, 1 - self.last_epoch / self.total_iters)
        warm = min(1.0, (self.last_epoch + 1) / (self.warmup_iters + 1))
        return [base_lr * remaining**self.power * warm for base_lr in self.base_lrs]


class LastCheckpoint:
    """Runs a training, keeps all that it needs to go on, and goes on from there.

    It is saved after each epoch and before each validation; and at SIGTERM, by which clusters say that they will kill,
    after the iteration under way, before the process ends by that signal. A run that goes on from there repeats what
    was lost exactly: with the same seed, batches, workers and processes, its results are those of a run that was never
    interrupted, bit for bit as far as the device's operations are deterministic.

    The file before the last is kept as ``<name>.previous.pt``, and used where the last one is missing or damaged.

    Args:
        path: the file; its folder is made.
        save_dict: objects with a `state_dict` and a `load_state_dict`; the trainer is none of them.
        validator: the evaluator that validates at the end of the trainer's epochs, before anything else there that
            changes what is saved.
        resume: go on from the file. Where there is none the training starts anew, with a warning, so that a job's
            command can be the same each time.
    """

    def __init__(self, path: str | Path, save_dict: Mapping[str, Any], *, validator: Workflow, resume: bool) -> None:
        self.path = Path(path)
        self.save_dict = dict(save_dict)
        self.validator = validator
        self.resume = resume
        self._files = _CheckpointFiles(self.path)
        self._saved = "nothing was saved yet"
        self._terminating = False
        self._validating = False

    def run(self, trainer: Workflow) -> None:
        """Train; what else listens to the trainer must be attached before.

        Raises:
            RuntimeError: when no file can be read, or processes have read different ones.
            ValueError: when the file does not fit the trainer's epochs, or was saved within an epoch that would go on
                with other batches, workers or processes.
        """
        self._agreement = Agreement()
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_iteration)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        self.validator.add_event_handler(Events.STARTED, lambda: self._before_validation(trainer))
        self.validator.add_event_handler(Events.COMPLETED, self._after_validation)
        for loader in (trainer.data_loader, self.validator.data_loader):
            if isinstance(loader, DataLoader):
                loader.worker_init_fn = functools.partial(_start_worker, then=loader.worker_init_fn)
        atexit.register(_end_workers)
        with _on_termination(self._terminate):
            try:
                trainer.run()
            except Exception as error:
                logger.error(f"Epoch {trainer.state.epoch}: {explain(error)}{self._how_to_go_on()}")
                raise

    # Saving. `epochs` are those completed, and `iterations` are of the one after them; when these are all there are,
    # what happens at the end of that epoch is still to come.

    def _after_iteration(self, trainer: Workflow) -> None:
        if self._agreement.any(self._terminating):
            epochs = trainer.state.epoch - 1
            self._save(trainer, epochs, trainer.state.iteration - epochs * trainer.state.epoch_length)
            self._end()

    def _before_validation(self, trainer: Workflow) -> None:
        self._save(trainer, trainer.state.epoch - 1, trainer.state.epoch_length)
        self._validating = True
        if self._terminating:
            self._end()

    def _after_validation(self) -> None:
        self._validating = False

    def _after_epoch(self, trainer: Workflow) -> None:
        self._save(trainer, trainer.state.epoch, 0)
        if self._agreement.any(self._terminating):
            self._end()

    def _save(self, trainer: Workflow, epochs: int, iterations: int) -> None:
        content = {name: part.state_dict() for name, part in self.save_dict.items()}  # by all, who gather their sums
        content["position"] = {
            "epochs": epochs,
            "iterations": iterations,
            **_conditions(trainer),
        }
        content["scaler"] = trainer.scaler.state_dict() if trainer.scaler is not None else {}
        if idist.get_rank() == 0:
            self._files.write(content)
        self._saved = _as_text(epochs, iterations)

    # Going on

    def _start(self, trainer: Workflow) -> None:
        content = self._files.read() if self.resume else None
        _check_that_all_read_the_same(content)
        if idist.get_rank() == 0:
            self._files.tidy()
            if not self.resume:
                self._files.remove()
        if content is not None:
            Checkpoint.load_objects(to_load=self.save_dict, checkpoint=content)
            if trainer.scaler is not None and content["scaler"]:
                trainer.scaler.load_state_dict(content["scaler"])
            self._go_to(trainer, content["position"])

    def _go_to(self, trainer: Workflow, position: Mapping[str, int]) -> None:
        state, (epochs, iterations) = trainer.state, (position["epochs"], position["iterations"])
        self._saved = _as_text(epochs, iterations)
        self._check_position(trainer, position)
        logger.info(f"The training goes on from {self.path}: {self._saved}.")
        state.epoch = epochs
        state.iteration = epochs * state.epoch_length
        if iterations == position["epoch_length"]:
            state.epoch += 1
            state.iteration += state.epoch_length
            with warnings.catch_warnings():
                # The optimizer's steps of this epoch came before the training was stopped.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                trainer.fire_event(Events.EPOCH_COMPLETED)
        elif iterations > 0:
            state.iteration += iterations
            state.dataloader = _Remaining(trainer.data_loader, iterations)

    def _check_position(self, trainer: Workflow, position: Mapping[str, int]) -> None:
        begun = position["epochs"] + (position["iterations"] > 0)
        if begun > trainer.state.max_epochs:
            raise ValueError(f"{self.path} is from epoch {begun}: epochs must not be {trainer.state.max_epochs}.")
        now = _conditions(trainer)
        if position["iterations"] in (0, position["epoch_length"]):
            # Batches begin anew. But before the end of an epoch each process has sums of its own.
            now = {"processes": now["processes"]} if position["iterations"] else {}
        then = {**now, **position}
        changed = [f"{name} {then[name]} instead of {now[name]}" for name in now if then[name] != now[name]]
        if changed:
            raise ValueError(
                f"{self.path} was saved within an epoch, with {', '.join(changed)}: go on with the same data, "
                "batch_size, num_workers and number of processes; other ones are fine from the end of an epoch on."
            )

    # Ending

    def _terminate(self) -> None:
        self._terminating = True
        if self._validating:
            self._end()

    def _end(self) -> NoReturn:
        logger.warning(f"SIGTERM. {self._how_to_go_on()}")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # where a raised signal ends no process

    def _how_to_go_on(self) -> str:
        return f"In {self.path}: {self._saved}. The same command with --resume True continues from there."


class _CheckpointFiles:
    """The last checkpoint and the one before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        self._damaged = False

    def write(self, content: Mapping[str, Any]) -> None:
        save_complete(content, self.path, previous=self.previous)

    def read(self) -> dict[str, Any] | None:
        """The last one, or that before it where the last one is missing or damaged, or None where there is none."""
        there = [path for path in (self.path, self.previous) if path.is_file()]
        if not there:
            logger.warning(f"There is no {self.path} to resume from: the training starts from the beginning.")
            return None
        whole = next((path for path in there if _is_whole(path)), None)
        if whole is None:
            raise RuntimeError(
                f"{' and '.join(map(str, there))} cannot be read. Put a copy there, or train anew: without resume, or "
                "with another output_dir."
            )
        if whole != self.path:
            self._damaged = True
            logger.warning(f"{self.path} is missing or damaged: the one before it, {whole}, is used.")
        return dict(torch.load(whole, map_location="cpu", weights_only=True))

    def remove(self) -> None:
        """Remove those of another training, from which this one must not go on."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what killed runs have left half-written; a damaged file must not become the one before the last."""
        remove_unfinished(self.path.parent)
        if self._damaged:
            self.previous.replace(self.path)


class _Remaining:
    """A data loader whose first batches are left out when it is gone through for the first time."""

    def __init__(self, loader: Iterable[Any], done: int) -> None:
        self.loader = loader
        self.done = done

    def __iter__(self) -> Iterator[Any]:
        done, self.done = self.done, 0
        return itertools.islice(self.loader, done, None)


def _conditions(trainer: Workflow) -> dict[str, int]:
    """What must not change within an epoch, for the rest of it to be the same."""
    loader = trainer.data_loader
    own = {"batch_size": loader.batch_size, "num_workers": loader.num_workers} if isinstance(loader, DataLoader) else {}
    return {"epoch_length": trainer.state.epoch_length, "processes": idist.get_world_size(), **own}


def _as_text(epochs: int, iterations: int) -> str:
    return f"{epochs} epochs" + (f" and {iterations} iterations" if iterations else "")


def _is_whole(path: Path) -> bool:
    """Whether all of a file written by `torch.save` is as it was written; torch reads some damaged ones."""
    try:
        with ZipFile(path) as archive:
            return archive.testzip() is None
    except _BROKEN:
        return False


def _check_that_all_read_the_same(content: Mapping[str, Any] | None) -> None:
    """Processes that go on from different positions would train different networks."""
    position = content["position"] if content is not None else {"epochs": 0, "iterations": 0}
    own = torch.tensor([[position["epochs"], position["iterations"]]])
    if (torch.as_tensor(idist.all_gather(own)).cpu() != own).any():  # of a single process it comes as it is
        raise RuntimeError("The processes have read different checkpoints: output_dir must be the same folder for all.")


@contextmanager
def _on_termination(react: Callable[[], None]) -> Iterator[None]:
    """Call a function at SIGTERM; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_workers() -> None:
    """End what SIGTERM does not: at its exit this process would wait for its workers for ever.

    An error keeps them, since its traceback has the iterator that they belong to.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch would notice, and call it a fault
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _start_worker(worker: int, *, then: Callable[[int], None] | None) -> None:
    """A worker lets SIGTERM pass, which may reach all of a job's processes, so that the training can end by itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)
