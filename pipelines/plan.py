"""The plan: what a run would compute, with bytes, operations, peak memory and time, before anything is."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Cost, Kernel

from . import memory, solvers
from .errors import DoesNotFit
from .experiment import Experiment
from .features import prepared_description
from .fit import SMALL, train_targets
from .inventory import resumable_bytes
from .matrices import MatrixPlan, matrix_plans, missing_blocks, run_kernel
from .pools import Pools, fit_rows, kernel_shape
from .products import square_side
from .solvers.conjugate_gradient import ConjugateGradient
from .spectrum import Spectrum, sampled
from .speed import Ask, Speed, calibrate, here, nearest_folder, path_of, read_rate, sample
from .stores import FeatureStore, existing
from .wording import bytes_text


@dataclass(frozen=True)
class Assumed:
    """Machines that are not there, to plan for; rates per second.

    name: of the profile that describes them. float64, float32: operations of a product in one worker;
    transcendentals: calls of exp, arccos or sqrt there. driver: operations of a float64 product in the driver.
    driver_bytes: its memory. disk_free: bytes; read: bytes of the disk, all workers together.
    """

    name: str
    float64: float
    float32: float
    transcendentals: float
    driver: float
    driver_bytes: int
    disk_free: int
    read: float

    def speed(self, kernel: Kernel, shape: tuple[int, ...], dtype: str) -> Speed:
        """Rates for a kernel, from what it says that an entry costs."""
        side = kernel.tile_side(dtype)
        one = kernel.cost(side, side, shape, np.dtype(dtype).itemsize)
        rate = self.float32 if dtype == "float32" else self.float64
        seconds = one.operations / rate + one.transcendentals / self.transcendentals
        return Speed(side**2 / seconds, self.driver, self.float64, self.float32, self.read)


@dataclass(frozen=True)
class Plan:
    """What a run of one experiment would do. All sizes in bytes, all times in seconds.

    matrices: stored ones; none where tiles are recomputed. cost: of all missing tiles, or of all passes over
    recomputed ones. worker: a worker's peak while it computes tiles; worker_limit: what it may use. driver_limit:
    memory that is free. choice: of the solver, and what it takes. features_bytes: prepared blocks.
    path: name of the code that computes tiles; path_remark: why none quicker does, where it usually would.
    assumed: the profile of machines that are not there, or nothing.
    """

    experiment: str
    matrices: tuple[MatrixPlan, ...]
    path: str
    path_remark: str
    cost: Cost
    features_bytes: int
    disk_free: int
    workers: int
    worker: memory.TaskMemory
    worker_limit: int
    train: int
    driver_limit: int
    choice: solvers.Choice
    root: Path
    assumed: str = ""

    @property
    def tiles_missing(self) -> int:
        return sum(matrix.missing_count for matrix in self.matrices)

    @property
    def method(self) -> str:
        return self.choice.method

    @property
    def reason(self) -> str:
        return self.choice.reason

    @property
    def recomputed(self) -> bool:
        """Whether tiles are computed at every pass, and none is stored."""
        return self.choice.recomputed

    @property
    def solve_bytes(self) -> int:
        """The driver's peak."""
        return self.choice.estimate.driver_bytes

    @property
    def solve_disk_bytes(self) -> int:
        """What the solve keeps on the disk while it lasts: a factor, or the state of an iteration."""
        return self.choice.estimate.disk_bytes - sum(matrix.disk_bytes for matrix in self.matrices)

    @property
    def solve_worker_bytes(self) -> int:
        """A worker's peak during the solve; 0 where none takes part."""
        solving = self.choice.estimate.worker_bytes
        return solving + self.worker.total - memory.WORKER_BASE_BYTES if self.recomputed else solving

    @property
    def disk_bytes(self) -> int:
        return self.features_bytes + self.choice.estimate.disk_bytes

    @property
    def gram_seconds(self) -> float:
        return self.choice.estimate.matrix_seconds

    @property
    def solve_seconds(self) -> float:
        return self.choice.estimate.seconds

    @property
    def seconds(self) -> float:
        return self.gram_seconds + self.solve_seconds

    def problems(self) -> list[str]:
        """Each thing that does not fit, with what would."""
        found = []
        computing = self.worker.total if self.tiles_missing else 0
        needed = max(computing, self.solve_worker_bytes if self.recomputed else 0)
        if needed > self.worker_limit:
            fewer = int(self.workers * self.worker_limit / needed)
            advice = f"workers = {fewer} or more memory" if fewer else "more memory"
            found.append(
                f"a worker needs {bytes_text(needed)} at its peak and may use"
                f" {bytes_text(self.worker_limit)}; set {advice} in the cluster profile"
            )
        if self.choice.problem:
            found.append(self.choice.problem)
        if self.disk_bytes > self.disk_free:
            found.append(
                f"the stores need {bytes_text(self.disk_bytes)} more under {self.root} and"
                f" {bytes_text(self.disk_free)} are free; choose another --root, or make room (megagram store clean)"
            )
        return found

    def check(self) -> None:
        """Raise DoesNotFit when the run cannot fit this machine; the message says what would."""
        problems = self.problems()
        if problems:
            raise DoesNotFit("; ".join(problems))

    def json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "experiment": self.experiment,
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
            "path": self.path,
            "operations": self.cost.operations,
            "transcendentals": self.cost.transcendentals,
            "disk_bytes": self.disk_bytes,
            "disk_free": self.disk_free,
            "workers": self.workers,
            "worker_peak_bytes": self.worker.total,
            "worker_limit_bytes": self.worker_limit,
            "solve_bytes": self.solve_bytes,
            "driver_limit_bytes": self.driver_limit,
            "solve_worker_bytes": self.solve_worker_bytes,
            "solve_disk_bytes": self.solve_disk_bytes,
            "method": self.method,
            "gram_tiles": self.choice.estimate.tiles,
            "passes": self.choice.estimate.passes,
            "reason": self.reason,
            "gram_seconds": self.gram_seconds,
            "solve_seconds": self.solve_seconds,
            "task_seconds": self.choice.estimate.task_seconds,
            "seconds": self.seconds,
            "assumed": self.assumed or None,
            "fits": not self.problems(),
            "problems": self.problems(),
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
    features = _features_bytes(experiment, pools, kernel, root, like.nbytes)
    if assumed is None:
        path, remark = ask(path_of, kernel, shape, dtype)
        n = pools.pool_axis.rows
        speed = speed or replace(
            calibrate(kernel, shape, dtype, ask=ask),
            read=read_rate(root, n * (n + 1) // 2 * np.dtype(dtype).itemsize),
        )
        driver_bytes = memory.available_bytes()
        disk_free = _disk_free(root) + resumable_bytes(root, experiment.name)
    else:
        path, remark = "assumed machines", f"rates of profile {assumed.name}, none of them measured"
        speed = assumed.speed(kernel, shape, dtype)
        driver_bytes, disk_free = assumed.driver_bytes, assumed.disk_free
    problem = _problem(experiment, pools, matrices, speed)
    # What prepared blocks take is taken in any case.
    means = solvers.Means(
        workers, driver_bytes, worker_bytes, max(disk_free - features, 0), speed, square_side(on_devices)
    )
    choice = solvers.choose(experiment.solve.method, problem, means)
    if choice.recomputed:
        matrices, kernel = (), experiment.kernel_object
        blocks = -(-len(pools.train.X) // kernel.tile_side(dtype))
        cost = _cost_of_passes(kernel, shape, dtype, choice.estimate.passes, problem)
    else:
        blocks = missing_blocks(matrices)
        cost = _cost_of_tiles(kernel, shape, dtype, matrices)
    return Plan(
        experiment.name,
        matrices,
        path,
        remark,
        cost,
        features,
        disk_free,
        workers,
        memory.task_memory(kernel, shape, like.nbytes, len(pools.train.X), dtype, blocks, worker_bytes),
        worker_bytes,
        problem.n,
        driver_bytes,
        choice,
        root,
        assumed.name if assumed else "",
    )


def _problem(
    experiment: Experiment, pools: Pools, matrices: tuple[MatrixPlan, ...], speed: Speed
) -> solvers.Problem:
    """The largest solve of a run."""
    solve, split = experiment.solve, pools.split
    n = len(fit_rows(split)) if solve.refit else len(split.train)
    held = sum(0 if rows is None else len(rows) for rows in (split.validation, split.test))
    dtype = experiment.gram.dtype
    return solvers.Problem(
        n=n,
        columns=train_targets(pools, split.train).matrix.shape[1],
        ridges=len(solve.ridges),
        tiles=experiment.gram.tiles,
        loo=solve.select == "loo",
        refit=solve.refit,
        dtype=solve.dtype,
        itemsize=np.dtype(dtype).itemsize,
        side=matrices[0].grid.side,
        missing_entries=sum(matrix.missing_entries for matrix in matrices),
        missing_bytes=sum(matrix.disk_bytes for matrix in matrices),
        predicted=held * n,
        recomputable=not experiment.uses_precomputed,
        centres=solve.centres or 0,
        max_iterations=solve.max_iterations or ConjugateGradient.max_iterations,
        shifts=tuple(ridge * (1 if solve.absolute else n) for ridge in solve.ridges),
        tolerance=solve.tolerance or ConjugateGradient.tolerance,
        spectrum=_spectrum(experiment, pools, n, speed),
    )


def _spectrum(experiment: Experiment, pools: Pools, n: int, speed: Speed) -> Spectrum | None:
    """What is guessed of the eigenvalues, where a choice or an estimate rests on them."""
    if experiment.uses_precomputed or experiment.solve.method not in ("auto", "conjugate-gradient"):
        return None
    if experiment.solve.method == "auto" and n <= SMALL:
        return None
    return sampled(pools, experiment.kernel_object, experiment.gram.dtype, speed.entries)


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


def _features_bytes(
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


def _disk_free(root: Path) -> int:
    return shutil.disk_usage(nearest_folder(root)).free
