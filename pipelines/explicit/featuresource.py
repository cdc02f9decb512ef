"""Explicit features as a tall matrix Phi (n, width), in blocks of whole rows: stored, or computed as they stream.

It is a tile source as well, so that whatever multiplies by a matrix in tiles multiplies by Phi and its transpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kernels.arrays import Array, namespace, to_host
from kernels.features.base import FEATURES, FeatureMap

from .. import features, tasks
from ..errors import NumericalError
from ..pools import Pools, kernel_shape
from ..samples import Preprocessed
from ..stores import FeatureStore, address
from ..tilesource import TileSource


class FeatureSource(TileSource, Protocol):
    """Phi in blocks of ``side`` rows, all columns; small when pickled, so that it travels to workers."""

    def block(self, number: int) -> Array:
        """(at most side, width): rows from number * side on, on the device where they are computed there.

        Raises:
            ChunkLost: it is missing or damaged.
            NumericalError: a value is not finite.
        """
        ...


@dataclass(frozen=True)
class StoredFeatures:
    """The features that a store at ``path`` holds."""

    path: str
    side: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> StoredFeatures:
        store = FeatureStore(path)
        rows, width = store.array(FEATURES).shape
        return cls(str(path), store.side, (int(rows), int(width)))

    @property
    def symmetric(self) -> bool:
        return False

    def block(self, number: int) -> Array:
        return _stored_block(self.path, number)

    def read_tile(self, i: int, j: int) -> np.ndarray:
        """Columns from j * side on, at most ``side`` of them, of block i."""
        return _stored_block(self.path, i)[:, j * self.side : (j + 1) * self.side]


@lru_cache(maxsize=1)
def _stored_block(path: str, number: int) -> np.ndarray:
    # The last one is kept: its columns are asked for one tile after the other.
    return FeatureStore(Path(path)).read_block(number).arrays[FEATURES]


@dataclass(frozen=True)
class StreamedFeatures:
    """Features that are computed whenever a block is read, and never stored.

    samples: what they are computed from. kernel: JSON description of the map. learned: folder of what it learned.
    pool: the name of the samples' pool in stores, or none.
    The same block has the same bits whenever it is computed on the same kind of machine, those that would be stored.
    """

    samples: Preprocessed
    kernel: str
    learned: str | None
    side: int
    shape: tuple[int, int]
    pool: str = ""

    @classmethod
    def of(
        cls,
        feature_map: FeatureMap,
        samples: Preprocessed,
        learned: Path | None,
        shape: tuple[int, ...],
        count: int,
        pool: str = "",
    ) -> StreamedFeatures:
        """Of ``count`` samples of ``shape`` each, as the map takes them, in blocks as they would be stored."""
        return cls(
            samples,
            json.dumps(feature_map.describe(), sort_keys=True),
            None if learned is None else str(learned),
            features.block_side(feature_map, shape, samples.dtype),
            (count, feature_map.width(shape)),
            pool,
        )

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def identity(self) -> Any:
        """What names the features, as JSON."""
        return [self.samples.identity, json.loads(self.kernel), list(self.shape)]

    def block(self, number: int) -> Array:
        feature_map = features.load_kernel(self.kernel, self.learned)
        assert isinstance(feature_map, FeatureMap)
        start = number * self.side
        rows = np.arange(start, min(start + self.side, self.shape[0]))
        X = self.samples.read(start, start + len(rows))
        X = X.reshape(len(X), *kernel_shape(feature_map.inputs, X.shape[1:]))
        phi = features.mapped(feature_map, X, rows, self.pool)
        _require_finite(phi, start)
        return phi

    def read_tile(self, i: int, j: int) -> np.ndarray:
        """Columns from j * side on, at most ``side`` of them, of block i."""
        return _streamed_block(self, i)[:, j * self.side : (j + 1) * self.side]


def stream(
    pools: Pools,
    feature_map: FeatureMap,
    dtype: str,
    root: Path,
    rows: np.ndarray,
    workers: tasks.Open,
    *,
    learned: Path | None = None,
    test: bool = False,
    progress: features.Progress = features.silent,
    use: Callable[[Path], None] = lambda path: None,
) -> StreamedFeatures:
    """The features of the pool (or of the test set), to be computed as they are read.

    rows: those that will be asked for: their preprocessing is stored where it is expensive. The other arguments are
    those of ``features.materialise``.
    """
    shape = features.sample(pools, feature_map, dtype, root).shape[1:]
    side = features.block_side(feature_map, shape, dtype)
    samples, _, _ = features.preprocessed(
        pools, dtype, root, rows, side, workers, test=test, progress=progress, use=use
    )
    count = (pools.test_axis if test else pools.pool_axis).rows
    pool = address(pools.test_description if test else pools.pool_description)
    return StreamedFeatures.of(feature_map, samples, learned, shape, count, pool)


@lru_cache(maxsize=1)
def _streamed_block(source: StreamedFeatures, number: int) -> np.ndarray:
    return to_host(source.block(number))


def _require_finite(phi: Array, start: int) -> None:
    """Raise NumericalError where a value of ``phi``, the features of samples from ``start`` on, is not finite."""
    xp = namespace(phi)
    # One sum finds what is not finite; a look at every entry is for the message.
    with np.errstate(over="ignore", invalid="ignore"):
        if bool(xp.isfinite(phi.sum(dtype=np.float64))):
            return
    finite = to_host(xp.isfinite(phi).all(axis=1))
    if not finite.all():
        raise NumericalError(
            f"sample {start + int(np.argmin(finite))} has a feature that is not finite"
            f" ({int((~finite).sum())} such samples in this block); check the data and preprocessing"
        )


def forget() -> None:
    """Give back the memory of the blocks that this process keeps."""
    _stored_block.cache_clear()
    _streamed_block.cache_clear()
