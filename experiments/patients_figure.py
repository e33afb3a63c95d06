"""Draws patients of a cross-validation, segmented from few sequences: `python experiments/patients_figure.py RUN ...`.

Each RUN was evaluated with --keep_cases. A file is written for each case that was kept, named after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from passion_monai.evaluation.figures import DPI
from passion_monai.evaluation.kept_maps import read_kept_case
from passion_monai.presence import combination_name
from passion_monai.report.figures import plot_case
from passion_monai.run_record import read_settings

SHOWN = (("t2",), ("t1ce",), ("flair", "t1"), ("flair", "t1ce", "t1", "t2"))


def main() -> None:
    """Draw one figure for each case of each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures; it is made")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        settings = read_settings(run)
        names = [
            combination_name([name in given for name in settings["modalities"]], settings["modalities"])
            for given in SHOWN
        ]
        paths = sorted((run / "evaluation" / "maps").glob("*.npz"))
        if not paths:
            parser.error(f"{run} has kept no case; evaluate it with --keep_cases 2.")
        for path in paths:
            figure = plot_case({"prediction": read_kept_case(path)}, class_names=settings["class_names"], names=names)
            figure.savefig(arguments.output / f"{path.stem}.png", dpi=DPI)
            print(arguments.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
