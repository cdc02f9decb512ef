"""Phi^T Phi, Phi^T Y and Phi Phi^T over index sets, against dense products; the same bits however they are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_systems import MemoryFeatures, features
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import Stop, targets

from pipelines import tasks
from pipelines.errors import NumericalError
from pipelines.explicit import covariance, feature_products, feature_strips
from pipelines.explicit.covariance import Moments, inner_products, moments
from pipelines.explicit.feature_products import Asked, Found, predict, stream
from pipelines.site import Site


@st.composite
def masked(draw: st.DrawFn) -> tuple[MemoryFeatures, np.ndarray]:
    """Features in blocks with a ragged end, and an index set with gaps, from a single row to all."""
    n, width, side = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    rows = np.array(sorted(draw(st.sets(st.integers(0, n - 1), min_size=1))), np.int64)
    return MemoryFeatures(features(n, width, dtype=draw(st.sampled_from(["float32", "float64"]))), side), rows


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips of a few dozen samples, several panels of a block, several pieces of a small matrix."""
    for name, size in (("STRIP", 16), ("COLUMNS", 5), ("UNSAVED", 2)):
        monkeypatch.setattr(covariance, name, size)
    monkeypatch.setattr(feature_products, "STRIP", 8)
    monkeypatch.setattr(feature_strips, "PANEL", 3)


def dense(source: MemoryFeatures, rows: np.ndarray) -> np.ndarray:
    return source.phi[rows].astype(np.float64)


@settings(deadline=None, max_examples=60)
@given(masked())
def test_moments_equal_dense_products(case: tuple[MemoryFeatures, np.ndarray]) -> None:
    """Protects the sums: each sample once, whatever the gaps, the ragged ends, the cuts; each block read once."""
    source, rows = case
    Y = targets(len(rows))
    found = moments(source, rows, Y)
    F = dense(source, rows)
    np.testing.assert_allclose(np.triu(found.covariance), np.triu(F.T @ F), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(found.products, F.T @ Y, rtol=1e-12, atol=1e-14)
    assert source.reads == dict.fromkeys(np.unique(rows // source.side).tolist(), 1)


@settings(deadline=None, max_examples=40)
@given(masked(), st.sampled_from([1, 400, 10**9]))
def test_inner_products_equal_dense_ones(case: tuple[MemoryFeatures, np.ndarray], held: int) -> None:
    """Protects the dual: every pair of blocks, also where few fit the memory; each read once where all fit."""
    source, rows = case
    F = dense(source, rows)
    K = inner_products(source, rows, held)
    np.testing.assert_allclose(np.triu(K), np.triu(F @ F.T), rtol=1e-13, atol=1e-14)
    if held == 10**9:
        assert set(source.reads.values()) == {1}


@settings(deadline=None, max_examples=40)
@given(masked())
def test_one_pass_gives_all_that_is_asked(case: tuple[MemoryFeatures, np.ndarray]) -> None:
    """Protects residuals, predictions and leverages, each against its definition."""
    source, rows = case
    F, Y, width = dense(source, rows), targets(len(rows)), source.shape[1]
    rng = np.random.default_rng(1)
    W, U, weights = (rng.standard_normal((width, k)) for k in (4, width, 2))
    found = stream(source, rows, Asked(W, Y, U, weights))
    np.testing.assert_allclose(found.values, F @ W, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.normal, F.T @ (F @ W), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.seen, F.T @ Y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.squares, np.diag(F.T @ F), rtol=1e-12)
    np.testing.assert_allclose(found.leverages, (F @ U) ** 2 @ weights, rtol=1e-10, atol=1e-12)
    assert set(source.reads.values()) == {1}
    stack = rng.standard_normal((3, width, 2))
    scores = predict(source, rows, stack)
    np.testing.assert_allclose(scores, F @ stack, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(predict(source, rows, stack[1]), scores[1], rtol=1e-13, atol=1e-13)


def test_single_precision_is_summed_in_double() -> None:
    """Protects the sums of many samples, which single precision loses: exact to the rounding of float64."""
    phi = np.full((30_000, 1), np.float32(0.1))
    found = moments(MemoryFeatures(phi, 1000), np.arange(30_000), np.ones((30_000, 1)))
    exact = 30_000 * float(np.float32(0.1)) ** 2
    assert found.covariance[0, 0] == pytest.approx(exact, rel=1e-13)


def test_what_is_not_finite_is_named() -> None:
    """Protects LAPACK from values that it never returns from."""
    phi = features(20, 4)
    phi[3, 2] = np.inf
    source, rows = MemoryFeatures(phi, 8), np.arange(20)
    with (
        pytest.raises(NumericalError, match=r"feature 2: .* not finite .*1 such"),
        np.errstate(invalid="ignore"),
    ):
        moments(source, rows, targets(20))
    with pytest.raises(NumericalError, match=r"sample 3: .* not finite"), np.errstate(invalid="ignore"):
        inner_products(source, rows)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


N, WIDTH = 150, 11
ROWS = np.setdiff1d(np.arange(N), [0, 17, 60, 61, 62])


def at_site(folder: Path, workers: tasks.Workers, source: Any = None, **given: Any) -> Moments:
    source = source or MemoryFeatures(features(N, WIDTH), 8)
    with Site(folder, lambda: workers, 2**30) as site:
        return moments(source, ROWS, targets(len(ROWS)), site, **given)


def same(found: Moments, expected: Moments) -> None:
    np.testing.assert_array_equal(np.triu(found.covariance), np.triu(expected.covariance))
    np.testing.assert_array_equal(found.products, expected.products)


def test_the_same_bits_on_any_number_of_workers(client: Any, tmp_path: Path) -> None:
    """Protects reproducibility: without a site, in this process, on 1, 2 and 4 workers; and a bounded disk."""
    source = MemoryFeatures(features(N, WIDTH), 8)
    expected = moments(source, ROWS, targets(len(ROWS)))
    asked = Asked(np.ones((WIDTH, 2)), targets(len(ROWS)), np.eye(WIDTH), np.ones((WIDTH, 1)))
    streamed = stream(source, ROWS, asked)
    for name, workers in {
        "here": tasks.Workers(),
        **{str(k): tasks.Workers(client, k) for k in (1, 2, 4)},
    }.items():
        same(at_site(tmp_path / name, workers), expected)
        (kept,) = (tmp_path / name).glob("moments-*")
        assert [path.name for path in kept.iterdir()] == ["sum-12.npz"], (
            "strips are gone once they are summed"
        )
        with Site(tmp_path / name, lambda opened=workers: opened, 2**30) as site:
            found: Found = stream(source, ROWS, asked, site)
        for one, other in zip(found.arrays, streamed.arrays, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_sum_that_was_interrupted_goes_on(stop: int, tmp_path: Path) -> None:
    """Protects hours of summing: the same bits, and no block read again but those of the strip in flight."""
    expected = at_site(tmp_path / "whole", tasks.Workers())

    def told(done: int, total: int) -> None:
        if done == stop:
            raise Stop

    source = MemoryFeatures(features(N, WIDTH), 8)
    with pytest.raises(Stop):
        at_site(tmp_path / "a", tasks.Workers(), source, progress=told)
    before = set(source.reads)
    source.reads.clear()
    same(at_site(tmp_path / "a", tasks.Workers(), source), expected)
    assert not before & set(source.reads)
    source.reads.clear()
    same(at_site(tmp_path / "a", tasks.Workers(), source), expected)
    assert not source.reads, "what was summed is not summed again"


def test_a_damaged_strip_and_a_damaged_sum_are_made_again(tmp_path: Path) -> None:
    """Protects the sum from a disk that lost what was written: damage is noticed, and costs time alone."""
    expected = at_site(tmp_path / "whole", tasks.Workers())

    def told(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        at_site(tmp_path / "a", tasks.Workers(), progress=told)
    (folder,) = (tmp_path / "a").glob("moments-*")
    assert {path.name for path in folder.iterdir()} == {"sum-2.npz", "strip-2.npz"}
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    same(at_site(tmp_path / "a", tasks.Workers()), expected)


def test_other_targets_or_rows_are_not_taken_for_these(tmp_path: Path) -> None:
    """Protects a folder that two solves share."""
    at_site(tmp_path / "a", tasks.Workers())
    source = MemoryFeatures(features(N, WIDTH), 8)
    with Site(tmp_path / "a", tasks.Workers, 2**30) as site:
        found = moments(source, ROWS, 2 * targets(len(ROWS)), site)
        fewer = moments(source, ROWS[1:], targets(len(ROWS))[1:], site)
    same(found, moments(source, ROWS, 2 * targets(len(ROWS))))
    same(fewer, moments(source, ROWS[1:], targets(len(ROWS))[1:]))
