"""Memory: how much this process may use, how much it used, and what a worker will need."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from kernels.base import Kernel

CGROUP = Path("/sys/fs/cgroup")
WORKER_BASE_BYTES = 92 * 2**20
"""Resident memory of a worker that has imported what it needs and computed nothing (measured)."""

WRITTEN_CHUNKS = 2
"""Whole chunks of memory beside a tile that is written: the codec's copies."""

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Addresses that are never written to do not count against the machine's memory."""


def available_bytes() -> int:
    """Memory this process and its children may still use: the machine's, or the control group's if smaller."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for folder, limit, usage, inactive in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            room = int((folder / limit).read_text()) - int((folder / usage).read_text())
            counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or its limit is the word "max"
            continue
        # Cached files count as used, and give way to whoever needs the memory.
        available = min(available, room + int(counters.get(inactive, 0)))
    return max(available, 0)


def peak_bytes() -> int:
    """The largest resident memory this process had so far."""
    try:
        # Not what getrusage says: a new process begins there with the peak of the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)


def by_the_page(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros in Fortran order that takes memory where it is written to, page by page.

    NumPy's own arrays ask Linux for huge pages: of a matrix of which one triangle is written they take the whole, and
    several times as long, since huge pages are cleared, and on a virtual machine asked of its host, each.

    Raises:
        MemoryError: the system refuses so many addresses.
    """
    count = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        mapped = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except OSError as error:
        raise MemoryError(f"the system refuses {count} bytes: {error.strerror}") from error
    with contextlib.suppress(AttributeError, OSError):  # another system, which has none
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapped, dtype, math.prod(shape)).reshape(shape, order="F")


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it and can be asked to (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(worker_bytes: int) -> int:
    """Prepared blocks that a worker of so much memory may keep: half of it; tiles and scratch have the rest."""
    return max(worker_bytes // 2, 2**26)


@dataclass(frozen=True)
class TaskMemory:
    """What a worker holds at its peak, in bytes.

    base: interpreter and libraries. blocks: prepared blocks that it keeps.
    tile: results of one tile (all outputs), and what writing one takes.
    scratch: what the kernel needs while it computes a tile.
    """

    base: int
    blocks: int
    tile: int
    scratch: int

    @property
    def total(self) -> int:
        return self.base + self.blocks + self.tile + self.scratch


def task_memory(
    kernel: Kernel,
    shape: tuple[int, ...],
    prepared_bytes: int,
    n: int,
    dtype: str,
    blocks: int,
    worker_bytes: int,
) -> TaskMemory:
    """Peak memory of a worker.

    shape: of one sample as the kernel sees it; prepared_bytes: of one prepared sample; n: samples in the
    pool; blocks: prepared blocks that the tiles to compute read; worker_bytes: what the worker may use.
    """
    itemsize = np.dtype(dtype).itemsize
    side = min(kernel.tile_side(dtype), n)
    block = side * prepared_bytes
    # A ragged tile is written as a whole chunk.
    chunk = kernel.tile_side(dtype) ** 2 * itemsize
    return TaskMemory(
        WORKER_BASE_BYTES,
        min(blocks * block, max(cache_bytes(worker_bytes), 2 * block)),
        len(kernel.outputs) * side * side * itemsize + WRITTEN_CHUNKS * chunk,
        kernel.cost(side, side, shape, itemsize).scratch_bytes,
    )
