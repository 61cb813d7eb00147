"""Freed memory stays with the process, as a training step asks for the same blocks as the one before."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


@cache
def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep freed blocks, and return whether there is one to tell.

    By default it hands blocks of many megabytes, which activations are, back to the system and gets them anew, page by
    page and each page zeroed. `benchmarks/allocator.py` shows what that costs. The system has the memory back when the
    process ends.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not Linux, or another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
