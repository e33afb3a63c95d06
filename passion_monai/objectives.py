"""What each objective of a training is made of: the one place to add another.

An objective is a loss, the passes that the loss needs, and who updates beta. A function here makes it from the settings
of a training, and `OBJECTIVES` has its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from passion_monai.config import check_choices
from passion_monai.handlers import PreferenceHandler
from passion_monai.losses import PassionLoss, PMRLoss, TaskLoss

__all__ = ["OBJECTIVES", "Objective", "ObjectiveSettings", "check_objective", "make_objective"]


class Objective(NamedTuple):
    """What a training minimises, and how.

    Attributes:
        loss: of the passes of :class:`passion_monai.distillation.SelfDistillation` and the label.
        students: which of its students are run.
        own_predictions: which of its own predictions are run.
        preference_handler: updates the loss's beta each epoch, where it has one.
    """

    loss: nn.Module
    students: str
    own_predictions: str
    preference_handler: PreferenceHandler | None = None


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of a training that objectives are made from; an objective takes those that it has.

    Attributes:
        modalities: names of the M modalities.
        num_classes: K, background included.
        availability: N / N_m of each modality, see :func:`passion_monai.preference.initial_beta`.
        lambda_pixel: lambda_1 of Eq. (14).
        lambda_prototype: lambda_2 of Eq. (14).
        temperature: tau of Eq. (3).
        gamma: updating rate of Eq. (13).
        use_task_mask: delta of Eq. (11).
        adaptive_beta: beta of Eq. (13); otherwise it is 1.
        level_decay: weight of level l is this to the power l.
        measure_preference: run students without gradient, for the relative preference that they show.
    """

    modalities: Sequence[str]
    num_classes: int
    availability: Tensor
    lambda_pixel: float = 0.5
    lambda_prototype: float = 0.1
    temperature: float = 4.0
    gamma: float = 0.01
    use_task_mask: bool = True
    adaptive_beta: bool = True
    level_decay: float = 1.0
    measure_preference: bool = False


def _passion(settings: ObjectiveSettings) -> Objective:
    """Eq. (14), as the paper prints it."""
    loss = PassionLoss(
        len(settings.modalities),
        settings.num_classes,
        initial_beta=settings.availability if settings.adaptive_beta else None,
        lambda_pixel=settings.lambda_pixel,
        lambda_prototype=settings.lambda_prototype,
        temperature=settings.temperature,
        use_task_mask=settings.use_task_mask,
        level_decay=settings.level_decay,
    )
    gamma = settings.gamma if settings.adaptive_beta else 0.0
    return Objective(loss, "trained", "none", PreferenceHandler(loss, settings.modalities, gamma=gamma))


def _released(settings: ObjectiveSettings, *, distil: bool = True) -> Objective:
    """That of the authors' code; without the distillation, its control."""
    loss = PassionLoss.released(
        len(settings.modalities), settings.num_classes, availability=settings.availability, distil=distil
    )
    handler = PreferenceHandler.released(loss, settings.modalities, gamma=settings.gamma)
    return Objective(loss, "trained" if distil else "measured", "neglected", handler)


def _reweighted(settings: ObjectiveSettings) -> Objective:
    return _released(settings, distil=False)


def _baseline(settings: ObjectiveSettings) -> Objective:
    """Eq. (2)."""
    students = "measured" if settings.measure_preference else "none"
    loss = TaskLoss(measure_preference=settings.measure_preference, level_decay=settings.level_decay)
    return Objective(loss, students, "all")


def _pmr(settings: ObjectiveSettings) -> Objective:
    """The Baseline with prototypical modality rebalance."""
    loss = PMRLoss(num_classes=settings.num_classes, level_decay=settings.level_decay)
    return Objective(loss, "trained", "all")


OBJECTIVES: Mapping[str, Callable[[ObjectiveSettings], Objective]] = {
    "passion": _passion,
    "released": _released,
    "reweighted": _reweighted,
    "baseline": _baseline,
    "pmr": _pmr,
}


def check_objective(objective: object) -> None:
    """Refuse a name that no objective has.

    Raises:
        ValueError: naming those that there are.
    """
    check_choices(list(OBJECTIVES), objective=objective)


def make_objective(name: str, **settings: Any) -> Objective:
    """An objective by its name.

    Args:
        name: key of `OBJECTIVES`.
        settings: those of :class:`ObjectiveSettings`.

    Raises:
        ValueError: when there is no such objective, or a setting is out of range.
    """
    check_objective(name)
    return OBJECTIVES[name](ObjectiveSettings(**settings))
