"""Scores lesion by lesion, as in the BraTS challenge since 2023, with the package panoptica.

If a network finds a large lesion but misses a small one, Dice of the whole mask is high. Here every lesion has the same
weight: each connected component of the label, and each component of the prediction without a match in the label.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from passion_monai.evaluation.dice import check_masks
from passion_monai.evaluation.tables import EMPTY_DISTANCE, LESION_COLUMNS

__all__ = ["check_panoptica", "lesion_scores"]

_OVERLAP = 1e-6  # Dice of two components that are one lesion: any overlap


def lesion_scores(prediction: Tensor, label: Tensor, spacing: Sequence[float]) -> dict[str, float]:
    """Dice and HD95 of the lesions of a mask.

    The lesions are those of the challenge's package BraTS-evaluation 0.0.10: connected components, neighbours at
    corners too, matched one to one by the highest sum of Dice coefficients (F. Kofler et al., "Panoptica", 2023). HD95
    is the percentile of both directions' distances together. The means are those of the challenge's rules of 2023, in
    which what is missed or false counts::

        lesion_dice = sum_matched(dice) / (matched + missed + false)
        lesion_hd95 = (sum_matched(hd95) + 373.13 mm * (missed + false)) / (matched + missed + false)

    Args:
        prediction: mask [H, W(, D)].
        label: mask of the same shape.
        spacing: size of a voxel along each axis, in mm.

    Returns:
        `LESION_COLUMNS` of :mod:`passion_monai.evaluation.tables`; Dice 1 and HD95 0 where there is no lesion at all.

    Raises:
        ImportError: when panoptica is not installed, with the remedy.
        TypeError: when a mask is not boolean.
        ValueError: when the shapes differ.
    """
    check_masks(prediction, label)
    masks = [mask.cpu().numpy().astype(np.uint8) for mask in (prediction, label)]
    (result,) = _evaluator().evaluate(*masks, voxelspacing=tuple(spacing), result_all=False).values()
    matched, lost = result.tp, result.fn + result.fp
    if not matched + lost:
        return dict(zip(LESION_COLUMNS, (1.0, 0.0, 0.0, 0.0, 0.0), strict=True))
    dice_sum, distance_sum = (matched * result.sq_dsc, matched * result.sq_hd95) if matched else (0.0, 0.0)
    means = dice_sum / (matched + lost), (distance_sum + EMPTY_DISTANCE["brats"] * lost) / (matched + lost)
    return dict(zip(LESION_COLUMNS, map(float, (*means, matched, result.fn, result.fp)), strict=True))


def check_panoptica() -> None:
    """Refuse to score lesions without the package for it.

    Raises:
        ImportError: when it is not installed, with the remedy.
    """
    try:
        import panoptica  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'lesionwise needs panoptica: pip install "passion-monai[lesionwise]", or leave lesionwise False.'
        ) from error


@functools.cache
def _evaluator() -> Any:
    check_panoptica()
    import panoptica
    from panoptica.utils.edge_case_handling import EdgeCaseHandler, EdgeCaseResult, MetricZeroTPEdgeCaseHandling

    panoptica.disable_citation_reminder()  # the documentation says whom to cite
    metrics = [panoptica.Metric.DSC, panoptica.Metric.HD95]
    nothing_matched = MetricZeroTPEdgeCaseHandling(default_result=EdgeCaseResult.NAN)
    return panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.MaxBipartiteMatching(
            matching_metric=panoptica.Metric.DSC, matching_threshold=_OVERLAP
        ),
        edge_case_handler=EdgeCaseHandler(dict.fromkeys(metrics, nothing_matched)),
        instance_metrics=metrics,
        global_metrics=[],
    )
