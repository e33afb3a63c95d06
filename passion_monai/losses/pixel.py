"""Pixel-wise self-distillation, Eq. (3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passion_monai.networks.base import DecoderOutput
from passion_monai.networks.blocks import upsample

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
        probability_floor: probabilities below it count as it: 0 as the paper writes it, 0.005 in the authors' code,
            where what is compared is then no longer a distribution.
        at_full_size: bring the probabilities of coarse levels to full size before they are compared, as the authors'
            code does; it costs a few passes over full-size tensors per student.

    Shape:
        - student, teacher: what `Backbone.decode` gives, on the same samples.
        - Output: [B].

    Raises:
        ValueError: when temperature is not positive.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        level_decay: float = 1.0,
        probability_floor: float = 0.0,
        at_full_size: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.level_decay = level_decay
        self.probability_floor = probability_floor
        self.at_full_size = at_full_size

    def forward(self, student: DecoderOutput, teacher: DecoderOutput) -> Tensor:
        full_size = tuple(student.logits.shape[2:])
        total = self._divergence(student.logits, teacher.logits, full_size)
        for level, pair in enumerate(zip(student.auxiliary, teacher.auxiliary, strict=True), start=1):
            total = total + self.level_decay**level * self._divergence(*pair, full_size)
        return total

    def _divergence(self, student: Tensor, teacher: Tensor, full_size: tuple[int, ...]) -> Tensor:
        log_student = self._log_probabilities(student, full_size)
        log_teacher = self._log_probabilities(teacher.detach(), full_size)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
        return self.temperature**2 * divergence.flatten(1).mean(dim=1)

    def _log_probabilities(self, logits: Tensor, full_size: tuple[int, ...]) -> Tensor:
        log_probabilities = (logits.float() / self.temperature).log_softmax(dim=1)
        if not (self.at_full_size or self.probability_floor):
            return log_probabilities
        probabilities = log_probabilities.exp()
        if self.at_full_size and tuple(logits.shape[2:]) != full_size:
            probabilities = upsample(probabilities, size=full_size)
        return probabilities.clamp_min(self.probability_floor or torch.finfo(probabilities.dtype).tiny).log()
