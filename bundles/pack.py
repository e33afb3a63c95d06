"""Makes the zip files that users download: `python bundles/pack.py weights [bundle ...]`, then `... zip [bundle ...]`.

`weights` trains the small variant of each bundle on its phantom cohort, in `dist/<bundle>/`, and scores it. `zip` packs
the folders that have weights, with a JSON twin of every configuration (`monai.bundle.load` reads only those) and the
package itself as a wheel, into `dist/<bundle>_v<version>.zip`.

`real BUNDLE --run RUN --folds RUN ...` puts weights that were trained on patients into the bundle itself, with the
scores of a cross-validation of the same training; `make weights-real` calls it. Without `--run` it only renews the
scores, when more folds are finished. `hub BUNDLE ...` writes what a model hub wants, the bundle with these weights as
safetensors too and a model card at its root, to `dist/hub/<bundle>/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from build import PHANTOM_SCORES, ROOT, bundle_facts, bundle_files, bundle_folders
from card import hub_card, hub_metadata
from monai.bundle import ConfigParser
from safetensors.torch import save_file

from passion_monai.evaluation.expected import FILE_NAME, checksum, write_expected_scores
from passion_monai.report.runs import Run, pooled_scores, read_runs

DIST = ROOT.parent / "dist"
_PARTS = ("LICENSE", "configs", "docs", "models")
# Enough for the curves to flatten. The paper's settings are for weeks of training on real data.
TRAINING = {
    "brats": ["--epochs", "120", "--val_interval", "120", "--learning_rate", "3.0e-3", "--batch_size", "4"],
    "myops": ["--epochs", "60", "--val_interval", "60", "--learning_rate", "2.0e-3", "--batch_size", "4"],
}


def write_bundle(source: Path, target: Path) -> None:
    """The phantom variant of a bundle, without weights."""
    for path, text in bundle_files(source, phantom=True):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(text, encoding="utf-8")


def train_weights(source: Path) -> None:
    """Train and score a bundle's small variant; the weights go into it, the scores into all documents."""
    bundle, run_dir = DIST / source.name, DIST / "runs" / source.name
    write_bundle(source, bundle)
    command = [sys.executable, "-m", "monai.bundle", "run"]
    shared = ["--output_dir", str(run_dir), "--num_workers", "0"]
    training = [
        "training",
        "--config_file",
        str(bundle / "configs" / "train.yaml"),
        *TRAINING[source.name.split("_")[0]],
        *("--overwrite", "True"),
    ]
    subprocess.run([*command, *training, *shared], check=True)
    subprocess.run([*command, "--config_file", str(bundle / "configs" / "evaluate.yaml"), *shared], check=True)
    scores = pd.read_csv(run_dir / "evaluation" / "scores.csv").groupby("region", sort=False)["dice"].mean().round(4)
    known = json.loads(PHANTOM_SCORES.read_text(encoding="utf-8")) if PHANTOM_SCORES.is_file() else {}
    known[source.name] = scores.to_dict()
    PHANTOM_SCORES.write_text(json.dumps(known, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    (bundle / "models").mkdir(exist_ok=True)
    shutil.copy(run_dir / "models" / "model.pt", bundle / "models" / "model.pt")


def put_weights(source: Path, run: Path) -> None:
    """Put the weights of a training on patients into a bundle."""
    cases = json.loads((run / "presence.json").read_text(encoding="utf-8"))["cases"]
    (source / "models").mkdir(exist_ok=True)
    shutil.copy(run / "models" / "model.pt", source / "models" / "model.pt")
    shutil.copy(run / "run.json", source)
    (source / "weights.json").write_text(json.dumps({"cases": sorted(cases)}, indent=4) + "\n", encoding="utf-8")


def put_scores(source: Path, runs: Sequence[Run]) -> None:
    """Put the scores of a cross-validation into the bundle whose weights were trained in the same way.

    Raises:
        ValueError: when a fold was tested on others than the cases of the weights.
    """
    scores = pooled_scores(runs)
    cases = json.loads((source / "weights.json").read_text(encoding="utf-8"))["cases"]
    if others := sorted({*scores["case"]} - {*cases}):
        folders = ", ".join(str(run.folder) for run in runs)
        raise ValueError(
            f"The folds {folders} tested {others[:3]}, which are not among the cases of the weights: remove the folds "
            "of other cases."
        )
    epochs = " or ".join(f"{epochs:,}" for epochs in sorted({run.settings["epochs"] for run in runs}))
    data = f"Cross-validation: {len(runs)} networks, each trained in the same way for {epochs} epochs and tested on "
    data += f"other patients; {scores['case'].nunique()} test patients in all"
    weights_sha256 = checksum(source / "models" / "model.pt")
    write_expected_scores(source / "evaluation" / FILE_NAME, scores, weights_sha256=weights_sha256, data=data)


def write_hub_folder(source: Path) -> Path:
    """A bundle as a model hub shows it; it must have weights that were trained on patients.

    Raises:
        FileNotFoundError: when it has none.
    """
    weights, facts = source / "models" / "model.pt", bundle_facts(source)
    if facts["weights"] is None or not weights.is_file():
        raise FileNotFoundError(f"{source.name} has no weights trained on patients; run `make weights-real` first.")
    target = DIST / "hub" / source.name
    for path, text in bundle_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(text, encoding="utf-8")
    for path in ("models/model.pt", f"evaluation/{FILE_NAME}", "run.json"):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copy(source / path, target / path)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {name: value.contiguous() for name, value in state.items()}  # not those of a network in channels-last
    save_file(state, weights_file := target / "models" / "model.safetensors", metadata=hub_metadata(facts))
    weights_file.chmod(0o644)
    (target / "README.md").write_text(hub_card(facts), encoding="utf-8")
    return target


def pack(source: Path, wheel: Path) -> Path:
    """Zip the small variant of a bundle; its folder must have the weights.

    Raises:
        FileNotFoundError: when it has none.
        FileExistsError: when the folder holds what is no part of the bundle, such as predictions, which may identify
            patients.
    """
    bundle = DIST / source.name
    if not (bundle / "models" / "model.pt").is_file():
        raise FileNotFoundError(f"{bundle} has no models/model.pt; run `make weights` first.")
    if others := [path.name for path in bundle.iterdir() if path.name not in _PARTS and path.suffix != ".whl"]:
        raise FileExistsError(f"{bundle} holds {', '.join(sorted(others))}, no part of the bundle: move it away.")
    write_bundle(source, bundle)
    for config in (bundle / "configs").glob("*.yaml"):
        content = ConfigParser.load_config_file(str(config))
        ConfigParser.export_config_file(content, str(config.with_suffix(".json")), fmt="json", indent=4)
    for old in bundle.glob("*.whl"):
        old.unlink()
    shutil.copy(wheel, bundle)
    version = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
    archive = DIST / f"{source.name}_v{version}"
    return Path(shutil.make_archive(str(archive), "zip", root_dir=DIST, base_dir=source.name))


def build_wheel() -> Path:
    """The package as a wheel in `dist/`."""
    shutil.rmtree(ROOT.parent / "build", ignore_errors=True)  # with modules that may be gone by now
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(DIST), str(ROOT.parent)]
    subprocess.run(command, check=True)
    return max(DIST.glob("passion_monai-*.whl"), key=lambda path: path.stat().st_mtime)


def main() -> None:
    """Train weights, or pack what has weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("weights", "zip", "real", "hub"))
    parser.add_argument("bundles", nargs="*", help="names of the bundles, all of them by default")
    parser.add_argument("--run", type=Path, help="real: the training, if its weights are to be put in")
    parser.add_argument("--folds", type=Path, nargs="+", help="real: the evaluated folds of the cross-validation")
    arguments = parser.parse_args()
    sources = [folder for folder in bundle_folders() if folder.name in arguments.bundles or not arguments.bundles]
    if arguments.action == "weights":
        for source in sources:
            train_weights(source)
    elif arguments.action == "real":
        (source,) = sources
        runs = read_runs([str(fold) for fold in arguments.folds])  # first: what cannot be read must replace nothing
        if arguments.run:
            put_weights(source, arguments.run)
        put_scores(source, runs)
    elif arguments.action == "hub":
        for source in sources:
            print(write_hub_folder(source))
    else:
        wheel = build_wheel()
        for source in sources:
            print(pack(source, wheel))


if __name__ == "__main__":
    main()
