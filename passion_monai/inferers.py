"""Sliding-window inference that knows which modalities there are."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer, SlidingWindowInferer
from torch import Tensor

from passion_monai.devices import send
from passion_monai.networks.base import Backbone, find_presence
from passion_monai.networks.checkpoints import WeightsLoader
from passion_monai.precision import autocast
from passion_monai.presence import combinations, selected_combinations

__all__ = ["CombinationInferer", "EnsembleInferer", "PresenceInferer"]


class PresenceInferer(SlidingWindowInferer):
    """Class probabilities of whole volumes from the modalities that each has.

    Softmax comes before the windows are averaged. Each volume's own presence goes with all of its windows, whatever
    `sw_batch_size` is; without one, as other software calls an inferer, a modality that is 0 everywhere is missing. A
    volume given to a network in 2-D is predicted slice by slice along its last axis.

    Args:
        flip_axes: spatial axes; probabilities are averaged over all ways to flip a window along some of these.
        precision: of the network, one of :data:`passion_monai.precision.PRECISIONS`; probabilities are float32.
        kwargs: those of :class:`monai.inferers.SlidingWindowInferer`.

    Shape:
        - inputs: [B, M, H, W(, D)]; presence: bool [B, M].
        - Output: [B, K, H, W(, D)].
    """

    def __init__(self, *, flip_axes: Sequence[int] = (), precision: str = "float32", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flips = [flip for count in range(len(flip_axes) + 1) for flip in itertools.combinations(flip_axes, count)]
        self.precision = precision

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Backbone, presence: Tensor | None = None
    ) -> Tensor:
        presence = find_presence(inputs) if presence is None else presence
        presence = presence.cpu()  # once, where it lies on a GPU, and not for each window
        with autocast(inputs.device, self.precision):
            volumes = [self._infer_volume(inputs[n : n + 1], network, presence[n : n + 1]) for n in range(len(inputs))]
        return volumes[0] if len(volumes) == 1 else torch.cat(volumes)

    def _infer_volume(self, volume: Tensor, network: Backbone, presence: Tensor) -> Tensor:
        def predict(windows: Tensor) -> Tensor:
            return network(windows, presence.expand(len(windows), -1)).float().softmax(dim=1)

        return self._slide(volume, network, predict)

    def _slide(self, volume: Tensor, network: Backbone, predict: Callable[[Tensor], Tensor]) -> Tensor:
        by_slice = volume.ndim - 2 > network.spatial_dims
        images = volume[0].movedim(-1, 0) if by_slice else volume  # [D, M, H, W]
        result = super().__call__(images, lambda windows: self._average_flips(windows, predict))
        if not isinstance(result, Tensor):
            raise TypeError(f"the network must put out one tensor, got {type(result).__name__}.")
        return result.movedim(0, -1)[None] if by_slice else result

    def _average_flips(self, windows: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        total = predict(windows)
        for flip in self.flips[1:]:
            axes = [axis + 2 for axis in flip]
            total = total + predict(windows.flip(axes)).flip(axes)
        return total / len(self.flips)


class CombinationInferer(PresenceInferer):
    """Class probabilities of whole volumes for many modality combinations, each window being encoded once.

    Args:
        num_modalities: number M of modalities.
        selection: of the combinations, see :func:`passion_monai.presence.selected_combinations`.
        kwargs: those of :class:`PresenceInferer`.

    Shape:
        - inputs: [B, M, H, W(, D)]; presence: bool [B, M].
        - Output: [B, P, K, H, W(, D)], P = 2^M - 1 in the order of :func:`passion_monai.presence.combinations`;
          NaN for a combination that needs a modality which the volume lacks, or that is not selected.
    """

    def __init__(self, *, num_modalities: int, selection: str = "all", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.combinations = torch.from_numpy(combinations(num_modalities))
        self.selected = torch.from_numpy(selected_combinations(num_modalities, selection))

    def _infer_volume(self, volume: Tensor, network: Backbone, presence: Tensor) -> Tensor:
        available = self.selected & ~(self.combinations & ~presence).any(dim=1)
        subsets = self.combinations[available, None]  # each [1, M]

        def predict(windows: Tensor) -> Tensor:
            features = network.encode(windows, presence)
            outputs = [network.decode(features, subset).logits for subset in subsets]
            return torch.stack([logits.float().softmax(dim=1) for logits in outputs], dim=1).flatten(1, 2)

        probabilities = self._slide(volume, network, predict).unflatten(1, (int(available.sum()), network.num_classes))
        if available.all():  # the usual case, of gigabytes
            return probabilities
        result = probabilities.new_full((1, len(available), *probabilities.shape[2:]), torch.nan)
        (indices,) = available.nonzero(as_tuple=True)
        return result.index_copy_(1, send(indices, result.device), probabilities)


class EnsembleInferer(Inferer):
    """The mean of what an inferer puts out with each of several checkpoints of the same network.

    Args:
        inferer: whose results are averaged.
        weights: the checkpoints; a single one changes nothing.
    """

    def __init__(self, inferer: PresenceInferer, weights: WeightsLoader) -> None:
        self.inferer = inferer
        self.weights = weights

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Backbone, presence: Tensor | None = None
    ) -> Tensor:
        results = (self.inferer(inputs, network, presence) for _ in self.weights.in_turn())
        return functools.reduce(operator.iadd, results).div_(len(self.weights.paths))  # in place: it may be gigabytes
