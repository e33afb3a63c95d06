"""The command `python -m passion_monai.report RUN [RUN ...] --output report/`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from passion_monai.report.runs import read_runs
from passion_monai.report.writing import write_report

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Write a page that compares the methods of evaluated runs, with tables, tests and figures."""
    parser = argparse.ArgumentParser(prog="python -m passion_monai.report", description=main.__doc__)
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
