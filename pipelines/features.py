"""The first stage: every block of samples preprocessed and prepared, into feature stores.

Preprocessing that costs much (whitening) has a store of its own, shared by all kernels over the pool. What an
explicit feature map prepares are its features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kernels.arrays import Array, namespace, to_host
from kernels.base import Kernel, Prepared
from kernels.features.base import FEATURES, FeatureMap
from kernels.registry import from_description

from . import device, leases, tasks
from .errors import ChunkLost, StoreError
from .explicit import mapfiles
from .pools import Pools, kernel_shape
from .samples import Preprocessed, fitted, fitted_state, pool_store
from .stores import FeatureStore

PREPROCESSED_SIDE = 128

BLOCK_BYTES = 2**27
"""Features in one block: what a task holds, and what lies in one chunk."""

CHECKED_ROWS = 4
"""Samples of one stored block whose features are computed again, where features are reused."""

SCRATCH_BYTES = 2**28
"""Memory that a feature map may take beside the features of a block."""

Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a short message."""


def silent(done: int, total: int, message: str) -> None:
    """The progress of who does not want to hear of it."""


@dataclass(frozen=True)
class FeatureJob:
    """All that a worker needs to make blocks of a feature store; small, and JSON at heart.

    kernel: its description, or None where blocks are the preprocessed samples themselves. learned: the folder of
    what the kernel, a feature map, learned.
    """

    samples: Preprocessed
    target: str
    kernel: str | None
    learned: str | None = None


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
    learned: Path | None = None,
    test: bool = False,
    progress: Progress = silent,
    use: Callable[[Path], None] = lambda path: None,
) -> FeatureReport:
    """Make the prepared blocks that hold ``rows`` of the pool (or of the test set).

    learned: where ``maps.learned`` keeps what the kernel, a feature map, learned. use: called with the path of every
    store that this rests on, as soon as it is known.
    Returns a report with the store's path. Blocks already stored are not computed again.
    """
    started = time.perf_counter()
    one = sample(pools, kernel, dtype, root)
    side = block_side(kernel, one.shape[1:], dtype)
    samples, computed, reused = preprocessed(
        pools, dtype, root, rows, side, workers, test=test, progress=progress, use=use
    )
    axis = pools.test_axis if test else pools.pool_axis
    described = prepared_description(pools, kernel, dtype, test=test)
    with np.errstate(over="ignore", invalid="ignore"):  # found where its block is checked
        like = kernel.prepare(one)
    store = FeatureStore.open_or_create(root, described, axis, like, side)
    use(store.path)
    job = FeatureJob(samples, str(store.path), _json(kernel), None if learned is None else str(learned))
    blocks = {int(block) for block in np.unique(rows // side)}
    mapping = isinstance(kernel, FeatureMap)
    made, found = fill(job, store, blocks, workers, progress, "preparing", on_devices=mapping)
    return FeatureReport(str(store.path), computed + made, reused + found, time.perf_counter() - started)


def preprocessed(
    pools: Pools,
    dtype: str,
    root: Path,
    rows: np.ndarray,
    side: int,
    workers: tasks.Open,
    *,
    test: bool = False,
    progress: Progress = silent,
    use: Callable[[Path], None] = lambda path: None,
) -> tuple[Preprocessed, int, int]:
    """The samples of the pool (or of the test set), those in blocks of ``side`` that hold ``rows`` ready to be read.

    Returns where they are read, and how many blocks of preprocessed samples were made and found for it: none where
    preprocessing costs little.
    """
    source = pool_store(pools, root, test=test)
    use(source.path)
    state = fitted_state(pools, root)
    steps = json.dumps(pools.preprocessing.describe())
    raw = Preprocessed(str(source.path), dtype, steps, pools.dataset.scale, state)
    if not pools.preprocessing.expensive:
        return raw, 0, 0
    axis = pools.test_axis if test else pools.pool_axis
    shape = pools.preprocessing.output_shape(pools.raw_shape)
    blank = Prepared({"X": np.zeros((1, *shape), dtype)}, np.zeros(1, np.int64))
    store = FeatureStore.open_or_create(
        root, preprocessed_description(pools, dtype, test=test), axis, blank, PREPROCESSED_SIDE
    )
    use(store.path)
    wanted = {
        k
        for block in np.unique(rows // side)
        for k in range(
            block * side // PREPROCESSED_SIDE, -(-min((block + 1) * side, axis.rows) // PREPROCESSED_SIDE)
        )
    }
    job = FeatureJob(raw, str(store.path), None)
    made, found = fill(job, store, wanted, workers, progress, "preprocessing")
    return Preprocessed(str(store.path), dtype), made, found


def sample(pools: Pools, kernel: Kernel, dtype: str, root: Path) -> np.ndarray:
    """The pool's first sample (1, ...) as the kernel takes it, to learn shapes from."""
    raw = pool_store(pools, root).samples(0, 1)
    one = pools.preprocessing.apply(raw, fitted(fitted_state(pools, root)), np.dtype(dtype))
    return one.reshape(1, *kernel_shape(kernel.inputs, one.shape[1:]))


def block_side(kernel: Kernel, shape: tuple[int, ...], dtype: str) -> int:
    """Samples in a prepared block: the side of the kernel's tiles, or so few that their features are a block's.

    shape: of one sample as the kernel takes it.
    """
    side = kernel.tile_side(dtype)
    if isinstance(kernel, FeatureMap):
        row = kernel.width(shape) * np.dtype(dtype).itemsize
        while side > 1 and side * row > BLOCK_BYTES:
            side //= 2
    return side


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
            X = job.samples.read(extent.start, extent.stop)
            rows = np.arange(extent.start, extent.stop, dtype=np.int64)
            if job.kernel is None:
                prepared = Prepared({"X": X}, rows)
            else:
                kernel = load_kernel(job.kernel, job.learned)
                X = X.reshape(len(X), *kernel_shape(kernel.inputs, X.shape[1:]))
                if isinstance(kernel, FeatureMap):
                    prepared = Prepared({FEATURES: to_host(mapped(kernel, X, rows, target.pool_name))}, rows)
                else:
                    with np.errstate(over="ignore", invalid="ignore"):  # found where blocks are checked, too
                        prepared = kernel.prepare(X, rows)
            target.write_block(block, prepared)
    return time.perf_counter() - started


def mapped(feature_map: FeatureMap, X: np.ndarray, rows: np.ndarray | None = None, pool: str = "") -> Array:
    """(n, width) features of samples (n, ...) as the map takes them: on the device where there is one.

    rows, pool: as of ``FeatureMap.features``.

    Raises:
        KernelError: the map cannot take them, or the path asked for is the device's, and there is no device.
    """
    # Not n: the same samples get the same bits in shorter blocks.
    step = feature_map.tile_side(X.dtype.name)
    while step > 1 and feature_map.feature_cost(step, X.shape[1:], X.itemsize).scratch_bytes > SCRATCH_BYTES:
        step //= 2
    phi = None
    for here, part in Prepared({"X": X}, np.arange(len(X))).blocks(step):
        # What is beyond the dtype is found where blocks are checked, by the sample's name.
        with np.errstate(over="ignore", invalid="ignore"):
            known = None if rows is None else rows[here]
            values = feature_map.features(device.placed(part).arrays["X"], known, pool)
        if len(values) == len(X):
            return values
        if phi is None:
            phi = namespace(values).empty((len(X), values.shape[1]), values.dtype)
        phi[here] = values
    return phi


def check_stored(job: FeatureJob, store: FeatureStore, reused: Sequence[int]) -> None:
    """Where features are ``reused``, compute those of a few samples of their first block again.

    Raises:
        StoreError: they differ by more than rounding (the store was made by another revision of the map, or by a
            defective machine).
    """
    if job.kernel is None or not reused:
        return
    kernel = load_kernel(job.kernel, job.learned)
    if not isinstance(kernel, FeatureMap):
        return
    extent = store.extent(reused[0])
    picks = np.unique(np.linspace(0, extent.stop - extent.start - 1, CHECKED_ROWS).astype(int))
    try:
        stored = store.read_block(reused[0]).arrays[FEATURES][picks].astype(np.float64)
        X = np.concatenate([job.samples.read(row, row + 1) for row in (extent.start + picks).tolist()])
    except ChunkLost:
        return  # set aside by the reader: it will be made again
    X = X.reshape(len(X), *kernel_shape(kernel.inputs, X.shape[1:]))

    def computed(X: np.ndarray) -> np.ndarray:
        return to_host(mapped(kernel, X, extent.start + picks, store.pool_name)).astype(np.float64)

    # Whitening amplifies rounding, and steps are known by the sign of a sum alone: as far as features move when
    # samples do by a few units of rounding, others may differ.
    rng = np.random.default_rng(0)
    now, shares = computed(X), np.array([0, 16 * np.finfo(X.dtype).eps], X.dtype)
    others = [computed(X * (1 - rng.choice(shares, X.shape))) for _ in range(2)]
    moved = np.max([np.linalg.norm(other - now, axis=1) for other in others], axis=0)
    scale = np.linalg.norm(now, axis=1) + np.finfo(X.dtype).tiny
    allowed = (2e-5 if X.dtype == np.float32 else 1e-8) + 8 * moved / scale
    errors = np.linalg.norm(stored - now, axis=1) / scale
    if not (errors <= allowed).all():
        raise StoreError(
            f"{store.path}: stored features of block {reused[0]} are not what the map computes now"
            f" (relative difference {np.max(errors):.1e}); use another --root, or remove this store"
        )


def fill(
    job: FeatureJob,
    store: FeatureStore,
    blocks: Iterable[int],
    workers: tasks.Open,
    progress: Progress,
    what: str,
    *,
    on_devices: bool = False,
) -> tuple[int, int]:
    """Make those of ``blocks`` that a feature store lacks; returns how many were made and found.

    on_devices: they are computed on GPUs where there are any; else on the processors of all workers.

    Raises:
        StoreError: stored features are not what the map computes now.
    """
    blocks = sorted(blocks)
    check_stored(job, store, [block for block in blocks if store.has(block)])
    missing = [block for block in blocks if not store.has(block)]
    found = len(blocks) - len(missing)
    if not missing:
        return 0, found
    opened = workers()
    if not on_devices:  # every worker takes part, also one without a GPU
        opened = replace(opened, resources=None)
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


def _json(kernel: Kernel) -> str:
    return json.dumps(kernel.describe(), sort_keys=True)


def load_kernel(description: str, learned: str | None = None) -> Kernel:
    """The kernel of a JSON description, built once per process.

    learned: for a feature map that learned, the folder of what it learned.

    Raises:
        ChunkLost: that folder is missing, damaged (then set aside) or holds what another map learned.
    """
    return _described(description) if learned is None else _learned(description, learned)


@lru_cache(maxsize=16)
def _described(description: str) -> Kernel:
    # Loads the kernels that the pipelines add to the registry.
    from . import precomputed  # noqa: F401

    return from_description(json.loads(description))


@lru_cache(maxsize=2)  # arrays are large
def _learned(description: str, folder: str) -> FeatureMap:
    feature_map = stored_map(Path(folder))
    if _json(feature_map) != description:
        raise ChunkLost(f"{folder}: another map was learned meanwhile; run the experiment again")
    return feature_map


def stored_map(folder: Path) -> FeatureMap:
    """The map that learned what lies in ``folder``.

    Raises:
        ChunkLost: it is missing or damaged (then set aside).
    """
    try:
        return mapfiles.read(folder)
    except StoreError as error:
        aside = " and is set aside" if mapfiles.set_aside(folder) else ""
        raise ChunkLost(f"{error}{aside}; run the experiment again") from None
