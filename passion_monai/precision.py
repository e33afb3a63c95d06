"""Mixed precision, on any device."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from passion_monai.config import check_choices

__all__ = ["PRECISIONS", "at_least_float32", "autocast", "check_precision"]

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "float16")
# Of the CPU, by oneDNN's kernels; torch's own code generator asks the same before it uses them.
_SUPPORT = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}


def check_precision(precision: str, device: str | torch.device) -> None:
    """Refuse an unknown precision, and warn of one that the processor has to imitate, at many times the cost.

    Raises:
        ValueError: when `precision` is not one of `PRECISIONS`.
    """
    check_choices(PRECISIONS, precision=precision)
    if torch.device(device).type != "cpu" or precision == "float32":
        return
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, _SUPPORT[precision])()
    if not supported:
        logger.warning(
            f"This processor has no {precision} arithmetic: each step can take ten times as long as in float32. "
            "Use --precision float32."
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which convolutions and products run in a precision; "float32" leaves everything as it is.

    Raises:
        ValueError: when `precision` is not one of `PRECISIONS`.
    """
    check_choices(PRECISIONS, precision=precision)
    enabled = precision != "float32"
    if not enabled and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision) if enabled else torch.bfloat16, enabled=enabled)


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32 if it is in half precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
