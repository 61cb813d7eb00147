"""Freed memory stays with the process: counted in page faults, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource", reason="page faults are counted on Unix only")

COUNT = """
import ctypes, resource, sys
from prunelab._memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no glibc")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(2):  # the second time, memory may be there from the first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    libc.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / 2**20)
"""


def faulted(how: str) -> float:
    """Return how many MiB a second block of 64 MiB brings in page by page."""
    run = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=False)
    if "no glibc" in run.stderr:
        pytest.skip("another C library")
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def test_a_freed_block_is_used_again() -> None:
    assert 10 * faulted("kept") < faulted("default")  # whatever the size of a page
