"""A two-worker cluster run against a bare two-process loop over the same tiles.

Both compute the same rectangles with the same ``compute_tiles`` into a RAM disk. The bare processes have
no scheduler, no leases and no driver: each takes the next rectangle when it is done with one. Starting
either is not counted.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import common
from workload import EXPONENTIAL, Matrix, convolutional, experiment, folder, here, save_samples

from cluster.local import open_cluster
from cluster.profiles import Profile
from cluster.worker import describe_worker
from pipelines import gram, plan, tasks
from pipelines.stores import FeatureStore
from pipelines.tiles import Rectangle, Tile, group_size, rectangles

WORKERS = 2
MEMORY = 4 * 2**30
ALLOWED = 1.1


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("cluster", "A two-worker cluster against a bare two-process loop", options)
    images = (512, (8, 8, 1)) if options.quick else (1280, (8, 8, 1))
    vectors = (10_000, (784,)) if options.quick else (28_000, (1568,))
    two_layers = convolutional(("exponential", 2), ("exponential", 1))
    profile = Profile(workers=WORKERS, memory=MEMORY, scratch=str(common.RAM_DISK))
    started = time.perf_counter()
    with (
        open_cluster(profile) as client,
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool,
    ):
        assert client is not None
        report.note(f"the cluster started in {time.perf_counter() - started:.1f} s, not counted")
        workers = tasks.Workers(client, WORKERS)
        compare(report, "convolutional, two layers, 8x8 images", images, two_layers, workers, pool, options)
        compare(
            report, f"exponential, vectors of {vectors[1][0]}", vectors, EXPONENTIAL, workers, pool, options
        )
    report.finish()


def compare(
    report: common.Report,
    what: str,
    samples: tuple[int, tuple[int, ...]],
    kernel: dict[str, Any],
    workers: tasks.Workers,
    pool: ProcessPoolExecutor,
    options: common.Options,
) -> None:
    n, shape = samples
    with folder(common.RAM_DISK) as data:
        save_samples(data, n, shape)
        matrix = Matrix.of(experiment(data, n, kernel))
        prepared = matrix.features(data, here)
        speed = plan.calibrate(matrix.kernel, shape, matrix.dtype)
        tile_seconds = matrix.grid.side**2 / speed.entries
        largest = gram.largest_group(FeatureStore(prepared), MEMORY)
        group = group_size(len(matrix.tiles), tile_seconds, WORKERS, largest)
        count = len(rectangles(matrix.tiles, group))

        def on_cluster(tiles: set[Tile]) -> common.Timed:
            pids = [worker["pid"] for worker in workers.client.run(describe_worker).values()]
            with folder(common.RAM_DISK) as root:
                before = common.cpu_seconds(pids)
                run = common.timed(
                    lambda: matrix.assemble(
                        root,
                        prepared,
                        lambda: workers,
                        tiles,
                        tile_seconds=tile_seconds,
                        memory_bytes=MEMORY,
                    )
                )
                return common.Timed(run.wall, run.cpu + common.cpu_seconds(pids) - before)

        def bare(tiles: set[Tile]) -> common.Timed:
            with folder(common.RAM_DISK) as root:
                job = gram.job_of(matrix.kernel, matrix.stores(root), prepared, prepared, MEMORY)
                started = time.perf_counter()
                cpu = sum(pool.map(compute, rectangles(tiles, group), itertools.repeat(job)))
                return common.Timed(time.perf_counter() - started, cpu)

        repeats = 1 if options.quick else 3
        few = set(sorted(matrix.tiles)[: 2 * WORKERS])
        bare(few)  # imports are not counted
        on_cluster(few)
        runs = common.interleaved(
            {"bare": lambda: bare(matrix.tiles), "cluster": lambda: on_cluster(matrix.tiles)}, repeats
        )
    ratio = common.median_ratio([r.wall for r in runs["cluster"]], [r.wall for r in runs["bare"]])
    cpu = common.median_ratio([r.cpu for r in runs["cluster"]], [r.cpu for r in runs["bare"]])
    seconds = common.best_wall(runs["bare"])
    report.add(
        what,
        f"{common.best_wall(runs['cluster']):.1f} s against {seconds:.1f} s",
        target="at most 10 % slower",
        ratio=f"{ratio:.2f}",
        met=ratio <= ALLOWED,
    )
    report.add("the same by CPU time of all processes", "", ratio=f"{cpu:.2f}")
    report.note(
        f"{what}: n = {n:,}, {len(matrix.tiles)} tiles in {count} tasks"
        f" of {seconds * WORKERS / count:.1f} s; median ratio of {repeats} neighbouring pairs of runs"
    )


def compute(rectangle: Rectangle, job: gram.GramJob) -> float:
    """Compute one rectangle in a bare process; returns CPU seconds."""
    return common.timed(lambda: gram.compute_tiles(rectangle, job)).cpu


if __name__ == "__main__":
    main()
