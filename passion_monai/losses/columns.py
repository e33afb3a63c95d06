"""Matrices [B, M], one value for each sample and modality, from passes that run on some of the samples only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from passion_monai.devices import send
from passion_monai.networks.base import DecoderOutput
from passion_monai.passes import DistillationOutput

__all__ = ["stack_columns", "student_columns"]


def stack_columns(columns: Sequence[Tensor | None], rows: Tensor, device: torch.device) -> Tensor:
    """A matrix [B, M] from its columns, which have values only where `rows`, bool [B, M], is True, and 0 elsewhere."""
    stacked = []
    for column, there in zip(columns, rows.unbind(dim=1), strict=True):
        if column is not None and there.all():
            stacked.append(column)
        else:
            zeros = torch.zeros(len(rows), device=device, dtype=None if column is None else column.dtype)
            (indices,) = there.nonzero(as_tuple=True)
            stacked.append(zeros if column is None else zeros.index_copy(0, send(indices, device), column))
    return torch.stack(stacked, dim=1)


def student_columns(
    function: Callable[[DecoderOutput, Tensor], tuple[Tensor, ...]], output: DistillationOutput, *, parts: int
) -> tuple[Tensor, ...]:
    """Matrices [B, M] of what a function gives for every student, 0 where there is none.

    Args:
        function: of a student and of the samples that it ran on, bool [B], to `parts` tensors with a value for each of
            these samples.
        output: the passes of a training step.
        parts: how many matrices there are.
    """
    rows = output.student_rows
    values = [
        (None,) * parts if student is None else function(student, there)
        for student, there in zip(output.students, rows.unbind(dim=1), strict=True)
    ]
    device = output.fused.logits.device
    return tuple(stack_columns(columns, rows, device) for columns in zip(*values, strict=True))
