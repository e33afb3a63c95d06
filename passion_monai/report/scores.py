"""Sections on scores: by method, by part of PASSION, by combination, and tests of the differences."""

from __future__ import annotations

import pandas as pd

from passion_monai.evaluation.statistics import ALL, compare
from passion_monai.report.groups import AVERAGE, DICE, Group
from passion_monai.report.page import Page, Section, sentences
from passion_monai.report.tables import nothing_bold, with_interval

__all__ = ["ablation", "by_count", "combinations", "methods", "tests"]

_ALPHA = 0.05
_TICKS = ("pixel", "prototype", "δ", "β")


def methods(page: Page) -> Section:
    """Means over all combinations, by method and by missing rates."""
    numbers = pd.concat([group.estimates(page.metrics) for group in sorted(page.groups, key=page.rates_order)])
    rows = ["missing rates", "method", *page.backbone_key()]
    caption = f"Means over all combinations of modalities. {page.conventions}"
    within = ["missing rates", "backbone", "metric", "region"]
    part = page.estimates("table1", caption, numbers, rows, ["metric", "region"], within)
    text = (
        f"Which method is best at which missing rates ({', '.join(page.modalities)}) of the training cases, in the "
        "layout of the paper's Table 1."
    )
    return Section("methods", "Methods and missing rates", text, [part])


def ablation(page: Page) -> Section:
    """Means over all combinations, by the parts of PASSION in use."""
    title = "What the parts of PASSION do"
    groups = [group for group in page.groups if group.first.ticks is not None]
    if not any(group.first.settings["objective"] == "passion" and not _is_full(group) for group in groups):
        missing = (
            "No run leaves out a part of PASSION; train some with --lambda_pixel 0, --lambda_prototype 0, "
            "--use_task_mask False or --adaptive_beta False for the paper's Table 2."
        )
        return Section("ablation", title, missing=missing)
    numbers = pd.concat([_with_ticks(group.estimates(page.metrics), group) for group in groups])
    caption = (
        "✓: the pixel-wise loss, the prototype loss, the task mask δ and the adaptive weight β are used. "
        + page.conventions
    )
    rows = [*page.rates_key(), *page.backbone_key(), *_TICKS, "method"]
    within = ["missing rates", "backbone", "metric", "region"]
    part = page.estimates("table2", caption, numbers, rows, ["metric", "region"], within)
    text = "What is lost where a part of PASSION is left out, in the layout of the paper's Table 2."
    return Section("ablation", title, text, [part])


def by_count(page: Page) -> Section:
    """Mean Dice by how many modalities are given."""
    groups = sorted(page.groups, key=page.rates_order)
    tables = [group.estimates_by_count(metric) for group in groups for metric in page.dice]
    numbers = pd.concat(tables, ignore_index=True)
    rows = ["missing rates", "method", *page.backbone_key()]
    caption = sentences("Means of all regions and of all combinations of as many modalities.", page.intervals)
    within = ["missing rates", "backbone", "metric", "given"]
    part = page.estimates("by_count", caption, numbers, rows, ["metric", "given"], within)
    text = "Whether a method gains where few modalities are given, and what it loses where all are."
    return Section("by_count", "How many modalities are given", text, [part])


def combinations(page: Page) -> Section:
    """Means of each combination, one table per metric."""
    parts = []
    for metric in page.metrics:
        numbers = pd.concat([group.estimates([metric], by_combination=True) for group in page.groups])
        numbers = numbers[numbers["region"] != AVERAGE]
        name = f"table3_{metric.column.removesuffix('_brats')}{'_excluded' if metric.exclude_empty else ''}"
        parts.append(page.by_combination(name, metric.title, numbers, ["region", "label"]))
    text = "Each combination of modalities (● given, ○ not given), in the layout of the paper's Table 3."
    return Section("combinations", "Every combination of modalities", text, parts)


def tests(page: Page) -> Section:
    """Paired tests of each method against its reference."""
    title = "Paired tests"
    pairs = [(page.reference(group), group) for group in page.groups]
    tables = [_compared(*pair) for pair in pairs if pair[0] is not pair[1]]
    if not tables:
        missing = "There is nothing to compare; give a run of another method with the same missing rates."
        return Section("tests", title, missing=missing)
    numbers = pd.concat(tables, ignore_index=True)
    text, bold = _test_text(numbers)
    caption = (
        "Differences in Dice, in percentage points, of each case's mean over all combinations, with their 95 % "
        "intervals; p is of Wilcoxon's signed-rank test over the cases, corrected by Holm's method, bold below "
        f"{_ALPHA}. The effect size is the rank-biserial correlation, from -1 to 1. The last column counts single "
        f"combinations with p below {_ALPHA}."
    )
    part = page.table("tests", caption, numbers, text, bold)
    sentence = "How sure it is that a method differs from the one it is compared with, on the same cases."
    return Section("tests", title, sentence, [part])


def _is_full(group: Group) -> bool:
    return all(group.first.ticks or ())


def _with_ticks(numbers: pd.DataFrame, group: Group) -> pd.DataFrame:
    marks = ["✓" if there else "" for there in group.first.ticks or ()]
    return numbers.assign(**dict(zip(_TICKS, marks, strict=True)))


def _compared(reference: Group, group: Group) -> pd.DataFrame:
    table = compare(reference.scores, group.scores, DICE.column)
    table[["difference", "low", "high"]] *= DICE.factor
    table.insert(0, "compared with", reference.label)
    table.insert(0, "method", group.label)
    return table


def _test_text(numbers: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all combinations: text, and which cells are bold."""
    keys = ["method", "compared with", "region"]
    rows = numbers[numbers["combination"] == ALL].set_index(keys)
    single = numbers[numbers["combination"] != ALL]
    single = single.assign(
        better=(single["p_holm"] < _ALPHA) & (single["difference"] > 0),
        worse=(single["p_holm"] < _ALPHA) & (single["difference"] < 0),
    )
    sums = single.groupby(keys)[["better", "worse"]].sum()
    counts = ["{} better, {} worse".format(*sums.loc[key]) if key in sums.index else "" for key in rows.index]
    text = pd.DataFrame(
        {
            "difference": with_interval(rows.rename(columns={"difference": "mean"}), sign="+"),
            "p (Holm)": rows["p_holm"].map("{:.2g}".format),
            "effect size": rows["effect_size"].map("{:+.2f}".format),
            "cases": rows["cases"].astype(str),
            "combinations": counts,
        }
    )
    bold = nothing_bold(text)
    bold.loc[(rows["p_holm"] < _ALPHA).to_numpy(), "p (Holm)"] = True
    return text, bold
