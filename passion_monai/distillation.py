"""Multi-uni self-distillation around any backbone (PASSION, ACM MM 2024, Sec. 3.2): which passes a training step runs.

In the words of the paper and the authors' code: the fused prediction of all available modalities is the teacher; the
same decoder given one modality alone is that modality's student; a modality's own prediction by the shared decoder
("sep") regularises the Baseline.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passion_monai.networks.base import Backbone, DecoderOutput, Features, select_rows

__all__ = ["DistillationOutput", "SelfDistillation"]


class DistillationOutput(NamedTuple):
    """The passes of one training step.

    Attributes:
        presence: bool [B, M].
        fused: the teacher, from all modalities that a sample has.
        students: M outputs of the same decoder given one modality alone, each on the samples that `student_rows`
            selects; None where there is no such sample or students were not asked for.
        own_predictions: M logits by the shared decoder, each on the samples that have the modality; None where no
            sample has it or they were not asked for.
    """

    presence: Tensor
    fused: DecoderOutput
    students: tuple[DecoderOutput | None, ...]
    own_predictions: tuple[Tensor | None, ...]

    @property
    def student_rows(self) -> Tensor:
        """Samples that have a student of each modality, bool [B, M].

        A sample with one modality has none: its student is the teacher itself, so that its distillation losses and
        its gap are exactly 0, with dropout too.
        """
        return self.presence & (self.presence.sum(dim=1, keepdim=True) > 1)


class SelfDistillation(nn.Module):
    """Runs a backbone's passes for a training step, from one encoding of the image.

    Args:
        backbone: the network that is trained; it is all that is needed afterwards.
        students: whether to run one pass per present modality alone (PASSION).
        own_predictions: whether to run the shared decoder on each present modality (Baseline).

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M].
        - Output: :class:`DistillationOutput`.
    """

    def __init__(self, backbone: Backbone, *, students: bool = True, own_predictions: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.students = students
        self.own_predictions = own_predictions

    def forward(self, image: Tensor, presence: Tensor) -> DistillationOutput:
        features = self.backbone.encode(image, presence)
        fused = self.backbone.decode(features, presence)
        none: tuple[None, ...] = (None,) * self.backbone.num_modalities
        output = DistillationOutput(presence, fused, none, none)
        if self.students:
            output = output._replace(students=self._run_students(features, output.student_rows))
        if self.own_predictions:
            output = output._replace(own_predictions=self._run_own_predictions(features, presence))
        return output

    def _run_students(self, features: Features, rows: Tensor) -> tuple[DecoderOutput | None, ...]:
        modalities = torch.arange(rows.shape[1], device=rows.device)
        one_hot = F.one_hot(modalities).bool()
        return tuple(
            self.backbone.decode(select_rows(features, rows[:, m]), one_hot[m : m + 1]) if rows[:, m].any() else None
            for m in range(rows.shape[1])
        )

    def _run_own_predictions(self, features: Features, presence: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            self.backbone.decode_modality(select_rows(features, presence[:, m]), m) if presence[:, m].any() else None
            for m in range(presence.shape[1])
        )
