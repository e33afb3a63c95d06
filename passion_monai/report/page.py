"""What all sections of a report share: its runs, and how to add a table or a figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from passion_monai.evaluation.figures import DPI
from passion_monai.files import complete_file, make_folder
from passion_monai.presence import combination_name, combinations
from passion_monai.report.groups import AVERAGE, DICE, DICE_EXCLUDED, LESION_METRICS, METRICS, Group, grouped
from passion_monai.report.runs import BASELINE, Run
from passion_monai.report.tables import cells, header, is_best, pivot, to_latex, with_interval

__all__ = ["Page", "Section", "sentences"]

_BRACKETS = "In brackets is the 95 % bootstrap interval over the test cases."
_SPREAD = "± is the standard deviation of the seeds' means, where there are several."
_BOLD = "The best of what is compared is bold."
_HD95 = (
    "HD95 is the larger of the two directions' 95th percentiles and counts 373.13 mm where exactly one of prediction "
    "and label is empty, as in the BraTS challenge; 'as in the paper' it is the percentile of both directions' "
    "distances together, and counts 1 mm there."
)
_EXCLUDED = (
    "Dice is 100 % where a region is neither in the label nor predicted, and 0 % where it is only predicted; 'of "
    "regions in the label' leaves these out."
)
_LESIONS = (
    "Lesion-wise scores are means over the lesions of label and prediction; one that is missed or false counts as Dice "
    "0 and HD95 373.13 mm."
)


@dataclass(frozen=True)
class Section:
    """A section of the page: a sentence, tables, figures, and a note on data that the runs lack."""

    name: str
    title: str
    text: str = ""
    parts: list[Markup] = field(default_factory=list)
    missing: str = ""


class Page:
    """The runs of a report, in groups. Writes the files of its tables and figures.

    Args:
        runs: the output of :func:`passion_monai.report.runs.read_runs`.
        folder: folder of the page, its tables and figures; created if missing.
        template: template of the page, with macros for tables and figures.
    """

    def __init__(self, runs: Sequence[Run], folder: Path, template: jinja2.Template) -> None:
        self.folder = make_folder(folder)
        self.template = template
        self.runs = list(runs)
        self.settings = runs[0].settings
        self.modalities: list[str] = list(self.settings["modalities"])
        self.regions = list(dict.fromkeys(runs[0].scores["region"]))
        self.groups = grouped(runs)
        lesionwise = all("lesion_dice" in run.scores for run in runs)
        # Where every label has every region, to leave out the others changes nothing.
        self.dice = (DICE, DICE_EXCLUDED) if any((run.scores["label_ml"] == 0).any() for run in runs) else (DICE,)
        self.metrics = (*self.dice, *METRICS[1:], *(LESION_METRICS if lesionwise else ()))
        self.intervals = _signs(self.groups)
        excluded = _EXCLUDED if DICE_EXCLUDED in self.dice else ""
        self.conventions = sentences(self.intervals, excluded, _HD95, _LESIONS if lesionwise else "")
        self.combinations = [combination_name(row, self.modalities) for row in combinations(len(self.modalities))]

    def table(self, name: str, caption: str, numbers: pd.DataFrame, text: pd.DataFrame, bold: pd.DataFrame) -> Markup:
        """Write a table as LaTeX and its numbers as CSV; return it as HTML."""
        self.write(f"{name}.csv", numbers.to_csv(index=False))
        self.write(f"{name}.tex", to_latex(text, bold))
        table: Markup = self.template.module.table(name, caption, header(text), cells(text, bold))  # type: ignore[attr-defined]
        return table

    def estimates(
        self, name: str, caption: str, numbers: pd.DataFrame, rows: list[str], columns: list[str], within: list[str]
    ) -> Markup:
        """Write a table of means with intervals; the best of the rows that agree in the keys `within` is bold."""
        shown = numbers.assign(text=with_interval(numbers), best=is_best(numbers, within))
        text, bold = (pivot(shown, value, rows, columns) for value in ("text", "best"))
        return self.table(name, caption, numbers, text.fillna("-"), bold.eq(True))

    def by_combination(self, name: str, title: str, numbers: pd.DataFrame, columns: list[str]) -> Markup:
        order = {name: index for index, name in enumerate([*self.combinations, AVERAGE])}
        numbers = numbers.sort_values("combination", key=lambda names: names.map(order), kind="stable")
        marks = numbers["combination"].map(self._circles)
        circles = pd.DataFrame(marks.tolist(), columns=self.modalities, index=numbers.index)
        return self.estimates(
            name,
            sentences(f"{title}.", self.intervals, _caption(title)),
            pd.concat([circles, numbers], axis=1),
            self.modalities,
            columns,
            ["combination", *columns[:-1]],
        )

    def figure(self, name: str, alt: str, figure: Figure, *, photo: bool = False) -> Markup:
        """Write a figure as PNG and SVG; return the HTML that shows one of them."""
        data = {}
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
            with mpl.rc_context({"svg.hashsalt": name}):
                figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
            data[kind] = buffer.getvalue()
            with complete_file(self.folder / f"{name}.{kind}") as unfinished:
                unfinished.write_bytes(data[kind])
        kind, media = ("png", "image/png") if photo else ("svg", "image/svg+xml")
        source = f"data:{media};base64,{base64.b64encode(data[kind]).decode()}"
        part: Markup = self.template.module.figure(name, alt, source)  # type: ignore[attr-defined]
        return part

    def write(self, name: str, text: str) -> None:
        with complete_file(self.folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def _circles(self, combination: str) -> tuple[str, ...]:
        if combination == AVERAGE:
            return (AVERAGE, *[""] * (len(self.modalities) - 1))
        return tuple("●" if name in combination.split("+") else "○" for name in self.modalities)

    def reference(self, group: Group) -> Group:
        """The Baseline with a group's backbone and missing rates; without one, the first group with these."""
        keys = (group.first.settings["backbone"], group.first.rates)
        same = [one for one in self.groups if (one.first.settings["backbone"], one.first.rates) == keys]
        return next((one for one in same if one.first.method == BASELINE), same[0])

    def rates_order(self, group: Group) -> int:
        return [run.rates for run in self.runs].index(group.first.rates)

    def backbone_key(self) -> list[str]:
        return ["backbone"] if len({run.settings["backbone"] for run in self.runs}) > 1 else []

    def rates_key(self) -> list[str]:
        return ["missing rates"] if len({run.rates for run in self.runs}) > 1 else []


def sentences(*parts: str) -> str:
    """The parts of a text that are not empty, one after the other."""
    return " ".join(filter(None, parts))


def _signs(groups: Sequence[Group]) -> str:
    """What brackets, ± and bold mean, of those that the tables of these groups have."""
    several_cases = any(group.scores["case"].nunique() > 1 for group in groups)
    several_seeds = any("seed" in group.scores for group in groups)
    there = {_BRACKETS: several_cases, _SPREAD: several_seeds, _BOLD: len(groups) > 1}
    return sentences(*(sign for sign, is_there in there.items() if is_there))


def _caption(title: str) -> str:
    """The caption of a metric."""
    captions = {"HD95": _HD95, "lesion-wise": _LESIONS, DICE_EXCLUDED.title: _EXCLUDED}
    return next((text for start, text in captions.items() if title.startswith(start)), "")
