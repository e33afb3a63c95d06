"""Makes the files of all bundles from what they share: `python bundles/build.py [--check]`.

A bundle is a folder `<data set>_<backbone>_passion` with a `bundle.yaml`. Its `configs/*.yaml` are put together from
fragments of YAML: the settings of all fragments, then the pipeline, then the plumbing. Lines `# == pipeline` and `# ==
plumbing` divide a fragment. Metadata and README are made from `_shared/documents/`, the data set's file in the package
and, for weights trained on patients, the bundle's `weights.json`. --check writes nothing; the exit code is 1 when a
committed file is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml
from card import crop_in_words, model_card

from passion_monai import __version__
from passion_monai.datasets import DatasetSpec, get_spec

ROOT = Path(__file__).resolve().parent
SHARED = ROOT / "_shared"
DOCUMENTS = SHARED / "documents"
PHANTOM_SCORES = DOCUMENTS / "phantom_scores.json"
RUN = "python -m monai.bundle run "
# Per configuration: what it does, and its command. An overlay is given as a second file.
WORKFLOWS = {
    "train": ("Trains one network on incomplete cases", RUN + "training --config_file {path} --dataset_dir <folder>"),
    "evaluate": ("Scores every modality combination", RUN + "--config_file {path} --dataset_dir <folder>"),
    "inference": (
        "Segments patients from the modalities they have",
        RUN + "--config_file {path} --dataset_dir <folder>",
    ),
}
OVERLAYS = {
    "calibrate": (
        "Fits temperatures for calibrated probabilities on the validation cases",
        RUN + "--config_file \"['{evaluate}','{path}']\" --dataset_dir <folder>",
    ),
    "finetune": (
        "Starts a training from this bundle's weights, on another cohort",
        RUN + "training --config_file \"['{train}','{path}']\" --datalist <file>",
    ),
    "multi_gpu_train": (
        "Trains on several GPUs",
        "torchrun --nproc_per_node=8 -m monai.bundle run training --config_file \"['{train}','{path}']\"",
    ),
    "strong": (
        "Trains with a strong recipe instead of the paper's",
        RUN + "training --config_file \"['{train}','{path}']\" --dataset_dir <folder>",
    ),
}
# The parts of a configuration and of a fragment, in this order.
PARTS = {
    "settings": "Settings",
    "pipeline": "Pipeline",
    "plumbing": "Plumbing: checks, records, what runs in which order",
}
PART_WIDTH = 108


def bundle_folders() -> list[Path]:
    """The folders of all bundles."""
    return [source.parent for source in sorted(ROOT.glob("*/bundle.yaml"))]


def bundle_files(bundle: Path, *, phantom: bool = False) -> Iterator[tuple[str, str]]:
    """Yield relative path and text of each generated file of a bundle.

    Args:
        bundle: its folder.
        phantom: make the small variant whose weights are trained on the phantom; fragments in `_shared/phantom/` then
            replace those of the same name.
    """
    for workflow in WORKFLOWS | OVERLAYS:
        yield f"configs/{workflow}.yaml", compose(bundle, workflow, phantom=phantom)
    facts = bundle_facts(bundle, phantom=phantom)
    yield "configs/metadata.json", json.dumps(_metadata(facts), indent=4) + "\n"
    yield "configs/logging.conf", (DOCUMENTS / "logging.conf").read_text(encoding="utf-8")
    yield "docs/README.md", _readme(facts)
    yield "LICENSE", (ROOT.parent / "LICENSE").read_text(encoding="utf-8")


def compose(bundle: Path, workflow: str, *, phantom: bool = False) -> str:
    """The text of one configuration file.

    Raises:
        ValueError: when two fragments have the same top-level key.
    """
    what, command = (WORKFLOWS | OVERLAYS)[workflow]
    path = f"bundles/{bundle.name}/configs/{{}}.yaml"
    banner = (
        f"# {what}. Run it, from anywhere, with\n"
        f"#   {command.format(path=path.format(workflow), **{name: path.format(name) for name in WORKFLOWS})}\n"
        "# Override any id below in the same way. `make bundles` makes this file from fragments: do not edit it.\n"
    )
    paths = [_fragment(workflow, phantom=phantom)]
    dataset, backbone = _parts(bundle)
    if workflow in OVERLAYS:  # which may have more for a data set
        paths += [path for path in [_fragment(f"{dataset}_{workflow}", phantom=phantom)] if path.is_file()]
    else:
        names = [dataset, f"{dataset}_grid", backbone, *(["classes"] if workflow == "train" else []), "common"]
        paths = [bundle / "bundle.yaml", *(_fragment(name, phantom=phantom) for name in names), *paths]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    grid = _fragment(f"{dataset}_grid", phantom=phantom)
    if workflow in ("evaluate", "inference"):
        texts[grid] = _with_grid("weights_settings", grid)
    elif workflow == "finetune":
        texts[grid] = _with_grid("pretrained_grid", grid)
    _check_keys(texts)
    if workflow in OVERLAYS:
        return banner + "".join(f"\n{text}" for text in texts.values())
    return banner + "".join(_in_order([*texts.values()]))


def _in_order(texts: Sequence[str]) -> Iterator[str]:
    """The parts of all fragments: settings, then pipeline, then plumbing."""
    parts = [dict(_parts_of(text)) for text in texts]
    for name, title in PARTS.items():
        there = [part[name] for part in parts if part.get(name)]
        if name == "pipeline":  # the workflow's own part comes before the common ones
            there.reverse()
        yield f"\n# {'=' * 8} {title} {'=' * (PART_WIDTH - len(title))}\n\n" + "\n".join(there)


def _parts_of(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each part of a fragment; a line ``# == name`` begins one, and the first is the settings."""
    names_and_texts = ["settings", *re.split(r"(?m)^# == (\w+)\n", text)]
    yield from zip(names_and_texts[::2], names_and_texts[1::2], strict=True)


def _with_grid(name: str, grid: Path) -> str:
    """A fragment with what weights know of their training, and a data set's grid for those that do not."""
    template = Template((SHARED / f"{name}.yaml").read_text(encoding="utf-8"))
    return template.substitute(yaml.safe_load(grid.read_text(encoding="utf-8")))


def _check_keys(texts: Mapping[Path, str]) -> None:
    """Check that no two fragments have the same top-level key."""
    owner: dict[str, Path] = {}
    for fragment, text in texts.items():
        for key in yaml.safe_load(text):
            if key in owner:
                raise ValueError(f"{fragment} and {owner[key]} both have the key {key!r}; one of them must go.")
            owner[key] = fragment


def _fragment(name: str, *, phantom: bool) -> Path:
    small = SHARED / "phantom" / f"{name}.yaml"
    return small if phantom and small.is_file() else SHARED / f"{name}.yaml"


def _parts(bundle: Path) -> tuple[str, str]:
    """Data set and backbone of a bundle."""
    dataset, backbone, _ = bundle.name.split("_")
    return dataset, backbone


def bundle_facts(bundle: Path, *, phantom: bool = False) -> dict[str, Any]:
    """The facts that the documents of a bundle need."""
    dataset, backbone = _parts(bundle)
    grid = yaml.safe_load(_fragment(f"{dataset}_grid", phantom=phantom).read_text(encoding="utf-8"))
    facts: dict[str, Any] = {"name": bundle.name, "spec": get_spec(dataset), "roi_size": grid["roi_size"]}
    for part in (dataset, backbone):
        facts |= yaml.safe_load((DOCUMENTS / f"{part}.yaml").read_text(encoding="utf-8"))
    facts["version"] = f"{__version__}-phantom" if phantom else __version__
    facts["phantom"] = phantom
    facts["weights"] = facts["expected"] = None
    if not phantom and (bundle / "weights.json").is_file():
        facts["weights"] = _json(bundle / "run.json") | _json(bundle / "weights.json")
        facts["expected"] = _json(bundle / "evaluation" / "expected_scores.json")
        facts["roi_size"] = facts["weights"]["roi_size"]  # of evaluation, inference and export
    facts["method_reference"] = (
        "J. Shi et al., PASSION: Towards Effective Incomplete Multi-Modal Medical Image Segmentation with Imbalanced "
        "Missing Rates, ACM MM 2024, https://doi.org/10.1145/3664647.3681543"
    )
    sides = {key: " x ".join(f"{size:g}" for size in grid[key]) for key in ("spacing", "roi_size")}
    facts["preprocessing_text"] = Template(facts["preprocessing_text"]).substitute(
        spacing_text=sides["spacing"], roi_text=sides["roi_size"]
    )
    facts["paper_dice"] = facts["paper_dice"].get(backbone)
    return facts


def _metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of metadata.json, in the terms of MONAI's schema."""
    spec: DatasetSpec = facts["spec"]
    versions = _pinned_versions()
    weights = _weights_in_brief(facts)
    return {
        "schema": "https://project-monai.github.io/schema/meta_schema_20240725.json",
        "version": facts["version"],
        "changelog": {facts["version"]: f"first version; weights {weights}"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": {
            "passion-monai": __version__,
            **{name: versions[name] for name in ("nibabel", "pytorch-ignite", "itk")},
        },
        "name": f"{facts['dataset_title']} with missing sequences, {facts['backbone_title']} with PASSION"
        + (" (PHANTOM weights)" if facts["phantom"] else ""),
        "task": facts["task"],
        "description": "One network trained with PASSION on cohorts in which patients lack MR sequences, some far more "
        f"often than others; it segments {facts['subject']} from any subset of {facts['sequences']}. "
        f"Weights: {weights}.",
        "authors": "the passion-monai contributors",
        "copyright": "Copyright (c) the passion-monai contributors",
        "data_source": f"{facts['data_source']}; without it, the phantom cohort written by the package",
        "data_type": "nibabel",
        "image_classes": facts["image_classes"],
        "label_classes": facts["label_classes"],
        "pred_classes": ", ".join(f"{index} {name}" for index, name in enumerate(spec.class_names)),
        "eval_metrics": _phantom_scores(facts["name"]) if facts["phantom"] else {},
        "intended_use": "Research on segmentation with missing modalities. Not a medical device, not for clinical use.",
        "references": [
            facts["method_reference"],
            facts["backbone_reference"],
            facts["reference"],
        ],
        "network_data_format": {
            "inputs": {"image": _tensor(facts, "magnitude", spec.modalities) | {"modality": "MR"}},
            "outputs": {"pred": _tensor(facts, "segmentation", spec.class_names)},
        },
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _weights_in_brief(facts: Mapping[str, Any]) -> str:
    if facts["phantom"]:
        return "trained on the PHANTOM cohort, not on patients"
    return f"trained on {len(facts['weights']['cases'])} patients" if facts["weights"] else "not included"


def _tensor(facts: Mapping[str, Any], tensor_format: str, channels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "type": "image",
        "format": tensor_format,
        "num_channels": len(channels),
        "spatial_shape": facts["roi_size"],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(index): name for index, name in enumerate(channels)},
    }


def _pinned_versions() -> dict[str, str]:
    text = (ROOT.parent / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, flags=re.MULTILINE))


def _readme(facts: Mapping[str, Any]) -> str:
    spec: DatasetSpec = facts["spec"]
    derived = {
        "num_modalities": len(spec.modalities),
        "num_classes": len(spec.class_names),
        "modalities": ", ".join(spec.modalities),
        "classes": ", ".join(spec.class_names),
        "weights_text": _weights_text(facts),
        "card_text": model_card(facts),
        "input_shape": str([1, len(spec.modalities), *facts["roi_size"]]).replace(" ", ""),
        "paper_text": _paper_text(facts),
        "scores_text": _scores_text(facts["name"]),
        "install_command": f"pip install bundles/{facts['name']}/passion_monai-*.whl"
        if facts["phantom"]
        else "pip install -e .    # in a clone of the repository",
        **_commands_for_weights(facts),
        "grid_text": _grid_text(facts["weights"]),
    }
    template = Template((DOCUMENTS / "README.md").read_text(encoding="utf-8"))
    return template.substitute(facts, **derived)


def _commands_for_weights(facts: Mapping[str, Any]) -> dict[str, str]:
    """What commands need that use weights: those of the bundle where it has some, otherwise those of the training."""
    shipped = f"bundles/{facts['name']}/models/model.pt"
    of_patients = facts["weights"] and not facts["phantom"]
    there = facts["phantom"] or facts["weights"]
    weights = shipped if there else "runs/first/models/model.pt"
    note = (
        "\nThis calibrates the weights in `runs/first`. For those in `models/`, add\n"
        f"`--ckpt_path {shipped}`, give another `--output_dir`, and give the file\n"
        "`evaluation/temperatures.json` in that folder to inference as `--temperature_file`.\n"
    )
    return {
        "weights_file": weights,
        "expected_source": " (of those in `models/`: the cross-validation above)" if of_patients else "",
        "ckpt_option": "" if there else f" --ckpt_path {weights}",
        "pretrained_option": "" if there else f" \\\n    --pretrained_weights {weights}",
        "shipped_calibration_text": note if of_patients else "",
    }


def _weights_text(facts: Mapping[str, Any]) -> str:
    if facts["phantom"]:
        return (
            "**The weights were trained on the PHANTOM cohort: simulated images, a small network, a coarse grid. They\n"
            "show how everything works. Do not use them on patients.**"
        )
    if facts["weights"]:
        return f"`models/model.pt` was trained on {len(facts['weights']['cases'])} patients; see the model card below."
    return "The repository has no weights for this bundle. Train your own, or small ones on a phantom: `make weights`."


def _grid_text(weights: Mapping[str, Any] | None) -> str:
    """The grid of weights that were trained on patients, which is not that of the paper."""
    if weights is None:
        return ""
    return (
        f"\n\nThe weights in `models/` were trained otherwise, on crops of {crop_in_words(weights)}.\n"
        "Evaluation, inference and fine-tuning take this grid from their `run.json`."
    )


def _paper_text(facts: Mapping[str, Any]) -> str:
    if facts["paper_dice"] is None:
        return f"The paper does not report {facts['backbone_title']} on {facts['dataset_title']}."
    rows = zip(("Baseline", "PASSION"), facts["paper_dice"], strict=True)
    return "\n".join(
        [
            f"This implementation has not been scored on {facts['data_source'].split(',')[0]} yet.",
            f"**The paper's** mean Dice in percent over {facts['paper_setting']}:",
            "",
            "| | " + " | ".join(facts["paper_regions"]) + " |",
            "|---" * (len(facts["paper_regions"]) + 1) + "|",
            *(f"| {method} | " + " | ".join(f"{value:.2f}" for value in values) + " |" for method, values in rows),
        ]
    )


def _phantom_scores(name: str) -> dict[str, float]:
    """Mean Dice of the weights trained on the phantom, per region, as `make weights` measured it."""
    scores = json.loads(PHANTOM_SCORES.read_text(encoding="utf-8")) if PHANTOM_SCORES.is_file() else {}
    return dict(scores.get(name, {}))


def _scores_text(name: str) -> str:
    scores = _phantom_scores(name)
    if not scores:
        return ""
    return "\n".join(
        [
            "",
            "**Ours, on the phantom** (simulated images, which say nothing about patients): mean Dice of the small",
            "weights in percent, over all combinations of the phantom's test cases.",
            "",
            "| " + " | ".join(scores) + " |",
            "|---" * len(scores) + "|",
            "| " + " | ".join(f"{100 * value:.1f}" for value in scores.values()) + " |",
            "",
        ]
    )


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    check = parser.parse_args().check
    files = [(bundle / path, text) for bundle in bundle_folders() for path, text in bundle_files(bundle)]
    stale = [(path, text) for path, text in files if not path.is_file() or path.read_text("utf-8") != text]
    for path, text in stale:
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{'not up to date' if check else 'written'}: {path.relative_to(ROOT.parent)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
