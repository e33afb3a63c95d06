"""Draws Dice against the weight of the pixel-wise loss: `python experiments/lambda_figure.py RUN ... --output PNG`.

The runs are Baselines and PASSION at several values of lambda_pixel, with several seeds each, all evaluated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from passion_monai.report.runs import BASELINE, Run, read_runs

PAPER = 0.5  # lambda_1, Sec. 4.2


def mean_dice(run: Run) -> dict[str, float]:
    """Mean Dice in percent of one modality alone, of all combinations, and of all modalities together."""
    scores = run.scores.assign(given=run.scores["combination"].str.count(r"\+") + 1)
    means = scores.groupby(["given", "combination", "region"])["dice"].mean() * 100
    by_number = means.groupby("given").mean()
    return {
        "all modalities": by_number.iloc[-1],
        "mean of all combinations": means.mean(),
        "one modality alone": by_number.iloc[0],
    }


def draw(axes: Axes, table: pd.DataFrame) -> None:
    """Lines of the means over seeds with the seeds as points, and the Baseline's means as dashed lines."""
    weights = sorted(table["weight"].dropna().unique())
    for index, name in enumerate(column for column in table if column not in ("method", "weight")):
        colour = f"C{index}"
        groups = table.groupby("weight")[name]
        axes.plot(range(len(weights)), groups.mean(), marker="o", color=colour, label=f"PASSION, {name}")
        for position, (_, seeds) in enumerate(groups):
            axes.scatter([position] * len(seeds), seeds, s=10, color=colour, alpha=0.5)
        axes.axhline(
            table.loc[table["method"] == BASELINE, name].mean(), color=colour, linestyle="--", label=f"Baseline, {name}"
        )
    axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    axes.set_xlabel(f"weight of the pixel-wise loss, lambda_pixel (the paper's is {PAPER:g})")
    axes.set_ylabel("Dice [%]")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, frameon=False)


def main() -> None:
    """Read the runs and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    arguments = parser.parse_args()
    rows = [
        {
            "method": run.method,
            "weight": None if run.method == BASELINE else run.settings["lambda_pixel"],
            **mean_dice(run),
        }
        for run in read_runs(arguments.runs)
    ]
    mpl.use("agg")
    figure, axes = plt.subplots(figsize=(7, 5.5), layout="constrained")
    draw(axes, pd.DataFrame(rows))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
