from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from passion_monai.losses import PrototypeDistillationLoss


def random_case(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    student = torch.randn(2, 5, *shape, generator=generator)
    teacher = torch.randn(2, 5, *shape, generator=generator)
    return student, teacher, torch.randint(3, (2, 1, *shape), generator=generator)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_similarity(features: Tensor, label: Tensor, classes: list[int]) -> list[float]:
    """Eqs. (4)-(6) of one sample, [C, ...]: cosine of every voxel and every class that the label has."""
    voxels, target = features.flatten(1).T.tolist(), label.flatten().tolist()
    result = []
    for k in classes:
        members = [voxel for voxel, value in zip(voxels, target, strict=True) if value == k]
        prototype = [sum(channel) / len(members) for channel in zip(*members, strict=True)]
        result += [cosine(voxel, prototype) for voxel in voxels]
    return result


def slow_loss_and_gap(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[float, float]:
    """Eqs. (7) and (8) with means."""
    classes = sorted(set(label.flatten().tolist()))
    pairs = zip(slow_similarity(student, label, classes), slow_similarity(teacher, label, classes), strict=True)
    differences = [s - t for s, t in pairs]
    return sum(d * d for d in differences) / len(differences), sum(abs(d) for d in differences) / len(differences)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5)])
@pytest.mark.parametrize("absent_class", [None, 0, 2])
def test_equals_the_explicit_version(shape: tuple[int, ...], absent_class: int | None):
    student, teacher, label = random_case(shape)
    if absent_class is not None:
        label[0][label[0] == absent_class] = 1
    expected = [slow_loss_and_gap(student[n], teacher[n], label[n]) for n in range(2)]
    loss, gap = PrototypeDistillationLoss(3)(student, teacher, label)
    torch.testing.assert_close(loss, torch.tensor([pair[0] for pair in expected]))
    torch.testing.assert_close(gap, torch.tensor([pair[1] for pair in expected]))


def test_a_class_that_no_sample_has_changes_nothing():
    student, teacher, label = random_case((4, 4, 4))
    torch.testing.assert_close(
        PrototypeDistillationLoss(3)(student, teacher, label), PrototypeDistillationLoss(7)(student, teacher, label)
    )


def test_is_zero_for_a_student_like_its_teacher():
    student, _, label = random_case((4, 4, 4))
    loss, gap = PrototypeDistillationLoss(3)(student, student, label)
    assert loss.tolist() == gap.tolist() == [0.0, 0.0]


def test_does_not_depend_on_the_scale_of_features():
    student, teacher, label = random_case((4, 4, 4))
    torch.testing.assert_close(
        PrototypeDistillationLoss(3)(10 * student, teacher, label),
        PrototypeDistillationLoss(3)(student, teacher, label),
    )


def test_gradient_goes_to_the_student_alone_and_not_through_the_gap():
    student, teacher, label = random_case((4, 4, 4))
    student.requires_grad_(), teacher.requires_grad_()
    loss, gap = PrototypeDistillationLoss(3)(student, teacher, label)
    assert not gap.requires_grad
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad.abs().max()) > 0


def test_zero_features_give_finite_gradients():
    student, teacher, label = random_case((4, 4, 4))
    student = torch.zeros_like(student, requires_grad=True)
    PrototypeDistillationLoss(3)(student, teacher, label)[0].sum().backward()
    assert bool(torch.isfinite(student.grad).all())


def test_gradients_are_exact():
    student, teacher, label = random_case((3, 4))
    teacher = teacher.double()
    assert torch.autograd.gradcheck(
        lambda x: PrototypeDistillationLoss(3)(x, teacher, label)[0], student.double().requires_grad_()
    )
