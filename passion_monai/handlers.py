"""Ignite handlers: the update of beta each epoch, and a log of everything that an epoch did."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EMAHandler
from monai.engines import IterationEvents
from monai.handlers import from_engine
from torch import Tensor, nn

from passion_monai.files import complete_file, save_complete
from passion_monai.losses import PassionLoss
from passion_monai.preference import epoch_preference, gap_preference, rescale_beta, update_beta

__all__ = [
    "ExponentialMovingAverage",
    "FileCheckpoint",
    "HandlerSequence",
    "LossOutput",
    "PreferenceHandler",
    "TrainingLog",
]


class _RunningMean:
    """Mean over an epoch's samples, and over ranks, that leaves NaN entries out."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add `values` [B] or [B, M]; the mean runs over B."""
        total, count = values.nansum(dim=0).double(), (~values.isnan()).sum(dim=0).double()
        # What a checkpoint has given lies on the CPU.
        self.total = total if self.total is None else self.total.to(total.device) + total
        self.count = count if self.count is None else self.count.to(count.device) + count

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sum and number of samples of all ranks, after which this is empty again."""
        if self.total is None or self.count is None:
            raise RuntimeError("An epoch ended without an iteration; its mean is not defined.")
        # One collective for both, and always a tensor: all_reduce is typed for floats too.
        total, count = torch.as_tensor(idist.all_reduce(torch.stack([self.total, self.count])))
        self.total = self.count = None
        return total, count

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of each rank by itself, since their sum would round in another order; all ranks must call it."""
        if self.total is None or self.count is None:
            return {}
        return {"sums": torch.as_tensor(idist.all_gather(torch.stack([self.total, self.count])[None])).cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from this rank's sums."""
        self.total, self.count = state["sums"][idist.get_rank()] if state else (None, None)


class PreferenceHandler:
    """Updates the loss's beta at the end of each epoch from the epoch's relative preference, Eqs. (12) and (13).

    ``beta_m <- beta_m - gamma * sum_n(relative_preference[n, m]) / sum_n(presence[n, m])``, sums over all ranks. The
    state of beta is in the loss, and `state_dict` holds the history of beta and of the epochs' preference; put both
    into the checkpoint and attach this handler before the checkpoint's. The new values are put into
    ``engine.state.metrics`` as ``beta_<modality>``.

    Args:
        loss: the loss of the trainer that this is attached to.
        modalities: names of the M modalities.
        gamma: updating rate, 0.01 in the paper; 0 leaves beta as it is and still measures the preference.
        from_mean_gaps: take the preference of an epoch from its mean gaps, see
            :func:`passion_monai.preference.gap_preference`, instead of Eq. (12).
        limits: clamp beta to this range and rescale it after each update, see
            :func:`passion_monai.preference.rescale_beta`.
        boost: factor of gamma in the first epoch and in every `boost_interval`-th after it.
        boost_interval: epochs between boosts.

    Raises:
        ValueError: when `modalities` does not fit the loss or gamma is negative.
    """

    def __init__(
        self,
        loss: PassionLoss,
        modalities: Sequence[str],
        *,
        gamma: float = 0.01,
        from_mean_gaps: bool = False,
        limits: tuple[float, float] | None = None,
        boost: float = 1.0,
        boost_interval: int = 100,
    ) -> None:
        if len(modalities) != len(loss.beta):
            raise ValueError(f"modalities must name the loss's {len(loss.beta)} modalities, got {list(modalities)}.")
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}.")
        self.loss = loss
        self.modalities = tuple(modalities)
        self.gamma = gamma
        self.from_mean_gaps = from_mean_gaps
        self.limits = limits
        self.boost = boost
        self.boost_interval = boost_interval
        self.history: list[dict[str, list[float]]] = []
        self._mean = _RunningMean()

    @classmethod
    def released(cls, loss: PassionLoss, modalities: Sequence[str], *, gamma: float = 0.01) -> PreferenceHandler:
        """The update of beta in the authors' code, to go with :meth:`passion_monai.losses.PassionLoss.released`."""
        return cls(loss, modalities, gamma=gamma, from_mean_gaps=True, limits=(0.1, 4.0), boost=1.5)

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer whose loss function is `loss`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._accumulate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._update)

    def state_dict(self) -> dict[str, Any]:
        """What each epoch's preference was and what beta became, as plain lists, and the sums of an unfinished one."""
        return {"history": self.history, "mean": self._mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history."""
        self.history = list(state["history"])
        self._mean.load_state_dict(state["mean"])

    def _accumulate(self) -> None:
        self._mean.update(self.loss.terms["gap" if self.from_mean_gaps else "relative_preference"])

    def _update(self, engine: Engine) -> None:
        sums = self._mean.sums()
        preference = gap_preference(*sums) if self.from_mean_gaps else epoch_preference(*sums)
        boosted = (engine.state.epoch - 1) % self.boost_interval == 0
        beta = update_beta(self.loss.beta, preference, self.gamma * (self.boost if boosted else 1.0))
        self.loss.beta.copy_(beta if self.limits is None else rescale_beta(beta, self.limits))
        self.history.append({"relative_preference": preference.tolist(), "beta": self.loss.beta.tolist()})
        engine.state.metrics |= _by_modality("beta", self.loss.beta.tolist(), self.modalities)


class ExponentialMovingAverage:
    """Keeps an exponential moving average (EMA) of a network's weights, to validate and save in the network's place.

    ``average <- decay_t * average + (1 - decay_t) * weights`` after the t-th iteration of the training, with ``decay_t
    = min(decay, (1 + t) / (10 + t))``, as in TensorFlow's class of this name: the average of a short training, too, has
    forgotten the weights that it began with. It is Ignite's :class:`ignite.handlers.EMAHandler` with this decay and a
    state, to be part of the checkpoint; attach it before the checkpoint's handler.

    Args:
        network: the network that is trained.
        decay: what a step keeps of the average, between 0 and 1, both excluded.

    Raises:
        ValueError: when `decay` is out of range.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be above 0 and below 1, got {decay}.")
        self.decay = decay
        self._handler = EMAHandler(network, momentum=1 - decay)

    @property
    def network(self) -> nn.Module:
        """The network with the average of the weights."""
        return self._handler.ema_model

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer of the network."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._set_momentum)
        self._handler.attach(engine)

    def state_dict(self) -> dict[str, Any]:
        """The average of the weights."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average."""
        self.network.load_state_dict(state)

    def _start(self) -> None:
        # Several processes have the same weights by now; when this object was made, each had drawn its own.
        self.network.load_state_dict(self._handler.model.state_dict())

    def _set_momentum(self, engine: Engine) -> None:
        state: Any = engine.state
        iterations = state.iteration
        state.ema_momentum = 1 - min(self.decay, (1 + iterations) / (10 + iterations))


class HandlerSequence:
    """Handlers that a configuration defines elsewhere, because it refers to them, in a trainer's list of handlers.

    Args:
        handlers: objects with a method `attach`, attached in this order; None is left out.
    """

    def __init__(self, handlers: Sequence[Any]) -> None:
        self.handlers = [handler for handler in handlers if handler is not None]

    def attach(self, engine: Engine) -> None:
        """Attach them all."""
        for handler in self.handlers:
            handler.attach(engine)


class LossOutput:
    """Leaves the loss alone of what a trainer puts out, in the form that MONAI's handlers expect of any trainer.

    The passes of an iteration need not be kept while the next one runs; and they are no per-sample lists, to which
    MONAI would decollate them.
    """

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer; attach it before the handlers that read the output."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        state.output = [{"loss": state.output["loss"].detach()}]


class TrainingLog:
    """Writes a CSV file with one row per epoch: the loss, its terms per modality, preference, beta and validation.

    Columns are ``epoch``, ``loss``, the entries of the loss's `terms` (``loss_pixel_<modality>``, ...), what handlers
    before this one put into ``engine.state.metrics``, and the validator's metrics with the prefix ``val_``, empty in
    epochs without validation. All are put into ``engine.state.metrics`` too, for TensorBoard and MLflow handlers
    attached after this one. The file is written anew each epoch, so that a resumed run continues it.

    Args:
        path: the CSV file; its folder is made.
        loss: the loss of the trainer, with an attribute `terms` (see :class:`passion_monai.losses.PassionLoss`).
        modalities: names of the M modalities.
        validator: the evaluator that validates; attach this handler after the one that runs it, and after
            :class:`LossOutput`.
    """

    def __init__(self, path: str | Path, loss: Any, modalities: Sequence[str], *, validator: Engine) -> None:
        self.path = Path(path)
        self.loss = loss
        self.modalities = tuple(modalities)
        self.validator = validator
        self.rows: list[dict[str, float]] = []
        self._means: dict[str, _RunningMean] = {}
        self._validated = False

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer whose loss function is `loss`."""
        self.validator.add_event_handler(Events.COMPLETED, self._note_validation)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._accumulate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def state_dict(self) -> dict[str, Any]:
        """The rows written so far, and the sums of an unfinished epoch."""
        return {"rows": self.rows, "means": {name: mean.state_dict() for name, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved rows."""
        self.rows = list(state["rows"])
        for name, sums in state["means"].items():
            self._means.setdefault(name, _RunningMean()).load_state_dict(sums)

    def _note_validation(self) -> None:
        self._validated = True

    def _accumulate(self, engine: Engine) -> None:
        loss = from_engine(["loss"], first=True)(engine.state.output).reshape(1)
        for name, values in ({"loss": loss} | self.loss.terms).items():
            self._means.setdefault(name, _RunningMean()).update(values)

    def _write(self, engine: Engine) -> None:
        for name, mean in self._means.items():
            total, count = mean.sums()
            values = (total / count).tolist()  # NaN where no sample of the epoch had the modality
            named = _by_modality(name, values, self.modalities) if isinstance(values, list) else {name: values}
            engine.state.metrics |= named
        row = {"epoch": engine.state.epoch} | engine.state.metrics
        if self._validated:
            row |= {f"val_{name}": float(value) for name, value in self.validator.state.metrics.items()}
            self._validated = False
        self.rows.append(row)
        if idist.get_rank() == 0:
            self._write_rows()

    def _write_rows(self) -> None:
        columns = dict.fromkeys(column for row in self.rows for column in row)
        with complete_file(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


class FileCheckpoint(Checkpoint):
    """Saves to one file at the end of each epoch, or of each epoch with a better metric.

    A single-entry `save_dict` is saved as a bare state dict, which is what a bundle's ``models/model.pt`` is.

    Args:
        path: the file; its folder is made.
        save_dict: objects with a `state_dict`.
        metric: name in ``engine.state.metrics`` of the score to be highest; every epoch counts if None. The best score
            so far is part of this object's own `state_dict`.
    """

    def __init__(self, path: str | Path, save_dict: Mapping[str, Any], *, metric: str | None = None) -> None:
        self.path = Path(path)
        super().__init__(
            dict(save_dict),
            self._write,
            filename_pattern=self.path.name,
            score_function=_epoch if metric is None else None,
            score_name=metric,
            n_saved=1,
        )

    def attach(self, engine: Engine) -> None:
        """Save at the end of the engine's epochs; attach it after the handlers whose state it saves."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _write(self, content: Mapping[str, Any], *_: object) -> None:
        if idist.get_rank() == 0:
            save_complete(content, self.path)


def _epoch(engine: Engine) -> int:
    return engine.state.epoch


def _by_modality(name: str, values: Sequence[float], modalities: Sequence[str]) -> dict[str, float]:
    return {f"{name}_{modality}": value for modality, value in zip(modalities, values, strict=True)}
