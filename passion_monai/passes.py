"""What the passes of a training step put out: below the losses, which read it, and below what runs the passes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from passion_monai.networks.base import DecoderOutput

__all__ = ["DistillationOutput"]


class DistillationOutput(NamedTuple):
    """The passes of one training step.

    Attributes:
        presence: bool [B, M], in the CPU's memory, since it decides what is computed.
        fused: the teacher, from all modalities that a sample has.
        students: M outputs of the same decoder given one modality alone, each on the samples that `student_rows`
            selects; None where there is no such sample or students were not asked for.
        own_predictions: M logits by the shared decoder, each on the samples that `own_rows` selects; None where there
            is no such sample.
        own_rows: samples that have an own prediction of each modality, bool [B, M], in the CPU's memory.
    """

    presence: Tensor
    fused: DecoderOutput
    students: tuple[DecoderOutput | None, ...]
    own_predictions: tuple[Tensor | None, ...]
    own_rows: Tensor

    @property
    def student_rows(self) -> Tensor:
        """Samples that have a student of each modality, bool [B, M].

        A sample with one modality has none: its student is the teacher itself, so that its distillation losses and
        its gap are exactly 0, with dropout too.
        """
        return self.presence & (self.presence.sum(dim=1, keepdim=True) > 1)
