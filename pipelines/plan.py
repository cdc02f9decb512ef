"""The plan: what a run would compute, with bytes, operations, peak memory and time, before anything is."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from kernels.base import Cost, Kernel, Prepared

from . import device, memory, solvers
from .errors import DoesNotFit
from .experiment import Experiment
from .features import prepared_description
from .gram import gram_description
from .pools import Pools, fit_rows, kernel_shape, needed_tiles
from .precomputed import sizes
from .stores import FeatureStore, GramStore, existing
from .tiles import Grid, Tile
from .wording import bytes_text

CALIBRATION_SECONDS = 0.25

GROUPED = 48
"""Second images that compiled code is timed with, which takes them in groups of 16 or fewer at a time."""


T = TypeVar("T")


class Ask(Protocol):
    def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


@dataclass(frozen=True)
class Speed:
    """This machine: entries of the matrix per second of one core, float64 operations per second of a
    product with the threads that a solve may use."""

    entries: float
    operations: float


@dataclass(frozen=True)
class MatrixPlan:
    """One kernel's matrix over the pool, or of the test set against it.

    needed, present: tiles. tile_bytes: of one whole tile on disk.
    """

    role: str
    stores: tuple[Path | None, ...]
    grid: Grid
    needed: frozenset[Tile]
    present: frozenset[Tile]
    tile_bytes: int

    @cached_property
    def missing(self) -> frozenset[Tile]:
        return self.needed - self.present

    @property
    def disk_bytes(self) -> int:
        return len(self.missing) * self.tile_bytes * len(self.stores)


@dataclass(frozen=True)
class Plan:
    """What a run of one experiment would do. All sizes in bytes, all times in seconds.

    cost: of all missing tiles. worker: a worker's peak; worker_limit: what it may use.
    solve_bytes: the driver's peak; driver_limit: memory that is free. features_bytes: prepared blocks.
    path: name of the code that computes tiles; path_remark: why none quicker does, where it usually would.
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
    solve_bytes: int
    driver_limit: int
    method: str
    reason: str
    gram_seconds: float
    solve_seconds: float
    root: Path
    problem: str = ""

    @property
    def tiles_missing(self) -> int:
        return sum(len(matrix.missing) for matrix in self.matrices)

    @property
    def disk_bytes(self) -> int:
        return self.features_bytes + sum(matrix.disk_bytes for matrix in self.matrices)

    @property
    def seconds(self) -> float:
        return self.gram_seconds + self.solve_seconds

    def problems(self) -> list[str]:
        """Each thing that does not fit, with what would."""
        found = []
        if self.tiles_missing and self.worker.total > self.worker_limit:
            fewer = int(self.workers * self.worker_limit / self.worker.total)
            advice = f"workers = {fewer} or more memory" if fewer else "more memory"
            found.append(
                f"a worker needs {bytes_text(self.worker.total)} at its peak and may use"
                f" {bytes_text(self.worker_limit)}; set {advice} in the cluster profile"
            )
        if self.problem:
            found.append(self.problem)
        elif self.solve_bytes > self.driver_limit:
            fits = int(self.train * (self.driver_limit / self.solve_bytes) ** 0.5)
            found.append(
                f"the solve needs {bytes_text(self.solve_bytes)} and {bytes_text(self.driver_limit)} are free;"
                f" about {fits} training samples would fit"
            )
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
                    "needed": len(m.needed),
                    "present": len(m.needed & m.present),
                    "missing": len(m.missing),
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
            "method": self.method,
            "reason": self.reason,
            "gram_seconds": self.gram_seconds,
            "solve_seconds": self.solve_seconds,
            "seconds": self.seconds,
            "fits": not self.problems(),
            "problems": self.problems(),
        }


def here(function: Callable[..., T], *arguments: Any) -> T:
    """Ask this process."""
    return function(*arguments)


def make(
    experiment: Experiment,
    pools: Pools,
    root: Path,
    *,
    workers: int,
    worker_bytes: int,
    speed: Speed | None = None,
    ask: Ask = here,
) -> Plan:
    """The plan of an experiment over resolved pools, on ``workers`` workers of ``worker_bytes`` each.

    ask: how a worker, or a process on a machine like its, is asked for its path and speed.

    Raises:
        KernelError: the path that is asked for is not there, or cannot compute the kernel.
    """
    kernel = run_kernel(experiment)
    dtype = experiment.gram.dtype
    shape = kernel_shape(kernel.inputs, pools.preprocessing.output_shape(pools.raw_shape))
    like = sample(kernel, shape, dtype, 1)
    path, path_remark = ask(path_of, kernel, shape, dtype)
    speed = speed or calibrate(kernel, shape, dtype, ask=ask)
    matrices = matrix_plans(experiment, pools, kernel, root)
    cost = Cost(0, 0, 0)
    for (n, m), tiles in _extents(matrices).items():
        one = kernel.cost(n, m, shape, np.dtype(dtype).itemsize)
        cost = cost + Cost(tiles * one.operations, tiles * one.transcendentals, one.scratch_bytes)
    entries = sum(_computed_entries(kernel, matrix) for matrix in matrices)
    n = len(fit_rows(pools.split)) if experiment.solve.refit else len(pools.split.train)
    driver_limit = memory.available_bytes()
    method, reason, problem = _method(experiment, n, driver_limit)
    return Plan(
        experiment.name,
        tuple(matrices),
        path,
        path_remark,
        cost,
        _features_bytes(experiment, pools, kernel, root, like.nbytes),
        _disk_free(root),
        workers,
        memory.task_memory(
            kernel, shape, like.nbytes, len(pools.train.X), dtype, _blocks(matrices), worker_bytes
        ),
        worker_bytes,
        n,
        solvers.solve_bytes(method, n, experiment.solve.dtype),
        driver_limit,
        method,
        reason,
        entries / speed.entries / max(workers, 1),
        _solve_seconds(experiment, n, method, speed),
        root,
        problem,
    )


def run_kernel(experiment: Experiment) -> Kernel:
    """The kernel whose tiles a run computes: with what comes along in one pass, unless told not to."""
    kernel = experiment.kernel_object
    return kernel.joint() if experiment.gram.joint else kernel


def matrix_plans(experiment: Experiment, pools: Pools, kernel: Kernel, root: Path) -> list[MatrixPlan]:
    """Tiles needed and present of the pool's matrix and, for a test set of its own, of its block."""
    refit = experiment.solve.refit
    n = pools.pool_axis.rows
    side = kernel.tile_side(experiment.gram.dtype)
    grid = Grid(n, n, side, symmetric=True)
    plans = [
        _matrix(experiment, pools, kernel, root, "train", grid, needed_tiles(grid, pools.split, refit=refit))
    ]
    if pools.split.test is not None and not pools.split.test_in_pool:
        grid = Grid(pools.test_axis.rows, n, side, symmetric=False)
        columns = fit_rows(pools.split) if refit else pools.split.train
        tiles = grid.touched(pools.split.test, columns)
        plans.append(_matrix(experiment, pools, kernel, root, "test", grid, tiles))
    return plans


def path_of(kernel: Kernel, shape: tuple[int, ...], dtype: str) -> tuple[str, str]:
    """Name of the code that this process computes tiles of samples of ``shape`` by, and a remark or nothing.

    Raises:
        KernelError: the path that is asked for is not there, or cannot compute the kernel.
    """
    block = device.placed(sample(kernel, shape, dtype, 1))
    return kernel.path(block), kernel.remark(block)


def calibrate(
    kernel: Kernel,
    shape: tuple[int, ...],
    dtype: str,
    seconds: float = CALIBRATION_SECONDS,
    ask: Ask = here,
) -> Speed:
    """Time the kernel where its tiles will be computed, and a float64 product here, for about ``seconds``."""
    entries = ask(entries_per_second, kernel, shape, dtype, seconds)
    n = 1024
    A = np.ones((n, n))
    A @ A
    began = time.perf_counter()
    A @ A
    return Speed(entries, 2 * n**3 / (time.perf_counter() - began))


def entries_per_second(kernel: Kernel, shape: tuple[int, ...], dtype: str, seconds: float) -> float:
    """Entries of the matrix per second of one core or device, by the path that this process takes.

    Blocks are as wide as that path wants them: a device needs many pairs at once, compiled code takes second
    images in groups, and of a block with itself a kernel may compute one triangle alone.
    """
    from threadpoolctl import threadpool_limits

    largest = min(kernel.tile_side(dtype), 1024)
    grouped = "compiled" in path_of(kernel, shape, dtype)[0]
    least = largest if device.used() else min(GROUPED, largest) if grouped else 1
    size, block = 1, device.placed(sample(kernel, shape, dtype, least))
    with threadpool_limits(1):
        _seconds(kernel, block[:1], block)  # what is loaded, compiled or allocated once
        while True:
            if len(block) < size:
                block = device.placed(sample(kernel, shape, dtype, size))
            some = block[:size]
            taken = _seconds(kernel, some, block)
            if taken > seconds / 4 or size >= largest or len(some) < size:
                if taken < seconds:  # what else happens on the machine meets one call or the other
                    taken = min(taken, _seconds(kernel, some, block))
                return len(some) * len(block) / taken
            size = min(size * 2, largest)


def _seconds(kernel: Kernel, a: Prepared, b: Prepared) -> float:
    started = time.perf_counter()
    kernel.pair(a, b)
    device.finish()
    return max(time.perf_counter() - started, 1e-9)


def sample(kernel: Kernel, shape: tuple[int, ...], dtype: str, n: int) -> Prepared:
    """A prepared block of n random samples, to time a kernel or to learn the size of what it prepares.

    Of precomputed matrices the first n samples, or all where there are fewer.
    """
    stored, _ = sizes(kernel)
    if stored:
        return kernel.prepare(np.arange(min(n, stored), dtype=np.float64)[:, None])
    X = np.random.default_rng(0).random((n, *shape)).astype(dtype)
    return kernel.prepare(X)


def _computed_entries(kernel: Kernel, matrix: MatrixPlan) -> int:
    """Entries that are computed of the missing tiles: of one on the diagonal, kernels of images take a triangle."""
    entries = 0
    for i, j in matrix.missing:
        count = matrix.grid.entries((i, j))
        if matrix.grid.symmetric and i == j and kernel.inputs == "images":
            n = math.isqrt(count)
            count = n * (n + 1) // 2
        entries += count
    return entries


def _extents(matrices: Sequence[MatrixPlan]) -> Counter[tuple[int, int]]:
    """How many missing tiles there are of each extent: all but the last of an axis have the same."""
    found: Counter[tuple[int, int]] = Counter()
    for matrix in matrices:
        for tile in matrix.missing:
            rows, columns = matrix.grid.extent(tile)
            found[rows.stop - rows.start, columns.stop - columns.start] += 1
    return found


def _matrix(
    experiment: Experiment,
    pools: Pools,
    kernel: Kernel,
    root: Path,
    role: str,
    grid: Grid,
    needed: set[Tile],
) -> MatrixPlan:
    test = role == "test"
    axes = [pools.test_axis, pools.pool_axis] if test else [pools.pool_axis]
    dtype = experiment.gram.dtype
    stores: list[Path | None] = []
    present: set[Tile] = set()
    for output in kernel.outputs:
        described = {
            **gram_description(pools, output, test=test),
            "dtype": dtype,
            "side": grid.side,
        }
        found = existing(root, GramStore.kind, described, axes)
        stores.append(found[0] if found else None)
        # A tile is there when the experiment's own matrix has it: nothing is computed for the others alone.
        if found is not None and output.fingerprint == experiment.kernel_object.fingerprint:
            store = GramStore(found[0])
            present = {t for t in store.present() if store.grid.extent(t) == grid.extent(t)}
    tile_bytes = grid.side**2 * np.dtype(dtype).itemsize + 4
    return MatrixPlan(role, tuple(stores), grid, frozenset(needed), frozenset(present), tile_bytes)


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


def _method(experiment: Experiment, n: int, memory_bytes: int) -> tuple[str, str, str]:
    """Solver, why it, and what is wrong with its memory, if anything."""
    solve = experiment.solve
    try:
        solver, reason = solvers.choose(
            solve.method,
            n=n,
            ridges=solve.ridges,
            loo=solve.select == "loo",
            dtype=solve.dtype,
            memory_bytes=memory_bytes,
        )
    except DoesNotFit as error:
        return "cholesky" if solve.method == "auto" else solve.method, "does not fit", str(error)
    return type(solver).__name__.lower(), reason, ""


def _solve_seconds(experiment: Experiment, n: int, method: str, speed: Speed) -> float:
    """Factorisations at the speed of a matrix product, which LAPACK comes near at large n."""
    factor = n**3 / 3 / speed.operations
    loo = experiment.solve.select == "loo"
    count = solvers.EIGEN_COST if method == "eigen" else len(experiment.solve.ridges) * (2 if loo else 1)
    return factor * (count + (1 if experiment.solve.refit else 0))


def _blocks(matrices: list[MatrixPlan]) -> int:
    """Prepared blocks that the missing tiles read."""
    rows = {(matrix.role, i) for matrix in matrices for i, _ in matrix.missing}
    return len(rows | {("train", j) for matrix in matrices for _, j in matrix.missing})


def _disk_free(root: Path) -> int:
    folder = root.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
