"""The choice of a solver and of whether tiles are stored, with one sentence that says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ExperimentError
from ..experiment import Solve
from ..wording import seconds_text
from .base import Solver
from .costs import EIGEN_COST, Estimate, Means, Problem, estimates, nystrom

COMFORT = 0.9
"""Share of the free memory that a solve in memory may take of its own accord."""

UNCERTAIN = 3.0
"""So many times quicker must conjugate gradients seem: how many they are is known when they are done."""

IN_MEMORY = ("cholesky", "eigen")

PRECONDITIONING = ("rank_bytes", "memory_bound", "pass_columns", "floor")
"""What conjugate gradients take from their estimate."""


@dataclass(frozen=True)
class Choice:
    """estimate: of the way that was chosen. reason: one sentence. problem: why it cannot be and what can, or nothing.

    A lack of disk is no problem here: whoever plans a run adds what else the disk must hold.
    """

    estimate: Estimate
    reason: str
    problem: str = ""

    @property
    def method(self) -> str:
        return self.estimate.method

    @property
    def recomputed(self) -> bool:
        return self.estimate.tiles == "recomputed"


def choose(method: str, problem: Problem, means: Means) -> Choice:
    """How to solve a problem: by the method named, or with "auto" by the quickest of those that fit.

    "auto" never takes Nystrom, which is another model.

    Raises:
        ExperimentError: there are more centres than samples.
    """
    if problem.centres > problem.n:
        raise ExperimentError(
            f"solve.centres = {problem.centres} are more than the {problem.n} training samples; take fewer"
        )
    exact = list(estimates(problem, means))
    ways = list(nystrom(problem, means)) if method == "nystrom" else exact
    named = [one for one in ways if method in ("auto", one.method)]
    fitting = [one for one in named if not one.obstacle] or [one for one in named if one.lacks_disk_alone]
    if not fitting:
        least = next((one for one in named if not unfit(one)), named[0])
        return Choice(least, "does not fit", _refusal(least, exact, problem, means))
    if method != "auto":
        best = min(fitting, key=lambda one: one.total_seconds)
        return Choice(best, f"{best.name}: asked for{_why_these_tiles(best, named)}")
    # Leave-one-out is exact in memory alone, and estimated only where that does not fit.
    in_memory = [one for one in fitting if one.method in IN_MEMORY]
    eligible = in_memory if problem.loo and in_memory else fitting
    easy = [
        one
        for one in eligible
        if one.method not in IN_MEMORY or one.driver_bytes <= COMFORT * means.driver_bytes
    ]
    best = min(easy or eligible, key=price)
    reason = _reason(best, exact, problem)
    if problem.loo:
        reason += f"; leave-one-out is {'exact' if best.method in IN_MEMORY else 'estimated'}"
    return Choice(best, reason)


def build(solve: Solve, choice: Choice, *, seed: int, loo: bool) -> Solver[Any]:
    """The solver of a choice, with the options of ``[solve]``.

    Raises:
        ExperimentError: an option that the method refuses.
    """
    method, jitter, absolute = choice.method, solve.jitter, solve.absolute
    iteration: dict[str, Any] = {"jitter": jitter, "absolute": absolute, "seed": seed}
    for key in ("tolerance", "max_iterations"):
        if getattr(solve, key) is not None:
            iteration[key] = getattr(solve, key)
    if method == "conjugate-gradient":
        from .conjugate_gradient import ConjugateGradient

        estimate = choice.estimate
        preconditioning = {key: getattr(estimate, key) for key in PRECONDITIONING}
        return ConjugateGradient(**preconditioning, **iteration)
    if method == "nystrom":
        from .nystrom import Nystrom

        assert solve.centres is not None
        return Nystrom(centres=solve.centres, **iteration)
    if method == "tiled-cholesky":
        from .tiled_cholesky import TiledCholesky

        return TiledCholesky(solve.dtype, jitter, absolute, loo)
    if method == "eigen":
        from .eigen import Eigen

        return Eigen(solve.dtype, jitter, absolute, loo)
    if solve.dtype == "mixed":
        from .mixed import MixedCholesky

        return MixedCholesky(solve.dtype, jitter, absolute, loo)
    from .cholesky import Cholesky

    return Cholesky(solve.dtype, jitter, absolute, loo)


def price(one: Estimate) -> float:
    return one.matrix_seconds + one.seconds * (UNCERTAIN if one.method == "conjugate-gradient" else 1.0)


def unfit(one: Estimate) -> bool:
    """Whether a way is refused for what it is and not for what it takes."""
    return bool(one.obstacle) and " of " not in one.obstacle


def _reason(best: Estimate, exact: Sequence[Estimate], problem: Problem) -> str:
    """Why "auto" took a way: its time beside the next one's, and what kept quicker ones out."""
    quicker = [one for one in exact if one.obstacle and price(one) < price(best)]
    others = [one for one in exact if not one.obstacle and one is not best]
    kept_out = "".join(
        f"; {one.name} {'would be quicker but ' if not unfit(one) else ''}{one.obstacle}" for one in quicker
    )
    if best.method in IN_MEMORY and not kept_out:
        factors = problem.ridges * (2 if problem.loo else 1)
        ridges = f"{problem.ridges}{' with leave-one-out' if problem.loo else ''}"
        return (
            f"{best.method}: it fits the memory, and a path of {ridges} costs {factors} Cholesky factors, "
            f"an eigendecomposition {EIGEN_COST:g}"
        )
    text = f"{best.name}: about {seconds_text(best.total_seconds)}"
    if others:
        following = min(others, key=price)
        text += f", {following.name} about {seconds_text(following.total_seconds)}"
        if following.total_seconds < best.total_seconds and following.method == "conjugate-gradient":
            text += " if its iterations are as few as is hoped"
    return text + kept_out


def _why_these_tiles(best: Estimate, named: Sequence[Estimate]) -> str:
    """Of two ways with the same method, why this one's tiles."""
    other = next((one for one in named if one.tiles != best.tiles), None)
    if other is None or other.obstacle.startswith("gram.tiles"):
        return ""
    verb = {"stored": "storing the tiles", "recomputed": "computing the tiles at every pass"}
    text = f"; {verb[best.tiles]} takes about {seconds_text(best.total_seconds)} in all"
    if other.obstacle:
        return f"{text}, {verb[other.tiles]} cannot be: {other.obstacle}"
    return f"{text}, {verb[other.tiles]} {seconds_text(other.total_seconds)}"


def _refusal(least: Estimate, exact: Sequence[Estimate], problem: Problem, means: Means) -> str:
    """What does not fit, and what would."""
    savers = [f'solve.method = "{one.method}"' for one in exact if not one.obstacle]
    if problem.dtype != "float32":
        single = list(estimates(replace(problem, dtype="float32"), means))
        savers += [
            f'solve.method = "{one.method}" with solve.dtype = "float32"'
            for one in single
            if not one.obstacle
        ]
    advice = " or ".join(dict.fromkeys(savers[:2])) or (
        'fewer training samples, a machine with more, or solve.method = "nystrom" (another model, on centres)'
    )
    return f"solving for {problem.n} samples by {least.method} in {problem.dtype}: it {least.obstacle}; use {advice}"
