"""What the machines that will work do in a second, measured before a run: entries, products, bytes from the disk."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from kernels.arrays import to_device
from kernels.base import Kernel, Prepared
from kernels.costs import RATES
from kernels.features.base import FeatureMap

from . import device, memory
from .precomputed import sizes

CALIBRATION_SECONDS = 0.25

GROUPED = 48
"""Second images that compiled code is timed with, which takes them in groups of 16 or fewer at a time."""

CACHED_READ = 2e9
"""Bytes per second of tiles that lie in the page cache, their checksums included."""

PROBE_BYTES = 2**26

LARGEST_TRIED = 2**30
"""Bytes of weights and scratch beyond which a map is not timed: drawing them would take longer than any plan."""

MAP_EFFICIENCY = 0.7
"""Of the rate of a product, what the products of a feature map are thought to reach before it can be timed."""

PRODUCT = 1 / RATES[8].product
"""Operations per second of a float64 product on one core of the machine of the benchmarks."""

T = TypeVar("T")


class Ask(Protocol):
    def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


@dataclass(frozen=True)
class Speed:
    """Rates per second.

    entries: of the matrix, of one worker. operations: of a float64 product in the driver, with the threads that a
    solve may use. worker, worker_single: of a float64 and of a float32 product in one worker. read: bytes from the
    disk under the root, all workers together.
    """

    entries: float
    operations: float
    worker: float
    worker_single: float
    read: float = CACHED_READ


def here(function: Callable[..., T], *arguments: Any) -> T:
    """Ask this process."""
    return function(*arguments)


def path_of(kernel: Kernel, shape: tuple[int, ...], dtype: str) -> tuple[str, str]:
    """Name of the code that this process computes tiles of samples of ``shape`` by, and a remark or nothing.

    Raises:
        KernelError: the path that is asked for is not there, or cannot compute the kernel.
    """
    block = device.placed(sample(kernel, shape, dtype, 1))
    return kernel.path(block), kernel.remark(block)


def calibrate(
    kernel: Kernel,
    shape: tuple[int, ...],
    dtype: str,
    seconds: float = CALIBRATION_SECONDS,
    ask: Ask = here,
) -> Speed:
    """Time the kernel where its tiles will be computed for about ``seconds``, and products there and here."""
    entries = ask(entries_per_second, kernel, shape, dtype, seconds)
    double, single = (ask(worker_operations, name) for name in ("float64", "float32"))
    return Speed(entries, _operations(np.ones((1024, 1024))), double, single)


def map_path() -> str:
    """Name of the array library that this process computes features with."""
    return "cupy" if device.used() else "numpy"


def calibrate_map(
    feature_map: FeatureMap,
    learned: Path | None,
    shape: tuple[int, ...],
    dtype: str,
    seconds: float = CALIBRATION_SECONDS,
    ask: Ask = here,
) -> Speed:
    """As ``calibrate``, with features, single numbers, in the place of entries.

    learned: folder of what the map learned. A map that has still to learn, or is too large to be tried, is not timed:
    the time of its features follows from what it says that they cost, at the rate of a product.
    """
    double, single = (ask(worker_operations, name) for name in ("float64", "float32"))
    too_large = feature_map.feature_cost(1, shape, np.dtype(dtype).itemsize).scratch_bytes > LARGEST_TRIED
    if too_large or (feature_map.learns and learned is None):
        product = MAP_EFFICIENCY * (single if dtype == "float32" else double)
        call = RATES[np.dtype(dtype).itemsize].transcendental
        features = features_at(feature_map, shape, dtype, product, 1 / call)
    else:
        described = json.dumps(feature_map.describe(), sort_keys=True)
        folder = None if learned is None else str(learned)
        features = ask(features_per_second, described, folder, shape, dtype, seconds)
    return Speed(features, _operations(np.ones((1024, 1024))), double, single)


def features_at(
    feature_map: FeatureMap, shape: tuple[int, ...], dtype: str, operations: float, transcendentals: float
) -> float:
    """Features, single numbers, per second by what the map says that they cost, at so many operations of products and
    calls of exp, arccos or sqrt per second."""
    side = feature_map.tile_side(dtype)
    cost = feature_map.feature_cost(side, shape, np.dtype(dtype).itemsize)
    seconds = cost.operations / operations + cost.transcendentals / transcendentals
    return side * feature_map.width(shape) / max(seconds, 1e-12)


def features_per_second(
    description: str, learned: str | None, shape: tuple[int, ...], dtype: str, seconds: float
) -> float:
    """Features, single numbers, per second of one core or device; a map's description and folder as
    ``features.load_kernel`` takes them."""
    from threadpoolctl import threadpool_limits

    from .features import load_kernel

    feature_map = load_kernel(description, learned)
    assert isinstance(feature_map, FeatureMap)
    largest, size = feature_map.tile_side(dtype), 1
    with threadpool_limits(1):
        _feature_seconds(feature_map, shape, dtype, size)  # what is loaded, compiled or allocated once
        while (taken := _feature_seconds(feature_map, shape, dtype, size)) < seconds / 4 and size < largest:
            size = min(size * 2, largest)
    return size * feature_map.width(shape) / taken


def entry_operations(kernel: Kernel, shape: tuple[int, ...], dtype: str) -> float:
    """How many float64 operations of a product take as long as an entry of the matrix.

    By what the kernel says that it costs, at the rates of the machine of the benchmarks: the same number on any
    machine, busy or not, for what must not depend on times.
    """
    side, itemsize = kernel.tile_side(dtype), np.dtype(dtype).itemsize
    cost, rates = kernel.cost(side, side, shape, itemsize), RATES[itemsize]
    seconds = cost.operations * rates.product + cost.transcendentals * rates.transcendental
    return max(seconds / side**2 * PRODUCT, 1.0)


def entries_per_second(kernel: Kernel, shape: tuple[int, ...], dtype: str, seconds: float) -> float:
    """Entries of the matrix per second of one core or device, by the path that this process takes.

    Blocks are as wide as that path wants them: a device needs many pairs at once, compiled code takes second
    images in groups, and of a block with itself a kernel may compute one triangle alone.
    """
    from threadpoolctl import threadpool_limits

    largest = min(kernel.tile_side(dtype), 1024)
    grouped = "compiled" in path_of(kernel, shape, dtype)[0]
    least = largest if device.used() else min(GROUPED, largest) if grouped else 1
    size, block = 1, device.placed(sample(kernel, shape, dtype, least))
    with threadpool_limits(1):
        _seconds(kernel, block[:1], block)  # what is loaded, compiled or allocated once
        while True:
            if len(block) < size:
                block = device.placed(sample(kernel, shape, dtype, size))
            # As if of another pool: a sample with itself may cost more than a pair.
            some = replace(block[:size], pool="others")
            taken = _seconds(kernel, some, block)
            if taken > seconds / 4 or size >= largest or len(some) < size:
                if taken < seconds:  # what else happens on the machine meets one call or the other
                    taken = min(taken, _seconds(kernel, some, block))
                return len(some) * len(block) / taken
            size = min(size * 2, largest)


def worker_operations(dtype: str) -> float:
    """Operations per second of a square product in one worker: on its device, or with one thread on the host."""
    from threadpoolctl import threadpool_limits

    side = 4096 if device.used() else 512
    A = np.ones((side, side), dtype)
    with threadpool_limits(1):
        return _operations(to_device(A) if device.used() else A)


def read_rate(root: Path, needed: int) -> float:
    """Bytes per second that reading ``needed`` bytes under a root again and again takes from.

    What fits the memory that is free comes from the page cache; of more, a file that is written for it and
    dropped from that cache tells the disk's rate, where the system lets it be dropped.
    """
    if needed < memory.available_bytes() / 2:
        return CACHED_READ
    folder = nearest_folder(root)
    return min(_disk_rate(folder), CACHED_READ)


def nearest_folder(path: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    folder = path.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def sample(kernel: Kernel, shape: tuple[int, ...], dtype: str, n: int) -> Prepared:
    """A prepared block of n random samples, to time a kernel or to learn the size of what it prepares.

    Of precomputed matrices the first n samples, or all where there are fewer.
    """
    stored, _ = sizes(kernel)
    if stored:
        return kernel.prepare(np.arange(min(n, stored), dtype=np.float64)[:, None])
    X = np.random.default_rng(0).random((n, *shape)).astype(dtype)
    return kernel.prepare(X)


@lru_cache(maxsize=8)
def _disk_rate(folder: Path) -> float:
    content = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            for _ in range(PROBE_BYTES // len(content)):
                stream.write(content)
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            stream.seek(0)
            began = time.perf_counter()
            while stream.read(2**22):
                pass
            return PROBE_BYTES / (time.perf_counter() - began)
    except OSError:  # no room, or not ours to write: the plan says so where it matters
        return CACHED_READ


def _operations(A: Any) -> float:
    A @ A
    device.finish()
    began = time.perf_counter()
    A @ A
    device.finish()
    return 2 * len(A) ** 3 / max(time.perf_counter() - began, 1e-9)


def _feature_seconds(feature_map: FeatureMap, shape: tuple[int, ...], dtype: str, n: int) -> float:
    X = np.random.default_rng(0).random((n, *shape)).astype(dtype)
    X = to_device(X) if device.used() else X
    started = time.perf_counter()
    feature_map.features(X)
    device.finish()
    return max(time.perf_counter() - started, 1e-9)


def _seconds(kernel: Kernel, a: Prepared, b: Prepared) -> float:
    started = time.perf_counter()
    kernel.pair(a, b)
    device.finish()
    return max(time.perf_counter() - started, 1e-9)
