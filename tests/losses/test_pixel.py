from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passion_monai.losses import PixelDistillationLoss
from passion_monai.networks.base import DecoderOutput


def outputs(seed: int, shape: tuple[int, ...]) -> DecoderOutput:
    generator = torch.Generator().manual_seed(seed)
    fine = 3 * torch.randn(2, 3, *shape, generator=generator)
    coarse = 3 * torch.randn(2, 3, *[size // 2 for size in shape], generator=generator)
    return DecoderOutput(fine, (coarse,), fine)


def slow_divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Eq. (3) as it is printed, at one level of one sample, [K, ...], voxel by voxel."""
    total = 0.0
    voxels = list(zip(student.flatten(1).T.tolist(), teacher.flatten(1).T.tolist(), strict=True))
    for s, t in voxels:
        p = [math.exp(value / temperature) for value in t]
        q = [math.exp(value / temperature) for value in s]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(voxels)


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 4)])
@pytest.mark.parametrize(("squared", "factor"), [(False, lambda _: 1.0), (True, lambda temperature: temperature**2)])
@pytest.mark.parametrize(("temperature", "level_decay"), [(4.0, 1.0), (1.0, 0.5), (0.5, 1.0)])
def test_equals_the_explicit_version(
    shape: tuple[int, ...],
    temperature: float,
    level_decay: float,
    squared: bool,
    factor: Callable[[float], float],
):
    student, teacher = outputs(0, shape), outputs(1, shape)
    expected = [
        factor(temperature)
        * (
            slow_divergence(student.logits[n], teacher.logits[n], temperature)
            + level_decay * slow_divergence(student.auxiliary[0][n], teacher.auxiliary[0][n], temperature)
        )
        for n in range(2)
    ]
    loss = PixelDistillationLoss(temperature=temperature, temperature_squared=squared, level_decay=level_decay)
    loss = loss(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_is_zero_for_a_student_like_its_teacher():
    same = outputs(0, (4, 4, 4))
    torch.testing.assert_close(PixelDistillationLoss()(same, same), torch.zeros(2))


def test_teacher_gets_no_gradient():
    student, teacher = outputs(0, (4, 4)), outputs(1, (4, 4))
    student.logits.requires_grad_(), teacher.logits.requires_grad_()
    PixelDistillationLoss()(student, teacher).sum().backward()
    assert teacher.logits.grad is None
    assert student.logits.grad is not None


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        PixelDistillationLoss(temperature=temperature)


@pytest.mark.parametrize(("floor", "at_full_size"), [(0.0, False), (0.05, True)])
def test_gradients_are_exact(floor: float, at_full_size: bool):
    loss = PixelDistillationLoss(probability_floor=floor, at_full_size=at_full_size)
    teacher = outputs(1, (4, 4))

    def total(fine: Tensor, coarse: Tensor) -> Tensor:
        return loss(DecoderOutput(fine, (coarse,), fine), teacher)

    student = outputs(0, (4, 4))
    tensors = [x.double().requires_grad_() for x in (student.logits, student.auxiliary[0])]
    assert torch.autograd.gradcheck(total, tensors)
