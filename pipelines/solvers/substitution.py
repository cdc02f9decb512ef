"""L^-1 V and L^-T V with the tiles of a stored factor, shared out over workers block by block.

A block is a few tiles on a side. One off the diagonal is multiplied with the part of the result that its columns
belong to as soon as that is known; one on the diagonal takes what those of its row added, in the order of their
columns, and solves for its part. So the sums are the same however many workers there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernels.arrays import Array, namespace, to_host

from .. import tasks
from ..files import replacing
from ..site import Site
from ..tiles import Tile
from . import tile_arithmetic
from .tiled_factor import HELD, FactorJob

BLOCK = 5
"""Tiles on a block's side: a task then reads at most twenty-five, and one is enough for 10,000 samples."""


@dataclass(frozen=True)
class Substitution:
    """What a worker needs; small.

    factor: whose tiles they are. V: path of the right-hand sides, (n, t) in the factor's dtype. out: a path that
    a block's name is appended to. transposed: solve with L^T, from the last block to the first.
    """

    factor: FactorJob
    V: Path
    out: Path
    transposed: bool

    @property
    def blocks(self) -> int:
        return -(-self.factor.store.grid.shape[0] // BLOCK)

    def file(self, block: Tile) -> Path:
        return self.out.with_name(f"{self.out.name}.{block[0]}.{block[1]}.npy")

    def tiles(self, number: int) -> range:
        """The tile rows of a block row."""
        return range(number * BLOCK, min((number + 1) * BLOCK, self.factor.store.grid.shape[0]))

    def order(self, number: int) -> int:
        """The place of a block row in the order of solving; its own inverse."""
        return self.blocks - 1 - number if self.transposed else number


class BlockOrder:
    """A source of tasks: blocks (row, column), counted in the order of solving, that nothing needed misses for."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._missing = list(range(count))
        self._ready: list[Tile] = [(0, 0)]
        self._left = count * (count + 1) // 2

    def next(self) -> Tile | tasks.Wait | None:
        if not self._left:
            return None
        if not self._ready:
            return tasks.WAIT
        # The next part of the result before anything else, then what it needs.
        self._ready.sort(key=lambda block: (block[0] != block[1], block))
        self._left -= 1
        return self._ready.pop(0)

    def done(self, block: Tile) -> None:
        row, column = block
        if row == column:
            self._ready += [(below, row) for below in range(row + 1, self._count)]
            return
        self._missing[row] -= 1
        if not self._missing[row]:
            self._ready.append((row, row))


def substitute(job: FactorJob, V: np.ndarray, site: Site, transposed: bool = False) -> np.ndarray:
    """L^-1 V, or L^-T V, as (n, t) in the factor's dtype.

    Raises:
        FactorTileLost: a tile of the factor is missing or damaged (then set aside).
        DiskFull: no space is left.
    """
    values = np.ascontiguousarray(V, job.store.dtype)
    task = Substitution(job, site.save("rhs", values), site.path("substitution"), transposed)
    order = BlockOrder(task.blocks)
    out = np.empty_like(values)
    try:
        for block, _ in tasks.run(take, order, (task,), site.workers(), lambda block: block[0]):
            if block[0] == block[1]:
                out[_rows(task, task.order(block[0]))] = np.load(task.file(block))
        return out
    finally:
        task.V.unlink(missing_ok=True)
        for path in task.out.parent.glob(f"{task.out.name}.*"):
            path.unlink(missing_ok=True)


def take(block: Tile, task: Substitution) -> None:
    """Multiply or solve with a block and write what comes of it, one file; runs on a worker."""
    row, column = block
    rows = _rows(task, task.order(row))
    if row == column:
        values = np.load(task.V, mmap_mode="r")[rows].copy()
        for before in range(row):
            values -= np.load(task.file((row, before)))
        result = _solve(task, task.order(row), tile_arithmetic.placed(values))
    else:
        known = tile_arithmetic.placed(np.load(task.file((column, column))))
        xp = namespace(known)
        result = xp.zeros((rows.stop - rows.start, known.shape[1]), known.dtype)
        first, others = rows.start, _rows(task, task.order(column)).start
        for i in task.tiles(task.order(row)):
            for j in task.tiles(task.order(column)):
                to, of = _extent(task, i, first), _extent(task, j, others)
                result[to] += _tile(task, i, j) @ known[of]
    with replacing(task.file(block)) as temporary, temporary.open("wb") as stream:
        np.save(stream, to_host(result))


def _solve(task: Substitution, number: int, values: Array) -> Array:
    """Solve with a block on the diagonal, tile by tile, in the place of the right-hand sides."""
    first = _rows(task, number).start
    tiles = list(task.tiles(number))
    if task.transposed:
        tiles.reverse()
    for turn, i in enumerate(tiles):
        rows = _extent(task, i, first)
        for j in tiles[:turn]:
            values[rows] -= _tile(task, i, j) @ values[_extent(task, j, first)]
        triangle = HELD.tile(task.factor, (i, i), keep=False)
        values[rows] = tile_arithmetic.solve(triangle, values[rows], task.transposed)
    return values


def _tile(task: Substitution, i: int, j: int) -> Array:
    """Tile (i, j) of the triangle that is solved with."""
    if task.transposed:
        return HELD.tile(task.factor, (j, i), keep=False).T
    return HELD.tile(task.factor, (i, j), keep=False)


def _rows(task: Substitution, number: int) -> slice:
    tiles = task.tiles(number)
    side = task.factor.store.side
    return slice(tiles.start * side, min(tiles.stop * side, task.factor.store.shape[0]))


def _extent(task: Substitution, tile: int, first: int) -> slice:
    """The rows of a tile row, counted from ``first``."""
    rows = task.factor.store.grid.extent((tile, tile))[0]
    return slice(rows.start - first, rows.stop - first)
