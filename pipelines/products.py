"""Products of a stored or recomputed matrix with a few columns, shared out over workers square by square.

Each tile is read once, also where it serves both triangles of a symmetric matrix. A worker takes a square of tiles
and writes what they add to the result; the sums are taken in the order of the squares, so that the same bits come
out however many workers there are, as long as all multiply by the same code (``kernels.columns`` says by which) on
processors of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from kernels.arrays import Array, namespace, to_host
from kernels.columns import add_both_products, add_product

from . import tasks
from .files import replacing
from .site import Site
from .tiles import Rectangle, Tile, rectangles
from .tilesource import Part, TileSource, part_of, parts, tile_of

T = TypeVar("T")

SQUARE = 8192
"""Rows and columns of the matrix that one task takes, in whole tiles: a second or so of one core."""

DEVICE_SQUARE = 65536
"""The same for a device, which takes so many in a second."""

Progress = Callable[[int, int], None]
"""Called with how much is done, of how much."""


def unwatched(done: int, total: int) -> None:
    """The progress of who does not want to hear of it."""


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
    progress: Progress = unwatched,
) -> np.ndarray:
    """K[rows, columns] @ V as (len(rows), t) float64.

    rows, columns: index sets of the source's axes. V: (len(columns), t). site: where workers are; without one this
    process computes. dtype: float64, or float32 where its rounding does not matter: tiles are multiplied in it,
    and what squares of tiles add is summed in float64. progress: called with the squares done, and all of them.
    """
    same = source.symmetric and np.array_equal(rows, columns)
    out = np.zeros((len(rows), V.shape[1]))
    V = np.ascontiguousarray(V, dtype)
    group = max(1, square_side(site is not None and bool(site.workers().resources)) // source.side)
    squares = [Square(k, r.tiles) for k, r in enumerate(_squares(source, rows, columns, group))]
    if site is None:
        for square in squares:
            for part, values in _multiply(square, source, rows, columns, V, same):
                out[part.positions] += values
            progress(square.number + 1, len(squares))
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
    try:
        for number, (touched, values) in enumerate(in_turn(multiply, squares, job, site), 1):
            _add(out, touched, values)
            progress(number, len(squares))
    finally:
        for path in (job.rows, job.columns, job.V):
            path.unlink(missing_ok=True)
    return out


class Numbered(Protocol):
    """A task by its place in the order of sums."""

    @property
    def number(self) -> int: ...


class Written(Protocol):
    """What tasks share; each writes its sums under ``out``."""

    @property
    def out(self) -> Path: ...


def in_turn(
    function: Callable[[Any, Any], T], listed: Sequence[Numbered], job: Written, site: Site
) -> Iterator[tuple[T, np.ndarray]]:
    """Run tasks that ``write_sums``; yield what each returned and wrote, as float64, in the order of their numbers."""
    arrived: dict[int, T] = {}
    workers = site.workers()
    order = _InTurn(list(listed), outstanding(workers.count))
    for task, result in tasks.run(function, order, (job,), workers):
        arrived[task.number] = result
        while order.turn in arrived:
            path = _file(job.out, order.turn)
            values = np.fromfile(path, np.float64)
            path.unlink()
            yield arrived.pop(order.turn), values
            order.turn += 1


def outstanding(workers: int) -> int:
    """Tasks that are handed out, or done, before what the first of them wrote is taken: so many files at most."""
    return 2 * tasks.WINDOW * max(workers, 1)


@dataclass
class _InTurn:
    """A source of tasks that hands out no more than ``most`` from the one whose turn it is."""

    listed: list[Numbered]
    most: int
    turn: int = 0
    _position: int = 0

    def next(self) -> Numbered | tasks.Wait | None:
        if self._position == len(self.listed):
            return None
        if self._position >= self.turn + self.most:
            return tasks.WAIT
        self._position += 1
        return self.listed[self._position - 1]

    def done(self, task: Numbered) -> None:
        return None


def write_sums(task: Numbered, job: Written, sums: Iterable[np.ndarray]) -> None:
    """Write a task's float64 arrays one after the other into its file, whole."""
    # Dask may run a task twice, at the same time even.
    with replacing(_file(job.out, task.number)) as temporary, temporary.open("wb") as stream:
        for values in sums:
            stream.write(np.ascontiguousarray(values).data)


def multiply(square: Square, job: Product) -> tuple[Part, ...]:
    """Multiply a square's tiles and write what they add, one file; runs on a worker. Returns which rows they are."""
    rows, columns, V = (np.load(path, mmap_mode="r") for path in (job.rows, job.columns, job.V))
    # Beyond float32: whoever asked for it looks at the sums.
    with np.errstate(over="ignore", invalid="ignore"):
        done = list(_multiply(square, job.source, rows, columns, V, job.same))
    write_sums(square, job, (values for _, values in done))
    return tuple(part for part, _ in done)


def _add(out: np.ndarray, touched: tuple[Part, ...], values: np.ndarray) -> None:
    values = values.reshape(-1, out.shape[1])
    start = 0
    for part in touched:
        count = part.positions.stop - part.positions.start
        out[part.positions] += values[start : start + count]
        start += count


def _file(out: Path, number: int) -> Path:
    return out.with_name(f"{out.name}.{number}")


def square_side(on_devices: bool) -> int:
    """Rows and columns of the matrix that one task takes. It depends on nothing else: the order of sums rests on it."""
    return DEVICE_SQUARE if on_devices else SQUARE


def _squares(source: TileSource, rows: np.ndarray, columns: np.ndarray, group: int) -> list[Rectangle]:
    """The tiles that hold K[rows, columns], each once, in squares of ``group`` x ``group``."""
    side = source.side
    left, right = set(parts(rows, side)), set(parts(columns, side))
    if source.symmetric:
        tiles = {(max(i, j), min(i, j)) for i in left for j in right}
    else:
        tiles = {(i, j) for i in left for j in right}
    return rectangles(tiles, group)


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

    for (i, j), tile in zip(square.tiles, _ahead(source, square.tiles), strict=True):
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
            add_both_products(_within(tile, a, b), factors[j], factors[i], sums[i], sums[j])
            continue
        if a and b:
            add_product(_within(tile, a, b), factors[j], sums[i])
        if c and d:
            add_product(_within(tile, d, c).T, factors[i], sums[j])
    for k in sorted(sums):
        part = left[k]
        assert part is not None
        yield part, to_host(sums[k])


def _within(tile: Array, rows: Part, columns: Part) -> Array:
    """The rows and columns of a tile that belong to index sets."""
    xp = namespace(tile)
    some, others = (k.local if isinstance(k.local, slice) else xp.asarray(k.local) for k in (rows, columns))
    return tile[some][:, others]


def _ahead(source: TileSource, tiles: Sequence[Tile]) -> Iterator[Array]:
    """The tiles in turn; where they are read and not computed, a thread reads the next one meanwhile."""
    if hasattr(source, "tile"):
        yield from (tile_of(source, i, j) for i, j in tiles)
        return
    with ThreadPoolExecutor(1, "megagram-read") as reader:
        following = reader.submit(source.read_tile, *tiles[0])
        for tile in tiles[1:]:
            block = following.result()
            following = reader.submit(source.read_tile, *tile)
            yield block
        yield following.result()


def _count(part: Part) -> int:
    return part.positions.stop - part.positions.start
