"""The plan: what a run would compute, with bytes, operations, peak memory and time, before anything is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Cost, Kernel

from . import memory, solvers
from .experiment import Experiment
from .features import prepared_description
from .fit import SMALL
from .inventory import resumable_bytes
from .matrices import MatrixPlan, matrix_plans, missing_blocks, run_kernel
from .plan_base import Assumed, PlanBase, disk_free, largest_solve, rows_held
from .pools import Pools, fit_rows, kernel_shape
from .products import square_side
from .spectrum import Spectrum, sampled
from .speed import PRODUCT, Ask, Speed, calibrate, entry_operations, here, path_of, read_rate, sample
from .stores import FeatureStore, existing


@dataclass(frozen=True, kw_only=True)
class Plan(PlanBase):
    """What a run of one experiment with the exact kernel would do.

    matrices: stored ones; none where tiles are recomputed.
    """

    matrices: tuple[MatrixPlan, ...]

    @property
    def tiles_missing(self) -> int:
        return sum(matrix.missing_count for matrix in self.matrices)

    @property
    def recomputed(self) -> bool:
        """Whether tiles are computed at every pass, and none is stored."""
        return self.choice.recomputed

    @property
    def solve_disk_bytes(self) -> int:
        """What the solve keeps on the disk while it lasts: a factor, or the state of an iteration."""
        return self.choice.estimate.disk_bytes - sum(matrix.disk_bytes for matrix in self.matrices)

    @property
    def solve_worker_bytes(self) -> int:
        return self.choice.estimate.worker_bytes

    @property
    def worker_bytes(self) -> int:
        computing = self.worker.total if self.tiles_missing else 0
        return max(computing, self.solve_worker_bytes if self.recomputed else 0)

    @property
    def way(self) -> dict[str, str]:
        return {"method": self.method, "tiles": self.choice.estimate.tiles}

    @property
    def gram_seconds(self) -> float:
        return self.choice.estimate.matrix_seconds

    @property
    def seconds(self) -> float:
        return self.gram_seconds + self.solve_seconds

    def json(self) -> dict[str, Any]:
        return {
            **super().json(),
            "tiles": {
                m.role: {
                    "needed": m.needed_count,
                    "present": m.needed_count - m.missing_count,
                    "missing": m.missing_count,
                    "side": m.grid.side,
                    "outputs": len(m.stores),
                }
                for m in self.matrices
            },
            "tiles_missing": self.tiles_missing,
            "solve_disk_bytes": self.solve_disk_bytes,
            "gram_tiles": self.choice.estimate.tiles,
            "gram_seconds": self.gram_seconds,
        }


def make(
    experiment: Experiment,
    pools: Pools,
    root: Path,
    *,
    workers: int,
    worker_bytes: int,
    on_devices: bool = False,
    speed: Speed | None = None,
    ask: Ask = here,
    assumed: Assumed | None = None,
) -> Plan:
    """The plan of an experiment over resolved pools, on ``workers`` workers of ``worker_bytes`` each.

    on_devices: whether each worker has a GPU.
    ask: how a worker, or a process on a machine like its, is asked for its path and speed. assumed: machines that
    are not there; then nothing is timed.

    Raises:
        KernelError: the path that is asked for is not there, or cannot compute the kernel.
        ExperimentError: an option of ``[solve]`` does not fit the samples.
    """
    kernel = run_kernel(experiment)
    dtype = experiment.gram.dtype
    shape = kernel_shape(kernel.inputs, pools.preprocessing.output_shape(pools.raw_shape))
    like = sample(kernel, shape, dtype, 1)
    matrices = tuple(matrix_plans(experiment, pools, kernel, root))
    samples = _samples_bytes(experiment, pools, kernel, root, like.nbytes)
    if assumed is None:
        path, remark = ask(path_of, kernel, shape, dtype)
        n = pools.pool_axis.rows
        speed = speed or replace(
            calibrate(kernel, shape, dtype, ask=ask),
            read=read_rate(root, n * (n + 1) // 2 * np.dtype(dtype).itemsize),
        )
        driver_bytes = memory.available_bytes()
        free = disk_free(root) + resumable_bytes(root, experiment.name)
    else:
        path, remark = "assumed machines", f"rates of profile {assumed.name}, none of them measured"
        speed = assumed.speed(kernel, shape, dtype)
        driver_bytes, free = assumed.driver_bytes, assumed.disk_free

    def worker(kernel: Kernel, blocks: int) -> memory.TaskMemory:
        return memory.task_memory(kernel, shape, like.nbytes, len(pools.train.X), dtype, blocks, worker_bytes)

    all_blocks = -(-len(pools.train.X) // experiment.kernel_object.tile_side(dtype))
    problem = _problem(
        experiment,
        pools,
        matrices,
        operations=entry_operations(kernel, shape, dtype),
        tile_bytes=worker(experiment.kernel_object, all_blocks).total - memory.WORKER_BASE_BYTES,
    )
    # What prepared blocks take is taken in any case.
    means = solvers.Means(
        workers, driver_bytes, worker_bytes, max(free - samples, 0), speed, square_side(on_devices)
    )
    choice = solvers.choose(experiment.solve.method, problem, means)
    if choice.recomputed:
        matrices, kernel = (), experiment.kernel_object
        blocks = all_blocks
        cost = _cost_of_passes(kernel, shape, dtype, choice.estimate.passes, problem)
    else:
        blocks = missing_blocks(matrices)
        cost = _cost_of_tiles(kernel, shape, dtype, matrices)
    return Plan(
        experiment=experiment.name,
        matrices=matrices,
        path=path,
        path_remark=remark,
        cost=cost,
        samples_bytes=samples,
        disk_free=free,
        workers=workers,
        worker=worker(kernel, blocks),
        worker_limit=worker_bytes,
        train=problem.n,
        driver_limit=driver_bytes,
        choice=choice,
        select=experiment.solve.select,
        root=root,
        assumed=assumed.name if assumed else "",
    )


def _problem(
    experiment: Experiment,
    pools: Pools,
    matrices: tuple[MatrixPlan, ...],
    *,
    operations: float,
    tile_bytes: int,
) -> solvers.Problem:
    solve = experiment.solve
    n = len(fit_rows(pools.split)) if solve.refit else len(pools.split.train)
    return largest_solve(
        experiment,
        pools,
        tiles=experiment.gram.tiles,
        dtype=solve.dtype,
        itemsize=np.dtype(experiment.gram.dtype).itemsize,
        side=matrices[0].grid.side,
        missing_entries=sum(matrix.missing_entries for matrix in matrices),
        missing_bytes=sum(matrix.disk_bytes for matrix in matrices),
        predicted=rows_held(pools) * n,
        recomputable=not experiment.uses_precomputed,
        tile_bytes=tile_bytes,
        centres=solve.centres or 0,
        entry_operations=operations,
        spectrum=_spectrum(experiment, pools, n, operations),
    )


def _spectrum(experiment: Experiment, pools: Pools, n: int, operations: float) -> Spectrum | None:
    """What is guessed of the eigenvalues, where a choice or an estimate rests on them."""
    if experiment.uses_precomputed or experiment.solve.method not in ("auto", "conjugate-gradient"):
        return None
    if experiment.solve.method == "auto" and n <= SMALL:
        return None
    return sampled(pools, experiment.kernel_object, experiment.gram.dtype, PRODUCT / operations)


def _cost_of_tiles(
    kernel: Kernel, shape: tuple[int, ...], dtype: str, matrices: tuple[MatrixPlan, ...]
) -> Cost:
    """Of all missing tiles."""
    extents: Counter[tuple[int, int]] = Counter()
    for matrix in matrices:
        extents.update(matrix.extents())
    cost = Cost(0, 0, 0)
    for (n, m), tiles in extents.items():
        one = kernel.cost(n, m, shape, np.dtype(dtype).itemsize)
        cost = cost + Cost(tiles * one.operations, tiles * one.transcendentals, one.scratch_bytes)
    return cost


def _cost_of_passes(
    kernel: Kernel, shape: tuple[int, ...], dtype: str, passes: int, problem: solvers.Problem
) -> Cost:
    """Of computing the lower triangle so many times."""
    side = kernel.tile_side(dtype)
    one = kernel.cost(side, side, shape, np.dtype(dtype).itemsize)
    tiles = passes * problem.n * (problem.n + 1) / 2 / side**2
    return Cost(round(tiles * one.operations), round(tiles * one.transcendentals), one.scratch_bytes)


def _samples_bytes(
    experiment: Experiment, pools: Pools, kernel: Kernel, root: Path, sample_bytes: int
) -> int:
    """Prepared blocks that are not stored yet, with preprocessed samples where those are stored too."""
    dtype = experiment.gram.dtype
    described = {**prepared_description(pools, kernel, dtype), "side": kernel.tile_side(dtype)}
    if existing(root, FeatureStore.kind, described, [pools.pool_axis]):
        return 0
    rows = len(pools.split.pool_rows)
    if pools.split.test is not None and not pools.split.test_in_pool:
        rows += len(pools.split.test)
    if pools.preprocessing.expensive:
        shape = pools.preprocessing.output_shape(pools.raw_shape)
        sample_bytes += int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = pools.train.X.nbytes + (pools.test.X.nbytes if pools.test is not None else 0)
    return rows * sample_bytes + raw
