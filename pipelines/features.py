"""The first stage: every block of samples preprocessed and prepared, into feature stores.

Preprocessing that costs much (whitening) has a store of its own, shared by all kernels over the pool.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Kernel, Prepared, digest
from kernels.registry import from_description

from . import leases, tasks
from .errors import ChunkLost
from .pools import Pools, kernel_shape
from .preprocessing import Preprocessing
from .stores import FeatureStore, PoolStore, disk_errors

PREPROCESSED_SIDE = 128
Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a short message."""


def silent(done: int, total: int, message: str) -> None:
    """The progress of who does not want to hear of it."""


@dataclass(frozen=True)
class FeatureJob:
    """All that a worker needs to make blocks of a feature store; small, and JSON at heart.

    source: path of the pool store, or of the store of preprocessed samples.
    kernel: its description, or None where blocks are the preprocessed samples themselves.
    """

    source: str
    target: str
    dtype: str
    steps: tuple[dict[str, Any], ...]
    scale: float
    state: str | None
    kernel: str | None


@dataclass(frozen=True)
class FeatureReport:
    """What the stage did: blocks made and found, seconds, the store of prepared blocks."""

    store: str
    computed: int
    reused: int
    seconds: float


def materialise(
    pools: Pools,
    kernel: Kernel,
    dtype: str,
    root: Path,
    rows: np.ndarray,
    workers: tasks.Open,
    *,
    test: bool = False,
    progress: Progress = silent,
    use: Callable[[Path], None] = lambda path: None,
) -> FeatureReport:
    """Make the prepared blocks that hold ``rows`` of the pool (or of the test set).

    use: called with the path of every store that this rests on, as soon as it is known.
    Returns a report with the store's path. Blocks already stored are not computed again.
    """
    started = time.perf_counter()
    source = pool_store(pools, root, test=test)
    use(source.path)
    state = fitted_state(pools, root)
    computed = reused = 0
    samples: PoolStore | FeatureStore = source
    steps = tuple(pools.preprocessing.describe())
    one = _preprocessed(pools, source, state, dtype)
    axis = pools.test_axis if test else pools.pool_axis
    if pools.preprocessing.expensive:
        blank = Prepared({"X": one}, np.zeros(1, np.int64))
        samples = FeatureStore.open_or_create(
            root, preprocessed_description(pools, dtype, test=test), axis, blank, PREPROCESSED_SIDE
        )
        use(samples.path)
        side = kernel.tile_side(dtype)
        wanted = {
            k
            for block in np.unique(rows // side)
            for k in range(
                block * side // PREPROCESSED_SIDE, -(-min((block + 1) * side, axis.rows) // PREPROCESSED_SIDE)
            )
        }
        job = FeatureJob(str(source.path), str(samples.path), dtype, steps, pools.dataset.scale, state, None)
        made, found = fill(job, samples, wanted, workers, progress, "preprocessing")
        computed, reused = computed + made, reused + found
        steps, state = (), None
    like = kernel.prepare(one.reshape(1, *kernel_shape(kernel.inputs, one.shape[1:])))
    store = FeatureStore.open_or_create(
        root, prepared_description(pools, kernel, dtype, test=test), axis, like, kernel.tile_side(dtype)
    )
    use(store.path)
    job = FeatureJob(
        str(samples.path), str(store.path), dtype, steps, pools.dataset.scale, state, _json(kernel)
    )
    blocks = {int(block) for block in np.unique(rows // store.side)}
    made, found = fill(job, store, blocks, workers, progress, "preparing")
    return FeatureReport(str(store.path), computed + made, reused + found, time.perf_counter() - started)


def pool_store(pools: Pools, root: Path, *, test: bool = False) -> PoolStore:
    """The raw samples in a store of their own, so that workers need no data folder."""
    if test and pools.test is not None:
        return PoolStore.materialise(root, pools.test_description, pools.test_axis, pools.test.X)
    return PoolStore.materialise(root, pools.pool_description, pools.pool_axis, pools.train.X)


def preprocessed_description(pools: Pools, dtype: str, *, test: bool = False) -> dict[str, Any]:
    """What names the store of preprocessed samples."""
    pool = pools.test_description if test else pools.pool_description
    return {"pool": pool, "preprocessing": pools.preprocessing_description, "dtype": dtype}


def prepared_description(pools: Pools, kernel: Kernel, dtype: str, *, test: bool = False) -> dict[str, Any]:
    """What names the store of prepared blocks."""
    described = preprocessed_description(pools, dtype, test=test)
    return {**described, "prepared": kernel.prepared_description(), "revisions": kernel.revisions()}


def make_blocks(blocks: tuple[int, ...], job: FeatureJob) -> float:
    """Compute and write blocks of a feature store; runs on a worker. Returns seconds."""
    started = time.perf_counter()
    target = FeatureStore(Path(job.target))
    for block in blocks:
        if not target.has(block):
            extent = target.extent(block)
            X = _samples(job, extent.start, extent.stop)
            rows = np.arange(extent.start, extent.stop, dtype=np.int64)
            if job.kernel is None:
                prepared = Prepared({"X": X}, rows)
            else:
                kernel = load_kernel(job.kernel)
                prepared = kernel.prepare(X.reshape(len(X), *kernel_shape(kernel.inputs, X.shape[1:])), rows)
            target.write_block(block, prepared)
    return time.perf_counter() - started


def _samples(job: FeatureJob, start: int, stop: int) -> np.ndarray:
    if job.steps or not _is_features(job.source):
        raw = PoolStore(Path(job.source)).samples(start, stop)
        preprocessing = Preprocessing.from_spec(job.steps, scale=job.scale)
        return preprocessing.apply(raw, _state(job.state), np.dtype(job.dtype))
    store = FeatureStore(Path(job.source))
    parts = []
    for k in range(start // store.side, -(-stop // store.side)):
        extent = store.extent(k)
        block = store.read_block(k).arrays["X"]
        parts.append(block[max(start - extent.start, 0) : stop - extent.start])
    return np.concatenate(parts)


def _is_features(path: str) -> bool:
    return Path(path).parent.name == FeatureStore.kind


def fill(
    job: FeatureJob,
    store: FeatureStore,
    blocks: Iterable[int],
    workers: tasks.Open,
    progress: Progress,
    what: str,
) -> tuple[int, int]:
    """Make those of ``blocks`` that a feature store lacks, on all workers; returns how many were made and found."""
    blocks = sorted(blocks)
    missing = [block for block in blocks if not store.has(block)]
    found = len(blocks) - len(missing)
    if not missing:
        return 0, found
    # Preprocessing runs on processors: every worker takes part, also one without a GPU.
    opened = replace(workers(), resources=None)
    # A few tasks a worker: enough to share out evenly, few enough to be worth their cost.
    size = max(1, -(-len(missing) // (8 * max(opened.count, 1))))
    groups = [tuple(missing[k : k + size]) for k in range(0, len(missing), size)]
    done = found
    progress(done, len(blocks), f"{what} samples")
    # A lease without tiles: whoever sweeps what dead writers left must know that this one lives.
    with leases.Lease(store.path):
        for group, _ in tasks.run(make_blocks, tasks.Listed(groups), (job,), opened):
            done += len(group)
            progress(done, len(blocks), f"{what} samples")
    return len(missing), found


def _preprocessed(pools: Pools, source: PoolStore, state: str | None, dtype: str) -> np.ndarray:
    """One preprocessed sample (1, ...), to learn shapes from."""
    return pools.preprocessing.apply(source.samples(0, 1), _state(state), np.dtype(dtype))


def fitted_state(pools: Pools, root: Path) -> str | None:
    """Path of the fitted steps' state, fitted on the pool where it is not stored yet."""
    if not pools.preprocessing.fitted:
        return None
    described = {"pool": pools.pool_description, "preprocessing": pools.preprocessing_description}
    path = root / "preprocessing" / f"{digest(described)[:24]}.npz"
    if not path.exists():
        store = pool_store(pools, root)
        state = pools.preprocessing.fit(store.samples)
        temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.npz")
        with disk_errors(root):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(temporary, allow_pickle=False, **state)
            os.replace(temporary, path)
    return str(path)


@lru_cache(maxsize=4)
def _state(path: str | None) -> dict[str, np.ndarray]:
    if path is None:
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        Path(path).unlink(missing_ok=True)
        raise ChunkLost(
            f"{path}: what was fitted for preprocessing is damaged ({error}) and removed; run the experiment again"
        ) from error


def _json(kernel: Kernel) -> str:
    return json.dumps(kernel.describe(), sort_keys=True)


@lru_cache(maxsize=16)
def load_kernel(description: str) -> Kernel:
    """The kernel of a JSON description, built once per process."""
    # Loads the kernels that the pipelines add to the registry.
    from . import precomputed  # noqa: F401

    return from_description(json.loads(description))
