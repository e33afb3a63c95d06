"""Every row of docs/performance.md: `python -m benchmarks.table --output runs/benchmarks.jsonl`, hours on one core.

Each row is measured by a process of its own, and kept in the file as soon as it is there; a second call goes on where
the first one stopped. The tables are printed in the end.
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

BACKBONES = ("rfnet", "mmformer", "m2ftrans")


def commands() -> Iterator[list[str]]:
    """Module and arguments of every measurement, those that most depends on first."""
    for allocator, backbone, present in itertools.product(("kept", "default"), BACKBONES, (4, 3, 2, 1)):
        yield [*step_of(backbone), "--allocator", allocator, "--present", str(present)]
    for allocator, backbone, present in itertools.product(("kept", "default"), BACKBONES, (4, 1)):
        yield [*volume_of(backbone), "--allocator", allocator, "--present", str(present)]
    for allocator, backbone in itertools.product(("kept", "default"), BACKBONES):
        yield [*step_of(backbone), "--allocator", allocator, "--form", "dense"]
    for backbone in BACKBONES:
        for size in (48, 64):
            yield [*step_of(backbone), "--size", str(size), "--present", "2"]
        yield [*step_of(backbone), "--checkpointing", "--present", "4"]
        yield [*step_of(backbone), "--objective", "paper", "--present", "2"]
    yield [*volume_of(BACKBONES[0]), "--volume", "240", "240", "155"]


def step_of(backbone: str) -> list[str]:
    """Module and arguments of a training step."""
    return ["train_step", "--backbone", backbone, "--repeats", "1"]


def volume_of(backbone: str) -> list[str]:
    """Module and arguments of a volume."""
    return ["inference", "--backbone", backbone, "--repeats", "1"]


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
            [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]], check=True, capture_output=True, text=True
        ).stdout
        with path.open("a") as file:
            file.write(json.dumps({"command": text} | json.loads(line)) + "\n")


def weighted_mean(values: pd.Series) -> float:
    """Mean over the patterns of the missing rates, from values by the number of modalities present."""
    return float(sum(values[present] * share for present, share in enumerate(pattern_weights(), start=1)))


def step_table(rows: pd.DataFrame, allocator: str, objective: str) -> pd.DataFrame:
    """CPU seconds of a step by the number of modalities present, their mean, and the dense form's, of one run."""
    rows = rows[(rows.allocator == allocator) & (rows.objective == objective) & (rows["size"] == 80)]
    rows = rows[~rows.checkpointing.astype(bool)]
    chosen = rows[rows.form == "sparse"]
    table = chosen.pivot(index="backbone", columns="present", values="cpu_seconds")
    table["mean"] = table.apply(weighted_mean, axis=1)
    table["GiB, 4"] = chosen[chosen.present == 4].set_index("backbone")["peak_rss_gib"]
    table["GiB, 1"] = chosen[chosen.present == 1].set_index("backbone")["peak_rss_gib"]
    table["dense"] = rows[rows.form == "dense"].set_index("backbone")["cpu_seconds"]
    table["times faster"] = table["dense"] / table["mean"]
    return table.loc[list(BACKBONES)]


def volume_table(rows: pd.DataFrame, allocator: str) -> pd.DataFrame:
    """CPU seconds of a volume by the number of modalities present."""
    chosen = rows[(rows.allocator == allocator) & ~rows.combinations.astype(bool)]
    chosen = chosen[chosen.volume.map(tuple) == (160, 192, 144)]
    table = chosen.pivot(index="backbone", columns="present", values="cpu_seconds")
    return table.loc[list(BACKBONES)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    run_all(arguments.output)
    rows = pd.read_json(arguments.output, lines=True)
    steps = rows[rows.command.str.startswith("train_step")]
    volumes = rows[rows.command.str.startswith("inference")]
    for allocator, objective in (("kept", "released"), ("default", "released"), ("kept", "paper")):
        print(f"\nTraining step, {objective} objective, {allocator} allocator: CPU seconds\n")
        print(step_table(steps, allocator, objective).to_string(float_format="{:.3g}".format))
    for allocator in ("kept", "default"):
        print(f"\nVolume of 160 x 192 x 144, {allocator} allocator: CPU seconds\n")
        print(volume_table(volumes, allocator).to_string(float_format="{:.3g}".format))
    print("\nAll measurements\n")
    columns = ["command", "seconds", "cpu_seconds", "calibrators", "peak_rss_gib", "flops", "fraction_of_conv_peak"]
    print(rows[columns].to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
