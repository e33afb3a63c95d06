"""A training step that computes everything and multiplies by presence, as the authors' code does, to compare with.

Every encoder runs on every sample, every student passes through the fusion of all modalities, and so do the losses. The
result is that of the step which leaves out what is absent.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

from passion_monai.devices import send
from passion_monai.losses import PassionLoss
from passion_monai.losses.segmentation import modality_regularisation
from passion_monai.networks import Backbone
from passion_monai.passes import DistillationOutput
from passion_monai.precision import autocast
from passion_monai.preference import relative_preference, task_mask

__all__ = ["DenseStep"]


class DenseStep(nn.Module):
    """The loss of a step, with all passes of a training by :class:`passion_monai.losses.PassionLoss`.

    Args:
        backbone: the network.
        loss: the objective.
        precision: that of the passes.

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M], label int [B, 1, H, W(, D)].
        - Output: a scalar.
    """

    def __init__(self, backbone: Backbone, loss: PassionLoss, *, precision: str = "float32") -> None:
        super().__init__()
        self.backbone = backbone
        self.loss = loss
        self.precision = precision

    def forward(self, image: Tensor, presence: Tensor, label: Tensor) -> Tensor:
        # A network that is exported computes everything; all but its masks stays as it is.
        with mock.patch("passion_monai.networks.base.is_exporting", return_value=True):
            return self._loss(self._passes(image, presence), presence, label)

    def _passes(self, image: Tensor, presence: Tensor) -> DistillationOutput:
        everywhere = torch.ones_like(presence)
        alone = torch.eye(presence.shape[1], dtype=torch.bool)
        with autocast(image.device, self.precision):
            features = self.backbone.encode(image, presence)
            fused = self.backbone.decode(features, presence)
            students = tuple(self.backbone.decode(features, row[None]) for row in alone)
            own: tuple[Tensor | None, ...] = (None,) * len(alone)
            if self.loss.lambda_regularisation:
                own = tuple(self.backbone.decode_modality(maps) for maps in features if maps is not None)
        return DistillationOutput(everywhere, fused, students, own, everywhere)

    def _loss(self, output: DistillationOutput, presence: Tensor, label: Tensor) -> Tensor:
        """Eq. (14) with everything there, times what is."""
        loss = self.loss
        present = send(presence, label.device)
        compared = send(presence & (presence.sum(dim=1, keepdim=True) > 1), label.device)
        pixel, (prototype, gap) = loss.pixel.of_students(output), loss.prototype.of_students(output, label)
        delta = task_mask(relative_preference(gap, present))
        total = compared * (loss.lambda_pixel * loss.beta * pixel + loss.lambda_prototype * delta * prototype)
        if loss.lambda_regularisation:
            regularisation = modality_regularisation(loss.segmentation.loss, output, label)
            total = total + present * loss.lambda_regularisation * delta * loss.beta * regularisation
        weighted = (loss.modality_weights * total).sum(dim=1)
        result: Tensor = (loss.segmentation(output.fused, label) + weighted).mean()
        return result
