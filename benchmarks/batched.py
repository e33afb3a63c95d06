"""A training step whose teacher and students are one call of the decoder, to compare with one call for each of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_monai.devices import send
from passion_monai.distillation import DistillationOutput, SelfDistillation
from passion_monai.networks.base import DecoderOutput, Features
from passion_monai.precision import at_least_float32, autocast

__all__ = ["BatchedDistillation"]


class BatchedDistillation(SelfDistillation):
    """The passes of the paper's objective, by fewer and larger kernels, with more to compute.

    The decoder's batch has the samples, each with what it has, and then their students, each with one modality. Where a
    row lacks a modality that another one has, its maps are zeros that are computed with.

    Raises:
        ValueError: when other passes than those of the paper's objective are asked for.
    """

    def forward(self, image: Tensor, presence: Tensor, label: Tensor | None = None) -> DistillationOutput:
        if (self.students, self.own_predictions) != ("trained", "none"):
            raise ValueError("The batched form is of the paper's objective only.")
        presence = presence.cpu()
        samples, given, counts = decoder_rows(presence)
        with autocast(image.device, self.precision):
            features = repeat_rows(self._run(self.backbone.encode, image, presence), samples)
            decoded = self._run(self.backbone.decode, features, given)
        fused, *students = split_rows(decoded, counts)
        none = (None,) * len(students)
        passes = tuple(student if count else None for student, count in zip(students, counts[1:], strict=True))
        return DistillationOutput(presence, fused, passes, none, torch.zeros_like(presence))


def decoder_rows(presence: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Of each row of the decoder's batch the sample and the modalities; then how many rows each pass has.

    The first pass is the teacher's, the others are those of each modality's students. As in
    :class:`passion_monai.passes.DistillationOutput`, a sample with one modality has none.
    """
    with_student = presence & (presence.sum(dim=1, keepdim=True) > 1)
    modalities, samples = with_student.mT.nonzero(as_tuple=True)
    given = torch.cat([presence, F.one_hot(modalities, presence.shape[1]).bool()])
    return torch.cat([torch.arange(len(presence)), samples]), given, [len(presence), *with_student.sum(dim=0).tolist()]


def repeat_rows(features: Features, samples: Tensor) -> Features:
    """The maps of some samples, of which there may be several of one."""
    return tuple(
        None if maps is None else tuple(map_.index_select(0, send(samples, map_.device)) for map_ in maps)
        for maps in features
    )


def split_rows(decoded: DecoderOutput, counts: list[int]) -> list[DecoderOutput]:
    """What each pass put out, float32 at least, for the losses."""
    logits, features = (at_least_float32(map_).split(counts) for map_ in (decoded.logits, decoded.features))
    auxiliary = zip(*[at_least_float32(map_).split(counts) for map_ in decoded.auxiliary], strict=True)
    return [DecoderOutput(*parts) for parts in zip(logits, auxiliary, features, strict=True)]
