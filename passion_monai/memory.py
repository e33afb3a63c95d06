"""The C library's allocator, which by default gives large tensors back to the system again and again."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# From malloc.h of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, so that the next large tensor need not be mapped anew.

    A training step on a CPU allocates and frees tensors of 16 to 80 MB by the hundred. By default the GNU C library
    maps every one of them from the system anew, which has to clear its pages: up to a third of the time. Call this
    before the first large allocation. It affects the whole process, and no memory of a GPU, which has an allocator of
    its own.

    Returns:
        Whether the C library took it; False on systems without the GNU C library, where nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
