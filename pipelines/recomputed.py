"""A Gram matrix whose tiles are computed whenever they are read: where arithmetic beats the disk, or there is no room.

The same blocks give the same bits on the same path and processor, so products with such a matrix are products with
one matrix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernels.arrays import Array, namespace, to_host
from kernels.base import Kernel, digest

from . import gram, memory
from .errors import NumericalError
from .features import load_kernel
from .stores import FeatureStore


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
        kernel = load_kernel(self.kernel)
        a = cache.block(self.rows, i, self.samples[0])
        block = kernel.pair(a, cache.block(self.columns, j, self.samples[1]))
        xp = namespace(block)
        # One sum finds what is not finite; a look at every entry is for the message.
        if not bool(xp.isfinite(block.sum(dtype=np.float64))):
            finite = to_host(xp.isfinite(block))
            if not finite.all():
                p, q = np.unravel_index(int(np.argmin(finite)), finite.shape)
                raise NumericalError(
                    f"tile {i}/{j} of the matrix has {int((~finite).sum())} values that are not finite, the first"
                    f" between samples {i * self.side + p} and {j * self.side + q}; check the data and the kernel"
                )
        return block.astype(self.dtype, copy=False)
