"""What a training shows while it runs: values beside the progress bar, a line per epoch, a table per validation."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from math import isnan
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from passion_monai.devices import read_back
from passion_monai.evaluation.dice import CombinationDiceMetric
from passion_monai.presence import combinations

__all__ = ["ProgressValues", "TrainingProgress", "score_table"]

logger = logging.getLogger(__name__)

_LOSS = "loss_"
_LONG_SECONDS = 600  # of a validation; whose first case tells how to shorten it


class ProgressValues:
    """What a progress bar shows of a training: the loss and its terms, read in one of every few iterations.

    To read them is to wait for the GPU, which would have nothing to do until the next iteration begins.

    Args:
        loss: the loss of the trainer, with an attribute `terms` (see :class:`passion_monai.losses.PassionLoss`).
        interval: iterations between readings.
    """

    def __init__(self, loss: Any, *, interval: int = 10) -> None:
        self.loss = loss
        self.interval = interval
        self._calls = 0
        self._shown: dict[str, float] = {}

    def __call__(self, output: Any) -> dict[str, float]:
        """Values by name, from the output of a trainer as :class:`LossOutput` leaves it; call it in each iteration."""
        if self._calls % self.interval == 0:
            self._shown = self._read(output)
        self._calls += 1
        return self._shown

    def _read(self, output: Any) -> dict[str, float]:
        terms = {name: values for name, values in self.loss.terms.items() if name.startswith("loss_")}
        means = {"loss": output[0]["loss"]} | {n.removeprefix("loss_"): v.nanmean() for n, v in terms.items()}
        return dict(zip(means, read_back(torch.stack(list(means.values()))).tolist(), strict=True))


class TrainingProgress:
    """Logs one line at the end of each epoch, and a small table of scores at the end of each validation.

    The line has the loss and its terms, means over samples and modalities, how long the epoch took with its validation,
    and how long the others will take if they take as long as those so far. After the first case of the first
    validation, a warning tells how long a validation takes, if it is long.

    Args:
        loss: the loss of the trainer, with an attribute `terms` (see :class:`passion_monai.losses.PassionLoss`).
        modalities: names of the M modalities.
        validator: the evaluator that validates.
        metric: that which it computes.

    Attach it after the :class:`passion_monai.handlers.TrainingLog`, whose means it shows.
    """

    def __init__(
        self, loss: Any, modalities: Sequence[str], *, validator: Engine, metric: CombinationDiceMetric
    ) -> None:
        self.loss = loss
        self.modalities = tuple(modalities)
        self.validator = validator
        self.metric = metric
        self._epochs_shown = 0
        self._started = self._last = self._validation_started = 0.0
        self._validated = self._foretold = False

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        self.validator.add_event_handler(Events.STARTED, self._start_validation)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED(once=1), self._foretell)
        self.validator.add_event_handler(Events.COMPLETED, self._note_validation)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._show)

    def _start(self) -> None:
        self._epochs_shown = 0  # of this run, which may go on with a later epoch
        self._started = self._last = time.monotonic()

    def _start_validation(self) -> None:
        self._validation_started = time.monotonic()

    def _foretell(self, validator: Engine) -> None:
        if self._foretold:
            return
        self._foretold = True
        seconds, cases = time.monotonic() - self._validation_started, validator.state.epoch_length or 1
        if seconds * cases > _LONG_SECONDS:
            logger.warning(
                f"The first of {cases} validation cases took {seconds:.0f} s: each validation takes about "
                f"{_duration(seconds * cases)}. Shorter: --val_cases, --val_combinations single_and_complete, or a "
                "larger --val_interval."
            )

    def _note_validation(self) -> None:
        self._validated = True

    def _show(self, engine: Engine) -> None:
        state, now = engine.state, time.monotonic()
        epochs = state.max_epochs or state.epoch
        self._epochs_shown += 1
        left = (now - self._started) / self._epochs_shown * (epochs - state.epoch)
        names = [name for name in self.loss.terms if name.startswith(_LOSS)]
        terms = ", ".join(f"{name.removeprefix(_LOSS)} {self._mean(state.metrics, name):.3f}" for name in names)
        logger.info(
            f"Epoch {state.epoch:{len(str(epochs))}}/{epochs}: loss {state.metrics['loss']:.3f} ({terms}), "
            f"{now - self._last:.1f} s, {_duration(left)} left"
        )
        self._last = now
        if self._validated:
            scores: Any = self.metric.get_buffer()  # a tensor, once a validation has run
            logger.info("Validation, mean Dice [%]\n" + score_table(scores, self.modalities, list(self.metric.regions)))
            self._validated = False

    def _mean(self, metrics: Mapping[str, float], name: str) -> float:
        """A term, or its mean over the modalities that it has a value for."""
        keys = (name, *(f"{name}_{modality}" for modality in self.modalities))
        values = [metrics[key] for key in keys if key in metrics]
        return float(torch.tensor(values).nanmean())


def score_table(scores: Tensor, modalities: Sequence[str], regions: Sequence[str]) -> str:
    """Mean Dice in percent by how many modalities are given, then of all combinations, as lines of text.

    Args:
        scores: those of N cases, P combinations and R regions; NaN for a combination that a case does not have.
        modalities: names of the M modalities.
        regions: names of the regions.

    Shape:
        - scores: [N, P * R], regions running fastest.
    """
    by_combination = 100 * scores.unflatten(1, (-1, len(regions))).nanmean(dim=0)  # PR
    given = torch.from_numpy(combinations(len(modalities)).sum(axis=1)).to(by_combination.device)
    rows = {f"{count} of {len(modalities)}": by_combination[given == count] for count in range(1, len(modalities) + 1)}
    rows["mean"] = by_combination
    columns = (*regions, "mean")
    widths = [max(8, len(name) + 2) for name in columns]
    lines = ["given  " + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, values in rows.items():
        means = [*values.nanmean(dim=0).tolist(), float(values.nanmean())]
        cells = ["-" if isnan(mean) else f"{mean:.1f}" for mean in means]
        lines.append(f"{name:<7}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
