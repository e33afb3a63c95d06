"""Dice of regions, and of all modality combinations in validation, computed where the class maps lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from monai.utils import convert_to_tensor
from torch import Tensor

__all__ = ["CombinationDiceMetric", "check_masks", "dice", "region_masks"]

_NOT_AVAILABLE = -1  # class map of a combination that a case does not have the modalities for


def region_masks(classes: Tensor, regions: Mapping[str, Sequence[int]]) -> Tensor:
    """Masks of regions that are unions of classes.

    Args:
        classes: class indices.
        regions: class indices of each region by its name.

    Shape:
        - classes: int [...]; output: bool [R, ...].
    """
    plain = convert_to_tensor(classes)
    masks = torch.zeros((len(regions), *plain.shape), dtype=torch.bool, device=plain.device)
    for mask, members in zip(masks, regions.values(), strict=True):
        for member in members:  # torch.isin takes several times as long
            mask |= plain == member
    return masks


def dice(prediction: Tensor, label: Tensor) -> float:
    """Dice coefficient ``2 |prediction & label| / (|prediction| + |label|)``; 1 where both masks are empty.

    Args:
        prediction: mask.
        label: mask of the same shape.

    Raises:
        TypeError: when a mask is not boolean.
        ValueError: when the shapes differ.
    """
    check_masks(prediction, label)
    return float(_dice(prediction, label))


def _dice(prediction: Tensor, label: Tensor) -> Tensor:
    """The same as a tensor where the masks lie, without waiting for its value."""
    total = prediction.count_nonzero() + label.count_nonzero()
    both = (prediction & label).count_nonzero()
    return torch.where(total > 0, 2 * both.double() / total.clamp_min(1), 1.0)


class CombinationDiceMetric(CumulativeIterationMetric):
    """Dice of every region for every modality combination, for validation during training.

    The result is one number: the mean over cases for each combination and region, then over combinations and regions,
    so that each combination has the same weight however many cases have its modalities.

    Args:
        regions: class indices of each region by its name.

    Shape:
        - y_pred: list of int [P, H, W(, D)] or a batch of them; a map that is -1 everywhere is of a combination that
          the case does not have the modalities for, and counts for nothing.
        - y: list of int [1, H, W(, D)] or a batch of them.
        - Buffer: [N, P * R], regions running fastest; NaN for a combination without a map.

    Raises:
        ValueError: when there is no region, when shapes do not fit, and on aggregating nothing.

    Example:
        >>> metric = CombinationDiceMetric(regions={"tumour": (1, 2)})
        >>> _ = metric([torch.tensor([[[0, 1]], [[-1, -1]]])], [torch.tensor([[[0, 2]]])])
        >>> metric.aggregate().item()
        1.0
    """

    def __init__(self, regions: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        if not regions:
            raise ValueError("regions must name at least one region with its class indices, got none.")
        self.regions = {name: tuple(members) for name, members in regions.items()}

    def aggregate(self) -> Tensor:
        """Mean Dice over cases, then over combinations and regions."""
        scores = self.get_buffer()
        if not isinstance(scores, Tensor):
            raise ValueError("There is nothing to aggregate; call the metric on predictions and labels first.")
        return scores.nanmean(dim=0).nanmean()

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None or y.shape != (len(y_pred), 1, *y_pred.shape[2:]):
            raise ValueError(
                f"y must be [{len(y_pred)}, 1, ...] for y_pred {tuple(y_pred.shape)}, "
                f"got {None if y is None else tuple(y.shape)}."
            )
        # Post-processed predictions may be on the CPU; gathering over ranks wants the scores where the labels are.
        scores = [self._score_item(*item) for item in zip(y_pred, y.to(y_pred.device), strict=True)]
        return torch.stack(scores).to(y.device, torch.float32)

    def _score_item(self, predictions: Tensor, label: Tensor) -> Tensor:
        label_masks = region_masks(label[0], self.regions)
        scores = []
        for prediction in convert_to_tensor(predictions):
            available = (prediction != _NOT_AVAILABLE).any()
            masks = region_masks(prediction, self.regions)
            scores += [torch.where(available, _dice(*pair), torch.nan) for pair in zip(masks, label_masks, strict=True)]
        return torch.stack(scores)


def check_masks(prediction: Tensor, label: Tensor) -> None:
    """Refuse anything but two boolean masks of one shape.

    Raises:
        TypeError: when a mask is not boolean.
        ValueError: when the shapes differ.
    """
    if prediction.dtype != torch.bool or label.dtype != torch.bool:
        raise TypeError(f"prediction and label must be boolean masks, got {prediction.dtype} and {label.dtype}.")
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction and label must have one shape, got {tuple(prediction.shape)} and {tuple(label.shape)}."
        )
