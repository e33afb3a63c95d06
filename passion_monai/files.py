"""Files that are complete under their final name, or not there; volumes of 4-D files."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "complete_file",
    "make_folder",
    "remove_unfinished",
    "save_complete",
    "split_volume",
    "volume_name",
    "writing",
]

_UNFINISHED = ".unfinished."
_VOLUME = re.compile(r"(?P<file>.+\.nii(?:\.gz)?)\[(?P<index>\d+)\]", re.IGNORECASE)


def volume_name(path: str | Path, index: int) -> str:
    """How one volume of a 4-D NIfTI file is called, counted from 0: ``x.nii.gz[2]``."""
    return f"{path}[{index}]"


def split_volume(path: str | Path) -> tuple[Path, int | None]:
    """The file, and which of its volumes is meant; None where all of the file is."""
    match = _VOLUME.fullmatch(str(path))
    return (Path(match["file"]), int(match["index"])) if match else (Path(path), None)


@contextmanager
def complete_file(path: str | Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Give a name to write a file under, which gets its final name when all of it has reached the disk.

    A process that is killed meanwhile leaves the file of before, and beside it a hidden one whose name begins with
    ``.unfinished.``. The name ends as the final one does, for writers that go by the suffix.

    Args:
        path: the final name; its folder is made.
        previous: a name in the same folder for the file of before, which is replaced if None.

    Raises:
        OSError: when it cannot be written, with the path and the remedy; nothing is left behind.
    """
    path = Path(path)
    make_folder(path.parent)
    unfinished = path.with_name(f"{_UNFINISHED}{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        with writing(path):
            yield unfinished
            _to_disk(unfinished)
            if previous is not None and path.is_file():
                path.replace(previous)
            unfinished.replace(path)
            _folder_to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let an error say what cannot be written.

    Raises:
        OSError: in place of one that comes from within, with the path and the remedy.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"Cannot write {path}: {reason}. Make room or choose another folder, and run again."
        ) from error


def save_complete(content: Any, path: str | Path, *, previous: Path | None = None) -> None:
    """`torch.save` by :func:`complete_file`.

    Raises:
        OSError: when it cannot be written, with the path and the remedy.
    """
    with complete_file(path, previous=previous) as unfinished, unfinished.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # A file of Python's has said why it could not be written; torch's error is what came of that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it.

    Raises:
        OSError: when it cannot be made, with the path and the remedy.
    """
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed processes have left in a folder; only where no other process is writing."""
    for leftover in Path(folder).glob(f"{_UNFINISHED}*"):
        leftover.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Let a renaming reach the disk; where folders cannot be opened, as in Windows, the system does it by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
