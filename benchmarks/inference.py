"""Sliding-window prediction of one volume: `python -m benchmarks.inference --backbone rfnet --present 2`.

With `--combinations`, of every combination of the present modalities from one encoding, as in evaluation; with
`--separate`, of the same combinations, each in a pass of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.measure import NUM_MODALITIES, add_arguments, network_from, presence_of, print_results
from passion_monai.inferers import CombinationInferer, PresenceInferer
from passion_monai.presence import combinations


def prediction(arguments: argparse.Namespace) -> Callable[[], None]:
    """A function that predicts one volume, by windows that overlap by half as in the bundles."""
    network = network_from(arguments).eval()
    settings = {
        "roi_size": [arguments.size] * 3,
        "overlap": 0.5,
        "sw_batch_size": arguments.window_batch_size,
        "precision": arguments.dtype,
    }
    if arguments.combinations:
        inferer: PresenceInferer = CombinationInferer(num_modalities=NUM_MODALITIES, **settings)
    else:
        inferer = PresenceInferer(**settings)
    image = torch.randn(1, NUM_MODALITIES, *arguments.volume, device=arguments.device)
    presence = presence_of(arguments)
    passes = [presence]
    if arguments.separate:
        rows = torch.from_numpy(combinations(NUM_MODALITIES))
        passes = [row[None] for row in rows if not (row & ~presence[0]).any()]

    @torch.no_grad()
    def predict() -> None:
        for row in passes:
            inferer(image, network, row)

    return predict


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--volume", type=int, nargs=3, default=(160, 192, 144), help="size in voxels")
    parser.add_argument("--window_batch_size", type=int, default=1)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--combinations", action="store_true", help="predict all of them from one encoding")
    which.add_argument("--separate", action="store_true", help="predict all of them, one after the other")
    parser.add_argument("--profile", action="store_true", help="say what takes the time, instead of how long it is")
    arguments = parser.parse_args()
    print_results(arguments, prediction(arguments), warm_up=False)


if __name__ == "__main__":
    main()
