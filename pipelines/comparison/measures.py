"""How far an approximate Gram matrix is from the exact one (SPEC F6), and how that falls with more features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ..errors import NumericalError

MEASURES = ("relF", "relOp", "relMax")
"""Frobenius norm and operator norm of the difference, each relative to that of the exact matrix; the largest entry of
the difference, relative to sqrt(K_ii K_jj)."""

CONFIDENCE = 0.95

ROWS = 256
"""Rows that are converted to float64 at a time."""

_DENSE = 64
_DIGITS = 1e-5
"""Relative accuracy of the operator norms; they are estimates from below."""


def errors(K: np.ndarray, approximate: np.ndarray) -> dict[str, float]:
    """The ``MEASURES`` of ``approximate`` beside K, both symmetric (n, n), float32 or float64.

    Sums are in float64; beside the two matrices, memory is a few blocks of ``ROWS`` rows. A sample whose K_ii is zero
    counts for relMax only where the two differ: then that is infinite.

    Raises:
        NumericalError: K is zero, or a value of either matrix is not finite.
    """
    if K.shape != approximate.shape or K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(
            f"two square matrices of one size are compared, not {K.shape} and {approximate.shape}"
        )
    scales = np.sqrt(np.abs(K.diagonal().astype(np.float64)))
    squares = total = largest = 0.0
    for part, exact, difference in _blocks(K, approximate):
        total += float(np.sum(exact * exact))
        squares += float(np.sum(difference * difference))
        size = scales[part, None] * scales
        gap = np.abs(difference)
        relative = np.divide(gap, size, out=np.where(gap > 0, np.inf, 0.0), where=size > 0)
        largest = max(largest, float(relative.max()))
    if not math.isfinite(total + squares):
        raise NumericalError("a value of the exact or of the approximate matrix is not finite")
    if total == 0:
        raise NumericalError("the exact matrix is zero: nothing can be relative to it; check the data")
    apart = _norm(len(K), lambda v: _difference_times(K, approximate, v)) if squares else 0.0
    relative_norm = apart / _norm(len(K), lambda v: _times(K, v))
    return {"relF": math.sqrt(squares / total), "relOp": relative_norm, "relMax": largest}


def _blocks(K: np.ndarray, approximate: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows of K in float64, and the difference there."""
    for start in range(0, len(K), ROWS):
        part = slice(start, start + ROWS)
        exact = K[part].astype(np.float64)
        yield part, exact, approximate[part].astype(np.float64) - exact


def _times(K: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [K[start : start + ROWS].astype(np.float64) @ v for start in range(0, len(K), ROWS)]
    )


def _difference_times(K: np.ndarray, approximate: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.concatenate([difference @ v for _, _, difference in _blocks(K, approximate)])


def _norm(n: int, product: Callable[[np.ndarray], np.ndarray]) -> float:
    """Operator norm of a symmetric (n, n) matrix from its products, by Lanczos."""
    if n <= _DENSE:
        return float(np.abs(np.linalg.eigvalsh(product(np.eye(n)))).max())
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(n)  # the same matrix has the same digits
    try:
        (value,) = eigsh(operator, k=1, which="LM", v0=start, tol=_DIGITS, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise NumericalError(
            f"the operator norm of a {n} x {n} matrix was not found: Lanczos did not converge ({error})"
        ) from None
    return abs(float(value))


LARGEST = 700.0
"""Logarithm of a size that is as good as any number."""


@dataclass(frozen=True)
class PowerLaw:
    """error = constant * size ** slope: a straight line through the logarithms by least squares.

    Each size counts once, with the root mean square over its repeats, of which the power law of random features is
    exact for relF. low, high: the slope's 95 % confidence interval by Student's t from what the line leaves over; the
    interval therefore covers both chance and curvature. centre, level: the means of log size and log error; spread:
    sum of squares of log size about its mean; scatter: the t quantile times the standard deviation of the residuals;
    count: number of sizes.
    """

    slope: float
    low: float
    high: float
    centre: float
    level: float
    spread: float
    scatter: float
    count: int

    @property
    def falls(self) -> bool:
        """Whether errors clearly fall with size: the whole interval of the slope lies below zero."""
        return self.high < 0

    def error(self, size: float) -> float:
        """The fitted error at a size."""
        return math.exp(self.level + self.slope * (math.log(size) - self.centre))

    def size_for(self, error: float) -> tuple[float, float, float]:
        """The size at which the line reaches ``error``, and the ends of its 95 % confidence interval.

        The interval holds the sizes at which the band about the line holds ``error`` (Fieller, JRSS B 16, 1954);
        it is bounded exactly where the slope is clearly negative.

        Raises:
            ValueError: the slope is not clearly negative (see ``falls``).
        """
        if not self.falls:
            raise ValueError("errors that do not clearly fall reach nothing")
        gap = math.log(error) - self.level
        variance = self.scatter**2
        leading = self.slope**2 - variance / self.spread
        middle = self.slope * gap
        root = math.sqrt(max(middle**2 - leading * (gap**2 - variance / self.count), 0.0))
        at = gap / self.slope
        ends = (middle - root) / leading, (middle + root) / leading
        size, low, high = (math.exp(min(self.centre + place, LARGEST)) for place in (at, *ends))
        return size, low, high


def mean_error(errors: Sequence[float]) -> float:
    """The root mean square over repeats."""
    return math.sqrt(float(np.mean(np.square(errors))))


def power_law(sizes: Sequence[float], repeats: Sequence[Sequence[float]]) -> PowerLaw | None:
    """The power law through the errors of each size, a sequence of one or more repeats.

    None where there is no such line: fewer than three sizes, or errors that are zero or not finite.
    """
    means = np.array([mean_error(errors) for errors in repeats])
    if len(sizes) < 3 or not np.all((means > 0) & np.isfinite(means)):
        return None
    x, y = np.log(np.asarray(sizes, np.float64)), np.log(means)
    centre, level = float(x.mean()), float(y.mean())
    spread = float(np.sum((x - centre) ** 2))
    slope = float(np.sum((x - centre) * (y - level))) / spread
    residuals = y - level - slope * (x - centre)
    freedom = len(x) - 2
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    scatter = quantile * math.sqrt(float(np.sum(residuals**2)) / freedom)
    half = scatter / math.sqrt(spread)
    return PowerLaw(slope, slope - half, slope + half, centre, level, spread, scatter, len(x))
