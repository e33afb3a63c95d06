"""Trainings of a few milliseconds, each in a process of its own that is killed and started again."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import MeanSquaredError
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler, from_engine
from monai.transforms import Compose, EnsureTyped, RandGaussianNoised, RandScaleIntensityd
from torch import Tensor, nn

from passion_monai.handlers import ExponentialMovingAverage, FileCheckpoint, LossOutput, PreferenceHandler, TrainingLog
from passion_monai.resume import LastCheckpoint, PolynomialLR, Seeding, _CheckpointFiles

EPOCHS, SAMPLES, BATCH_SIZE = 4, 7, 2  # four iterations an epoch, the last of one sample
MODALITIES = ("a", "b")
PROCESSES = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Loss(nn.Module):
    """What handlers need of the real one: beta, and terms that depend on all that went before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.ones(len(MODALITIES)))
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        errors = (pred - label).square()
        relative = (errors / errors.mean(dim=1, keepdim=True) - 1).detach()
        self.terms = {"loss_pixel": errors.detach(), "relative_preference": relative}
        return (errors * self.beta).mean()


class Training:
    """The parts of train.yaml, around a layer with dropout, with an average of the weights and a warm-up."""

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int = EPOCHS,
        num_workers: int = 0,
        resume: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        torch.manual_seed(0)
        cases = [{"image": torch.randn(3), "label": torch.randn(2)} for _ in range(SAMPLES)]
        augmentation = Compose(
            [
                RandScaleIntensityd("image", 0.5, prob=1.0),
                RandGaussianNoised("image", prob=0.5),
                EnsureTyped("image", track_meta=False),
            ]
        )
        loader = DataLoader(Dataset(cases, augmentation), batch_size=batch_size, shuffle=True, num_workers=num_workers)
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.loss = Loss()
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        self.scheduler = PolynomialLR(optimizer, total_iters=epochs, power=0.9, warmup_iters=2)
        self.average = ExponentialMovingAverage(self.network, decay=0.9)
        self.validator = SupervisedEvaluator(
            torch.device("cpu"),
            DataLoader(Dataset(cases[:3]), num_workers=num_workers),
            self.average.network,
            key_val_metric={"error": MeanSquaredError(from_engine(["pred", "label"]))},
            decollate=False,
        )
        self.preference = PreferenceHandler(self.loss, MODALITIES)
        self.log = TrainingLog(folder / "training.csv", self.loss, MODALITIES, validator=self.validator)
        self.best = FileCheckpoint(folder / "model.pt", {"model": self.average.network}, metric="error")
        handlers = [Seeding(3), LossOutput(), ValidationHandler(2, self.validator), LrScheduleHandler(self.scheduler)]
        self.trainer = SupervisedTrainer(
            torch.device("cpu"),
            epochs,
            loader,
            self.network,
            optimizer,
            self.loss,
            train_handlers=[*handlers, self.average, self.preference, self.log],
            decollate=False,
        )
        self.best.attach(self.validator)
        self.last = LastCheckpoint(
            folder / "last.pt",
            {
                "model": self.network,
                "optimizer": optimizer,
                "lr_scheduler": self.scheduler,
                "loss": self.loss,
                "weight_average": self.average,
                "preference_handler": self.preference,
                "training_log": self.log,
                "best_checkpoint": self.best,
            },
            validator=self.validator,
            resume=resume,
        )

    def run(self) -> None:
        self.last.run(self.trainer)


Fault = Callable[[Training], None]


def at(event: Events, count: int, action: Callable[[], Any], *, engine: str = "trainer") -> Fault:
    """An action when an event comes for the n-th time."""

    def inject(training: Training) -> None:
        getattr(training, engine).add_event_handler(event(once=count), action)

    return inject


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def while_saving(count: int, action: Callable[[], Any]) -> Fault:
    """An action when half of the n-th file of torch's is written."""

    def inject(_: Training) -> None:
        save, number = torch.save, iter(range(1, 1000))

        def save_half(content: Any, file: Any) -> None:
            if next(number) == count:
                save(content, file)
                file.truncate(file.tell() // 2)
                action()
                file.seek(0)
            save(content, file)

        torch.save = save_half

    return inject


def between_renamings(count: int, action: Callable[[], Any]) -> Fault:
    """An action when the last file is away, and the new one has not its name yet."""

    def inject(_: Training) -> None:
        replace, number = Path.replace, iter(range(1, 1000))

        def replace_and_act(self: Path, target: Path) -> Path:
            result = replace(self, target)
            if "previous" in Path(target).name and next(number) == count:
                action()
            return result

        Path.replace = replace_and_act

    return inject


def run(folder: Path, fault: Fault | None = None, **settings: Any) -> int:
    """The exit code of a training in a process of its own."""

    def target() -> None:
        torch.set_num_threads(1)
        logging.basicConfig(force=True)  # to where the test looks, instead of into this process alone
        training = Training(folder, **settings)
        if fault is not None:
            fault(training)
        training.run()

    process = PROCESSES.Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def results(folder: Path) -> dict[str, Any]:
    """All that a training leaves, as bytes where there are no names of files in it."""
    state = torch.load(folder / "last.pt", weights_only=True)
    best = torch.load(folder / "model.pt", weights_only=True)
    return {"log": (folder / "training.csv").read_bytes(), "state": flat(state), "best": flat(best)}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every number in nested containers, tensors as lists of integers that have their bits."""
    if isinstance(value, Tensor):
        return {name: value.contiguous().view(torch.uint8).tolist() if value.ndim else value.item()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: entry for key, item in items for path, entry in flat(item, f"{name}/{key}").items()}
    return {name: repr(value)}


@pytest.fixture(scope="module", autouse=True)
def _imports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All that torch imports when it is first used, once and not in each process."""
    Training(tmp_path_factory.mktemp("imports"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """The results of an uninterrupted training, by the number of workers."""
    found: dict[int, dict[str, Any]] = {}

    def train(num_workers: int) -> dict[str, Any]:
        if num_workers not in found:
            folder = tmp_path_factory.mktemp("reference")
            assert run(folder, num_workers=num_workers) == 0
            found[num_workers] = results(folder)
        return found[num_workers]

    return train


FAULTS: dict[str, Callable[[Callable[[], Any]], Fault]] = {
    "first iteration": lambda action: at(Events.ITERATION_COMPLETED, 1, action),
    "within an epoch": lambda action: at(Events.ITERATION_COMPLETED, 6, action),
    "within an iteration": lambda action: at(Events.ITERATION_STARTED, 7, action),
    "last iteration of an epoch": lambda action: at(Events.ITERATION_COMPLETED, 8, action),
    "start of an epoch": lambda action: at(Events.EPOCH_STARTED, 3, action),
    "end of an epoch": lambda action: at(Events.EPOCH_COMPLETED, 3, action),
    "start of validation": lambda action: at(Events.STARTED, 1, action, engine="validator"),
    "within validation": lambda action: at(Events.ITERATION_COMPLETED, 2, action, engine="validator"),
    "end of validation": lambda action: at(Events.COMPLETED, 2, action, engine="validator"),
    "saving the last": lambda action: while_saving(1, action),
    "saving before validation": lambda action: while_saving(2, action),
    "saving the best": lambda action: while_saving(3, action),
    "renaming": lambda action: between_renamings(2, action),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("action", "exit_code"), [(kill, -signal.SIGKILL), (terminate, -signal.SIGTERM)])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_never_interrupted(
    reference: Any, tmp_path: Path, fault: str, action: Any, exit_code: int, num_workers: int
):
    settings = {"num_workers": num_workers, "resume": True}
    assert run(tmp_path, FAULTS[fault](action), **settings) == exit_code
    assert run(tmp_path, **settings) == 0
    assert results(tmp_path) == reference(num_workers)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.previous.pt", "model.pt", "training.csv"}


def test_a_training_that_replaces_another_does_not_go_on_from_that(reference: Any, tmp_path: Path):
    assert run(tmp_path, batch_size=3) == 0
    assert run(tmp_path, FAULTS["first iteration"](kill)) == -signal.SIGKILL
    assert run(tmp_path, resume=True) == 0
    assert results(tmp_path) == reference(0)


def kill_a_worker() -> None:
    """As a system does that is short of memory; torch notices within a second."""
    multiprocessing.active_children()[0].kill()
    time.sleep(5)


def raise_error(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def full_disk(count: int) -> Fault:
    """A disk that is full when the n-th file is written."""

    def inject(_: Training) -> None:
        fsync, number = os.fsync, iter(range(1, 1000))

        def fail(descriptor: int) -> None:
            if next(number) == count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        os.fsync = fail

    return inject


FAILURES: dict[str, tuple[int, Fault, str]] = {
    "a worker is killed": (
        2,
        at(Events.ITERATION_STARTED, 6, kill_a_worker),
        "A process that loads cases was ended, often for lack of memory: try fewer num_workers",
    ),
    "a worker is killed in validation": (
        2,
        at(Events.ITERATION_STARTED, 2, kill_a_worker, engine="validator"),
        "A process that loads cases was ended",
    ),
    "no memory": (0, at(Events.ITERATION_STARTED, 6, raise_error(MemoryError())), "Epoch 2: MemoryError Try a smaller"),
    "no memory on the device": (
        0,
        at(Events.ITERATION_STARTED, 6, raise_error(torch.OutOfMemoryError("CUDA out of memory."))),
        "Epoch 2: CUDA out of memory. Try a smaller batch_size or roi_size, or activation_checkpointing.",
    ),
    "full before the first": (0, full_disk(1), "training.csv: No space left on device. Make room"),
    **{
        f"full at {count}": (0, full_disk(count), f"{os.strerror(errno.ENOSPC)}. Make room or choose another folder")
        for count in range(2, 10)
    },
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_says_what_and_is_resumed_exactly(
    reference: Any, tmp_path: Path, failure: str, capfd: pytest.CaptureFixture[str]
):
    num_workers, fault, said = FAILURES[failure]
    assert run(tmp_path, fault, num_workers=num_workers) == 1
    error = capfd.readouterr().err
    assert said in error
    assert "The same command with --resume True continues from there." in error
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert run(tmp_path, num_workers=num_workers, resume=True) == 0
    assert results(tmp_path) == reference(num_workers)


def test_a_signal_is_said_and_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert run(tmp_path, FAULTS["within an epoch"](terminate)) == -signal.SIGTERM
    assert "1 epochs and 2 iterations. The same command with --resume True continues" in capfd.readouterr().err


def terminate_all() -> None:
    """As clusters do that signal every process of a job: from without, since a worker may be ended by its parent."""
    subprocess.run(["kill", *(str(worker.pid) for worker in multiprocessing.active_children())], check=True)
    time.sleep(0.5)  # torch would notice a worker that has ended
    terminate()


def test_a_signal_to_the_workers_too_ends_the_training_by_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert run(tmp_path, at(Events.ITERATION_STARTED, 3, terminate_all), num_workers=2) == -signal.SIGTERM
    assert "0 epochs and 3 iterations. The same command" in capfd.readouterr().err


FAILING_DATA = """
import sys
from pathlib import Path
from test_resume import Training

def fail(sample):
    raise OSError("the file is gone")

training = Training(Path(sys.argv[1]), num_workers=2)
training.trainer.data_loader.dataset.transform = fail
training.run()
"""


def test_an_error_of_the_data_ends_the_process_though_its_workers_let_signals_pass(tmp_path: Path):
    """As a program of its own: only its end waits for the workers."""
    command = [sys.executable, "-c", FAILING_DATA, str(tmp_path)]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 1
    assert "OSError: the file is gone" in result.stderr
    assert "killed by signal" not in result.stderr


def test_a_single_process_starts_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ignite then names the GPU as its device, whatever the training's is."""
    monkeypatch.setattr("ignite.distributed.device", lambda: torch.device("meta"))
    Training(tmp_path, epochs=1).run()


def test_what_is_drawn_depends_on_seed_process_epoch_and_iteration(monkeypatch: pytest.MonkeyPatch):
    """Two processes that drew the same would augment in the same way."""

    def draw(seed: int, rank: int) -> list[float]:
        monkeypatch.setattr("ignite.distributed.get_rank", lambda: rank)
        drawn: list[float] = []
        engine = Engine(lambda *_: drawn.append(torch.rand(1).item()))
        engine.data_loader = [0, 0]
        Seeding(seed).attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: drawn.append(torch.rand(1).item()))
        engine.run(engine.data_loader, max_epochs=2)
        return drawn

    assert len({*draw(3, 0), *draw(3, 1), *draw(4, 0)}) == 3 * 6
    assert draw(3, 0) == draw(3, 0)


def test_a_damaged_file_never_becomes_the_one_before(tmp_path: Path):
    files = _CheckpointFiles(tmp_path / "last.pt")
    files.write({"epoch": 1})
    files.write({"epoch": 2})
    files.path.write_bytes(b"PK")
    resumed = _CheckpointFiles(files.path)
    assert resumed.read() == {"epoch": 1}
    resumed.tidy()
    resumed.write({"epoch": 3})
    files.path.write_bytes(b"PK")
    assert files.read() == {"epoch": 1}


@pytest.mark.parametrize("damage", ["cut off", "overwritten", "empty", "deleted"])
def test_a_damaged_file_is_replaced_by_the_one_before(
    reference: Any, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
):
    assert run(tmp_path, FAULTS["within an iteration"](terminate)) == -signal.SIGTERM
    last = tmp_path / "last.pt"
    content = last.read_bytes()
    middle = len(content) // 2
    if damage == "deleted":
        last.unlink()
    else:
        zeros = content[:middle] + bytes(200) + content[middle + 200 :]
        last.write_bytes({"cut off": content[:middle], "overwritten": zeros, "empty": b""}[damage])
    assert run(tmp_path, resume=True) == 0
    assert f"{last} is missing or damaged" in capfd.readouterr().err
    assert results(tmp_path) == reference(0)


class TestFilesThatDoNotFit:
    def resume(self, folder: Path, **settings: Any) -> None:
        Training(folder, resume=True, **settings).run()

    def test_none_that_can_be_read(self, tmp_path: Path):
        for name in ("last.pt", "last.previous.pt"):
            (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(RuntimeError, match=r"cannot be read\. Put a copy there, or train anew"):
            self.resume(tmp_path)

    def test_fewer_epochs(self, tmp_path: Path):
        assert run(tmp_path) == 0
        with pytest.raises(ValueError, match="is from epoch 4: epochs must not be 3"):
            self.resume(tmp_path, epochs=3)

    def test_an_epoch_that_was_begun_is_one_too_many(self, tmp_path: Path):
        assert run(tmp_path, FAULTS["within an epoch"](terminate)) == -signal.SIGTERM
        with pytest.raises(ValueError, match="is from epoch 2: epochs must not be 1"):
            self.resume(tmp_path, epochs=1)

    def test_other_batches_within_an_epoch(self, tmp_path: Path):
        assert run(tmp_path, FAULTS["within an epoch"](terminate)) == -signal.SIGTERM
        with pytest.raises(
            ValueError, match="within an epoch, with epoch_length 4 instead of 7, batch_size 2 instead of 1"
        ):
            self.resume(tmp_path, batch_size=1)

    def test_other_workers_within_an_epoch(self, tmp_path: Path):
        assert run(tmp_path, FAULTS["within an epoch"](terminate)) == -signal.SIGTERM
        with pytest.raises(ValueError, match="within an epoch, with num_workers 0 instead of 2: go on with the same"):
            self.resume(tmp_path, num_workers=2)

    def test_other_processes_within_an_epoch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """At its end too: each process has sums of its own."""
        for fault in ("within an epoch", "within validation"):
            assert run(tmp_path, FAULTS[fault](terminate)) == -signal.SIGTERM
            monkeypatch.setattr("passion_monai.resume._conditions", lambda trainer: {"processes": 2})
            with pytest.raises(ValueError, match="within an epoch, with processes 1 instead of 2"):
                self.resume(tmp_path)
            monkeypatch.undo()

    @pytest.mark.parametrize("changed", [{"num_workers": 2}, {"batch_size": 1}], ids=str)
    def test_other_batches_when_only_the_validation_is_left(self, tmp_path: Path, changed: dict[str, int]):
        """As when a worker ran out of memory in it."""
        assert run(tmp_path, FAULTS["within validation"](kill)) == -signal.SIGKILL
        training = Training(tmp_path, resume=True, **changed)
        training.run()
        assert training.trainer.state.epoch == EPOCHS
        assert training.trainer.state.iteration == EPOCHS * training.trainer.state.epoch_length
        assert len((tmp_path / "training.csv").read_text().splitlines()) == 1 + EPOCHS

    def test_other_batches_between_epochs(self, tmp_path: Path):
        assert run(tmp_path, epochs=2) == 0
        training = Training(tmp_path, epochs=3, batch_size=1, resume=True)
        training.run()
        assert (training.trainer.state.epoch, training.trainer.state.iteration) == (3, 21)


def test_a_full_disk_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run(tmp_path, epochs=1) == 0
    before = results(tmp_path) if (tmp_path / "model.pt").is_file() else (tmp_path / "last.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    training = Training(tmp_path, resume=True)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"Cannot write .*last\.pt: No space left on device. Make room"):
        training.run()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".unfinished*"))


def schedule(epochs: int, warmup: int = 0) -> PolynomialLR:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    return PolynomialLR(optimizer, total_iters=epochs, power=0.9, warmup_iters=warmup)


def learning_rates(scheduler: PolynomialLR, steps: int) -> list[float]:
    """That of each of the next steps, as the optimiser has it."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
def test_the_learning_rate_rises_in_the_warm_up_to_that_of_the_decay(warmup: int):
    epochs = 10
    expected = [0.5 * (1 - e / epochs) ** 0.9 * min(1, (e + 1) / (warmup + 1)) for e in range(epochs)]
    assert learning_rates(schedule(epochs, warmup), epochs) == pytest.approx(expected)


def test_without_a_warm_up_it_is_torchs_to_the_last_bit():
    theirs = torch.optim.lr_scheduler.PolynomialLR(torch.optim.SGD([torch.zeros(1)], lr=0.5), 10, 0.9)
    assert learning_rates(schedule(10), 10) == learning_rates(theirs, 10)


@pytest.mark.parametrize(("warmup", "factor"), [(0, 1.0), (3, 3 / 4)])
def test_more_epochs_have_the_learning_rate_of_a_new_training(warmup: int, factor: float):
    done, resumed = schedule(2, warmup), schedule(4, warmup)
    learning_rates(done, 2)
    resumed.optimizer.load_state_dict(done.optimizer.state_dict())
    resumed.load_state_dict(done.state_dict())
    assert learning_rates(resumed, 2) == pytest.approx([0.5 * 0.5**0.9 * factor, 0.5 * 0.25**0.9])


def test_the_scale_of_gradients_goes_on(tmp_path: Path):
    def scaled(scale: float) -> Training:
        training = Training(tmp_path, epochs=1)
        training.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return training

    first, second = scaled(128.0), scaled(2.0)
    first.log.rows, first.log._means = [], {}
    first.trainer.state.epoch = 1
    first.last._save(first.trainer, 1, 0)
    second.last.resume = True
    second.last._start(second.trainer)
    assert second.trainer.scaler.get_scale() == 128.0
