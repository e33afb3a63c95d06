"""The section on calibration: whether a confidence of 80 % is right in 80 % of the voxels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from passion_monai.evaluation.statistics import confidence_interval
from passion_monai.report.page import Page, Section
from passion_monai.report.runs import Run

__all__ = ["calibration"]


def calibration(page: Page) -> Section:
    """Expected calibration error of each combination."""
    title = "Calibration"
    paths = {group.label: [path for run in group.runs if (path := _file_of(run))] for group in page.groups}
    tables = [table for label, some in paths.items() if some for table in _calibration_of(label, some)]
    if not tables:
        missing = "No run has evaluation/calibration.csv; evaluate with --calibration True."
        return Section("calibration", title, missing=missing)
    lacking = [str(run.folder) for group in page.groups for run in group.runs if _file_of(run) is None]
    note = f"Left out, for want of evaluation/calibration.csv: {', '.join(lacking)}." if lacking else ""
    numbers = pd.concat(tables, ignore_index=True)
    part = page.by_combination("calibration", "Expected calibration error [%]", numbers, ["method"])
    text = (
        "How far the networks' confidence is from how often they are right, over all voxels of the box around the head "
        "or heart, with the air in it: 0 is best. Evaluated with --calibrated True, a run has it after temperature "
        "scaling too."
    )
    return Section("calibration", title, text, [part], missing=note)


def _file_of(run: Run) -> Path | None:
    return run.optional_file("evaluation", "calibration.csv")


def _calibration_of(label: str, paths: Iterable[Path]) -> list[pd.DataFrame]:
    """Calibration error of each combination in percent, plain and after scaling: mean over seeds, then over cases."""
    errors = pd.concat([_read_calibration(path) for path in paths])
    named = {"ece": label, "ece_calibrated": f"{label}, calibrated"}
    if "ece_calibrated" in errors:  # of the same cases and seeds as what it is compared with
        there = errors["ece_calibrated"].notna()
        errors = errors[there | ~there.groupby(errors["combination"]).transform("any")]
    return [_ece_means(errors, column).assign(method=name) for column, name in named.items() if column in errors]


def _read_calibration(path: Path) -> pd.DataFrame:
    empty = {"ece": [""], "ece_calibrated": [""]}
    table = pd.read_csv(path, dtype={"case": str, "combination": str}, keep_default_na=False, na_values=empty)
    if not {"case", "combination", "ece"} <= {*table}:
        raise ValueError(f"{path} must have the columns case, combination and ece, got {list(table)}.")
    return table


def _ece_means(errors: pd.DataFrame, column: str) -> pd.DataFrame:
    percent = 100 * errors.groupby(["combination", "case"], sort=False)[column].mean()
    rows = [
        (name, values.mean(), *confidence_interval(values), values.count())
        for name, values in percent.groupby("combination", sort=False)
    ]
    columns = ["combination", "mean", "low", "high", "cases"]
    return pd.DataFrame(rows, columns=columns).assign(metric="ECE [%]", sign=-1)
