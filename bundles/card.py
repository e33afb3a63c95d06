"""The model card of weights that were trained on patients: for a bundle, a model hub, and a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

__all__ = ["crop_in_words", "hub_card", "hub_metadata", "model_card"]


_COUNTED = (
    "Dice in percent with its 95 % interval, over the cases that have the region; HD95 in mm, over those in which the "
    "prediction has it too."
)


def model_card(facts: Mapping[str, Any]) -> str:
    """The section, or an empty text if the bundle has no such weights.

    Args:
        facts: facts for a bundle's documents, with `weights` (settings and cases of the training) and `expected` (the
            scores recorded with predictions).
    """
    weights = facts["weights"]
    if weights is None:
        return ""
    paragraphs = [
        "## Model card",
        f"**Data.** {facts['weights_data_text']} {_cases(weights)}",
        f"**Licence.** Data and weights: {facts['weights_license']}. Cite {facts['weights_citation']}.",
        f"**Training.** {_training(weights)}",
        f"**Not for.** {facts['weights_limits_text']}",
        f"**Scores.** {facts['expected']['data']}. {_COUNTED}",
        _score_table(facts["expected"]["combinations"]),
    ]
    return "\n\n".join(paragraphs) + "\n\n"


def crop_in_words(settings: Mapping[str, Any]) -> str:
    """The crop and voxel size of a training, such as "48 x 48 x 48 voxels of 2 x 2 x 2 mm"."""
    spacing, roi_size = (" x ".join(f"{size:g}" for size in settings[key]) for key in ("spacing", "roi_size"))
    return f"{roi_size} voxels of {spacing} mm"


def _training(weights: Mapping[str, Any]) -> str:
    rates = zip(weights["modalities"], weights["missing_rates"], strict=True)
    steps = weights["epochs"] * -(-len(weights["cases"]) // weights["batch_size"])
    return (
        f"Objective `{weights['objective']}`; {steps:,} "
        f"steps of {weights['batch_size']} crop, {crop_in_words(weights)}; learning rate "
        f"{weights['learning_rate']:g}; {weights['precision']}. Hidden: "
        + ", ".join(f"{name} in {rate:.0%} of the cases" for name, rate in rates)
        + "."
    )


def _score_table(combinations: Mapping[str, Any]) -> str:
    regions = list(next(iter(combinations.values())))
    header = "| given | " + " | ".join(f"{name}, Dice | HD95" for name in regions) + " |"
    rows = [header, "|---" + "|--:" * 2 * len(regions) + "|"]
    for given, scores in combinations.items():
        rows.append(f"| {given} | " + " | ".join(_cells(scores.get(region)) for region in regions) + " |")
    return "\n".join(rows)


def _cells(scores: Mapping[str, Any] | None) -> str:
    """Dice and HD95 of a region where they are defined."""
    if scores is None:
        return "- | -"
    dice, distance = scores["dice"], scores["hd95_mm"]["mean"]
    low, high = (100 * dice[bound] for bound in ("low", "high"))
    return f"{100 * dice['mean']:.0f} [{low:.0f}, {high:.0f}] | " + ("-" if distance is None else f"{distance:.0f}")


def hub_card(facts: Mapping[str, Any]) -> str:
    """The README of a bundle on a model hub: the fields that hubs read, how to use it, and the model card."""
    name = facts["name"]
    fields = {
        "license": facts["weights_license"].lower(),
        "library_name": "monai",
        "pipeline_tag": "image-segmentation",
        "tags": [
            tag.strip() for tag in f"monai, medical, {facts['tags']}, segmentation, missing modalities".split(",")
        ],
    }
    usage = (
        "```bash\n"
        "# with the package passion-monai installed\n"
        f"python -m monai.bundle run --config_file {name}/configs/inference.yaml --dataset_dir <folder of patients>\n"
        "```"
    )
    title = f"# {facts['dataset_title']} with missing sequences: {facts['backbone_title']} trained with PASSION"
    about = (
        f"Segments {facts['subject']} from any subset of {facts['sequences']}. A MONAI bundle; `models/model.pt` and "
        "`models/model.safetensors` are the same weights. Research software, not a medical device."
    )
    head = f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"
    return f"{head}\n{title}\n\n{about}\n\n{usage}\n\n{model_card(facts)}"


def hub_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a file of weights says about itself."""
    weights = facts["weights"]
    return {
        "format": "pt",
        "name": facts["name"],
        "version": facts["version"],
        "license": facts["weights_license"],
        "citation": facts["weights_citation"],
        "training_data": f"{facts['weights_data_text']} {_cases(weights)}",
        "training": _training(weights),
        "modalities": ", ".join(weights["modalities"]),
        "classes": ", ".join(weights["class_names"]),
        "not_for": facts["weights_limits_text"],
    }


def _cases(weights: Mapping[str, Any]) -> str:
    return f"{len(weights['cases'])} cases: {', '.join(weights['cases'])}."
