"""A training step by `torch.compile`, in parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from passion_monai.networks import Backbone

__all__ = ["compile_parts"]

MOST_GRAPHS = 64
"""Of all parts of a network together, since torch counts them as one function: `Module.__call__`."""


def compile_parts(network: Backbone, *, backend: str = "inductor") -> None:
    """Compile encoders, transformers and decoders, each by itself, when they are first called.

    What is between them asks `presence` which of them to call, so that a graph of the whole step would break there over
    and over. All encoders share one graph. Decoders have one for each set of modalities: with students in a batch
    (:class:`benchmarks.batched.BatchedDistillation`) that is one for each pattern of presence, else one more for each
    student. What cannot be compiled is an error, and does not run as it is instead.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS  # type: ignore[attr-defined]
    for part in _parts(network):
        part.compile(backend=backend, fullgraph=True, dynamic=False)


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are called; lists are not."""
    for module in network.children():
        if isinstance(module, nn.ModuleList):
            yield from _parts(module)
        else:
            yield module
