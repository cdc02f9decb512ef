"""The choice of landmarks: drawn as it says, among as many candidates as it says, and better where it should be."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.arrays import Array
from kernels.base import Cost, Kernel, KernelError, Prepared, SamplesError, require_float, row_ids
from kernels.dot_product import DotProduct
from kernels.features import landmarks
from kernels.features.base import InMemory, unwatched
from kernels.features.kmeans import means
from kernels.features.landmarks import choose, draw, draw_by, leverage_scores, pivots
from kernels.features.nystrom import NystromFeatures

EXPONENTIAL = DotProduct("exponential", sigma=0.7)
LAPLACE = DotProduct("laplace")  # whose matrices are far from singular


@dataclass(frozen=True)
class Gaussian(Kernel):
    """exp(-|x - y|^2 / 2), which is not homogeneous."""

    kind: ClassVar[str] = "gaussian of a test"

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        require_float(X)
        return Prepared({"X": X}, row_ids(X, rows), pool)

    def pair(self, a: Prepared, b: Prepared) -> Array:
        return np.exp(-((a.arrays["X"][:, None] - b.arrays["X"]) ** 2).sum(axis=2) / 2)

    def diag(self, a: Prepared) -> Array:
        return np.ones(len(a))

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        return Cost(3.0 * n * m * shape[0], float(n * m), n * m * shape[0] * itemsize)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}


def points(n: int = 60, d: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * rng.uniform(0.5, 2, (n, 1))


def clustered(seed: int = 0) -> np.ndarray:
    """One large cluster of 400, and twenty of three, far away from each other."""
    rng = np.random.default_rng(seed)
    sizes = [400] + 20 * [3]
    return np.concatenate([3 * rng.standard_normal(10) + 0.05 * rng.standard_normal((k, 10)) for k in sizes])


def agrees(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> bool:
    """Whether every count is within 4.5 standard deviations of its chance."""
    total = counts.total()
    assert set(counts) <= set(chances)
    return all(abs(counts[k] - total * p) <= 4.5 * math.sqrt(total * p) + 1 for k, p in chances.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_draw_takes_different_positions_and_begins_alike(count: int, number: int, seed: int) -> None:
    """Without replacement, all where there are no more, and nested: fewer are the first of more."""
    drawn = draw(count, number, np.random.default_rng(seed))
    assert len(drawn) == min(count, number)
    assert len(set(drawn.tolist())) == len(drawn)
    assert set(drawn.tolist()) <= set(range(count))
    if number > 1:
        fewer = draw(count, number - 1, np.random.default_rng(seed))
        np.testing.assert_array_equal(fewer, drawn[: len(fewer)])


def test_draw_is_uniform() -> None:
    """Each ordered pair of three of four is as likely as any other."""
    rng = np.random.default_rng(0)
    counts = Counter(tuple(draw(4, 3, rng).tolist()) for _ in range(6000))
    triples = [(i, j, k) for i, j, k in np.ndindex(4, 4, 4) if len({i, j, k}) == 3]
    assert agrees(counts, dict.fromkeys(triples, 1 / 24))


def test_draw_needs_no_memory_for_what_it_leaves() -> None:
    """Five of a million million samples."""
    assert len(draw(10**12, 5, np.random.default_rng(0))) == 5


def test_draw_by_is_in_proportion_to_scores_one_after_the_other() -> None:
    scores = np.array([1.0, 2.0, 5.0])
    rng = np.random.default_rng(1)
    counts = Counter(tuple(draw_by(scores, 2, rng).tolist()) for _ in range(6000))
    chances = {
        (i, j): scores[i] / 8 * scores[j] / (8 - scores[i]) for i in range(3) for j in range(3) if i != j
    }
    assert agrees(counts, chances)


def test_draw_by_takes_what_has_no_score_last() -> None:
    drawn = draw_by(np.array([0.0, 1e-300, 0.0, 1.0]), 3, np.random.default_rng(0))
    assert set(drawn[:2].tolist()) == {1, 3}
    assert drawn[2] == 0


@pytest.mark.parametrize("proposals", [3, 64])
def test_pivots_are_drawn_in_proportion_to_what_is_left(
    proposals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proposals from an older diagonal change nothing in the distribution, however many there are at a time."""
    monkeypatch.setattr(landmarks, "PROPOSALS", proposals)
    X = points(4, 2)
    a, rng = EXPONENTIAL.prepare(X, pool="candidates"), np.random.default_rng(2)
    counts = Counter(tuple(pivots(EXPONENTIAL, X, a, 2, rng)[0].tolist()) for _ in range(700))
    assert agrees(counts, reference.first_two_pivots(EXPONENTIAL.gram(X)))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 3))
def test_pivots_leave_the_diagonal_of_the_residual(n: int, number: int, seed: int) -> None:
    """What is left is that of the Nystrom approximation on the pivots, and fewer pivots are the first of more."""
    number = min(n, number)
    X = points(n, 3, seed)
    a = LAPLACE.prepare(X, pool="candidates")
    chosen, left = pivots(LAPLACE, X, a, number, np.random.default_rng(seed))
    assert len(set(chosen.tolist())) == number
    K = LAPLACE.gram(X)
    residual = np.diag(K - reference.nystrom(K, chosen))
    np.testing.assert_allclose(left, residual, atol=1e-9 * np.diag(K).max())
    assert np.all(left >= 0)
    fewer, _ = pivots(LAPLACE, X, a, -(-number // 2), np.random.default_rng(seed))
    np.testing.assert_array_equal(fewer, chosen[: len(fewer)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pivots_of_repeated_samples(dtype: type) -> None:
    """Where samples repeat nothing is left after as many pivots as there are different ones; the rest fill up."""
    X = np.repeat(points(5), 4, axis=0).astype(dtype)
    a = EXPONENTIAL.prepare(X, pool="candidates")
    chosen, left = pivots(EXPONENTIAL, X, a, 9, np.random.default_rng(0))
    assert set((chosen[:5] // 4).tolist()) == set(range(5))
    others = [k for k in range(20) if k not in chosen[:5]]
    np.testing.assert_array_equal(chosen[5:], others[:4])
    assert not left.any()


def test_pivots_of_a_diagonal_that_is_rounding() -> None:
    """What pairs do not confirm is no remainder: the search ends, and the rest fill up."""

    class Cancelling(Gaussian):
        def pair(self, a: Prepared, b: Prepared) -> Array:
            return np.zeros((len(a), len(b)))

    X = points(5)
    chosen, left = pivots(Cancelling(), X, Cancelling().prepare(X), 3, np.random.default_rng(0))
    np.testing.assert_array_equal(chosen, [0, 1, 2])
    assert not left.any()


def test_pivots_of_nothing_but_zeros() -> None:
    X = np.zeros((4, 3))
    chosen, left = pivots(
        EXPONENTIAL, X, EXPONENTIAL.prepare(X, pool="candidates"), 2, np.random.default_rng()
    )
    np.testing.assert_array_equal(chosen, [0, 1])
    assert not left.any()


@pytest.mark.parametrize("selection", ["pivoted-cholesky", "leverage-scores"])
def test_rare_clusters_are_found(selection: str) -> None:
    """On one large cluster and many small ones they leave less than half of what uniform landmarks leave."""
    X = clustered()
    K = EXPONENTIAL.gram(X)
    left = {
        name: sum(
            np.trace(K)
            - np.trace(EXPONENTIAL.gram(X, Z) @ np.linalg.pinv(EXPONENTIAL.gram(Z)) @ EXPONENTIAL.gram(Z, X))
            for seed in range(3)
            for Z, _ in [choose(EXPONENTIAL, InMemory(X), 30, name, 20_000, seed, unwatched)]
        )
        for name in ("uniform", selection)
    }
    assert left[selection] < left["uniform"] / 2


@pytest.mark.parametrize("ridge_dimension", [3.0, 10.0])
def test_leverage_scores_are_exact_where_the_pilot_is_everything(ridge_dimension: float) -> None:
    X = points()
    K = EXPONENTIAL.gram(X)
    scores, ridge = leverage_scores(EXPONENTIAL, EXPONENTIAL.prepare(X), len(X), ridge_dimension)
    exact = np.diag(K @ np.linalg.inv(K + ridge * np.eye(len(K))))
    np.testing.assert_allclose(scores, exact, rtol=1e-8)
    assert scores.sum() == pytest.approx(ridge_dimension)


@pytest.mark.parametrize("seed", range(3))
def test_leverage_scores_of_a_pilot_are_close(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the samples as pilot: every score is within a factor of 2 of the exact one at the same ridge."""
    monkeypatch.setattr(landmarks, "BLOCK_BYTES", 8 * 100 * 7)  # several blocks
    X = points(300, 4, seed)
    K = EXPONENTIAL.gram(X)
    scores, ridge = leverage_scores(EXPONENTIAL, EXPONENTIAL.prepare(X), 100, 10.0)
    exact = np.diag(K @ np.linalg.inv(K + ridge * np.eye(len(K))))
    assert np.all(scores <= 2 * exact)
    assert np.all(scores >= exact / 2)


def test_leverage_scores_of_fewer_dimensions_than_asked_for() -> None:
    """A linear kernel of three dimensions: the ridge ends at rounding, and the scores are those of the rank."""
    X = points(50, 3)
    linear = DotProduct("linear")
    scores, ridge = leverage_scores(linear, linear.prepare(X), 50, 20.0)
    assert 0 < ridge < 1e-10 * np.trace(linear.gram(X))
    assert scores.sum() == pytest.approx(3, rel=0.2)


def test_leverage_scores_of_nothing_but_zeros() -> None:
    X = np.zeros((6, 3))
    scores, ridge = leverage_scores(EXPONENTIAL, EXPONENTIAL.prepare(X), 6, 2.0)
    assert ridge == 0
    assert not scores.any()


def test_means_of_a_homogeneous_kernel_are_directions() -> None:
    """Lengths of vectors do not matter: as many means as directions find them all, and have the mean length."""
    rng = np.random.default_rng(0)
    directions = np.eye(5)
    X = np.concatenate([np.outer(rng.uniform(0.1, 10, 30), e) for e in directions] + [np.zeros((3, 5))])
    for kernel in (EXPONENTIAL, 2 * EXPONENTIAL + DotProduct("linear"), EXPONENTIAL * DotProduct("linear")):
        found = means(kernel, X, 5, seed=0)
        length = np.linalg.norm(X[:150], axis=1).mean()
        np.testing.assert_allclose(
            found[np.argsort(-found @ np.arange(5, 0, -1))], length * directions, atol=1e-12
        )


def test_means_of_another_kernel_are_those_of_clusters() -> None:
    """Clusters in one direction and at the origin are told apart, and represented by their means to one percent."""
    rng = np.random.default_rng(0)
    middles = np.array([[0.0, 0.0], [4.0, 0.0], [8.0, 0.0], [0.0, 5.0]])
    X = np.concatenate([m + 0.1 * rng.standard_normal((40, 2)) for m in middles])
    best = min(
        np.abs(found[:, None] - middles).sum(axis=2).min(axis=0).max()
        for seed in range(5)
        for found in [means(Gaussian(), X, 4, seed)]
    )
    assert best < 0.01 * 8 + 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", [EXPONENTIAL, Gaussian()], ids=["homogeneous", "other"])
def test_means_keep_the_dtype(kernel: Kernel, dtype: type) -> None:
    found = means(kernel, points().astype(dtype), 7, seed=0)
    assert found.dtype == dtype
    assert found.shape == (7, 4)


def test_too_few_directions_for_means() -> None:
    X = points(10)
    X[3:] = 0
    with pytest.raises(KernelError, match="landmarks must be at most 3, the number of samples among 10"):
        means(EXPONENTIAL, X, 4, seed=0)
    X[3:] = X[0]
    with pytest.raises(KernelError, match=r"landmarks by k-means: .* 3 "):
        means(EXPONENTIAL, X, 4, seed=0)


@dataclass(frozen=True)
class Counted(InMemory):
    """Samples that remember what was taken."""

    taken: list[np.ndarray] = field(default_factory=list)

    def take(self, positions: np.ndarray) -> Array:
        self.taken.append(positions)
        return self.X[positions]


@pytest.mark.parametrize("selection", landmarks.SELECTIONS)
def test_choose_takes_a_bounded_number_of_samples(selection: str) -> None:
    """Increasing positions, as many as there are candidates, however many samples there are."""
    samples = Counted(points(400))
    Z, _ = choose(EXPONENTIAL, samples, 12, selection, 50, 3, unwatched)
    assert Z.shape == (12, 4)
    (positions,) = samples.taken
    assert len(positions) == (12 if selection == "uniform" else 50)
    assert np.all(np.diff(positions) > 0)
    if selection != "k-means":
        rows = {tuple(row) for row in samples.X[positions].tolist()}
        assert len({tuple(row) for row in Z.tolist()} & rows) == 12


@pytest.mark.parametrize("selection", landmarks.SELECTIONS)
def test_choose_is_the_same_for_the_same_seed(selection: str) -> None:
    samples = InMemory(points(100))
    first, again, other = (
        choose(EXPONENTIAL, samples, 10, selection, 80, seed, unwatched)[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_uniform_landmarks_come_in_the_order_of_the_draw() -> None:
    """The first of more are those of fewer, and in that order."""
    samples = InMemory(points(100))
    more, fewer = (choose(EXPONENTIAL, samples, k, "uniform", 1, 5, unwatched)[0] for k in (40, 15))
    np.testing.assert_array_equal(more[:15], fewer)
    order = draw(100, 40, np.random.default_rng(5))
    np.testing.assert_array_equal(more, samples.X[order])


def test_bad_samples_are_refused() -> None:
    X = points(20)
    with pytest.raises(
        KernelError, match="landmarks must be at most 20, the number of samples to learn from"
    ):
        choose(EXPONENTIAL, InMemory(X), 21, "uniform", 100, 0, unwatched)
    X[7, 1] = np.nan
    with pytest.raises(
        KernelError, match="number 7 of the samples to learn from has a value that is not finite"
    ):
        choose(EXPONENTIAL, InMemory(X), 5, "pivoted-cholesky", 100, 0, unwatched)


@pytest.mark.parametrize("selection", landmarks.SELECTIONS)
def test_progress_is_told(selection: str) -> None:
    """Whoever waits for a choice hears of it; a uniform one is at once."""
    heard: list[str] = []
    choose(
        EXPONENTIAL,
        InMemory(points(100)),
        10,
        selection,
        80,
        0,
        lambda done, of_all, what: heard.append(what),
    )
    assert bool(heard) is (selection != "uniform")


@pytest.mark.parametrize("selection", ["leverage-scores", "pivoted-cholesky"])
def test_a_kernel_beyond_the_dtype_is_an_error(selection: str) -> None:
    """Protects against a draw that never ends, and eigenvalues of NaN: finite samples may have infinite kernels."""
    X = (points(200) * 1e30).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(SamplesError, match="not finite"):
        NystromFeatures(DotProduct("exponential", sigma=0.6), 20, selection).learn(InMemory(X))
