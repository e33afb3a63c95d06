"""How long the data of a training takes: `python -m benchmarks.data --output runs/data`, on phantoms as large as BraTS.

The data loader is that of a bundle's train.yaml. Reported are the preparation of the cache, per case and for the 219
training cases of BraTS 2020; the share of an epoch's time that a step of `--step_seconds` waits for its data, when the
step itself runs elsewhere, as on a GPU; and the memory of a process that reads the cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

from monai.bundle import ConfigParser

from passion_monai.datasets.phantom import write_phantom

TRAIN_CONFIG = Path(__file__).resolve().parents[1] / "bundles" / "brats_rfnet_passion" / "configs" / "train.yaml"
SHAPE, SPACING = (240, 240, 155), (1.0, 1.0, 1.0)
TRAINING_CASES = 219


def parsed_config(arguments: argparse.Namespace) -> ConfigParser:
    """The bundle's configuration, with all cases of the cohort for training."""
    cohort = arguments.output / "cohort"
    write_phantom("brats", cohort, num_cases=arguments.cases, shape=arguments.shape, spacing=SPACING, seed=0)
    config = ConfigParser.load_config_file(str(TRAIN_CONFIG))
    config |= {
        "bundle_root": str(TRAIN_CONFIG.parents[1]),
        "dataset_dir": str(cohort),
        "output_dir": str(arguments.output),
        "num_workers": arguments.workers,
    }
    return ConfigParser(config)


def epoch(parser: ConfigParser, step_seconds: float) -> tuple[float, float]:
    """Seconds of an epoch whose steps run elsewhere, and what of it they wait for data."""
    waited = 0.0
    batches = iter(parser.get_parsed_content("train::dataloader"))
    next(batches)  # the start of the workers is not counted
    start = asked = time.perf_counter()
    for _ in batches:
        waited += time.perf_counter() - asked
        time.sleep(step_seconds)
        asked = time.perf_counter()
    return time.perf_counter() - start, waited


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=40, help="60 %% of them train")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, help="of a case, in voxels of 1 mm")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step_seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    json.dump({name: float(f"{value:.4g}") for name, value in measured(arguments).items()}, sys.stdout)
    print()


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """What is reported."""
    for earlier in ("cohort", "cache"):  # of another run, which would take no time again
        shutil.rmtree(arguments.output / earlier, ignore_errors=True)
    (arguments.output / "datalist.json").unlink(missing_ok=True)
    config = parsed_config(arguments)
    start = time.perf_counter()
    dataset = config.get_parsed_content("train::dataset")
    preparation = time.perf_counter() - start
    seconds, waited = epoch(config, arguments.step_seconds)
    size = sum(path.stat().st_size for path in (arguments.output / "cache").iterdir())
    return {
        "preparation_seconds_per_case": preparation / len(dataset),
        "preparation_minutes_of_brats": preparation / len(dataset) * TRAINING_CASES / 60,
        "mib_per_case": size / len(dataset) / 2**20,
        "epoch_seconds": seconds,
        "waiting_fraction": waited / seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_rss_gib_of_workers": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
