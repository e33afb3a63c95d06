"""The objective of PASSION, Eq. (14)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passion_monai.devices import send
from passion_monai.losses.pixel import PixelDistillationLoss
from passion_monai.losses.prototype import PrototypeDistillationLoss
from passion_monai.losses.segmentation import SegmentationLoss, absent_as_nan, modality_regularisation
from passion_monai.passes import DistillationOutput
from passion_monai.preference import relative_preference, task_mask

__all__ = ["PassionLoss"]


class PassionLoss(nn.Module):
    """Preference-aware self-distillation, Eq. (14) of https://doi.org/10.1145/3664647.3681543.

    ``loss = L_seg + sum_{m present} weight_m * (lambda_pixel * beta_m * L_pixel^m + lambda_prototype * delta^m *
    L_proto^m + lambda_regularisation * delta^m * beta_m * L_reg^m)``, mean over the batch's samples. beta is part of
    the state dict; :class:`passion_monai.handlers.PreferenceHandler` updates it each epoch. The rows of the paper's
    Table 2 are argument values: a component is switched off by its lambda = 0, delta by `use_task_mask=False`, and "no
    beta" is `initial_beta=None` without the handler's updates.

    The defaults are the paper's equations, where weight_m = 1, beta starts at N / N_m and there is no L_reg.
    :meth:`released` gives the objective of the authors' code.

    After each call `terms` holds, without gradient, ``loss_segmentation`` [B] and, [B, M] and NaN where absent,
    ``loss_pixel``, ``loss_prototype``, ``gap`` (D of Eq. 7), ``relative_preference`` (Eq. 10) and, where it counts,
    ``loss_regularisation``.

    Args:
        num_modalities: number M of modalities.
        num_classes: K, background included.
        initial_beta: M positive starting values, N / N_m in the paper; 1 for every modality if None.
        lambda_pixel: weight of pixel-wise self-distillation (lambda_1, 0.5 in the paper).
        lambda_prototype: weight of semantic self-distillation (lambda_2, 0.1 in the paper).
        temperature: tau of Eq. (3), 4 in the paper.
        temperature_squared: multiply L_pixel by temperature^2, see :class:`PixelDistillationLoss`.
        lambda_regularisation: weight of L_reg (Eq. 2); needs the own predictions of at least the neglected modalities,
            see :class:`passion_monai.distillation.SelfDistillation`.
        modality_weights: M positive factors; 1 for every modality if None.
        use_task_mask: whether only neglected modalities get L_proto (and L_reg): delta, Eq. (11).
        level_decay: weight of level l is `level_decay` to the power l, in L_seg and in L_pixel.
        probability_floor: see :class:`DiceWeightedCELoss` and :class:`PixelDistillationLoss`.
        compare_at_full_size: bring probabilities of coarse levels to full size in L_seg and L_pixel, instead of logits
            in L_seg and nothing in L_pixel.

    Raises:
        ValueError: when initial_beta or modality_weights do not hold one positive value per modality.
    """

    beta: Tensor
    modality_weights: Tensor

    def __init__(  # noqa: PLR0913 (each is one choice between the paper and the authors' code)
        self,
        num_modalities: int,
        num_classes: int,
        *,
        initial_beta: Sequence[float] | Tensor | None = None,
        lambda_pixel: float = 0.5,
        lambda_prototype: float = 0.1,
        temperature: float = 4.0,
        temperature_squared: bool = False,
        lambda_regularisation: float = 0.0,
        modality_weights: Sequence[float] | Tensor | None = None,
        use_task_mask: bool = True,
        level_decay: float = 1.0,
        probability_floor: float = 0.0,
        compare_at_full_size: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("beta", _per_modality("initial_beta", initial_beta, num_modalities))
        # Known from the training set, not learned: no part of the state.
        weights = _per_modality("modality_weights", modality_weights, num_modalities)
        self.register_buffer("modality_weights", weights, persistent=False)
        self.lambda_pixel = lambda_pixel
        self.lambda_prototype = lambda_prototype
        self.lambda_regularisation = lambda_regularisation
        self.use_task_mask = use_task_mask
        self.segmentation = SegmentationLoss(
            level_decay=level_decay,
            probability_floor=probability_floor,
            upsample_probabilities=compare_at_full_size,
        )
        self.pixel = PixelDistillationLoss(
            temperature=temperature,
            temperature_squared=temperature_squared,
            level_decay=level_decay,
            probability_floor=probability_floor,
            at_full_size=compare_at_full_size,
        )
        self.prototype = PrototypeDistillationLoss(num_classes)
        self.terms: dict[str, Tensor] = {}

    @classmethod
    def released(
        cls, num_modalities: int, num_classes: int, *, availability: Sequence[float] | Tensor, distil: bool = True
    ) -> PassionLoss:
        """The objective of the authors' code. It differs from the paper's, the default, in the following.

        - Own predictions: delta * beta * L_reg is added, which costs one pass of the shared decoder per neglected
          modality.
        - Availability N / N_m is a constant factor of all terms of a modality, and beta starts at 1; in the paper it is
          where beta starts.
        - Level l has weight 2^-l instead of 1.
        - Coarse levels: probabilities are brought to full size in L_seg and in L_pixel, which costs memory and time for
          every student; in the paper logits are in L_seg, and L_pixel compares levels at their own size.
        - Small probabilities count as 0.005 in the cross-entropy and in L_pixel.
        - L_pixel is multiplied by temperature^2 and is a mean over classes: lambda_pixel is 0.5 / K here.
        - beta is updated by :meth:`passion_monai.handlers.PreferenceHandler.released`.

        Differs from the reference: a sample with one modality runs no student, see
        :class:`passion_monai.passes.DistillationOutput`; with dropout theirs differs from its teacher by noise.

        Args:
            num_modalities: number M of modalities.
            num_classes: K, background included.
            availability: N / N_m of each modality, see :func:`passion_monai.preference.initial_beta`.
            distil: False leaves L_pixel and L_proto out. What remains is a Baseline whose L_reg is re-weighted in the
                same way, a control: it tells that effect from the distillation's. Students are then only measured.
        """
        return cls(
            num_modalities,
            num_classes,
            lambda_pixel=0.5 / num_classes if distil else 0.0,
            lambda_prototype=0.1 if distil else 0.0,
            temperature_squared=True,
            lambda_regularisation=1.0,
            modality_weights=availability,
            level_decay=0.5,
            probability_floor=0.005,
            compare_at_full_size=True,
        )

    def forward(self, output: DistillationOutput, label: Tensor) -> Tensor:
        """Loss, a scalar, from the passes of `SelfDistillation` and the label, int [B, 1, H, W(, D)]."""
        segmentation = self.segmentation(output.fused, label)
        presence = send(output.presence, label.device)
        pixel, (prototype, gap) = self.pixel.of_students(output), self.prototype.of_students(output, label)
        preference = relative_preference(gap, presence)
        delta = task_mask(preference) if self.use_task_mask else presence.to(prototype)
        beta = send(self.beta, segmentation.device)
        distillation = self.lambda_pixel * beta * pixel + self.lambda_prototype * delta * prototype
        per_modality = {"loss_pixel": pixel, "loss_prototype": prototype, "gap": gap, "relative_preference": preference}
        self.terms = {"loss_segmentation": segmentation.detach()} | {
            name: absent_as_nan(value, presence) for name, value in per_modality.items()
        }
        if self.lambda_regularisation:
            regularisation = modality_regularisation(self.segmentation.loss, output, label)
            distillation = distillation + self.lambda_regularisation * delta * beta * regularisation
            self.terms["loss_regularisation"] = absent_as_nan(regularisation, output.own_rows)
        return (segmentation + (send(self.modality_weights, beta.device) * distillation).sum(dim=1)).mean()


def _per_modality(name: str, values: Sequence[float] | Tensor | None, num_modalities: int) -> Tensor:
    """One positive value per modality, 1 by default."""
    if values is None:
        return torch.ones(num_modalities)
    tensor = torch.as_tensor(values, dtype=torch.float32).clone()
    if tensor.shape != (num_modalities,) or not bool((tensor > 0).all()):
        raise ValueError(f"{name} must be {num_modalities} positive values, got {values}.")
    return tensor
