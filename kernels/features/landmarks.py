"""Which samples stand for all the others: the landmarks of a Nystrom approximation (SPEC F3, R7).

Every choice is made among a bounded number of candidates, drawn without replacement under the seed, so that memory
does not grow with the number of samples. Landmarks come in an order, and of uniform and pivoted-Cholesky landmarks
the first ones are those of any smaller number.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import brentq

from ..arrays import Array, namespace, to_host
from ..base import Cost, Kernel, KernelError, Prepared, SamplesError
from .base import Progress, Samples, unwatched
from .kmeans import means

SELECTIONS = ("uniform", "k-means", "leverage-scores", "pivoted-cholesky")

PROPOSALS = 64
"""Pivots that are proposed at a time. A constant, so that more landmarks begin with the same ones."""
PILOT = 500
"""Least number of samples that leverage scores are estimated from."""
ROUNDINGS = 100
"""Residuals below this many roundings of k(x, x) are zero."""
BLOCK_BYTES = 1 << 26
"""Size of the blocks of the matrix that are looked at one after the other."""
EIGENVECTORS = 12.0
"""Operations, in units of M^3, of the eigenvectors of a symmetric (M, M) matrix and a product with them."""

_POOL = "candidates"


def choose(
    kernel: Kernel,
    samples: Samples,
    number: int,
    selection: str,
    candidates: int,
    seed: int,
    progress: Progress,
) -> tuple[Array, np.ndarray | None]:
    """(number, ...) landmarks, in the dtype and on the device of the samples; which of the samples they are, (number,)
    int64, where they are samples.

    candidates: how many samples, drawn at random, all choices but uniform ones are made among.

    uniform: samples drawn without replacement.
    k-means: means of clusters of vectors, as ``means`` takes them.
    leverage-scores: samples drawn without replacement by their approximate ridge leverage scores, at the ridge whose
    effective dimension is half the number of landmarks (``leverage_scores``).
    pivoted-cholesky: the pivots of a randomly pivoted partial Cholesky factorisation (``pivots``).

    Raises:
        KernelError: fewer samples than landmarks; for k-means also fewer different directions.
        SamplesError: a value is not finite.
    """
    require_enough(samples.count, number)
    rng = np.random.default_rng(seed)
    drawn = draw(samples.count, number if selection == "uniform" else candidates, rng)
    X = _take(samples, drawn)
    if selection == "uniform":
        return X, drawn
    if selection == "k-means":
        return means(kernel, X, number, seed, progress), None
    a = kernel.prepare(X, pool=_POOL)
    if selection == "leverage-scores":
        scores, _ = leverage_scores(kernel, a, min(len(X), max(number, PILOT)), number / 2, progress)
        positions = draw_by(scores, number, rng)
    else:
        positions = pivots(kernel, X, a, number, rng, progress)[0]
    return X[namespace(X).asarray(positions)], drawn[positions]


def choosing_cost(
    kernel: Kernel,
    count: int,
    shape: tuple[int, ...],
    number: int,
    selection: str,
    candidates: int,
    itemsize: int,
) -> Cost:
    """Cost of ``choose`` from ``count`` samples of ``shape``; of k-means at its most iterations."""
    taken = min(count, number if selection == "uniform" else candidates)
    held = 2 * taken * math.prod(shape) * itemsize  # in the samples' order, and in the order of the draw
    if selection == "uniform":
        return Cost(0.0, 0.0, held)
    if selection == "k-means":
        size = math.prod(shape)
        return Cost(200.0 * taken * number * size, 0.0, held + 8 * taken * (size + 1))
    if selection == "leverage-scores":
        pilot = min(taken, max(number, PILOT))
        scores = Cost(2.0 * taken * pilot**2 + EIGENVECTORS * pilot**3, 0.0, 0)
        work, needed = kernel.cost(taken, pilot, shape, itemsize) + scores, 4 * 8 * pilot**2 + 3 * BLOCK_BYTES
    else:
        work = kernel.cost(taken, number, shape, itemsize) + Cost(2.0 * taken * number**2, 0.0, 0)
        needed = 8 * taken * (number + 3 * PROPOSALS)
    # Prepared blocks are about as large as the samples.
    return replace(work, scratch_bytes=work.scratch_bytes + held + held // 2 + needed)


def draw(count: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``number`` different ones of 0..count-1, (k,) int64, uniformly, in an order whose beginning does not
    depend on ``number``; in memory proportional to ``number``."""
    number = min(number, count)
    moved: dict[int, int] = {}
    out = np.empty(number, np.int64)
    # Shuffles the first places of 0..count-1 and remembers only what left its place.
    for place, other in enumerate(rng.integers(np.arange(number), count).tolist()):
        out[place] = moved.get(other, other)
        moved[other] = moved.pop(place, place)
    return out


def draw_by(scores: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """``number`` positions drawn one after the other without replacement, each in proportion to its score.

    Where fewer have a score, the rest are the first of those that have none.
    """
    with np.errstate(divide="ignore"):
        # The largest of log p + Gumbel noise is drawn in proportion to p, and so is the next of the others.
        keys = np.log(scores) + rng.gumbel(size=len(scores))
    return np.argsort(-keys, kind="stable")[:number]


def leverage_scores(
    kernel: Kernel, a: Prepared, pilot: int, dimension: float, progress: Progress = unwatched
) -> tuple[np.ndarray, float]:
    """Approximate ridge leverage scores (K (K + ridge I)^-1)_ii of n samples, (n,) float64 from 0 to 1; the ridge.

    They are estimated from the first ``pilot`` samples J, which must be a uniform draw, by
    (K_ii - K_iJ (K_JJ + ridge |J| / n I)^-1 K_Ji) / ridge (Alaoui and Mahoney 2015; Rudi, Calandriello, Carratino
    and Rosasco 2018), which is exact where J is everything.
    The ridge is the one whose effective dimension in the pilot, sum s / (s + ridge |J| / n) over the eigenvalues s
    of K_JJ, is ``dimension``; or rounding, where so many dimensions are not there.
    """
    n, xp = len(a), namespace(*a.arrays.values())
    chosen = a[:pilot]
    K = kernel.pair(chosen, chosen)
    require_finite_kernel(K)
    s, V = xp.linalg.eigh(K.astype(np.float64))
    shift = _shift(to_host(s), dimension, float(np.finfo(K.dtype).eps))
    ridge = shift * n / pilot
    scores = np.zeros(n)
    if ridge == 0:  # nothing but zeros in the pilot
        return scores, ridge
    for rows, block in a.blocks(max(1, BLOCK_BYTES // (8 * pilot))):
        explained = kernel.pair(block, chosen).astype(np.float64) @ V
        explained *= explained
        scores[rows] = to_host(kernel.diag(block).astype(np.float64) - explained @ (1 / (s + shift))) / ridge
        progress(rows.stop, n, "leverage scores")
    return np.clip(scores, 0, 1), ridge


def _shift(s: np.ndarray, dimension: float, rounding: float) -> float:
    """What is added to eigenvalues s, (n,) increasing, so that the effective dimension is ``dimension``."""
    s = np.maximum(s, 0)

    def beyond(logarithm: float) -> float:
        return float((s / (s + np.exp(logarithm))).sum()) - dimension

    least = len(s) * rounding * float(s[-1])
    if least == 0 or beyond(np.log(least)) <= 0:
        return least
    return float(np.exp(brentq(beyond, np.log(least), np.log(s.sum() / dimension))))


def pivots(
    kernel: Kernel,
    X: Array,
    a: Prepared,
    number: int,
    rng: np.random.Generator,
    progress: Progress = unwatched,
) -> tuple[np.ndarray, np.ndarray]:
    """Pivots of a partial Cholesky factorisation of K among n samples, (number,) int64 in the order of the draw, and
    the diagonal (n,) float64 of what they leave, K - K_hat.

    Each pivot is drawn in proportion to the diagonal that the ones before it leave of K (randomly pivoted Cholesky:
    Chen, Epperly, Tropp and Webber 2023), many at a time: proposals come from an older diagonal and are accepted
    with the ratio of the present one to it, which draws from the same distribution (Epperly, Tropp and Webber 2024).
    The older rule, the largest remainder as pivot, prefers outliers and takes one column at a time.

    Where nothing is left before ``number`` pivots, as of samples that repeat, the rest are the first of the others;
    they add nothing. Holds the factor, (number, n) float64.
    """
    n, xp = len(a), namespace(X)
    left = to_host(kernel.diag(a).astype(np.float64))
    require_finite_kernel(left)
    least = ROUNDINGS * np.finfo(X.dtype).eps * left
    factor = xp.empty((number, n))
    chosen: list[int] = []
    while len(chosen) < number and left.any():
        upto = np.cumsum(left)
        proposed = np.searchsorted(upto, rng.random(PROPOSALS) * upto[-1], side="right")
        chances = rng.random(PROPOSALS)
        distinct, places = np.unique(np.minimum(proposed, n - 1), return_inverse=True)
        done = factor[: len(chosen)]
        block = _at(kernel, X, distinct)
        near = done[:, xp.asarray(distinct)]
        inner = to_host(kernel.pair(block, block).astype(np.float64) - near.T @ near)
        require_finite_kernel(inner)
        # These entries are rounded otherwise than the diagonal: what is zero by either is zero.
        left[distinct[inner.diagonal() <= least[distinct]]] = 0
        accepted, L = _accepted(inner, places, chances * left[distinct[places]], least[distinct])
        accepted = accepted[: number - len(chosen)]
        if not accepted:
            continue
        here, k = distinct[accepted], len(accepted)
        columns = kernel.pair(_at(kernel, X, here), a).astype(np.float64)
        columns -= done[:, xp.asarray(here)].T @ done
        inverse = solve_triangular(L[:k, :k], np.eye(k), lower=True, check_finite=False)
        rows = factor[len(chosen) : len(chosen) + k]
        xp.matmul(xp.asarray(inverse), columns, out=rows)
        left -= to_host((rows * rows).sum(axis=0))
        chosen += here.tolist()
        left[here] = 0
        left[left <= least] = 0
        progress(len(chosen), number, "pivots")
    rest = np.setdiff1d(np.arange(n), chosen)[: number - len(chosen)]
    return np.array([*chosen, *rest], np.int64), left


def require_enough(count: int, number: int) -> None:
    """Raise KernelError for fewer samples than landmarks."""
    if number > count:
        raise KernelError(
            f"landmarks must be at most {count}, the number of samples to learn from, got {number}"
        )


def require_finite_kernel(values: Array) -> None:
    """Raise SamplesError for kernel values of samples to learn from that are not finite."""
    if not bool(namespace(values).isfinite(values).all()):
        raise SamplesError(
            f"the kernel is not finite among samples to learn from in {values.dtype}: scale the samples"
        )


def _at(kernel: Kernel, X: Array, positions: np.ndarray) -> Prepared:
    """Candidates at different positions, prepared; they are known as the same samples as among all."""
    return kernel.prepare(X[namespace(X).asarray(positions)], positions, _POOL)


def _accepted(
    K: np.ndarray, proposals: np.ndarray, thresholds: np.ndarray, least: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Those proposals, rows of K (k, k) in the order given, whose remainder exceeds their threshold (and rounding)
    when it is their turn, each accepted one eliminated from K; and the lower triangular Cholesky factor of K at
    them."""
    K = K.copy()
    accepted: list[int] = []
    columns: list[np.ndarray] = []
    for proposal, threshold in zip(proposals.tolist(), thresholds, strict=True):
        if K[proposal, proposal] > max(threshold, least[proposal]):
            column = K[:, proposal] / np.sqrt(K[proposal, proposal])
            K -= np.outer(column, column)
            accepted.append(proposal)
            columns.append(column)
    return accepted, np.reshape(columns, (len(accepted), len(K)))[:, accepted].T


def _take(samples: Samples, positions: np.ndarray) -> Array:
    """(k, ...) samples at different positions in the order given.

    Raises:
        SamplesError: a value is not finite.
    """
    order = np.argsort(positions)
    X = samples.take(positions[order])
    xp = namespace(X)
    wrong = np.flatnonzero(~to_host(xp.isfinite(X).reshape(len(X), -1).all(axis=1)))
    if len(wrong):
        raise SamplesError(
            f"number {positions[order][wrong[0]]} of the samples to learn from has a value that is not finite in "
            f"{X.dtype}; correct it, leave it out, or scale the samples"
        )
    return X[xp.asarray(np.argsort(order))]
