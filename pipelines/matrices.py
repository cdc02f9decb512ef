"""The matrices of a run: which tiles it needs, which are stored, and what those to compute come to.

Tiles are counted as masks over pairs of blocks; sets of them are made where they are walked through, since of
five million samples there are three million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kernels.base import Kernel

from .experiment import Experiment
from .gram import gram_description
from .pools import Pools, fit_rows, needed_tiles
from .stores import GramStore, existing
from .tiles import Grid, Tile


@dataclass(frozen=True, eq=False)
class MatrixPlan:
    """One kernel's matrix over the pool, or of the test set against it.

    stores: where they are, by output. wanted, there: boolean masks over the grid of tiles, those that the run
    needs and those that are stored. tile_bytes: of one whole tile on disk. triangle: of a tile on the diagonal the
    kernel computes one triangle alone.
    """

    role: str
    stores: tuple[Path | None, ...]
    grid: Grid
    wanted: np.ndarray
    there: np.ndarray
    tile_bytes: int
    triangle: bool

    @cached_property
    def needed(self) -> frozenset[Tile]:
        return _tiles(self.wanted)

    @cached_property
    def present(self) -> frozenset[Tile]:
        return _tiles(self.there)

    @cached_property
    def missing(self) -> frozenset[Tile]:
        return _tiles(self._absent)

    @cached_property
    def needed_count(self) -> int:
        return int(np.count_nonzero(self.wanted))

    @cached_property
    def missing_count(self) -> int:
        return int(np.count_nonzero(self._absent))

    @property
    def disk_bytes(self) -> int:
        return self.missing_count * self.tile_bytes * len(self.stores)

    @cached_property
    def missing_entries(self) -> int:
        """Entries that are computed of the missing tiles: of one on the diagonal, kernels of images take a triangle."""
        rows, columns = (_extents(length, self.grid.side) for length in (self.grid.n, self.grid.m))
        entries = int(rows @ (self._absent @ columns))
        if self.triangle:
            entries -= sum(n * (n - 1) // 2 for n in rows[np.diagonal(self._absent)].tolist())
        return entries

    def extents(self) -> Counter[tuple[int, int]]:
        """How many missing tiles there are of each extent: all but the last of an axis have the same."""
        rows, columns = (_extents(length, self.grid.side) for length in (self.grid.n, self.grid.m))
        found: Counter[tuple[int, int]] = Counter()
        for row in np.unique(rows).tolist():
            for column in np.unique(columns).tolist():
                part = self._absent[np.ix_(rows == row, columns == column)]
                if count := int(np.count_nonzero(part)):
                    found[row, column] += count
        return found

    @property
    def blocks(self) -> set[tuple[str, int]]:
        """Role and number of the prepared blocks that the missing tiles read."""
        rows, columns = (np.flatnonzero(self._absent.any(axis=axis)).tolist() for axis in (1, 0))
        return {(self.role, i) for i in rows} | {("train", j) for j in columns}

    @cached_property
    def _absent(self) -> np.ndarray:
        return self.wanted & ~self.there


def run_kernel(experiment: Experiment) -> Kernel:
    """The kernel whose tiles a run computes: with what comes along in one pass, unless told not to."""
    kernel = experiment.kernel_object
    return kernel.joint() if experiment.gram.joint else kernel


def matrix_plans(experiment: Experiment, pools: Pools, kernel: Kernel, root: Path) -> list[MatrixPlan]:
    """Tiles needed and present of the pool's matrix and, for a test set of its own, of its block."""
    refit = experiment.solve.refit
    split = pools.split
    n = pools.pool_axis.rows
    side = kernel.tile_side(experiment.gram.dtype)
    grid = Grid(n, n, side, symmetric=True)
    wanted = needed_tiles(grid, split, refit=refit)
    plans = [_matrix(experiment, pools, kernel, root, "train", grid, wanted)]
    if split.test is not None and not split.test_in_pool:
        grid = Grid(pools.test_axis.rows, n, side, symmetric=False)
        wanted = grid.mask(split.test, fit_rows(split) if refit else split.train)
        plans.append(_matrix(experiment, pools, kernel, root, "test", grid, wanted))
    return plans


def missing_blocks(matrices: Iterable[MatrixPlan]) -> int:
    """Prepared blocks that the missing tiles read."""
    return len(set().union(*(matrix.blocks for matrix in matrices)))


def _matrix(
    experiment: Experiment,
    pools: Pools,
    kernel: Kernel,
    root: Path,
    role: str,
    grid: Grid,
    wanted: np.ndarray,
) -> MatrixPlan:
    test = role == "test"
    axes = [pools.test_axis, pools.pool_axis] if test else [pools.pool_axis]
    dtype = experiment.gram.dtype
    stores: list[Path | None] = []
    there = np.zeros(grid.shape, bool)
    for output in kernel.outputs:
        described = {
            **gram_description(pools, output, test=test),
            "dtype": dtype,
            "side": grid.side,
        }
        found = existing(root, GramStore.kind, described, axes)
        stores.append(found[0] if found else None)
        # A tile is there when the experiment's own matrix has it: nothing is computed for the others alone.
        if found is not None and output.fingerprint == experiment.kernel_object.fingerprint:
            store = GramStore(found[0])
            for tile in store.present():
                there[tile] = store.grid.extent(tile) == grid.extent(tile)
    tile_bytes = grid.side**2 * np.dtype(dtype).itemsize + 4
    triangle = grid.symmetric and kernel.inputs == "images"
    return MatrixPlan(role, tuple(stores), grid, wanted, there, tile_bytes, triangle)


def _tiles(mask: np.ndarray) -> frozenset[Tile]:
    i, j = np.nonzero(mask)
    return frozenset(zip(i.tolist(), j.tolist(), strict=True))


def _extents(length: int, side: int) -> np.ndarray:
    """How many rows each block of an axis has."""
    starts = np.arange(0, length, side)
    return np.minimum(starts + side, length) - starts
