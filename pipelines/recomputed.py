"""A Gram matrix whose tiles are computed whenever they are read: where arithmetic beats the disk, or there is no room.

The same blocks give the same bits on the same path and processor, so products with such a matrix are products with
one matrix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from kernels.arrays import Array, namespace, to_host
from kernels.base import Kernel, Prepared, digest

from . import device, gram, memory
from .errors import NumericalError
from .features import load_kernel
from .files import disk_errors
from .site import Site
from .stores import FeatureStore, not_finite
from .tilesource import TileSource, parts

SCATTERED = 2
"""Columns are scattered where the tiles that they lie in hold so many times as many."""


@dataclass(frozen=True)
class RecomputedTiles:
    """A tile source that computes; small, so that it travels to workers as it is.

    kernel: JSON description, of one output. rows, columns: feature stores' paths. samples: digests of the two
    stores' axes (see ``gram.GramJob``). cache_bytes: how much of prepared blocks a worker may keep. dtype: of the
    tiles. symmetric: rows and columns are the same samples; then tiles (i, j) with i >= j are asked for.
    """

    kernel: str
    rows: str
    columns: str
    samples: tuple[str, str]
    cache_bytes: int
    dtype: str
    side: int
    shape: tuple[int, int]
    symmetric: bool

    @classmethod
    def of(cls, kernel: Kernel, rows: Path, columns: Path, dtype: str, memory_bytes: int) -> RecomputedTiles:
        """Between the samples of two feature stores, or of one given twice, for workers of so many bytes each."""
        left, right = FeatureStore(rows), FeatureStore(columns)
        return cls(
            json.dumps(kernel.describe(), sort_keys=True),
            str(rows),
            str(columns),
            (digest(left.axes), digest(right.axes)),
            memory.cache_bytes(memory_bytes),
            dtype,
            left.side,
            (left.rows, right.rows),
            rows == columns,
        )

    def read_tile(self, i: int, j: int) -> np.ndarray:
        """Tile (i, j) on the host, at most (side, side).

        Raises:
            NumericalError: a value is not finite; the samples are named.
            ChunkLost: a prepared block is missing or damaged.
        """
        return to_host(self.tile(i, j))

    def tile(self, i: int, j: int) -> Array:
        """Tile (i, j) where it is computed: on the device where there is one.

        Raises:
            NumericalError, ChunkLost: as ``read_tile``.
        """
        cache = gram.block_cache(self.cache_bytes)
        a = cache.block(self.rows, i, self.samples[0])
        return _pair(self.kernel, a, cache.block(self.columns, j, self.samples[1]), self.dtype, (i, j))


@dataclass(frozen=True)
class Gathered:
    """Prepared samples from all over a pool, in files that workers map into their memory; small.

    paths: one ``.npy`` for each array of ``names``. rows: path of the samples' row ids in ``pool``, by which a kernel
    knows pairs of the same sample (SPEC K13).
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    rows: str
    pool: str
    count: int

    @classmethod
    def of(cls, store: FeatureStore, ids: np.ndarray, site: Site) -> Gathered:
        """Samples of a feature store by their row ids, an index set, in a site's scratch folder.

        Raises:
            ChunkLost: a prepared block is missing or damaged.
            DiskFull: no space is left.
        """
        maps: dict[str, np.memmap] = {}
        paths: dict[str, str] = {}
        for number, part in parts(ids, store.side).items():
            block = store.read_block(number)
            for name, values in block.arrays.items():
                if name not in maps:
                    path = site.path("gathered").with_suffix(".npy")
                    shape = (len(ids), *values.shape[1:])
                    with disk_errors(path.parent):
                        maps[name] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
                    paths[name] = str(path)
                maps[name][part.positions] = values[part.local]
        for written in maps.values():
            written.flush()
        return cls(tuple(paths), tuple(paths.values()), str(site.save("ids", ids)), store.pool_name, len(ids))

    def block(self, start: int, stop: int) -> Prepared:
        """Some of the samples, on the device where tiles are computed there."""
        return _gathered_block(self, start, min(stop, self.count), device.used())


@lru_cache(maxsize=8)
def _gathered_block(samples: Gathered, start: int, stop: int, on_device: bool) -> Prepared:
    arrays = (np.asarray(np.load(path, mmap_mode="r")[start:stop]) for path in samples.paths)
    rows = np.array(np.load(samples.rows, mmap_mode="r")[start:stop])
    block = Prepared(dict(zip(samples.names, arrays, strict=True)), rows, samples.pool)
    return block.on_device() if on_device else block


@dataclass(frozen=True)
class GatheredTiles:
    """A tile source that computes some columns of a matrix and no others; small, so that it travels to workers.

    kernel, cache_bytes, dtype, side: as of ``RecomputedTiles``. columns: their samples. rows: a feature store's path;
    samples: digest of its axes. Without rows the matrix is that of the gathered samples among themselves, symmetric.
    """

    kernel: str
    rows: str | None
    samples: str
    columns: Gathered
    cache_bytes: int
    dtype: str
    side: int
    shape: tuple[int, int]

    @property
    def symmetric(self) -> bool:
        return self.rows is None

    @property
    def among_columns(self) -> GatheredTiles:
        """The square matrix of the gathered samples."""
        return replace(self, rows=None, shape=(self.columns.count, self.columns.count))

    def read_tile(self, i: int, j: int) -> np.ndarray:
        """Tile (i, j) on the host; raises as ``RecomputedTiles.read_tile``."""
        return to_host(self.tile(i, j))

    def tile(self, i: int, j: int) -> Array:
        """Tile (i, j) where it is computed; raises as ``RecomputedTiles.tile``."""
        if self.rows is None:
            a = self._gathered(i)
        else:
            a = gram.block_cache(self.cache_bytes).block(self.rows, i, self.samples)
        return _pair(self.kernel, a, self._gathered(j), self.dtype, (i, j))

    def _gathered(self, number: int) -> Prepared:
        return self.columns.block(number * self.side, (number + 1) * self.side)


def gathered(source: TileSource, columns: np.ndarray, site: Site | None) -> tuple[TileSource, np.ndarray]:
    """A source, and an index set of its columns, that hold what ``columns`` of ``source`` do.

    Where tiles are computed and columns are scattered, so that most of every tile would be computed for nothing, it is
    one of tiles of these columns alone, which lasts as long as the site; else it is the source itself.

    Raises:
        ChunkLost: a prepared block is missing or damaged.
        DiskFull: no space is left.
    """
    if site is None or not isinstance(source, RecomputedTiles):
        return source, columns
    if SCATTERED * len(columns) > len(np.unique(columns // source.side)) * source.side:
        return source, columns
    samples = Gathered.of(FeatureStore(Path(source.columns)), columns, site)
    tiles = GatheredTiles(
        source.kernel,
        source.rows,
        source.samples[0],
        samples,
        source.cache_bytes,
        source.dtype,
        source.side,
        (source.shape[0], len(columns)),
    )
    return tiles, np.arange(len(columns))


def _pair(description: str, a: Prepared, b: Prepared, dtype: str, tile: tuple[int, int]) -> Array:
    """The block between prepared samples, checked."""
    with np.errstate(over="ignore", invalid="ignore"):  # reported below as what it became
        block = load_kernel(description).pair(a, b)
    xp = namespace(block)
    # One sum finds what is not finite; a look at every entry is for the message.
    if not bool(xp.isfinite(block.sum(dtype=np.float64))):
        values = to_host(block)
        if not np.isfinite(values).all():
            raise NumericalError(not_finite(values, tile, a.rows, b.rows))
    return block.astype(dtype, copy=False)
