from __future__ import annotations

import pytest
import torch

from passion_monai import distillation
from passion_monai.distillation import SelfDistillation
from passion_monai.inferers import CombinationInferer, PresenceInferer
from passion_monai.losses import PassionLoss
from passion_monai.losses.prototype import PrototypeDistillationLoss
from passion_monai.networks import BACKBONES, Backbone
from passion_monai.precision import autocast, check_precision
from passion_monai.preference import relative_preference

SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32, "dropout_rate": 0},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32, "dropout_rate": 0},
}


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[name](2, 3, 3, img_size=32, **SMALL.get(name, {}))


def losses(name: str, precision: str) -> tuple[float, Backbone]:
    """The loss of one training step, and the network with its gradients."""
    network = build(name)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    presence = torch.tensor([[True, True, False], [True, True, True]])
    output = SelfDistillation(network, precision=precision)(image, presence)
    tensors = [output.fused.logits, output.fused.features, *output.fused.auxiliary, output.students[0].logits]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    loss = PassionLoss(3, 3)(output, torch.randint(3, (2, 1, 32, 32), generator=torch.Generator().manual_seed(1)))
    loss.mean().backward()
    return float(loss.detach().mean()), network


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_in_bfloat16_is_close_and_keeps_float32_weights(name: str):
    exact, _ = losses(name, "float32")
    rough, network = losses(name, "bfloat16")
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert all(torch.isfinite(gradient).all() and gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("name", BACKBONES)
def test_no_parameter_loses_its_gradient_in_bfloat16(name: str):
    """Autocast keeps copies of weights: one that was made without a gradient must not serve what is trained."""
    trained = [
        [name for name, parameter in losses(name, precision)[1].named_parameters() if parameter.grad is not None]
        for precision in ("float32", "bfloat16")
    ]
    assert trained[0] == trained[1]


def test_what_is_neglected_is_decided_in_float32_as_in_the_loss(monkeypatch: pytest.MonkeyPatch):
    gaps = []

    def note(gap: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
        gaps.append(gap)
        return relative_preference(gap, presence)

    monkeypatch.setattr(distillation, "relative_preference", note)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    presence = torch.tensor([[True, True, False], [True, True, True]])
    label = torch.randint(3, (2, 1, 32, 32), generator=torch.Generator().manual_seed(1))
    passes = SelfDistillation(build("rfnet"), own_predictions="neglected", precision="bfloat16")
    output = passes(image, presence, label)
    _, expected = PrototypeDistillationLoss(3).of_students(output, label)
    torch.testing.assert_close(gaps, [expected.detach()], rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("inferer", [PresenceInferer, lambda **kwargs: CombinationInferer(num_modalities=3, **kwargs)])
def test_inference_in_bfloat16_gives_probabilities_in_float32(inferer: object):
    network, image = build("rfnet").eval(), torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    presence = torch.ones(1, 3, dtype=torch.bool)
    exact, rough = (inferer(roi_size=(32, 32), precision=p)(image, network, presence) for p in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 0.01


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'half'"):
        autocast(torch.device("cpu"), "half")


@pytest.mark.parametrize("supported", [True, False])
def test_a_precision_that_the_processor_imitates_is_warned_of(
    supported: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    for precision in ("bfloat16", "float32"):
        check_precision(precision, "cpu")
    check_precision("bfloat16", "meta")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == (
        [] if supported else ["This processor has no bfloat16 arithmetic"]
    )
