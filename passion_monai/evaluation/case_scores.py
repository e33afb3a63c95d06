"""Scores of one case: Dice, distances between surfaces, and volumes, of each combination and region."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from monai.metrics.utils import get_edge_surface_distance
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor

from passion_monai.evaluation.dice import check_masks, dice, region_masks
from passion_monai.evaluation.lesions import lesion_scores
from passion_monai.evaluation.tables import EMPTY_DISTANCE

__all__ = ["SurfaceDistances", "score_case", "surface_distances"]

_ML_PER_MM3 = 1e-3
_QUANTILE = 0.95


class SurfaceDistances(NamedTuple):
    """Distances between two masks in mm: 95th percentile Hausdorff distance and average symmetric surface distance.

    Attributes:
        hausdorff95: the larger of the two 95th percentiles of the distances from one mask's surface to the other's, as
            the BraTS challenge takes it.
        pooled_hausdorff95: the 95th percentile of these distances, of both directions together, as MedPy's ``hd95``
            takes it, and with it the tables of the PASSION paper; usually smaller.
        average: the mean of these distances, of both directions together.
    """

    hausdorff95: float
    pooled_hausdorff95: float
    average: float


def surface_distances(prediction: Tensor, label: Tensor, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks.

    Args:
        prediction: mask [H, W(, D)].
        label: mask of the same shape.
        spacing: size of a voxel along each axis, in mm.

    Returns:
        Distances in mm; 0 where both masks are empty, NaN where exactly one is.

    Raises:
        TypeError: when a mask is not boolean.
        ValueError: when the shapes differ or the spacing does not fit them.
    """
    check_masks(prediction, label)
    if len(spacing) != label.ndim:
        raise ValueError(f"spacing must have one entry for each of {label.ndim} axes, got {list(spacing)}.")
    if not prediction.any() or not label.any():
        undefined = math.nan if prediction.any() or label.any() else 0.0
        return SurfaceDistances(undefined, undefined, undefined)
    # Nothing outside the masks matters; MONAI crops too, but after it has copied the full volumes several times.
    box = tuple(map(slice, *generate_spatial_bounding_box((prediction | label)[None])))
    with warnings.catch_warnings():
        # MONAI 1.6 warns of an argument that it passes itself.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        _, distances, _ = get_edge_surface_distance(prediction[box], label[box], spacing=list(spacing), symmetric=True)
    one_way = [one.numpy() for one in distances]  # torch's quantile refuses more than 16 million values
    both = np.concatenate(one_way)
    hausdorff95 = max(float(np.quantile(one, _QUANTILE)) for one in one_way)
    return SurfaceDistances(hausdorff95, float(np.quantile(both, _QUANTILE)), float(both.mean()))


def score_case(
    predictions: Tensor,
    label: Tensor,
    *,
    case: str,
    names: Sequence[str],
    regions: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
    lesionwise: bool = False,
) -> list[dict[str, Any]]:
    """Scores of one case for each combination and region.

    Args:
        predictions: class maps, one for each of P combinations.
        label: class map.
        case: id of the case.
        names: names of the P combinations.
        regions: class indices of each region by its name.
        spacing: size of a voxel along each axis, in mm.
        lesionwise: score lesion by lesion too, see :mod:`passion_monai.evaluation.lesions`.

    Shape:
        - predictions: int [P, H, W(, D)]; label: int [H, W(, D)].

    Returns:
        One row per combination and region, with the columns `SCORE_COLUMNS` of :mod:`passion_monai.evaluation.tables`,
        and `LESION_COLUMNS` if asked for.

    Raises:
        ValueError: when shapes, names or spacing do not fit together.
    """
    if predictions.shape[1:] != label.shape or len(names) != len(predictions):
        raise ValueError(
            f"Case {case}: predictions must be [{len(names)}, ...], one for each name, with the label's shape "
            f"{tuple(label.shape)}, got {tuple(predictions.shape)}."
        )
    rows = []
    # Maps of one combination at a time: all masks of a large case at once would be several hundred MB.
    label_masks = region_masks(label.cpu(), regions)
    for name, prediction in zip(names, predictions.cpu(), strict=True):
        for region, mask, label_mask in zip(regions, region_masks(prediction, regions), label_masks, strict=True):
            scores = _score(mask, label_mask, spacing)
            scores |= lesion_scores(mask, label_mask, spacing) if lesionwise else {}
            rows.append({"case": case, "combination": name, "region": region} | scores)
    return rows


def _score(prediction: Tensor, label: Tensor, spacing: Sequence[float]) -> dict[str, float]:
    distances = surface_distances(prediction, label, spacing)
    voxel = math.prod(spacing) * _ML_PER_MM3
    by_convention = {"brats": distances.hausdorff95, "released": distances.pooled_hausdorff95}
    return {
        "dice": dice(prediction, label),
        "hd95_mm": distances.hausdorff95,
        **{f"hd95_{name}": _or_if_empty(value, EMPTY_DISTANCE[name]) for name, value in by_convention.items()},
        "assd_mm": distances.average,
        "prediction_ml": int(prediction.count_nonzero()) * voxel,
        "label_ml": int(label.count_nonzero()) * voxel,
    }


def _or_if_empty(distance: float, empty_distance: float) -> float:
    return empty_distance if math.isnan(distance) else distance
