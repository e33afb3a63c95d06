from __future__ import annotations

import pytest
import torch

from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss, PixelDistillationLoss, PrototypeDistillationLoss, SegmentationLoss
from passion_monai.networks import MMFormer
from passion_monai.networks.base import DecoderOutput
from passion_monai.passes import DistillationOutput
from passion_monai.preference import relative_preference, task_mask

PRESENCE = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])


def passes(presence: torch.Tensor = PRESENCE) -> tuple[DistillationOutput, torch.Tensor]:
    """Real passes of a small network in evaluation mode, with a label."""
    torch.manual_seed(0)
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8).eval()
    image = torch.randn(len(presence), 3, 32, 32)
    label = torch.randint(3, (len(presence), 1, 32, 32))
    with torch.no_grad():
        return SelfDistillation(network)(image, presence), label


def one_sample(output: DistillationOutput, n: int) -> tuple[DecoderOutput, dict[int, DecoderOutput]]:
    """Teacher and students of one sample of a batch, each as a batch of one."""

    def pick(out: DecoderOutput, row: int) -> DecoderOutput:
        return DecoderOutput(
            out.logits[row : row + 1], tuple(a[row : row + 1] for a in out.auxiliary), out.features[row : row + 1]
        )

    students = {
        m: pick(student, int(output.student_rows[:n, m].sum()))
        for m, student in enumerate(output.students)
        if student is not None and output.student_rows[n, m]
    }
    return pick(output.fused, n), students


def slow_passion(output: DistillationOutput, label: torch.Tensor, beta: list[float], *, mask: bool = True) -> float:
    """Eq. (14) sample by sample and modality by modality, from the single losses."""
    total = 0.0
    for n in range(len(label)):
        teacher, students = one_sample(output, n)
        total += float(SegmentationLoss()(teacher, label[n : n + 1]))
        single = {
            m: PrototypeDistillationLoss(3)(student.features, teacher.features, label[n : n + 1])
            for m, student in students.items()
        }
        mean_gap = sum(float(gap) for _, gap in single.values()) / max(len(single), 1)
        for m, student in students.items():
            neglected = 1 - float(single[m][1]) / mean_gap < 0
            total += 0.5 * beta[m] * float(PixelDistillationLoss()(student, teacher))
            total += 0.1 * float(single[m][0]) * (neglected or not mask)
    return total / len(label)


@pytest.mark.parametrize("mask", [True, False])
def test_equals_the_explicit_version(mask: bool):
    output, label = passes()
    beta = [3.0, 1.5, 0.5]
    loss = PassionLoss(3, 3, initial_beta=beta, use_task_mask=mask)(output, label)
    assert float(loss) == pytest.approx(slow_passion(output, label, beta, mask=mask), rel=1e-5)


def test_a_batch_is_the_mean_of_its_samples():
    output, label = passes()
    loss = PassionLoss(3, 3, initial_beta=[3.0, 1.5, 0.5])
    singles = []
    for n in range(3):
        teacher, students = one_sample(output, n)
        presence, none = PRESENCE[n : n + 1], (None,) * 3
        sample = DistillationOutput(
            presence, teacher, tuple(students.get(m) for m in range(3)), none, torch.zeros_like(presence)
        )
        singles.append(loss(sample, label[n : n + 1]))
    torch.testing.assert_close(loss(output, label), torch.stack(singles).mean())


def test_a_sample_with_one_modality_has_gap_and_distillation_zero_even_with_dropout():
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8, dropout_rate=0.5)
    loss = PassionLoss(3, 3)
    presence = PRESENCE[2:]
    loss(SelfDistillation(network.train())(torch.randn(1, 3, 32, 32), presence), torch.randint(3, (1, 1, 32, 32)))
    for name in ("gap", "loss_pixel", "loss_prototype", "relative_preference"):
        assert loss.terms[name][0, 2] == 0
        assert loss.terms[name].isnan().tolist() == [[True, True, False]]


def test_table_2_rows_are_argument_values():
    output, label = passes()
    segmentation = PassionLoss(3, 3, lambda_pixel=0.0, lambda_prototype=0.0)(output, label)
    pixel = PassionLoss(3, 3, lambda_prototype=0.0)(output, label)
    prototype = PassionLoss(3, 3, lambda_pixel=0.0, use_task_mask=False)(output, label)
    both = PassionLoss(3, 3, use_task_mask=False)(output, label)
    masked = PassionLoss(3, 3)(output, label)
    torch.testing.assert_close(both - segmentation, (pixel - segmentation) + (prototype - segmentation))
    assert segmentation < pixel < masked < both


def test_own_predictions_of_neglected_modalities_are_all_that_the_released_objective_needs():
    torch.manual_seed(0)
    network = MMFormer(
        2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8, dropout_rate=0.0
    ).double()
    image, label = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randint(3, (3, 1, 32, 32))
    results = []
    for own_predictions in ("all", "neglected"):
        loss = PassionLoss.released(3, 3, availability=[3.0, 1.5, 1.0])
        output = SelfDistillation(network, own_predictions=own_predictions)(image, PRESENCE, label)
        total = loss(output, label)
        results.append((total, torch.autograd.grad(total, network.encoders.parameters())))
    torch.testing.assert_close(*results)
    neglected = loss.terms["relative_preference"] < 0
    assert torch.equal(output.own_rows, neglected)
    assert bool(neglected.any())
    assert torch.equal(loss.terms["loss_regularisation"].isnan(), ~neglected)


def test_neglected_modalities_cannot_be_found_without_a_label():
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8)
    with pytest.raises(ValueError, match="needs the label"):
        SelfDistillation(network, own_predictions="neglected")(torch.randn(1, 3, 32, 32), PRESENCE[:1])


def test_own_predictions_are_checked():
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8)
    with pytest.raises(ValueError, match="own_predictions must be one of"):
        SelfDistillation(network, own_predictions="some")


def test_terms_carry_no_gradient():
    torch.manual_seed(0)
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8)
    loss = PassionLoss(3, 3)
    total = loss(SelfDistillation(network)(torch.randn(3, 3, 32, 32), PRESENCE), torch.randint(3, (3, 1, 32, 32)))
    assert total.requires_grad
    assert not any(term.requires_grad for term in loss.terms.values())


def test_beta_is_in_the_state():
    loss = PassionLoss(2, 3, initial_beta=[2.0, 4.0])
    other = PassionLoss(2, 3)
    other.load_state_dict(loss.state_dict())
    assert other.beta.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("beta", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_initial_beta_must_fit(beta: list[float]):
    with pytest.raises(ValueError, match="initial_beta must be 2 positive values, got"):
        PassionLoss(2, 3, initial_beta=beta)


def test_the_control_of_the_released_objective_is_it_without_the_distillation():
    output, label = passes()
    output = output._replace(
        own_rows=PRESENCE, own_predictions=tuple(output.fused.logits[PRESENCE[:, m]] for m in range(3))
    )
    availability = [3.0, 1.5, 1.0]
    full = PassionLoss.released(3, 3, availability=availability)
    control = PassionLoss.released(3, 3, availability=availability, distil=False)
    delta = task_mask(relative_preference(PrototypeDistillationLoss(3).of_students(output, label)[1], PRESENCE))
    terms, weights = (full(output, label), full.terms)[1], torch.tensor(availability)
    distilled = 0.5 / 3 * terms["loss_pixel"] + 0.1 * delta * terms["loss_prototype"]
    expected = full(output, label) - (weights * distilled).nansum(dim=1).mean()
    torch.testing.assert_close(control(output, label), expected)
