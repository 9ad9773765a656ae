"""Main memory that a process keeps for its next tensors."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's `mallopt`."""
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let freed memory be used again instead of going back to the system, where the C library is glibc.

    A step on a CPU makes and frees the same maps each time. Pages that come from the system are cleared and mapped
    one by one when they are first touched, which takes longer than an element-wise operation on them (docs/log.md).
    The process stays as large as it was at its largest; on a GPU nothing of this matters.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
