"""Gradients and extremes of every loss, on passes that are drawn instead of computed by a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from passion_monai.losses import (
    DiceWeightedCELoss,
    PassionLoss,
    PixelDistillationLoss,
    PMRLoss,
    PrototypeDistillationLoss,
    SegmentationLoss,
    TaskLoss,
    pmr,
)
from passion_monai.networks.base import DecoderOutput
from passion_monai.passes import DistillationOutput

M, K, C, SIZE = 3, 3, 4, 4
PRESENCE = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
Draw = Callable[..., Tensor]
OBJECTIVES: dict[str, Callable[..., Any]] = {
    "passion": lambda modalities=M, classes=K, **more: PassionLoss(modalities, classes, **more),
    "passion without delta": lambda modalities=M, classes=K: PassionLoss(modalities, classes, use_task_mask=False),
    "passion, coarse probabilities": lambda modalities=M, classes=K: PassionLoss(
        modalities, classes, compare_at_full_size=True
    ),
    "released": lambda modalities=M, classes=K: PassionLoss.released(
        modalities, classes, availability=torch.linspace(1, 5, modalities)
    ),
    "baseline": lambda modalities=M, classes=K: TaskLoss(),
    "baseline, coarse probabilities": lambda modalities=M, classes=K: TaskLoss(upsample_probabilities=True),
    "pmr": lambda modalities=M, classes=K: PMRLoss(classes),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def passes(draw: Draw, presence: Tensor = PRESENCE, size: int = SIZE, dims: int = 2) -> DistillationOutput:
    """What the wrapper gives, with the tensors that `draw` gives for their shapes: "logits" or "features"."""
    full, half = (size,) * dims, (size // 2,) * dims

    def decoded(samples: int) -> DecoderOutput:
        coarse = draw("logits", samples, *half)
        return DecoderOutput(draw("logits", samples, *full), (coarse,), draw("features", samples, *full))

    output = DistillationOutput(presence, decoded(len(presence)), (), (), presence)
    students = tuple(decoded(count) if count else None for count in output.student_rows.sum(dim=0).tolist())
    own = tuple(draw("logits", count, *full) if count else None for count in presence.sum(dim=0).tolist())
    return output._replace(students=students, own_predictions=own)


def drawing(tensors: list[Tensor], *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Draw:
    """Draws leaves of the graph, and keeps them in a list; logits and features as `changes` makes them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kind: str, samples: int, *size: int) -> Tensor:
        channels = changes.get("classes", K) if kind == "logits" else C
        values = torch.randn(samples, channels, *size, dtype=dtype, generator=generator)
        tensors.append(changes.get(kind, lambda values: values)(values).requires_grad_())
        return tensors[-1]

    return draw


def draw_label(*size: int, seed: int = 1, classes: int = K) -> Tensor:
    return torch.randint(classes, size, generator=torch.Generator().manual_seed(seed))


LABEL = draw_label(len(PRESENCE), 1, SIZE, SIZE)


@every_objective
def test_gradients_are_exact(objective: str, monkeypatch: pytest.MonkeyPatch):
    """The teacher is a constant to its students, and a prototype to the DCE of PMR."""
    fixed = torch.randn(1, K, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(pmr, "class_prototypes", lambda flat, one_hot: fixed.expand(len(flat), -1, -1))
    loss, tensors = OBJECTIVES[objective]().double(), []
    fused = passes(drawing([])).fused
    passes(drawing(tensors))

    def total(*inputs: Tensor) -> Tensor:
        remaining = iter(inputs)
        return loss(passes(lambda *_: next(remaining))._replace(fused=fused), LABEL)

    assert torch.autograd.gradcheck(total, tensors, fast_mode=True)


@every_objective
def test_the_gradient_of_the_teacher_is_that_of_the_segmentation(objective: str):
    loss, tensors = OBJECTIVES[objective]().double(), []
    output = passes(drawing(tensors))
    fused = [output.fused.logits, *output.fused.auxiliary]
    segmentation = (loss.task if objective == "pmr" else loss).segmentation
    expected = torch.autograd.grad(segmentation(output.fused, LABEL).mean(), fused)
    *found, of_features = torch.autograd.grad(loss(output, LABEL), [*fused, output.fused.features], allow_unused=True)
    torch.testing.assert_close(tuple(found), expected)
    assert of_features is None
    assert torch.autograd.gradcheck(
        lambda logits, coarse: segmentation(DecoderOutput(logits, (coarse,), logits), LABEL), fused
    )


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_gradients_of_the_single_losses_are_exact(floor: float):
    student, teacher = (passes(drawing([], seed=seed)).fused for seed in (0, 1))
    dice, prototype = DiceWeightedCELoss(probability_floor=floor), PrototypeDistillationLoss(K)
    assert torch.autograd.gradcheck(lambda logits: dice(logits, LABEL), student.logits)
    assert torch.autograd.gradcheck(lambda z: prototype(z, teacher.features.detach(), LABEL)[0], student.features)
    for settings in ({}, {"at_full_size": True}, {"temperature": 0.5, "temperature_squared": True, "level_decay": 0.5}):
        pixel = PixelDistillationLoss(probability_floor=floor, **settings)

        def divergence(logits: Tensor, coarse: Tensor, pixel: PixelDistillationLoss = pixel) -> Tensor:
            return pixel(DecoderOutput(logits, (coarse,), logits), teacher)

        assert torch.autograd.gradcheck(divergence, (student.logits, student.auxiliary[0]), fast_mode=True)


def gradients(loss: Any, output: DistillationOutput, label: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of all that is there, which must be finite, as the loss and its terms must be."""
    total = loss(output, label)
    assert bool(total.isfinite()), loss.terms
    for name, term in loss.terms.items():
        there = output.student_rows if name in ALONE else output.presence
        assert torch.equal(term.isfinite(), there if term.ndim > 1 else torch.ones(len(term), dtype=torch.bool)), name
    found = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    assert all(bool(gradient.isfinite().all()) for gradient in found)
    return list(found)


ALONE = ("loss_dce", "prototype_score")
"""Terms that a sample with one modality has not."""


def one_voxel(label: Tensor) -> Tensor:
    """Background but for a voxel of class 1."""
    label = torch.zeros_like(label)
    label[..., 0, 0] = 1
    return label


LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda label: label,
    "an absent class": lambda label: label.clamp_max(1),
    "one class alone": lambda label: torch.full_like(label, 2),
    "one voxel": one_voxel,
}
VALUES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "any": {},
    "equal logits": {"logits": torch.zeros_like},
    "sure and right or wrong": {"logits": lambda values: 1e4 * values},
    "the largest": {"logits": lambda values: 1e30 * values.sign(), "features": lambda values: 1e15 * values},
    "features of 0": {"features": torch.zeros_like},
    "half of the features 0": {"features": lambda values: values * (values[:, :1] > 0)},
    "small features": {"features": lambda values: 1e-15 * values},
    "equal features": {"features": torch.ones_like},
}


@every_objective
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("values", VALUES)
def test_extremes_are_finite(objective: str, label: str, values: str):
    tensors: list[Tensor] = []
    output = passes(drawing(tensors, dtype=torch.float32, **VALUES[values]))
    gradients(OBJECTIVES[objective](), output, LABELS[label](LABEL), tensors)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 4.0, 100.0])
def test_gradients_at_any_temperature_are_those_of_double_precision(temperature: float):
    """Where logits are soft at this temperature, and where they are not."""
    for scale in (1.0, 100.0, temperature):
        results = []
        for dtype in (torch.float32, torch.float64):
            tensors: list[Tensor] = []
            draw = drawing(tensors, dtype=torch.float32, logits=lambda values, scale=scale: scale * values)
            passes(draw)
            exact = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
            remaining = iter(exact)
            output = passes(lambda *_, remaining=remaining: next(remaining))
            loss = PassionLoss(M, K, temperature=temperature, lambda_pixel=1.0, lambda_prototype=0.0).to(dtype)
            results.append([tensor.double() for tensor in gradients(loss, output, LABEL, exact)])
        limit = 1e-5 * max(float(gradient.abs().max()) for gradient in results[1])
        torch.testing.assert_close(*results, rtol=1e-4, atol=limit)


@pytest.mark.parametrize("objective", ["passion", "passion without delta"])
def test_identical_teachers_and_students_leave_the_segmentation_alone(objective: str):
    tensors: list[Tensor] = []
    drawn = passes(drawing(tensors, dtype=torch.float32), PRESENCE[:1])
    output = drawn._replace(students=(drawn.fused,) * M)
    loss = OBJECTIVES[objective]()
    total = loss(output, LABEL[:1])
    torch.testing.assert_close(total, SegmentationLoss()(output.fused, LABEL[:1])[0], rtol=0, atol=1e-5)
    for name in ("gap", "loss_prototype", "relative_preference"):
        assert loss.terms[name].tolist() == [[0.0] * M]
    students = [tensor.detach().clone().requires_grad_() for tensor in (output.fused.logits, output.fused.features)]
    copy = DecoderOutput(students[0], output.fused.auxiliary, students[1])
    found = torch.autograd.grad(loss(output._replace(students=(copy,) * M), LABEL[:1]), students)
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in found)


def test_a_feature_of_0_has_a_gradient_of_bounded_size():
    """It has no direction; how fast it turns is bounded by what counts as a norm at all."""
    student, teacher = (passes(drawing([], seed=seed, dtype=torch.float32)).fused.features for seed in (0, 1))
    student = student.detach().clone()
    student[..., 0] = 0
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(PrototypeDistillationLoss(K)(student, teacher, LABEL)[0].sum(), student)
    assert 1 < float(gradient.abs().max()) < 4e5 / SIZE**2


def test_a_class_of_one_voxel_counts_as_any_other():
    student, teacher = (passes(drawing([], seed=seed)).fused.features.detach()[:1] for seed in (0, 1))
    label = one_voxel(LABEL[:1])

    def similarity(features: Tensor) -> Tensor:
        flat, inside = features.flatten(2), label.flatten(2) == 1
        rest = ((flat * ~inside).sum(dim=2) / (SIZE**2 - 1))[:, :, None]
        return torch.stack([torch.cosine_similarity(flat, other) for other in (rest, flat[:, :, :1])])

    expected = (similarity(student) - similarity(teacher)).square().mean()
    torch.testing.assert_close(PrototypeDistillationLoss(K)(student, teacher, label)[0][0], expected)


def random_problem(seed: int, samples: int) -> tuple[DistillationOutput, Tensor, list[Tensor], int, int]:
    """A batch of small problems, of which each sample is one, of any number of classes, modalities, axes and scales."""
    rng = torch.Generator().manual_seed(seed)
    limits = (1, 5), (2, 6), (2, 4)
    modalities, classes, dims = (int(torch.randint(*limit, (1,), generator=rng)) for limit in limits)
    presence = torch.rand(samples, modalities, generator=rng) < 0.6
    presence[torch.arange(samples), torch.randint(modalities, (samples,), generator=rng)] = True

    def scaled(values: Tensor) -> Tensor:
        """Each sample by a factor of its own from 1e-6 to 1e6, with zeros at some voxels of some samples."""
        shape = (len(values), *[1] * (values.ndim - 1))
        scales = 10 ** (12 * torch.rand(shape, generator=rng) - 6)
        there = torch.rand(len(values), 1, *values.shape[2:], generator=rng) > torch.rand(shape, generator=rng) - 0.5
        return scales * values * there

    tensors: list[Tensor] = []
    draw = drawing(tensors, seed=seed, dtype=torch.float32, classes=classes, logits=scaled, features=scaled)
    output = passes(draw, presence, dims=dims)
    label = draw_label(samples, 1, *[SIZE] * dims, seed=seed, classes=classes)
    highest = torch.randint(classes, (samples, *[1] * (dims + 1)), generator=rng)  # in many samples a class is absent
    return output, torch.minimum(label, highest), tensors, modalities, classes


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_ten_thousand_random_problems(part: int):
    for seed in range(5 * part, 5 * part + 5):
        output, label, tensors, modalities, classes = random_problem(seed, samples=200)
        for objective in ("passion", "released", "baseline", "pmr"):
            gradients(OBJECTIVES[objective](modalities, classes), output, label, tensors)


@pytest.mark.usefixtures("bfloat16")
@every_objective
def test_bfloat16_is_close_to_float32(objective: str):
    """Passes in bfloat16, and losses within an autocast of somebody else's."""
    tensors: list[Tensor] = []
    output = passes(drawing(tensors, dtype=torch.float32))
    exact = gradients(OBJECTIVES[objective](), output, LABEL, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients(OBJECTIVES[objective](), output, LABEL, tensors)
    limit = 0.02 * max(float(gradient.abs().max()) for gradient in exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=limit)
    halves = iter([tensor.detach().bfloat16().requires_grad_() for tensor in tensors])
    half = passes(lambda *_: next(halves))
    losses = [OBJECTIVES[objective]()(passed, LABEL).detach() for passed in (half, output)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0, check_dtype=False)
