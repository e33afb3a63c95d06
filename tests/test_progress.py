"""What a training logs while it runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from passion_monai import progress
from passion_monai.evaluation.dice import CombinationDiceMetric
from passion_monai.progress import TrainingProgress, score_table

MODALITIES = ("a", "b")
REGIONS = {"whole": (1, 2), "core": (2,)}


class Loss:
    """Only the names of the terms matter."""

    terms = dict.fromkeys(("loss_segmentation", "loss_pixel", "gap"))


class Clock:
    """Stands still but for `pass_by`."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Messages of a training of four epochs of 30 s, validated after the third, from a given epoch on."""

    def run(first: int = 0, cases: int = 1, case_seconds: float = 0) -> list[str]:
        clock = Clock()
        monkeypatch.setattr(progress, "time", clock)
        metric, validator = CombinationDiceMetric(REGIONS), Engine(lambda *_: clock.pass_by(case_seconds))
        trainer = Engine(lambda *_: None)

        @trainer.on(Events.EPOCH_COMPLETED)
        def end_epoch(engine: Engine) -> None:
            clock.pass_by(30)
            engine.state.metrics = {"loss": 2.5, "loss_segmentation": 2.0, "loss_pixel_a": 0.1, "loss_pixel_b": 0.4}
            engine.state.metrics["loss_pixel_b"] *= float("nan") if engine.state.epoch == 4 else 1
            if engine.state.epoch == 3:
                metric.reset()
                metric([torch.tensor([[[1, 2]], [[0, 2]], [[-1, -1]]])], [torch.tensor([[[1, 2]]])])
                validator.run([0] * cases)

        TrainingProgress(Loss(), MODALITIES, validator=validator, metric=metric).attach(trainer)

        @trainer.on(Events.STARTED)
        def resume(engine: Engine) -> None:  # as the checkpoint does, whose turn comes last
            engine.state.epoch = engine.state.iteration = first

        caplog.clear()
        with caplog.at_level(logging.INFO, logger="passion_monai"):
            trainer.run([0], max_epochs=4)
        return [record.message for record in caplog.records if record.name == "passion_monai.progress"]

    return run


def test_an_epoch_is_one_line(lines: Any):
    said = lines()
    assert said[0] == "Epoch 1/4: loss 2.500 (segmentation 2.000, pixel 0.250), 30.0 s, 0:01:30 left"
    assert said[1].endswith("30.0 s, 0:01:00 left")
    assert "pixel 0.100" in said[-1]  # no sample of the epoch had the other modality
    assert said[-1].endswith("0:00:00 left")
    assert len(said) == 5


def test_a_resumed_training_knows_how_long_its_own_epochs_took(lines: Any):
    said = lines(first=2)
    assert said[0].startswith("Epoch 3/4")
    assert said[0].endswith("30.0 s, 0:00:30 left")


def test_a_validation_is_a_table_after_its_epoch(lines: Any):
    said = lines()
    assert said[2].startswith("Epoch 3/4")
    assert said[3].splitlines() == [
        "Validation, mean Dice [%]",
        "given     whole    core    mean",
        "1 of 2     83.3   100.0    91.7",
        "2 of 2        -       -       -",
        "mean       83.3   100.0    91.7",
    ]


def test_a_validation_of_hours_is_foretold_after_its_first_case(lines: Any):
    said = lines(cases=40, case_seconds=30)
    assert said[2] == (
        "The first of 40 validation cases took 30 s: each validation takes about 0:20:00. Shorter: --val_cases, "
        "--val_combinations single_and_complete, or a larger --val_interval."
    )
    assert sum("validation cases" in line for line in said) == 1
    assert not any("validation cases" in line for line in lines(cases=20, case_seconds=30))


def test_the_table_is_a_slow_mean():
    scores = torch.rand(5, 7 * 2)
    rows = [line.split()[-3:] for line in score_table(scores, ("a", "b", "c"), tuple(REGIONS)).splitlines()[1:]]
    for row, combinations in zip(rows, [range(3), range(3, 6), range(6, 7), range(7)], strict=True):
        by_region = [
            sum(float(scores[case, 2 * p + region]) for case in range(5) for p in combinations) / 5 / len(combinations)
            for region in range(2)
        ]
        means = [100 * score for score in (*by_region, sum(by_region) / 2)]
        assert [float(cell) for cell in row] == pytest.approx(means, abs=0.06)


def test_long_names_stay_apart():
    names = ("non-enhancing tumour core", "edema")
    header, *rows = score_table(torch.rand(2, 3 * 2), ("a", "b"), names).splitlines()
    assert header == "given    non-enhancing tumour core   edema    mean"
    assert {len(row) for row in rows} == {len(header)}
