"""Sliding-window inference that knows which modalities there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from passion_monai.networks.base import Backbone
from passion_monai.presence import combinations

__all__ = ["CombinationInferer", "PresenceInferer"]


class PresenceInferer(SlidingWindowInferer):
    """Class probabilities of whole volumes from the modalities that each has.

    The arguments are those of :class:`monai.inferers.SlidingWindowInferer`. Softmax comes before the windows are
    averaged. Each volume's own presence goes with all of its windows, whatever `sw_batch_size` is.

    Shape:
        - inputs: [B, M, H, W(, D)]; presence: bool [B, M].
        - Output: [B, K, H, W(, D)].
    """

    def __call__(self, inputs: Tensor, network: Backbone, presence: Tensor) -> Tensor:  # type: ignore[override]
        volumes = [
            self._infer_volume(inputs[n : n + 1], network, presence[n : n + 1].to(inputs.device))
            for n in range(len(inputs))
        ]
        return torch.cat(volumes)

    def _infer_volume(self, volume: Tensor, network: Backbone, presence: Tensor) -> Tensor:
        def predict(windows: Tensor) -> Tensor:
            return network(windows, presence.expand(len(windows), -1)).float().softmax(dim=1)

        return self._slide(volume, predict)

    def _slide(self, volume: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        result = super().__call__(volume, predict)
        if not isinstance(result, Tensor):
            raise TypeError(f"the network must put out one tensor, got {type(result).__name__}.")
        return result


class CombinationInferer(PresenceInferer):
    """Class probabilities of whole volumes for many modality combinations, each window being encoded once.

    Args:
        num_modalities: M.
        kwargs: those of :class:`monai.inferers.SlidingWindowInferer`.

    Shape:
        - inputs: [B, M, H, W(, D)]; presence: bool [B, M].
        - Output: [B, P, K, H, W(, D)], P = 2^M - 1 in the order of :func:`passion_monai.presence.combinations`;
          NaN for a combination that needs a modality which the volume lacks.
    """

    def __init__(self, *, num_modalities: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.combinations = torch.from_numpy(combinations(num_modalities))

    def _infer_volume(self, volume: Tensor, network: Backbone, presence: Tensor) -> Tensor:
        combinations_ = self.combinations.to(volume.device)
        available = ~(combinations_ & ~presence).any(dim=1)

        def predict(windows: Tensor) -> Tensor:
            features = network.encode(windows, presence)
            outputs = [network.decode(features, combination[None]).logits for combination in combinations_[available]]
            return torch.stack([logits.float().softmax(dim=1) for logits in outputs], dim=1).flatten(1, 2)

        probabilities = self._slide(volume, predict).unflatten(1, (int(available.sum()), network.num_classes))
        result = probabilities.new_full((1, len(available), *probabilities.shape[2:]), torch.nan)
        result[:, available] = probabilities
        return result
