"""Explicit features as a tall matrix Phi (n, width), in blocks of whole rows: stored, or computed as they stream.

It is a tile source as well, so that whatever multiplies by a matrix in tiles multiplies by Phi and its transpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from kernels.arrays import Array
from kernels.features.base import FEATURES

from .stores import FeatureStore
from .tilesource import TileSource


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
