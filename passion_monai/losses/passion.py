"""The objective of PASSION, Eq. (14)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passion_monai.distillation import DistillationOutput
from passion_monai.losses.pixel import PixelDistillationLoss
from passion_monai.losses.prototype import PrototypeDistillationLoss
from passion_monai.losses.segmentation import SegmentationLoss
from passion_monai.networks.base import DecoderOutput
from passion_monai.preference import relative_preference, task_mask

__all__ = ["PassionLoss"]


class PassionLoss(nn.Module):
    """Preference-aware self-distillation, Eq. (14) of https://doi.org/10.1145/3664647.3681543.

    ``loss = L_seg + sum_{m present}(lambda_pixel * beta_m * L_pixel^m + lambda_prototype * delta^m * L_proto^m)``,
    mean over the batch's samples. beta is part of the state dict; :class:`passion_monai.handlers.PreferenceHandler`
    updates it each epoch. The rows of the paper's Table 2 are argument values: a component is switched off by its
    lambda = 0, delta by `use_task_mask=False`, and "no beta" is `initial_beta=None` without the handler's updates.

    After each call `terms` holds, without gradient, ``loss_segmentation`` [B] and, [B, M] and NaN where absent,
    ``loss_pixel``, ``loss_prototype``, ``gap`` (D of Eq. 7) and ``relative_preference`` (Eq. 10).

    Args:
        num_modalities: M.
        num_classes: K, background included.
        initial_beta: M positive starting values, N / N_m in the paper; 1 for every modality if None.
        lambda_pixel: weight of pixel-wise self-distillation (lambda_1, 0.5 in the paper).
        lambda_prototype: weight of semantic self-distillation (lambda_2, 0.1 in the paper).
        temperature: tau of Eq. (3), 4 in the paper.
        use_task_mask: whether only neglected modalities get L_proto (delta, Eq. 11).
        level_decay: weight of level l is `level_decay` to the power l, in L_seg and in L_pixel.

    Raises:
        ValueError: when initial_beta does not hold one positive value per modality.
    """

    beta: Tensor

    def __init__(
        self,
        num_modalities: int,
        num_classes: int,
        *,
        initial_beta: Sequence[float] | Tensor | None = None,
        lambda_pixel: float = 0.5,
        lambda_prototype: float = 0.1,
        temperature: float = 4.0,
        use_task_mask: bool = True,
        level_decay: float = 1.0,
    ) -> None:
        super().__init__()
        ones = torch.ones(num_modalities)
        beta = ones if initial_beta is None else torch.as_tensor(initial_beta, dtype=torch.float32).clone()
        if beta.shape != (num_modalities,) or not bool((beta > 0).all()):
            raise ValueError(f"initial_beta must be {num_modalities} positive values, got {initial_beta}.")
        self.register_buffer("beta", beta)
        self.lambda_pixel = lambda_pixel
        self.lambda_prototype = lambda_prototype
        self.use_task_mask = use_task_mask
        self.segmentation = SegmentationLoss(level_decay=level_decay)
        self.pixel = PixelDistillationLoss(temperature=temperature, level_decay=level_decay)
        self.prototype = PrototypeDistillationLoss(num_classes)
        self.terms: dict[str, Tensor] = {}

    def forward(self, output: DistillationOutput, label: Tensor) -> Tensor:
        """Loss, a scalar, from the passes of `SelfDistillation` and the label, int [B, 1, H, W(, D)]."""
        segmentation = self.segmentation(output.fused, label)
        pixel, prototype, gap = self._distillation(output, label)
        preference = relative_preference(gap, output.presence)
        delta = task_mask(preference) if self.use_task_mask else output.presence.to(prototype)
        beta = self.beta.to(segmentation.device)
        distillation = self.lambda_pixel * beta * pixel + self.lambda_prototype * delta * prototype
        per_modality = {"loss_pixel": pixel, "loss_prototype": prototype, "gap": gap, "relative_preference": preference}
        self.terms = {"loss_segmentation": segmentation.detach()} | {
            name: value.detach().masked_fill(~output.presence, torch.nan) for name, value in per_modality.items()
        }
        return (segmentation + distillation.sum(dim=1)).mean()

    def _distillation(self, output: DistillationOutput, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_pixel, L_proto and D of every sample and modality, each [B, M], 0 where there is no student."""
        pixel, prototype, gap = (
            torch.zeros(output.presence.shape, device=label.device, dtype=torch.float32) for _ in range(3)
        )
        for modality, student in enumerate(output.students):
            if student is None:
                continue
            rows = output.student_rows[:, modality]
            teacher = _select(output.fused, rows)
            pixel[rows, modality] = self.pixel(student, teacher)
            prototype[rows, modality], gap[rows, modality] = self.prototype(
                student.features, teacher.features, label[rows]
            )
        return pixel, prototype, gap


def _select(output: DecoderOutput, rows: Tensor) -> DecoderOutput:
    """A decoder's output for some samples of the batch; nothing is copied where all are selected."""
    if bool(rows.all()):
        return output
    return DecoderOutput(output.logits[rows], tuple(logits[rows] for logits in output.auxiliary), output.features[rows])
