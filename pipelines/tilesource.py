"""Where tiles come from, and index sets over the samples of a matrix.

An index set is a strictly increasing int64 array of row ids of a pool. Training, validation and test
sets of one pool are index sets over one symmetric store, so no permuted matrix is ever written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from kernels.arrays import Array

from .errors import DataError


class TileSource(Protocol):
    """A matrix, stored or recomputed, cut into square tiles of one side; only an axis's last ones are smaller.

    Where workers take part it travels to them: it must be small when pickled.
    """

    @property
    def side(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def symmetric(self) -> bool:
        """Whether there are only tiles (i, j) with i >= j, the tiles on the diagonal whole."""
        ...

    def read_tile(self, i: int, j: int) -> np.ndarray:
        """Rows from i * side and columns from j * side on, at most ``side`` of each."""
        ...


def tile_of(source: TileSource, i: int, j: int) -> Array:
    """Tile (i, j) of a source: on the device where the source computes it there, else on the host."""
    compute = getattr(source, "tile", None)
    return source.read_tile(i, j) if compute is None else compute(i, j)


def index_set(rows: ArrayLike, size: int, name: str = "rows") -> np.ndarray:
    """``rows`` as a (k,) int64 index set over ``size`` samples.

    Raises:
        DataError: not one-dimensional integers, not strictly increasing, or outside [0, size).
    """
    given = np.asarray(rows)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise DataError(f"{name} must be a one-dimensional array of row ids, got {given.dtype} {given.shape}")
    ids = given.astype(np.int64, copy=False)
    if ids.size and (ids[0] < 0 or ids[-1] >= size or np.any(np.diff(ids) <= 0)):
        raise DataError(f"{name} must be row ids from 0 to {size - 1}, strictly increasing; sort them")
    return ids


@dataclass(frozen=True)
class Part:
    """The members of an index set that lie in one tile: their positions in the set and in the tile."""

    positions: slice
    local: slice | np.ndarray


def part_of(ids: np.ndarray, number: int, side: int) -> Part | None:
    """The members of an index set that lie in tile ``number`` of an axis; None where there are none."""
    start, stop = (int(k) for k in np.searchsorted(ids, (number * side, (number + 1) * side)))
    if start == stop:
        return None
    local = np.asarray(ids[start:stop]) - number * side
    first, last = int(local[0]), int(local[-1])
    run = last - first == stop - start - 1  # a slice then spares the copies of fancy indexing
    return Part(slice(start, stop), slice(first, last + 1) if run else local)


def parts(ids: np.ndarray, side: int) -> dict[int, Part]:
    """The parts of an index set, by tile."""
    found = {number: part_of(ids, number, side) for number in np.unique(ids // side).tolist()}
    return {number: part for number, part in found.items() if part is not None}
