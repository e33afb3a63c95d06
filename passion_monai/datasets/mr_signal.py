"""MR physics and random fields of all phantoms: tissues, fields on the voxels of a case, the receiver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Grid", "Tissue", "receive"]

Floats = NDArray[np.float32]

RELAXIVITY = 4.1e-3  # l/(mmol ms), gadopentetate in plasma at 1.5 T (Rohrer et al., Investigative Radiology 40, 2005)


@dataclass(frozen=True)
class Tissue:
    """Relaxation times, proton density (water = 1) and concentration of contrast agent.

    ``variation`` is the relative standard deviation of the times between cases, and of the signal within a tissue.
    """

    t1_ms: float
    t2_ms: float
    proton_density: float
    contrast_agent_mmol: float = 0.0  # per litre
    variation: float = 0.03


class Grid:
    """The voxels of one case: draws smooth noise at the voxels of `mask`, and writes values there into a volume."""

    def __init__(self, shape: Sequence[int], spacing: Sequence[float], rng: np.random.Generator) -> None:
        self.shape = tuple(shape)
        self.spacing = tuple(spacing)
        self.rng = rng
        self.mask = np.ones(self.shape, bool)

    def count(self, volume_ml: float) -> int:
        """The number of voxels in ``volume_ml``: at least one, and fewer than in `mask`."""
        voxels = round(volume_ml * 1000 / float(np.prod(self.spacing)))
        return min(max(voxels, 1), int(self.mask.sum()) - 1)

    def noise(self, length_mm: float) -> Floats:
        """A Gaussian random field of unit variance that varies over ``length_mm``, at the voxels of `mask`.

        White noise on a grid with this pitch, interpolated by Gaussians of this width: separable, therefore fast.
        """
        spread = []
        for size, step in zip(self.shape, self.spacing, strict=True):
            width = max(length_mm, step)
            nodes = np.arange(-3 * width, size * step + 3 * width, width)
            weights = np.exp(-0.5 * ((np.arange(size)[:, None] * step - nodes) / width) ** 2)
            spread.append((weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32))
        white = self.rng.standard_normal([weights.shape[1] for weights in spread], dtype=np.float32)
        field: Floats = np.einsum("abc,ia,jb,kc->ijk", white, *spread, optimize=True)[self.mask]
        return field

    def volume(self, values: NDArray) -> NDArray:
        """A volume with ``values`` at the voxels of `mask` and 0 elsewhere."""
        volume = np.zeros(self.shape, values.dtype)
        volume[self.mask] = values
        return volume


def receive(image: Floats, level: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """The image of a signal: adds Rician noise of 1.2 to 4 % of `level` and a random gain; at least 1."""
    real, imaginary = level * rng.uniform(0.012, 0.04) * rng.standard_normal((2, image.size), dtype=np.float32)
    gain = float(np.exp(rng.uniform(np.log(200), np.log(2000)))) / level
    image = gain * np.hypot(image + real, imaginary)
    # 0 is reserved for the background, so that all modalities have the same mask.
    return np.clip(np.rint(image), 1, np.iinfo(np.int16).max).astype(np.int16)
