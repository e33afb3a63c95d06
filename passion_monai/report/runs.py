"""Reads the runs of a report and names their methods."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from passion_monai.evaluation.tables import METRICS, read_scores
from passion_monai.presence import combination_name, combinations, read_presence
from passion_monai.run_record import read_settings

__all__ = ["BASELINE", "Run", "method_name", "pooled_scores", "read_runs"]

BASELINE = "Baseline"
_LAMBDAS = (0.5, 0.1)  # Sec. 4.2 of the paper
_NAMES_IN_ERROR = 3


@dataclass(frozen=True)
class Run:
    """An evaluated run.

    Attributes:
        folder: its folder.
        method: name of the method; runs of one method differ in their seeds, missing rates or backbones.
        settings: content of ``run.json``.
        scores: rows of :data:`passion_monai.evaluation.tables.SCORE_COLUMNS`.
        presence: modalities of each training case by its id; None without a ``presence.json``.
    """

    folder: Path
    method: str
    settings: Mapping[str, Any]
    scores: pd.DataFrame
    presence: Mapping[str, Any] | None

    @property
    def rates(self) -> str:
        """The requested missing rates, as text, in the order of the modalities."""
        rates = self.settings["missing_rates"]
        if rates is not None:
            return f"({', '.join(f'{rate:g}' for rate in rates)})"
        complete = self.presence is not None and all(map(all, self.presence.values()))
        return "complete" if complete else "as the cases are"

    @property
    def ticks(self) -> tuple[bool, ...] | None:
        """Which parts of PASSION the run uses, as in the paper's Table 2; None if the table has no such row."""
        if self.settings["objective"] == "baseline" and not self.settings["modality_dropout"]:
            return (False,) * 4
        return _ticks(self.settings) if self.settings["objective"] == "passion" else None

    def optional_file(self, *parts: str) -> Path | None:
        """A file in the run's folder; None if it does not exist."""
        path = self.folder.joinpath(*parts)
        return path if path.is_file() else None


def method_name(settings: Mapping[str, Any]) -> str:
    """Name of the method of a training.

    Args:
        settings: content of ``run.json``.

    Example:
        >>> method_name({"objective": "baseline", "modality_dropout": True})
        '+ModDrop'
    """
    dropout = settings["modality_dropout"]
    if settings["objective"] == "baseline":
        return "+ModDrop" if dropout else BASELINE
    names = {"released": "PASSION (released)", "reweighted": "re-weighted control", "pmr": "+PMR"}
    return (names.get(settings["objective"]) or _passion_name(settings)) + (" +ModDrop" if dropout else "")


def read_runs(arguments: Iterable[str]) -> list[Run]:
    """Read evaluated runs for one report.

    Args:
        arguments: folders of runs; ``NAME=RUN`` also names the method.

    Raises:
        FileNotFoundError: a run was not evaluated, or has no ``run.json``; the message names its folder.
        ValueError: a file is damaged, or two runs are not comparable; the message names their folders.
    """
    runs = [_read_run(argument) for argument in arguments]
    for run in runs[1:]:
        _check_pair(runs[0], run)
    _check_cases(runs)
    for one, other in itertools.combinations(runs, 2):
        if _twin(one) == _twin(other) and not _are_folds([one, other]):
            raise ValueError(
                f"{one.folder} and {other.folder} are both {one.method!r} with seed {one.settings['seed']}; leave one "
                f"out, or rename one: NAME={other.folder}."
            )
    return runs


def pooled_scores(runs: Sequence[Run]) -> pd.DataFrame:
    """Scores of all runs of one method: seeds get a column ``seed``, folds of a cross-validation do not.

    Folds score different cases, so together they are one set of scores.
    """
    if len(runs) == 1:
        return runs[0].scores
    if _are_folds(runs):
        return pd.concat([run.scores for run in runs], ignore_index=True)
    return pd.concat([run.scores.assign(seed=run.settings["seed"]) for run in runs], ignore_index=True)


def _ticks(settings: Mapping[str, Any]) -> tuple[bool, ...]:
    """Pixel-wise loss, prototype loss, its task mask delta, and adaptive beta, which weights the pixel-wise loss."""
    pixel, prototype = settings["lambda_pixel"] > 0, settings["lambda_prototype"] > 0
    return pixel, prototype, bool(settings["use_task_mask"] and prototype), bool(settings["adaptive_beta"] and pixel)


def _passion_name(settings: Mapping[str, Any]) -> str:
    ticks = _ticks(settings)
    lambdas = settings["lambda_pixel"], settings["lambda_prototype"]
    parts = [part for part, there in zip(("pixel", "prototype", "δ", "β"), ticks, strict=True) if there]
    name = "PASSION" if all(ticks) else " + ".join(parts) or "without distillation"
    changed = any(value not in (0, paper) for value, paper in zip(lambdas, _LAMBDAS, strict=True))
    return f"{name} (λ {lambdas[0]:g}, {lambdas[1]:g})" if changed else name


def _read_run(argument: str) -> Run:
    name, _, rest = argument.partition("=")
    named = bool(rest) and not Path(argument).exists()
    folder = Path(rest if named else argument)
    if not (folder / "evaluation" / "scores.csv").is_file():
        raise FileNotFoundError(
            f"{folder} has no evaluation/scores.csv; give the folder of a run, after the evaluate workflow "
            "with it as output_dir."
        )
    settings = read_settings(folder)
    scores = _read_scores(folder, settings)
    path = folder / "presence.json"
    presence = read_presence(path, settings["modalities"]) if path.is_file() else None
    return Run(folder, name if named else method_name(settings), settings, scores, presence)


def _read_scores(folder: Path, settings: Mapping[str, Any]) -> pd.DataFrame:
    """Read the scores of a run; their modalities and regions must be those of its ``run.json``."""
    path = folder / "evaluation" / "scores.csv"
    remedy = "run the evaluate workflow again, to its end"
    try:
        scores = read_scores(path).astype(dict.fromkeys(METRICS, float))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and {remedy}.") from error
    if scores.empty:
        raise ValueError(f"{path} has no scores yet; {remedy}.")
    names = [combination_name(row, settings["modalities"]) for row in combinations(len(settings["modalities"]))]
    unknown = sorted({*scores["combination"]} - {*names}) + sorted({*scores["region"]} ^ {*settings["regions"]})
    if unknown:
        raise ValueError(
            f"{path} has other modalities or regions than {folder / 'run.json'} says: {unknown[:_NAMES_IN_ERROR]}; "
            f"{remedy}, with the ids of the training."
        )
    return scores


def _check_pair(first: Run, other: Run) -> None:
    """Check that two runs have the same modalities and regions."""
    for key in ("dataset", "modalities", "regions"):
        if first.settings[key] != other.settings[key]:
            raise ValueError(
                f"{first.folder} and {other.folder} are not comparable: their {key} are "
                f"{first.settings[key]} and {other.settings[key]}. Make a report for each."
            )


def _twin(run: Run) -> tuple[Any, ...]:
    """What two runs must not have in common, unless they are folds."""
    return run.method, run.settings["backbone"], run.rates, run.settings["seed"]


def _are_folds(runs: Sequence[Run]) -> bool:
    """Whether the runs scored different cases, as folds of a cross-validation do."""
    return sum(run.scores["case"].nunique() for run in runs) == len(set().union(*(run.scores["case"] for run in runs)))


def _check_cases(runs: Sequence[Run]) -> None:
    """Check that the runs of a method are seeds or folds, and that all methods scored the same cases."""
    methods: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        methods.setdefault((run.method, run.settings["backbone"], run.rates), []).append(run)
    for members in methods.values():
        if not _are_folds(members):
            for other in members[1:]:
                _check_same_cases([members[0]], [other])
    first, *others = methods.values()
    for members in others:
        _check_same_cases(first, members)


def _check_same_cases(first: Sequence[Run], others: Sequence[Run]) -> None:
    cases = [set().union(*(run.scores["case"] for run in members)) for members in (first, others)]
    if cases[0] != cases[1]:
        only = sorted(cases[0] ^ cases[1])
        raise ValueError(
            f"{first[0].folder} and {others[0].folder} are not comparable: {len(only)} test cases, such as "
            f"{only[:_NAMES_IN_ERROR]}, are in only one of them. Train and evaluate both with the same --datalist, or "
            "give the same folds for each method."
        )
