"""The difference between a network's confidence and its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from passion_monai.transforms import FULL_CONFIDENCE

__all__ = ["expected_calibration_error"]


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of the most likely class.

    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Eqs. (2), (3) and (5). With B_b the voxels
    whose confidence is in ((b - 1) / bins, b / bins], n of them all::

        ece = sum_b |B_b| / n * |accuracy(B_b) - confidence(B_b)|

    Sums are exact: in single precision, as MONAI's `calibration_binning` has them, confidences near 1 are rounded to 1
    once there are a million of them.

    Args:
        confidence: of the most likely class, as :class:`passion_monai.transforms.RestoreClassesd` gives it: 1 to
            `FULL_CONFIDENCE`, and 0 where the network did not see the voxel, which then does not count.
        correct: whether it is the label's class.
        bins: number of bins of equal width.

    Shape:
        - confidence: int [...]; correct: bool, the same.

    Returns:
        From 0 to 1; NaN when the network saw nothing.
    """
    levels = torch.arange(FULL_CONFIDENCE + 1)
    seen = torch.bincount(confidence.flatten().int(), minlength=len(levels))
    right = torch.bincount(confidence[correct].int(), minlength=len(levels))
    seen[0] = right[0] = 0
    # A bin holds its upper end; in whole numbers, so that no rounding moves a level into the next bin.
    members = (levels * bins - 1).div(FULL_CONFIDENCE, rounding_mode="floor").clamp(min=0)
    gaps = right * FULL_CONFIDENCE - seen * levels
    total = torch.zeros(bins, dtype=torch.int64).index_add(0, members, gaps).abs().sum()
    return float(total / (seen.sum() * FULL_CONFIDENCE))
