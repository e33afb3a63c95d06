"""The task loss, Eqs. (1) and (2): deep supervision of the fused prediction, regularisation of each modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from passion_monai.devices import send
from passion_monai.losses.columns import stack_columns
from passion_monai.losses.prototype import PrototypeDistillationLoss
from passion_monai.networks.base import DecoderOutput, select_rows
from passion_monai.networks.blocks import upsample_logits
from passion_monai.passes import DistillationOutput
from passion_monai.precision import at_least_float32
from passion_monai.preference import relative_preference

SMOOTHING = 1e-7
"""Added to the denominator of Dice."""

__all__ = ["DiceWeightedCELoss", "SegmentationLoss", "TaskLoss"]


class Target(NamedTuple):
    """What the losses need of a label, the same for every prediction that is compared with it.

    Attributes:
        classes: int64 [B, 1, V].
        one_hot: float [B, K, V].
        counts: voxels of each class, float [B, K].
    """

    classes: Tensor
    one_hot: Tensor
    counts: Tensor

    @classmethod
    def of(cls, label: Tensor, logits: Tensor) -> Target:
        """From a label, int [B, 1, H, W(, D)], for predictions of as many classes and the precision of `logits`."""
        classes = label.flatten(2).long()
        indices = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1)
        one_hot = (classes == indices).to(torch.promote_types(logits.dtype, torch.float32))
        return cls(classes, one_hot, one_hot.sum(dim=2))

    @property
    def class_weights(self) -> Tensor:
        """Cross-entropy weight of each class, ``1 - |{y = k}| / |y|`` per sample, [B, K]."""
        return 1 - self.counts / self.classes.shape[2]


class DiceWeightedCELoss(nn.Module):
    """Soft Dice plus weighted cross-entropy per sample ("dice+ce" of Eq. 1).

    ``dice = 1 - mean_k(2 * sum_i(p_k * y_k) / (sum_i p_k + sum_i y_k))``, the background included, and
    ``ce = mean_i(-weight_{y_i} * log p_{y_i})`` with ``weight_k = 1 - |{y = k}| / |y|`` of the same sample.

    Args:
        probability_floor: probabilities below it count as it in the cross-entropy, and get no gradient from it: 0 as
            the paper writes it, 0.005 in the authors' code.

    Shape:
        - logits: [B, K, H, W(, D)]; label: int [B, 1, H, W(, D)], values 0..K-1.
        - Output: [B].
    """

    def __init__(self, *, probability_floor: float = 0.0) -> None:
        super().__init__()
        self.probability_floor = probability_floor

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return self.from_logits(logits, Target.of(label, logits))

    def from_logits(self, logits: Tensor, target: Target) -> Tensor:
        """The same with a label that has been prepared."""
        logits = at_least_float32(logits).flatten(2)
        if self.probability_floor:
            return self.from_probabilities(logits.softmax(dim=1), target)
        log_probabilities = logits.log_softmax(dim=1)
        log_true = log_probabilities.gather(1, target.classes)
        return self._sum(log_probabilities.exp(), log_true.exp(), log_true, target)

    def from_probabilities(self, probabilities: Tensor, target: Target) -> Tensor:
        """The same for probabilities [B, K, V], float32, instead of logits."""
        true = probabilities.gather(1, target.classes)
        floor = self.probability_floor or torch.finfo(true.dtype).tiny
        return self._sum(probabilities, true, true.clamp_min(floor).log(), target)

    @staticmethod
    def _sum(probabilities: Tensor, true: Tensor, log_true: Tensor, target: Target) -> Tensor:
        """Dice plus cross-entropy from the probabilities [B, K, V] and those of the true classes, [B, 1, V].

        Of the rest only the sums over voxels matter, so that all else is as small as one class.
        """
        intersection, log_sums = (torch.cat([true, log_true], dim=1) @ target.one_hot.mT).unbind(dim=1)  # [B, K]
        # Only the denominator is smoothed: a class that is neither there nor predicted counts as a miss, as in the
        # reference implementation, and every voxel wrongly given to it still costs.
        dice = 1 - 2 * intersection / (probabilities.sum(dim=2) + target.counts + SMOOTHING)
        return dice.mean(dim=1) - (target.class_weights * log_sums).sum(dim=1) / true.shape[2]


class SegmentationLoss(nn.Module):
    """L_seg of Eq. (2): ``sum_l level_decay^l * DiceCE(Up_l(z^l), y)`` over the output and the auxiliary levels.

    Args:
        level_decay: weight of level l is `level_decay` to the power l: 1 as the paper writes it, 0.5 in the authors'
            code.
        probability_floor: see :class:`DiceWeightedCELoss`.
        upsample_probabilities: bring probabilities to full size, as the authors' code does, instead of logits.

    Shape:
        - output: what `Backbone.decode` gives; label: int [B, 1, H, W(, D)].
        - Output: [B].
    """

    def __init__(
        self, *, level_decay: float = 1.0, probability_floor: float = 0.0, upsample_probabilities: bool = False
    ) -> None:
        super().__init__()
        self.level_decay = level_decay
        self.upsample_probabilities = upsample_probabilities
        self.loss = DiceWeightedCELoss(probability_floor=probability_floor)

    def forward(self, output: DecoderOutput, label: Tensor) -> Tensor:
        target = Target.of(label, output.logits)
        total = self.loss.from_logits(output.logits, target)
        for level, logits in enumerate(output.auxiliary, start=1):
            total = total + self.level_decay**level * self._level(logits, label.shape[2:], target)
        return total

    def _level(self, logits: Tensor, size: Sequence[int], target: Target) -> Tensor:
        if self.upsample_probabilities:
            probabilities = upsample_logits(at_least_float32(logits).softmax(dim=1), size)
            return self.loss.from_probabilities(probabilities.flatten(2), target)
        return self.loss.from_logits(upsample_logits(at_least_float32(logits), size), target)


class TaskLoss(nn.Module):
    """The Baseline, Eq. (2): L_seg plus DiceCE of each present modality's own prediction, mean over the batch.

    Needs `SelfDistillation(..., own_predictions="all")`. After each call `terms` holds, without gradient,
    ``loss_segmentation`` [B] and ``loss_regularisation`` [B, M] (NaN where absent).

    Args:
        measure_preference: add to `terms` what :func:`measured_preference` gives of the students, which has no part in
            the loss; without, they are not looked at.
        level_decay, probability_floor, upsample_probabilities: see :class:`SegmentationLoss`.
    """

    def __init__(
        self,
        *,
        measure_preference: bool = False,
        level_decay: float = 1.0,
        probability_floor: float = 0.0,
        upsample_probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.measure_preference = measure_preference
        self.segmentation = SegmentationLoss(
            level_decay=level_decay,
            probability_floor=probability_floor,
            upsample_probabilities=upsample_probabilities,
        )
        self.terms: dict[str, Tensor] = {}

    def forward(self, output: DistillationOutput, label: Tensor) -> Tensor:
        segmentation = self.segmentation(output.fused, label)
        regularisation = modality_regularisation(self.segmentation.loss, output, label)
        self.terms = {
            "loss_segmentation": segmentation.detach(),
            "loss_regularisation": absent_as_nan(regularisation, output.own_rows),
        }
        if self.measure_preference:  # of each batch, as several processes average the same terms in the same order
            self.terms |= measured_preference(output, label)
        return (segmentation + regularisation.sum(dim=1)).mean()


def modality_regularisation(loss: DiceWeightedCELoss, output: DistillationOutput, label: Tensor) -> Tensor:
    """L_reg of Eq. (2) of every sample and modality, [B, M], 0 where there is no own prediction."""
    columns = [
        None if own is None else loss(own, select_rows((label,), rows)[0])
        for own, rows in zip(output.own_predictions, output.own_rows.unbind(dim=1), strict=True)
    ]
    return stack_columns(columns, output.own_rows, label.device)


@torch.no_grad()
def measured_preference(output: DistillationOutput, label: Tensor) -> dict[str, Tensor]:
    """``gap``, Eq. (7), and ``relative_preference``, Eq. (10), of each sample and modality, [B, M], NaN if absent."""
    _, gap = PrototypeDistillationLoss(output.fused.logits.shape[1]).of_students(output, label)
    preference = relative_preference(gap, send(output.presence, gap.device))
    return {
        "gap": absent_as_nan(gap, output.presence),
        "relative_preference": absent_as_nan(preference, output.presence),
    }


def absent_as_nan(values: Tensor, rows: Tensor) -> Tensor:
    """The values [B, M] without gradient, NaN where `rows`, bool [B, M], is False."""
    return values.detach().masked_fill(~send(rows, values.device), torch.nan)
