from __future__ import annotations

import pytest
import torch

from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss
from passion_monai.networks import RFNet
from passion_monai.objectives import OBJECTIVES, make_objective

MODALITIES = ("a", "b", "c")
AVAILABILITY = torch.tensor([1.25, 2.5, 5.0])


def make(name: str, **settings: object):
    return make_objective(name, modalities=MODALITIES, num_classes=4, availability=AVAILABILITY, **settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_passes_of_an_objective_are_those_that_its_loss_needs(name: str):
    network = RFNet(2, num_modalities=3, num_classes=4, img_size=32, width=4)
    objective = make(name)
    distillation = SelfDistillation(network, students=objective.students, own_predictions=objective.own_predictions)
    image, label = torch.rand(2, 3, 32, 32), torch.randint(4, (2, 1, 32, 32))
    output = distillation(image, torch.tensor([[True, True, False], [True, True, True]]), label)
    loss = objective.loss(output, label)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("name", "students", "own_predictions"),
    [
        ("passion", "trained", "none"),  # Eq. (14) has no L_reg
        ("released", "trained", "neglected"),
        ("reweighted", "measured", "neglected"),
        ("baseline", "none", "all"),  # Eq. (2)
        ("pmr", "trained", "all"),
    ],
)
def test_no_more_passes_are_run_than_an_objective_has(name: str, students: str, own_predictions: str):
    objective = make(name)
    assert (objective.students, objective.own_predictions) == (students, own_predictions)


def test_passion_takes_all_settings():
    objective = make(
        "passion",
        lambda_pixel=0.3,
        lambda_prototype=0.2,
        temperature=2.0,
        gamma=0.5,
        use_task_mask=False,
        level_decay=0.5,
    )
    loss = objective.loss
    assert isinstance(loss, PassionLoss)
    assert torch.equal(loss.beta, AVAILABILITY)
    assert (loss.lambda_pixel, loss.lambda_prototype, loss.use_task_mask) == (0.3, 0.2, False)
    assert (loss.pixel.temperature, loss.pixel.level_decay, loss.segmentation.level_decay) == (2.0, 0.5, 0.5)
    assert objective.preference_handler is not None
    assert objective.preference_handler.gamma == 0.5
    assert objective.preference_handler.loss is loss


def test_without_adaptive_beta_it_is_one_and_stays_so():
    objective = make("passion", adaptive_beta=False, gamma=0.5)
    assert objective.loss.beta.tolist() == [1, 1, 1]
    assert objective.preference_handler is not None
    assert objective.preference_handler.gamma == 0


def test_the_control_of_the_released_objective_distils_nothing_and_is_weighted_and_updated_as_it_is():
    released, control = make("released", gamma=0.5), make("reweighted", gamma=0.5)
    assert (control.loss.lambda_pixel, control.loss.lambda_prototype) == (0, 0)
    assert released.loss.lambda_pixel == 0.5 / 4
    assert (released.students, control.students) == ("trained", "measured")
    for objective in (released, control):
        assert torch.equal(objective.loss.modality_weights, AVAILABILITY)
        assert objective.own_predictions == "neglected"
        assert objective.preference_handler is not None
        assert (objective.preference_handler.gamma, objective.preference_handler.from_mean_gaps) == (0.5, True)


@pytest.mark.parametrize("measured", [False, True])
def test_students_of_the_baseline_are_measured_if_that_is_asked_for(measured: bool):
    objective = make("baseline", measure_preference=measured)
    assert objective.students == ("measured" if measured else "none")
    assert objective.preference_handler is None


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match=r"objective must be one of \['passion', .*\], got 'nothing'"):
        make("nothing")
