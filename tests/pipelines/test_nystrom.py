"""Nystrom regression on centres (R7) against its normal equations solved directly, and against R3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import CountingTiles, DenseTiles, Stop, direct, gaussian, relative, same, targets

from cluster.local import open_cluster
from cluster.profiles import Profile
from pipelines import products, tasks
from pipelines.errors import DataError, ExperimentError
from pipelines.normal import normal_product, transposed_product
from pipelines.operators import GramOperator, predict
from pipelines.site import Site
from pipelines.solvers.base import Solution, Status
from pipelines.solvers.nystrom import Nystrom, NystromState


def solved(
    K: np.ndarray, rows: np.ndarray, ridges: list[float], Y: np.ndarray, solver: Nystrom, side: int = 32
) -> tuple[NystromState, tuple[Solution, ...]]:
    state = solver.factor(GramOperator(DenseTiles(K, side), rows), ridges)
    return state, solver.solve(state, Y)


def normal_equations(
    K: np.ndarray, rows: np.ndarray, centres: np.ndarray, shift: float, Y: np.ndarray
) -> np.ndarray:
    """Coefficients by a direct solution of R7's normal equations, in an orthonormal basis of K_MM's range."""
    K = K.astype(np.float64)
    tall, square = K[np.ix_(rows, centres)], K[np.ix_(centres, centres)]
    values, vectors = np.linalg.eigh(square)
    # alpha = W c with W^T K_MM W = I: a ridge regression on features
    W = vectors / np.sqrt(values)
    features = tall @ W
    return W @ np.linalg.solve(features.T @ features + shift * np.eye(len(centres)), features.T @ Y)


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(2, 120),
    M=st.integers(1, 40),
    side=st.integers(5, 60),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 3),
)
def test_equals_the_direct_solution_of_the_normal_equations(
    n: int, M: int, side: int, dtype: str, seed: int
) -> None:
    """R7: direct and iterated solutions agree to 1e-6, on any rows of a store, at all ridges of a path."""
    K = gaussian(n, seed, scale=4.0, dtype=dtype)
    rows = np.flatnonzero(np.random.default_rng(seed).random(n) < 0.8)
    rows = rows if rows.size else np.array([0])
    Y = targets(len(rows), 2)
    state, found = solved(K, rows, [1e-2, 1e-4], Y, Nystrom(centres=M, tolerance=1e-9, seed=seed), side)
    assert len(state.centres) == min(M, len(rows))
    assert np.isin(state.centres, rows).all()
    for one in found:
        assert one.status is Status.SOLVED
        expected = normal_equations(K, rows, state.centres, one.shift, Y)
        tall = K[np.ix_(rows, state.centres)].astype(np.float64)
        assert relative(tall @ one.alpha, tall @ expected) < 1e-6
        if dtype == "float64":
            assert relative(one.alpha, expected) < 1e-6


def test_all_samples_as_centres_give_kernel_ridge_regression() -> None:
    """R7: M = n gives R3."""
    n = 150
    K, Y = gaussian(n, scale=4.0), targets(n)
    state, found = solved(K, np.arange(n), [1e-2, 1e-4, 1e-6], Y, Nystrom(centres=n + 7))
    np.testing.assert_array_equal(state.centres, np.arange(n))
    values = np.linalg.eigvalsh(K)
    for one in found:
        expected = direct(K, one.shift, Y)
        assert relative(one.alpha, expected) < 1e-6
        assert relative(K @ one.alpha, K @ expected) < 1e-6
        exact = (values / (values + one.shift)).sum()
        assert one.effective_dimension == pytest.approx(exact, rel=1e-3)


def test_predictions_are_made_at_the_centres() -> None:
    n, rows, unseen = 200, np.arange(150), np.arange(150, 200)
    K = gaussian(n, scale=4.0)
    state, (one,) = solved(K, rows, [1e-3], targets(150), Nystrom(centres=40))
    scores = predict(DenseTiles(K, 32), unseen, state.centres, one.alpha)
    np.testing.assert_allclose(scores, K[np.ix_(unseen, state.centres)] @ one.alpha, rtol=1e-10)


def test_the_effective_dimension_is_that_of_the_approximation() -> None:
    """R9, for K_nM K_MM^-1 K_Mn."""
    n = 400
    K = gaussian(n)
    state, found = solved(K, np.arange(n), [1e-2, 1e-4], targets(n), Nystrom(centres=80))
    tall = K[:, state.centres]
    values = np.linalg.eigvalsh(tall @ np.linalg.solve(K[np.ix_(state.centres, state.centres)], tall.T)).clip(
        0
    )
    for one in found:
        exact = (values / (values + one.shift)).sum()
        assert one.effective_dimension == pytest.approx(exact, rel=0.1)


def test_the_preconditioner_saves_iterations() -> None:
    """Protects R7's B: with the factor of K_MM alone in it, the same equations take many times the iterations."""
    n = 400
    K, Y = gaussian(n), targets(n)
    state, (with_it,) = solved(K, np.arange(n), [1e-5], Y, Nystrom(centres=200))
    half = replace(state, A=(np.eye(200),))
    (without,) = Nystrom(centres=200, max_iterations=2 * with_it.iterations).solve(half, Y)
    assert with_it.status is Status.SOLVED
    assert without.status is Status.NOT_CONVERGED


def test_duplicate_samples_among_the_centres_do_no_harm() -> None:
    """Protects a singular K_MM: neither what the preconditioner adds to its diagonal, nor leaving out what is there
    twice, changes a prediction."""
    K = np.tile(gaussian(30, scale=4.0), (2, 2))
    Y = targets(60)
    state, (one,) = solved(K, np.arange(60), [1e-3], Y, Nystrom(centres=60, tolerance=1e-8))
    assert one.status is Status.SOLVED
    assert relative(K[:, state.centres] @ one.alpha, K @ direct(K, one.shift, Y)) < 1e-6


def zeros() -> np.ndarray:
    """Every fifth sample is zero to the kernel."""
    seen = np.arange(120) % 5 > 0
    return gaussian(120, scale=4.0) * np.outer(seen, seen)


def equals() -> np.ndarray:
    return np.tile(gaussian(30, scale=4.0), (4, 4))


def low_rank() -> np.ndarray:
    X = np.random.default_rng(0).standard_normal((120, 6))
    return X @ X.T


@pytest.mark.parametrize("make", [zeros, equals, low_rank])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_singular_matrix_among_the_centres_is_solved(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], np.ndarray], dtype: str
) -> None:
    """Protects fewer centres than samples, of samples zero or equal or of a kernel of low rank: R7's equations hold,
    and the effective dimension, with a probe for each centre, is that of a dense computation."""
    K, M = make().astype(dtype).astype(np.float64), 40
    monkeypatch.setattr("pipelines.solvers.iterated.PROBES", M)
    monkeypatch.setattr("pipelines.solvers.nystrom.PROBES", M)
    monkeypatch.setattr(Nystrom, "signs", lambda self, n: np.sqrt(M) * np.eye(M)[:, :n])
    Y = targets(len(K), 2)
    state, found = solved(K.astype(dtype), np.arange(len(K)), [1.0, 1e-2, 1e-4], Y, Nystrom(centres=M))
    tall, square = K[:, state.centres], K[np.ix_(state.centres, state.centres)]
    values, vectors = np.linalg.eigh(square)
    held = values > 10 * np.finfo(dtype).eps * M * values.max()
    assert held.sum() < M
    features = tall @ (vectors[:, held] / np.sqrt(values[held]))
    for one in found:
        assert one.status is Status.SOLVED
        system = features.T @ features
        weights = np.linalg.solve(
            system + one.shift * np.eye(len(system)), features.T @ np.hstack([Y, features])
        )
        accuracy = 1e-5 if dtype == "float64" else 1e-3
        assert relative(tall @ one.alpha, features @ weights[:, :2]) < accuracy
        assert one.effective_dimension == pytest.approx(np.trace(weights[:, 2:]), rel=accuracy)


@pytest.mark.parametrize("make", [equals, low_rank])
def test_centres_that_others_stand_for_are_left_out(make: Callable[[], np.ndarray]) -> None:
    """Protects small ridges where K_MM is singular in float64: with all centres, what rounding makes of products along
    what the stabiliser holds up is more than such a ridge bears, and no number of iterations solves."""
    K, rank = make(), {equals: 30, low_rank: 6}[make]
    Y = K @ targets(len(K), 2)  # what a small ridge can learn
    state, found = solved(K, np.arange(len(K)), [1e-4, 1e-8, 1e-10], Y, Nystrom(centres=80))
    assert len(state.centres) == rank
    assert (np.diff(state.centres) > 0).all()
    for one in found:
        assert one.status is Status.SOLVED
        assert one.iterations <= 3 * rank
        assert one.alpha.shape == (rank, 2)
        assert relative(K[:, state.centres] @ one.alpha, K @ direct(K, one.shift, Y)) < 1e-5
        assert f"80 centres of 120 samples, of which {rank} stand for all; " in one.notes[-1]
    _, (plain,) = solved(gaussian(60), np.arange(60), [1e-4], targets(60), Nystrom(centres=20))
    assert "Nystrom with 20 centres of 60 samples; " in plain.notes[-1]


def test_bad_input_is_refused() -> None:
    K = gaussian(20)
    with pytest.raises(ExperimentError, match="greater than zero"):
        solved(K, np.arange(20), [0.0], targets(20), Nystrom())
    with pytest.raises(DataError, match="not finite"):
        solved(K, np.arange(20), [1.0], np.full(20, np.nan), Nystrom())
    with pytest.raises(ExperimentError, match=r"solve\.centres"):
        Nystrom(centres=0)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    side=st.integers(1, 12),
    symmetric=st.booleans(),
    data=st.data(),
)
def test_products_with_the_transposed(
    n: int, m: int, side: int, symmetric: bool, data: st.DataObject
) -> None:
    """Protects K^T (K V) and K^T U: the dense products, of symmetric and rectangular stores, ragged and masked."""
    m = n if symmetric else m
    K = np.random.default_rng(n).standard_normal((n, m))
    K = K + K.T if symmetric else K
    rows, columns = (
        np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))), np.int64)
        for size in (n, m)
    )
    block = K[np.ix_(rows, columns)]
    V, U = np.ones((len(columns), 2)), np.arange(2.0 * len(rows)).reshape(-1, 2)
    source = CountingTiles(K, side, symmetric)
    np.testing.assert_allclose(
        normal_product(source, rows, columns, V), block.T @ (block @ V), rtol=1e-11, atol=1e-11
    )
    assert symmetric or max(source.reads.values()) == 1, "each tile is read once for both products"
    np.testing.assert_allclose(
        transposed_product(source, rows, columns, U), block.T @ U, rtol=1e-11, atol=1e-11
    )


def at_site(folder: Path, workers: tasks.Workers, progress: Any = None) -> tuple[Solution, ...]:
    K = gaussian(120)
    solver = Nystrom(centres=50, checkpoint_seconds=0.0)
    with Site(folder, lambda: workers, 2**30) as site:
        operator = GramOperator(DenseTiles(K, 16), np.arange(120), site)
        state = solver.factor(operator, [1e-1, 1e-5])
        return solver.solve(state, targets(120), progress or (lambda *_: None))


def test_the_same_bits_on_any_number_of_workers(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SQUARE", 32)
    here = at_site(tmp_path / "0", tasks.Workers())
    for count in (1, 4):
        same(at_site(tmp_path / str(count), tasks.Workers(client, count)), here)


@pytest.mark.slow
def test_processes_of_their_own_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects reproducibility where workers share nothing with the driver, as they do in a cluster in one process."""
    monkeypatch.setattr(products, "SQUARE", 32)
    here = at_site(tmp_path / "0", tasks.Workers())
    with open_cluster(Profile(workers=2)) as client:
        there = at_site(tmp_path / "2", tasks.Workers(client, 2))
    same(there, here)


def test_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Protects restarts: after an interruption the iteration goes on where it was."""
    whole = at_site(tmp_path / "whole", tasks.Workers())

    def strike(done: int, total: int, message: str) -> None:
        if done >= 8:
            raise Stop

    with pytest.raises(Stop):
        at_site(tmp_path / "cut", tasks.Workers(), strike)
    seen: list[int] = []
    same(at_site(tmp_path / "cut", tasks.Workers(), lambda done, *_: seen.append(done)), whole)
    assert seen[0] == 9
