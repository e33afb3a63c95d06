"""Writes the page of a report: one HTML file with all sections.

The same folder gets each table as CSV and LaTeX, and each figure as PNG and SVG.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from passion_monai.files import complete_file
from passion_monai.report import calibration, pictures, scores, training
from passion_monai.report.page import Page
from passion_monai.report.runs import Run

__all__ = ["SECTIONS", "write_report"]

SECTIONS = (
    training.runs,
    scores.methods,
    scores.by_count,
    scores.ablation,
    scores.combinations,
    scores.tests,
    pictures.bars,
    pictures.cases,
    training.curves,
    pictures.contributions,
    training.missing_rates,
    calibration.calibration,
)
"""The parts of the page, in order; each is a function of the page."""


def write_report(runs: Sequence[Run], output: str | Path) -> Path:
    """Write a report that compares runs.

    Args:
        runs: the output of :func:`passion_monai.report.runs.read_runs`.
        output: folder of the page, its tables and figures; created if missing.

    Returns:
        Path of the page.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("passion_monai.report", "."), autoescape=True, trim_blocks=True
    )
    environment.filters["options"] = _with_options
    template = environment.get_template("report.html")
    page = Page(runs, Path(output), template)
    text = template.render(
        title=f"Segmentation with missing modalities: {page.settings['dataset']}",
        phantom=any(run.settings["phantom"] for run in runs),
        introduction=_introduction(runs),
        sections=[section(page) for section in SECTIONS],
    )
    path = page.folder / "index.html"
    with complete_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def _with_options(text: str) -> Markup:
    """Mark command-line options in a sentence as code."""
    return Markup(re.sub(r"--\w+( (True|False|\d))?", r"<code>\g<0></code>", str(escape(text))))


def _introduction(runs: Sequence[Run]) -> list[str]:
    settings = runs[0].settings
    cases = {case for run in runs for case in run.scores["case"]}
    counts = [(len(runs), "run"), (len({run.method for run in runs}), "method"), (len(cases), "test case")]
    trained, methods, scored = (f"{number} {noun}{'s' * (number > 1)}" for number, noun in counts)
    about = f"{trained} of {methods} on data in the layout of {settings['dataset']}, scored on {scored}."
    regions = [
        f"{name} ({', '.join(settings['class_names'][k] for k in members)})"
        for name, members in settings["regions"].items()
    ]
    return [about, f"Modalities: {', '.join(settings['modalities'])}. Regions: {', '.join(regions)}."]
