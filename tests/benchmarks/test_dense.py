from __future__ import annotations

import pytest
import torch

from benchmarks.dense import DenseStep
from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss
from passion_monai.networks import BACKBONES

SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 8, "num_heads": 2, "mlp_channels": 8, "dropout_rate": 0},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 8, "dropout_rate": 0},
    "fusionunet": {"width": 4},
}
PRESENCE = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])


@pytest.mark.parametrize("objective", ["paper", "released"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_dense_step_has_the_loss_and_gradients_of_the_sparse_one(name: str, objective: str):
    torch.manual_seed(0)
    network = BACKBONES[name](2, 3, 3, img_size=32, **SMALL.get(name, {})).double()
    weights = [1.5, 1.0, 3.0]
    loss = PassionLoss(3, 3, initial_beta=weights)
    if objective == "released":
        loss = PassionLoss.released(3, 3, availability=weights)
    image, label = torch.randn(3, 3, 32, 32).double(), torch.randint(3, (3, 1, 32, 32))
    passes = SelfDistillation(network, own_predictions="neglected" if objective == "released" else "none")
    losses = loss(passes(image, PRESENCE, label), label), DenseStep(network, loss)(image, PRESENCE, label)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    parameters = list(network.parameters())
    sparse, dense = (torch.autograd.grad(value, parameters, allow_unused=True) for value in losses)
    for one, other in zip(sparse, dense, strict=True):
        other = torch.zeros_like(one) if other is None and one is not None else other
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
