"""Where tensors lie: `presence` in the CPU's memory, all else on the device; copies between them do not wait."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import PrepareBatch, default_prepare_batch
from torch import Tensor

__all__ = ["PreparePresence", "read_back", "send"]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the CPU to a device, without waiting for the device."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def read_back(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, waiting for the device.

    A training step calls this where values decide what is computed next, and nowhere else.
    """
    return tensor.cpu()


class PreparePresence(PrepareBatch):
    """Put image and label of a batch on the device, and keep `presence` in the CPU's memory.

    It decides what is computed; from a GPU it would have to come back, and each step would wait for the one before.

    Args:
        with_label: give the label to the network too.
    """

    def __init__(self, *, with_label: bool = False) -> None:
        self.with_label = with_label

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any, tuple[()], dict[str, Any]]:
        image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        inputs = {"presence": batchdata["presence"]}
        return image, label, (), inputs | ({"label": label} if self.with_label else {})
