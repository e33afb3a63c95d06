"""Semantic self-distillation by class prototypes, Eqs. (4)-(8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PrototypeDistillationLoss", "class_prototypes", "prototype_similarity"]


def class_prototypes(features: Tensor, one_hot: Tensor) -> Tensor:
    """Mean feature of each class, Eq. (4): features [B, C, V], one_hot [B, K, V] -> [B, K, C], 0 for absent classes."""
    counts = one_hot.sum(dim=2, keepdim=True).clamp_min(1)
    return one_hot @ features.transpose(1, 2) / counts


def prototype_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every voxel's feature and every prototype, Eqs. (5), (6): [B, C, V], [B, K, C] -> [B, K, V]."""
    return F.normalize(prototypes, dim=2) @ F.normalize(features, dim=1)


class PrototypeDistillationLoss(nn.Module):
    """L_proto of Eq. (8) and the semantic gap D of Eq. (7).

    ``S[i, k] = cos(z[i], c_k)`` for the student and for the (detached) teacher, each with prototypes of its own;
    ``loss = mean_{i,k}(S_student - S_teacher)^2`` and ``gap = mean_{i,k}|S_student - S_teacher|``, the mean over all
    voxels and the classes that the sample's label has. The paper writes sums over voxels; means keep lambda_2
    independent of the crop size, and relative preference, a ratio, is the same.

    Args:
        num_classes: K, background included.

    Shape:
        - student, teacher: last feature maps [B, C, H, W(, D)]; label: int [B, 1, H, W(, D)].
        - Output: loss [B] and gap [B], the gap without gradient.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.arange(self.num_classes, device=label.device).view(1, -1, 1)
        one_hot = (label.flatten(2) == classes).to(torch.float32)
        difference = self._similarity(student, one_hot) - self._similarity(teacher.detach(), one_hot)
        # A class that the label lacks has no prototype: it is left out of the mean over classes.
        has_class = one_hot.any(dim=2).to(difference)
        weights = has_class / has_class.sum(dim=1, keepdim=True)
        loss = (weights * difference.square().mean(dim=2)).sum(dim=1)
        gap = (weights * difference.detach().abs().mean(dim=2)).sum(dim=1)
        return loss, gap

    @staticmethod
    def _similarity(features: Tensor, one_hot: Tensor) -> Tensor:
        flat = features.float().flatten(2)
        return prototype_similarity(flat, class_prototypes(flat, one_hot))
