"""A report page on runs: `python -m passion_monai.evaluation.report RUN [RUN ...] --output report/`.

One HTML file with everything in it, and beside it each table as CSV and LaTeX and each figure as PNG and SVG.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from passion_monai.evaluation.figures import DPI
from passion_monai.evaluation.kept_maps import read_kept_case
from passion_monai.evaluation.report_figures import plot_case, plot_contributions, plot_curves, plot_methods
from passion_monai.evaluation.report_tables import cells, header, is_best, nothing_bold, pivot, to_latex, with_interval
from passion_monai.evaluation.runs import BASELINE, Run, pooled_scores, read_runs
from passion_monai.evaluation.statistics import ALL, compare, confidence_interval, contributions, overall, summarise
from passion_monai.files import complete_file, make_folder
from passion_monai.presence import combination_name, combinations, missing_rates

__all__ = ["main", "write_report"]

_AVERAGE = "Avg."
_ALPHA = 0.05
_MOST_CASES = 4  # of overlays
_TICKS = ("pixel", "prototype", "δ", "β")
_INTERVALS = (
    "In brackets is the 95 % bootstrap interval over the test cases; ± is the standard deviation of the seeds' means, "
    "where there are several. The best of what is compared is bold."
)
_HD95 = (
    "HD95 is the larger of the two directions' 95th percentiles and counts 373.13 mm where exactly one of prediction "
    "and label is empty, as in the BraTS challenge; 'as in the paper' it is the percentile of both directions' "
    "distances together, and counts 1 mm there."
)


@dataclass(frozen=True)
class _Metric:
    column: str
    title: str
    factor: float
    sign: int  # 1 where more is better, otherwise -1


_METRICS = (
    _Metric("dice", "Dice [%]", 100, 1),
    _Metric("hd95_brats", "HD95 [mm]", 1, -1),
    _Metric("hd95_released", "HD95 as in the paper [mm]", 1, -1),
)
_DICE = _METRICS[0]
_LESION_METRICS = (
    _Metric("lesion_dice", "lesion-wise Dice [%]", 100, 1),
    _Metric("lesion_hd95", "lesion-wise HD95 [mm]", 1, -1),
)
_LESIONS = (
    "Lesion-wise scores are means over the lesions of label and prediction; one that is missed or false counts as Dice "
    "0 and HD95 373.13 mm."
)


@dataclass(frozen=True)
class _Group:
    """Runs of one method, backbone and missing rates: its seeds, or the folds of a cross-validation."""

    label: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @cached_property
    def scores(self) -> pd.DataFrame:
        return pooled_scores(self.runs)

    def estimates(self, metrics: Iterable[_Metric], *, by_combination: bool = False) -> pd.DataFrame:
        """Means over all combinations, with those of the regions as "Avg.", or for each combination too."""
        tables = []
        for metric in metrics:
            means = overall(self.scores, metric.column).assign(combination=_AVERAGE)
            means.loc[means.index[-1], "region"] = _AVERAGE
            if by_combination:
                means = pd.concat([summarise(self.scores, metric.column), means[:-1]])
            numbers = [name for name in ("mean", "low", "high", "seed_std") if name in means]
            means[numbers] *= metric.factor
            tables.append(means.assign(metric=metric.title, sign=metric.sign))
        rates, method, backbone = self.first.rates, self.first.method, self.first.settings["backbone"]
        keys = {"label": self.label, "missing rates": rates, "method": method, "backbone": backbone}
        return pd.concat(tables, ignore_index=True).assign(**keys)


@dataclass(frozen=True)
class _Section:
    """A part of the page: a sentence, tables and figures, and what the runs lack for it."""

    name: str
    title: str
    text: str = ""
    parts: list[Markup] = field(default_factory=list)
    missing: str = ""


class _Report:
    """Makes the sections, and writes the files of their tables and figures."""

    def __init__(self, runs: Sequence[Run], folder: Path, template: jinja2.Template) -> None:
        self.folder = make_folder(folder)
        self.template = template
        self.runs = list(runs)
        self.settings = runs[0].settings
        self.modalities: list[str] = list(self.settings["modalities"])
        self.regions = list(dict.fromkeys(runs[0].scores["region"]))
        self.groups = _grouped(runs)
        lesionwise = all("lesion_dice" in run.scores for run in runs)
        self.metrics = (*_METRICS, *(_LESION_METRICS if lesionwise else ()))
        self.conventions = f"{_INTERVALS} {_HD95}" + (f" {_LESIONS}" if lesionwise else "")
        self.combinations = [combination_name(row, self.modalities) for row in combinations(len(self.modalities))]

    def sections(self) -> list[_Section]:
        """All parts of the page, in order."""
        tables = [self._runs(), self._rates(), self._ablation(), self._combinations(), self._tests()]
        figures = [self._bars(), self._cases(), self._curves()]
        return [*tables, *figures, self._contributions(), self._missing_rates(), self._calibration()]

    def _table(self, name: str, caption: str, numbers: pd.DataFrame, text: pd.DataFrame, bold: pd.DataFrame) -> Markup:
        """A table in the page, as LaTeX, and its numbers as CSV."""
        self._write(f"{name}.csv", numbers.to_csv(index=False))
        self._write(f"{name}.tex", to_latex(text, bold))
        table: Markup = self.template.module.table(name, caption, header(text), cells(text, bold))  # type: ignore[attr-defined]
        return table

    def _estimates(
        self, name: str, caption: str, numbers: pd.DataFrame, rows: list[str], columns: list[str], within: list[str]
    ) -> Markup:
        """A table of means with intervals, the best of each group that agrees in the keys `within` bold."""
        shown = numbers.assign(text=with_interval(numbers), best=is_best(numbers, within))
        text, bold = (pivot(shown, value, rows, columns) for value in ("text", "best"))
        return self._table(name, caption, numbers, text.fillna("-"), bold.eq(True))

    def _figure(self, name: str, alt: str, figure: Figure, *, photo: bool = False) -> Markup:
        """A figure as PNG and SVG, one of which is in the page."""
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

    def _write(self, name: str, text: str) -> None:
        with complete_file(self.folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def _runs(self) -> _Section:
        columns = ("method", "backbone", "missing rates", "seeds", "epochs", "folders")
        rows = [
            (
                *(group.first.method, group.first.settings["backbone"], group.first.rates),
                ", ".join(str(run.settings["seed"]) for run in group.runs),
                ", ".join(dict.fromkeys(str(run.settings["epochs"]) for run in group.runs)),
                "\n".join(str(run.folder) for run in group.runs),
            )
            for group in self.groups
        ]
        numbers = pd.DataFrame(rows, columns=list(columns))
        shown = numbers.set_index(["method", "backbone", "missing rates"])
        part = self._table("runs", "The runs, one row per method.", numbers, shown, nothing_bold(shown))
        text = "Runs in one row are seeds of a method, or folds of a cross-validation, each of other cases."
        return _Section("runs", "The runs", text, [part])

    def _rates(self) -> _Section:
        numbers = pd.concat([group.estimates(self.metrics) for group in sorted(self.groups, key=self._rates_order)])
        rows = ["missing rates", "method", *self._backbone_key()]
        caption = f"Means over all combinations of modalities. {self.conventions}"
        within = ["missing rates", "backbone", "metric", "region"]
        part = self._estimates("table1", caption, numbers, rows, ["metric", "region"], within)
        text = (
            f"Which method is best at which missing rates ({', '.join(self.modalities)}) of the training cases, in the "
            "layout of the paper's Table 1."
        )
        return _Section("methods", "Methods and missing rates", text, [part])

    def _ablation(self) -> _Section:
        title = "What the parts of PASSION do"
        groups = [group for group in self.groups if group.first.ticks is not None]
        if not any(group.first.settings["objective"] == "passion" and not _is_full(group) for group in groups):
            missing = (
                "No run leaves out a part of PASSION; train some with --lambda_pixel 0, --lambda_prototype 0, "
                "--use_task_mask False or --adaptive_beta False for the paper's Table 2."
            )
            return _Section("ablation", title, missing=missing)
        numbers = pd.concat([_with_ticks(group.estimates(self.metrics), group) for group in groups])
        caption = (
            "✓: the pixel-wise loss, the prototype loss, the task mask δ and the adaptive weight β are used. "
            + self.conventions
        )
        rows = [*self._rates_key(), *self._backbone_key(), *_TICKS, "method"]
        within = ["missing rates", "backbone", "metric", "region"]
        part = self._estimates("table2", caption, numbers, rows, ["metric", "region"], within)
        text = "What is lost where a part of PASSION is left out, in the layout of the paper's Table 2."
        return _Section("ablation", title, text, [part])

    def _combinations(self) -> _Section:
        parts = []
        for metric in self.metrics:
            numbers = pd.concat([group.estimates([metric], by_combination=True) for group in self.groups])
            numbers = numbers[numbers["region"] != _AVERAGE]
            name = f"table3_{metric.column.removesuffix('_brats')}"
            parts.append(self._by_combination(name, metric.title, numbers, ["region", "label"]))
        text = "Each combination of modalities (● given, ○ not given), in the layout of the paper's Table 3."
        return _Section("combinations", "Every combination of modalities", text, parts)

    def _by_combination(self, name: str, title: str, numbers: pd.DataFrame, columns: list[str]) -> Markup:
        order = {name: index for index, name in enumerate([*self.combinations, _AVERAGE])}
        numbers = numbers.sort_values("combination", key=lambda names: names.map(order), kind="stable")
        marks = numbers["combination"].map(self._circles)
        circles = pd.DataFrame(marks.tolist(), columns=self.modalities, index=numbers.index)
        return self._estimates(
            name,
            f"{title}. {_INTERVALS} {_caption(title)}",
            pd.concat([circles, numbers], axis=1),
            self.modalities,
            columns,
            ["combination", *columns[:-1]],
        )

    def _circles(self, combination: str) -> tuple[str, ...]:
        if combination == _AVERAGE:
            return (_AVERAGE, *[""] * (len(self.modalities) - 1))
        return tuple("●" if name in combination.split("+") else "○" for name in self.modalities)

    def _tests(self) -> _Section:
        title = "Paired tests"
        pairs = [(self._reference(group), group) for group in self.groups]
        tables = [_compared(*pair) for pair in pairs if pair[0] is not pair[1]]
        if not tables:
            missing = "There is nothing to compare; give a run of another method with the same missing rates."
            return _Section("tests", title, missing=missing)
        numbers = pd.concat(tables, ignore_index=True)
        text, bold = _test_text(numbers)
        caption = (
            "Differences in Dice, in percentage points, of each case's mean over all combinations, with their 95 % "
            "intervals; p is of Wilcoxon's signed-rank test over the cases, corrected by Holm's method, bold below "
            f"{_ALPHA}. The effect size is the rank-biserial correlation, from -1 to 1. The last column counts single "
            f"combinations with p below {_ALPHA}."
        )
        part = self._table("tests", caption, numbers, text, bold)
        sentence = "How sure it is that a method differs from the one it is compared with, on the same cases."
        return _Section("tests", title, sentence, [part])

    def _reference(self, group: _Group) -> _Group:
        """The Baseline with a group's backbone and missing rates; the first group of them where there is none."""
        keys = (group.first.settings["backbone"], group.first.rates)
        same = [one for one in self.groups if (one.first.settings["backbone"], one.first.rates) == keys]
        return next((one for one in same if one.first.method == BASELINE), same[0])

    def _bars(self) -> _Section:
        means = {group.label: summarise(group.scores, _DICE.column) for group in self.groups}
        figure = plot_methods(means, modalities=self.modalities, regions=self.regions)
        alt = "Bars: mean Dice of each method for each region and combination; lines: 95 % intervals over the cases."
        text = "Where the methods differ (the paper's Fig. 3): filled circles say which modalities are given."
        return _Section("bars", "Methods by combination", text, [self._figure("methods", alt, figure)])

    def _cases(self) -> _Section:
        kept = {group.label: _kept_cases(group) for group in self.groups}
        lacking = [label for label, paths in kept.items() if not paths]
        maps = {label: paths for label, paths in kept.items() if paths}
        names = sorted(set.intersection(*map(set, maps.values())))[:_MOST_CASES] if maps else []
        hint = f"No case was kept of {', '.join(lacking)}; run the evaluate workflow with --keep_cases 2."
        if maps and not names:
            hint = "No case was kept of all methods; run the evaluate workflow with the same --keep_cases for each."
        figures = [self._case(name, {label: paths[name] for label, paths in maps.items()}) for name in names]
        text = "Slices with the images given, the label, and each method's segmentation (the paper's Figs. 4 and 5)."
        missing = hint if lacking or not names else ""
        return _Section("cases", "Segmentations", text if figures else "", figures, missing)

    def _case(self, case: str, paths: Mapping[str, Path]) -> Markup:
        cases = {label: read_kept_case(path) for label, path in paths.items()}
        alt = f"Case {case}: each row is a combination of modalities; images, label and segmentations of each method."
        figure = plot_case(cases, class_names=self.settings["class_names"])
        return self._figure(f"case_{case}", alt, figure, photo=True)

    def _curves(self) -> _Section:
        title = "Training"
        paths = {group.label: [run.optional_file("training.csv") for run in group.runs] for group in self.groups}
        logs = {label: [_read_log(path) for path in some if path] for label, some in paths.items() if any(some)}
        if not logs:
            return _Section("training", title, missing="No run has a training.csv; train with the run's output_dir.")
        figure = plot_curves(logs, modalities=self.modalities)
        alt = "Per method and epoch: loss, relative preference of each modality (below 0: neglected), and its beta."
        text = (
            "Whether training has converged, which modalities the network neglects, and how beta answers (the paper's "
            "Fig. 6). A Baseline logs its preference with --measure_preference True."
        )
        return _Section("training", title, text, [self._figure("training", alt, figure)])

    def _contributions(self) -> _Section:
        title = "What each modality adds"
        if len(self.modalities) == 1:
            return _Section("contributions", title, missing="There is only one modality.")
        tables = []
        for group in self.groups:
            table = contributions(group.scores, _DICE.column, modalities=self.modalities)
            table[["mean", "low", "high"]] *= _DICE.factor
            tables.append(table.assign(method=group.label))
        numbers = pd.concat(tables, ignore_index=True)
        means = pivot(numbers, "mean", ["method", "modality"], ["region"]).astype(float)
        text = pivot(numbers.assign(text=with_interval(numbers)), "text", ["method", "modality"], ["region"])
        caption = "Percentage points of Dice; in brackets the 95 % interval over the test cases."
        alt = "Heat maps of what each modality adds to each region, in percentage points of Dice."
        parts = [
            self._figure("contributions", alt, plot_contributions(means)),
            self._table("contributions", caption, numbers, text, nothing_bold(text)),
        ]
        sentence = "Mean Dice of the combinations with a modality minus that of the same combinations without it."
        return _Section("contributions", title, sentence, parts)

    def _missing_rates(self) -> _Section:
        title = "Missing rates in training"
        known = [(group, run) for group in self.groups for run in group.runs if run.presence is not None]
        if not known:
            missing = "No run has a presence.json; the training command with --resume True writes it."
            return _Section("rates", title, missing=missing)
        numbers = pd.concat([_rates_of(group.label, run) for group, run in known], ignore_index=True)
        text = pivot(numbers, "text", ["method", "seed", "cases"], ["modality"])
        numbers = numbers.drop(columns="text")
        caption = "Share of training cases that lack the modality; in brackets what was asked for."
        part = self._table("missing_rates", caption, numbers, text, nothing_bold(text))
        return _Section("rates", title, "How often each modality really was missing.", [part])

    def _calibration(self) -> _Section:
        title = "Calibration"
        paths = {
            group.label: [path for run in group.runs if (path := run.optional_file("evaluation", "calibration.csv"))]
            for group in self.groups
        }
        tables = [table for label, some in paths.items() if some for table in _calibration_of(label, some)]
        if not tables:
            missing = "No run has evaluation/calibration.csv; evaluate with --calibration True."
            return _Section("calibration", title, missing=missing)
        numbers = pd.concat(tables, ignore_index=True)
        part = self._by_combination("calibration", "Expected calibration error [%]", numbers, ["method"])
        text = (
            "How far the networks' confidence is from how often they are right: 0 is best. Evaluated with --calibrated "
            "True, a run has it after temperature scaling too."
        )
        return _Section("calibration", title, text, [part])

    def _rates_order(self, group: _Group) -> int:
        return [run.rates for run in self.runs].index(group.first.rates)

    def _backbone_key(self) -> list[str]:
        return ["backbone"] if len({run.settings["backbone"] for run in self.runs}) > 1 else []

    def _rates_key(self) -> list[str]:
        return ["missing rates"] if len({run.rates for run in self.runs}) > 1 else []


def write_report(runs: Sequence[Run], output: str | Path) -> Path:
    """Write a report on runs.

    Args:
        runs: what :func:`passion_monai.evaluation.runs.read_runs` gives.
        output: folder for the page and for its tables and figures; it is made.

    Returns:
        The page.

    Raises:
        ValueError: naming the file that is not what it should be.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("passion_monai.evaluation", "."), autoescape=True, trim_blocks=True
    )
    environment.filters["options"] = _with_options
    template = environment.get_template("report.html")
    report = _Report(runs, Path(output), template)
    settings = report.settings
    page = template.render(
        title=f"Segmentation with missing modalities: {settings['dataset']}",
        phantom=any(run.settings["phantom"] for run in runs),
        introduction=_introduction(runs),
        sections=report.sections(),
    )
    path = report.folder / "index.html"
    with complete_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def _caption(title: str) -> str:
    """What is to be said of a metric."""
    return next((text for start, text in (("HD95", _HD95), ("lesion-wise", _LESIONS)) if title.startswith(start)), "")


def _with_options(text: str) -> Markup:
    """A sentence in which options of commands look like code."""
    return Markup(re.sub(r"--\w+( (True|False|\d))?", r"<code>\g<0></code>", str(escape(text))))


def _introduction(runs: Sequence[Run]) -> list[str]:
    settings = runs[0].settings
    about = (
        f"{len(runs)} runs of {len({run.method for run in runs})} methods on data in the layout of "
        f"{settings['dataset']}, scored on {runs[0].scores['case'].nunique()} test cases."
    )
    regions = [
        f"{name} ({', '.join(settings['class_names'][k] for k in members)})"
        for name, members in settings["regions"].items()
    ]
    return [about, f"Modalities: {', '.join(settings['modalities'])}. Regions: {', '.join(regions)}."]


def _grouped(runs: Sequence[Run]) -> list[_Group]:
    """Runs of one method, backbone and missing rates, with a label that tells them from the others."""
    several = [len({key(run) for run in runs}) > 1 for key in (_backbone, _rates)]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, _backbone(run), run.rates), []).append(run)
    return [
        _Group(", ".join([name[0], *(part for part, tell in zip(name[1:], several, strict=True) if tell)]), some)
        for name, some in groups.items()
    ]


def _backbone(run: Run) -> str:
    return str(run.settings["backbone"])


def _rates(run: Run) -> str:
    return run.rates


def _is_full(group: _Group) -> bool:
    return all(group.first.ticks or ())


def _with_ticks(numbers: pd.DataFrame, group: _Group) -> pd.DataFrame:
    marks = ["✓" if there else "" for there in group.first.ticks or ()]
    return numbers.assign(**dict(zip(_TICKS, marks, strict=True)))


def _kept_cases(group: _Group) -> dict[str, Path]:
    """File of each case that was kept, by its id; of several seeds the first."""
    folders = [run.folder / "evaluation" / "maps" for run in reversed(group.runs)]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.npz"))}


def _compared(reference: _Group, group: _Group) -> pd.DataFrame:
    table = compare(reference.scores, group.scores, _DICE.column)
    table[["difference", "low", "high"]] *= _DICE.factor
    table.insert(0, "compared with", reference.label)
    table.insert(0, "method", group.label)
    return table


def _test_text(numbers: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all combinations, as text and where it is bold."""
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


def _read_log(path: Path) -> pd.DataFrame:
    try:
        log = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); train again.") from error
    if not {"epoch", "loss"} <= {*log}:
        raise ValueError(f"{path} is no training log: it lacks the columns epoch or loss, and has {list(log)}.")
    return log


def _rates_of(label: str, run: Run) -> pd.DataFrame:
    presence = list((run.presence or {}).values())
    realised = missing_rates(presence)
    asked = run.settings["missing_rates"] or [np.nan] * len(realised)
    table = pd.DataFrame({"modality": run.settings["modalities"], "realised": realised, "asked": asked})
    text = [
        f"{one:.3f}" + ("" if np.isnan(other) else f" ({other:g})") for one, other in zip(realised, asked, strict=True)
    ]
    return table.assign(method=label, seed=run.settings["seed"], cases=len(presence), text=text)


def _calibration_of(label: str, paths: Iterable[Path]) -> list[pd.DataFrame]:
    """Mean over the cases of each combination, of each case's mean over the seeds, in percent; and after scaling."""
    errors = pd.concat([_read_calibration(path) for path in paths])
    named = {"ece": label, "ece_calibrated": f"{label}, calibrated"}
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


def main(argv: Sequence[str] | None = None) -> None:
    """Write a page on runs that were evaluated: tables, tests and figures of their methods."""
    parser = argparse.ArgumentParser(prog="python -m passion_monai.evaluation.report", description=main.__doc__)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run's folder, or NAME=RUN to call its method NAME; runs of one method are its seeds, or folds that "
        "have scored different cases",
    )
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the page (default: report/)")
    arguments = parser.parse_args(argv)
    try:
        path = write_report(read_runs(arguments.runs), arguments.output)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(path)  # noqa: T201 (a command line reports by printing)


if __name__ == "__main__":
    main()
