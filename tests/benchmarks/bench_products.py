"""One product of conjugate gradients with a Gram matrix, stored and recomputed, against what bounds it.

Stored: against plain reads of the same files, no checksum, into one buffer, by as many processes as there are workers;
on the disk their pages are dropped from memory before each run. Recomputed: against the single-precision products
of prepared samples that each tile begins with, by as many cores. Cluster and stores are there before anything is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import common
import numpy as np
from workload import EXPONENTIAL, Matrix, experiment, folder, here, save_samples

from cluster.local import open_cluster
from cluster.profiles import Profile
from pipelines import tasks
from pipelines.operators import GramOperator
from pipelines.recomputed import RecomputedTiles
from pipelines.site import Site
from pipelines.stores import GramStore

COLUMNS = 10
DIMENSION = 784
MEMORY = 4 * 2**30
TARGET = 0.7
REPEATS = 3


def main() -> None:
    options = common.options(__doc__)
    n = 6_000 if options.quick else 20_000
    report = common.Report(
        "products", f"A product of a Gram matrix, n = {n:,}, with {COLUMNS} columns", options
    )
    for count in (1, 2):
        with (
            open_cluster(Profile(workers=count, memory=MEMORY, scratch=str(common.RAM_DISK))) as client,
            ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool,
        ):
            workers = tasks.Workers(client, count)
            for place, name, cold in ((None, "disk", True), (common.RAM_DISK, "RAM disk", False)):
                with folder(place) as root:
                    made, features, store = matrix(root, n)
                    stored(report, root, store, workers, pool, name, cold)
                    if not cold:
                        recomputed(report, root, made, features, workers, pool)
    report.finish()


def matrix(root: Path, n: int) -> tuple[Matrix, Path, GramStore]:
    """The matrix of an exponential kernel over n vectors, stored in float32."""
    save_samples(root, n, (DIMENSION,))
    made = Matrix.of(experiment(root, n, EXPONENTIAL))
    features = made.features(root, here)
    made.assemble(root, features, here, tile_seconds=1.0, memory_bytes=MEMORY)
    (store,) = made.stores(root)
    return made, features, store


def stored(
    report: common.Report,
    root: Path,
    store: GramStore,
    workers: tasks.Workers,
    pool: ProcessPoolExecutor,
    name: str,
    cold: bool,
) -> None:
    files = [store.chunk("gram", tile) for tile in sorted(store.present())]
    for path in files:
        _sync(path)
    size = sum(path.stat().st_size for path in files)
    count = workers.count

    def read() -> common.Timed:
        _forget(files if cold else [])
        return common.timed(lambda: list(pool.map(read_plainly, [files[k::count] for k in range(count)])))

    def multiply() -> common.Timed:
        _forget(files if cold else [])
        return common.timed(product)

    product = _product(root, store, store.shape[0], workers)
    runs = common.interleaved({"read": read, "product": multiply}, REPEATS)
    plain, ours = common.best_wall(runs["read"]), common.best_wall(runs["product"])
    report.add(
        f"stored on the {name}, {count} worker{'s' * (count > 1)}",
        f"{size / ours / 1e9:.2f} GB/s ({ours:.2f} s)",
        target=f"{TARGET:.0%} of plain reads, {size / plain / 1e9:.2f} GB/s",
        ratio=f"{plain / ours:.0%}",
        met=plain / ours >= TARGET,
    )


def recomputed(
    report: common.Report,
    root: Path,
    made: Matrix,
    features: Path,
    workers: tasks.Workers,
    pool: ProcessPoolExecutor,
) -> None:
    source = RecomputedTiles.of(made.kernel, features, features, "float32", MEMORY)
    count = workers.count
    product = _product(root, source, source.shape[0], workers)
    tiles = len(made.tiles)

    def gemm() -> common.Timed:
        shares = [len(range(k, tiles, count)) for k in range(count)]
        return common.timed(lambda: list(pool.map(multiply_samples, [source.side] * count, shares)))

    runs = common.interleaved({"gemm": gemm, "product": lambda: common.timed(product)}, REPEATS)
    bound, ours = common.best_wall(runs["gemm"]), common.best_wall(runs["product"])
    report.add(
        f"recomputed, {count} worker{'s' * (count > 1)}",
        f"{ours:.2f} s",
        ratio=f"the bare products of samples take {bound:.2f} s: {bound / ours:.0%}",
    )


def _product(
    root: Path, source: GramStore | RecomputedTiles, n: int, workers: tasks.Workers
) -> Callable[[], None]:
    rows = np.arange(n)
    V = np.random.default_rng(0).standard_normal((n, COLUMNS))

    def product() -> None:
        with Site(root / "solves" / "benchmark", lambda: workers, MEMORY) as site:
            GramOperator(source, rows, site).matmul(V)

    product()  # what is imported and opened on first use is not a product's
    return product


def read_plainly(files: list[Path]) -> None:
    """Read files one after the other into one buffer; runs in another process."""
    buffer = bytearray(max(path.stat().st_size for path in files))
    for path in files:
        with path.open("rb", buffering=0) as stream:
            view = memoryview(buffer)
            while taken := stream.readinto(view):
                view = view[taken:]


def multiply_samples(side: int, tiles: int) -> None:
    """So many products of two blocks of samples in single precision; runs in another process."""
    A, B = np.random.default_rng(0).random(
        (2, side, DIMENSION), np.float32
    )  # two: NumPy takes A A^T for half the work
    out = np.empty((side, side), np.float32)
    for _ in range(tiles):
        np.matmul(A, B.T, out=out)


def _forget(files: list[Path]) -> None:
    """Drop files' pages from memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    time.sleep(0.1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    main()
