from __future__ import annotations

import math

import pytest
import torch
from monai.metrics import CalibrationErrorMetric

from passion_monai.evaluation.calibration import expected_calibration_error
from passion_monai.transforms import FULL_CONFIDENCE


def slow_error(confidence: list[int], correct: list[bool], bins: int) -> float:
    """Voxel by voxel."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for level, right in zip(confidence, correct, strict=True):
        if level:
            members[math.ceil(level * bins / FULL_CONFIDENCE) - 1].append((level / FULL_CONFIDENCE, right))
    gaps = [abs(sum(right for _, right in voxels) - sum(c for c, _ in voxels)) for voxels in members]
    return sum(gaps) / sum(map(len, members))


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probability = 0.3 + 0.7 * torch.rand(3, 20, 10, generator=generator)
    confidence = (probability * FULL_CONFIDENCE).round().to(torch.int16)
    confidence[0, :5] = 0
    return confidence, torch.rand(3, 20, 10, generator=generator) < probability**2


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_error_is_the_slow_one(bins: int):
    confidence, correct = example()
    expected = slow_error(confidence.flatten().tolist(), correct.flatten().tolist(), bins)
    assert expected > 0.1
    assert expected_calibration_error(confidence, correct, bins=bins) == pytest.approx(expected)


def test_error_is_that_of_monai_on_few_voxels():
    confidence, correct = example()
    seen = confidence > 0
    pair = [values[seen].reshape(1, 1, -1).float() for values in (confidence / FULL_CONFIDENCE, correct)]
    expected = CalibrationErrorMetric(num_bins=15)(*pair).item()
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-5)


def test_a_bin_holds_its_upper_end():
    confidence = torch.tensor([FULL_CONFIDENCE // 7, FULL_CONFIDENCE // 7 + 1], dtype=torch.int16)  # 1/7 exactly
    together = abs(1 - sum(confidence.tolist()) / FULL_CONFIDENCE) / 2
    apart = (1 / 7 + 1 - (FULL_CONFIDENCE // 7 + 1) / FULL_CONFIDENCE) / 2
    correct = torch.tensor([False, True])
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(together)
    assert expected_calibration_error(confidence, correct, bins=7) == pytest.approx(apart)


def test_millions_of_sure_voxels_are_not_rounded():
    confidence = torch.full((5_000_000,), 32750, dtype=torch.int16)
    error = expected_calibration_error(confidence, torch.ones(len(confidence), dtype=torch.bool))
    assert error == pytest.approx(1 - 32750 / FULL_CONFIDENCE, rel=1e-12)


def test_nothing_seen():
    confidence = torch.zeros(4, dtype=torch.int16)
    assert math.isnan(expected_calibration_error(confidence, confidence == 0))
