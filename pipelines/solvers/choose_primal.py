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
from . import conjugate_gradient
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
from .primal import SKETCH, PrimalCholesky, PrimalEigen, PrimalGradients, PrimalSolver

RANK = 2 * SKETCH
"""Columns that the preconditioner is expected to take at most."""


def choose_primal(method: str, problem: Problem, width: int, means: Means) -> Choice:
    """How to solve a problem on ``width`` features: by the method named, "cholesky", "eigen" or "conjugate-gradient",
    or with "auto" by the quickest one that fits.

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
        if one.method not in IN_MEMORY or one.driver_bytes <= COMFORT * means.driver_bytes
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
    options: dict[str, Any] = {
        key: value for key in ("tolerance", "max_iterations") if (value := getattr(solve, key)) is not None
    }
    return PrimalGradients(
        rank_bytes=choice.estimate.rank_bytes,
        memory_bound=choice.estimate.memory_bound,
        pass_columns=choice.estimate.pass_columns,
        jitter=solve.jitter,
        absolute=solve.absolute,
        seed=seed,
        **options,
    )


def _estimates(problem: Problem, width: int, means: Means) -> Iterator[Estimate]:
    for one in (
        *(_direct(method, problem, width, means) for method in IN_MEMORY),
        _gradients(problem, width, means),
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
    driver = solve_bytes(method, size, "float64") + 4 * (n + width) * r * t * 8
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
    n, r, t = problem.n, problem.ridges, problem.columns
    systems = r * (t + PROBES)
    together = means.speed.worker * means.workers
    iterations = min(GUESSED_ITERATIONS, problem.max_iterations or GUESSED_ITERATIONS, width)
    # In powers of two, as for kernels: bits do not follow every change of the memory that is free.
    within = rank_within(means.driver_bytes // 2, width, "float32")
    rank = min(RANK, 2 ** (within.bit_length() - 1))
    rank_bytes = preconditioner_bytes(width, rank, "float32")
    # First a pass for Phi^T Y, then sketches that double, then iterations, last the predictions.
    passes = iterations + 2 + rank / SKETCH + 1
    operations = 4.0 * n * width * (iterations * systems + rank) + 4.0 * width * rank * iterations * systems
    widest = max(systems, min(rank, SKETCH))
    driver = conjugate_gradient.driver_bytes(width, t, r, rank_bytes) + 2 * n * r * t * 8
    worker = normal.worker_bytes(problem.side, width, widest, problem.itemsize)
    disk = conjugate_gradient.checkpoint_bytes(width, t, r, rank_bytes)
    disk += (WINDOW * means.workers + 1) * width * widest * 8
    found = _whole(
        "conjugate-gradient", problem, width, means, passes, operations / together, driver, worker, disk
    )
    return replace(
        found,
        rank_bytes=rank_bytes,
        memory_bound=rank < RANK and 2 * rank <= (width + 1) // 2,
        pass_columns=read_columns(problem.itemsize),
    )


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
