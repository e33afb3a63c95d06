"""The model card of weights that were trained on patients, as a section of a bundle's README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]


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
        f"**Data.** {facts['weights_data_text']}",
        f"**Training.** {_training(weights)}",
        f"**Not for.** {facts['weights_limits_text']}",
        f"**Scores.** {facts['expected']['data']}. Dice in percent with its 95 % interval over cases; HD95 in mm.",
        _score_table(facts["expected"]["combinations"]),
    ]
    return "\n\n".join(paragraphs) + "\n\n"


def _training(weights: Mapping[str, Any]) -> str:
    spacing, roi_size = (" x ".join(f"{size:g}" for size in weights[key]) for key in ("spacing", "roi_size"))
    rates = zip(weights["modalities"], weights["missing_rates"], strict=True)
    steps = weights["epochs"] * -(-len(weights["cases"]) // weights["batch_size"])
    return (
        f"{len(weights['cases'])} cases: {', '.join(weights['cases'])}. Objective `{weights['objective']}`; {steps:,} "
        f"steps of {weights['batch_size']} crop, {roi_size} voxels of {spacing} mm; learning rate "
        f"{weights['learning_rate']:g}; {weights['precision']}. Hidden: "
        + ", ".join(f"{name} in {rate:.0%} of the cases" for name, rate in rates)
        + "."
    )


def _score_table(combinations: Mapping[str, Any]) -> str:
    regions = list(next(iter(combinations.values())))
    header = "| given | " + " | ".join(f"{name}, Dice | HD95" for name in regions) + " |"
    rows = [header, "|---" + "|--:" * 2 * len(regions) + "|"]
    for given, scores in combinations.items():
        rows.append(f"| {given} | " + " | ".join(_cells(scores[region]) for region in regions) + " |")
    return "\n".join(rows)


def _cells(scores: Mapping[str, Any]) -> str:
    """Dice and HD95 of a region, the latter where it is defined."""
    dice, distance = scores["dice"], scores["hd95_mm"]["mean"]
    low, high = (100 * dice[bound] for bound in ("low", "high"))
    return f"{100 * dice['mean']:.0f} [{low:.0f}, {high:.0f}] | " + ("-" if distance is None else f"{distance:.0f}")
