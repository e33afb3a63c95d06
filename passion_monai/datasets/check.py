"""Reads every case of a datalist before training, and reports what it holds and what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose
from torch.utils.data import DataLoader
from tqdm import tqdm

from passion_monai.datasets.datalist import (
    SECTIONS,
    UNLABELLED_SECTION,
    check_every_modality,
    datalist_presence,
    modality_counts,
    read_datalist,
    read_json,
)
from passion_monai.faults import FAULT_KEY, Fault, TolerantDataset, raise_faults
from passion_monai.presence import missing_rates

__all__ = ["check_dataset"]

logger = logging.getLogger(__name__)


def check_dataset(
    datalist: str | Path,
    *,
    modalities: Sequence[str],
    transform: Callable,
    root: str | Path | None = None,
    num_workers: int = 0,
) -> None:
    """Read all images and labels of all sections, including hidden modalities, and log a summary.

    Args:
        datalist: path of the datalist.
        modalities: names of the M modalities.
        transform: from a case to its preprocessed images, as before training.
        root: folder that the datalist's paths are relative to, where it is no longer the one in the file.
        num_workers: processes that read.

    Raises:
        FileNotFoundError: when the datalist does not exist, or no case of a section has all of its files.
        ValueError: when there is something wrong with the datalist, or with cases, naming all of them, or when no
            training case has a modality.
    """
    content = read_json(datalist)
    sections = [name for name in (*SECTIONS, UNLABELLED_SECTION) if content.get(name)]
    cases = {name: read_datalist(datalist, name, modalities=modalities, root=root) for name in sections}
    everything = [case for members in cases.values() for case in members]
    whole = [{key: value for key, value in case.items() if key != "presence"} for case in everything]
    dataset = TolerantDataset(whole, Compose([transform, _Grid(modalities)]))
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    grids, faults = [], []
    for found in tqdm(loader, desc="Reading", unit="case"):
        if FAULT_KEY in found:
            faults.append(Fault(found["case"], found["file"], found[FAULT_KEY]))
            logger.error(found[FAULT_KEY])
        else:
            grids.append(found)
    for section, members in cases.items():
        logger.info(f"{section}: {_summary(members, modalities)}")
    for name, unit in (("shape", "voxels"), ("spacing", "mm")):
        logger.info(f"{name} of {len(grids)} cases that can be read: {_range([grid[name] for grid in grids])} {unit}")
    unvalidated = [name for name, n in modality_counts(cases.get("validation", []), modalities).items() if not n]
    if "validation" in cases and unvalidated:
        logger.warning(f"No validation case has {', '.join(unvalidated)}: the best weights are chosen without them.")
    raise_faults(
        faults,
        others=_absent_modalities(cases.get("training", []), modalities, datalist),
        outcome=f"Mend or remove these; the other {len(grids)} cases are in order.",
    )
    logger.info(f"All {len(grids)} cases can be used.")


def _absent_modalities(cases: Sequence[dict[str, Any]], modalities: Sequence[str], datalist: str | Path) -> list[str]:
    """What a training would say of modalities that none of its cases has."""
    try:
        if cases:
            check_every_modality(cases, modalities, source=datalist)
    except ValueError as error:
        return [str(error)]
    return []


class _Grid:
    """Keeps of a case the grid on which it came."""

    def __init__(self, modalities: Sequence[str]) -> None:
        self.modalities = modalities

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        meta = next(data[name].meta for name in self.modalities if name in data)
        spacing = affine_to_spacing(meta["original_affine"], r=len(meta["spatial_shape"]))
        return {"shape": [int(size) for size in meta["spatial_shape"]], "spacing": [float(step) for step in spacing]}


def _summary(cases: Sequence[dict[str, Any]], modalities: Sequence[str]) -> str:
    rates = missing_rates(datalist_presence(cases, modalities))
    counts = modality_counts(cases, modalities).items()
    parts = [f"{name} {count} (missing rate {rate:.3f})" for (name, count), rate in zip(counts, rates, strict=True)]
    labels = sum("label" in case for case in cases)
    return f"{len(cases)} cases, {labels} with a label, {', '.join(parts)}"


def _range(values: Sequence[Sequence[float]]) -> str:
    """The least and the largest value along each axis."""
    if not values:
        return "none"
    ends = zip(np.min(values, axis=0), np.max(values, axis=0), strict=True)
    return " x ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in ends)
