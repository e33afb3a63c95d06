"""The tables of docs/performance.md: `python -m benchmarks.table --output runs/benchmarks.jsonl`, an hour on one core.

Each row is measured by a process of its own, and kept in the file as soon as it is there; a second call goes on where
the first one stopped. The tables are printed in the end. Ratios are of rows of one file, so of one machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.train_step import MISSING_RATES

BACKBONES = ("rfnet", "mmformer", "m2ftrans", "fusionunet")
CROP = 80


def commands() -> Iterator[list[str]]:
    """Module and arguments of every measurement, those that most depends on first."""
    for backbone in BACKBONES:
        for present in (4, 3, 2, 1):
            yield [*step_of(backbone), "--present", str(present)]
        yield [*step_of(backbone), "--form", "dense"]
    for backbone in BACKBONES:
        for what in (("--present", "4"), ("--present", "1"), ("--combinations",), ("--separate",)):
            yield [*window_of(backbone), *what]
    for backbone in BACKBONES:
        yield [*step_of(backbone), "--objective", "paper", "--present", "2"]
        yield [*step_of(backbone), "--allocator", "default", "--present", "2"]
        yield [*step_of(backbone), "--checkpointing", "--present", "4"]
        for size in (48, 64):
            yield [*step_of(backbone), "--size", str(size), "--present", "2"]


def step_of(backbone: str) -> list[str]:
    """Module and arguments of a training step."""
    return ["train_step", "--backbone", backbone, "--repeats", "1"]


def window_of(backbone: str) -> list[str]:
    """Module and arguments of the prediction of one window."""
    return ["inference", "--backbone", backbone, "--volume", *[str(CROP)] * 3]


def pattern_weights() -> list[float]:
    """Shares of cases with 1, 2, 3 and 4 modalities at the paper's missing rates, of those that have any."""
    shares = np.zeros(len(MISSING_RATES) + 1)
    for pattern in itertools.product((0, 1), repeat=len(MISSING_RATES)):
        pairs = zip(pattern, MISSING_RATES, strict=True)
        shares[sum(pattern)] += math.prod(1 - rate if there else rate for there, rate in pairs)
    return list(shares[1:] / shares[1:].sum())


def run_all(path: Path) -> None:
    """Measure what the file does not have yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line)["command"] for line in path.read_text().splitlines()] if path.is_file() else []
    for command in commands():
        text = " ".join(command)
        if text in known:
            continue
        print(text, file=sys.stderr, flush=True)
        line = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        with path.open("a") as file:
            file.write(json.dumps({"command": text} | json.loads(line)) + "\n")


def weighted_mean(values: pd.Series) -> float:
    """Mean over the patterns of the missing rates, from values by the number of modalities present."""
    return float(sum(values[present] * share for present, share in enumerate(pattern_weights(), start=1)))


def step_table(rows: pd.DataFrame) -> pd.DataFrame:
    """CPU seconds of a step by the number of modalities present, and how many times longer the dense form takes."""
    steps = rows[(rows.allocator == "kept") & (rows.objective == "released") & (rows["size"] == CROP)]
    steps = steps[~steps.checkpointing.astype(bool)]
    sparse, dense = steps[steps.form == "sparse"], steps[steps.form == "dense"].set_index("backbone")
    table = sparse.pivot(index="backbone", columns="present", values="cpu_seconds")
    complete, single = (sparse[sparse.present == count].set_index("backbone") for count in (4, 1))
    table["mean"] = table.apply(weighted_mean, axis=1)
    table["dense"] = dense["cpu_seconds"]
    table["times faster"] = table["dense"] / table["mean"]
    table["GFLOP, 4"] = complete["flops"] / 1e9
    table["peak, 4"] = complete["fraction_of_conv_peak"]
    table["GiB, 4"], table["GiB, 1"] = complete["peak_rss_gib"], single["peak_rss_gib"]
    table["GiB, dense"] = dense["peak_rss_gib"]
    return table.loc[list(BACKBONES)]


def variant_table(rows: pd.DataFrame) -> pd.DataFrame:
    """CPU seconds of variants of a step, as multiples of the step that they vary."""
    sparse = rows[(rows.form == "sparse")].set_index("backbone")
    two = sparse[sparse.present == 2]
    plain = two[(two["size"] == CROP) & (two.objective == "released") & (two.allocator == "kept")].cpu_seconds
    complete = sparse[sparse.present == 4]
    recomputing = complete.checkpointing.astype(bool)
    table = pd.DataFrame({"paper's objective": two[two.objective == "paper"].cpu_seconds / plain})
    table["default allocator"] = two[two.allocator == "default"].cpu_seconds / plain
    table["checkpointing"] = complete[recomputing].cpu_seconds / complete[~recomputing].cpu_seconds
    table["checkpointing, GiB"] = complete[recomputing].peak_rss_gib
    for size in (48, 64):
        table[f"{size}^3, by voxel"] = two[two["size"] == size].cpu_seconds / plain * (CROP / size) ** 3
    return table.loc[list(BACKBONES)]


def window_table(rows: pd.DataFrame) -> pd.DataFrame:
    """CPU seconds of a window with all modalities and with one, and of all combinations in one pass and in passes."""
    every, apart = rows.combinations.astype(bool), rows.separate.astype(bool)
    plain = rows[~every & ~apart]
    table = plain.pivot(index="backbone", columns="present", values="cpu_seconds")[[4, 1]]
    table["15 combinations"] = rows[every].set_index("backbone")["cpu_seconds"]
    table["15 passes"] = rows[apart].set_index("backbone")["cpu_seconds"]
    table["times faster"] = table["15 passes"] / table["15 combinations"]
    return table.loc[list(BACKBONES)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    run_all(arguments.output)
    rows = pd.read_json(arguments.output, lines=True)
    steps = rows[rows.command.str.startswith("train_step")]
    windows = rows[rows.command.str.startswith("inference")]
    titles = {
        "Training step, CPU seconds by the modalities present": step_table(steps),
        "Variants of a training step, as multiples of it": variant_table(steps),
        "A window, CPU seconds by the modalities present": window_table(windows),
    }
    for title, table in titles.items():
        print(f"\n{title}\n")
        print(table.to_string(float_format="{:.3g}".format))
    print("\nAll measurements\n")
    columns = ["command", "seconds", "cpu_seconds", "peak_rss_gib", "flops", "fraction_of_conv_peak"]
    print(rows[columns].to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
