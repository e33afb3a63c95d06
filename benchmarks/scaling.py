"""What the paper's trainings would take on 1, 8 and 64 GPUs, by a cost model: `python -m benchmarks.scaling`.

A step of one sample costs F_p floating-point operations, where p is the number of modalities present, as torch counted
them. Processes wait for one another in each step, so that a step of R processes takes as long as the slowest of R
samples; then they exchange the gradients. That is simulated, with patterns drawn at the paper's missing rates.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from benchmarks.table import pattern_weights

GFLOPS = pd.DataFrame(
    {1: [92, 102, 108], 2: [286, 317, 346], 3: [415, 419, 503], 4: [506, 562, 579]},
    index=["rfnet", "mmformer", "m2ftrans"],
)
"""Of a training step on 4 x 80^3 with the released objective, by modalities present; see docs/performance.md."""
PARAMETERS = {"rfnet": 2_381_792, "mmformer": 35_599_184, "m2ftrans": 13_194_788}
CASES, EPOCHS = 219, 300
BYTES = 4


def hours(backbone: str, ranks: int, *, tflops: float, gigabytes: float, epochs: int = 20) -> float:
    """Hours until the processes have seen as many samples as one alone would, each one in a step, simulated."""
    rng = np.random.default_rng(0)
    steps = CASES // ranks
    present = rng.choice([1, 2, 3, 4], size=(epochs, steps, ranks), p=pattern_weights())
    costs = GFLOPS.loc[backbone].to_numpy()[present - 1]
    compute = costs.max(axis=2).sum(axis=1).mean() / (1000 * tflops)
    # A ring exchanges twice the gradients, less a share; computing goes on meanwhile, but not at the end of the step.
    exchange = steps * 2 * (ranks - 1) / ranks * PARAMETERS[backbone] * BYTES / (gigabytes * 1e9)
    # An epoch leaves out the samples that are no multiple of the processes.
    return float(EPOCHS * CASES / (steps * ranks) * (compute + exchange) / 3600)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=3.0, help="what a GPU sustains on convolutions of few channels")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="per second, between GPUs")
    arguments = parser.parse_args()
    speed = vars(arguments)
    table = pd.DataFrame({ranks: {name: hours(name, ranks, **speed) for name in GFLOPS.index} for ranks in (1, 8, 64)})
    print(f"Hours of one training at {arguments.tflops:g} TFLOP/s and {arguments.gigabytes:g} GB/s, by GPUs\n")
    print(table.to_string(float_format="{:.2f}".format))
    print("\nOf the ideal speed-up\n")
    print(table.rdiv(table[1], axis=0).div(table.columns, axis=1).to_string(float_format="{:.0%}".format))


if __name__ == "__main__":
    main()
