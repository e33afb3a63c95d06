"""What all transforms share about a case: a dictionary with a key for each available modality."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.data import MetaTensor
from torch import Tensor

__all__ = ["Data", "plain", "present_modalities", "source_of", "where"]

Data = Mapping[Hashable, Any]


def present_modalities(data: Data, modalities: Sequence[Hashable]) -> list[Hashable]:
    """The modalities that a case has; an error when it has none."""
    present = [modality for modality in modalities if modality in data]
    if not present:
        names = ", ".join(map(str, modalities))
        raise ValueError(f"Case {data.get('case')}: none of the modalities {names} is there; at least one is needed.")
    return present


def plain(tensor: Tensor) -> Tensor:
    """The tensor without MONAI's metadata."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def where(data: Data, key: Hashable) -> str:
    """Which file of which case an error is about."""
    return f"Case {data.get('case')}: {key} file {data[key]}"


def source_of(image: Tensor) -> str:
    """Where an image was read from, for a message about it."""
    return str(image.meta.get("filename_or_obj")) if isinstance(image, MetaTensor) else "memory"
