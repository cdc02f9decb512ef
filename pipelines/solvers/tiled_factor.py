"""The Cholesky factor of K + shift I in tiles, each made by a worker from K and finished tiles, written once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kernels.arrays import Array, namespace, to_host

from .. import device, tasks
from ..errors import ChunkLost, NumericalError
from ..memory import peak_bytes
from ..operators import cross_block
from ..stores import FactorStore, advice_on_range
from ..tile_files import all_finite
from ..tiles import Tile
from ..tilesource import TileSource
from . import tile_arithmetic
from .base import advice_on_ridges, lost_in_rounding
from .factor_order import BEGUN, FactorOrder, Step

MENDS = 3
"""How often tiles of a factor that are found damaged are made again before the disk is given up."""

MAPS = 256
"""Finished tiles that a process holds at most: each takes a file descriptor, and finding one again costs little."""

T = TypeVar("T")


class NotPositiveDefinite(NumericalError):
    """A pivot of the factor is not positive."""


class FactorTileLost(ChunkLost):
    """A tile of the factor, not of K, is missing or damaged."""


@dataclass(frozen=True)
class FactorJob:
    """What a worker needs to make any tile; small.

    source, rows: the matrix and the path of the index set that it is restricted to. store: the factor's.
    shift: added to the diagonal for this ridge. unit: what a ridge is multiplied by. cache_bytes: of the factor's
    tiles that a worker may keep. level: how far below zero rounding may push an eigenvalue of K. single: whether K is
    stored, or factored, in float32.
    """

    source: TileSource
    rows: Path
    store: FactorStore
    ridge: float
    shift: float
    unit: int
    cache_bytes: int
    level: float = 0.0
    single: bool = False

    @property
    def largest(self) -> int:
        """Entries of the largest tile."""
        return min(self.store.side, self.store.shape[0]) ** 2


class Held:
    """What this process holds of one factor: finished tiles, those it has begun, and memory to work in.

    On a host a finished tile is a map of its file: the memory is the system's and all processes', and none of it is
    taken anew. The tile in work lies in memory that is used again for the next one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._store: Path | None = None
        self._clear(None)

    def tile(self, job: FactorJob, tile: Tile, keep: bool = True) -> Array:
        """A finished tile, read-only, read where it is not held; its checksum is looked at once.

        Raises:
            FactorTileLost: it is missing or damaged (then set aside).
        """
        with self._lock:
            self._turn_to(job.store)
            if tile in self._tiles:
                self._tiles.move_to_end(tile)
                return self._tiles[tile]
            known = tile in self._verified
        try:
            values = tile_arithmetic.placed(job.store.map_tile(*tile, verify=not known))
        except ChunkLost as error:
            raise FactorTileLost(str(error)) from error
        with self._lock:
            self._verified.add(tile)
        if keep:
            self.keep(job, tile, values)
        return values

    def keep(self, job: FactorJob, tile: Tile, values: Array) -> None:
        """Hold a finished tile, and let go of what was not used for longest."""
        bound = min(job.cache_bytes, device.memory_bytes() // 2) if device.used() else job.cache_bytes
        with self._lock:
            self._turn_to(job.store)
            if tile in self._tiles or values.nbytes > bound:
                return
            self._tiles[tile] = values
            self._bytes += values.nbytes
            while self._bytes > bound or len(self._tiles) > MAPS:
                self._bytes -= self._tiles.popitem(last=False)[1].nbytes

    def begin(self, job: FactorJob, tile: Tile, values: Array, products: int) -> None:
        """Hold a tile that so many products were subtracted from."""
        with self._lock:
            self._turn_to(job.store)
            self._begun[tile] = values, products
            while len(self._begun) > BEGUN:
                self._reuse(job, self._begun.popitem(last=False)[1][0])

    def begun(self, job: FactorJob, tile: Tile) -> tuple[Array, int] | None:
        """A tile that was begun here; it is handed over."""
        with self._lock:
            self._turn_to(job.store)
            return self._begun.pop(tile, None)

    def memory(self, job: FactorJob, tile: Tile) -> np.ndarray:
        """An array of a tile's shape to work in, of any content, until it is given back or begun."""
        rows, columns = job.store.grid.extent(tile)
        n, m = rows.stop - rows.start, columns.stop - columns.start
        with self._lock:
            self._turn_to(job.store)
            whole = self._free.pop() if self._free else np.empty(job.largest, job.store.dtype)
        return whole[: n * m].reshape(n, m)

    def give_back(self, job: FactorJob, values: Array) -> None:
        """Use the memory of an array from ``memory`` again; on a device there is nothing to do."""
        with self._lock:
            self._turn_to(job.store)
            self._reuse(job, values)

    def release(self) -> None:
        with self._lock:
            self._clear(None)

    def _reuse(self, job: FactorJob, values: Array) -> None:
        whole = values.base if namespace(values) is np else None
        if isinstance(whole, np.ndarray) and whole.shape == (job.largest,) and len(self._free) <= BEGUN:
            self._free.append(whole)

    def _turn_to(self, store: FactorStore) -> None:
        if self._store != store.path:
            self._clear(store.path)

    def _clear(self, store: Path | None) -> None:
        self._store, self._bytes = store, 0
        self._tiles: OrderedDict[Tile, Array] = OrderedDict()
        self._begun: OrderedDict[Tile, tuple[Array, int]] = OrderedDict()
        self._verified: set[Tile] = set()
        self._free: list[np.ndarray] = []


HELD = Held()


def release() -> None:
    """Let go of all tiles that this process holds; runs on every worker when a solve ends."""
    HELD.release()


def release_all(workers: tasks.Workers) -> None:
    """Let go of all tiles that this process and its workers hold."""
    release()
    if workers.client is not None:
        workers.client.run(release)


def make(step: Step, job: FactorJob) -> int:
    """Bring a tile forward, or make and write it; runs on a worker. Returns the process's peak memory in bytes.

    Raises:
        NotPositiveDefinite: a pivot is not positive.
        ChunkLost: a tile of K or of the factor is missing or damaged.
        DiskFull: no space is left.
    """
    i, j = step.tile
    if step.finish and job.store.has(step.tile):
        return peak_bytes()
    tile = _reduced(step, job)
    if not step.finish:
        HELD.begin(job, step.tile, tile, step.products)
        return peak_bytes()
    if i == j:
        try:
            tile = tile_arithmetic.factor(tile)
        except tile_arithmetic.NotPositive as error:
            del tile
            raise _not_positive_definite(step, job, error.position) from None
    else:
        tile = tile_arithmetic.divide(tile, HELD.tile(job, (j, j)))
    job.store.write_tile(step.tile, to_host(tile))
    if namespace(tile) is np:  # whoever needs it maps its file
        HELD.give_back(job, tile)
    else:
        HELD.keep(job, step.tile, tile)
    return peak_bytes()


def _reduced(step: Step, job: FactorJob) -> Array:
    """K's tile, with the shift, less the products of a step."""
    i, j = step.tile
    begun = HELD.begun(job, step.tile)
    if begun is None or begun[1] > step.products:
        block = _block(step.tile, job)
        begun = tile_arithmetic.placed(block), 0
        if begun[0] is not block:
            HELD.give_back(job, block)
    tile, first = begun
    for k in range(first, step.products):
        left = HELD.tile(job, (i, k))
        if i == j:
            tile = tile_arithmetic.subtract_square(tile, left)
        else:
            tile = tile_arithmetic.subtract_product(tile, left, HELD.tile(job, (j, k)))
    return tile


def _block(tile: Tile, job: FactorJob) -> np.ndarray:
    rows = np.load(job.rows, mmap_mode="r")
    some, others = job.store.grid.extent(tile)
    with np.errstate(over="ignore"):  # beyond float32: reported below as what it became
        block = cross_block(job.source, rows[some], rows[others], out=HELD.memory(job, tile))
    if block.dtype == np.float32 and not all_finite(block):  # in float64 they are as they were read: finite
        raise NumericalError(
            f"the kernel between rows {rows[some.start]} to {rows[some.stop - 1]} and rows {rows[others.start]} to "
            f"{rows[others.stop - 1]} of the pool has values that are not finite in {block.dtype}; "
            f"{advice_on_range(block.dtype)}"
        )
    if tile[0] == tile[1]:
        np.einsum("ii->i", block)[:] += block.dtype.type(job.shift)
    return block


def _not_positive_definite(step: Step, job: FactorJob, position: int) -> NotPositiveDefinite:
    """The error for a pivot at a position of a diagonal tile; the tile is made once more to measure the pivot."""
    size, v = tile_arithmetic.pivot(_reduced(step, job), position)
    at = step.tile[0] * job.store.side + position
    row = int(np.load(job.rows, mmap_mode="r")[at])
    failed = (
        f"in diagonal block {step.tile[0]} of the {job.store.dtype} factor the pivot of training row {row}"
    )
    smallest = size / _square_length(step.tile[0], v, job) - job.shift
    if -smallest <= job.level:
        message = lost_in_rounding(
            ridge=job.ridge,
            shift=job.shift,
            level=job.level,
            unit=job.unit,
            single=job.single,
            failed=f"{failed} is {size:.3g}",
        )
        return NotPositiveDefinite(message)
    return NotPositiveDefinite(
        f"K + n*lambda*I is not positive definite at ridge {job.ridge:g} (added to the diagonal: {job.shift:.3g}): "
        f"{failed} is {size:.3g}, so that K has an eigenvalue of at most about {smallest:.3g}; "
        f"{advice_on_ridges(smallest, job.unit, job.single)}"
    )


def _square_length(number: int, v: np.ndarray, job: FactorJob) -> float:
    """|(u, v)|^2 of v in tile row ``number`` and of u in those before, which makes the quadratic form of both least.

    That is the pivot, and no eigenvalue need be as small: one is at most its quotient by this.
    """

    def tile(i: int, j: int) -> np.ndarray:
        return to_host(HELD.tile(job, (i, j), keep=False)).astype(np.float64)

    length = float(v @ v)
    left = [tile(number, j)[: len(v)].T @ v for j in range(number)]
    for j in reversed(range(number)):
        u = tile_arithmetic.solve(tile(j, j), left[j][:, None], transposed=True)[:, 0]
        length += float(u @ u)
        for k in range(j):
            left[k] -= tile(j, k).T @ u
    return length


def complete(
    job: FactorJob, workers: tasks.Open, watch: Callable[[int, int], None] = lambda made, total: None
) -> int:
    """Make the tiles of a factor that are missing; returns the largest peak memory of a process that took part.

    watch: called with how many tiles there are, of how many.

    Raises:
        NotPositiveDefinite, DiskFull: as ``make``; tiles that are finished stay.
        ChunkLost: a tile of K is missing or damaged, or tiles of the factor again and again.
    """
    count = job.store.grid.shape[0]

    def attempt() -> int:
        present = job.store.present()
        if len(present) == count * (count + 1) // 2:
            return peak_bytes()
        opened = workers()
        order = FactorOrder(count, present, max(opened.count, 1))
        peak = peak_bytes()
        watch(order.made, order.total)
        for step, used in tasks.run(make, order, (job,), opened, order.owner):
            peak = max(peak, used)
            if step.finish:
                watch(order.made, order.total)
        return peak

    return mending(attempt)


def mending(attempt: Callable[[], T], mend: Callable[[], object] = lambda: None) -> T:
    """What ``attempt`` returns, tried again after ``mend`` where it found a tile of the factor damaged.

    Raises:
        FactorTileLost: again and again.
    """
    for _ in range(MENDS):
        try:
            return attempt()
        except FactorTileLost:
            mend()
    return attempt()
