"""Gram matrices as operators: tiles, stored or recomputed, are read through index sets, one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .errors import DataError, NumericalError
from .products import Progress, product, unwatched
from .recomputed import gathered
from .site import Site
from .stores import advice_on_range
from .tilesource import TileSource, index_set, parts

COPIES = 2
"""Tiles that are put into a matrix in memory at a time, while the next is read: more would take memory beside it."""

PANEL = 256
"""Rows and columns of the squares by which a block is copied from C into Fortran order."""


def blocks(
    source: TileSource, rows: np.ndarray, columns: np.ndarray
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (row positions, column positions, block) that cover rows x columns, reading each tile once.

    A tile of a symmetric store below the diagonal serves both triangles. Blocks may be views of a tile.
    """
    row_parts, column_parts = parts(rows, source.side), parts(columns, source.side)
    if not source.symmetric:
        for i, row in row_parts.items():
            for j, column in column_parts.items():
                tile = source.read_tile(i, j)
                yield row.positions, column.positions, tile[row.local][:, column.local]
        return
    touched = sorted(row_parts.keys() | column_parts.keys())
    for count, i in enumerate(touched, 1):
        for j in touched[:count]:
            direct = i in row_parts and j in column_parts
            mirrored = i != j and j in row_parts and i in column_parts
            if not (direct or mirrored):
                continue
            tile = source.read_tile(i, j)
            if direct:
                row, column = row_parts[i], column_parts[j]
                yield row.positions, column.positions, tile[row.local][:, column.local]
            if mirrored:
                row, column = row_parts[j], column_parts[i]
                yield row.positions, column.positions, tile[column.local][:, row.local].T


def cross_block(
    source: TileSource,
    rows: ArrayLike,
    columns: ArrayLike,
    dtype: DTypeLike = np.float64,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The (len(rows), len(columns)) block of a stored matrix between two index sets.

    out: filled and returned where given, in its own dtype.

    Raises:
        DataError: rows or columns are not index sets of the store.
    """
    row_ids = index_set(rows, source.shape[0], "rows")
    column_ids = index_set(columns, source.shape[1], "columns")
    if out is None:
        out = np.empty((len(row_ids), len(column_ids)), dtype)
    for at_rows, at_columns, block in blocks(source, row_ids, column_ids):
        out[at_rows, at_columns] = block
    return out


def predict(
    source: TileSource,
    rows: ArrayLike,
    columns: ArrayLike,
    alpha: np.ndarray,
    site: Site | None = None,
    progress: Progress = unwatched,
) -> np.ndarray:
    """K[rows, columns] @ alpha in float64, without ever holding that block (R1: f = sum alpha_i K(x_i, .)).

    alpha: (len(columns), t), or (r, len(columns), t) for r ridges, which share one pass over the tiles.
    site: where workers take part; this process computes without one.
    Returns (len(rows), t) or (r, len(rows), t) float64.

    Raises:
        DataError: rows or columns are not index sets of the store, or alpha does not fit the columns.
    """
    row_ids = index_set(rows, source.shape[0], "rows")
    column_ids = index_set(columns, source.shape[1], "columns")
    stack = np.asarray(alpha)
    if stack.ndim not in (2, 3) or stack.shape[-2] != len(column_ids):
        raise DataError(f"coefficients of shape {stack.shape} do not fit {len(column_ids)} columns")
    flat = np.moveaxis(stack, -2, 0).reshape(len(column_ids), -1)
    out = product(source, row_ids, column_ids, flat, site, progress=progress)
    scores = out.reshape(len(row_ids), *stack.shape[:-2], stack.shape[-1])
    return np.ascontiguousarray(np.moveaxis(scores, 0, -2))


def _squares(block: np.ndarray, half: bool) -> Iterator[tuple[slice, slice]]:
    """The parts by which a block is copied into Fortran order.

    From C order by squares that stay in the cache, several times faster than at once. half: those alone that are not
    above the diagonal.
    """
    if not half and block.strides[0] <= block.strides[1]:
        yield slice(0, block.shape[0]), slice(0, block.shape[1])
        return
    for start in range(0, block.shape[0], PANEL):
        stop = min(start + PANEL, block.shape[0])
        for first in range(0, stop if half else block.shape[1], PANEL):
            yield slice(start, stop), slice(first, min(first + PANEL, block.shape[1]))


class Symmetric(Protocol):
    """A symmetric positive semi-definite (n, n) matrix as products, which are all that iterations take.

    rows: index set of the samples that it is made of, which names it with ``diag``. site: as in ``GramOperator``.
    """

    rows: np.ndarray
    site: Site | None

    @property
    def n(self) -> int: ...

    def matmul(self, V: np.ndarray) -> np.ndarray:
        """The matrix times V (n, t), in float64."""
        ...

    def diag(self) -> np.ndarray:
        """(n,) float64."""
        ...


class GramOperator:
    """A symmetric matrix restricted to an index set, as dense array, as blocks of it or as products.

    site: where workers take part in products, and where a solver keeps what it goes on from; without one
    everything is done in this process, and nothing is kept.

    Raises:
        DataError: the matrix is not symmetric, or rows are not an index set of it, or none.
    """

    def __init__(self, source: TileSource, rows: ArrayLike, site: Site | None = None) -> None:
        if not source.symmetric:
            raise DataError(f"a solver needs a symmetric store, not a rectangular one {source.shape}")
        self.source = source
        self.site = site
        self.rows = index_set(rows, source.shape[0])
        if not self.rows.size:
            raise DataError("a Gram matrix over no samples cannot be solved with; give at least one row")

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.n

    @cached_property
    def dtype(self) -> np.dtype:
        """What the tiles are stored in, learnt from the first diagonal tile."""
        first = int(self.rows[0]) // self.source.side
        return self.source.read_tile(first, first).dtype

    def dense(
        self,
        dtype: DTypeLike = np.float64,
        out: np.ndarray | None = None,
        triangle: Literal["lower", "upper", "full"] = "full",
    ) -> np.ndarray:
        """(n, n) matrix in Fortran order; memory is the matrix and three tiles.

        out: filled and returned where given. triangle: one of the two is written then, and of the other what lies in
        tiles on the diagonal ("upper") or in squares of ``PANEL`` on it ("lower").

        Raises:
            DataError: ``out`` is not in Fortran order, or of another shape.
            NumericalError: a value is not finite in ``dtype``; LAPACK would fail obscurely or never return.
        """
        matrix = np.empty(self.shape, dtype, order="F") if out is None else out
        if matrix.shape != self.shape or not matrix.flags.f_contiguous:
            raise DataError(
                f"the output must be in Fortran order and of shape {self.shape}, not {matrix.shape}"
            )

        def put(at_rows: slice, at_columns: slice, block: np.ndarray, checked: bool) -> None:
            half = triangle == "lower" and at_rows == at_columns
            for rows, columns in _squares(block, half):
                place = matrix[at_rows, at_columns][rows, columns]
                with np.errstate(over="ignore"):  # beyond float32: reported below as what it became
                    place[:] = block[rows, columns]
                if checked:
                    self._require_finite(place, at_rows.start + rows.start, at_columns.start + columns.start)

        # Where the system hands out the matrix's memory, as it is written, takes longer than all the rest.
        with ThreadPoolExecutor(COPIES, "megagram-copy") as pool:
            begun: deque[Future[None]] = deque()
            for at_rows, at_columns, block in blocks(self.source, self.rows, self.rows):
                above, below = at_rows.start <= at_columns.start, at_rows.start >= at_columns.start
                if not {"upper": above, "lower": below, "full": True}[triangle]:
                    continue
                if len(begun) == COPIES:
                    begun.popleft().result()
                begun.append(pool.submit(put, at_rows, at_columns, block, below or triangle == "upper"))
            for one in begun:
                one.result()
        return matrix

    def _require_finite(self, block: np.ndarray, row: int, column: int) -> None:
        finite = np.isfinite(block)
        if not finite.all():
            i, j = np.argwhere(~finite)[0]
            first, second = self.rows[row + i], self.rows[column + j]
            raise NumericalError(
                f"the kernel between rows {first} and {second} of the pool is not finite in {block.dtype}; "
                f"{advice_on_range(block.dtype)}"
            )

    def matmul(self, V: np.ndarray) -> np.ndarray:
        """K @ V for V (n, t) or (r, n, t), in float64, in one pass over the tiles."""
        return predict(self.source, self.rows, self.rows, V, self.site)

    def columns(self, positions: np.ndarray, dtype: DTypeLike = np.float64) -> np.ndarray:
        """K[:, positions] as (n, k) float64, entries rounded to ``dtype``; positions: (k,) distinct, in any order.

        Workers that recompute tiles compute these columns alone where they are scattered (see ``gathered``). Last
        digits may differ from those of whole tiles then.
        """

        def watch(done: int, total: int) -> None:
            if self.site is not None:
                self.site.progress(done, total, f"parts of {len(positions)} columns of the matrix")

        order = np.argsort(positions)
        source, columns = gathered(self.source, self.rows[positions[order]], self.site)
        picked = np.zeros((len(positions), len(positions)), dtype)
        picked[np.arange(len(positions)), order] = 1
        return product(source, self.rows, columns, picked, self.site, dtype, watch)

    def block(self, rows: slice, columns: slice, dtype: DTypeLike = np.float64) -> np.ndarray:
        """The block of the matrix between two ranges of positions, C order."""
        return cross_block(self.source, self.rows[rows], self.rows[columns], dtype)

    def diag(self) -> np.ndarray:
        """(n,) float64 diagonal, read-only, from the diagonal tiles alone, which are read once."""
        return self._diagonal

    @cached_property
    def _diagonal(self) -> np.ndarray:
        out = np.empty(self.n)
        for number, part in parts(self.rows, self.source.side).items():
            out[part.positions] = self.source.read_tile(number, number).diagonal()[part.local]
        out.flags.writeable = False
        return out
