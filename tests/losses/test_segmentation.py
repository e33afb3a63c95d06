from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from passion_monai.distillation import SelfDistillation
from passion_monai.losses import DiceWeightedCELoss, PassionLoss, PMRLoss, SegmentationLoss, TaskLoss
from passion_monai.networks import MMFormer
from passion_monai.networks.base import DecoderOutput
from passion_monai.passes import DistillationOutput

SHAPES = [(4, 6), (3, 4, 5)]


def random_case(shape: tuple[int, ...], batch: int = 2, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(batch, num_classes, *shape, generator=generator)
    return logits, torch.randint(num_classes, (batch, 1, *shape), generator=generator)


def slow_dice_ce(logits: Tensor, label: Tensor) -> float:
    """Dice plus weighted cross-entropy of one sample, voxel by voxel: logits [K, ...], label [...]."""
    probabilities = logits.softmax(dim=0).flatten(1).tolist()
    target = label.flatten().tolist()
    dice = cross_entropy = 0.0
    for k, p in enumerate(probabilities):
        overlap = sum(p[i] for i in range(len(target)) if target[i] == k)
        dice += (1 - 2 * overlap / (sum(p) + target.count(k) + 1e-7)) / len(probabilities)
    for i, k in enumerate(target):
        weight = 1 - target.count(k) / len(target)
        cross_entropy -= weight * torch.log(torch.tensor(probabilities[k][i])).item() / len(target)
    return dice + cross_entropy


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_ce_equals_the_explicit_version(shape: tuple[int, ...]):
    logits, label = random_case(shape)
    expected = [slow_dice_ce(logits[n], label[n, 0]) for n in range(2)]
    torch.testing.assert_close(DiceWeightedCELoss()(logits, label), torch.tensor(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_is_that_of_monai(shape: tuple[int, ...]):
    logits, label = random_case(shape)
    label[:] = 1  # the cross-entropy's weight of the only class is 0
    dice = DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=0, smooth_dr=1e-7, reduction="none")(logits, label)
    torch.testing.assert_close(DiceWeightedCELoss()(logits, label), dice.flatten(1).mean(dim=1))


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("upsample_probabilities", [False, True])
def test_gradients_are_exact(floor: float, upsample_probabilities: bool):
    loss = SegmentationLoss(probability_floor=floor, upsample_probabilities=upsample_probabilities)
    label = torch.randint(3, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0))

    def total(fine: Tensor, coarse: Tensor) -> Tensor:
        return loss(DecoderOutput(fine, (coarse,), fine), label)

    fine, coarse = (torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    assert torch.autograd.gradcheck(total, (fine, coarse))


def test_dice_ce_of_a_class_that_is_not_there():
    logits, label = random_case((4, 4, 4))
    label[label == 2] = 1
    expected = [slow_dice_ce(logits[n], label[n, 0]) for n in range(2)]
    torch.testing.assert_close(DiceWeightedCELoss()(logits, label), torch.tensor(expected))


def test_dice_ce_of_a_perfect_prediction_is_almost_zero():
    _, label = random_case((4, 4, 4))
    logits = 50 * F.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    assert float(DiceWeightedCELoss()(logits, label).max()) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_ce_gradient(shape: tuple[int, ...]):
    logits, label = random_case(shape, num_classes=2)
    logits.requires_grad_()
    DiceWeightedCELoss()(logits, label).sum().backward()
    assert logits.grad is not None
    step = 1e-2 * logits.grad
    assert DiceWeightedCELoss()(logits - step, label).sum() < DiceWeightedCELoss()(logits, label).sum()


@pytest.mark.parametrize("level_decay", [1.0, 0.5])
def test_segmentation_loss_sums_upsampled_levels(level_decay: float):
    logits, label = random_case((8, 8, 8))
    auxiliary = (torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 2, 2, 2))
    expected = DiceWeightedCELoss()(logits, label)
    for level, coarse in enumerate(auxiliary, start=1):
        fine = F.interpolate(coarse, (8, 8, 8), mode="trilinear", align_corners=True)
        expected = expected + level_decay**level * DiceWeightedCELoss()(fine, label)
    loss = SegmentationLoss(level_decay=level_decay)(DecoderOutput(logits, auxiliary, logits), label)
    torch.testing.assert_close(loss, expected)


def test_task_loss_adds_the_predictions_of_present_modalities():
    logits, label = random_case((4, 4, 4))
    presence = torch.tensor([[True, True], [False, True]])
    own = [torch.randn(int(count), 3, 4, 4, 4) for count in presence.sum(dim=0)]
    loss = TaskLoss()
    fused_output = DecoderOutput(logits, (), logits)
    total = loss(DistillationOutput(presence, fused_output, (None, None), tuple(own), presence), label)
    single = DiceWeightedCELoss()
    fused = single(logits, label)
    first, second = single(own[0], label[:1]), single(own[1], label)
    torch.testing.assert_close(total, (fused[0] + first[0] + second[0] + fused[1] + second[1]) / 2)
    regularisation = loss.terms["loss_regularisation"]
    assert regularisation.isnan().tolist() == (~presence).tolist()
    assert float(regularisation[0, 0]) == pytest.approx(float(first[0]))


def test_the_preference_of_the_baseline_is_measured_without_a_part_in_the_loss():
    output, label = small_passes(students="measured")
    loss = TaskLoss(measure_preference=True)
    total = loss(output, label)
    assert not any(student.logits.requires_grad for student in output.students if student is not None)
    with_students = PassionLoss(3, 3)
    with_students(output, label)
    for name in ("gap", "relative_preference"):
        torch.testing.assert_close(loss.terms[name], with_students.terms[name], equal_nan=True)
    unmeasured = TaskLoss()
    torch.testing.assert_close(total, unmeasured(output, label))
    assert "gap" not in unmeasured.terms


def test_a_batch_without_students_has_the_same_terms_in_the_same_order():
    """Processes average them one by one, each with batches of its own."""
    output, label = small_passes()
    for loss in (TaskLoss(measure_preference=True), PMRLoss(3)):
        loss(output, label)
        names = list(loss.terms)
        single = torch.eye(3, dtype=torch.bool)
        none = (None,) * 3
        alone = DistillationOutput(single, output.fused, none, none, torch.zeros_like(single))
        loss(alone, label)
        assert list(loss.terms) == names
        for name in ("gap", "relative_preference"):
            values = loss.terms[name]
            assert torch.equal(values.isnan(), ~single)
            assert not values[single].any()


def small_passes(**settings: str) -> tuple[DistillationOutput, Tensor]:
    torch.manual_seed(0)
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8).eval()
    presence = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    label = torch.randint(3, (3, 1, 32, 32))
    return SelfDistillation(network, own_predictions="all", **settings)(torch.randn(3, 3, 32, 32), presence), label
