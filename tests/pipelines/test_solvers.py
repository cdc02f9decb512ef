"""Direct solvers against dense linear algebra, explicit refits and each other (SPEC R1, R3 to R5, R9)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines import tasks
from pipelines.errors import ChunkLost, DataError, ExperimentError, NumericalError
from pipelines.operators import GramOperator
from pipelines.site import Site
from pipelines.solvers import Cholesky, Eigen, Solver, Status, base, blocked_factor
from pipelines.solvers import cholesky as cholesky_module
from pipelines.solvers.base import ACCURATE, extreme_eigenvalues, refine, rounding_level
from pipelines.solvers.mixed import MixedCholesky
from pipelines.solvers.precision import DOUBLE, DOUBLE_LOO, SINGLE

RIDGES = (1.0, 1e-2, 1e-4, 1e-6)


class MemoryTiles:
    """A symmetric store in memory."""

    symmetric = True

    def __init__(self, matrix: np.ndarray, side: int = 16) -> None:
        self.matrix, self.side, self.shape = matrix, side, matrix.shape

    def read_tile(self, i: int, j: int) -> np.ndarray:
        assert i >= j
        return self.matrix[i * self.side : (i + 1) * self.side, j * self.side : (j + 1) * self.side].copy()


def gram_matrix(n: int, seed: int = 0) -> np.ndarray:
    """An exponential kernel of points on a sphere."""
    X = np.random.default_rng(seed).standard_normal((n, 4))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    K = np.exp((X @ X.T - 1) / 0.36)
    return (K + K.T) / 2


def spectrum_matrix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with the given eigenvalues."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    K = (Q * values) @ Q.T
    return (K + K.T) / 2


def operator(K: np.ndarray, side: int = 16) -> GramOperator:
    return GramOperator(MemoryTiles(K, side), np.arange(len(K)))


def targets(n: int, t: int = 3) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, t))


def solutions(solver: Solver, K: np.ndarray, Y: np.ndarray, ridges: tuple[float, ...] = RIDGES) -> tuple:
    return solver.solve(solver.factor(operator(K), ridges), Y)


@pytest.mark.parametrize("solver", [Cholesky(), Cholesky(loo=True), Eigen(), Eigen(loo=True)])
@pytest.mark.parametrize("n", [1, 5, 61, 300])
def test_equals_a_dense_solve(solver: Solver, n: int) -> None:
    """R1: (K + n lambda I) alpha = Y for every ridge of the path, over sizes around the panels of 256."""
    K, Y = gram_matrix(n), targets(n)
    for solution, ridge in zip(solutions(solver, K, Y), RIDGES, strict=True):
        A = K + n * ridge * np.eye(n)
        expected = np.linalg.solve(A, Y)
        # what rounding alone can do to the coefficients grows with the condition number
        bound = 1e-14 * np.linalg.cond(A) * n
        assert np.linalg.norm(solution.alpha - expected) <= bound * np.linalg.norm(expected)
        assert solution.status is Status.SOLVED
        assert solution.ridge == ridge
        assert solution.shift == n * ridge
        measured = np.linalg.norm(A @ solution.alpha - Y) / np.linalg.norm(Y)
        assert solution.residual == pytest.approx(measured, abs=1e-10)
        assert solution.alpha.dtype == np.float64
        assert solution.peak_bytes > 0


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(1, 17), st.integers(0, 2**16), st.data())
def test_masked_and_ragged_stores_solve_like_their_dense_part(
    n: int, side: int, seed: int, data: st.DataObject
) -> None:
    K = gram_matrix(n, seed)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    Y = targets(len(rows), 2)
    source = GramOperator(MemoryTiles(K, side), rows)
    expected = np.linalg.solve(K[np.ix_(rows, rows)] + len(rows) * 1e-2 * np.eye(len(rows)), Y)
    for solver in (Cholesky(), Eigen()):
        (solution,) = solver.solve(solver.factor(source, [1e-2]), Y)
        np.testing.assert_allclose(solution.alpha, expected, rtol=1e-9, atol=1e-11)


def test_path_by_cholesky_equals_path_by_eigendecomposition() -> None:
    """R4: predictions agree to 1e-8 relative where n lambda > 1e-10 of the largest eigenvalue."""
    K, Y = gram_matrix(300), targets(300)
    largest = np.linalg.eigvalsh(K)[-1]
    ridges = tuple(largest * factor / 300 for factor in (1e-1, 1e-4, 1e-7, 1e-9))
    pairs = zip(
        solutions(Cholesky(loo=True), K, Y, ridges), solutions(Eigen(loo=True), K, Y, ridges), strict=True
    )
    for direct, spectral in pairs:
        a, b = K @ direct.alpha, K @ spectral.alpha
        assert np.linalg.norm(a - b) <= 1e-8 * np.linalg.norm(a)
        assert direct.effective_dimension == pytest.approx(spectral.effective_dimension, rel=1e-8)
        np.testing.assert_allclose(direct.loo, spectral.loo, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", [Cholesky(loo=True), Eigen(loo=True)])
@pytest.mark.parametrize("ridge", [1e-1, 1e-3])
def test_leave_one_out_equals_explicit_refits(solver: Solver, ridge: float) -> None:
    """R5, at the same n lambda in every refit."""
    n = 60
    K, Y = gram_matrix(n), targets(n)
    (solution,) = solutions(solver, K, Y, (ridge,))
    for i in range(n):
        rest = np.delete(np.arange(n), i)
        alpha = np.linalg.solve(K[np.ix_(rest, rest)] + n * ridge * np.eye(n - 1), Y[rest])
        np.testing.assert_allclose(solution.loo[i], K[i, rest] @ alpha, atol=1e-10)


@pytest.mark.parametrize("solver", [Cholesky(loo=True), Cholesky("float32", loo=True), Eigen(loo=True)])
def test_leaving_out_a_sample_that_is_zero_predicts_zero(solver: Solver) -> None:
    """Protects scores by leave-one-out from rounding, whose sign would make such samples right or wrong by chance."""
    n, zero = 60, [0, 7, 59]
    K, Y = gram_matrix(n), targets(n)
    K[zero] = K[:, zero] = 0
    for solution in solutions(solver, K, Y):
        assert not solution.loo[zero].any()
        assert np.delete(solution.loo, zero, axis=0).all()


@pytest.mark.parametrize("solver", [Cholesky(), Eigen()])
def test_effective_dimension_is_the_spectral_sum(solver: Solver) -> None:
    """R9: d(lambda) = sum s_j / (s_j + n lambda)."""
    K = gram_matrix(120)
    s = np.linalg.eigvalsh(K).clip(0)
    for solution in solutions(solver, K, targets(120)):
        expected = np.sum(s / (s + solution.shift))
        assert solution.effective_dimension == pytest.approx(expected, rel=1e-7)


def test_estimated_effective_dimension_is_near_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the exact size the estimate's standard deviation is at most sqrt(2 d / probes)."""
    monkeypatch.setattr(cholesky_module, "EXACT_DIMENSION", 100)
    K = gram_matrix(400)
    s = np.linalg.eigvalsh(K).clip(0)
    for solution in solutions(Cholesky(), K, targets(400)):
        expected = np.sum(s / (s + solution.shift))
        deviation = np.sqrt(2 * expected / cholesky_module.PROBES)
        assert abs(solution.effective_dimension - expected) < 4 * deviation
        assert any("estimated" in note for note in solution.notes)


def test_float32_factor_is_refined_to_the_stored_matrix() -> None:
    """The residual is that of the float64 matrix in the store, not of its float32 rounding."""
    K, Y = gram_matrix(200), targets(200)
    for solution in solutions(Cholesky("float32"), K, Y, (1e-1, 1e-3, 1e-5)):
        A = K + solution.shift * np.eye(200)
        assert np.linalg.norm(A @ solution.alpha - Y) <= 2e-8 * np.linalg.norm(Y)
        assert solution.status is Status.SOLVED
        assert solution.iterations > 0


def test_path_needs_one_matrix_and_no_copy() -> None:
    """The factor of every ridge lands in the array that holds K."""
    solver = Cholesky(loo=True)
    state = solver.factor(operator(gram_matrix(80)), RIDGES)
    address, above = state.matrix.ctypes.data, np.triu(state.matrix, 1)
    factor = np.tril(state.matrix)
    np.testing.assert_allclose(factor @ factor.T, gram_matrix(80) + 80 * np.eye(80), atol=1e-12)
    solver.solve(state, targets(80))
    assert state.matrix.ctypes.data == address
    np.testing.assert_array_equal(np.triu(state.matrix, 1), above)


@pytest.mark.parametrize("ridges", [RIDGES, RIDGES[1:2]])
def test_solving_twice_gives_the_same_bits(ridges: tuple[float, ...]) -> None:
    """The state survives a solve, whatever the factor in it was used for."""
    solver = Cholesky(loo=True)
    state = solver.factor(operator(gram_matrix(70)), ridges)
    first, second = solver.solve(state, targets(70)), solver.solve(state, targets(70))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.alpha, b.alpha)


@pytest.mark.parametrize("kind", [Cholesky, Eigen])
def test_absolute_ridges_and_jitter_are_added_and_recorded(kind: type) -> None:
    K, Y = 3.0 * gram_matrix(50), targets(50)
    (absolute,) = solutions(kind(absolute=True), K, Y, (0.5,))
    np.testing.assert_allclose(absolute.alpha, np.linalg.solve(K + 0.5 * np.eye(50), Y), rtol=1e-9)
    (jittered,) = solutions(kind(jitter=1e-3), K, Y, (1e-2,))
    assert jittered.jitter == pytest.approx(3e-3)
    assert jittered.shift == pytest.approx(0.5 + 3e-3)
    np.testing.assert_allclose(jittered.alpha, np.linalg.solve(K + 0.503 * np.eye(50), Y), rtol=1e-9)
    assert any("jitter" in note for note in jittered.notes)


@pytest.mark.parametrize("solver", [Cholesky(), Eigen()])
def test_zero_targets_and_one_column(solver: Solver) -> None:
    K = gram_matrix(20)
    (zero,) = solutions(solver, K, np.zeros(20), (1e-2,))
    assert zero.residual == 0
    np.testing.assert_array_equal(zero.alpha, np.zeros((20, 1)))
    (one,) = solutions(solver, K, np.arange(20), (1e-2,))
    expected = np.linalg.solve(K + 0.2 * np.eye(20), np.arange(20.0))
    np.testing.assert_allclose(one.alpha[:, 0], expected, rtol=1e-10)


# --- matrices that are not positive definite


@pytest.mark.parametrize("kind", [Cholesky, Eigen])
@pytest.mark.parametrize("n", [40, 500])
def test_indefinite_matrix_names_its_eigenvalues_and_a_sufficient_ridge(kind: type, n: int) -> None:
    values = np.linspace(0.0, 2.0, n)
    values[0] = -0.25
    K = spectrum_matrix(values)
    with pytest.raises(NumericalError) as caught:
        solutions(kind(), K, targets(n), (1.0, 1e-5))
    message = str(caught.value)
    assert "ridge 1e-05" in message
    assert "smallest eigenvalue of K is about -0.25" in message
    assert "the largest about 2" in message
    assert "float64" not in message
    advised = float(message.split("at least ")[1].split()[0])
    assert solutions(kind(), K, targets(n), (advised,))[0].status is Status.SOLVED


def test_indefinite_float32_matrix_is_advised_to_use_float64() -> None:
    values = np.linspace(0.0, 2.0, 40)
    values[0] = -0.25
    with pytest.raises(NumericalError, match="store and solve in float64"):
        solutions(Cholesky(), spectrum_matrix(values).astype(np.float32), targets(40), (1e-5,))


@pytest.mark.parametrize("kind", [Cholesky, Eigen])
def test_ridge_that_outweighs_a_negative_eigenvalue_solves_the_matrix_as_it_is(kind: type) -> None:
    values = np.linspace(0.0, 2.0, 40)
    values[0] = -0.25
    K, Y = spectrum_matrix(values), targets(40)
    (solution,) = solutions(kind(), K, Y, (0.1,))
    np.testing.assert_allclose(solution.alpha, np.linalg.solve(K + 4 * np.eye(40), Y), rtol=1e-10, atol=1e-12)


def test_failure_by_rounding_falls_back_to_an_indefinite_factor() -> None:
    """R3: a solution with a warning, and its residual measured."""
    n = 60
    values = np.linspace(0.5, 2.0, n)
    values[0] = -2e-14
    K, Y = spectrum_matrix(values), targets(n)
    assert values[0] > -rounding_level(n, [np.dtype(np.float64)], K.diagonal().max())
    (solution,) = solutions(Cholesky(loo=True, absolute=True), K, Y, (1e-15,))
    assert solution.status in (Status.INDEFINITE, Status.INACCURATE)
    assert any("indefinite factor" in note for note in solution.notes)
    assert solution.loo is None
    assert solution.effective_dimension is None
    measured = np.linalg.norm(K @ solution.alpha + 1e-15 * solution.alpha - Y) / np.linalg.norm(Y)
    assert solution.residual == pytest.approx(measured, rel=0.5, abs=1e-9)


def test_fallback_leaves_the_next_ridge_untouched() -> None:
    n = 60
    values = np.linspace(0.5, 2.0, n)
    values[0] = -2e-14
    K, Y = spectrum_matrix(values), targets(n)
    last = solutions(Cholesky(absolute=True), K, Y, (1e-15, 0.5))[1]
    np.testing.assert_allclose(last.alpha, np.linalg.solve(K + 0.5 * np.eye(n), Y), rtol=1e-10)
    assert last.status is Status.SOLVED


def test_eigenvalues_below_zero_by_rounding_are_clipped() -> None:
    """R4: s is clipped at zero, so the smallest ridge still gives finite coefficients."""
    n = 50
    values = np.linspace(0.5, 2.0, n)
    values[:2] = -2e-14
    solver = Eigen(absolute=True, loo=True)
    state = solver.factor(operator(spectrum_matrix(values)), [1e-14])
    (solution,) = solver.solve(state, targets(n))
    alpha = state.vectors.T @ solution.alpha
    np.testing.assert_allclose(alpha[:2], 1e14 * (state.vectors.T @ targets(n))[:2], rtol=1e-2)
    assert solution.effective_dimension == pytest.approx(n - 2)
    assert any("set to zero" in note for note in solution.notes)


def test_float32_storage_leaves_the_two_paths_equal() -> None:
    """R4 where storage left small negative eigenvalues that the ridge outweighs: nothing is clipped."""
    n = 300
    K = spectrum_matrix(np.concatenate([np.full(n - 20, -2e-6), np.linspace(1.0, 50.0, 20)]))
    K = K.astype(np.float32)
    K = np.tril(K) + np.tril(K, -1).T
    Y = targets(n)
    for ridge in (1e-4, 1e-5):
        (direct,) = solutions(Cholesky(loo=True, absolute=True), K, Y, (ridge,))
        (spectral,) = solutions(Eigen(loo=True, absolute=True), K, Y, (ridge,))
        assert spectral.status is direct.status is Status.SOLVED
        assert np.linalg.norm(K @ (direct.alpha - spectral.alpha)) <= 1e-8 * np.linalg.norm(K @ direct.alpha)
        assert spectral.effective_dimension == pytest.approx(direct.effective_dimension, abs=1e-6)


@pytest.mark.parametrize(
    ("loo", "missed"),
    [(True, "leave-one-out and the effective dimension"), (False, "the effective dimension")],
)
def test_an_inaccurate_factor_misses_only_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, loo: bool, missed: str
) -> None:
    """Protects a run that chooses on validation data from a note on leave-one-out."""
    monkeypatch.setattr(base, "ACCURATE", 0.0)
    (solution,) = solutions(Cholesky("float32", loo=loo), gram_matrix(20), targets(20), (1e-3,))
    assert solution.status is Status.INACCURATE
    assert f"the factor is too inaccurate for {missed}" in solution.notes


def test_hopeless_float32_factor_says_so_and_derives_nothing() -> None:
    """A ridge far below float32's rounding: no leave-one-out or dimension from a factor of noise."""
    K, Y = gram_matrix(200), targets(200)
    K = np.exp((np.log(K)) / 50)
    (solution,) = solutions(Cholesky("float32", loo=True), K, Y, (1e-11,))
    assert solution.status is Status.INACCURATE
    assert solution.residual > 1e-6
    assert any("solve in float64" in note for note in solution.notes)
    assert solution.loo is None
    assert solution.effective_dimension is None


@pytest.mark.parametrize("solver", [Cholesky(), Eigen()])
@pytest.mark.parametrize("place", [(7, 7), (9, 3)])
def test_values_that_are_not_finite_are_refused(solver: Solver, place: tuple[int, int]) -> None:
    """By name and before LAPACK, whose eigensolver never returns on them."""
    K = gram_matrix(30)
    K[place] = K[place[::-1]] = np.nan
    said = f"rows {min(place)} and {max(place)} of the pool is not finite in float64; scale the samples"
    with pytest.raises(NumericalError, match=said):
        solutions(solver, K, targets(30), (1e-2,))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.integers(0, 1000))
@example(43, 0)  # the smallest is known long before the largest
def test_lanczos_finds_both_ends_of_small_spectra(n: int, seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).standard_normal(n))
    K = spectrum_matrix(values, seed)
    smallest, largest = extreme_eigenvalues(lambda v: K @ v, n, tolerance=1e-9)
    assert smallest == pytest.approx(values[0], abs=1e-8)
    assert largest == pytest.approx(values[-1], abs=1e-8)


def test_lanczos_finds_a_small_negative_eigenvalue_below_a_large_spectrum() -> None:
    """The case of a Gram matrix: quick decay from a large eigenvalue, one slightly negative."""
    n = 1000
    values = 1000.0 * np.arange(1, n + 1.0) ** -2
    values[-1] = -1e-2
    K = spectrum_matrix(values)
    smallest, largest = extreme_eigenvalues(lambda v: K @ v, n, tolerance=1e-5)
    assert smallest == pytest.approx(-1e-2, rel=1e-2)
    assert largest == pytest.approx(1000.0, rel=1e-6)


def test_refinement_stops_when_it_no_longer_helps() -> None:
    """A correction that diverges leaves the first solution, with its honest residual."""
    A = np.diag([1.0, 2.0])
    x, error, kept = refine(lambda V: -3.0 * V, lambda V: A @ V, np.ones((2, 1)))
    np.testing.assert_array_equal(x, [[-3.0], [-3.0]])
    assert kept == 0
    assert error == pytest.approx(np.linalg.norm([4.0, 7.0]) / np.sqrt(2))


# --- bad input and the choice of a method


@pytest.mark.parametrize("solver", [Cholesky(), Eigen()])
@pytest.mark.parametrize("ridges", [(), (0.0,), (-1.0,), (1.0, float("nan")), (float("inf"),)])
def test_bad_ridges_are_refused_before_work(solver: Solver, ridges: tuple[float, ...]) -> None:
    class NeverRead(MemoryTiles):
        def read_tile(self, i: int, j: int) -> np.ndarray:
            raise AssertionError("a tile was read")

    with pytest.raises(ExperimentError, match=r"solve\.ridges"):
        solver.factor(GramOperator(NeverRead(gram_matrix(5)), np.arange(5)), ridges)


@pytest.mark.parametrize("solver", [Cholesky(), Eigen()])
@pytest.mark.parametrize(
    ("Y", "message"),
    [
        (np.ones(4), r"\(5, t\)"),
        (np.ones((5, 0)), r"\(5, t\)"),
        (np.ones((5, 1, 1)), r"\(5, t\)"),
        (np.array([0, 1, np.nan, 1, np.inf]), r"sample 2 is not finite \(2"),
        (np.array(list("abcde")), "one_vs_all"),
    ],
)
def test_bad_targets_are_refused(solver: Solver, Y: np.ndarray, message: str) -> None:
    state = solver.factor(operator(gram_matrix(5)), [1e-2])
    with pytest.raises(DataError, match=message):
        solver.solve(state, Y)


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"jitter": -1.0}, {"jitter": float("nan")}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(ExperimentError, match=r"solve\."):
        Cholesky(**options)


def test_mixed_precision_turns_to_double_where_single_is_not_enough() -> None:
    """Large ridges are solved with a float32 factor; from the first that it is too coarse for, with a float64 one."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 60)))
    K, Y = (Q * np.logspace(0, -10, 60)) @ Q.T, targets(60)
    K = (K + K.T) / 2
    ridges = (1e-2, 1e-11, 1e-1)
    found = solutions(MixedCholesky(), K, Y, ridges)
    exact = solutions(Cholesky(), K, Y, ridges)
    for mine, theirs, note in zip(found, exact, (SINGLE, DOUBLE, SINGLE), strict=True):
        assert mine.ridge == theirs.ridge
        assert mine.residual <= ACCURATE
        assert note in mine.notes
        np.testing.assert_allclose(K @ mine.alpha, K @ theirs.alpha, atol=1e-6)
    left_out = solutions(MixedCholesky(loo=True), K, Y, (1e-2,))[0]
    assert DOUBLE_LOO in left_out.notes  # a float32 factor was not tried, and may well be enough
    assert DOUBLE not in left_out.notes
    np.testing.assert_array_equal(left_out.loo, solutions(Cholesky(loo=True), K, Y, (1e-2,))[0].loo)


def test_mixed_precision_is_not_tried_again_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects resuming: a start after a death in float64 goes on there, with the bits of one that was not disturbed,
    and a later ridge of the same solve is solved in float64 as it would have been."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 60)))
    K, Y = (Q * np.logspace(0, -10, 60)) @ Q.T, targets(60)
    K = (K + K.T) / 2
    ridges = (1e-1, 1e-11, 1e-12)
    whole = solutions(MixedCholesky(), K, Y, ridges)
    assert [DOUBLE in one.notes for one in whole] == [False, True, True]
    made: list[str] = []
    dense = GramOperator.dense

    def reading(self: GramOperator, *, out: np.ndarray, triangle: str) -> np.ndarray:
        made.append(out.dtype.name)
        if made.count("float64") == 1:
            raise KeyboardInterrupt
        return dense(self, out=out, triangle=triangle)

    monkeypatch.setattr(GramOperator, "dense", reading)

    def start(some: tuple[float, ...]) -> tuple:
        with Site(tmp_path / "solve", tasks.Workers, 2**30) as site:
            solver = MixedCholesky()
            return solver.solve(solver.factor(GramOperator(MemoryTiles(K), np.arange(60), site), some), Y)

    with pytest.raises(KeyboardInterrupt):
        start(ridges)
    resumed = start(ridges[1:])  # the first was kept
    before, after = made[: made.index("float64")], made[made.index("float64") + 1 :]
    assert set(before) == {"float32"}
    assert set(after) == {"float64"}
    for one, other in zip(whole[1:], resumed, strict=True):
        np.testing.assert_array_equal(one.alpha, other.alpha)
        assert one.notes == other.notes


def test_a_tile_that_cannot_be_read_between_ridges_leaves_no_half_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protects a second try on the same state: what reading had begun to overwrite is not taken for a factor."""
    K, Y = gram_matrix(60), targets(60)
    solver, ridges = Cholesky(), (1e-2, 1e-3)
    state = solver.factor(GramOperator(MemoryTiles(K, 16), np.arange(60)), ridges)
    read, missing = MemoryTiles.read_tile, [True]

    def reading(self: MemoryTiles, i: int, j: int) -> np.ndarray:
        if missing and (i, j) == (2, 1) and state.factored is None:
            raise ChunkLost("gone")
        return read(self, i, j)

    monkeypatch.setattr(MemoryTiles, "read_tile", reading)
    with pytest.raises(ChunkLost):
        solver.solve(state, Y)
    missing.clear()
    for one, other in zip(solver.solve(state, Y), solutions(solver, K, Y, ridges), strict=True):
        np.testing.assert_allclose(one.alpha, other.alpha, rtol=1e-10)


def test_equal_samples_and_a_ridge_below_rounding_end_in_a_named_error() -> None:
    """Protects from garbage: an indefinite matrix is named with its ridge, its eigenvalue and what to do."""
    K = np.ones((40, 40)) - 1e-3 * np.eye(40)
    for solver in (Cholesky(), Eigen(), MixedCholesky()):
        with pytest.raises(NumericalError, match=r"at ridge 1e-12 .* take a ridge of at least"):
            solutions(solver, K, targets(40), (1e-12,))


def test_the_pivot_that_fails_is_named_by_its_row_of_the_pool() -> None:
    """Protects who has to find the sample: of an indefinite matrix, and of equal samples under too small a ridge."""
    K = np.eye(30)
    K[5, 17] = K[17, 5] = 2.0
    rows = np.delete(np.arange(30), [0, 8])
    said = "the pivot of training row 17 is not positive, the smallest eigenvalue of K is about -1, the largest about 3"
    with pytest.raises(NumericalError, match=said):
        Cholesky().factor(GramOperator(MemoryTiles(K), rows), [1e-5])
    K[5, 17] = K[17, 5] = 1.0
    operator = GramOperator(MemoryTiles(K), rows)
    with pytest.raises(
        NumericalError, match=r"singular .* and the pivot of training row 17 is zero"
    ) as caught:
        Cholesky().factor(operator, [1e-30])
    advised = float(str(caught.value).split("at least ")[1].split()[0])
    assert Cholesky().factor(operator, [advised]).pivots is None


def test_solutions_are_immutable() -> None:
    (solution,) = solutions(Cholesky(), gram_matrix(5), targets(5), (1.0,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.ridge = 2.0


def test_a_ridge_counts_the_time_of_its_own_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects what reports say of a path that was interrupted: the first factor is the first ridge's alone."""
    clock = [0.0]

    def factored(matrix: np.ndarray) -> int:
        clock[0] += 100.0
        return blocked_factor.factor_in_place(matrix)

    monkeypatch.setattr(cholesky_module, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cholesky_module, "factor_in_place", factored)
    solver = Cholesky()
    found = solver.solve(solver.factor(operator(gram_matrix(30)), [1.0, 1e-2, 1e-3]), targets(30))
    assert [one.seconds for one in found] == [100.0, 100.0, 100.0]
