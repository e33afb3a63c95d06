"""Sections with pictures: Dice as bars, segmented slices, and the contribution of each modality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from passion_monai.evaluation.kept_maps import read_kept_case
from passion_monai.evaluation.statistics import contributions as contributions_of
from passion_monai.evaluation.statistics import summarise
from passion_monai.report.figures import plot_case, plot_contributions, plot_methods
from passion_monai.report.groups import DICE, Group
from passion_monai.report.page import Page, Section
from passion_monai.report.tables import nothing_bold, pivot, with_interval

__all__ = ["bars", "cases", "contributions", "kept_cases"]

_MOST_CASES = 4  # of overlays


def bars(page: Page) -> Section:
    """Dice of each method by region and combination."""
    means = {group.label: summarise(group.scores, DICE.column) for group in page.groups}
    figure = plot_methods(means, modalities=page.modalities, regions=page.regions)
    alt = "Bars: mean Dice of each method for each region and combination; lines: 95 % intervals over the cases."
    text = "Where the methods differ (the paper's Fig. 3): filled circles say which modalities are given."
    return Section("bars", "Methods by combination", text, [page.figure("methods", alt, figure)])


def cases(page: Page) -> Section:
    """Slices of the cases that all methods kept."""
    kept = {group.label: kept_cases(group) for group in page.groups}
    lacking = [label for label, paths in kept.items() if not paths]
    maps = {label: paths for label, paths in kept.items() if paths}
    names = sorted(set.intersection(*map(set, maps.values())))[:_MOST_CASES] if maps else []
    hint = f"No case was kept of {', '.join(lacking)}; run the evaluate workflow with --keep_cases 2."
    if maps and not names:
        hint = "No case was kept of all methods; run the evaluate workflow with the same --keep_cases for each."
    figures = [_case(page, name, {label: paths[name] for label, paths in maps.items()}) for name in names]
    text = "Slices with the images given, the label, and each method's segmentation (the paper's Figs. 4 and 5)."
    missing = hint if lacking or not names else ""
    return Section("cases", "Segmentations", text if figures else "", figures, missing)


def contributions(page: Page) -> Section:
    """What each modality adds to the combinations of the others, on average."""
    title = "What each modality adds"
    if len(page.modalities) == 1:
        return Section("contributions", title, missing="There is only one modality.")
    tables = []
    for group in page.groups:
        table = contributions_of(group.scores, DICE.column, modalities=page.modalities)
        table[["mean", "low", "high"]] *= DICE.factor
        tables.append(table.assign(method=group.label))
    numbers = pd.concat(tables, ignore_index=True)
    means = pivot(numbers, "mean", ["method", "modality"], ["region"]).astype(float)
    text = pivot(numbers.assign(text=with_interval(numbers)), "text", ["method", "modality"], ["region"])
    caption = "Percentage points of Dice; in brackets the 95 % interval over the test cases."
    alt = "Heat maps of what each modality adds to each region, in percentage points of Dice."
    parts = [
        page.figure("contributions", alt, plot_contributions(means)),
        page.table("contributions", caption, numbers, text, nothing_bold(text)),
    ]
    sentence = "Mean Dice of the combinations with a modality minus that of the same combinations without it."
    return Section("contributions", title, sentence, parts)


def _case(page: Page, case: str, paths: Mapping[str, Path]) -> Markup:
    cases = {label: read_kept_case(path) for label, path in paths.items()}
    alt = f"Case {case}: each row is a combination of modalities; images, label and segmentations of each method."
    figure = plot_case(cases, class_names=page.settings["class_names"])
    return page.figure(f"case_{case}", alt, figure, photo=True)


def kept_cases(group: Group) -> dict[str, Path]:
    """File of each kept case by its id, from the first seed that kept it."""
    folders = [run.folder / "evaluation" / "maps" for run in reversed(group.runs)]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.npz"))}
