"""How far an approximate Gram matrix is from the exact one (SPEC F6), and how that falls with more features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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


Interval = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """log error = level + slope * (log size - centre)."""

    slope: float
    level: float
    centre: float


@dataclass(frozen=True)
class PowerLaw:
    """error = constant * size ** slope: a straight line through the logarithms by least squares.

    Each size counts once, with the root mean square over its repeats, of which the power law of random features is
    exact for relF. Weights of a seed are nested, so that its errors at all sizes rise and fall together, and what the
    line leaves over says little of how far it may be off. Repeats are independent: 95 % confidence intervals are the
    jackknife's over them, by Student's t (Miller, Biometrika 61, 1974). They hold chance, not the law's being wrong.

    line: through all repeats. without: leaving out each in turn; empty where there is one repeat, and no interval.
    straight: whether the sizes' means lie so near the line that it falls, the 95 % confidence interval of its slope
    from what it leaves over being below zero.
    """

    line: Line
    without: tuple[Line, ...]
    straight: bool

    @property
    def slope(self) -> float:
        return self.line.slope

    @property
    def interval(self) -> Interval | None:
        """Of the slope; None of one repeat."""
        if not self.without:
            return None
        half = math.sqrt(self._squares[0, 0])
        return self.slope - half, self.slope + half

    @property
    def falls(self) -> bool:
        """Whether errors clearly fall with size, from one size to the next and from repeat to repeat."""
        interval = self.interval
        return self.straight and (interval is None or interval[1] < 0)

    def error(self, size: float) -> float:
        """The fitted error at a size."""
        return math.exp(self.line.level + self.slope * (math.log(size) - self.line.centre))

    def size_for(self, error: float) -> tuple[float, Interval | None]:
        """The size at which the line reaches ``error``, and its interval; None of one repeat.

        The interval holds the sizes whose error, by the line and its own jackknifed interval, may be ``error``
        (Fieller, JRSS B 16, 1954): it is not as far to both sides, as that of the size's own logarithm would be, which
        holds the truth less often. It is bounded where the slope is clearly negative.

        Raises:
            ValueError: errors do not clearly fall (see ``falls``).
        """
        if not self.falls:
            raise ValueError("errors that do not clearly fall reach nothing")
        gap = self.line.level - math.log(error)
        size = self._size(-gap / self.slope)
        if not self.without:
            return size, None
        (steep, both), (_, high) = self._squares
        leading, middle, last = self.slope**2 - steep, self.slope * gap - both, gap**2 - high
        root = math.sqrt(max(middle**2 - leading * last, 0.0))
        return size, (self._size((-middle - root) / leading), self._size((-middle + root) / leading))

    def _size(self, place: float) -> float:
        return math.exp(min(max(self.line.centre + place, -LARGEST), LARGEST))

    @cached_property
    def _squares(self) -> np.ndarray:
        """(2, 2) jackknife covariance of slope and level, times the square of Student's quantile."""
        count = len(self.without)
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        values = np.array([(line.slope, line.level) for line in self.without])
        return (count - 1) * quantile**2 * np.cov(values, rowvar=False, ddof=0)


def mean_error(errors: Sequence[float]) -> float:
    """The root mean square over repeats."""
    return math.sqrt(float(np.mean(np.square(errors))))


def power_law(sizes: Sequence[float], repeats: Sequence[Sequence[float]]) -> PowerLaw | None:
    """The power law through the errors of each size, a sequence of one or more repeats.

    The k-th of every size are one repeat. None where there is no such line: fewer than three sizes, or errors that are
    zero or not finite.
    """
    errors = np.asarray(repeats, np.float64)
    if len(sizes) < 3 or not np.all((errors > 0) & np.isfinite(errors)):
        return None
    x, count = np.log(np.asarray(sizes, np.float64)), errors.shape[1]
    line = _line(x, errors)
    without = [_line(x, np.delete(errors, k, axis=1)) for k in range(count)] if count > 1 else []
    freedom = len(x) - 2
    left = _log_means(errors) - line.level - line.slope * (x - line.centre)
    deviation = math.sqrt(float(np.sum(left**2)) / freedom / float(np.sum((x - line.centre) ** 2)))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * deviation
    return PowerLaw(line, tuple(without), line.slope + half < 0)


def _log_means(errors: np.ndarray) -> np.ndarray:
    """(sizes,) logarithms of root mean squares of errors (sizes, repeats)."""
    return np.log([mean_error(row) for row in errors])


def _line(x: np.ndarray, errors: np.ndarray) -> Line:
    """Through errors (sizes, repeats) at logarithms x (sizes,) of sizes."""
    y, u = _log_means(errors), x - x.mean()
    return Line(float(u @ y / (u @ u)), float(y.mean()), float(x.mean()))
