from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.handlers import from_engine
from torch import Tensor, nn

from passion_monai.devices import PreparePresence
from passion_monai.distillation import SelfDistillation
from passion_monai.evaluation.temperature import SampleVoxelsd
from passion_monai.handlers import LossOutput, PreferenceHandler
from passion_monai.inferers import CombinationInferer
from passion_monai.losses import PassionLoss
from passion_monai.networks import BACKBONES, Backbone

M, K, SIZE = 4, 4, 32
MODALITIES = ("a", "b", "c", "d")
# Without dropout, which a GPU draws in another order.
SETTINGS: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32, "dropout_rate": 0},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32, "dropout_rate": 0},
    "fusionunet": {"width": 4},
}
PRESENCE = torch.tensor([[True, True, False, True], [False, True, True, False]])
OBJECTIVES = {
    "passion": (lambda: PassionLoss(M, K), "none"),
    "released": (lambda: PassionLoss.released(M, K, availability=[1.0, 2.0, 3.0, 4.0]), "neglected"),
}


@pytest.fixture
def spatial_dims(device: torch.device) -> int:
    """What takes seconds on a GPU takes minutes in 3-D on a CPU."""
    return 3 if device.type == "cuda" else 2


def build(name: str, spatial_dims: int, device: torch.device) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[name](spatial_dims, M, K, img_size=SIZE, **SETTINGS.get(name, {})).to(device)


def batch(spatial_dims: int) -> dict[str, Tensor]:
    """Noise around an intensity for each class: nested boxes, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * spatial_dims, indexing="ij")
    distance = torch.stack(axes).abs().amax(dim=0)
    label = torch.bucketize(-distance, torch.tensor([-0.8, -0.5, -0.3])).repeat(2, 1, *[1] * spatial_dims)
    image = label + torch.randn(2, M, *[SIZE] * spatial_dims, generator=generator)
    return {"image": image, "label": label, "presence": PRESENCE}


def one_step(
    name: str, objective: str, spatial_dims: int, device: torch.device
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, gradients of all parameters, and terms of the loss."""
    make_loss, own_predictions = OBJECTIVES[objective]
    network, loss_function, data = build(name, spatial_dims, device), make_loss().to(device), batch(spatial_dims)
    image, label = data["image"].to(device), data["label"].to(device)
    passes = SelfDistillation(network, own_predictions=own_predictions)
    loss = loss_function(passes(image, PRESENCE, label), label)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    terms = {term: values.cpu() for term, values in loss_function.terms.items()}
    return loss.item(), torch.cat([gradient.flatten().cpu() for gradient in gradients]), terms


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_step_equals_the_cpus(name: str, objective: str, spatial_dims: int, device: torch.device):
    expected_loss, expected_gradient, expected_terms = one_step(name, objective, spatial_dims, torch.device("cpu"))
    loss, gradient, terms = one_step(name, objective, spatial_dims, device)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
    for term, values in expected_terms.items():
        torch.testing.assert_close(terms[term], values, rtol=1e-3, atol=1e-5, equal_nan=True)


class Training:
    """The parts of a bundle's train.yaml, on one batch again and again."""

    def __init__(self, name: str, spatial_dims: int, device: torch.device, *, precision: str = "float32") -> None:
        self.network = build(name, spatial_dims, device)
        self.loss = PassionLoss(M, K).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=1e-4)
        self.preference = PreferenceHandler(self.loss, MODALITIES)
        self.trainer = SupervisedTrainer(
            device=device,
            max_epochs=1,
            train_data_loader=[batch(spatial_dims)],
            network=SelfDistillation(self.network, precision=precision),
            optimizer=self.optimizer,
            loss_function=self.loss,
            prepare_batch=PreparePresence(with_label=True),
            non_blocking=True,
            train_handlers=[LossOutput(), self.preference],
            decollate=False,
            optim_set_to_none=True,
            # torch has no scaler for float16 on the CPU here.
            amp=precision == "float16" and device.type == "cuda",
            amp_kwargs={"enabled": False},
        )

    def run(self, steps: int) -> list[float]:
        """The losses of more steps."""
        losses: list[float] = []

        def note(engine: Any) -> None:
            losses.append(float(from_engine(["loss"], first=True)(engine.state.output)))

        self.trainer.state.max_epochs = self.trainer.state.epoch + steps
        with self.trainer.add_event_handler(Events.ITERATION_COMPLETED, note):
            self.trainer.run()
        return losses

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | PreferenceHandler]:
        return {"network": self.network, "loss": self.loss, "optimizer": self.optimizer, "preference": self.preference}

    def save(self, path: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, path)

    def load(self, path: Path) -> None:
        """As a resumed training does: everything by way of the CPU."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(content[name])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_learns(
    name: str, precision: str, spatial_dims: int, device: torch.device, request: pytest.FixtureRequest
):
    if device.type == "cpu":
        request.getfixturevalue("bfloat16")
    training = Training(name, spatial_dims, device, precision=precision)
    losses = training.run(50)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    parameters = list(training.network.parameters())
    assert all(torch.isfinite(parameter).all() and parameter.dtype == torch.float32 for parameter in parameters)


def test_a_checkpoint_goes_to_the_cpu_and_back(spatial_dims: int, device: torch.device, tmp_path: Path):
    first = Training("rfnet", spatial_dims, device)
    first.run(3)
    first.save(tmp_path / "1.pt")
    on_cpu = Training("rfnet", spatial_dims, torch.device("cpu"))
    on_cpu.load(tmp_path / "1.pt")
    on_cpu.save(tmp_path / "2.pt")
    back = Training("rfnet", spatial_dims, device)
    back.load(tmp_path / "2.pt")
    for name, parameter in first.network.state_dict().items():
        assert torch.equal(on_cpu.network.state_dict()[name], parameter.cpu())
        assert torch.equal(back.network.state_dict()[name], parameter)
    assert torch.equal(back.loss.beta, first.loss.beta)
    assert back.preference.history == first.preference.history
    expected = first.run(2)
    assert back.run(2) == pytest.approx(expected, rel=1e-4)
    assert on_cpu.run(2) == pytest.approx(expected, rel=1e-3)


def test_calibration_draws_what_it_draws_on_the_cpu(device: torch.device):
    probabilities = torch.rand(3, K, 8, 7, 6, generator=torch.Generator().manual_seed(0))
    probabilities[1] = torch.nan
    image, label = MetaTensor(torch.zeros(M, 8, 7, 6)), MetaTensor(torch.arange(8 * 7 * 6).reshape(1, 8, 7, 6) % K)
    drawn = [
        SampleVoxelsd(number=20)({"pred": probabilities.to(where), "image": image.to(where), "label": label.to(where)})
        for where in (torch.device("cpu"), device)
    ]
    for name in ("pred", "label"):
        torch.testing.assert_close(drawn[1][name].cpu(), drawn[0][name], equal_nan=True)


@torch.no_grad()
def test_all_combinations_of_a_large_volume_fit_into_8_gb(device: torch.device):
    on_gpu = device.type == "cuda"
    size, shape = (80, (240, 240, 155)) if on_gpu else (32, (32, 32, 40))
    network = BACKBONES["rfnet"](3, M, K, img_size=size, width=8 if on_gpu else 4).to(device).eval()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    image = torch.randn(1, M, *shape, device=device)
    # Without overlap, for the time: what is kept of the windows is the same.
    inferer = CombinationInferer(num_modalities=M, roi_size=[size] * 3, overlap=0.0)
    probabilities = inferer(image, network, torch.ones(1, M, dtype=torch.bool))
    assert probabilities.shape == (1, 2**M - 1, K, *shape)
    if on_gpu:
        assert torch.cuda.max_memory_allocated(device) < 8e9
