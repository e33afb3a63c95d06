"""One training or evaluation at a time in a folder, and no training over another by mistake."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import sys
from pathlib import Path
from typing import IO

import ignite.distributed as idist

from passion_monai.distributed import Agreement
from passion_monai.files import make_folder, writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["claim_folder", "lock_folder"]

logger = logging.getLogger(__name__)

_LOCKED_BYTE = 2**30  # far behind the text: Windows lets nobody read what is locked
_held: set[tuple[int, Path]] = set()
"""The lock files that a process holds; a process that was forked from it holds none of them."""


def claim_folder(output_dir: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Reserve a folder for this process's training until the process ends, and protect a training that is in it.

    Of several processes that train together the first one holds the lock, and all of them fail if it cannot.

    Args:
        output_dir: the folder; it is made.
        resume: whether the training that the folder holds is to go on.
        overwrite: whether a new one may replace it.

    Raises:
        OSError: when the folder cannot be written to.
        RuntimeError: when another process trains in it.
        ValueError: when it holds weights, and neither `overwrite` is set nor `resume` with a checkpoint to go on from.
    """
    refusal: Exception | None = None
    if idist.get_rank() == 0:
        try:
            lock_folder(output_dir, "training", go_on="continue it with --resume True")
            if not overwrite:
                _check_that_nothing_is_replaced(Path(output_dir) / "models", resume=resume)
        except (OSError, RuntimeError, ValueError) as error:
            refusal = error
    if Agreement().any(refusal is not None):
        raise refusal or RuntimeError(f"The first process says why it cannot train in {output_dir}.")


def _check_that_nothing_is_replaced(models: Path, *, resume: bool) -> None:
    weights = sorted(path.name for path in models.glob("*.pt"))
    can_resume = any(name.startswith("last.") for name in weights)  # weights that came from elsewhere cannot
    if not weights or (resume and can_resume):
        return
    begin = "Continue the old one with --resume True, give" if can_resume else "Give"
    raise ValueError(
        f"{models} holds {', '.join(weights)}, which a new training would replace. {begin} another --output_dir, or "
        "allow the replacement with --overwrite True."
    )


def lock_folder(folder: str | Path, work: str, *, go_on: str) -> None:
    """Reserve a folder for one kind of work of this process, until the process ends.

    The lock is the operating system's, so that nothing of it is left of a process that was killed.

    Args:
        folder: it is made.
        work: what the process does in it, such as ``training``.
        go_on: how that of another process is taken up when it has ended.

    Raises:
        OSError: when the folder cannot be written to.
        RuntimeError: when another process does the same in it.
    """
    path = make_folder(folder).resolve() / f".{work}.lock"
    if (os.getpid(), path) in _held:
        return
    with writing(path):
        file = path.open("a+", encoding="utf-8")
    try:
        _lock_file(file)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise RuntimeError(
            f"{folder} is in use by the {work} of {holder}. Give another --output_dir; or wait for it to end, or "
            f"end it, and {go_on}."
        ) from error
    except OSError as error:
        logger.warning(f"{path} cannot be locked ({error.strerror}): start no second {work} in this folder.")
    with writing(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    atexit.register(file.close)  # before, it would be a lock no more
    _held.add((os.getpid(), path))


def _lock_file(file: IO[str]) -> None:
    """Lock a file for this process alone: not for those forked from it, which may outlive it for some seconds."""
    if sys.platform == "win32":
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
