"""A training step as one CUDA graph: its kernels are recorded once, and then all launched by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FilledCopies", "captured", "filled"]

WARM_UP = 3
"""Steps before the one that is recorded, in which libraries choose their kernels and the optimiser makes its state."""


def captured(step: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device) -> Callable[[], None]:
    """A function that does what `step` does, for the same image, label and presence each time.

    As torch's notes on CUDA graphs prescribe it: a warm-up on a stream of its own, then the record of the whole step,
    which begins without gradients, so that theirs is memory of the graph. The optimiser needs `capturable=True`.

    Raises:
        ValueError: when the device is no card.
    """
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a card, and this is a {device.type}")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), FilledCopies():
        step()
    return graph.replay


class FilledCopies(TorchDispatchMode):
    """Writes small tensors of the CPU's on the device value by value, instead of copying them.

    A graph holds no copy from memory that may be gone when it runs, which is why torch refuses to record one. What the
    kernels fill in is part of the graph: for one pattern of presence, as all of the graph is.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = kwargs or {}
        if function == torch.ops.aten._to_copy.default and _goes_to_the_device(args[0], settings):
            return filled(args[0], settings["device"]).to(settings.get("dtype") or args[0].dtype)
        return function(*args, **settings)


def _goes_to_the_device(tensor: Tensor, settings: dict[str, Any]) -> bool:
    device = settings.get("device")
    return tensor.device.type == "cpu" and device is not None and device.type != "cpu"


def filled(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on a device, by kernels that write its values."""
    values = [torch.full((1,), value, dtype=tensor.dtype, device=device) for value in tensor.flatten().tolist()]
    return torch.cat(values or [torch.empty(0, dtype=tensor.dtype, device=device)]).view(tensor.shape)
