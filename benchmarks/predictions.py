"""What flips, several checkpoints and probabilities bring and cost: `python -m benchmarks.predictions RUN [RUN ...]`.

Runs are seeds of a method of `experiments/`, trained and with their cohort written, as `make experiments` leaves them.
Dice is the mean over regions and combinations of the test cases and, but for the mean of all checkpoints, over the
runs; the difference from plain predictions has its 95 % interval over the cases. Seconds are CPU seconds, for the
segmentation of all cases of the cohort with all modalities, without the set-up.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from monai.bundle import ConfigWorkflow

from passion_monai.evaluation.statistics import compare, overall
from passion_monai.evaluation.tables import read_scores

ROOT = Path(__file__).parents[1]


def make_workflow(name: str, arguments: argparse.Namespace, **ids: Any) -> ConfigWorkflow:
    """A bundle's workflow with the settings of the cohort."""
    scale = yaml.safe_load(arguments.scale.read_text(encoding="utf-8"))
    cohort = scale["cohorts"][arguments.cohort]
    configs = ROOT / "bundles" / f"{arguments.cohort}_{arguments.backbone}_passion" / "configs"
    files = [str(configs / f"{name}.yaml")]
    if cohort.get("small_networks", False):
        files.append(str(ROOT / "bundles" / "_shared" / "phantom" / f"{arguments.backbone}.yaml"))
    place = f"{scale['output']}/cohorts/{arguments.cohort}"
    settings: dict[str, Any] = {**cohort.get("settings", {}), "dataset_dir": place, **ids}
    if name == "evaluate":
        settings |= {"datalist": f"{place}.json", "calibration": False}
    metadata = str(configs / "metadata.json")
    return ConfigWorkflow(
        files,
        workflow_type=None,
        meta_file=metadata,
        logging_file=False,
        bundle_root=str(configs.parent),
        **settings,
    )


def run(name: str, arguments: argparse.Namespace, **ids: Any) -> float:
    """Run a workflow, and return the CPU seconds that it took once everything was made."""
    workflow = make_workflow(name, arguments, **ids)
    workflow.initialize()
    workflow.parser.get_parsed_content("evaluator")
    start = time.process_time()
    workflow.run()
    return time.process_time() - start


def measure(folder: Path, arguments: argparse.Namespace, groups: list[list[str]], **ids: Any) -> pd.DataFrame:
    """Scores of groups of checkpoints, each group being averaged."""
    tables = []
    for number, group in enumerate(groups):
        output = folder / str(number)
        run("evaluate", arguments, output_dir=str(output), ckpt_path=group, **ids)
        tables.append(read_scores(output / "evaluation" / "scores.csv").assign(seed=number))
    return pd.concat(tables, ignore_index=True)


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training")
    parser.add_argument("--scale", type=Path, default=ROOT / "experiments" / "cpu.yaml", help="what the runs are of")
    parser.add_argument("--cohort", default="myops")
    parser.add_argument("--backbone", default="mmformer")
    parser.add_argument("--flip_axes", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("runs/predictions"), help="folder for what is predicted")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    every = [f"{path}/models/model.pt" for path in arguments.runs]
    single = [[path] for path in every]
    flips = {"flip_test": True, "flip_axes": arguments.flip_axes}
    print(f"{'':32} {'dice':>6} {'difference':>21} {'seconds':>8} {'ratio':>6}", flush=True)
    plain: list[tuple[pd.DataFrame, float]] = []
    variants: list[tuple[str, list[list[str]], dict[str, Any], dict[str, Any]]] = [
        ("plain", single, {}, {}),
        ("with save_probabilities", single, {}, {"save_probabilities": True}),
        (f"flips along {arguments.flip_axes}", single, flips, {}),
        (f"mean of {len(every)} checkpoints", [every], {}, {}),
    ]
    for name, groups, ids, shown in variants:
        folder = arguments.output / name.replace(" ", "_")
        scores = plain[0][0] if shown else measure(folder, arguments, groups, **ids)
        seconds = run("inference", arguments, output_dir=str(folder), ckpt_path=groups[0], **ids, **shown)
        plain = plain or [(scores, seconds)]
        dice = 100 * overall(scores, "dice")["mean"].iloc[-1]
        gain = 100 * compare(plain[0][0], scores, "dice").iloc[-1][["difference", "low", "high"]]  # over everything
        interval = f"{gain['difference']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
        print(f"{name:32} {dice:6.2f} {interval:>21} {seconds:8.2f} {seconds / plain[0][1]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
