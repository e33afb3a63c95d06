from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.batched import BatchedDistillation
from benchmarks.compiled import compile_regions
from benchmarks.graph import WARM_UP, FilledCopies, captured, filled
from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss
from passion_monai.networks import BACKBONES, Backbone

SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 8, "num_heads": 2, "mlp_channels": 8, "dropout_rate": 0},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 8, "dropout_rate": 0},
    "fusionunet": {"width": 4},
}
MIXED = [[True, True, False], [True, True, True], [False, True, False]]
PRESENCES = (MIXED, [[True, False, True]], [[False, True, False]])
CPU, META = torch.device("cpu"), torch.device("meta")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
Step = tuple[Tensor, tuple[Tensor | None, ...]]


def build(name: str, **settings: Any) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[name](2, 3, 3, img_size=32, **SMALL[name], **settings)


def run_step(network: Backbone, passes: SelfDistillation, presence: Tensor) -> Step:
    """Loss and gradients on the device and in the precision of the network."""
    like = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(len(presence), 3, 32, 32, generator=generator).to(like)
    label = torch.randint(3, (len(presence), 1, 32, 32), generator=generator).to(like.device)
    loss = PassionLoss(3, 3, initial_beta=[1.5, 1.0, 3.0]).to(like.device)
    value = loss(passes(image, presence, label), label)
    return value, torch.autograd.grad(value, list(network.parameters()), allow_unused=True)


def assert_same(one: Step, other: Step, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=0)
    assert sum(gradient is not None for gradient in one[1]) > 20
    for first, second in zip(one[1], other[1], strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, rtol=rtol, atol=atol)


@pytest.mark.parametrize("presence", PRESENCES)
@pytest.mark.parametrize("name", BACKBONES)
def test_one_batch_of_teacher_and_students_gives_what_separate_calls_give(name: str, presence: list[list[bool]]):
    network, there = build(name).double(), torch.tensor(presence)
    plain, batched = (run_step(network, form(network), there) for form in (SelfDistillation, BatchedDistillation))
    assert_same(plain, batched, rtol=1e-6, atol=1e-10)


def test_the_batched_form_is_one_call_of_the_decoder(monkeypatch: pytest.MonkeyPatch):
    network, rows = build("rfnet"), []
    decode = network.decode
    monkeypatch.setattr(network, "decode", lambda *args: rows.append(len(args[1])) or decode(*args))
    run_step(network, BatchedDistillation(network), torch.tensor(MIXED))
    assert rows == [3 + 2 + 3]


def test_the_batched_form_is_of_one_objective():
    network = build("rfnet")
    with pytest.raises(ValueError, match="paper's objective only"):
        run_step(network, BatchedDistillation(network, own_predictions="all"), torch.tensor(MIXED))


def compiled(network: Backbone, presence: Tensor, backend: str) -> Step:
    """A step whose regions are compiled."""
    compile_regions(network, backend=backend)
    try:
        return run_step(network, SelfDistillation(network), presence)
    finally:
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own
def test_regions_are_compiled_once_whatever_is_present():
    network, graphs = build("fusionunet", strides=[2]), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    plain = run_step(network, SelfDistillation(network), torch.tensor([[True, False, True]]))
    compile_regions(network, backend=backend)
    assert_same(plain, run_step(network, SelfDistillation(network), torch.tensor([[True, False, True]])), **CLOSE)
    # Two levels, each with the layer that all encoders share and a fusion, and one way up.
    assert len(graphs) == 2 * 2 + 1
    run_step(network, SelfDistillation(network), torch.tensor([[True, True, True]]))
    assert len(graphs) == 2 * 2 + 1
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_gives_what_a_plain_one_gives():
    network, presence = build("fusionunet", strides=[2]).double(), torch.tensor([[True, False, True]])
    plain = run_step(network, SelfDistillation(network), presence)
    assert_same(plain, compiled(network, presence, "inductor"), **CLOSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own
@pytest.mark.parametrize("name", ["rfnet", "mmformer", "m2ftrans"])
def test_regions_of_a_step_can_be_recorded_for_a_compiler(name: str):
    network, presence = build(name).double(), torch.tensor([[True, False, True]])
    plain = run_step(network, SelfDistillation(network), presence)
    assert_same(plain, compiled(network, presence, "aot_eager"), **CLOSE)


class NoCopies(TorchDispatchMode):
    """Fails where the CPU's memory and the device's meet, which a graph cannot record."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        assert len({tensor.device for tensor in tensors if tensor.ndim}) < 2, f"{function} is on several devices"
        return result


@pytest.mark.parametrize("presence", PRESENCES)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_recorded_step_copies_nothing_to_the_device(name: str, presence: list[list[bool]]):
    network, loss = build(name).to(META), PassionLoss(3, 3).to(META)
    image, label = (
        torch.empty(len(presence), 3, 32, 32, device=META),
        torch.empty(len(presence), 1, 32, 32, device=META),
    )

    def step() -> None:
        loss(SelfDistillation(network)(image, torch.tensor(presence), label), label).backward()

    with pytest.raises(AssertionError, match="on several devices"), NoCopies():
        step()
    with NoCopies(), FilledCopies():
        step()


@pytest.mark.parametrize("values", [[[True, False]], [], 3, [0.5, -1.0], [2**40]])
def test_what_is_filled_in_is_what_would_have_been_copied(values: Any):
    tensor = torch.tensor(values)
    torch.testing.assert_close(filled(tensor, CPU), tensor, rtol=0, atol=0)


def test_a_graph_needs_a_card():
    with pytest.raises(ValueError, match="needs a card, and this is a cpu"):
        captured(lambda: None, torch.optim.AdamW(build("rfnet").parameters()), CPU)


def test_a_graph_is_recorded_after_a_warm_up_and_without_gradients(monkeypatch: pytest.MonkeyPatch):
    """The order of calls, with stand-ins for what only a card has."""
    calls: list[str] = []
    parameter = torch.nn.Parameter(torch.ones(1))

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            calls.append("wait")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def record(graph: Graph) -> Iterator[None]:
        assert parameter.grad is None
        calls.append("record")
        yield
        calls.append("recorded")

    def step() -> None:
        calls.append("step")
        parameter.grad = torch.ones(1)

    stand_ins: dict[str, Callable[..., Any]] = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "CUDAGraph": Graph,
        "graph": record,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    captured(step, torch.optim.AdamW([parameter]), torch.device("cuda"))()
    assert calls == ["wait", *["step"] * WARM_UP, "wait", "record", "step", "recorded", "replay"]
