"""The task loss, Eqs. (1) and (2): deep supervision of the fused prediction, regularisation of each modality."""

from __future__ import annotations

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn

from passion_monai.distillation import DistillationOutput
from passion_monai.networks.base import DecoderOutput
from passion_monai.networks.blocks import upsample

__all__ = ["DiceWeightedCELoss", "SegmentationLoss", "TaskLoss"]


def class_weights(label: Tensor, num_classes: int) -> Tensor:
    """Cross-entropy weight of each class, ``1 - |{y = k}| / |y|`` per sample: label int [B, 1, ...] -> [B, K]."""
    counts = torch.stack([(label == k).flatten(1).sum(dim=1) for k in range(num_classes)], dim=1)
    return 1 - counts / label[0].numel()


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
        # Only the denominator is smoothed: a class that is neither there nor predicted counts as a miss, as in the
        # reference implementation, and every voxel wrongly given to it still costs.
        self.dice = DiceLoss(to_onehot_y=True, smooth_nr=0.0, smooth_dr=1e-7, reduction="none")

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        logits = logits.float()
        if self.probability_floor:
            return self.from_probabilities(logits.softmax(dim=1), label)
        return self._dice(logits.softmax(dim=1), label) + self._cross_entropy(logits.log_softmax(dim=1), label)

    def from_probabilities(self, probabilities: Tensor, label: Tensor) -> Tensor:
        """The same for probabilities [B, K, H, W(, D)], float32, instead of logits."""
        floor = self.probability_floor or torch.finfo(probabilities.dtype).tiny
        log_probabilities = probabilities.clamp_min(floor).log()
        return self._dice(probabilities, label) + self._cross_entropy(log_probabilities, label)

    def _dice(self, probabilities: Tensor, label: Tensor) -> Tensor:
        return self.dice(probabilities, label).flatten(1).mean(dim=1)

    @staticmethod
    def _cross_entropy(log_probabilities: Tensor, label: Tensor) -> Tensor:
        target = label.long()
        weights = class_weights(label, log_probabilities.shape[1]).to(log_probabilities)
        voxel_weights = weights.gather(1, target.flatten(1))
        return -(voxel_weights * log_probabilities.gather(1, target).flatten(1)).mean(dim=1)


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
        total = self.loss(output.logits, label)
        for level, logits in enumerate(output.auxiliary, start=1):
            total = total + self.level_decay**level * self._level(logits, label)
        return total

    def _level(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.upsample_probabilities:
            return self.loss.from_probabilities(upsample(logits.float().softmax(dim=1), size=label.shape[2:]), label)
        return self.loss(upsample(logits, size=label.shape[2:]), label)


class TaskLoss(nn.Module):
    """The Baseline, Eq. (2): L_seg plus DiceCE of each present modality's own prediction, mean over the batch.

    Needs `SelfDistillation(..., own_predictions=True)`. After each call `terms` holds, without gradient,
    ``loss_segmentation`` [B] and ``loss_regularisation`` [B, M] (NaN where absent).

    Args:
        level_decay, probability_floor, upsample_probabilities: see :class:`SegmentationLoss`.
    """

    def __init__(
        self, *, level_decay: float = 1.0, probability_floor: float = 0.0, upsample_probabilities: bool = False
    ) -> None:
        super().__init__()
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
            "loss_regularisation": regularisation.detach().masked_fill(~output.presence, torch.nan),
        }
        return (segmentation + regularisation.sum(dim=1)).mean()


def modality_regularisation(loss: DiceWeightedCELoss, output: DistillationOutput, label: Tensor) -> Tensor:
    """L_reg of Eq. (2) of every sample and modality, [B, M], 0 where there is no own prediction."""
    regularisation = torch.zeros(output.presence.shape, device=label.device, dtype=torch.float32)
    for modality, own in enumerate(output.own_predictions):
        if own is not None:
            rows = output.presence[:, modality]
            regularisation[rows, modality] = loss(own, label[rows])
    return regularisation
