"""Products of a stored or recomputed matrix with a few columns, shared out over workers square by square.

Each tile is read once, also where it serves both triangles of a symmetric matrix. A worker takes a square of tiles
and writes what they add to the result; the sums are taken in the order of the squares, so that the same bits come
out however many workers there are.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from kernels.arrays import Array, namespace, to_host

from . import tasks
from .site import Site
from .stores import disk_errors
from .tiles import Rectangle, Tile, rectangles
from .tilesource import Part, TileSource, part_of, parts, tile_of

SQUARE = 8192
"""Rows and columns of the matrix that one task takes, in whole tiles: a second or so of one core."""

PANEL = 64
"""Rows of a tile that are converted at a time: they stay in the cache until they are multiplied."""


@dataclass(frozen=True)
class Product:
    """What a worker needs for its part of K[rows, columns] @ V; small.

    rows, columns: paths of index sets; V: path of the (len(columns), t) array. same: rows and columns are one set,
    and K is symmetric. out: a path that each square's number is appended to. dtype: that tiles are multiplied in.
    """

    source: TileSource
    rows: Path
    columns: Path
    V: Path
    same: bool
    out: Path
    dtype: str


@dataclass(frozen=True)
class Square:
    """A task: tiles of one square, and its place in the order of sums."""

    number: int
    tiles: tuple[Tile, ...]


def product(
    source: TileSource,
    rows: np.ndarray,
    columns: np.ndarray,
    V: np.ndarray,
    site: Site | None = None,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """K[rows, columns] @ V as (len(rows), t) float64.

    rows, columns: index sets of the source's axes. V: (len(columns), t). site: where workers are; without one this
    process computes. dtype: float64, or float32 where its rounding does not matter: tiles are multiplied in it,
    and what squares of tiles add is summed in float64.
    """
    same = source.symmetric and np.array_equal(rows, columns)
    out = np.zeros((len(rows), V.shape[1]))
    V = np.ascontiguousarray(V, dtype)
    squares = [Square(k, r.tiles) for k, r in enumerate(_squares(source, rows, columns))]
    if site is None:
        for square in squares:
            for part, values in _multiply(square, source, rows, columns, V, same):
                out[part.positions] += values
        return out
    job = Product(
        source,
        site.save("rows", rows),
        site.save("columns", columns),
        site.save("V", V),
        same,
        site.path("product"),
        np.dtype(dtype).name,
    )
    arrived: dict[int, tuple[Part, ...]] = {}
    turn = 0
    try:
        for square, touched in tasks.run(multiply, tasks.Listed(squares), (job,), site.workers()):
            arrived[square.number] = touched
            while turn in arrived:
                _add(out, arrived.pop(turn), _file(job.out, turn))
                turn += 1
    finally:
        for path in (job.rows, job.columns, job.V):
            path.unlink(missing_ok=True)
    return out


def multiply(square: Square, job: Product) -> tuple[Part, ...]:
    """Multiply a square's tiles and write what they add, one file; runs on a worker. Returns which rows they are."""
    rows, columns, V = (np.load(path, mmap_mode="r") for path in (job.rows, job.columns, job.V))
    done = list(_multiply(square, job.source, rows, columns, V, job.same))
    path = _file(job.out, square.number)
    # Dask may run a task twice, at the same time even.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with disk_errors(path.parent):
        with temporary.open("wb") as stream:
            for _, values in done:
                stream.write(np.ascontiguousarray(values).data)
        os.replace(temporary, path)
    return tuple(part for part, _ in done)


def _add(out: np.ndarray, touched: tuple[Part, ...], path: Path) -> None:
    values = np.fromfile(path, np.float64).reshape(-1, out.shape[1])
    start = 0
    for part in touched:
        count = part.positions.stop - part.positions.start
        out[part.positions] += values[start : start + count]
        start += count
    path.unlink()


def _file(out: Path, number: int) -> Path:
    return out.with_name(f"{out.name}.{number}")


def _squares(source: TileSource, rows: np.ndarray, columns: np.ndarray) -> list[Rectangle]:
    """The tiles that hold K[rows, columns], each once, in squares."""
    side = source.side
    left, right = set(parts(rows, side)), set(parts(columns, side))
    if source.symmetric:
        tiles = {(max(i, j), min(i, j)) for i in left for j in right}
    else:
        tiles = {(i, j) for i in left for j in right}
    return rectangles(tiles, max(1, SQUARE // side))


def _multiply(
    square: Square, source: TileSource, rows: np.ndarray, columns: np.ndarray, V: np.ndarray, same: bool
) -> Iterator[tuple[Part, np.ndarray]]:
    """What the tiles of a square add to the result, for each part of the rows that they touch."""
    side = source.side
    left: dict[int, Part | None] = {}
    right: dict[int, Part | None] = {}
    sums: dict[int, Array] = {}
    factors: dict[int, Array] = {}

    def row(k: int) -> Part | None:
        if k not in left:
            left[k] = part_of(rows, k, side)
        return left[k]

    def column(k: int) -> Part | None:
        if k not in right:
            right[k] = part_of(columns, k, side)
        return right[k]

    for i, j in square.tiles:
        tile = tile_of(source, i, j)
        xp = namespace(tile)
        a, b = row(i), column(j)
        mirrored = source.symmetric and i != j
        c, d = (row(j), column(i)) if mirrored else (None, None)
        for k, part in ((i, a if b else None), (j, c if d else None)):
            if part is not None and k not in sums:
                sums[k] = xp.zeros((_count(part), V.shape[1]))
        for k, part in ((j, b if a else None), (i, d if c else None)):
            if part is not None and k not in factors:
                factors[k] = xp.asarray(V[part.positions])
        if a and b and c and d and same:
            block = tile[a.local][:, b.local]
            _both(block, factors[j], factors[i], sums[i], sums[j])
            continue
        if a and b:
            _one(tile[a.local][:, b.local], factors[j], sums[i])
        if c and d:
            _one(tile[d.local][:, c.local].T, factors[i], sums[j])
    for k in sorted(sums):
        part = left[k]
        assert part is not None
        yield part, to_host(sums[k])


def _both(block: Array, V_columns: Array, V_rows: Array, out_rows: Array, out_columns: Array) -> None:
    """Add block @ V_columns and block.T @ V_rows, converting each entry once."""
    for panel in _panels(block, V_columns):
        some = block[panel].astype(V_columns.dtype, copy=False)
        out_rows[panel] += some @ V_columns
        out_columns += some.T @ V_rows[panel]


def _one(block: Array, V: Array, out: Array) -> None:
    """Add block @ V."""
    for panel in _panels(block, V):
        out[panel] += block[panel].astype(V.dtype, copy=False) @ V


def _panels(block: Array, V: Array) -> Iterator[slice]:
    step = len(block) if block.dtype == V.dtype or not isinstance(block, np.ndarray) else PANEL
    for start in range(0, len(block), max(step, 1)):
        yield slice(start, min(start + step, len(block)))


def _count(part: Part) -> int:
    return part.positions.stop - part.positions.start
