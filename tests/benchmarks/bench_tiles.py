"""Dot-product tiles into Zarr, against the same core's sgemm in the same run.

One process, one BLAS thread, through the pipeline's own ``assemble``; only entries that are computed
count, which are those of the lower triangle's tiles.
"""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
from workload import EXPONENTIAL, Matrix, experiment, folder, here, save_samples

MEMORY = 4 * 2**30


def main() -> None:
    options = common.options(__doc__)
    n, d, size, repeats = (6000, 784, 2048, 1) if options.quick else (20_000, 784, 4096, 3)
    report = common.Report("tiles", "Dot-product tiles into Zarr", options)
    with folder(common.RAM_DISK) as data:
        save_samples(data, n, (d,))
        matrix = Matrix.of(experiment(data, n, EXPONENTIAL))
        prepared = matrix.features(data, here)
        operations = 2.0 * d * matrix.entries

        def tiles(parent: Path | None) -> common.Timed:
            with folder(parent) as root:
                return common.timed(
                    lambda: matrix.assemble(root, prepared, here, tile_seconds=0.1, memory_bytes=MEMORY)
                )

        A = np.random.default_rng(1).random((size, size), dtype=np.float32)
        A @ A
        runs = common.interleaved(
            {
                "sgemm": lambda: common.timed(lambda: A @ A),
                "ram": lambda: tiles(common.RAM_DISK),
                "disk": lambda: tiles(None),
            },
            repeats,
        )
    sgemm = 2.0 * size**3 / common.best_wall(runs["sgemm"])
    sgemm_cpu = 2.0 * size**3 / common.best_cpu(runs["sgemm"])
    ram = operations / common.best_wall(runs["ram"])
    ram_cpu = operations / common.best_cpu(runs["ram"])
    disk = operations / common.best_wall(runs["disk"])
    report.add(f"sgemm, {size} x {size}", f"{sgemm / 1e9:.0f} GFLOP/s")
    report.add(
        f"exponential kernel, n = {n:,}, d = {d}, float32, RAM disk",
        f"{ram / 1e9:.0f} GFLOP/s",
        target="50 % of sgemm",
        ratio=f"{ram / sgemm:.0%}",
        met=ram >= 0.5 * sgemm,
    )
    report.add(
        "the same by CPU time (both)", f"{ram_cpu / 1e9:.0f} GFLOP/s", ratio=f"{ram_cpu / sgemm_cpu:.0%}"
    )
    report.add("the same on the disk", f"{disk / 1e9:.0f} GFLOP/s", ratio=f"{disk / sgemm:.0%}")
    report.note(
        f"{len(matrix.tiles)} tiles of side {matrix.grid.side}, {matrix.entries:,} entries;"
        f" best of {repeats} interleaved runs of {common.best_wall(runs['ram']):.1f} s"
    )
    report.finish()


if __name__ == "__main__":
    main()
