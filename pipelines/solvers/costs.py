"""What each solver would take: seconds, memory of the driver and of a worker, disk; and what stands against it.

All figures are models: operations at the measured rate of a product, bytes at that of the disk, and a number of
iterations that is only known afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .. import normal
from ..memory import WORKER_BASE_BYTES
from ..operators import PANEL
from ..products import SQUARE, outstanding
from ..spectrum import Spectrum
from ..speed import CACHED_READ, PRODUCT, Speed
from ..wording import bytes_text
from . import conjugate_gradient, tiled_cholesky
from . import nystrom as falkon
from .iterated import PROBES
from .preconditioner import Price, iterations, preconditioner_bytes, rank_within
from .sketch import SKETCH_COLUMNS
from .tiled_cholesky import TiledCholesky

EIGEN_COST = 18.0
"""Time of an eigendecomposition in units of one Cholesky factor; measured 18.1 at n = 2000, one thread."""

VECTOR_COLUMNS = 64
"""Columns of n float64 beside the matrices: targets, coefficients, residuals, probes."""

TILED_EFFICIENCY = 0.8
"""Of the rate of a product, what a tiled factor reaches."""

GUESSED_ITERATIONS = 100
"""Of conjugate gradients where nothing is known of the spectrum."""

FALKON_ITERATIONS = 30

LEAST_RANK = 64
"""Of a preconditioner; its rank is doubled while that pays."""

DENSE_PRODUCTS = 6.0
"""Operations of making a preconditioner of rank r beside the sketch, in n * r^2."""

PAGE = 4096
"""Bytes in which memory is handed out."""

DISK = "disk"

TASK_SECONDS = 4e-3
"""What it takes the driver to hand out one task, to hear of its end and to add what it found."""


@dataclass(frozen=True)
class Problem:
    """What is to be solved, and what of its matrix is there.

    n: training samples; columns: of the targets; ridges: how many. tiles: as in ``[gram]``. loo, refit: whether they
    are asked for. dtype: of a factor. itemsize, side: of the matrix's tiles. missing_entries, missing_bytes: of the
    tiles to be computed and stored first, where they are stored. predicted: entries of the blocks for validation and
    test samples. recomputable: whether tiles can be computed more than once. tile_bytes: what computing one takes of
    a worker beside what it solves with, where they are recomputed. centres: of Nystrom, or 0. shifts: what each ridge
    adds to the diagonal, without jitter. tolerance: of iterations. entry_operations: see ``speed.entry_operations``.
    spectrum: what is guessed of the matrix's eigenvalues. whitened: whether it is one of features of a Nystrom map,
    which are coordinates along eigenvectors of its landmarks' matrix.
    """

    n: int
    columns: int
    ridges: int
    tiles: str = "auto"
    loo: bool = False
    refit: bool = False
    dtype: str = "float64"
    itemsize: int = 4
    side: int = 2048
    missing_entries: int = 0
    missing_bytes: int = 0
    predicted: int = 0
    recomputable: bool = True
    tile_bytes: int = 0
    centres: int = 0
    max_iterations: int = 0
    shifts: tuple[float, ...] = ()
    tolerance: float = 1e-6
    entry_operations: float = 1.0
    spectrum: Spectrum | None = None
    whitened: bool = False


@dataclass(frozen=True)
class Means:
    """What there is to solve with: workers, bytes that the driver and each worker may hold, disk, rates; square: rows
    and columns that one task of a product takes."""

    workers: int
    driver_bytes: int
    worker_bytes: int
    disk_free: int
    speed: Speed
    square: int = SQUARE


@dataclass(frozen=True)
class Estimate:
    """One way to solve. tiles: "stored" or "recomputed". matrix_seconds: to compute the tiles that are stored first.
    seconds: of the solve; task_seconds: of these, what the driver takes to hand out tasks. passes: over a recomputed
    matrix. rank_bytes: for making a preconditioner; memory_bound: whether it is memory that keeps them from being more;
    pass_columns: what a pass costs beside its columns, in columns of a float64 product; floor: the smallest eigenvalue
    that the matrix is thought to have. On these four rests the preconditioner, and with it the bits of a solution: none
    depends on what was timed. whitened: of the problem, where the way rests on it. obstacle: why it cannot be,
    or nothing.
    """

    method: str
    tiles: str
    matrix_seconds: float
    seconds: float
    driver_bytes: int
    worker_bytes: int
    disk_bytes: int
    passes: int = 0
    rank_bytes: int = 0
    memory_bound: bool = True
    pass_columns: float = 0.0
    floor: float = 0.0
    task_seconds: float = 0.0
    whitened: bool = False
    obstacle: str = ""

    @property
    def lacks_disk_alone(self) -> bool:
        return f" of {DISK}, " in self.obstacle

    @property
    def total_seconds(self) -> float:
        return self.matrix_seconds + self.seconds

    @property
    def name(self) -> str:
        return self.method if self.tiles == "stored" else f"{self.method} with recomputed tiles"


def solve_bytes(method: str, n: int, dtype: str, *, made: bool = False) -> int:
    """Bytes that a method in memory ("cholesky" or "eigen") holds at its peak for a path of any length.

    made: whether the matrix is made in memory, of features; of one that is read again for every ridge Cholesky holds
    a triangle alone. The process itself and three tiles come on top.
    """
    itemsize = np.dtype(_wide(dtype)).itemsize
    matrix = {"cholesky": 1, "eigen": 2}[method] * n * n * itemsize
    if method == "cholesky" and not made:
        # Half of each of the squares on the diagonal, and of a page for each column, are above it.
        matrix = n * min((n + PANEL) * itemsize + PAGE, 2 * n * itemsize) // 2
    return matrix + VECTOR_COLUMNS * n * 8


def estimates(problem: Problem, means: Means) -> Iterator[Estimate]:
    """Every way to solve a problem exactly, in the order in which the first of two alike is preferred."""
    yield _in_memory("cholesky", problem, means)
    yield _in_memory("eigen", problem, means)
    yield _tiled(problem, means)
    for tiles in ("stored", "recomputed"):
        yield _iterative("conjugate-gradient", problem, means, tiles)


def nystrom(problem: Problem, means: Means) -> Iterator[Estimate]:
    """The ways to solve with centres, which is another model."""
    for tiles in ("stored", "recomputed"):
        yield _iterative("nystrom", problem, means, tiles)


def _in_memory(method: str, problem: Problem, means: Means) -> Estimate:
    n, speed = problem.n, means.speed
    factor = n**3 / 3 / speed.operations
    if problem.dtype == "float32":
        factor /= 2
    # Leave-one-out inverts each factor, at the price of another.
    count = problem.ridges * (2 if problem.loo else 1)
    factors = (EIGEN_COST if method == "eigen" else count) + (1 if problem.refit else 0)
    needed = solve_bytes(method, n, problem.dtype)
    # Cholesky reads again for every ridge, mostly from the page cache, which is little beside a factor.
    seconds = factor * factors + _read_seconds(problem, means, 1)
    return _stored(method, problem, means, seconds, needed, 0, 0)


def _tiled(problem: Problem, means: Means) -> Estimate:
    n, speed, side = problem.n, means.speed, TiledCholesky.side
    itemsize = np.dtype(_wide(problem.dtype)).itemsize
    rate = speed.worker_single if problem.dtype == "float32" else speed.worker
    arithmetic = tiled_cholesky.operations(n) / (rate * TILED_EFFICIENCY * means.workers)
    on_disk = tiled_cholesky.factor_bytes(n, side, itemsize)
    cache = tiled_cholesky.cache_bytes(n, side, itemsize, means.worker_bytes)
    needed = tiled_cholesky.worker_bytes(n, side, itemsize, cache, problem.side**2 * problem.itemsize)
    # Of each column of tiles all finished ones to the left are read again, but for what the workers have kept.
    kept = min(1.0, means.workers * cache / on_disk)
    read = (1 - kept) * n**3 / (6 * side) * itemsize / speed.read
    tasks = math.ceil(n / side) ** 2 / 2 * TASK_SECONDS
    one = arithmetic + read + 3 * on_disk / speed.read + tasks + _read_seconds(problem, means, 2)
    seconds = one * (problem.ridges + (1 if problem.refit else 0))
    driver = tiled_cholesky.driver_bytes(n, problem.columns)
    found = _stored("tiled-cholesky", problem, means, seconds, driver, needed, on_disk)
    return replace(found, task_seconds=tasks * (problem.ridges + (1 if problem.refit else 0)))


def _iterative(method: str, problem: Problem, means: Means, tiles: str) -> Estimate:
    if method == "conjugate-gradient":
        # The solver doubles the rank while that pays, within the memory that it is given.
        ranks = [LEAST_RANK * 2**k for k in range(20)]
        within = [rank for rank in ranks if rank <= largest_rank(problem, means)] or [LEAST_RANK]
        best = _best_rank(problem, within)
        # The solver learns the spectrum as it goes, and may want more than was guessed.
        wanted = problem.n if best is None else 2 * best
        most = min(wanted, within[-1])
        room = _gradients(problem, means, tiles, most)
        found = _gradients(problem, means, tiles, best or within[0])
        found = replace(
            found,
            driver_bytes=room.driver_bytes,
            # Where a rank is thought of, a sketch grows by no more columns at a time than that.
            worker_bytes=(room if best is None else found).worker_bytes,
            disk_bytes=room.disk_bytes,
            rank_bytes=room.rank_bytes,
            memory_bound=most < wanted and 2 * most <= (problem.n + 1) // 2,
            floor=floor_of(problem),
        )
        return replace(found, obstacle=obstacle_of(found, problem, means))
    n, m = problem.n, problem.centres
    passes = min(FALKON_ITERATIONS, problem.max_iterations or FALKON_ITERATIONS) + 3
    arithmetic = passes * falkon.iteration_operations(n, m, problem.columns, problem.ridges)
    driver = falkon.driver_bytes(m, problem.columns, problem.ridges, n) + VECTOR_COLUMNS * n * 8
    # Stored tiles are whole: centres drawn at random lie in nearly all of them.
    touched = min(n, m * problem.side) if tiles == "stored" else m
    disk = 6 * _systems(problem) * m * 8
    found = _by_passes(
        method, problem, means, tiles, n * touched, passes, arithmetic, driver, disk, _systems(problem)
    )
    worker = WORKER_BASE_BYTES + normal.worker_bytes(problem.side, m, _systems(problem), problem.itemsize)
    if tiles == "recomputed":
        worker += problem.tile_bytes
    found = replace(found, worker_bytes=max(found.worker_bytes, worker))
    return replace(found, obstacle=obstacle_of(found, problem, means))


def _gradients(problem: Problem, means: Means, tiles: str, rank: int) -> Estimate:
    """Conjugate gradients with a preconditioner of one rank."""
    n, speed = problem.n, means.speed
    counts = _iterations(problem, rank)
    pass_columns = _pass_columns(problem)
    sketching = 2 * rank / n
    if tiles == "stored":
        # The first sketch is worth a pass, each further one doubles the columns; they lie in nearly all tiles.
        first = min(rank, max(LEAST_RANK, pass_columns))
        sketching = math.ceil(math.log2(rank / first)) + 1 + 2 * (rank > SKETCH_COLUMNS)
    passes = math.ceil(max(counts) + sketching) + 1
    one = conjugate_gradient.iteration_operations(n, problem.columns, 1, rank)
    picking = 2.0 * n * rank * min(rank, SKETCH_COLUMNS) * speed.worker / speed.worker_single
    arithmetic = sum(counts) * one + picking
    rank_bytes = preconditioner_bytes(n, rank, "float32")
    driver = conjugate_gradient.driver_bytes(n, problem.columns, problem.ridges, rank_bytes)
    disk = conjugate_gradient.checkpoint_bytes(n, problem.columns, problem.ridges, rank_bytes)
    widest = max(_systems(problem), min(rank, SKETCH_COLUMNS))
    disk += _sums_bytes(n, means, widest)
    entries = n * (n + 1) // 2
    found = _by_passes(
        "conjugate-gradient", problem, means, tiles, entries, passes, arithmetic, driver, disk, widest
    )
    dense = DENSE_PRODUCTS * n * rank**2 / speed.operations * (2 if problem.refit else 1)
    return replace(found, seconds=found.seconds + dense, pass_columns=pass_columns, rank_bytes=rank_bytes)


def _sums_bytes(n: int, means: Means, columns: int) -> int:
    """Bytes of the files in which the squares of a product leave what they add, for the rows of both triangles.

    There are no more files than squares, nor larger ones than the matrix has rows.
    """
    along = math.ceil(n / means.square)
    files = min(outstanding(means.workers), along * (along + 1) // 2)
    return files * 2 * min(means.square, n) * columns * 8


def _best_rank(problem: Problem, ranks: list[int]) -> int | None:
    """The rank with which a solve is thought to cost least; None where nothing is known of the spectrum."""
    spectrum = problem.spectrum
    if spectrum is None or not problem.shifts:
        return None
    shifts = tuple(shift + floor_of(problem) for shift in problem.shifts)
    price = Price(problem.n, shifts, problem.tolerance, _pass_columns(problem), sampled=True)

    def columns(rank: int) -> float:
        return price.solving(spectrum.eigenvalue(problem.n, rank), rank) + price.growing(
            rank, rank, "float32"
        )

    return min(ranks, key=columns)


def _pass_columns(problem: Problem) -> float:
    """What a pass over the matrix costs beside its columns, in columns of a float64 product, whatever the machine.

    Where either tiles may be taken it is what the cheaper cost, whichever are taken: that choice rests on times.
    """
    ways = {"stored": read_columns(problem.itemsize)}
    if problem.recomputable:
        ways["recomputed"] = problem.entry_operations / 4
    return ways.get(problem.tiles, min(ways.values()))


def read_columns(itemsize: int) -> float:
    """What reading numbers of so many bytes costs, in columns of a float64 product, whatever the machine."""
    return PRODUCT * itemsize / (4 * CACHED_READ)


def _by_passes(
    method: str,
    problem: Problem,
    means: Means,
    tiles: str,
    entries: int,
    passes: int,
    arithmetic: float,
    driver: int,
    disk: int,
    widest: int,
) -> Estimate:
    """A way that goes over so many entries of the matrix in each of so many passes. arithmetic: float64 operations
    of the workers beside the entries themselves. widest: columns of the widest product."""
    speed, workers = means.speed, means.workers
    repeated = 2 if problem.refit else 1
    handing = repeated * passes * max(1, entries // means.square**2) * TASK_SECONDS
    # Of a square, the rows that are multiplied and the sums, for both triangles.
    worker = WORKER_BASE_BYTES + 3 * problem.side**2 * 8 + 2 * means.square * widest * 12
    solve = repeated * arithmetic / speed.worker / workers + handing
    if tiles == "recomputed":
        worker += problem.tile_bytes
        solve += (repeated * passes * entries + problem.predicted) / speed.entries / workers
        return Estimate(
            method, tiles, 0.0, solve, driver, worker, disk, passes * repeated, task_seconds=handing
        )
    solve += repeated * passes * entries * problem.itemsize / speed.read
    found = _stored(method, problem, means, solve, driver, worker, disk)
    return replace(found, task_seconds=handing, passes=passes * repeated)


def _systems(problem: Problem) -> int:
    return problem.ridges * (problem.columns + PROBES)


def _iterations(problem: Problem, rank: int) -> list[float]:
    """About how many iterations the systems of each ridge take, from the condition number that is left."""
    most = float(problem.max_iterations or problem.n)
    if problem.spectrum is None or not problem.shifts:
        return [min(float(GUESSED_ITERATIONS), most)] * problem.ridges
    tail = problem.spectrum.eigenvalue(problem.n, rank)
    bounds = [iterations(tail, shift + floor_of(problem), problem.tolerance) for shift in problem.shifts]
    return [min(max(one, 1.0), most) for one in bounds]


def floor_of(problem: Problem) -> float:
    """The smallest eigenvalue that the matrix is thought to have."""
    return 0.0 if problem.spectrum is None else problem.spectrum.smallest_eigenvalue(problem.n)


def largest_rank(problem: Problem, means: Means) -> int:
    """Of a preconditioner whose making takes at most half of the driver's memory."""
    return rank_within(means.driver_bytes // 2, problem.n, "float32")


def _stored(
    method: str, problem: Problem, means: Means, seconds: float, driver: int, worker: int, disk: int
) -> Estimate:
    """A way to solve with the stored matrix."""
    matrix = problem.missing_entries / means.speed.entries / means.workers
    found = Estimate(method, "stored", matrix, seconds, driver, worker, disk + problem.missing_bytes)
    return replace(found, obstacle=obstacle_of(found, problem, means))


def obstacle_of(one: Estimate, problem: Problem, means: Means) -> str:
    """What stands against a way to solve: what was asked for, or memory, or disk."""
    if one.tiles == "recomputed" and not problem.recomputable:
        return "a precomputed matrix is not recomputed"
    if problem.loo and one.method not in ("cholesky", "eigen", "tiled-cholesky"):
        return "has no leave-one-out"
    if problem.tiles not in ("auto", one.tiles):
        return f'gram.tiles = "{problem.tiles}"'
    if problem.dtype != "float64" and one.method in ("eigen", "conjugate-gradient", "nystrom"):
        return "works in float64 alone"
    if one.driver_bytes > means.driver_bytes:
        return _lacking("memory", one.driver_bytes, means.driver_bytes)
    if one.worker_bytes > means.worker_bytes:
        return _lacking("memory in a worker", one.worker_bytes, means.worker_bytes)
    if one.disk_bytes > means.disk_free:
        return _lacking(DISK, one.disk_bytes, means.disk_free)
    return ""


def _lacking(what: str, needed: int, there: int) -> str:
    return f"needs {bytes_text(needed)} of {what}, there are {bytes_text(there)}"


def _read_seconds(problem: Problem, means: Means, passes: int) -> float:
    """To read the stored matrix so many times."""
    return passes * problem.n * (problem.n + 1) / 2 * problem.itemsize / means.speed.read


def _wide(dtype: str) -> str:
    return "float64" if dtype == "mixed" else dtype
