"""The C library's allocator, told to keep the memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Reuse freed blocks, however large, instead of giving them back to the system.

    Activations are allocated and freed in every action. With glibc's defaults, blocks above a threshold that
    moves with their history go back at once, and the next one of that size is zeroed page by page: 16,000
    page faults made a forward of 43 ms take 68. Ranks and profiler must do the same, or one does not measure
    the other. Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
        mallopt(_M_MMAP_MAX, 0)  # no block of its own mapping, which is unmapped when freed
