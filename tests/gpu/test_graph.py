from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.graph import WARM_UP, captured
from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss
from passion_monai.networks import BACKBONES

CARD = torch.device("cuda")
PRESENCE = torch.tensor([[True, False, True, True]])
SETTINGS: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32, "dropout_rate": 0},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32, "dropout_rate": 0},
    "fusionunet": {"width": 4},
}
REPLAYS = 5


def losses(name: str, *, in_graph: bool) -> list[float]:
    """Of the steps after the warm-up."""
    torch.manual_seed(0)
    network = BACKBONES[name](3, 4, 4, img_size=32, **SETTINGS[name]).to(CARD)
    passes, loss = SelfDistillation(network), PassionLoss(4, 4).to(CARD)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, capturable=True)
    image, label = torch.randn(1, 4, 32, 32, 32).to(CARD), torch.randint(4, (1, 1, 32, 32, 32)).to(CARD)
    value = torch.zeros((), device=CARD)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        result: Tensor = loss(passes(image, PRESENCE), label)
        result.backward()
        optimizer.step()
        value.copy_(result.detach())

    if in_graph:
        run = captured(step, optimizer, CARD)
    else:
        run = step
        for _ in range(WARM_UP):
            run()
    values = []
    for _ in range(REPLAYS):
        run()
        values.append(value.item())
    return values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", BACKBONES)
def test_a_graph_of_a_step_trains_as_the_step_does(name: str):
    plain, graph = losses(name, in_graph=False), losses(name, in_graph=True)
    assert plain[0] != plain[-1]
    assert graph == pytest.approx(plain, rel=1e-3)
