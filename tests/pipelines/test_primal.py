"""Ridge regression on features: by eigenvectors, in the primal and the dual, by iterations; beside dense algebra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_systems import Dense, MemoryFeatures, features
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import Stop, relative, same, targets

from kernels.dot_product import DotProduct
from kernels.features.base import InMemory
from kernels.features.nystrom import LANDMARKS, NystromFeatures
from pipelines import products, tasks
from pipelines.errors import DataError, ExperimentError, NumericalError
from pipelines.experiment import Solve
from pipelines.explicit import covariance, feature_products
from pipelines.site import Site
from pipelines.solvers import Means, Problem, Status, build_primal, choose_primal, primal
from pipelines.solvers.base import Solution
from pipelines.solvers.choose import PRECONDITIONING
from pipelines.solvers.preconditioner import preconditioner_bytes
from pipelines.solvers.primal import (
    FeatureOperator,
    PrimalCholesky,
    PrimalEigen,
    PrimalFalkon,
    PrimalGradients,
)
from pipelines.solvers.sketch import MULTIPLIED_COLUMNS
from pipelines.speed import Speed

RIDGES = (1.0, 1e-2, 1e-4)
EXACT = PrimalGradients(tolerance=1e-10)
ITERATED = {
    "gradients": EXACT,
    "falkon": PrimalFalkon(tolerance=1e-10),
    "diagonal": PrimalFalkon(tolerance=1e-10, whitened=True),
}
SOLVERS = {"eigen": PrimalEigen(), "cholesky": PrimalCholesky(), **ITERATED}
SHAPES = {
    "tall": (90, 12, None),
    "wide": (20, 45, None),
    "deficient": (80, 30, 9),
    "dual, deficient": (25, 40, 6),
}


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "STRIP", 16)
    monkeypatch.setattr(feature_products, "STRIP", 8)
    monkeypatch.setattr(products, "SQUARE", 16)


def system(shape: str) -> tuple[FeatureOperator, np.ndarray]:
    """Features of samples with gaps between them, and targets of the samples."""
    n, width, rank = SHAPES[shape]
    rows = np.setdiff1d(np.arange(n + 5), [0, 7, 8, 13, n + 1])
    operator = FeatureOperator(MemoryFeatures(features(n + 5, width, rank), 8), rows)
    return operator, targets(len(rows))


def phi_of(operator: FeatureOperator) -> np.ndarray:
    source = operator.source
    assert isinstance(source, MemoryFeatures)
    return source.phi[operator.rows].astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_are_those_of_the_dual(shape: str, name: str) -> None:
    """Protects F7, to 1e-8, in either form; and what a solution says of itself."""
    solver = SOLVERS[name]
    operator, Y = system(shape)
    F = phi_of(operator)
    for found, ridge in zip(solver.solve(operator, RIDGES, Y), RIDGES, strict=True):
        shift = ridge * operator.n
        exact = Dense.of(F, Y, shift)
        assert found.fitted is not None
        assert relative(found.fitted, exact.fitted) < 1e-8
        assert relative(found.alpha, exact.weights) < 1e-7
        assert relative(F @ found.alpha, found.fitted) < 1e-12
        error = F.T @ (F @ found.alpha) + shift * found.alpha - F.T @ Y
        assert found.residual == pytest.approx(
            np.linalg.norm(error) / np.linalg.norm(F.T @ Y), rel=0.1, abs=1e-14
        )
        assert (found.ridge, found.shift, found.status) == (ridge, pytest.approx(shift), Status.SOLVED)
        # A diagonal knows little of features that are not whitened: the probes' own noise is left.
        tolerance = {"gradients": 0.2, "falkon": 0.2, "diagonal": 0.6}.get(name, 1e-7)
        assert found.effective_dimension == pytest.approx(exact.effective_dimension, rel=tolerance)


def test_the_diagonal_knows_the_effective_dimension_of_nystrom_features() -> None:
    """Protects generalised cross-validation by Falkon on the features that it is for: what few probes of one that is
    not whitened leave open, they know of one that is, to a tenth."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 4))
    K = np.exp(-((X[:, None] - X[None, :60]) ** 2).sum(2) / 8)
    values, vectors = np.linalg.eigh(K[:60])
    phi = (K @ (vectors / np.sqrt(values + 1e-9))).astype(np.float32)
    operator = FeatureOperator(MemoryFeatures(phi, 8), np.arange(300))
    Y = targets(300)
    for found, ridge in zip(SOLVERS["diagonal"].solve(operator, RIDGES, Y), RIDGES, strict=True):
        exact = Dense.of(phi.astype(np.float64), Y, ridge * 300)
        assert found.effective_dimension == pytest.approx(exact.effective_dimension, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_is_leaving_out(shape: str) -> None:
    """Protects selection by leave-one-out: each sample predicted by weights that never saw it (R5)."""
    operator, Y = system(shape)
    F, n = phi_of(operator), operator.n
    for found, ridge in zip(PrimalEigen(loo=True).solve(operator, RIDGES, Y), RIDGES, strict=True):
        assert found.loo is not None
        for i in range(n):
            A, y = np.delete(F, i, axis=0), np.delete(Y, i, axis=0)
            w = np.linalg.solve(A.T @ A + n * ridge * np.eye(F.shape[1]), A.T @ y)
            np.testing.assert_allclose(found.loo[i], F[i] @ w, rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.floats(1e-6, 10.0), st.booleans())
def test_any_shape_and_rank(n: int, width: int, rank: int, ridge: float, absolute: bool) -> None:
    """Protects the edges: one sample, one feature, equal numbers, ranks of any size, absolute ridges."""
    F, Y = features(n, width, min(rank, n, width), "float64"), targets(n)
    operator = FeatureOperator(MemoryFeatures(F, 7), np.arange(n))
    (found,) = PrimalEigen(absolute=absolute, loo=True).solve(operator, (ridge,), Y)
    (factored,) = PrimalCholesky(absolute=absolute).solve(operator, (ridge,), Y)
    exact = Dense.of(F, Y, ridge if absolute else n * ridge)
    for one in (found, factored):
        assert one.fitted is not None
        assert relative(one.fitted, exact.fitted) < 1e-7
        assert one.effective_dimension == pytest.approx(exact.effective_dimension, rel=1e-6, abs=1e-9)
    if found.loo is not None:
        np.testing.assert_allclose(found.loo, exact.loo, rtol=1e-5, atol=1e-6)


def test_single_precision_sums_would_miss_the_identity() -> None:
    """Protects the choice of float64: summing the covariance in float32 errs by a hundred times what F7 allows."""
    F, n = features(400, 20), 400
    Y, shift = targets(n), n * 1e-4
    single = (F.T @ F).astype(np.float64)
    w = np.linalg.solve(single + shift * np.eye(20), F.T.astype(np.float64) @ Y)
    assert relative(F.astype(np.float64) @ w, Dense.of(F, Y, shift).fitted) > 1e-6
    (found,) = PrimalEigen().solve(FeatureOperator(MemoryFeatures(F, 64), np.arange(n)), (1e-4,), Y)
    assert found.fitted is not None
    assert relative(found.fitted, Dense.of(F, Y, shift).fitted) < 1e-8


def test_jitter_is_relative_to_the_mean_of_the_kernel() -> None:
    """Protects jitter's meaning, the same in the primal, the dual and by iterations: a share of the mean of K_ii."""
    for shape in ("tall", "wide"):
        operator, Y = system(shape)
        mean = float(np.square(phi_of(operator)).sum()) / operator.n
        exact = Dense.of(phi_of(operator), Y, operator.n * 1e-3 + 0.5 * mean)
        for solver in SOLVERS.values():
            (found,) = replace(solver, jitter=0.5).solve(operator, (1e-3,), Y)
            assert relative(found.alpha, exact.weights) < 1e-8
            assert found.jitter == pytest.approx(0.5 * mean)
            assert sum("jitter" in note for note in found.notes) == 1


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_leaving_out_a_sample_without_features_predicts_zero(shape: str) -> None:
    """Protects scores by leave-one-out from rounding, in the primal and in the dual."""
    n, width, _ = SHAPES[shape]
    F, zero = features(n, width, dtype="float64"), [2, n - 1]
    F[zero] = 0
    operator = FeatureOperator(MemoryFeatures(F, 8), np.arange(n))
    for found in PrimalEigen(loo=True).solve(operator, RIDGES, targets(n)):
        assert found.loo is not None
        assert not found.loo[zero].any()
        assert np.delete(found.loo, zero, axis=0).all()


def test_a_leave_one_out_residual_that_rounding_ate_is_not_given() -> None:
    """Protects selection from noise: a sample alone with its feature, at a ridge below rounding."""
    F = np.vstack([features(30, 4, dtype="float64"), np.zeros((1, 4))])
    F = np.hstack([F, np.eye(31)[:, 30:]])
    operator = FeatureOperator(MemoryFeatures(F, 8), np.arange(31))
    large, small = PrimalEigen(loo=True, absolute=True).solve(operator, (1e-2, 1e-14), targets(31))
    assert large.loo is not None
    assert small.loo is None
    assert "rounding leaves nothing" in small.notes[-1]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("n", [5, 40])
def test_features_that_are_all_zero_are_refused(solver: primal.PrimalSolver, n: int) -> None:
    """Protects from weights of nothing, in the primal and in the dual."""
    operator = FeatureOperator(MemoryFeatures(np.zeros((n, 20)), 8), np.arange(n))
    with pytest.raises(DataError, match=f"each of the {n} training samples is zero"):
        solver.solve(operator, RIDGES, targets(n))


def test_targets_of_zero_and_of_one_column() -> None:
    operator, Y = system("tall")
    (zero,) = PrimalEigen().solve(operator, (1e-2,), np.zeros(operator.n))
    assert (zero.residual, np.abs(zero.alpha).max()) == (0.0, 0.0)
    (one,) = PrimalEigen().solve(operator, (1e-2,), Y[:, 0])
    np.testing.assert_allclose(one.alpha[:, 0], PrimalEigen().solve(operator, (1e-2,), Y)[0].alpha[:, 0])


def test_progress_names_the_ridge() -> None:
    """Protects whoever waits: the ridge as it was given, and not what it adds to the diagonal."""
    operator, Y = system("tall")
    said: list[str] = []
    EXACT.solve(operator, (1e-3,), Y, lambda done, total, message: said.append(message))
    assert any("ridge 0.001" in message for message in said)


def test_iterations_that_do_not_suffice_are_said() -> None:
    """Protects honesty: the residual is measured, and the status is not that of a solved ridge."""
    operator, Y = system("tall")
    (found,) = PrimalGradients(tolerance=1e-12, max_iterations=1, rank_bytes=1).solve(operator, (1e-6,), Y)
    assert found.status == Status.NOT_CONVERGED
    F = phi_of(operator)
    error = F.T @ (F @ found.alpha) + found.shift * found.alpha - F.T @ Y
    assert found.residual == pytest.approx(np.linalg.norm(error) / np.linalg.norm(F.T @ Y))
    assert any("raise solve.max_iterations" in note for note in found.notes)


def test_bad_input_is_refused() -> None:
    operator, Y = system("tall")
    with pytest.raises(DataError, match="at least one row"):
        FeatureOperator(operator.source, [])
    with pytest.raises(DataError, match="strictly increasing"):
        FeatureOperator(operator.source, [3, 2])
    for solver in SOLVERS.values():
        with pytest.raises(DataError, match="training samples need targets"):
            solver.solve(operator, RIDGES, Y[1:])
        with pytest.raises(ExperimentError, match="greater than zero"):
            solver.solve(operator, (0.0,), Y)
    with pytest.raises(ExperimentError, match="no leave-one-out on features"):
        PrimalCholesky(loo=True)
    huge = FeatureOperator(MemoryFeatures(np.full((9, 2), 1e200), 4), np.arange(9))
    with pytest.raises(NumericalError, match="feature 0: its square"), np.errstate(over="ignore"):
        PrimalEigen().solve(huge, (1.0,), np.ones(9))


def test_two_passes_serve_the_whole_path() -> None:
    """Protects features that are computed as they are read: covariance once; residuals, leave-one-out and training
    predictions of all ridges once."""
    operator, Y = system("tall")
    PrimalEigen(loo=True).solve(operator, RIDGES, Y)
    assert isinstance(operator.source, MemoryFeatures)
    assert set(operator.source.reads.values()) == {2}


def test_any_number_of_systems_shares_a_pass() -> None:
    """Protects iterations of many ridges and classes from reading the features more than once each."""
    operator, _ = system("tall")
    assert isinstance(operator.source, MemoryFeatures)
    V = np.ones((operator.width, MULTIPLIED_COLUMNS + 100))
    products_alone, reads = primal.Covariance(operator, np.ones(operator.width)), operator.source.reads
    one = products_alone.matmul(V[:, :1])
    before = dict(reads)
    product = products_alone.matmul(V)
    assert dict(reads) == {block: 2 * count for block, count in before.items()}
    np.testing.assert_allclose(product[:, :1], one, rtol=1e-12)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


def at_site(
    folder: Path, workers: tasks.Workers, solver: primal.PrimalSolver, shape: str = "tall", **given: Any
) -> tuple[Solution, ...]:
    operator, Y = system(shape)
    with Site(folder, lambda: workers, 2**30) as site:
        there = FeatureOperator(operator.source, operator.rows, site)
        return solver.solve(there, RIDGES, Y, **given)


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize(
    "solver", [PrimalEigen(loo=True), *list(SOLVERS.values())[1:4]], ids=list(SOLVERS)[:4]
)
def test_the_same_bits_on_any_number_of_workers(
    client: Any, tmp_path: Path, solver: primal.PrimalSolver, shape: str
) -> None:
    """Protects reproducibility: without a site, on 1, 2 and 4 workers."""
    operator, Y = system(shape)
    here = solver.solve(operator, RIDGES, Y)
    for count in (1, 2, 4):
        found = at_site(tmp_path / str(count), tasks.Workers(client, count), solver, shape)
        same(found, here)
        for one, other in zip(found, here, strict=True):
            np.testing.assert_array_equal(one.fitted, other.fitted)
            np.testing.assert_array_equal(one.loo, other.loo)


@pytest.mark.parametrize(
    "solver",
    [replace(EXACT, rank_bytes=1), *list(ITERATED.values())[1:]],
    ids=ITERATED,
)
def test_iterations_that_were_interrupted_go_on(
    tmp_path: Path, solver: primal.PrimalSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects long iterations: the same bits as without the interruption, and no sum is taken again."""
    solver = replace(solver, checkpoint_seconds=0.0)
    whole = at_site(tmp_path / "whole", tasks.Workers(), solver)
    done: list[int] = []

    def told(iteration: int, limit: int, message: str) -> None:
        done.append(iteration)
        if iteration == 4:
            raise Stop

    with pytest.raises(Stop):
        at_site(tmp_path / "a", tasks.Workers(), solver, progress=told)
    monkeypatch.delattr(covariance, "_strip")
    again: list[int] = []
    found = at_site(
        tmp_path / "a", tasks.Workers(), solver, progress=lambda k, limit, message: again.append(k)
    )
    same(found, whole)
    assert again[0] >= 4


def landmark_features(n: int, landmarks: int) -> tuple[np.ndarray, np.ndarray]:
    """Nystrom features (n, landmarks) of normal samples, and those of the landmarks themselves."""
    X = np.random.default_rng(5).standard_normal((n, 8))
    made = NystromFeatures(DotProduct("exponential", sigma=1.0), landmarks, epsilon=0.0).learn(InMemory(X))
    assert made.arrays is not None
    return made.features(X), made.features(made.arrays[LANDMARKS])


def test_nystrom_features_have_a_diagonal_product_at_their_landmarks() -> None:
    """Protects the diagonal preconditioner: it is Falkon's, (n/M) Phi_M^T Phi_M, in these coordinates."""
    _, at_landmarks = landmark_features(400, 40)
    product = at_landmarks.T @ at_landmarks
    assert np.abs(product - np.diag(np.diag(product))).max() < 1e-8 * product.max()


@pytest.mark.parametrize("whitened", [False, True])
def test_falkon_takes_few_iterations_at_any_ridge(whitened: bool) -> None:
    """Protects what falkon is for: ridges far below most eigenvalues, where a sketch of few columns helps little."""
    F, _ = landmark_features(2000, 200)
    operator, Y = FeatureOperator(MemoryFeatures(F, 64), np.arange(2000)), targets(2000)
    few = PrimalFalkon(whitened=whitened).solve(operator, (1e-3, 1e-6, 1e-9), Y)
    many = PrimalGradients(rank_bytes=1).solve(operator, (1e-3, 1e-6, 1e-9), Y)
    assert max(one.iterations for one in few) < 50
    assert max(one.iterations for one in many) > 100
    assert all(one.status is Status.SOLVED for one in few)
    assert "Falkon's preconditioner" in few[0].notes[0]


def test_fewer_samples_than_features_still_have_a_preconditioner() -> None:
    """Protects ridges below rounding: the product of a few samples is singular, and is factored nevertheless."""
    operator, Y = system("wide")
    (found,) = PrimalFalkon(absolute=True).solve(operator, (1e-14,), Y)
    assert found.fitted is not None
    assert relative(found.fitted, Y) < 1e-4


SPEED = Speed(entries=2e8, operations=1e11, worker=5e10, worker_single=1e11, read=1e9)
MEANS = Means(workers=2, driver_bytes=20 * 2**30, worker_bytes=8 * 2**30, disk_free=10**12, speed=SPEED)


def problem(n: int, **changes: Any) -> Problem:
    return replace(Problem(n, 10, 8, side=1024), **changes)


def test_what_fits_is_decomposed() -> None:
    """Protects the usual case: tens of thousands of samples, thousands of features, a path of ridges."""
    choice = choose_primal("auto", problem(50_000), 4096, MEANS)
    assert (choice.method, choice.problem) == ("cholesky", "")
    assert "conjugate-gradient about" in choice.reason
    assert choose_primal("auto", problem(50_000, ridges=40), 4096, MEANS).method == "eigen"
    assert choose_primal("auto", problem(50_000, loo=True), 4096, MEANS).method == "eigen"
    assert choose_primal("cholesky", problem(50_000, loo=True), 4096, MEANS).problem
    few = choose_primal("auto", problem(2_000), 36_864, MEANS)
    assert few.method == "cholesky"
    assert "in the dual, 2,000 samples being fewer than 36,864 features" in few.reason
    held = 8 * 2_000 * 36_864
    assert held < few.estimate.driver_bytes < held + 2**30, (
        "features are held, and no matrix of width x width"
    )
    assert few.estimate.disk_bytes < 2**31


def test_features_too_wide_for_memory_are_iterated_with() -> None:
    choice = choose_primal("auto", problem(200_000), 100_000, MEANS)
    assert choice.method == "conjugate-gradient"
    assert "eigen about" in choice.reason
    assert "of memory" in choice.reason
    assert choice.estimate.rank_bytes > 0
    refused = choose_primal("eigen", problem(200_000), 100_000, MEANS)
    assert refused.problem.endswith('use solve.method = "conjugate-gradient"')
    nothing = choose_primal("auto", problem(200_000, loo=True), 100_000, MEANS)
    assert nothing.problem.endswith("use fewer features, or a machine with more")


def test_falkon_is_taken_for_few_ridges_of_wide_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects "auto": iterations that are few at any ridge are cheaper than sums of width^2 for each sample."""
    monkeypatch.setattr(feature_products, "STRIP", 4096)
    one = problem(500_000, ridges=1)
    cached = replace(MEANS, speed=replace(SPEED, read=2e9))
    sampled = choose_primal("auto", one, 16_384, cached)
    assert (sampled.method, sampled.estimate.whitened) == ("falkon", False)
    assert sampled.estimate.driver_bytes > 2 * 16_384**2 * 8
    whitened = choose_primal("auto", replace(one, whitened=True), 16_384, cached)
    assert (whitened.method, whitened.estimate.whitened) == ("falkon", True)
    assert whitened.estimate.driver_bytes < 16_384**2 * 8, "there is no matrix of width x width"
    assert choose_primal("auto", replace(one, whitened=True, loo=True), 4096, MEANS).method == "eigen"
    assert choose_primal("auto", replace(one, ridges=10), 16_384, cached).method == "cholesky"
    assert choose_primal("auto", replace(one, n=200_000, whitened=True), 100_000, MEANS).method == "falkon"


def test_falkon_leaves_of_the_memory_what_a_factor_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the driver: a factor for each ridge may not fill its memory to the brim where another way is at hand."""
    monkeypatch.setattr(feature_products, "STRIP", 4096)
    many, cached = problem(2_000_000, ridges=3), replace(MEANS, speed=replace(SPEED, read=2e9))
    taken = choose_primal("auto", many, 16_384, cached)
    assert taken.method == "falkon"
    tight = replace(cached, driver_bytes=int(taken.estimate.driver_bytes / 0.95))
    assert choose_primal("auto", many, 16_384, tight).method == "cholesky"
    assert not choose_primal("falkon", many, 16_384, tight).problem


def test_the_preconditioner_rests_on_nothing_that_is_timed() -> None:
    """Protects "same file, same bits", also where features are computed as they are read."""
    fast, slow = (
        choose_primal("conjugate-gradient", problem(50_000), 4096, means).estimate
        for means in (MEANS, replace(MEANS, workers=9, speed=Speed(1e3, 1e9, 1e9, 1e9, 1e6)))
    )
    assert [getattr(fast, key) for key in PRECONDITIONING] == [getattr(slow, key) for key in PRECONDITIONING]


def test_the_rank_keeps_still_while_free_memory_varies_a_little() -> None:
    """Protects "same file, same bits" where memory is the limit: the rank goes by powers of two, and says what limits
    it; where it is the width, more memory is of no use."""

    def given(width: int, gib: float) -> list[Any]:
        means = replace(MEANS, driver_bytes=int(gib * 2**30))
        estimate = choose_primal("conjugate-gradient", problem(50_000), width, means).estimate
        return [getattr(estimate, key) for key in PRECONDITIONING]

    wide = 400_000
    assert given(wide, 2.4) == given(wide, 2.5) == given(wide, 2.55)
    assert given(wide, 2.5) == [preconditioner_bytes(wide, 128, "float32"), True, *given(wide, 64)[2:]]
    assert given(wide, 64)[:2] == [preconditioner_bytes(wide, 1024, "float32"), False]
    assert given(300, 64)[:2] == [preconditioner_bytes(300, 128, "float32"), False]


def test_what_is_asked_for_is_taken() -> None:
    choice = choose_primal("conjugate-gradient", problem(50_000), 4096, MEANS)
    assert (choice.method, choice.reason) == ("conjugate-gradient", "conjugate-gradient: asked for")


def test_estimates_grow_with_what_is_asked() -> None:
    """Protects plans: more samples, features, ridges, leave-one-out, refits or missing features never take less."""
    for method in ("cholesky", "eigen", "conjugate-gradient", "falkon"):
        base = choose_primal(method, problem(50_000), 4096, MEANS).estimate
        for changed in (
            choose_primal(method, problem(60_000), 4096, MEANS),
            choose_primal(method, problem(50_000), 5000, MEANS),
            choose_primal(method, problem(50_000, ridges=12), 4096, MEANS),
            choose_primal(method, problem(50_000, refit=True), 4096, MEANS),
            choose_primal(method, problem(50_000, predicted=10**9), 4096, MEANS),
            choose_primal(method, problem(50_000, missing_entries=10**10), 4096, MEANS),
        ):
            assert changed.estimate.total_seconds > base.total_seconds
    loo = choose_primal("eigen", problem(50_000, loo=True), 4096, MEANS).estimate
    assert loo.seconds > choose_primal("eigen", problem(50_000), 4096, MEANS).estimate.seconds


def test_a_choice_builds_its_solver() -> None:
    """Protects the options of [solve]."""
    table = Solve(ridges=(1e-3,), jitter=0.1, tolerance=1e-4)
    chosen = choose_primal("conjugate-gradient", problem(50_000), 4096, MEANS)
    solver = build_primal(table, chosen, seed=7, loo=False)
    assert solver == PrimalGradients(
        tolerance=1e-4,
        seed=7,
        jitter=0.1,
        rank_bytes=chosen.estimate.rank_bytes,
        memory_bound=chosen.estimate.memory_bound,
        pass_columns=chosen.estimate.pass_columns,
    )
    chosen = choose_primal("falkon", problem(50_000, whitened=True), 4096, MEANS)
    falkon = build_primal(table, chosen, seed=7, loo=False)
    assert falkon == PrimalFalkon(tolerance=1e-4, seed=7, jitter=0.1, whitened=True)
    eigen = build_primal(table, choose_primal("eigen", problem(50_000), 4096, MEANS), seed=7, loo=True)
    assert eigen == PrimalEigen(jitter=0.1, loo=True)
    factor = build_primal(table, choose_primal("cholesky", problem(50_000), 4096, MEANS), seed=7, loo=False)
    assert factor == PrimalCholesky(jitter=0.1)


def test_a_matrix_that_rounding_made_indefinite_is_solved_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the smallest ridges: where Cholesky fails by rounding another factor solves, and a note says so."""
    operator, Y = system("tall")
    monkeypatch.setattr("pipelines.solvers.cholesky.factor_in_place", lambda matrix: 1)
    (found,) = PrimalCholesky().solve(operator, (1e-2,), Y)
    assert found.status == Status.INDEFINITE
    assert any("symmetric indefinite" in note for note in found.notes)
    exact = Dense.of(phi_of(operator), Y, operator.n * 1e-2)
    assert relative(found.alpha, exact.weights) < 1e-8


def test_a_factor_is_planned_with_the_memory_of_its_sums() -> None:
    """Protects the driver: the sum and what a strip adds to it are there at once, before there is one matrix."""
    choice = choose_primal("cholesky", problem(50_000), 4096, MEANS)
    assert choice.estimate.driver_bytes >= 2 * 4096**2 * 8
