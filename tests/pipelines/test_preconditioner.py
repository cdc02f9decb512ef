"""The Nystrom preconditioner of conjugate gradients (R6): its sketch, its precision, its rank, its memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import DenseTiles, gaussian, targets

from pipelines.operators import GramOperator
from pipelines.solvers import preconditioner, sketch
from pipelines.solvers.conjugate_gradient import ConjugateGradient
from pipelines.solvers.preconditioner import (
    Preconditioner,
    Price,
    _next,
    load,
    preconditioner_bytes,
    randomised_nystrom,
    rank_within,
    save,
)
from pipelines.solvers.sketch import ColumnSketch, GaussianSketch, Sketch, SketchNotFinite, Spectrum

MEMORY = 2**30

FULL = preconditioner.MEMORY


def operator(K: np.ndarray) -> GramOperator:
    return GramOperator(DenseTiles(K, 128), np.arange(len(K)))


def approximated(made: Preconditioner) -> np.ndarray:
    U = made.U.astype(np.float64)
    return (U * made.values) @ U.T


def falling(n: int, power: float, seed: int = 0) -> np.ndarray:
    """A matrix with eigenvalues n / j^power."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    K = (Q * (n / np.arange(1.0, n + 1) ** power)) @ Q.T
    return (K + K.T) / 2


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(2, 60),
    rank=st.integers(1, 60),
    seed=st.integers(0, 5),
    precision=st.sampled_from(["float32", "float64"]),
    kind=st.sampled_from([ColumnSketch, GaussianSketch]),
)
def test_the_approximation_is_below_the_matrix(
    n: int, rank: int, seed: int, precision: str, kind: type[Sketch]
) -> None:
    """Protects R6: orthonormal, 0 <= U l U^T <= K up to the rounding of the precision, and what the sketch has seen
    of K is in it."""
    K = gaussian(n, seed)
    rank = min(rank, (n + 1) // 2)
    made = kind(operator(K), precision, rank, seed)
    made.grow(rank)
    found = made.spectrum()
    V = omega_of(made, n)
    U = made.eigenvectors(found).astype(np.float64)
    unit = float(np.finfo(precision).eps)
    np.testing.assert_allclose(U.T @ U, np.eye(len(found.values)), atol=20 * unit)
    assert (np.diff(found.values) <= 0).all()
    approximation = (U * found.values) @ U.T
    assert np.linalg.eigvalsh(K - approximation).min() > -20 * unit * n
    assert np.linalg.norm(approximation - nystrom_approximation(K, V), 2) < 100 * found.noise
    beyond = np.diag(K - approximation)
    assert found.trace == pytest.approx(beyond.sum(), abs=100 * n * found.noise)
    assert found.peak == pytest.approx(beyond.max(), abs=100 * found.noise)


def omega_of(made: Sketch, n: int) -> np.ndarray:
    """omega, (n, rank) float64."""
    if isinstance(made, GaussianSketch):
        return made._omega(slice(0, n), 0, made.rank).astype(np.float64)
    assert isinstance(made, ColumnSketch)
    return np.eye(n)[:, made._drawn]


def nystrom_approximation(K: np.ndarray, V: np.ndarray) -> np.ndarray:
    """K V (V^T K V)^+ V^T K as K^(1/2) times the projection on K^(1/2) V times K^(1/2): a pseudo-inverse would round by
    the condition number of V^T K V, of which this takes the square root."""
    values, vectors = np.linalg.eigh(K)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    basis, sizes, _ = np.linalg.svd(root @ V, full_matrices=False)
    half = root @ basis[:, sizes > 1e-7 * sizes[0]]
    return half @ half.T


def test_a_sketch_that_grew_is_the_one_made_at_once() -> None:
    """Protects doubling: columns sketched before stay, and the test matrix is the same whenever it is drawn."""
    K = operator(gaussian(300))
    grown, whole = GaussianSketch(K, "float64", 150, 3), GaussianSketch(K, "float64", 150, 3)
    for rank in (64, 128, 150):
        grown.grow(rank)
    whole.grow(150)
    np.testing.assert_allclose(grown.spectrum().values, whole.spectrum().values, rtol=1e-9)


def in_clusters(n: int) -> np.ndarray:
    """Nearly all samples close together, and 39 pairs of them far from all others."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((40, 5))
    X = centres[np.r_[np.zeros(n - 78, int), np.repeat(np.arange(1, 40), 2)]]
    X += 0.05 * rng.standard_normal((n, 5))
    return np.exp(-((X[:, None] - X[None]) ** 2).sum(axis=2) / 2)


def diagonal(n: int) -> np.ndarray:
    return np.diag(np.exp(3 * np.random.default_rng(0).standard_normal(n)))


@pytest.mark.parametrize(
    ("matrix", "ridge"),
    [
        pytest.param(falling(500, 1.5), 1e-5, id="falling-1e-5"),
        pytest.param(falling(500, 1.5), 1e-7, id="falling-1e-7"),
        pytest.param(gaussian(500), 1e-5, id="gaussian-1e-5"),
        pytest.param(gaussian(500), 1e-7, id="gaussian-1e-7"),
        pytest.param(in_clusters(500), 1e-5, id="clusters-1e-5"),
        pytest.param(in_clusters(500), 1e-7, id="clusters-1e-7"),
        pytest.param(diagonal(500), 1e-5, id="diagonal-1e-5"),
    ],
)
def test_columns_are_worth_as_much_as_gaussian_products(
    matrix: np.ndarray, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects sketches by columns: as many iterations as Gaussian ones leave (R6), within a tenth and two, also where
    a few samples are like no others, and where each is."""
    shift = ridge * np.linalg.norm(matrix, 2) / 500
    counts = []
    for kind in (ColumnSketch, GaussianSketch):
        monkeypatch.setattr(preconditioner, "sketch_of", kind)
        solver = ConjugateGradient(pass_columns=50.0)
        found = solver.solve(solver.factor(operator(matrix), [shift]), targets(500))[0]
        assert found.status == "solved"
        counts.append(found.iterations)
    assert counts[0] <= 1.1 * counts[1] + 2


def test_samples_that_resemble_no_others_are_drawn() -> None:
    """Protects from a sketch of one cluster: a growth is drawn by what the sketch lacks, and not what it has."""
    made = ColumnSketch(operator(in_clusters(2000)), "float32", 256, 0)
    made.grow(64)
    assert made.spectrum().peak > 0.5
    made.grow(192)
    assert made.spectrum().peak < 0.1
    assert len(set(made._drawn.tolist())) == 192


@pytest.mark.parametrize("copies", [2, 4])
def test_copies_take_no_columns(copies: int) -> None:
    """Protects the rank from samples that come more than once: of those drawn together one is kept."""
    X = np.random.default_rng(0).standard_normal((400, 12))
    K = np.exp(-((X[:, None] - X[None]) ** 2).sum(axis=2) / 24)
    made = ColumnSketch(operator(np.tile(K, (copies, copies))), "float32", 256, 0)
    for rank in (64, 128, 256):
        made.grow(rank)
        made.spectrum()
    assert made.rank == 256
    assert len(set((made._drawn % 400).tolist())) >= 250
    kept = np.tile(K, (copies, copies))[:, made._drawn]
    np.testing.assert_allclose(made._columns[:, :256], kept, rtol=1e-6)
    np.testing.assert_allclose(made._core, kept[made._drawn], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_few_distinct_samples_are_a_rank_of_a_few(seed: int) -> None:
    """Protects constant and low-rank matrices in float64, of which rounding is nearly all of a sketch: eigenvectors
    are orthonormal, and no more than the matrix has."""
    rng = np.random.default_rng(seed)
    distinct = rng.standard_normal((seed + 1, 3))
    X = distinct[rng.integers(0, seed + 1, 300)]
    for K in (X @ X.T, np.full((300, 300), 7.3)):
        for shift in (1e-6, 1e-9, 1e-12):
            made = randomised_nystrom(operator(K), [shift * K.trace() / 300], MEMORY, 0, pass_columns=50.0)
            U = made.U.astype(np.float64)
            assert made.rank <= min(seed + 1, 3)
            np.testing.assert_allclose(U.T @ U, np.eye(made.rank), atol=20 * np.finfo(made.U.dtype).eps)


def test_values_below_single_precision_are_sketched_in_double() -> None:
    """Protects from "the matrix is zero" where it is only small, and from a rank of nothing."""
    small = randomised_nystrom(operator(gaussian(200) * 1e-50), [1e-54], MEMORY, 0)
    assert small.precision == "float64"
    assert small.rank > 10
    negative = randomised_nystrom(operator(-gaussian(200)), [1e-3], MEMORY, 0)
    assert negative.rank == 0


def test_columns_drawn_in_single_precision_are_kept_in_double() -> None:
    """Protects what a restart has learnt of where the matrix has something, also where it has less room."""
    single = ColumnSketch(operator(gaussian(300)), "float32", 150, 0)
    single.grow(100)
    single.spectrum()
    double = single.anew("float64", 120)
    double.grow(120)
    assert set(double._drawn[:100].tolist()) == set(single._drawn.tolist())
    less = double.anew("float64", 80)
    less.grow(64)
    assert less.rank == 64
    assert set(less._drawn.tolist()) <= set(double._drawn.tolist())


def test_a_matrix_of_low_rank_is_known_exactly() -> None:
    X = np.random.default_rng(0).standard_normal((200, 7))
    K = X @ X.T
    made = randomised_nystrom(operator(K), [1e-6], MEMORY, 0)
    assert made.rank == 7
    np.testing.assert_allclose(made.values, np.linalg.eigvalsh(K)[::-1][:7], rtol=1e-4)
    np.testing.assert_allclose(approximated(made), K, atol=1e-4 * np.linalg.norm(K, 2))


def test_a_preconditioner_is_applied_as_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6's P^-1, for each row with its own shift, block by block."""
    monkeypatch.setattr(preconditioner, "BLOCK", (8, 3))
    rng = np.random.default_rng(0)
    U, _ = np.linalg.qr(rng.standard_normal((30, 4)))
    values, shifts = np.array([9.0, 4.0, 2.0, 1.0]), np.array([0.5, 3.0])
    R = rng.standard_normal((2, 30))
    made = Preconditioner(U, values, "float64", "given")
    before = R.copy()
    for row, v, shift in zip(made.solve(R, shifts), R, shifts, strict=True):
        weights = (values[-1] + shift) / (values + shift)
        np.testing.assert_allclose(row, U @ (weights * (U.T @ v)) + v - U @ (U.T @ v), rtol=1e-12)
    np.testing.assert_array_equal(R, before)
    A = (U * values) @ U.T
    expected = [z @ A @ np.linalg.solve(A + 0.5 * np.eye(30), z) for z in R]
    np.testing.assert_allclose(made.quadratic_forms(R, 0.5), expected, rtol=1e-10)


@pytest.mark.parametrize(("power", "shift"), [(2.0, 1e-4), (4.0, 1e-5), (6.0, 1e-9)])
def test_the_inverse_is_positive_definite(power: float, shift: float) -> None:
    """Protects conjugate gradients: U is orthonormal to well below the smallest eigenvalue of P^-1, also where that is
    at the rounding of the precision that U is held in."""
    n = 300
    made = randomised_nystrom(operator(falling(n, power)), [shift], MEMORY, 0)
    inverse = made.solve(np.eye(n), np.full(n, shift))
    least = (made.values[-1] + shift) / (made.values[0] + shift)
    assert least < 1e-3
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-14)
    assert np.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0.5 * least


def test_rounding_of_the_eigenvectors_costs_no_iterations() -> None:
    """Protects what is held in float32: as many iterations as with the same preconditioner in float64, within two."""
    n = 500
    K, Y = falling(n, 1.5), targets(n)
    solver = ConjugateGradient(rank_bytes=preconditioner_bytes(n, 128, "float32"))
    state = solver.factor(operator(K), [1e-5])
    single = state.preconditioner
    assert single.U.dtype == np.float32
    assert single.values[0] > 1e3 * single.values[-1]
    Q, _ = np.linalg.qr(single.U.astype(np.float64))
    Q *= np.sign((Q * single.U).sum(axis=0))
    double = replace(state, preconditioner=replace(single, U=Q))
    counts = [solver.solve(one, Y)[0].iterations for one in (state, double)]
    assert counts[0] > 10
    assert abs(counts[0] - counts[1]) <= 2


def test_the_rank_grows_with_the_effective_dimension_and_within_its_memory() -> None:
    K = operator(gaussian(400))
    shifts = [400 * ridge for ridge in (1e-1, 1e-3, 1e-5)]
    small, middle, large = (
        randomised_nystrom(K, [shift], MEMORY, 0, pass_columns=1.0).rank for shift in shifts
    )
    assert small <= 64 <= middle < large
    assert randomised_nystrom(K, [shifts[-1]], preconditioner_bytes(400, 50, "float32"), 0).rank <= 50


def test_the_rank_follows_what_a_pass_costs_and_what_is_known_of_the_smallest_eigenvalue() -> None:
    """Protects the price: dear passes are saved by a larger rank; a matrix with a floor needs less."""
    n = 600
    K = operator(falling(n, 1.2))
    cheap, dear = (randomised_nystrom(K, [1e-3], MEMORY, 0, pass_columns=cost).rank for cost in (0.0, 200.0))
    assert cheap < dear
    assert randomised_nystrom(K, [1e-3], MEMORY, 0, floor=100.0).rank < cheap


def test_more_columns_are_worth_it_where_they_save_more_than_they_cost() -> None:
    """Protects the units: columns of a float64 product, at the size that dear passes are met at."""
    price = Price(100_000, (0.5,), 1e-6, 200.0, sampled=False)
    dense = 671 + 3 * (671 - 168) / 2 + 275
    assert price.growing(8192, 4096, "float32") == pytest.approx(2048 + 400 + dense + 336, rel=0.01)
    sampled = replace(price, sampled=True)
    assert sampled.growing(8192, 4096, "float32") == pytest.approx(42 + 400 + dense, rel=0.01)
    one = preconditioner.iterations(23.0, 0.5, 1e-6)
    assert price.solving(23.0, 4096) == pytest.approx(one * (200 + 14 * 1.08), rel=0.01)
    assert price.solving(23.0, 4096) - price.solving(10.0, 8192) > price.growing(8192, 4096, "float32")


def test_single_precision_is_left_only_where_its_rounding_hides_what_the_ridge_does_not() -> None:
    """Protects the price of a sketch, twice as much in float64, and small ridges, which need it."""
    K = operator(falling(400, 4.0))
    above = randomised_nystrom(K, [1e-2], MEMORY, 0)
    assert (above.precision, above.U.dtype) == ("float32", np.float32)
    below = randomised_nystrom(K, [1e-9], MEMORY, 0, pass_columns=10.0)
    assert (below.precision, below.U.dtype) == ("float64", np.float64)
    assert below.values[-1] < 1e-3 * above.values[-1]


def test_single_precision_stays_where_double_would_not_reach_further() -> None:
    """Protects a sketch in float32 from being thrown away where memory holds no larger rank in float64."""
    none = np.empty((0, 0))
    seen = Spectrum(np.linspace(9.0, 1.0, 60), none, none, 0.2, 100, "float32", 0.0, 0.0)
    price = Price(10_000, (1e-6,), 1e-6, 100.0, sampled=False)
    assert _next(seen, None, {"float32": 100, "float64": 60}, price, FULL)[1] == FULL
    assert _next(seen, None, {"float32": 100, "float64": 70}, price, FULL) == (("float64", 70), "")
    coarse = replace(price, shifts=(0.05,))
    assert (
        _next(seen, None, {"float32": 100, "float64": 70}, coarse, FULL)[1]
        == "rounding hides what is below 0.2"
    )


def test_what_rounding_cuts_off_is_not_how_a_spectrum_falls() -> None:
    """Protects kernels of large values that differ little, of which two sketches in a row end in the rounding of
    float32, at the same eigenvalue: iterations were seven times as many as with a sketch in float64."""
    K = operator(1000 + gaussian(600))
    solver = ConjugateGradient(pass_columns=50.0, absolute=True)
    state = solver.factor(K, [1e-3])
    assert isinstance(state.preconditioner, Preconditioner)
    assert state.preconditioner.precision == "float64"
    assert solver.solve(state, targets(600))[0].iterations < 60


def test_the_reason_of_a_rank_is_memory_only_where_it_is() -> None:
    """Protects who reads it from buying memory that would change nothing."""
    K = operator(falling(100, 0.5))

    def reason(limit: int, **given: str) -> str:
        return randomised_nystrom(K, [1e-6], limit, 0, **given).reason

    few = preconditioner_bytes(100, 20, "float32")
    assert reason(few) == preconditioner.MEMORY
    assert reason(few, full=preconditioner.EXPECTED) == preconditioner.EXPECTED
    assert reason(MEMORY) == preconditioner.HALF


def test_nothing_of_a_matrix_of_zeros() -> None:
    made = randomised_nystrom(operator(np.zeros((50, 50))), [1e-2], MEMORY, 0)
    assert made.rank == 0
    R = targets(50).T
    np.testing.assert_array_equal(made.solve(R, np.full(3, 1e-2)), R)


def test_kept_and_read_again(tmp_path: Path) -> None:
    made = randomised_nystrom(operator(gaussian(100)), [1e-2], MEMORY, 0)
    save(tmp_path / "p.npz", made)
    found = load(tmp_path / "p.npz", 100)
    assert found is not None
    np.testing.assert_array_equal(found.U, made.U)
    np.testing.assert_array_equal(found.values, made.values)
    assert (found.precision, found.reason, found.U.dtype) == (made.precision, made.reason, made.U.dtype)
    assert load(tmp_path / "p.npz", 99) is None
    assert load(tmp_path / "none.npz", 100) is None


@given(
    limit=st.integers(0, 10**9), n=st.integers(1, 10**6), precision=st.sampled_from(["float32", "float64"])
)
def test_the_largest_rank_within_memory(limit: int, n: int, precision: str) -> None:
    rank = rank_within(limit, n, precision)
    assert 1 <= rank <= (n + 1) // 2 or n == rank == 1
    assert rank == 1 or preconditioner_bytes(n, rank, precision) <= limit
    assert rank == (n + 1) // 2 or preconditioner_bytes(n, rank + 1, precision) > limit


@pytest.mark.parametrize("rank", [100, 600])
def test_making_it_takes_the_memory_that_it_may(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the plan: the arrays at the peak are as many as it counts."""
    n = 6000
    monkeypatch.setattr(sketch, "MULTIPLIED_COLUMNS", 128)
    monkeypatch.setattr(preconditioner, "SKETCH_COLUMNS", 128)

    class Decaying:
        n = 6000

        def diag(self) -> np.ndarray:
            return n / np.arange(1.0, n + 1)

        def matmul(self, V: np.ndarray) -> np.ndarray:
            return np.multiply((n / np.arange(1.0, n + 1))[:, None], V)

    limit = preconditioner_bytes(n, rank, "float32")
    tracemalloc.start()
    try:
        made = randomised_nystrom(Decaying(), [1e-6], limit, 0, pass_columns=1e6)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.rank == rank
    assert 0.6 * limit < peak < 1.1 * limit


def test_values_beyond_single_precision_are_sketched_in_double() -> None:
    """Protects from a preconditioner of infinities, which ends as iterations that do not converge."""
    K = falling(40, 2.0) * 1e38
    with pytest.raises(SketchNotFinite, match="not finite in float32"):
        ColumnSketch(operator(K), "float32", 20, 0).grow(20)
    made = randomised_nystrom(operator(K), (1e36,), 2**20, 0)
    assert made.precision == "float64"
    assert np.isfinite(made.values).all()
    assert made.values[0] == pytest.approx(np.linalg.eigvalsh(K)[-1], rel=0.1)
    with pytest.raises(SketchNotFinite, match="not finite in float64"):
        randomised_nystrom(operator(np.full((40, 40), 1.7e308)), (1e36,), 2**20, 0)
