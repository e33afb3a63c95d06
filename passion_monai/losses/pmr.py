"""Prototypical modality rebalance (PMR), a method that PASSION is compared with, on segmentation.

Source: Y. Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023,
https://arxiv.org/abs/2211.07089. It classifies images; PASSION's authors have not published how they brought it to
segmentation, so the rule here is this project's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passion_monai.devices import send
from passion_monai.losses.columns import student_columns
from passion_monai.losses.prototype import class_prototypes, flat_features, one_hot_label
from passion_monai.losses.segmentation import TaskLoss, absent_as_nan
from passion_monai.networks.base import DecoderOutput, select_rows
from passion_monai.passes import DistillationOutput

__all__ = ["PMRLoss"]


class PMRLoss(nn.Module):
    """The Baseline, and a distance-based cross-entropy (DCE) that speeds up the slow modalities.

    For modality m alone, whose last feature at voxel i is z_i, and the mean feature c_k of class k in the same sample,
    ``p[i, k] = softmax_k(-|z_i - c_k|)``. With averages over the voxels of each class first, then over the classes that
    the label has, so that the background counts as one class,

        ``score_m = mean_k mean_{i: y_i = k} p[i, k]``,  ``dce_m = mean_k mean_{i: y_i = k} -log p[i, k]``,
        ``slow_m = 1 where score_m < mean of score over the present modalities, else 0``,
        ``loss = L_task + lambda_dce * sum_m(slow_m * dce_m)``.

    Prototypes carry no gradient. A sample with one modality has nothing to be compared with, and no DCE. Needs
    `SelfDistillation(..., students="trained", own_predictions="all")`. After each call `terms` holds what
    :class:`passion_monai.losses.TaskLoss` gives, and ``loss_dce`` and ``prototype_score``, [B, M], NaN where absent.

    Args:
        num_classes: K, background included.
        lambda_dce: weight of the DCE.
        level_decay: see :class:`passion_monai.losses.SegmentationLoss`.
    """

    def __init__(self, num_classes: int, *, lambda_dce: float = 1.0, level_decay: float = 1.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.lambda_dce = lambda_dce
        self.task = TaskLoss(measure_preference=True, level_decay=level_decay)
        self.terms: dict[str, Tensor] = {}

    def forward(self, output: DistillationOutput, label: Tensor) -> Tensor:
        """Loss, a scalar, from the passes of `SelfDistillation` and the label, int [B, 1, H, W(, D)]."""
        one_hot = one_hot_label(label, self.num_classes, output.fused.features.dtype)

        def compare(student: DecoderOutput, rows: Tensor) -> tuple[Tensor, Tensor]:
            return prototype_scores(student.features, *select_rows((one_hot,), rows))

        score, dce = student_columns(compare, output, parts=2)
        rows = send(output.student_rows, label.device)
        mean_score = score.sum(dim=1, keepdim=True) / rows.sum(dim=1, keepdim=True).clamp_min(1)
        slow = rows & (score < mean_score)
        loss = self.task(output, label) + self.lambda_dce * (slow * dce).sum(dim=1).mean()
        self.terms = self.task.terms | {
            "loss_dce": absent_as_nan(dce, output.student_rows),
            "prototype_score": absent_as_nan(score, output.student_rows),
        }
        return loss


def prototype_scores(features: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Score and DCE of :class:`PMRLoss`, each [B]: features [B, C, H, W(, D)], one_hot [B, K, V], float."""
    flat = flat_features(features)
    prototypes = class_prototypes(flat, one_hot).detach()
    # Not by way of squares and products, which lose what is near zero.
    distances = torch.cdist(flat, prototypes, compute_mode="donot_use_mm_for_euclid_dist")  # [B, V, K]
    has_class = one_hot.any(dim=2)
    log_p = (-distances).masked_fill(~has_class[:, None], -torch.inf).log_softmax(dim=2)
    log_own = log_p.gather(2, one_hot.argmax(dim=1)[:, :, None])  # [B, V, 1]
    counts = one_hot.sum(dim=2)
    score, dce = (
        ((one_hot @ values)[:, :, 0] / counts.clamp_min(1)).sum(dim=1) / has_class.sum(dim=1)
        for values in (log_own.detach().exp(), -log_own)
    )
    return score, dce
