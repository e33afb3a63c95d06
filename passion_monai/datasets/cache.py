"""Preprocessed cases in files that all workers, ranks and later runs share."""

from __future__ import annotations

import glob
import logging
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import MetaTensor, PersistentDataset
from monai.data.utils import pickle_hashing
from torch import Tensor
from tqdm import tqdm

from passion_monai import __version__
from passion_monai.faults import Fault, find_fault
from passion_monai.files import make_folder, save_complete, split_volume

__all__ = ["FileCacheDataset"]

logger = logging.getLogger(__name__)
Item = Mapping[Hashable, Any]


class FileCacheDataset(PersistentDataset):
    """Applies the transforms before the first random one only once per case, and keeps the result in one file.

    Files are mapped into memory and a crop reads only its own part. Memory therefore grows neither with the cohort nor
    with the number of processes, which share the system's page cache. A file holds nothing for a missing modality. It
    depends on the case, the size and time of its images, and the transforms; if one of these changes, a new file is
    written and the old one stays. All files are written at the start; several processes share the work.

    Of MONAI's metadata only the affine is kept. Failed cases do not stop the others: ``faults`` lists them, and reading
    one raises an error.

    Args:
        data: the cases.
        transform: transforms; those before the first random one must be picklable.
        cache_dir: folder of the files, created if needed. A modality of a brain takes some 20 to 35 MB as float32.
        num_workers: threads that write the files; 0 uses the main thread only.

    Raises:
        RuntimeError: when a file in the folder cannot be read.
    """

    def __init__(
        self,
        data: Sequence[Item],
        transform: Sequence[Callable] | Callable,
        cache_dir: str | Path,
        num_workers: int = 0,
    ) -> None:
        make_folder(cache_dir)
        super().__init__(data, transform, cache_dir=cache_dir, hash_func=_hash_case, hash_transform=pickle_hashing)
        self.faults = self._prepare(num_workers)

    def _prepare(self, num_workers: int) -> list[Fault]:
        """Make the files that are not there; each rank starts elsewhere, and skips what others have made."""
        start = len(self.data) * idist.get_rank() // idist.get_world_size()
        missing = [item for item in [*self.data[start:], *self.data[:start]] if not self._path(item).is_file()]
        if not missing:
            return []
        logger.info(f"Preprocessing {len(missing)} of {len(self.data)} cases into {self.cache_dir}.")
        with ThreadPool(max(num_workers, 1)) as pool:
            done = tqdm(pool.imap_unordered(self._try, missing), total=len(missing), desc="Preprocessing", unit="case")
            return sorted(fault for fault in done if fault is not None)

    def _try(self, item: Item) -> Fault | None:
        try:
            self._write(item)
        except RuntimeError as error:
            return find_fault(item, error)
        return None

    def _path(self, item: Item) -> Path:
        name = self.hash_func(item).decode() + self.transform_hash
        return Path(self.cache_dir) / f"{name}.pt"  # type: ignore[arg-type]

    def _write(self, item: Item) -> None:
        path = self._path(item)
        if path.is_file():
            return
        prepared = _without_metadata(self._pre_transform(deepcopy(item)))
        save_complete(prepared, path)

    def _cachecheck(self, item: Item) -> dict[Hashable, Any]:
        self._write(item)
        path = self._path(item)
        try:
            values, affines = torch.load(path, mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"Case {item.get('case')}: {path} cannot be read; delete it, and the next run writes it again."
            ) from error
        return {**values, **{key: MetaTensor(values[key], affine=affine) for key, affine in affines.items()}}


def _hash_case(item: Item) -> bytes:
    """A hash of a case, the state of its files, and this package's version."""
    files = [path for value in item.values() if isinstance(value, str) for path in _files(split_volume(value)[0])]
    states = [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in files)]
    return bytes(pickle_hashing([__version__, repr(sorted(item.items(), key=str)), states]))


def _files(path: Path) -> list[Path]:
    """A file, with the voxels that lie beside a header, the files of a DICOM folder, or nothing where there is none."""
    if path.is_dir():
        return sorted(path.iterdir())
    if path.suffix.lower() == ".mhd":
        return sorted(file for file in path.parent.glob(f"{glob.escape(path.stem)}.*") if file.is_file())
    return [path] * path.is_file()


def _without_metadata(prepared: Item) -> tuple[dict[Hashable, Any], dict[Hashable, Tensor]]:
    """The values, and the affines of those that have one, so that plain tensors are all there is to load."""
    affines = {key: value.affine for key, value in prepared.items() if isinstance(value, MetaTensor)}
    return {**prepared, **{key: prepared[key].as_tensor().contiguous() for key in affines}}, affines
