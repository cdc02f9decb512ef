"""Solvers of (K + n*lambda*I) alpha = Y, and the choice between them (SPEC R1 to R5, R9)."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DoesNotFit, ExperimentError
from .base import Solution, Solver, Status, check_ridges
from .cholesky import Cholesky
from .eigen import Eigen

__all__ = ["METHODS", "Cholesky", "Eigen", "Solution", "Solver", "Status", "choose", "solve_bytes"]

METHODS = ("auto", "cholesky", "eigen")

EIGEN_COST = 18.0
"""Time of an eigendecomposition in units of one Cholesky factor; measured 18.1 at n = 2000, one thread."""

VECTOR_COLUMNS = 64
"""Columns of n float64 beside the matrices: targets, coefficients, residuals, probes."""


def solve_bytes(method: str, n: int, dtype: str) -> int:
    """Bytes a method ("cholesky" or "eigen") holds at its peak for a path of any length.

    The process itself and one tile come on top.
    """
    itemsize = {"float32": 4, "float64": 8}[dtype]
    matrices = {"cholesky": 1, "eigen": 2}[method]
    return matrices * n * n * itemsize + VECTOR_COLUMNS * n * 8


def choose(
    method: str,
    *,
    n: int,
    ridges: Sequence[float],
    loo: bool,
    dtype: str,
    memory_bytes: int,
    jitter: float = 0.0,
    absolute: bool = False,
) -> tuple[Cholesky | Eigen, str]:
    """The solver for n samples in ``memory_bytes``, and one sentence that says why it.

    Raises:
        ExperimentError: an unknown method, dtype or ridge, or eigen in float32.
        DoesNotFit: the method named, or with "auto" every method, needs more memory.
    """
    if method not in METHODS:
        raise ExperimentError(f"solve.method must be one of {', '.join(METHODS)}, not {method!r}")
    count = len(check_ridges(ridges))
    cholesky = Cholesky(dtype, jitter, absolute, loo)
    if method == "auto":
        method, reason = _cheapest(n, count, loo, dtype, memory_bytes)
    else:
        reason = f"{method}: asked for"
    needed = solve_bytes(method, n, dtype)
    solver = Eigen(dtype, jitter, absolute, loo) if method == "eigen" else cholesky
    if needed > memory_bytes:
        saver = next(
            (
                f'solve.method = "{m}" with solve.dtype = "{d}"'
                for m, d in (("cholesky", "float64"), ("cholesky", "float32"))
                if solve_bytes(m, n, d) <= memory_bytes
            ),
            "fewer training samples",
        )
        raise DoesNotFit(
            f"solving for {n} samples by {method} in {dtype} needs {needed / 1e9:.2f} GB, "
            f"there are {memory_bytes / 1e9:.2f} GB; use {saver}"
        )
    return solver, reason


def _cheapest(n: int, count: int, loo: bool, dtype: str, memory_bytes: int) -> tuple[str, str]:
    """The method of least time that fits in memory, and why it; cholesky where neither fits."""
    factors = count * (2 if loo else 1)  # leave-one-out inverts each factor, at the price of another
    price = (
        f"a path of {count}{' with leave-one-out' if loo else ''} costs {factors} Cholesky factors, "
        f"an eigendecomposition {EIGEN_COST:g}"
    )
    if factors <= EIGEN_COST:
        return "cholesky", f"cholesky: {price}"
    if dtype != "float64":
        return "cholesky", f"cholesky: {price} but works in float64 alone"
    needed = solve_bytes("eigen", n, dtype)
    if needed > memory_bytes:
        return "cholesky", f"cholesky: {price} but would need {needed / 1e9:.2f} GB"
    return "eigen", f"eigen: {price}"
