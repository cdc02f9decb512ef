"""The second stage: tiles of the Gram matrix, computed on workers and written to stores.

From the flow to the arithmetic it is ``assemble -> compute_tiles -> Kernel.pair``. Only small reports
travel back; arrays go by store.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from kernels.arrays import Array, to_host
from kernels.base import Kernel, Prepared, digest

from . import device, leases, memory, provenance, tasks
from .errors import ChunkLost, StoreError
from .features import Progress, load_kernel, silent
from .pools import Pools
from .stores import FeatureStore, GramStore
from .tiles import Rectangle, Tile, group_size, rectangles

CHECKED_TILES = 3

DEVICE_SHARE = 4
"""One part in so many of a device's memory is for prepared blocks; tiles and what kernels need have the rest."""


@dataclass(frozen=True)
class GramJob:
    """All that a worker needs to compute tiles; small.

    kernel: JSON description; one store for each of its outputs. rows, columns: feature stores' paths.
    samples: digests of the two stores' axes: a worker that outlives a run must not take what it kept of a store
    for what the store holds since its data grew. cache_bytes: how much of prepared blocks a worker may keep.
    requested: which output is asked for; the others are stored where it is computed.
    """

    kernel: str
    stores: tuple[str, ...]
    rows: str
    columns: str
    samples: tuple[str, str]
    cache_bytes: int
    requested: int = -1


@dataclass(frozen=True)
class TileReport:
    """What a task did. tiles: it was asked for; computed: of them, with their seconds."""

    tiles: tuple[Tile, ...]
    computed: tuple[Tile, ...]
    seconds: tuple[float, ...]
    peak_bytes: int


@dataclass
class GramReport:
    """What the stage did for one matrix."""

    store: str
    needed: int
    computed: int = 0
    reused: int = 0
    by_others: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    tile_seconds: list[float] = field(default_factory=list)


def gram_description(pools: Pools, kernel: Kernel, *, test: bool = False) -> dict[str, Any]:
    """What names the store of a kernel's matrix over the pool, or of the test set against the pool."""
    return {
        "rows": pools.test_description if test else pools.pool_description,
        "columns": pools.pool_description,
        "preprocessing": pools.preprocessing_description,
        "kernel": kernel.describe(),
        "fingerprint": kernel.fingerprint,
    }


def open_stores(
    pools: Pools, kernel: Kernel, dtype: str, root: Path, *, test: bool = False
) -> list[GramStore]:
    """The stores of every output of ``kernel``, created where there are none."""
    axes = [pools.test_axis, pools.pool_axis] if test else [pools.pool_axis]
    return [
        GramStore.open_or_create(
            root, gram_description(pools, output, test=test), axes, dtype, kernel.tile_side(dtype)
        )
        for output in kernel.outputs
    ]


def assemble(
    kernel: Kernel,
    stores: list[GramStore],
    rows: Path,
    columns: Path,
    tiles: Collection[Tile],
    workers: tasks.Open,
    *,
    tile_seconds: float,
    memory_bytes: int,
    requested: int = -1,
    progress: Progress = silent,
) -> list[GramReport]:
    """Compute the tiles of ``tiles`` that are not stored yet; one report for each output's store.

    rows, columns: paths of the feature stores. tile_seconds: expected for one tile, to size tasks.
    memory_bytes: what one worker may hold. requested: the output that is asked for; a tile that its store
    has is not computed for the sake of the others.

    Raises:
        StoreError: stored entries are not what the kernel computes now, or a prepared block is damaged.
        NumericalError: a tile has a value that is not finite; the samples are named.
    """
    started = time.perf_counter()
    features = FeatureStore(rows)
    job = replace(job_of(kernel, stores, rows, columns, memory_bytes), requested=requested)
    check_stored(kernel, stores, rows, columns, stores[requested].present() & set(tiles))
    reused = stores[requested].present() & set(tiles)
    missing = set(tiles) - reused
    reports = [GramReport(str(store.path), len(tiles), reused=len(reused)) for store in stores]
    if missing:
        opened = workers()
        largest = largest_group(features, memory_bytes)
        group = group_size(len(missing), tile_seconds, opened.count, largest)
        progress(len(reused), len(tiles), "tiles of the Gram matrix")
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(leases.Lease(store.path)) for store in stores]
            source = SharedOut(stores[requested], rectangles(missing, group), held)
            done = set(reused)
            for _, report in tasks.run(compute_tiles, source, (job,), opened):
                done.update(report.tiles)
                for total in reports:
                    total.computed += len(report.computed)
                    total.by_others += len(report.tiles) - len(report.computed)
                    total.tile_seconds.extend(report.seconds)
                    total.peak_bytes = max(total.peak_bytes, report.peak_bytes)
                progress(len(done), len(tiles), "tiles of the Gram matrix")
            elsewhere = len(tiles) - len(done)
            for total in reports:
                total.by_others += elsewhere
    for total in reports:
        total.seconds = time.perf_counter() - started
    return reports


class SharedOut:
    """A source of rectangles that leaves alone what another living driver is computing.

    Tiles that another driver holds come last: taken over when it dies, passed over when it finishes them.
    store: of the output that is asked for. held: this driver's leases on the stores of all outputs.
    """

    def __init__(self, store: GramStore, work: Iterable[Rectangle], held: Sequence[leases.Lease]) -> None:
        self._store = store
        self._work = deque(work)
        self._waiting: list[Rectangle] = []
        self._held = held
        self._looked = 0.0
        self._theirs: set[Tile] = set()

    def next(self) -> Rectangle | tasks.Wait | None:
        self._look()
        while self._work:
            rectangle = self._work.popleft()
            left = tuple(tile for tile in rectangle.tiles if not self._store.has(tile))
            if left and self._claim(left):
                return Rectangle(left)
            if left:
                self._waiting.append(Rectangle(left))
                # Two drivers that began together would go on to meet at every task.
                self._work.rotate(random.randrange(len(self._work) + 1))
        return tasks.WAIT if self._waiting else None

    def done(self, rectangle: Rectangle) -> None:
        for lease in self._held:
            lease.remove(rectangle.tiles)

    def _claim(self, tiles: tuple[Tile, ...]) -> bool:
        """Lease tiles, unless another driver did: looked at once more after the lease can be seen."""
        if not self._theirs.isdisjoint(tiles):
            return False
        for lease in self._held:
            lease.add(tiles)
        self._look()
        if self._theirs.isdisjoint(tiles):
            return True
        for lease in self._held:
            lease.remove(tiles)
            lease.add(())
        return False

    def _look(self) -> None:
        """What others hold and, at most once a second, whether what they held is still to be done."""
        own = {lease.path for lease in self._held}
        others = [one for lease in self._held for one in leases.living(lease.store) if one.path not in own]
        self._theirs = {tile for other in others for tile in other.tiles}
        if time.monotonic() - self._looked < 1.0:
            return
        self._work.extend(self._waiting)
        self._waiting.clear()
        self._looked = time.monotonic()


def job_of(kernel: Kernel, stores: list[GramStore], rows: Path, columns: Path, memory_bytes: int) -> GramJob:
    return GramJob(
        json.dumps(kernel.describe(), sort_keys=True),
        tuple(str(store.path) for store in stores),
        str(rows),
        str(columns),
        (digest(FeatureStore(rows).axes), digest(FeatureStore(columns).axes)),
        memory.cache_bytes(memory_bytes),
    )


def largest_group(features: FeatureStore, memory_bytes: int) -> int:
    """Side in tiles of the largest task whose prepared blocks a worker's cache can hold."""
    block = block_bytes(features)
    return max(1, memory.cache_bytes(memory_bytes) // max(2 * block, 1))


def block_bytes(features: FeatureStore) -> int:
    """Bytes of one whole prepared block in memory."""
    return features.side * prepared_sample_bytes(features)


def prepared_sample_bytes(features: FeatureStore) -> int:
    """Bytes of one prepared sample."""
    total = 0
    for name in features.attributes["arrays"]:
        array = features.array(name)
        total += int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
    return total


def compute_tiles(rectangle: Rectangle, job: GramJob) -> TileReport:
    """Compute and write the tiles of a rectangle; runs on a worker."""
    kernel = load_kernel(job.kernel)
    stores = _stores(job.stores, job.samples)
    on_device = device.used()
    cache = block_cache(job.cache_bytes)
    computed: list[Tile] = []
    seconds: list[float] = []

    def keep(made: _Made, blocks: Array, since: float) -> None:
        blocks = blocks if len(kernel.outputs) > 1 else blocks[None]
        for k in made.lacking:
            stores[k].write_tile(made.tile, blocks[k].astype(stores[k].dtype, copy=False))
        computed.append(made.tile)
        seconds.append(time.perf_counter() - since)
        # A line for each tile: a process that is killed leaves none without one.
        _record(
            [stores[k] for k in made.lacking],
            {
                "tiles": [made.tile],
                "seconds": [round(seconds[-1], 6)],
                "path": made.path,
                "made_with": provenance.arithmetic(on_device),
                "peak_bytes": memory.peak_bytes(),
            },
        )

    try:
        with device.queue(keep) as queue:
            for i, j in rectangle.tiles:
                if stores[job.requested].has((i, j)):
                    continue
                made = _Made((i, j), [k for k, store in enumerate(stores) if not store.has((i, j))])
                queue.add(made, partial(_pair, kernel, cache, job, made))
    except Exception as error:
        left = [tile for tile in rectangle.tiles if tile not in computed]
        _record(stores, {"failed": left, "error": str(error).splitlines()[0] if str(error) else repr(error)})
        raise
    return TileReport(rectangle.tiles, tuple(computed), tuple(seconds), memory.peak_bytes())


@dataclass
class _Made:
    """A tile that is computed. lacking: the outputs whose stores lack it. path: filled in with the block."""

    tile: Tile
    lacking: list[int]
    path: str = ""


def _pair(kernel: Kernel, cache: BlockCache, job: GramJob, made: _Made) -> Array:
    i, j = made.tile
    a, b = cache.block(job.rows, i, job.samples[0]), cache.block(job.columns, j, job.samples[1])
    made.path = kernel.path(a)
    with np.errstate(over="ignore", invalid="ignore"):  # refused where it is written, by the samples' names
        return kernel.pair(a, b)


def made_by(store: GramStore, tiles: Collection[Tile]) -> list[dict[str, Any]]:
    """For each of ``tiles`` that is recorded the newest record: ``path`` and ``made_with`` say what made it."""
    newest = {tuple(tile): line for line in store.records() for tile in line.get("tiles", ())}
    return [newest[tile] for tile in sorted(tiles) if tile in newest]


def check_stored(
    kernel: Kernel, stores: list[GramStore], rows: Path, columns: Path, reused: Collection[Tile]
) -> None:
    """Recompute a few entries of a few stored tiles.

    Raises:
        StoreError: they differ by more than other cuts of the same samples may (the store was made by
            another revision of the kernel, or by a defective machine).
    """
    if not reused:
        return
    ordered = sorted(reused)
    chosen = {ordered[k] for k in np.linspace(0, len(ordered) - 1, CHECKED_TILES).astype(int)}
    left, right = FeatureStore(rows), FeatureStore(columns)
    for i, j in sorted(chosen):
        a, b = _few(left.read_block(i)), _few(right.read_block(j))
        values = _computed(kernel, a, b).reshape(len(stores), len(a), len(b))
        moved = _conditioning(kernel, a, b, values)
        da, db = (to_host(kernel.diag(device.placed(x))).reshape(len(stores), -1) for x in (a, b))
        for k, store in enumerate(stores):
            try:
                stored = store.read_tile(i, j)[np.ix_(_positions(left, i), _positions(right, j))]
            except ChunkLost:
                continue  # set aside by the reader: it will be computed
            scale = np.sqrt(np.abs(da[k][:, None] * db[k][None, :])) + np.finfo(values.dtype).tiny
            allowed = (2e-5 if store.dtype == "float32" else 1e-8) + 8 * moved[k] / scale
            errors = np.abs(stored - values[k]) / scale
            if not (errors <= allowed).all():
                raise StoreError(
                    f"{store.path}: stored entries of tile {i}/{j} are not what the kernel computes now"
                    f" (relative difference {np.max(errors):.1e}); use another --root, or remove this store"
                )


def _conditioning(kernel: Kernel, a: Prepared, b: Prepared, values: np.ndarray) -> np.ndarray:
    """How far entries (outputs, n, m) move when prepared samples do by a few units of rounding.

    Samples that are copies of each other have cosines so near 1 that an NTK's entries are known to the
    square root of rounding alone (SPEC K13): any other cut of the matrix gives other digits there.
    """
    rng = np.random.default_rng(0)

    def moved(block: Prepared) -> Prepared:
        arrays = {}
        for name, values in block.arrays.items():
            if values.dtype.kind == "f":
                # Downwards: beyond 1 a cosine is clipped, and nothing would be seen to move.
                chosen = rng.choice(np.array([0, 1], values.dtype), values.shape)
                values = values * (1 - 16 * np.finfo(values.dtype).eps * chosen)
            arrays[name] = values
        return replace(block, arrays=arrays)

    others = [_computed(kernel, moved(a), moved(b)).reshape(values.shape) for _ in range(2)]
    return np.max([np.abs(other - values) for other in others], axis=0)


def _computed(kernel: Kernel, a: Prepared, b: Prepared) -> np.ndarray:
    return to_host(kernel.pair(device.placed(a), device.placed(b)))


def _few(block: Prepared) -> Prepared:
    """The first two and the last samples of a block."""
    picks = _picks(len(block))
    return replace(block, arrays={k: a[picks] for k, a in block.arrays.items()}, rows=block.rows[picks])


def _positions(store: FeatureStore, block: int) -> np.ndarray:
    extent = store.extent(block)
    return _picks(extent.stop - extent.start)


def _picks(n: int) -> np.ndarray:
    return np.unique(np.array([0, min(1, n - 1), n - 1]))


class BlockCache:
    """Prepared blocks within a byte budget, on the device where tiles are computed there; least recently used
    go first."""

    def __init__(self, limit: int, on_device: bool = False) -> None:
        self._limit = min(limit, device.memory_bytes() // DEVICE_SHARE) if on_device else limit
        self._blocks: OrderedDict[tuple[str, int, str], Prepared] = OrderedDict()
        self._on_device = on_device

    def block(self, path: str, index: int, samples: str) -> Prepared:
        """Block ``index`` of the feature store at ``path``; ``samples`` tells apart what it once held."""
        key = (path, index, samples)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        prepared = _features(path, samples).read_block(index)
        if self._on_device:
            prepared = prepared.on_device()
        while self._blocks and sum(b.nbytes for b in self._blocks.values()) + prepared.nbytes > self._limit:
            self._blocks.popitem(last=False)
        self._blocks[key] = prepared
        return prepared


def block_cache(limit: int) -> BlockCache:
    """This process's prepared blocks, of at most ``limit`` bytes, on the device where tiles are computed there."""
    return _cache(limit, device.used())


def forget() -> None:
    """Drop this process's prepared blocks: the solve that follows may need the memory."""
    _cache.cache_clear()
    memory.give_back()


@lru_cache(maxsize=1)
def _cache(limit: int, on_device: bool) -> BlockCache:
    return BlockCache(limit, on_device)


@lru_cache(maxsize=8)
def _features(path: str, samples: str) -> FeatureStore:
    return FeatureStore(Path(path))


@lru_cache(maxsize=8)
def _stores(paths: tuple[str, ...], samples: tuple[str, str]) -> list[GramStore]:
    return [GramStore(Path(path)) for path in paths]


def _record(stores: Iterable[GramStore], line: dict[str, Any]) -> None:
    for store in stores:
        store.record({"time": time.time(), "host": leases.host(), "pid": os.getpid(), **line})
