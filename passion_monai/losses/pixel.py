"""Pixel-wise self-distillation, Eq. (3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from passion_monai.networks.base import DecoderOutput

__all__ = ["PixelDistillationLoss"]


class PixelDistillationLoss(nn.Module):
    """L_pixel of Eq. (3): the student's softened prediction follows the teacher's at every level.

    ``sum_l level_decay^l * temperature^2 * mean_i KL(softmax(teacher^l / temperature) || softmax(student^l /
    temperature))``, the sum over classes inside KL, the teacher detached. Levels are compared at their own resolution.
    The factor temperature^2, usual in distillation and left unsaid by the paper, keeps gradients comparable.

    Args:
        temperature: tau, 4 in the paper.
        level_decay: weight of level l is `level_decay` to the power l: 1 as the paper writes it, 0.5 in the authors'
            code.

    Shape:
        - student, teacher: what `Backbone.decode` gives, on the same samples.
        - Output: [B].

    Raises:
        ValueError: when temperature is not positive.
    """

    def __init__(self, *, temperature: float = 4.0, level_decay: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.level_decay = level_decay

    def forward(self, student: DecoderOutput, teacher: DecoderOutput) -> Tensor:
        total = self._divergence(student.logits, teacher.logits)
        for level, pair in enumerate(zip(student.auxiliary, teacher.auxiliary, strict=True), start=1):
            total = total + self.level_decay**level * self._divergence(*pair)
        return total

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student.float() / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher.detach().float() / self.temperature, dim=1)
        divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
        return self.temperature**2 * divergence.flatten(1).mean(dim=1)
