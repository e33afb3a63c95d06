"""Conversion between the values in label files and class numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform

from passion_monai.transforms.case import Data, source_of

__all__ = ["LabelsToClassesd", "values_in_file"]

_SHOWN = 8  # of the values that a message lists
_LABEL_ROUNDING = 1e-3  # how far a label value may lie from its whole number


def values_in_file(data: Data, values: Sequence[int], key: str = "label_values") -> list[int]:
    """The value of each class in a case's label file: the case's own, unless the values for all cases include more.

    Then they declare classes that the data set's do not have.
    """
    own = [int(value) for value in data.get(key, values)]
    return list(values) if own == list(values[: len(own)]) else own


class LabelsToClassesd(MapTransform):
    """Turn the label values of a file into classes 0..K-1.

    Values within a thousandth of a whole number are rounded, as scaled labels and labels stored as floats need it.

    Args:
        keys: key of the label; a case may lack it.
        values: file value of each class, background first.
        values_key: key of values that the case has of its own, which then hold instead (data sets have changed them),
            unless `values` are these and more.

    Raises:
        ValueError: for a value that is not among them, and for own values of another number; the message names the
            case, the file and the values.
    """

    def __init__(self, keys: str, *, values: Sequence[int], values_key: str = "label_values") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.values = tuple(values)
        self.values_key = values_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        converted = dict(data)
        for key in self.key_iterator(converted):
            label = data[key]
            values = values_in_file(data, self.values, self.values_key)
            if len(values) != len(self.values):
                raise ValueError(
                    f"Case {data.get('case')}: {self.values_key} must be {len(self.values)} values, one for each "
                    f"class, got {values}."
                )
            given = label.as_tensor()
            held = torch.where((given - given.round()).abs() <= _LABEL_ROUNDING, given.round(), given)
            unknown = sorted(set(torch.unique(held).tolist()) - set(values))
            if unknown:
                shown = f"{unknown[:_SHOWN]}" + f" and {len(unknown) - _SHOWN} others" * (len(unknown) > _SHOWN)
                raise ValueError(
                    f"Case {data.get('case')}: the {key} holds the values {shown}, known are {values}, in "
                    f"{source_of(label)}; give the right file, or the right values as {self.values_key} of the case; "
                    "classes that the data set does not have are declared by --label_values, --class_names, --regions."
                )
            classes = torch.zeros_like(label, dtype=torch.uint8)
            for index, value in enumerate(values):
                classes[held == value] = index
            converted[key] = classes
        return converted
