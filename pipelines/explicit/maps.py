"""What feature maps learn from training samples: once, in this process, and kept for whoever asks for the same."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from kernels.features.base import FeatureMap

from .. import datasets, features, tasks
from ..pools import Pools, kernel_shape
from ..samples import Preprocessed
from ..stores import address
from ..tilesource import parts
from . import mapfiles


def learned(
    pools: Pools,
    feature_map: FeatureMap,
    dtype: str,
    root: Path,
    rows: np.ndarray,
    workers: tasks.Open,
    *,
    progress: features.Progress = features.silent,
    use: Callable[[Path], None] = lambda path: None,
) -> tuple[FeatureMap, Path | None]:
    """The map with what it learns from samples, and the folder where that lies; the map itself where it learns nothing.

    rows: the training rows of the pool, an index set; no others are looked at. dtype: of the samples. workers:
    preprocess them where that is expensive; learning itself runs here, so that it does not depend on how many there
    are. use: as of ``features.materialise``.

    Raises:
        ChunkLost: what is stored is damaged (then set aside, and learned again by the next call).
        KernelError: nothing can be learned from the samples; the message says what to do.
    """
    if not feature_map.learns:
        return feature_map, None
    unlearned = replace(feature_map, learned="", arrays=None)
    folder = place(pools, unlearned, dtype, root, rows)
    if not (folder / mapfiles.DOCUMENT).exists():
        samples, _, _ = features.preprocessed(
            pools, dtype, root, rows, features.PREPROCESSED_SIDE, workers, progress=progress, use=use
        )
        started = time.perf_counter()
        # What is not finite is an error, in words. One thread: eigenvectors are rounded otherwise by two, and what was
        # learned is named by its digest, so that all features would be computed again.
        with np.errstate(over="ignore", invalid="ignore"), threadpool_limits(1, user_api="blas"):
            made = unlearned.learn(
                TrainingSamples(
                    samples, rows, len(pools.train), unlearned.inputs, address(pools.pool_description)
                ),
                progress,
            )
        facts = {
            "source": pools.dataset.source,
            "samples": len(rows),
            "seconds": round(time.perf_counter() - started, 3),
        }
        mapfiles.write(folder, made, facts)
    use(folder)
    # Read in any case: where two drivers learned at once, both go on with what the first one wrote.
    return features.stored_map(folder), folder


def place(pools: Pools, unlearned: FeatureMap, dtype: str, root: Path, rows: np.ndarray) -> Path:
    """The folder of what a map learns from ``rows`` of the pool, whether it has or not."""
    return root / mapfiles.KIND / address(description(pools, unlearned, dtype, rows))


def description(pools: Pools, unlearned: FeatureMap, dtype: str, rows: np.ndarray) -> dict[str, Any]:
    """What names all that a map learns from ``rows`` of the pool."""
    stop = int(rows[-1]) + 1
    # Of a pool that grew the samples up to the last of these rows are the same.
    whole = stop // datasets.DIGEST_ROWS
    rest = datasets.block_digests(pools.train.X[whole * datasets.DIGEST_ROWS : stop])
    return {
        **features.preprocessed_description(pools, dtype),
        "samples": [*pools.pool_axis.digests[:whole], *rest],
        "rows": hashlib.sha256(np.ascontiguousarray(rows, np.int64).data).hexdigest(),
        "map": unlearned.describe(),
        "revisions": unlearned.revisions(),
    }


class TrainingSamples:
    """Rows of a pool as samples to learn from, read chunk by chunk; the newest chunk is kept.

    rows: an index set of the pool of ``pool_rows`` samples. inputs: of the kernel. pool: its name in stores.
    """

    def __init__(
        self, samples: Preprocessed, rows: np.ndarray, pool_rows: int, inputs: str, pool: str = ""
    ) -> None:
        self._samples = samples
        self.rows = rows
        self.pool = pool
        self._pool_rows = pool_rows
        self._inputs = inputs
        self._kept: tuple[int, np.ndarray] | None = None

    @property
    def count(self) -> int:
        return len(self.rows)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        number = int(self.rows[0]) // self._samples.side
        return tuple(self._chunk(number).shape[1:])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """(k, ...) samples at increasing positions; raises ``ChunkLost`` where their chunks are missing or damaged."""
        rows = self.rows[positions]
        out = np.empty((len(rows), *self.shape), self._samples.dtype)
        for number, part in parts(rows, self._samples.side).items():
            out[part.positions] = self._chunk(number)[part.local]
        return out

    def _chunk(self, number: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != number:
            start = number * self._samples.side
            X = self._samples.read(start, min(start + self._samples.side, self._pool_rows))
            self._kept = number, X.reshape(len(X), *kernel_shape(self._inputs, X.shape[1:]))
        return self._kept[1]
