from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn

from passion_monai.handlers import (
    ExponentialMovingAverage,
    FileCheckpoint,
    HandlerSequence,
    LossOutput,
    PreferenceHandler,
    TrainingLog,
)
from passion_monai.losses import PassionLoss

MODALITIES = ("a", "b", "c")
NAN = math.nan
# Relative preference of three iterations with two samples each; NaN where the modality is absent.
PREFERENCES = [[[0.4, -0.4, NAN], [0.0, NAN, NAN]], [[NAN, 0.1, -0.1], [-0.3, 0.1, 0.2]], [[0.5, NAN, -0.5], [NAN] * 3]]


def train(loss: PassionLoss, handlers: list[object], epochs: int = 1) -> Engine:
    """An engine that leaves in the loss what a training step would."""

    def step(_: Engine, preference: list[list[float]]) -> list[dict[str, torch.Tensor]]:
        values = torch.tensor(preference)
        loss.terms = {"loss_segmentation": torch.tensor([1.0, 3.0]), "relative_preference": values}
        return [{"loss": torch.tensor(2.0)}]

    engine = Engine(step)
    for handler in handlers:
        handler.attach(engine)
    engine.run(PREFERENCES, max_epochs=epochs)
    return engine


def mean_preference() -> list[float]:
    """Eq. (12), modality by modality."""
    means = []
    for m in range(3):
        values = [row[m] for batch in PREFERENCES for row in batch if not math.isnan(row[m])]
        means.append(sum(values) / len(values))
    return means


class TestPreferenceHandler:
    def test_beta_after_an_epoch_is_equation_13(self):
        loss = PassionLoss(3, 2, initial_beta=[1.0, 2.0, 5.0])
        engine = train(loss, [PreferenceHandler(loss, MODALITIES, gamma=0.1)])
        expected = [b - 0.1 * p for b, p in zip([1.0, 2.0, 5.0], mean_preference(), strict=True)]
        assert loss.beta.tolist() == pytest.approx(expected)
        assert engine.state.metrics["beta_c"] == pytest.approx(expected[2])

    def test_each_epoch_starts_from_nothing(self):
        loss = PassionLoss(3, 2)
        handler = PreferenceHandler(loss, MODALITIES, gamma=0.1)
        train(loss, [handler], epochs=3)
        assert loss.beta.tolist() == pytest.approx([1 - 0.3 * p for p in mean_preference()])
        assert [row["relative_preference"] for row in handler.history] == [pytest.approx(mean_preference())] * 3

    def test_gamma_zero_only_measures(self):
        loss = PassionLoss(3, 2, initial_beta=[1.0, 2.0, 5.0])
        handler = PreferenceHandler(loss, MODALITIES, gamma=0.0)
        train(loss, [handler])
        assert loss.beta.tolist() == [1.0, 2.0, 5.0]
        assert handler.history[0]["relative_preference"] == pytest.approx(mean_preference())

    def test_released_update_by_hand(self):
        loss = PassionLoss(3, 2)
        handler = PreferenceHandler.released(loss, MODALITIES, gamma=0.5)
        engine = Engine(lambda _, gap: setattr(loss, "terms", {"gap": torch.tensor(gap)}))
        handler.attach(engine)
        gaps = [[[0.1, 0.4, NAN]], [[0.3, NAN, 0.4]]]  # means 0.2, 0.4, 0.4; mean over modalities 1 / 3
        engine.run(gaps, max_epochs=2)
        preference = [1 - 0.2 * 3, 1 - 0.4 * 3, 1 - 0.4 * 3]
        beta = [1.0, 1.0, 1.0]
        for gamma in (0.75, 0.5):  # the first epoch is boosted
            beta = [min(max(b - gamma * p, 0.1), 4.0) for b, p in zip(beta, preference, strict=True)]
            norm = sum(b * b for b in beta) ** 0.5
            beta = [b * 3**0.5 / norm for b in beta]
        assert loss.beta.tolist() == pytest.approx(beta)

    def test_the_state_survives_a_checkpoint(self, tmp_path: Path):
        loss = PassionLoss(3, 2)
        handler = PreferenceHandler(loss, MODALITIES)
        train(loss, [handler], epochs=2)
        torch.save({"loss": loss.state_dict(), "handler": handler.state_dict()}, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed_loss = PassionLoss(3, 2)
        resumed = PreferenceHandler(resumed_loss, MODALITIES)
        resumed_loss.load_state_dict(state["loss"])
        resumed.load_state_dict(state["handler"])
        for loss_, handler_ in ((loss, handler), (resumed_loss, resumed)):
            train(loss_, [handler_])
        assert torch.equal(resumed_loss.beta, loss.beta)
        assert resumed.history == handler.history

    def test_refuses_arguments_that_do_not_fit(self):
        with pytest.raises(ValueError, match="modalities must name the loss's 3 modalities"):
            PreferenceHandler(PassionLoss(3, 2), ("a", "b"))
        with pytest.raises(ValueError, match="gamma must not be negative, got -1"):
            PreferenceHandler(PassionLoss(3, 2), MODALITIES, gamma=-1)


class TestExponentialMovingAverage:
    def average(self, values: list[float], decay: float) -> ExponentialMovingAverage:
        """That of a network with one weight, which a training sets to these values in its iterations."""
        network = nn.Linear(1, 1, bias=False)
        average = ExponentialMovingAverage(network, decay=decay)
        nn.init.constant_(network.weight, 5.0)  # as other processes' weights arrive before the training starts
        engine = Engine(lambda _, value: nn.init.constant_(network.weight, value))
        average.attach(engine)
        engine.run(values)
        assert network.weight.item() == values[-1]
        return average

    @pytest.mark.parametrize("decay", [0.5, 0.15, 0.999])
    def test_is_its_equation(self, decay: float):
        values = [1.0, -2.0, 0.5, 4.0]
        expected = 5.0
        for t, value in enumerate(values, start=1):
            kept = min(decay, (1 + t) / (10 + t))
            expected = kept * expected + (1 - kept) * value
        assert self.average(values, decay).network.weight.item() == pytest.approx(expected)

    def test_a_short_training_has_forgotten_how_it_began(self):
        assert self.average([1.0] * 200, 0.999).network.weight.item() == pytest.approx(1.0, abs=1e-6)

    def test_needs_no_gradient_and_names_weights_as_the_network_does(self):
        average = self.average([1.0], 0.9)
        assert list(average.state_dict()) == ["weight"]
        assert not average.network.weight.requires_grad

    @pytest.mark.parametrize("decay", [0.0, 1.0, -1])
    def test_refuses_another_decay(self, decay: float):
        with pytest.raises(ValueError, match=f"decay must be above 0 and below 1, got {decay}"):
            ExponentialMovingAverage(nn.Linear(1, 1), decay=decay)


class TestTrainingLog:
    def run(self, tmp_path: Path, epochs: int = 2) -> tuple[TrainingLog, list[dict[str, str]]]:
        loss = PassionLoss(3, 2)
        validator = Engine(lambda _, __: None)

        def validate(engine: Engine) -> None:
            validator.state.metrics["mean_dice"] = 0.25 * engine.state.epoch
            validator.run([0])

        log = TrainingLog(tmp_path / "logs" / "training.csv", loss, MODALITIES, validator=validator)

        class Validation:
            def attach(self, engine: Engine) -> None:
                engine.add_event_handler(Events.EPOCH_COMPLETED(every=2), validate)

        train(loss, [Validation(), PreferenceHandler(loss, MODALITIES), log], epochs)
        with log.path.open(newline="") as file:
            return log, list(csv.DictReader(file))

    def test_one_row_per_epoch(self, tmp_path: Path):
        _, rows = self.run(tmp_path)
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert float(rows[0]["loss"]) == 2
        assert float(rows[0]["loss_segmentation"]) == 2
        assert float(rows[1]["relative_preference_a"]) == pytest.approx(mean_preference()[0])
        assert float(rows[1]["beta_a"]) == pytest.approx(1 - 0.02 * mean_preference()[0])

    def test_validation_only_where_there_was_one(self, tmp_path: Path):
        _, rows = self.run(tmp_path, epochs=4)
        assert [row["val_mean_dice"] for row in rows] == ["", "0.5", "", "1.0"]

    def test_a_resumed_run_continues_the_file(self, tmp_path: Path):
        log, rows = self.run(tmp_path)
        resumed = TrainingLog(log.path, log.loss, MODALITIES, validator=Engine(lambda _, __: None))
        resumed.load_state_dict(log.state_dict())
        train(log.loss, [resumed])
        with log.path.open(newline="") as file:
            continued = list(csv.DictReader(file))
        assert continued[:2] == rows
        assert len(continued) == 3


def test_only_the_loss_stays_in_the_output():
    weight = torch.tensor(3.0, requires_grad=True)

    def step(engine: Engine, _: int) -> object:
        engine.state.output = {"pred": torch.zeros(9), "loss": 2 * weight}
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    LossOutput().attach(engine)
    engine.run([0])
    assert engine.state.output == [{"loss": torch.tensor(6.0)}]
    assert not engine.state.output[0]["loss"].requires_grad


def test_handlers_in_a_sequence_are_attached_in_order():
    engine, calls = Engine(lambda _, __: None), []

    class Handler:
        def __init__(self, name: str) -> None:
            self.name = name

        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: calls.append(self.name))

    HandlerSequence([Handler("a"), None, Handler("b")]).attach(engine)
    engine.run([0])
    assert calls == ["a", "b"]


class TestFileCheckpoint:
    def test_best_keeps_the_best(self, tmp_path: Path):
        layer = nn.Linear(1, 1, bias=False)
        engine = Engine(lambda _, __: None)
        scores = iter([0.2, 0.5, 0.1])

        @engine.on(Events.EPOCH_COMPLETED)
        def score() -> None:
            engine.state.metrics["dice"] = value = next(scores)
            nn.init.constant_(layer.weight, value)

        FileCheckpoint(tmp_path / "models" / "model.pt", {"model": layer}, metric="dice").attach(engine)
        engine.run([0], max_epochs=3)
        state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
        assert float(state["weight"]) == pytest.approx(0.5)
        assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.pt"]

    def test_the_best_score_is_remembered_by_a_resumed_run(self, tmp_path: Path):
        layer = nn.Linear(1, 1)
        checkpoint = FileCheckpoint(tmp_path / "model.pt", {"model": layer}, metric="dice")
        engine = Engine(lambda _, __: None)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: engine.state.metrics.update(dice=0.9))
        checkpoint.attach(engine)
        engine.run([0])
        before = (tmp_path / "model.pt").read_bytes()
        resumed = FileCheckpoint(tmp_path / "model.pt", {"model": nn.Linear(1, 1)}, metric="dice")
        resumed.load_state_dict(checkpoint.state_dict())
        worse = Engine(lambda _, __: None)
        worse.add_event_handler(Events.EPOCH_STARTED, lambda: worse.state.metrics.update(dice=0.3))
        resumed.attach(worse)
        worse.run([0])
        assert (tmp_path / "model.pt").read_bytes() == before

    def test_last_is_there_at_any_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "last.pt"
        checkpoint = FileCheckpoint(path, {"model": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
        engine = Engine(lambda _, __: None)
        checkpoint.attach(engine)
        engine.run([0])
        first = path.read_bytes()

        def fail(*_: object, **__: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            engine.run([0], max_epochs=2)
        assert path.read_bytes() == first
        assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
