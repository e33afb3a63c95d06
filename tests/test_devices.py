"""A training step and an inference on torch's `meta` device, whose tensors have no values.

What reads one back fails there, as it would wait on a GPU. And `Watch` fails where tensors of the CPU and of the device
meet in an operation, or where a copy between them waits, which a GPU would not tell of either.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passion_monai import distillation, progress
from passion_monai.devices import PreparePresence, read_back, send
from passion_monai.distillation import SelfDistillation
from passion_monai.evaluation.dice import CombinationDiceMetric
from passion_monai.handlers import LossOutput, PreferenceHandler, TrainingLog
from passion_monai.inferers import CombinationInferer, PresenceInferer
from passion_monai.losses import PassionLoss, PMRLoss, TaskLoss
from passion_monai.networks import BACKBONES, Backbone
from passion_monai.progress import ProgressValues
from passion_monai.resume import Seeding

META = torch.device("meta")
SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 8, "num_heads": 2, "mlp_channels": 8},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 8},
    "fusionunet": {"width": 4},
}
PRESENCE = torch.tensor([[True, True], [False, True]])
M, K = 2, 2
MODALITIES = ("a", "b")


def objective(name: str) -> tuple[nn.Module, dict[str, str]]:
    """A loss, and the passes that it needs, as in a bundle's train.yaml."""
    released = {"availability": [2.0, 1.0]}
    return {
        "passion": (PassionLoss(M, K), {}),
        "released": (PassionLoss.released(M, K, **released), {"own_predictions": "neglected"}),
        "reweighted": (
            PassionLoss.released(M, K, **released, distil=False),
            {"students": "measured", "own_predictions": "neglected"},
        ),
        "baseline": (TaskLoss(), {"students": "none", "own_predictions": "all"}),
        "pmr": (PMRLoss(K), {"own_predictions": "all"}),
    }[name]


OBJECTIVES = ("passion", "released", "reweighted", "baseline", "pmr")
READING = ("released", "reweighted")


def is_copy_without_waiting(function: Any, args: Any, kwargs: Any) -> bool:
    if function == torch.ops.aten.copy_.default:
        return bool(kwargs.get("non_blocking", args[2:] and args[2]))
    return function == torch.ops.aten._to_copy.default and kwargs.get("non_blocking", False)


class Watch(TorchDispatchMode):
    """Fails at an operation on tensors of several devices, or at a copy between devices that waits."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        # Single values of the CPU's go along with the call.
        devices = {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}
        if len(devices) > 1 and not is_copy_without_waiting(function, args, kwargs or {}):
            raise AssertionError(f"{function} waits, or is on several devices: {devices}")
        return result


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was read back in the places that may."""
    shapes: list[tuple[int, ...]] = []

    def read(tensor: Tensor) -> Tensor:
        assert tensor.is_meta
        shapes.append(tuple(tensor.shape))
        return torch.linspace(0.1, 1, tensor.numel()).view(tensor.shape)

    for module in (distillation, progress):
        monkeypatch.setattr(module, "read_back", read)
    return shapes


def on_meta(name: str, spatial_dims: int) -> Backbone:
    with META:
        return BACKBONES[name](spatial_dims, M, K, img_size=32, **SMALL.get(name, {}))


def batch(spatial_dims: int, device: torch.device = META) -> dict[str, Tensor]:
    shape = [32] * spatial_dims
    return {
        "image": torch.randn(len(PRESENCE), M, *shape, device=device),
        "label": torch.zeros(len(PRESENCE), 1, *shape, dtype=torch.uint8, device=device),
        "presence": PRESENCE,
    }


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("objective_name", OBJECTIVES)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_reads_nothing_back_but_which_modalities_are_neglected(
    name: str, objective_name: str, spatial_dims: int, readings: list[tuple[int, ...]]
):
    network, data = on_meta(name, spatial_dims), batch(spatial_dims)
    loss_function, passes = objective(objective_name)
    loss_function.to(META)
    with Watch():
        loss_function(SelfDistillation(network, **passes)(**data), data["label"]).backward()
    assert all(p.grad is None or p.grad.is_meta for p in network.parameters())
    assert sum(p.grad is not None for p in network.parameters()) > 20
    assert all(term.is_meta for term in loss_function.terms.values())
    assert readings == ([tuple(PRESENCE.shape)] if objective_name in READING else [])


@pytest.mark.parametrize("objective_name", READING)
def test_which_modalities_are_neglected_is_read_in_one_place(objective_name: str):
    _, passes = objective(objective_name)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        SelfDistillation(on_meta("rfnet", 2), **passes)(**batch(2))


def test_activation_checkpointing_does_not_read_either():
    network, data, loss = on_meta("rfnet", 2), batch(2), PassionLoss(M, K).to(META)
    with Watch():
        loss(SelfDistillation(network, activation_checkpointing=True)(**data), data["label"]).backward()


def trainer(handlers_: list[object], loss: nn.Module, iterations: int) -> SupervisedTrainer:
    """A trainer as in a bundle's train.yaml, whose batches come from the CPU, stopped before the end of its epoch."""
    network = on_meta("rfnet", 2)
    engine = SupervisedTrainer(
        device=META,
        max_epochs=1,
        train_data_loader=[batch(2, torch.device("cpu"))] * (iterations + 1),
        network=SelfDistillation(network),
        optimizer=torch.optim.AdamW(network.parameters()),
        loss_function=loss,
        prepare_batch=PreparePresence(with_label=True),
        non_blocking=True,
        train_handlers=handlers_,
        decollate=False,
        optim_set_to_none=True,
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=iterations), engine.terminate)
    return engine


def test_an_iteration_and_its_handlers_read_nothing_back(tmp_path: Any):
    loss = PassionLoss(M, K).to(META)
    preference = PreferenceHandler(loss, MODALITIES)
    log = TrainingLog(tmp_path / "training.csv", loss, MODALITIES, validator=Engine(lambda *_: None))
    engine = trainer([Seeding(0), LossOutput(), preference, log], loss, 1)
    with Watch():
        engine.run()
    assert engine.state.iteration == 1
    sums = preference._mean.sums()
    assert all(part.is_meta and part.shape == (M,) and part.dtype == torch.float64 for part in sums)


def test_a_progress_bar_reads_once_every_few_iterations(readings: list[tuple[int, ...]]):
    loss = PassionLoss(M, K)
    loss.terms = {"loss_segmentation": torch.ones(2, device=META), "loss_pixel": torch.ones(2, M, device=META)}
    values = ProgressValues(loss, interval=3)
    with Watch():
        shown = [values([{"loss": torch.ones((), device=META)}]) for _ in range(7)]
    assert readings == [(3,)] * 3  # at iterations 1, 4 and 7
    assert shown == [{"loss": pytest.approx(0.1), "segmentation": pytest.approx(0.55), "pixel": 1.0}] * 7


@torch.no_grad()
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_inferers_and_metrics_read_nothing_back(name: str, spatial_dims: int, monkeypatch: pytest.MonkeyPatch):
    # MONAI looks at the smallest weight in a window, once for each volume.
    monkeypatch.setattr("monai.inferers.utils.compute_importance_map", lambda size, **_: torch.ones(size, device=META))
    network = on_meta(name, spatial_dims).eval()
    image, label = torch.randn(1, M, *[32] * spatial_dims, device=META), batch(spatial_dims)["label"][:1]
    settings: dict[str, Any] = {"roi_size": [32] * spatial_dims, "overlap": 0.5}
    every, metric = CombinationInferer(num_modalities=M, **settings), CombinationDiceMetric(regions={"whole": (1,)})
    with Watch():
        single = PresenceInferer(**settings)(image, network, PRESENCE[:1])
        for presence in (PRESENCE[1:], PRESENCE[:1]):
            result = every(image, network, presence)
            metric(result.argmax(dim=2).to(torch.int16), label)
        assert metric.aggregate().is_meta
    assert single.is_meta
    assert single.shape == (1, K, *image.shape[2:])
    assert result.shape == (1, 2**M - 1, K, *image.shape[2:])


def test_a_network_without_presence_reads_nothing_back():
    network = on_meta("rfnet", 2)
    with Watch():
        assert network(torch.zeros(1, M, 32, 32, device=META)).is_meta


def test_presence_of_a_batch_stays_on_the_cpu():
    data = batch(2, torch.device("cpu"))
    image, label, args, kwargs = PreparePresence()(data, "meta", True)
    assert (image.is_meta, label.is_meta, args) == (True, True, ())
    assert kwargs == {"presence": PRESENCE}
    kwargs = PreparePresence(with_label=True)(data, META, True)[3]
    assert kwargs["label"].is_meta
    assert kwargs["presence"] is PRESENCE


def test_what_is_sent_and_read():
    assert send(PRESENCE, META).is_meta
    assert send(PRESENCE, torch.device("cpu")) is PRESENCE
    assert read_back(PRESENCE) is PRESENCE


def test_what_a_gpu_would_wait_for_is_found():
    with Watch():
        send(PRESENCE, META)
        with pytest.raises(AssertionError, match="waits"):
            PRESENCE.to(META)
        with pytest.raises(AssertionError, match="several devices"):
            torch.zeros(2, 4, device=META)[PRESENCE[0]]
