"""The example of docs/finetuning.md: a bundle's weights against a start from scratch, on a small cohort of its own.

The cohort is a phantom of four training and three validation cases without contrast-enhanced T1, whose labels do not
tell enhancing tumour from the rest of the core. The core has the name of the bundle's nearest class, and so starts
from what the bundle knows of it. Run, from the repository's root,

    python bundles/pack.py weights brats_rfnet_passion
    python experiments/finetuning.py --output runs/finetuning
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd

from passion_monai.datasets import discover
from passion_monai.datasets.phantom import write_phantom

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "dist" / "brats_rfnet_passion"
MODALITIES = ["flair", "t1", "t2"]
CASES = {"training": 4, "validation": 3}
SETTINGS = {
    "modalities": MODALITIES,
    "label_values": [0, 1, 2],
    "class_names": ["background", "necrotic and non-enhancing tumour core", "edema"],
    "regions": {"WT": [1, 2], "TC": [1]},
    "epochs": 20,
    "val_interval": 5,
    "learning_rate": 3.0e-3,
    "num_workers": 0,
}
STARTS = {"from scratch": ["train"], "fine-tuned": ["train", "finetune"]}


def write_cohort(folder: Path) -> Path:
    """Files and datalist of the cohort."""
    write_phantom("brats", folder, num_cases=sum(CASES.values()), shape=(48, 48, 48), spacing=(4, 4, 4), seed=7)
    cases = [
        {key: case[key] for key in ("case", "patient", *MODALITIES, "label")} for case in discover("brats", folder)
    ]
    for case in cases:
        label = nib.load(case["label"])
        classes = np.asarray(label.dataobj)
        merged = Path(case["label"]).with_name(f"{case['case']}_core.nii.gz")
        nib.save(nib.Nifti1Image(np.where(classes == 4, 1, classes).astype(np.uint8), label.affine), merged)
        case["label"] = str(merged)
    split = iter(cases)
    content = {"dataset": "ours", "modalities": MODALITIES, "root": str(folder.resolve())}
    content |= {section: [next(split) for _ in range(number)] for section, number in CASES.items()}
    path = folder / "datalist.json"
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def train(start: str, seed: int, datalist: Path, output_dir: Path) -> pd.DataFrame:
    """One training, which goes on if it was stopped; its validation Dice by epoch."""
    files = [str(BUNDLE / "configs" / f"{name}.yaml") for name in STARTS[start]]
    settings = SETTINGS | {"seed": seed, "datalist": datalist, "output_dir": output_dir, "simulate_missing": False}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(files), *options]
    subprocess.run([*command, "--resume", "True"], check=True)
    log = pd.read_csv(output_dir / "training.csv").dropna(subset="val_mean_dice")
    return log[["epoch", "val_mean_dice"]].assign(start=start, seed=seed)


def plot(results: pd.DataFrame, path: Path) -> None:
    """Mean and range over the seeds, by epoch."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for start, rows in results.groupby("start", sort=False):
        by_epoch = 100 * rows.groupby("epoch")["val_mean_dice"].agg(["mean", "min", "max"])
        (line,) = axes.plot(by_epoch.index, by_epoch["mean"], marker="o", markersize=3, label=start)
        axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch (4 steps each)", ylabel="validation Dice in %, mean\nof all combinations and regions")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center right", title="4 phantom cases, 3 sequences, 2 labels")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all trainings and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    datalist = write_cohort(arguments.output / "cohort")
    results = pd.concat(
        train(start, seed, datalist, arguments.output / f"{start.replace(' ', '_')}_{seed}")
        for seed in range(arguments.seeds)
        for start in STARTS
    )
    results.to_csv(arguments.output / "finetuning.csv", index=False)
    plot(results, arguments.output / "finetuning.png")
    last = results[results["epoch"] == results["epoch"].max()]
    print(last.pivot(index="seed", columns="start", values="val_mean_dice").mul(100).round(1))


if __name__ == "__main__":
    main()
