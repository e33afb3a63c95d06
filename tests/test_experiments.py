"""The grid of experiments: what its files name is there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from passion_monai.config import check_numbers
from passion_monai.datasets import get_spec

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


METHODS = load(EXPERIMENTS / "methods.yaml")
SCALES = {name: load(EXPERIMENTS / f"{name}.yaml") for name in ("cpu", "paper")}
PARTS = [(scale, part) for scale, content in SCALES.items() for parts in content["tables"].values() for part in parts]


@functools.cache
def ids(cohort: str, backbone: str, workflow: str = "train") -> set[str]:
    return set(load(ROOT / "bundles" / f"{cohort}_{backbone}_passion" / "configs" / f"{workflow}.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_ids_of_a_training(method: str):
    assert set(METHODS[method]) <= ids("brats", "mmformer")


@pytest.mark.parametrize(("scale", "part"), PARTS)
def test_a_table_is_made_of_what_there_is(scale: str, part: dict[str, Any]):
    assert part["cohort"] in SCALES[scale]["cohorts"]
    assert {*part["methods"]} <= {*METHODS}
    assert {*part["missing_rates"]} <= {*SCALES[scale]["missing_rates"][part["cohort"]]}
    for backbone in part["backbones"]:
        cohort = SCALES[scale]["cohorts"][part["cohort"]]
        settings = {name.split("::")[0] for name in cohort.get("settings", {})}
        assert settings <= ids(part["cohort"], backbone) & ids(part["cohort"], backbone, "evaluate")
        assert {*cohort.get("training", {})} <= ids(part["cohort"], backbone)


@pytest.mark.parametrize("scale", SCALES)
def test_there_is_a_missing_rate_for_each_modality(scale: str):
    for cohort, rates in SCALES[scale]["missing_rates"].items():
        for values in rates.values():
            check_numbers(minimum=0, below=1, length=len(get_spec(cohort).modalities), missing_rates=values)
