"""From probabilities on the network's grid to classes on the patient's own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from torch import Tensor

from passion_monai.presence import combination_name, combinations
from passion_monai.transforms.case import Data, plain

__all__ = [
    "FULL_CONFIDENCE",
    "ReplaceSmallClassesd",
    "RestoreClassesd",
    "find_temperature",
    "resample_probabilities",
    "seen_voxels",
]

_ON_GRID = 0.5  # of a voxel's interpolation weights lie on the network's grid: its centre does
_NO_NUMBERS = (
    "The network puts out NaN: its weights have diverged or are damaged, or float16 is too small for it. Try other "
    "weights, or --precision float32."
)
FULL_CONFIDENCE = 32767
"""The int16 that stands for a confidence of 1. A byte would be off by 0.002, as much as a calibration error may be."""


class RestoreClassesd(MapTransform):
    """Turn class probabilities on the network's grid into class maps on the grid that the case came on.

    Probabilities are resampled linearly, then the most likely class is taken; outside the cropped region it is the
    background.

    Args:
        keys: key of the probabilities, [K, ...] or [P, K, ...] for P combinations, on the grid of `image_key`.
        image_key: the image that they were computed from.
        label_key: where the case has it, the maps get the label's grid; otherwise the original grid of the image.
        confidence_key: where to put the probability of the most likely class, if it is wanted.
        probabilities_key: where to put the probabilities themselves, if they are wanted.
        temperatures: what :func:`passion_monai.evaluation.temperature.read_temperatures` gives, by which these
            probabilities are calibrated; confidences too, put beside the plain ones with ``calibrated_`` before their
            key. The class maps do not change. A combination without a temperature keeps its probabilities, and has no
            calibrated confidence.
        modalities: names of the M modalities, if there are temperatures.

    Shape:
        - Output: int16 [1, ...] or [P, ...]; -1 everywhere for a combination whose probabilities are all NaN.
        - Confidence: int16, the same; from 1 to `FULL_CONFIDENCE`, and 0 for what the network did not see.
        - Probabilities: float32 [K, ...], of a single combination; outside the cropped region those of background.

    Raises:
        ValueError: when all combinations are NaN, or a part of one is.
    """

    def __init__(
        self,
        keys: str = "pred",
        *,
        image_key: str = "image",
        label_key: str = "label",
        confidence_key: str | None = None,
        probabilities_key: str | None = None,
        temperatures: Mapping[str, Any] | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.label_key = label_key
        self.confidence_key = confidence_key
        self.probabilities_key = probabilities_key
        self.temperatures = temperatures
        self.modalities = tuple(modalities)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        restored = dict(data)
        image = data[self.image_key]
        label = data.get(self.label_key)  # MONAI's evaluator puts None where a case has none
        if label is not None:
            affine, shape = label.affine, label.shape[1:]
        else:
            affine, shape = torch.as_tensor(image.meta["original_affine"]), image.meta["spatial_shape"]
        shape = tuple(int(size) for size in shape)
        for key in self.key_iterator(restored):
            single = data[key].ndim == image.ndim
            volumes = data[key][None] if single else data[key]
            if all(_is_absent(volume) for volume in volumes):
                raise ValueError(_NO_NUMBERS)
            scales = self._scales(data, single=single) if self.temperatures else [None] * len(volumes)
            parts = [
                self._restore(volume, scale, image.affine, affine, shape)
                for volume, scale in zip(volumes, scales, strict=True)
            ]
            maps, confidences, calibrated = zip(*parts, strict=True)
            restored[key] = MetaTensor(torch.stack(maps), affine=affine)
            if self.confidence_key is not None:
                restored[self.confidence_key] = torch.stack(confidences)
                restored |= {f"calibrated_{self.confidence_key}": torch.stack(calibrated)} if self.temperatures else {}
            if self.probabilities_key is not None:
                moved = _normalised(resample_probabilities(data[key], image.affine, affine, shape))
                restored[self.probabilities_key] = MetaTensor(_tempered(moved, scales[0]), affine=affine)
        return restored

    def _scales(self, data: Data, *, single: bool) -> list[float | None]:
        """The temperature of each class map."""
        rows = [data["presence"].tolist()] if single else combinations(len(self.modalities)).tolist()
        return [find_temperature(self.temperatures, row, self.modalities) for row in rows]

    def _restore(
        self, probabilities: Tensor, temperature: float | None, source: Tensor, affine: Tensor, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Class map and, if they are wanted, its confidence and the calibrated one."""
        if _is_absent(probabilities):
            absent = torch.full(tuple(shape), -1, dtype=torch.int16)
            return absent, torch.zeros_like(absent), torch.zeros_like(absent)
        moved = resample_probabilities(probabilities, source, affine, shape)
        if moved.isnan().any():
            raise ValueError(_NO_NUMBERS)
        classes = moved.argmax(dim=0).to(torch.int16)
        if self.confidence_key is None:
            return classes, None, None
        unknown = torch.zeros_like(classes)
        calibrated = unknown if temperature is None else _confidence(_tempered(moved, temperature), seen_voxels(moved))
        return classes, _confidence(moved, seen_voxels(moved)), calibrated


def _is_absent(probabilities: Tensor) -> bool:
    """Whether these are of a combination that the case does not have."""
    return bool(plain(probabilities).isnan().all())


def resample_probabilities(probabilities: Tensor, source: Tensor, affine: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample probabilities [K, ...] from the network's grid to another one, linearly, with 0 outside of the first.

    Args:
        probabilities: of K classes.
        source: affine of the network's grid.
        affine: affine of the other one.
        shape: of the other one.
    """
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
    on_network_grid = MetaTensor(plain(probabilities).cpu(), affine=source.cpu())
    return plain(resample(on_network_grid, dst_affine=affine.cpu(), spatial_size=shape))


def seen_voxels(probabilities: Tensor) -> Tensor:
    """Which voxels of resampled probabilities [K, ...] lie inside the network's grid."""
    return probabilities.sum(dim=0) > _ON_GRID


def _normalised(probabilities: Tensor) -> Tensor:
    """K probabilities [K, ...] that were resampled with zeros around them, so that they add up to 1 everywhere.

    The most likely class stays what it was; where there is nothing but zeros, that is the background.
    """
    total = probabilities.sum(dim=0)
    background = torch.eye(len(probabilities))[0].view(-1, *[1] * total.ndim)
    return (probabilities / total).where(total > 0, background)


def _tempered(probabilities: Tensor, temperature: float | None) -> Tensor:
    """Probabilities [K, ...] calibrated by a temperature; as they are without one.

    ``softmax(log(p) / T) = p^(1 / T) / sum_k p_k^(1 / T)``: Guo et al., Eq. (9), on what the mean over windows and
    flips leaves of the logits.
    """
    if temperature is None:
        return probabilities
    powers = probabilities.pow(1 / temperature)
    return powers / powers.sum(dim=0)


def find_temperature(
    temperatures: Mapping[str, Any] | None, presence: Sequence[bool], modalities: Sequence[str]
) -> float | None:
    """The temperature of a combination; None where none was fitted."""
    fitted = (temperatures or {"combinations": {}})["combinations"].get(combination_name(presence, modalities))
    return None if fitted is None else float(fitted["temperature"])


def _confidence(probabilities: Tensor, seen: Tensor) -> Tensor:
    """The highest of K probabilities [K, ...], in proportion to their sum, as int16; 0 where they were not seen."""
    share = probabilities.amax(dim=0) / probabilities.sum(dim=0)
    return (share * FULL_CONFIDENCE).round().clamp(1, FULL_CONFIDENCE).where(seen, 0).to(torch.int16)


class ReplaceSmallClassesd(MapTransform):
    """Replace a class by another one where too few voxels of it are predicted.

    Challenges use this where empty regions of the label matter much: in a patient without enhancing tumour, the BraTS
    challenge scored a single predicted voxel as entirely wrong. It is not part of PASSION.

    Args:
        keys: key of the class maps, [P, ...]; each is taken by itself.
        minimum_voxels: for each class that this is done to, in this order, the least number of voxels that stays.
        replacement: for each of them the class that fewer voxels become.

    Raises:
        ValueError: when the two are not of the same classes, or a class is to be replaced by itself.
    """

    def __init__(
        self, keys: str = "pred", *, minimum_voxels: Mapping[int, int], replacement: Mapping[int, int]
    ) -> None:
        super().__init__(keys)
        for name, given in (("minimum_voxels", minimum_voxels), ("replacement", replacement)):
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} must give a whole number for each class, as in {{3: 500}}, got {given!r}.")
        # Read from JSON, the classes are texts.
        self.minimum_voxels = {int(index): int(number) for index, number in minimum_voxels.items()}
        self.replacement = {int(index): int(other) for index, other in replacement.items()}
        if set(self.minimum_voxels) != set(self.replacement) or any(k == v for k, v in self.replacement.items()):
            raise ValueError(
                "minimum_voxels and replacement must be of the same classes, and none be replaced by itself, got "
                f"{self.minimum_voxels} and {self.replacement}."
            )

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        replaced = dict(data)
        for key in self.key_iterator(replaced):
            replaced[key] = data[key].clone()
            for classes in plain(replaced[key]):
                self._replace(classes)
        return replaced

    def _replace(self, classes: Tensor) -> None:
        for index, number in self.minimum_voxels.items():
            mask = classes == index
            if int(mask.count_nonzero()) < number:
                classes[mask] = self.replacement[index]
