"""The geometry of tiles: which tiles a set of rows touches, and how tiles are grouped into tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

Tile = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The tiles of an (n, m) matrix of tile side ``side``; a symmetric one keeps tiles (i, j) with i >= j."""

    n: int
    m: int
    side: int
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tile rows and of tile columns."""
        return math.ceil(self.n / self.side), math.ceil(self.m / self.side)

    def extent(self, tile: Tile) -> tuple[slice, slice]:
        """Rows and columns of the matrix that a tile covers; ragged only at the matrix's end."""
        i, j = tile
        s = self.side
        return slice(i * s, min((i + 1) * s, self.n)), slice(j * s, min((j + 1) * s, self.m))

    def entries(self, tile: Tile) -> int:
        rows, columns = self.extent(tile)
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def contains(self, tile: Tile) -> bool:
        i, j = tile
        rows, columns = self.shape
        return 0 <= i < rows and 0 <= j < columns and (i >= j or not self.symmetric)

    def touched(self, rows: np.ndarray, columns: np.ndarray) -> set[Tile]:
        """The tiles that hold the entries rows x columns (arrays of row ids), each tile whole."""
        i, j = np.nonzero(self.mask(rows, columns))
        return set(zip(i.tolist(), j.tolist(), strict=True))

    def mask(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The tiles that ``touched`` lists, as a boolean array over the grid: to count them, of millions of samples."""
        left, right = (np.zeros(size, bool) for size in self.shape)
        left[rows // self.side] = True
        right[columns // self.side] = True
        pairs = np.outer(left, right)
        return np.tril(pairs | pairs.T) if self.symmetric else pairs


@dataclass(frozen=True)
class Rectangle:
    """What one task computes: the tiles rows x columns that it lists, all inside one square of tiles."""

    tiles: tuple[Tile, ...]

    @property
    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The row blocks and the column blocks whose samples the task needs."""
        return tuple(sorted({i for i, _ in self.tiles})), tuple(sorted({j for _, j in self.tiles}))


def rectangles(tiles: Collection[Tile], group: int) -> list[Rectangle]:
    """Cover ``tiles`` by squares of ``group`` x ``group`` tiles on a fixed grid, row by row."""
    squares: dict[Tile, list[Tile]] = {}
    for i, j in sorted(tiles):
        squares.setdefault((i // group, j // group), []).append((i, j))
    return [Rectangle(tuple(squares[key])) for key in sorted(squares)]


def group_size(tiles: int, tile_seconds: float, workers: int, largest: int) -> int:
    """Side, in tiles, of the squares that make a task worth about two seconds.

    Never so large that a worker gets fewer than four tasks, nor larger than ``largest`` (memory).
    """
    wanted = math.sqrt(2.0 / max(tile_seconds, 1e-6))
    fair = math.sqrt(tiles / (4 * max(workers, 1)))
    return max(1, min(round(wanted), int(fair), largest))


def as_ranges(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Consecutive runs [start, stop) of increasing integers."""
    run: tuple[int, int] | None = None
    for row in rows:
        if run is not None and row == run[1]:
            run = (run[0], row + 1)
            continue
        if run is not None:
            yield run
        run = (row, row + 1)
    if run is not None:
        yield run
