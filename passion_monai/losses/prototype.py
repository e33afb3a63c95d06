"""Semantic self-distillation by class prototypes, Eqs. (4)-(8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passion_monai.losses.columns import student_columns
from passion_monai.networks.base import select_rows
from passion_monai.passes import DistillationOutput
from passion_monai.precision import at_least_float32

EPS = 1e-5
"""Least norm of a feature and of a prototype, as in the authors' code; a cosine's gradient is at most its inverse."""

__all__ = [
    "PrototypeDistillationLoss",
    "class_prototypes",
    "flat_features",
    "one_hot_label",
    "prototype_similarity",
]


def class_prototypes(features: Tensor, one_hot: Tensor) -> Tensor:
    """Mean feature of each class, Eq. (4): features [B, V, C], one_hot [B, K, V] -> [B, K, C], 0 for absent classes."""
    return one_hot @ features / one_hot.sum(dim=2, keepdim=True).clamp_min(1)


def prototype_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every voxel's feature and every prototype, Eqs. (5), (6): [B, V, C], [B, K, C] -> [B, V, K].

    The products come first and are divided by the features' norms afterwards: nothing but them is as large as features.
    """
    products = features @ F.normalize(prototypes, dim=2, eps=EPS).mT
    return products / torch.linalg.vector_norm(features, dim=2, keepdim=True).clamp_min(EPS)


def one_hot_label(label: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """A label, int [B, 1, H, W(, D)], as [B, K, V], float32 at least."""
    classes = torch.arange(num_classes, device=label.device).view(1, -1, 1)
    return (label.flatten(2) == classes).to(torch.promote_types(dtype, torch.float32))


def flat_features(features: Tensor) -> Tensor:
    """Feature maps [B, C, H, W(, D)] as [B, V, C], float32 at least."""
    return at_least_float32(features).movedim(1, -1).flatten(1, -2)


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
        return self.to_targets(student, self.targets(teacher, label))

    def targets(self, teacher: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """What the students of a teacher have in common: similarity S, [B, V, K], and label as one-hot, [B, K, V]."""
        one_hot = one_hot_label(label, self.num_classes, teacher.dtype)
        with torch.no_grad():
            return self._similarity(teacher, one_hot), one_hot

    def of_students(self, output: DistillationOutput, label: Tensor) -> tuple[Tensor, ...]:
        """Loss and gap of all students of a training step, both [B, M], 0 where there is none."""
        targets = self.targets(output.fused.features, label) if any(output.students) else ()
        return student_columns(
            lambda student, rows: self.to_targets(student.features, select_rows(targets, rows)), output, parts=2
        )

    def to_targets(self, student: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss and the gap of a student, from what :meth:`targets` gives for the same samples."""
        similarity, one_hot = targets
        difference = self._similarity(student, one_hot) - similarity
        # A class that the label lacks has no prototype: it is left out of the mean over classes.
        has_class = one_hot.any(dim=2).to(difference)
        weights = has_class / has_class.sum(dim=1, keepdim=True)
        loss = (weights * difference.square().mean(dim=1)).sum(dim=1)
        gap = (weights * difference.detach().abs().mean(dim=1)).sum(dim=1)
        return loss, gap

    @staticmethod
    def _similarity(features: Tensor, one_hot: Tensor) -> Tensor:
        flat = flat_features(features)
        return prototype_similarity(flat, class_prototypes(flat, one_hot))
