from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.batched import BatchedDistillation
from benchmarks.graph import FilledCopies
from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss
from passion_monai.networks import BACKBONES, Backbone

SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 8, "num_heads": 2, "mlp_channels": 8, "dropout_rate": 0},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 8, "dropout_rate": 0},
    "fusionunet": {"width": 4},
}
PRESENCES = ([[True, True, False], [True, True, True], [False, True, False]], [[True, False, True]], [[False, True, False]])


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[name](2, 3, 3, img_size=32, **SMALL.get(name, {})).double()


def assert_same_step(network: Backbone, one: Any, other: Any, presence: Tensor) -> None:
    loss = PassionLoss(3, 3, initial_beta=[1.5, 1.0, 3.0])
    image, label = torch.randn(len(presence), 3, 32, 32).double(), torch.randint(3, (len(presence), 1, 32, 32))
    losses = [loss(passes(image, presence, label), label) for passes in (one, other)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    parameters = list(network.parameters())
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in losses]
    for first, second in zip(*gradients, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("presence", PRESENCES)
@pytest.mark.parametrize("name", BACKBONES)
def test_teacher_and_students_in_one_batch_have_the_loss_and_gradients_of_separate_ones(
    name: str, presence: list[list[bool]]
):
    network = build(name)
    assert_same_step(network, SelfDistillation(network), BatchedDistillation(network), torch.tensor(presence))
