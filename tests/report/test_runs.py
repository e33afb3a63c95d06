from __future__ import annotations

from typing import Any

import pytest

from passion_monai.report.runs import method_name

PASSION = {
    "objective": "passion",
    "modality_dropout": False,
    "lambda_pixel": 0.5,
    "lambda_prototype": 0.1,
    "use_task_mask": True,
    "adaptive_beta": True,
}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "PASSION"),
        ({"objective": "baseline"}, "Baseline"),
        ({"objective": "baseline", "modality_dropout": True}, "+ModDrop"),
        ({"objective": "pmr"}, "+PMR"),
        ({"objective": "released"}, "PASSION (released)"),
        ({"objective": "reweighted"}, "re-weighted control"),
        ({"modality_dropout": True}, "PASSION +ModDrop"),
        ({"lambda_prototype": 0, "adaptive_beta": False}, "pixel"),
        ({"lambda_pixel": 0, "use_task_mask": False}, "prototype"),
        ({"use_task_mask": False, "adaptive_beta": False}, "pixel + prototype"),
        ({"adaptive_beta": False}, "pixel + prototype + δ"),
        ({"lambda_pixel": 0, "lambda_prototype": 0}, "without distillation"),
        ({"lambda_pixel": 0.25}, "PASSION (λ 0.25, 0.1)"),
        ({"lambda_pixel": 0.25, "lambda_prototype": 0}, "pixel + β (λ 0.25, 0)"),
    ],
)
def test_method_name(changes: dict[str, Any], name: str) -> None:
    assert method_name(PASSION | changes) == name
