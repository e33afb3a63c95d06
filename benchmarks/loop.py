"""What a training spends beside its steps: `python -m benchmarks.loop --output runs/loop`.

Trains a bundle on phantoms as large as BraTS, and prints the shares of an epoch's time: the steps, waiting for data,
and every handler that takes more than a thousandth. There is no validation, and the first epoch is not counted. After
it, the training is given a history of `--history` epochs, so that what grows with it shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import HandlersTimeProfiler
from monai.bundle import create_workflow

from passion_monai.datasets import discover, get_spec
from passion_monai.datasets.datalist import write_datalist
from passion_monai.datasets.phantom import write_phantom

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
SHAPE = (240, 240, 155)
LEAST_SHARE = 0.001


def write_cohort(arguments: argparse.Namespace) -> str:
    """Phantoms that all train, as a datalist."""
    cohort = arguments.output / "cohort"
    spacing = [arguments.spacing] * 3
    write_phantom("brats", cohort, num_cases=arguments.cases, shape=arguments.shape, spacing=spacing, seed=0)
    splits = {"training": discover("brats", cohort), "validation": [], "test": []}
    write_datalist(arguments.output / "datalist.json", splits, spec=get_spec("brats"), root=cohort)
    return str(arguments.output / "datalist.json")


def profiled(arguments: argparse.Namespace, *, datalist: str, workers: int) -> dict[str, Any]:
    """Seconds of an epoch after the first, and the shares of what takes them."""
    run = arguments.output / f"workers_{workers}"
    shutil.rmtree(run, ignore_errors=True)
    options: dict[str, Any] = {"output_dir": str(run), "cache_dir": str(arguments.output / "cache")}
    options |= {"datalist": datalist, "num_workers": workers, "epochs": 1 + arguments.epochs}
    options |= {"roi_size": [arguments.size] * 3, "spacing": [arguments.spacing] * 3}
    options |= {"device": "cpu"}  # the profiler reads the clock while a GPU would still be at work
    options |= json.loads(arguments.settings)
    config = str(BUNDLES / f"brats_{arguments.backbone}_passion" / "configs" / "train.yaml")
    workflow = create_workflow(config_file=config, logging_file=False, run_id="training", **options)
    parts: Any = workflow.parser
    trainer, log = parts.get_parsed_content("train::trainer"), parts.get_parsed_content("training_log")
    profiler = HandlersTimeProfiler()
    profiler.attach(trainer)

    def forget_first_epoch(engine: Engine) -> None:
        log.rows = log.rows * arguments.history
        profiler._reset(profiler.event_handlers_names)

    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), forget_first_epoch)
    workflow.run()
    workflow.finalize()
    seconds = measured_seconds(profiler)
    total = sum(seconds.values())
    shares = {name: round(value / total, 4) for name, value in seconds.items() if value / total > LEAST_SHARE}
    return {"epoch_seconds": round(total / arguments.epochs, 3), "shares": shares}


def measured_seconds(profiler: HandlersTimeProfiler) -> dict[str, float]:
    """What a profiler has measured, most first."""
    seconds = {"steps": sum(profiler.processing_times), "waiting for data": sum(profiler.dataflow_times)}
    for event, handlers in profiler.event_handlers_times.items():
        for name, times in handlers.items():
            key = f"{name}, {getattr(event, 'name', event)}"
            seconds[key] = seconds.get(key, 0) + sum(times)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", default="rfnet")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, help="of a case, in voxels")
    parser.add_argument("--spacing", type=float, default=1.0, help="of a case, and of the network, in mm")
    parser.add_argument("--size", type=int, default=80, help="of a crop, in voxels")
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 2))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--history", type=int, default=1, help="epochs that the training is told to have behind it")
    parser.add_argument("--settings", default="{}", help="further ids of the configuration, as JSON")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    datalist = write_cohort(arguments)
    for workers in arguments.workers:
        row = {"backbone": arguments.backbone, "workers": workers, "history": arguments.history}
        json.dump(row | profiled(arguments, datalist=datalist, workers=workers), sys.stdout)
        print(flush=True)


if __name__ == "__main__":
    main()
