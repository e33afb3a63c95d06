"""Compares two runs: `python -m passion_monai.report.compare RUN_A RUN_B` prints a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from passion_monai.evaluation.statistics import compare
from passion_monai.evaluation.tables import LESION_METRICS, METRICS, read_scores, shown_factor

__all__ = ["main"]

_EPILOG = """\
difference is the mean over the cases of what B scores more than A, low to high its 95 % bootstrap interval; Dice is in
percent, distances are in mm. p is of Wilcoxon's signed-rank test, p_holm with Holm's correction within the rows of
single combinations, and within the rows "all"; effect_size is the rank-biserial correlation, from -1 (A scores more in
all cases) to 1. The rows "all" are of each case's mean over its combinations, or over these and the regions. hd95_mm
and assd_mm leave out pairs of which exactly one mask is empty, in these rows too; hd95_brats counts them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the scores of two runs on the same cases, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m passion_monai.report.compare",
        description=main.__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_a", metavar="RUN_A", type=Path, help="a run's folder, or a file of scores")
    parser.add_argument("run_b", metavar="RUN_B", type=Path, help="the run to compare with it")
    parser.add_argument("--metric", choices=(*METRICS, *LESION_METRICS), default="dice")
    parser.add_argument("--output", type=Path, help="CSV file for the table, not rounded")
    arguments = parser.parse_args(argv)
    try:
        table = compare(_read(arguments.run_a), _read(arguments.run_b), arguments.metric)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.output, index=False)
    print(_text(table, arguments.metric))  # noqa: T201 (a command line reports by printing)
    print(f"\n{_EPILOG}")  # noqa: T201


def _read(run: Path) -> pd.DataFrame:
    return read_scores(run / "evaluation" / "scores.csv" if run.is_dir() else run)


def _text(table: pd.DataFrame, metric: str) -> str:
    scaled = table.copy()
    scaled[["difference", "low", "high"]] *= shown_factor(metric)
    formats = dict.fromkeys(("difference", "low", "high", "effect_size"), "{:+.2f}".format)
    formats |= dict.fromkeys(("p", "p_holm"), "{:.2g}".format)
    return scaled.to_string(index=False, formatters=formats)


if __name__ == "__main__":
    main()
