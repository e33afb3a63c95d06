"""Pixel-wise self-distillation, Eq. (3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passion_monai.losses.columns import student_columns
from passion_monai.networks.base import DecoderOutput, select_rows
from passion_monai.networks.blocks import upsample_logits
from passion_monai.passes import DistillationOutput
from passion_monai.precision import at_least_float32

__all__ = ["PixelDistillationLoss"]


class PixelDistillationLoss(nn.Module):
    """L_pixel of Eq. (3): the student's softened prediction follows the teacher's at every level.

    ``sum_l level_decay^l * mean_i KL(softmax(teacher^l / temperature) || softmax(student^l / temperature))``, the sum
    over classes inside KL, the teacher detached. Levels are compared at their own resolution.

    Args:
        temperature: tau, 4 in the paper.
        temperature_squared: multiply by temperature^2, which keeps the size of the gradients at any temperature
            (G. Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531). The authors' code
            does, Eq. (3) as it is printed does not.
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
        temperature_squared: bool = False,
        level_decay: float = 1.0,
        probability_floor: float = 0.0,
        at_full_size: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.factor = temperature**2 if temperature_squared else 1.0
        self.level_decay = level_decay
        self.probability_floor = probability_floor
        self.at_full_size = at_full_size

    def forward(self, student: DecoderOutput, teacher: DecoderOutput) -> Tensor:
        return self.to_targets(student, self.targets(teacher))

    def targets(self, teacher: DecoderOutput) -> tuple[tuple[Tensor, ...], ...]:
        """What all students of a teacher have in common, without gradient.

        Of every level p, [B, K, V], and mean_i(sum_k(p log p)), [B].
        """
        with torch.no_grad():
            return tuple(
                (log_p.exp(), (log_p.exp() * log_p).sum(dim=1).mean(dim=1))
                for log_p in self._log_probabilities(teacher)
            )

    def of_students(self, output: DistillationOutput) -> Tensor:
        """The loss of all students of a training step, [B, M], 0 where there is none."""
        targets = self.targets(output.fused) if any(output.students) else ()

        def loss(student: DecoderOutput, rows: Tensor) -> tuple[Tensor]:
            return (self.to_targets(student, tuple(select_rows(level, rows) for level in targets)),)

        (columns,) = student_columns(loss, output, parts=1)
        return columns

    def to_targets(self, student: DecoderOutput, targets: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        """The loss of a student, [B], from what :meth:`targets` gives for the same samples."""
        levels = zip(self._log_probabilities(student), targets, strict=True)
        divergences = [entropy - (p * log_q).sum(dim=1).mean(dim=1) for log_q, (p, entropy) in levels]
        weighted = [self.level_decay**level * divergence for level, divergence in enumerate(divergences)]
        return self.factor * torch.stack(weighted).sum(dim=0)

    def _log_probabilities(self, output: DecoderOutput) -> list[Tensor]:
        """Softened log-probabilities of every level, [B, K, V]."""
        size = output.logits.shape[2:]
        return [self._level(logits, size).flatten(2) for logits in (output.logits, *output.auxiliary)]

    def _level(self, logits: Tensor, full_size: Sequence[int]) -> Tensor:
        softened = at_least_float32(logits) / self.temperature
        if not (self.at_full_size or self.probability_floor):
            return softened.log_softmax(dim=1)
        probabilities = softened.softmax(dim=1)
        if self.at_full_size and logits.shape[2:] != full_size:
            probabilities = upsample_logits(probabilities, full_size)
        return probabilities.clamp_min(self.probability_floor or torch.finfo(probabilities.dtype).tiny).log()
