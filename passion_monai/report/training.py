"""Sections on the trainings: the runs, their curves, and the missing rates of their cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from passion_monai.presence import missing_rates as realised_rates
from passion_monai.report.figures import plot_curves
from passion_monai.report.page import Page, Section
from passion_monai.report.runs import Run
from passion_monai.report.tables import nothing_bold, pivot

__all__ = ["curves", "missing_rates", "runs"]


def runs(page: Page) -> Section:
    """The runs of the report."""
    columns = ("method", "backbone", "missing rates", "seeds", "epochs", "folders")
    rows = [
        (
            *(group.first.method, group.first.settings["backbone"], group.first.rates),
            ", ".join(str(run.settings["seed"]) for run in group.runs),
            ", ".join(dict.fromkeys(str(run.settings["epochs"]) for run in group.runs)),
            "\n".join(str(run.folder) for run in group.runs),
        )
        for group in page.groups
    ]
    numbers = pd.DataFrame(rows, columns=list(columns))
    shown = numbers.set_index(["method", "backbone", "missing rates"])
    part = page.table("runs", "The runs, one row per method.", numbers, shown, nothing_bold(shown))
    text = "Runs in one row are seeds of a method, or folds of a cross-validation, each of other cases."
    return Section("runs", "The runs", text, [part])


def curves(page: Page) -> Section:
    """Loss, relative preference and beta by epoch."""
    title = "Training"
    paths = {group.label: [run.optional_file("training.csv") for run in group.runs] for group in page.groups}
    logs = {label: [_read_log(path) for path in some if path] for label, some in paths.items() if any(some)}
    if not logs:
        return Section("training", title, missing="No run has a training.csv; train with the run's output_dir.")
    figure = plot_curves(logs, modalities=page.modalities)
    alt = "Per method and epoch: loss, relative preference of each modality (below 0: neglected), and its beta."
    text = (
        "Whether training has converged, which modalities the network neglects, and how beta answers (the paper's "
        "Fig. 6). A Baseline logs its preference with --measure_preference True."
    )
    return Section("training", title, text, [page.figure("training", alt, figure)])


def missing_rates(page: Page) -> Section:
    """The share of training cases that lack each modality."""
    title = "Missing rates in training"
    known = [(group, run) for group in page.groups for run in group.runs if run.presence is not None]
    if not known:
        missing = "No run has a presence.json; the training command with --resume True writes it."
        return Section("rates", title, missing=missing)
    numbers = pd.concat([_rates_of(group.label, run) for group, run in known], ignore_index=True)
    text = pivot(numbers, "text", ["method", "seed", "cases"], ["modality"])
    numbers = numbers.drop(columns="text")
    caption = "Share of training cases that lack the modality; in brackets what was asked for."
    part = page.table("missing_rates", caption, numbers, text, nothing_bold(text))
    return Section("rates", title, "How often each modality really was missing.", [part])


def _read_log(path: Path) -> pd.DataFrame:
    try:
        log = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); train again.") from error
    if not {"epoch", "loss"} <= {*log}:
        raise ValueError(f"{path} is not a training log: it needs the columns epoch and loss, got {list(log)}.")
    return log


def _rates_of(label: str, run: Run) -> pd.DataFrame:
    presence = list((run.presence or {}).values())
    realised = realised_rates(presence)
    asked = run.settings["missing_rates"] or [np.nan] * len(realised)
    table = pd.DataFrame({"modality": run.settings["modalities"], "realised": realised, "asked": asked})
    text = [
        f"{one:.3f}" + ("" if np.isnan(other) else f" ({other:g})") for one, other in zip(realised, asked, strict=True)
    ]
    return table.assign(method=label, seed=run.settings["seed"], cases=len(presence), text=text)
