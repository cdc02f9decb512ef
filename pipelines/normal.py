"""Products of K^T K and of K^T with a few columns, K tall: each tile is read once, in strips of whole rows.

A worker takes a strip, gathers it, multiplies, and writes what it adds to the result; the sums are taken in the order
of the strips, so that the same bits come out however many workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernels.arrays import namespace, to_host

from .products import in_turn, square_side, write_sums
from .site import Site
from .tilesource import Part, TileSource, part_of, parts, tile_of

PANEL = 128
"""Rows of a strip that are converted to float64 at a time: few enough to stay in the cache for both products."""


@dataclass(frozen=True)
class Normal:
    """What a worker needs; small.

    rows, columns: paths of index sets; V: path of (len(columns), t), to be multiplied by K^T K, or where ``twice`` is
    False of (len(rows), t), to be multiplied by K^T. out: a path that each strip's number is appended to.
    """

    source: TileSource
    rows: Path
    columns: Path
    V: Path
    twice: bool
    out: Path


@dataclass(frozen=True)
class Strip:
    """A task: some tile rows, and its place in the order of sums."""

    number: int
    blocks: tuple[int, ...]


def normal_product(
    source: TileSource, rows: np.ndarray, columns: np.ndarray, V: np.ndarray, site: Site | None = None
) -> np.ndarray:
    """K[rows, columns]^T (K[rows, columns] @ V) as (len(columns), t) float64, for V (len(columns), t).

    rows, columns: index sets of the source's axes. site: where workers are; without one this process computes. A
    worker holds one tile, one row of tiles (side x len(columns)), V and its own result.
    """
    return _summed(source, rows, columns, V, True, site)


def transposed_product(
    source: TileSource, rows: np.ndarray, columns: np.ndarray, U: np.ndarray, site: Site | None = None
) -> np.ndarray:
    """K[rows, columns]^T @ U as (len(columns), t) float64, for U (len(rows), t); as ``normal_product``."""
    return _summed(source, rows, columns, U, False, site)


def _summed(
    source: TileSource, rows: np.ndarray, columns: np.ndarray, V: np.ndarray, twice: bool, site: Site | None
) -> np.ndarray:
    out = np.zeros((len(columns), V.shape[1]))
    V = np.ascontiguousarray(V, np.float64)
    touched = sorted(parts(rows, source.side))
    group = max(1, square_side(site is not None and bool(site.workers().resources)) // source.side)
    strips = [Strip(k, tuple(touched[i : i + group])) for k, i in enumerate(range(0, len(touched), group))]
    if site is None:
        for strip in strips:
            out += _strip(strip.blocks, source, rows, columns, V, twice)
        return out
    job = Normal(
        source,
        site.save("rows", rows),
        site.save("columns", columns),
        site.save("V", V),
        twice,
        site.path("normal"),
    )
    try:
        for _, values in in_turn(multiply, strips, job, site):
            out += values.reshape(out.shape)
    finally:
        for path in (job.rows, job.columns, job.V):
            path.unlink(missing_ok=True)
    return out


def multiply(strip: Strip, job: Normal) -> None:
    """Multiply a strip and write what it adds, one file; runs on a worker."""
    rows, columns, V = (np.load(path, mmap_mode="r") for path in (job.rows, job.columns, job.V))
    write_sums(strip, job, [_strip(strip.blocks, job.source, rows, columns, V, job.twice)])


def _strip(
    blocks: Sequence[int],
    source: TileSource,
    rows: np.ndarray,
    columns: np.ndarray,
    V: np.ndarray,
    twice: bool,
) -> np.ndarray:
    """What some tile rows add to the result."""
    across = {
        j: part
        for j in np.unique(columns // source.side).tolist()
        if (part := part_of(columns, j, source.side))
    }
    out = None
    for i in blocks:
        down = part_of(rows, i, source.side)
        assert down is not None
        block = _gather(source, i, down, across, len(columns))
        xp = namespace(block)
        W = xp.asarray(V if twice else V[down.positions])
        if out is None:
            out = xp.zeros((V.shape[1], len(columns)))
        for start in range(0, len(block), PANEL):
            panel = slice(start, start + PANEL)
            some = block[panel].astype(np.float64, copy=False)
            # Few columns: the product of their transposes takes three quarters of the time.
            out += (some @ W if twice else W[panel]).T @ some
    assert out is not None
    return np.ascontiguousarray(to_host(out).T)


def _gather(source: TileSource, i: int, down: Part, across: dict[int, Part], columns: int) -> np.ndarray:
    """(rows of tile row i, columns) of the matrix, in the tiles' own dtype."""
    block = None
    for j, part in across.items():
        if source.symmetric and j > i:
            some = tile_of(source, j, i)[part.local][:, down.local].T
        else:
            some = tile_of(source, i, j)[down.local][:, part.local]
        if block is None:
            xp = namespace(some)
            block = xp.empty((down.positions.stop - down.positions.start, columns), some.dtype)
        block[:, part.positions] = some
    assert block is not None
    return block


def worker_bytes(side: int, columns: int, width: int, itemsize: int) -> int:
    """Bytes that a worker holds at its peak: a tile, a row of tiles, its panel in float64, V and the result twice."""
    return side * side * itemsize + side * columns * itemsize + (PANEL + 3 * width) * columns * 8
