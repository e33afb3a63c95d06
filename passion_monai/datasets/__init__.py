"""The datasets: which modalities and labels each has, and how its cases are found on disk.

A dataset is one file in this folder with a ``SPEC`` and a function ``discover(root)``, and its name in ``DATASETS``.
Nothing outside this folder names a modality or a label value.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["DATASETS", "DatasetSpec", "check_classes", "discover", "get_spec"]

DATASETS: tuple[str, ...] = ("brats", "myops")


@dataclass(frozen=True)
class DatasetSpec:
    """What the rest of the package needs to know about a dataset.

    Args:
        name: the name in ``DATASETS``.
        spatial_dims: 2 or 3.
        modalities: names of the M modalities; their order is that of channels, encoders and the columns of C.
        label_values: the k-th entry is the value of class k in the label files, background first. A case may carry
            its own ``label_values`` where years differ.
        class_names: names of the K classes.
        regions: the overlapping regions that are scored, each with its class indices.
        reference_split: number of training, validation and test patients in the paper.
        csv_modalities: order of the modalities in the masks of the authors' split files, where such files exist.
        csv_prefixes: what those files put before a case's id.
        dicom_codes: value, scheme and meaning of DICOM's code for those classes that it has one for, by their names.

    Raises:
        ValueError: when the fields contradict each other.
    """

    name: str
    spatial_dims: int
    modalities: tuple[str, ...]
    label_values: tuple[int, ...]
    class_names: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    reference_split: tuple[int, int, int]
    csv_modalities: tuple[str, ...] | None = None
    csv_prefixes: tuple[str, ...] = ()
    dicom_codes: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_classes(self.label_values, self.class_names, self.regions)
        if self.csv_modalities is not None and set(self.csv_modalities) != set(self.modalities):
            raise ValueError(f"csv_modalities must be a reordering of {self.modalities}, got {self.csv_modalities}.")


def check_classes(
    label_values: Sequence[int], class_names: Sequence[str], regions: Mapping[str, Sequence[int]]
) -> None:
    """Check that values, names and regions speak of the same K classes; see :class:`DatasetSpec`.

    Raises:
        ValueError: naming what contradicts what.
    """
    for name, values in (("label_values", label_values), ("class_names", class_names)):
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{name} must be a list with one entry per class, got {values!r}.")
    if not isinstance(regions, Mapping):
        raise ValueError(f"regions must be names with a list of class indices each, got {regions!r}.")
    if len(label_values) != len(class_names):
        raise ValueError(
            f"label_values and class_names must have the same length, one entry per class, got {list(label_values)} "
            f"and {list(class_names)}."
        )
    if len(label_values) < 2 or not all(isinstance(value, int) for value in label_values):
        raise ValueError(f"label_values must be two or more whole numbers, background first, got {list(label_values)}.")
    for name, values in (("label_values", label_values), ("class_names", class_names)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must be different for each class, got {list(values)}.")
    for region, classes in regions.items():
        listed = isinstance(classes, (list, tuple))
        if not listed or not classes or not set(classes) <= set(range(1, len(class_names))):
            raise ValueError(
                f"regions[{region!r}] must hold class indices from 1 to {len(class_names) - 1}, got {classes!r}."
            )


def get_spec(name: str) -> DatasetSpec:
    """Facts about the dataset of this name.

    Raises:
        ValueError: listing ``DATASETS`` when the name is not among them.
    """
    spec: DatasetSpec = _module(name).SPEC
    return spec


def discover(name: str, root: str | Path, *, keep_faulty: bool = False) -> list[dict[str, Any]]:
    """Find the cases of the dataset ``name`` below the folder ``root``.

    Args:
        name: of the dataset.
        root: the folder.
        keep_faulty: keep cases whose files contradict each other, with the reason under the key ``fault`` and without
            files, instead of an error.

    Returns:
        One dictionary per case, as :mod:`passion_monai.datasets.datalist` describes it, ordered by case id.

    Raises:
        ValueError: listing ``DATASETS`` when the name is not among them; or when files of a case contradict each other.
        FileNotFoundError: when ``root`` is no folder or holds no case.
    """
    cases: list[dict[str, Any]] = _module(name).discover(root, keep_faulty=keep_faulty)
    return cases


def _module(name: str) -> ModuleType:
    """A dataset's module; imported on demand, because it imports this one and is also run by ``python -m``."""
    if name not in DATASETS:
        raise ValueError(f"Unknown dataset {name!r}, expected one of {list(DATASETS)}.")
    return importlib.import_module(f"{__name__}.{name}")
