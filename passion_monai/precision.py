"""Mixed precision, on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "at_least_float32", "autocast"]

PRECISIONS = ("float32", "bfloat16", "float16")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which convolutions and products run in a precision; "float32" leaves everything as it is.

    Raises:
        ValueError: when `precision` is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    enabled = precision != "float32"
    if not enabled and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision) if enabled else torch.bfloat16, enabled=enabled)


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32 if it is in half precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
