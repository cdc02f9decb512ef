"""How to solve on explicit features, with what each way would take and one sentence that says why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .. import normal
from ..experiment import Solve
from ..explicit import covariance, feature_products, feature_strips
from ..memory import WORKER_BASE_BYTES
from ..tasks import WINDOW
from ..wording import seconds_text
from . import conjugate_gradient, falkon
from .cholesky import EXACT_DIMENSION
from .choose import COMFORT, IN_MEMORY, Choice, price, unfit
from .costs import (
    EIGEN_COST,
    GUESSED_ITERATIONS,
    TASK_SECONDS,
    Estimate,
    Means,
    Problem,
    obstacle_of,
    read_columns,
    solve_bytes,
)
from .iterated import PROBES
from .preconditioner import preconditioner_bytes, rank_within
from .primal import (
    PrimalCholesky,
    PrimalEigen,
    PrimalFalkon,
    PrimalGradients,
    PrimalSolver,
)
from .sketch import MULTIPLIED_COLUMNS

RANK = 2 * MULTIPLIED_COLUMNS
"""Columns that the preconditioner is expected to take at most."""

PASS_COLUMNS = 32
"""What a pass takes beside its columns, to convert features and to move them through two products, in columns: 18 were
measured on a core with its cache to itself, 28 to 63 beside others."""

SAMPLED_ITERATIONS = 20
DIAGONAL_ITERATIONS = 40
"""Of Falkon to a residual of 1e-6 at any ridge: of random features with ``falkon.SAMPLES`` for each, and of Nystrom
features; 12 to 42 were measured of 500 to 1,000 landmarks of MNIST, Fashion-MNIST, CIFAR-10 and normal samples."""


def choose_primal(method: str, problem: Problem, width: int, means: Means) -> Choice:
    """How to solve a problem on ``width`` features: by the method named, "cholesky", "eigen", "conjugate-gradient"
    or "falkon", or with "auto" by the quickest one that fits.

    problem: as for kernels, where ``itemsize`` and ``side`` are those of a feature and of a block of rows, and
    ``missing_entries`` and ``predicted`` count features, ``means.speed.entries`` features per second. ``tiles``,
    ``centres``, ``spectrum``, ``recomputable`` and ``means.square`` are not looked at.
    """
    ways = list(_estimates(problem, width, means))
    named = [one for one in ways if method in ("auto", one.method)]
    fitting = [one for one in named if not one.obstacle] or [one for one in named if one.lacks_disk_alone]
    if not fitting:
        least = next((one for one in named if not unfit(one)), named[0])
        return Choice(least, "does not fit", _refusal(least, ways, problem, width))
    if method != "auto":
        return Choice(fitting[0], f"{method}: asked for{_where(fitting[0], problem, width)}")
    easy = [
        one
        for one in fitting
        if one.method == "conjugate-gradient" or one.driver_bytes <= COMFORT * means.driver_bytes
    ]
    best = min(easy or fitting, key=price)
    text = f"{best.method}{_where(best, problem, width)}: about {seconds_text(best.seconds)}"
    for other in ways:
        if other is best:
            continue
        text += f", {other.method} about {seconds_text(other.seconds)}"
        if other.obstacle:
            text += f" but {other.obstacle}"
        elif other.method == "conjugate-gradient":
            text += " if its iterations are as few as is hoped"
    return Choice(best, text)


def build_primal(solve: Solve, choice: Choice, *, seed: int, loo: bool) -> PrimalSolver:
    """The solver of a choice, with the options of ``[solve]``.

    Raises:
        ExperimentError: an option that the method refuses.
    """
    if choice.method in IN_MEMORY:
        direct = PrimalEigen if choice.method == "eigen" else PrimalCholesky
        return direct(solve.dtype, solve.jitter, solve.absolute, loo)
    options: dict[str, Any] = {"jitter": solve.jitter, "absolute": solve.absolute, "seed": seed}
    for key in ("tolerance", "max_iterations"):
        if getattr(solve, key) is not None:
            options[key] = getattr(solve, key)
    estimate = choice.estimate
    if choice.method == "falkon":
        return PrimalFalkon(whitened=estimate.whitened, **options)
    return PrimalGradients(
        rank_bytes=estimate.rank_bytes,
        memory_bound=estimate.memory_bound,
        pass_columns=estimate.pass_columns,
        **options,
    )


def _estimates(problem: Problem, width: int, means: Means) -> Iterator[Estimate]:
    for one in (
        *(_direct(method, problem, width, means) for method in IN_MEMORY),
        _gradients(problem, width, means),
        _falkon(problem, width, means),
    ):
        yield replace(one, obstacle=_obstacle(one, problem, width, means))


def _obstacle(one: Estimate, problem: Problem, width: int, means: Means) -> str:
    if problem.loo and one.method == "cholesky":
        return "has no leave-one-out on features"
    return obstacle_of(one, problem, means)


def _direct(method: str, problem: Problem, width: int, means: Means) -> Estimate:
    """By "cholesky" or "eigen"; what is trained again is trained at one ridge, by a factor."""
    n, r, t = problem.n, problem.ridges, problem.columns
    together, size, dual = means.speed.worker * means.workers, min(n, width), n < width
    hat = problem.loo and not dual
    factor = size**3 / 3 / means.speed.operations
    # Of the last pass: predictions, residuals, leverages.
    seconds = (4.0 * r * t + (2.0 * width if hat else 0.0)) * n * width / together
    driver = solve_bytes(method, size, "float64", made=True) + 4 * (n + width) * r * t * 8
    strip, kept = min(n, feature_products.STRIP), width * width * 8 if hat else 0
    worker = problem.side * width * problem.itemsize + kept
    worker += (2 * feature_strips.PANEL + 5 * r * t) * width * 8 + 2 * strip * r * (t + 1) * 8
    disk = kept + (2 * n + (WINDOW * means.workers + 2) * width) * r * t * 8
    if dual:
        # The driver alone reads features that it does not hold once for every part that it does; then Phi^T alpha.
        held = min(8 * n * width, covariance.HELD_BYTES)
        reads = means.workers * (math.ceil(8 * n * width / held) + 1) / 2 + 2
        seconds += n * n * width / means.speed.operations + 2.0 * n * width * r * t / together
        driver += held
    else:
        reads = 2.0
        seconds += n * width**2 / together
        worker = max(worker, covariance.worker_bytes(problem.side, width, problem.itemsize, t))
        disk += covariance.disk_bytes(width, means.workers)
        driver = max(driver, covariance.driver_bytes(width, t))
    found = _whole(method, problem, width, means, reads, seconds, driver, worker, disk)
    # An effective dimension that is exact inverts each factor, at the price of another.
    each = 2 if size <= EXACT_DIMENSION else 1
    factors = EIGEN_COST if method == "eigen" else each * r
    factors += each if problem.refit else 0
    return replace(found, seconds=found.seconds + factors * factor)


def _gradients(problem: Problem, width: int, means: Means) -> Estimate:
    n = problem.n
    # In powers of two, as for kernels: bits do not follow every change of the memory that is free.
    within = rank_within(means.driver_bytes // 2, width, "float32")
    rank = min(RANK, 2 ** (within.bit_length() - 1))
    # Sketches double; a column takes a product with the preconditioner as well.
    found = _iterated(
        "conjugate-gradient",
        problem,
        width,
        means,
        GUESSED_ITERATIONS,
        reads=rank / MULTIPLIED_COLUMNS,
        seconds=4.0 * n * width * rank / means.speed.worker / means.workers,
        each=4.0 * width * rank / means.speed.worker / means.workers,
        rank_bytes=preconditioner_bytes(width, rank, "float32"),
        sketched=min(rank, MULTIPLIED_COLUMNS),
    )
    return replace(
        found,
        memory_bound=rank < RANK and 2 * rank <= (width + 1) // 2,
        pass_columns=read_columns(problem.itemsize),
    )


def _falkon(problem: Problem, width: int, means: Means) -> Estimate:
    if problem.whitened:
        found = _iterated("falkon", problem, width, means, DIAGONAL_ITERATIONS)
        return replace(found, whitened=True)
    samples, r, t = min(problem.n, falkon.SAMPLES * width), problem.ridges, problem.columns
    # The sum over the samples; a factor for each ridge, and its inverse for the effective dimension.
    summing = samples * width**2 / means.speed.worker / means.workers
    factors = 2 * r * width**3 / 3 / means.speed.operations
    found = _iterated(
        "falkon",
        problem,
        width,
        means,
        SAMPLED_ITERATIONS,
        reads=1,
        seconds=summing + factors,
        each=4.0 * width * width / means.speed.operations,
    )
    making = falkon.preconditioner_bytes(width, r)
    return replace(
        found,
        driver_bytes=max(found.driver_bytes + making, covariance.driver_bytes(width, t)),
        worker_bytes=max(
            found.worker_bytes,
            WORKER_BASE_BYTES + covariance.worker_bytes(problem.side, width, problem.itemsize, t),
        ),
        disk_bytes=found.disk_bytes + covariance.disk_bytes(width, means.workers),
    )


def _iterated(
    method: str,
    problem: Problem,
    width: int,
    means: Means,
    guessed: int,
    *,
    reads: float = 0.0,
    seconds: float = 0.0,
    each: float = 0.0,
    rank_bytes: int = 0,
    sketched: int = 0,
) -> Estimate:
    """By so many iterations. reads, seconds, rank_bytes: to make the preconditioner, ``sketched`` columns at once;
    each: seconds to apply it to a column."""
    n, r, t = problem.n, problem.ridges, problem.columns
    systems = r * (t + PROBES)
    iterations = min(guessed, problem.max_iterations or guessed, width)
    columns = PASS_COLUMNS + systems
    product = 4.0 * n * width / means.speed.worker / means.workers
    widest = max(systems, sketched)
    driver = conjugate_gradient.driver_bytes(width, t, r, rank_bytes) + 2 * n * r * t * 8
    worker = normal.worker_bytes(problem.side, width, widest, problem.itemsize)
    disk = conjugate_gradient.checkpoint_bytes(width, t, r, rank_bytes)
    disk += (WINDOW * means.workers + 1) * width * widest * 8
    # Passes also for Phi^T Y and what else is known first, for the residuals, and last for the predictions.
    passes = iterations + 3 + reads
    found = _whole(
        method,
        problem,
        width,
        means,
        passes,
        seconds + iterations * (columns * product + systems * each),
        driver,
        worker,
        disk,
    )
    return replace(found, rank_bytes=rank_bytes)


def _whole(
    method: str,
    problem: Problem,
    width: int,
    means: Means,
    reads: float,
    seconds: float,
    driver: int,
    worker: int,
    disk: int,
) -> Estimate:
    """A way that reads the features so many times, with what comes before and after. seconds: of the arithmetic."""
    repeated = 2 if problem.refit else 1
    size, n = problem.itemsize, problem.n
    tasks = repeated * reads * math.ceil(n / feature_products.STRIP) * TASK_SECONDS
    seconds = repeated * (seconds + reads * n * width * size / means.speed.read) + tasks
    seconds += problem.predicted * size / means.speed.read
    seconds += 2.0 * problem.predicted * problem.ridges * problem.columns / means.speed.worker / means.workers
    computing = problem.missing_entries / means.speed.entries / means.workers
    return Estimate(
        method,
        "stored",
        computing,
        seconds,
        driver,
        WORKER_BASE_BYTES + worker,
        disk + problem.missing_bytes,
        passes=math.ceil(repeated * reads),
        task_seconds=tasks,
    )


def _where(one: Estimate, problem: Problem, width: int) -> str:
    """Which of the two matrices is solved with, where it is not the covariance of the features."""
    if one.method not in IN_MEMORY or problem.n >= width:
        return ""
    return f" in the dual, {problem.n:,} samples being fewer than {width:,} features"


def _refusal(least: Estimate, ways: list[Estimate], problem: Problem, width: int) -> str:
    """What does not fit, and what would."""
    others = [f'solve.method = "{one.method}"' for one in ways if not one.obstacle]
    advice = " or ".join(others) or "fewer features, or a machine with more"
    return f"solving for {problem.n} samples with {width} features by {least.method}: it {least.obstacle}; use {advice}"
