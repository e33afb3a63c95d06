"""Prepares networks for MONAI's export commands, which support only one input.

`monai.bundle ckpt_export` and `onnx_export` call a network with a single random image. Our networks also
take `presence`, which must remain an input of the exported file. So the inference configuration has an id per command:
``network_script`` and ``network_onnx``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from passion_monai.networks.base import Backbone, find_presence

__all__ = ["PresenceFromImage", "trace_network"]


@torch.no_grad()
def trace_network(network: Backbone) -> torch.jit.ScriptModule:
    """TorchScript of a network in evaluation mode, with the inputs `image` and `presence`; it can load weights.

    One graph serves every combination of modalities, on batches of the size 1.
    """
    network.eval()
    image = torch.zeros(1, network.num_modalities, *network.img_size)
    traced = torch.jit.trace(network, (image, torch.ones(image.shape[:2], dtype=torch.bool)), check_trace=False)
    if not isinstance(traced, torch.jit.ScriptModule):
        raise TypeError(f"tracing must give a module, got {type(traced).__name__}.")
    return traced


class PresenceFromImage(nn.Module):
    """Wraps a network so that it needs only the image: a channel that is 0 everywhere counts as missing.

    Normalised images are never 0 everywhere, but a sliding window may contain only background. Its prediction then
    comes from the other modalities, or from none.

    Shape:
        - Input: image [B, M, H, W(, D)].
        - Output: logits [B, K, H, W(, D)].
    """

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image, find_presence(image))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the weights of the network itself."""
        return self.network.load_state_dict(state_dict, *args, **kwargs)
