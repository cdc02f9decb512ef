"""Samples of a pool as kernels take them: raw and preprocessed as they are read, or preprocessed once and stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import digest

from .archives import load_arrays, save_arrays
from .errors import ChunkLost
from .pools import Pools
from .preprocessing import Preprocessing
from .stores import FeatureStore, PoolStore, open_store


@dataclass(frozen=True)
class Preprocessed:
    """Where preprocessed samples are read from; small, so that it travels to workers.

    source: path of a pool store, or of a store of preprocessed samples. steps: JSON list of what is still to be
    done to them. scale: what a step ``scale`` divides by. state: path of what fitted steps learned, or None.
    """

    source: str
    dtype: str
    steps: str = "[]"
    scale: float = 1.0
    state: str | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, ...) samples of ``dtype``.

        Raises:
            ChunkLost: a block of them, or what fitted steps learned, is missing or damaged.
        """
        if not self._stored:
            raw = PoolStore(Path(self.source)).samples(start, stop)
            preprocessing = Preprocessing.from_spec(json.loads(self.steps), scale=self.scale)
            return preprocessing.apply(raw, fitted(self.state), np.dtype(self.dtype))
        store = FeatureStore(Path(self.source))
        parts = []
        for k in range(start // store.side, -(-stop // store.side)):
            extent = store.extent(k)
            block = store.read_block(k).arrays["X"]
            parts.append(block[max(start - extent.start, 0) : stop - extent.start])
        return np.concatenate(parts)

    @property
    def side(self) -> int:
        """Samples that lie in one chunk."""
        return FeatureStore(Path(self.source)).side if self._stored else PoolStore.chunk_rows

    @property
    def identity(self) -> list[Any]:
        """What names the samples, wherever the root lies, as JSON."""
        state = None if self.state is None else Path(self.state).name
        axes = open_store(self.source).axes
        return [Path(self.source).name, axes, self.dtype, json.loads(self.steps), self.scale, state]

    @property
    def _stored(self) -> bool:
        return Path(self.source).parent.name == FeatureStore.kind


def pool_store(pools: Pools, root: Path, *, test: bool = False) -> PoolStore:
    """The raw samples in a store of their own, so that workers need no data folder."""
    if test and pools.test is not None:
        return PoolStore.materialise(root, pools.test_description, pools.test_axis, pools.test.X)
    return PoolStore.materialise(root, pools.pool_description, pools.pool_axis, pools.train.X)


def fitted_state(pools: Pools, root: Path) -> str | None:
    """Path of the fitted steps' state, fitted on the pool where it is not stored yet."""
    if not pools.preprocessing.fitted:
        return None
    described = {"pool": pools.pool_description, "preprocessing": pools.preprocessing_description}
    path = root / "preprocessing" / f"{digest(described)[:24]}.npz"
    if not path.exists():
        store = pool_store(pools, root)
        state = pools.preprocessing.fit(store.samples)
        save_arrays(path, state, durable=False)
    return str(path)


@lru_cache(maxsize=4)
def fitted(path: str | None) -> dict[str, np.ndarray]:
    """What fitted steps learned, from its file; nothing where there is none.

    Raises:
        ChunkLost: the file is damaged (then removed).
    """
    if path is None:
        return {}
    arrays = load_arrays(Path(path))
    if arrays is None:
        Path(path).unlink(missing_ok=True)
        raise ChunkLost(
            f"{path}: what was fitted for preprocessing is damaged and removed; run the experiment again"
        )
    return arrays
