"""All combinations of a few volumes with their scores: `python -m benchmarks.evaluation --workers 1`.

Seconds are per case, with `--scores_only` those of the scores alone. The network is not trained, and the labels are
balls. What is scored are the same balls, somewhat moved for each combination: as large as tumours, as near as
predictions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import Tensor

from benchmarks.measure import NUM_MODALITIES, add_arguments, network_from, presence_of, report
from passion_monai.datasets import get_spec
from passion_monai.evaluation.metrics import CombinationScores
from passion_monai.inferers import CombinationInferer

SPEC = get_spec("brats")
RADII = (40, 25, 15)  # voxels of 1 mm: whole tumour, core, enhancing tumour


def label_of(shape: tuple[int, ...]) -> Tensor:
    """Balls in one another, int [1, H, W, D]."""
    axes = torch.meshgrid(*[torch.arange(size) - size // 2 for size in shape], indexing="ij")
    distance = torch.stack(axes).square().sum(dim=0).sqrt()
    classes = torch.zeros(shape, dtype=torch.int16)
    for radius, value in zip(RADII, (2, 1, 3), strict=True):
        classes[distance < radius] = value
    return classes[None]


def make_engine(arguments: argparse.Namespace, output_dir: str) -> Engine:
    """An evaluator of whole volumes that writes the scores of all combinations."""
    network = network_from(arguments).eval()
    inferer = CombinationInferer(
        num_modalities=NUM_MODALITIES, roi_size=[arguments.size] * 3, overlap=0.5, precision=arguments.dtype
    )
    label = MetaTensor(label_of(tuple(arguments.volume)), affine=torch.eye(4))
    moved = torch.cat([label.as_tensor().roll(n, dims=1) for n in range(2**NUM_MODALITIES - 1)])
    presence = presence_of(arguments)

    @torch.no_grad()
    def predict(_: Engine, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not arguments.scores_only:
            inferer(torch.randn(1, NUM_MODALITIES, *arguments.volume, device=arguments.device), network, presence)
        return [{"pred": moved, "label": label, "presence": presence[0]} for _ in batch]

    engine = Engine(predict)
    scores = CombinationScores(
        output_dir, modalities=SPEC.modalities, regions=SPEC.regions, num_workers=arguments.workers
    )
    scores.attach(engine)
    return engine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--volume", type=int, nargs=3, default=(160, 192, 144), help="size in voxels")
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scores_only", action="store_true", help="do not run the network")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as output_dir:
        engine = make_engine(arguments, output_dir)
        start = time.perf_counter()
        engine.run([[{"case": str(case)}] for case in range(arguments.cases)])
        report(arguments, {"seconds_per_case": (time.perf_counter() - start) / arguments.cases})


if __name__ == "__main__":
    main()
