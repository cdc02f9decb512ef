"""Cholesky in tiles on disk: the answers of SciPy, the same bits on any number of workers, nothing solved through."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import gaussian

from cluster.local import open_cluster
from cluster.profiles import Profile
from pipelines import tasks
from pipelines.errors import ChunkLost, DataError, ExperimentError, NumericalError
from pipelines.evaluate import encode, evaluate
from pipelines.operators import GramOperator
from pipelines.site import Site
from pipelines.solvers import tile_arithmetic, tiled_cholesky, tiled_factor
from pipelines.solvers.base import Solution, Status
from pipelines.solvers.checkpoints import EARLIER
from pipelines.solvers.factor_order import FactorOrder, Step
from pipelines.solvers.precision import DOUBLE, SINGLE
from pipelines.solvers.substitution import BlockOrder, substitute
from pipelines.solvers.tiled_cholesky import TiledCholesky
from pipelines.stores import Axis, FactorStore, GramStore

MEMORY = 2**30


def points(n: int, dtype: str = "float64") -> np.ndarray:
    """A Laplace kernel of points on a line: positive definite, and not close to singular."""
    x = np.sort(np.random.default_rng(n).uniform(0, n / 3, n))
    return np.exp(-np.abs(x[:, None] - x)).astype(dtype)


def stored(root: Path, matrix: np.ndarray, side: int) -> GramStore:
    n = len(matrix)
    digests = (str(n), str(float(matrix.sum())))
    axis = Axis(n, digests, lambda k: digests)
    store = GramStore.open_or_create(root, {"test": "factor"}, [axis], matrix.dtype.name, side)
    for tile in ((i, j) for i in range(store.grid.shape[0]) for j in range(i + 1)):
        store.write_tile(tile, np.ascontiguousarray(matrix[store.grid.extent(tile)]))
    return store


def targets(n: int, t: int = 3) -> np.ndarray:
    return np.random.default_rng(n + t).standard_normal((n, t))


def exact(matrix: np.ndarray, shift: float, Y: np.ndarray) -> np.ndarray:
    shifted = matrix.astype(np.float64) + shift * np.eye(len(matrix))
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(shifted), Y)


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda side: monkeypatch.setattr(TiledCholesky, "side", side)


def solve(
    root: Path,
    source: Any,
    rows: np.ndarray,
    ridges: list[float],
    Y: np.ndarray,
    workers: tasks.Open = tasks.Workers,
    name: str = "one",
    memory: int = MEMORY,
    **options: Any,
) -> tuple[Solution, ...]:
    solver = TiledCholesky(**options)
    with Site(root / "solves" / name, workers, memory) as site:
        return solver.solve(solver.factor(GramOperator(source, rows, site), ridges), Y)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """A matrix, an index set with gaps, a stored and a factor's tile side."""
    n = draw(st.integers(1, 40))
    kept = draw(st.one_of(st.just(set(range(n))), st.sets(st.integers(0, n - 1), min_size=1)))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return points(n, dtype), np.array(sorted(kept)), draw(st.integers(4, 13)), draw(st.integers(6, 15))


@settings(deadline=None, max_examples=20)
@given(problems(), st.sampled_from(["float32", "float64", "mixed"]))
def test_it_equals_scipy(case: tuple[np.ndarray, np.ndarray, int, int], dtype: str) -> None:
    """Protects the numbers (R3): ragged tiles, masks with gaps, other sides than the store's, every dtype."""
    matrix, rows, stored_side, factor_side = case
    Y = targets(len(rows), 2)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(TiledCholesky, "side", factor_side)
        source = stored(Path(folder), matrix, stored_side)
        ridges = [1e-3, 1e-1, 1e-2]
        solutions = solve(Path(folder), source, rows, ridges, Y, dtype=dtype)
    block = matrix[np.ix_(rows, rows)].astype(np.float64)
    for ridge, solution in zip(ridges, solutions, strict=True):
        assert solution.ridge == ridge
        assert solution.status is Status.SOLVED
        expected = exact(block, len(rows) * ridge, Y)
        np.testing.assert_allclose(solution.alpha, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        residual = block @ solution.alpha + len(rows) * ridge * solution.alpha - Y
        assert solution.residual == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(Y), abs=1e-13)


def test_the_factor_is_a_cholesky_factor(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects the tiles themselves, to rounding: L is lower triangular, and L L^T = K + shift I."""
    matrix, rows = points(50), np.arange(50)
    source = stored(tmp_path, matrix, 16)
    np.save(tmp_path / "rows.npy", rows)
    store = FactorStore.open_or_create(tmp_path, {"of": "test"}, 50, "float64", 12)
    job = tiled_factor.FactorJob(source, tmp_path / "rows.npy", store, 0.01, 0.5, 50, MEMORY)
    watched: list[tuple[int, int]] = []
    tiled_factor.complete(job, tasks.Workers, lambda *counts: watched.append(counts))
    assert watched[0] == (0, 15)
    assert watched[-1] == (15, 15)
    L = np.zeros((50, 50))
    for tile in store.present():
        L[store.grid.extent(tile)] = store.read_tile(*tile)
    assert not np.triu(L, 1).any()
    expected = scipy.linalg.cholesky(matrix + 0.5 * np.eye(50), lower=True)
    np.testing.assert_allclose(L, expected, atol=1e-14)
    with Site(tmp_path / "solves" / "one", tasks.Workers, MEMORY) as site:
        V = targets(50, 4)
        half = substitute(job, V, site)
        np.testing.assert_allclose(half, scipy.linalg.solve_triangular(L, V, lower=True), atol=1e-13)
        back = substitute(job, V, site, transposed=True)
        np.testing.assert_allclose(back, scipy.linalg.solve_triangular(L, V, lower=True, trans=1), atol=1e-13)


def test_the_effective_dimension_is_estimated(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects R9: d = tr K (K + shift I)^-1 within the error of a stochastic trace, and said to be an estimate."""
    matrix = points(300)
    side(64)
    (solution,) = solve(tmp_path, stored(tmp_path, matrix, 100), np.arange(300), [1e-3], targets(300))
    values = np.linalg.eigvalsh(matrix)
    expected = float((values / (values + 0.3)).sum())
    assert solution.effective_dimension == pytest.approx(expected, rel=0.05)
    assert any("estimated" in note for note in solution.notes)


def test_leave_one_out_is_estimated(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects R5 by probes: the errors of the exact one at every ridge but for their common scale, and the best
    ridge among them, where samples differ much in what they weigh."""
    n, ridges = 300, [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8]
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.lognormal(-4.0, 2.5, n))
    matrix = np.exp(-np.abs(x[:, None] - x) / 20)
    Y = (np.sin(x / 10) + 0.2 * rng.standard_normal(n))[:, None]
    side(64)
    found = solve(tmp_path, stored(tmp_path, matrix, 100), np.arange(n), ridges, Y, loo=True)
    errors, exact_errors = [], []
    for ridge, solution in zip(ridges, found, strict=True):
        inverse = np.linalg.inv(matrix + n * ridge * np.eye(n))
        assert solution.loo is not None
        errors.append(np.square(Y - solution.loo).mean())
        exact_errors.append(np.square(inverse @ Y / inverse.diagonal()[:, None]).mean())
        assert any("leave-one-out estimated" in note for note in solution.notes)
    assert inverse.diagonal().max() > 10 * inverse.diagonal().min()
    np.testing.assert_allclose(errors, exact_errors, rtol=0.25)
    assert 0 < np.argmin(exact_errors) == np.argmin(errors) < len(ridges) - 1
    (plain,) = solve(tmp_path, stored(tmp_path, matrix, 100), np.arange(n), ridges[:1], Y, name="plain")
    assert plain.loo is None


def test_noisy_labels_are_chosen_for_as_by_the_exact_one(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects the choice of the ridge for classes: an estimate errs by a multiple of the sample's own label, which
    would be right about labels that nothing predicts, most of all at large ridges."""
    n, ridges = 300, [1e2, 1.0, 1e-1, 1e-2, 1e-3, 1e-5]
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, 2))
    matrix = np.exp(-((X[:, None] - X) ** 2).sum(-1))
    y = np.where(rng.random(n) < 0.5, rng.integers(4, size=n), 2 * (X[:, 0] > 0) + (X[:, 1] > 0))
    train = encode(y, "classification")
    side(64)
    found = solve(tmp_path, stored(tmp_path, matrix, 100), np.arange(n), ridges, train.matrix, loo=True)
    estimated = evaluate(found, train, "loo")
    errors = []
    for solution in found:
        inverse = np.linalg.inv(matrix + solution.shift * np.eye(n))
        errors.append(np.square(inverse @ train.matrix / inverse.diagonal()[:, None]).mean())
    assert estimated["ridge"] == ridges[np.argmin(errors)] == 1e-2
    assert estimated["loo"].keys() == {"rmse", "n"}


def test_leaving_out_a_sample_that_is_zero_predicts_zero(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects scores by leave-one-out: an estimate would leave such a sample its own label or the opposite."""
    matrix, zero = points(60), [3, 40]
    matrix[zero] = matrix[:, zero] = 0
    side(16)
    source = stored(tmp_path, matrix, 32)
    (solution,) = solve(tmp_path, source, np.arange(60), [1e-3], targets(60), loo=True)
    assert solution.loo is not None
    assert not solution.loo[zero].any()
    assert np.delete(solution.loo, zero, axis=0).all()


def test_mixed_takes_float64_where_float32_fails(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects small ridges: a float32 factor where it does, a float64 one where it breaks down, and says which."""
    side(16)
    x = np.linspace(0, 1, 60)
    matrix = np.exp(-((x[:, None] - x) ** 2))  # eigenvalues far below float32's rounding
    Y = targets(60)
    source = stored(tmp_path, matrix, 32)
    ridges = [1e-8, 1e-1, 1e-9]
    solutions = solve(tmp_path, source, np.arange(60), ridges, Y, dtype="mixed")
    assert [DOUBLE in s.notes for s in solutions] == [True, False, True]
    assert [SINGLE in s.notes for s in solutions] == [False, True, False]
    assert all(s.residual < 1e-6 for s in solutions)
    # Once more from what was kept: the same, ridge by ridge.
    again = solve(tmp_path, source, np.arange(60), ridges, Y, dtype="mixed")
    for one, other in zip(solutions, again, strict=True):
        np.testing.assert_array_equal(one.alpha, other.alpha)
        assert (*one.notes, EARLIER) == other.notes


def test_not_positive_definite_says_where(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects from an obscure failure: block, training row, pivot, ridge and advice; solved ridges are kept."""
    matrix = points(40)
    matrix[:, 27], matrix[27] = matrix[:, 26], matrix[26]
    matrix[27, 27] = matrix[26, 27] = matrix[27, 26] = matrix[26, 26]
    matrix[27, 27] -= 0.2  # its Schur complement is about -0.2
    rows = np.r_[0:10, 12:40]
    side(8)
    Y = targets(len(rows))
    source = stored(tmp_path, matrix, 16)
    message = (
        r"not positive definite at ridge 1e-06 .* diagonal block 3 of the float64 factor the pivot of training row 27 "
        r"is -0\.\d+, .* take a ridge of at least .* or set solve\.jitter"
    )
    with pytest.raises(NumericalError, match=message) as caught:
        solve(tmp_path, source, rows, [1e-1, 1e-6], Y)
    assert "\n" not in str(caught.value)
    pivot = float(str(caught.value).split("row 27 is ")[1].split(",")[0])
    block = matrix[np.ix_(rows, rows)] + len(rows) * 1e-6 * np.eye(len(rows))
    at = int(np.flatnonzero(rows == 27)[0])
    left = np.linalg.solve(block[:at, :at], block[:at, at])
    assert pivot == pytest.approx(block[at, at] - block[at, :at] @ left, rel=1e-2)
    assert (tmp_path / "solves" / "one" / "ridge-0.1" / "solution.json").exists()
    with pytest.raises(NumericalError, match="float64 factor"):
        solve(tmp_path, source, rows, [1e-1, 1e-6], Y, dtype="mixed", name="two")


@pytest.mark.parametrize("stored_side", [40, 16])
def test_the_eigenvalue_named_is_none_that_k_has_not(
    stored_side: int, tmp_path: Path, side: Callable[[int], None]
) -> None:
    """Protects the size of the failure: a negative pivot may be a thousand times the smallest eigenvalue of all."""
    side(16)
    spectrum, Q = np.linalg.eigh(gaussian(100))
    spectrum[0] = -1e-6
    matrix = (Q * spectrum) @ Q.T
    matrix, rows = (matrix + matrix.T) / 2, np.arange(100)
    source = stored(tmp_path, matrix, stored_side)
    with pytest.raises(NumericalError, match="eigenvalue of at most about") as caught:
        solve(tmp_path, source, rows, [5e-9], targets(100))
    found = re.search(r"row \d+ is (\S+), .* at most about (\S+);", str(caught.value))
    assert found is not None
    pivot, told = map(float, found.groups())
    smallest = np.linalg.eigvalsh(matrix)[0]
    assert pivot < 100 * smallest
    assert 1.01 * smallest <= told < -100 * 5e-9


@pytest.mark.parametrize(("made", "dtype"), [("float64", "float32"), ("float32", "float64")])
def test_a_ridge_below_rounding_is_told_one_that_will_do(
    made: str, dtype: str, tmp_path: Path, side: Callable[[int], None]
) -> None:
    """Protects from blaming K for what rounding did to it, and from advice that fails again: the ridge named works."""
    side(32)
    X = np.random.default_rng(3).standard_normal((100, 3))
    matrix, rows, Y = (X @ X.T).astype(made), np.arange(100), targets(100)
    source = stored(tmp_path, matrix, 32)
    message = (
        r"singular at ridge 1e-11: .* is lost in the rounding of K, .* in diagonal block \d of the float.. factor the "
        r"pivot of training row \d+ is .*; take a ridge of at least .*, or store and solve in float64"
    )
    with pytest.raises(NumericalError, match=message) as caught:
        solve(tmp_path, source, rows, [1e-11], Y, dtype=dtype)
    advised = float(str(caught.value).split("at least ")[1].split()[0])
    solve(tmp_path, source, rows, [advised], Y, dtype=dtype, name="two")


@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_a_damaged_factor_tile_is_made_again(
    damage: str, tmp_path: Path, side: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a long run from one bad block on the disk: that tile alone is made again, the bits are the same."""
    side(16)
    matrix, rows, Y = points(80), np.arange(80), targets(80)
    source = stored(tmp_path, matrix, 16)
    (expected,) = solve(tmp_path, source, rows, [1e-2], Y, name="one")
    written: list[tuple[int, int]] = []
    write = FactorStore.write_tile

    def writing(store: FactorStore, tile: tuple[int, int], block: np.ndarray) -> bool:
        made = write(store, tile, block)
        if tile == (2, 0) and tile not in written:
            path = store.chunk("factor", tile)
            content = bytearray(path.read_bytes())
            content[77] ^= 1
            path.unlink() if damage == "removed" else path.write_bytes(content)
        written.append(tile)
        return made

    monkeypatch.setattr(FactorStore, "write_tile", writing)
    # With no room to keep tiles, every tile is read from the disk.
    monkeypatch.setattr(tiled_cholesky, "cache_bytes", lambda *_: 0)
    (solution,) = solve(tmp_path, source, rows, [1e-2], Y, name="two")
    np.testing.assert_array_equal(solution.alpha, expected.alpha)
    assert sorted(written) == sorted([*((i, j) for i in range(5) for j in range(i + 1)), (2, 0)])


def test_a_disk_that_damages_every_tile_ends_in_an_error(
    tmp_path: Path, side: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from mending for ever."""
    side(16)
    source = stored(tmp_path, points(40), 16)
    write = FactorStore.write_tile

    def writing(store: FactorStore, tile: tuple[int, int], block: np.ndarray) -> bool:
        write(store, tile, block)
        store.chunk("factor", tile).write_bytes(b"")
        return True

    monkeypatch.setattr(FactorStore, "write_tile", writing)
    monkeypatch.setattr(tiled_cholesky, "cache_bytes", lambda *_: 0)
    with pytest.raises(ChunkLost, match="factor chunk"):
        solve(tmp_path, source, np.arange(40), [1e-2], targets(40))


@pytest.mark.parametrize("tile", [(1, 0), (3, 3)])
def test_a_damaged_tile_of_the_matrix_is_never_solved_through(
    tile: tuple[int, int], tmp_path: Path, side: Callable[[int], None]
) -> None:
    """Protects the answer: the tile is named and set aside; mended, the next start goes on."""
    side(16)
    matrix, rows, Y = points(60), np.arange(60), targets(60)
    source = stored(tmp_path, matrix, 16)
    path = source.chunk("gram", tile)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"123456789")
    with pytest.raises(ChunkLost, match=f"{tile[0]}/{tile[1]}") as caught:
        solve(tmp_path, source, rows, [1e-2], Y)
    assert not isinstance(caught.value, tiled_factor.FactorTileLost)
    path.write_bytes(whole)
    (solution,) = solve(tmp_path, source, rows, [1e-2], Y)
    np.testing.assert_allclose(solution.alpha, exact(matrix, 0.6, Y), atol=1e-12)


def test_factors_and_scratch_are_removed(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects the disk: what is left of a solved path is its checkpoints alone."""
    side(16)
    solve(tmp_path, stored(tmp_path, points(40), 16), np.arange(40), [1e-1, 1e-2], targets(40))
    assert list((tmp_path / "factors").iterdir()) == []
    names = {path.name for path in (tmp_path / "solves" / "one").iterdir()}
    assert names == {"ridge-0.1", "ridge-0.01", "leases"}


def test_factors_of_solved_ridges_are_removed_by_the_next_start(
    tmp_path: Path, side: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the disk, of which a plan counts one factor: that of a ridge which was solved before a death does not
    lie beside the next one, and one that was begun stays."""
    side(16)
    source, rows, Y = stored(tmp_path, points(40), 16), np.arange(40), targets(40)

    def dying(*arguments: Any) -> None:
        raise KeyboardInterrupt

    beside: list[int] = []
    create = FactorStore.open_or_create

    def opening(root: Path, *arguments: Any) -> FactorStore:
        beside.append(len(list((root / "factors").glob("*"))))
        return create(root, *arguments)

    monkeypatch.setattr(FactorStore, "open_or_create", opening)
    with monkeypatch.context() as death:
        death.setattr(TiledCholesky, "_remove_factors", dying)
        with pytest.raises(KeyboardInterrupt):
            solve(tmp_path, source, rows, [1e-1, 1e-2], Y)
    with monkeypatch.context() as death:
        death.setattr(tiled_cholesky, "substitute", dying)
        with pytest.raises(KeyboardInterrupt):
            solve(tmp_path, source, rows, [1e-1, 1e-2], Y)
    solve(tmp_path, source, rows, [1e-1, 1e-2], Y)
    assert beside == [0, 0, 1]


def test_bad_input(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects from work on what can't be solved: each is refused before a tile is made."""
    source = stored(tmp_path, points(20), 8)
    rows, Y = np.arange(20), targets(20)
    with pytest.raises(ExperimentError, match="float32 or float64 or mixed"):
        TiledCholesky(dtype="float16")
    with pytest.raises(ExperimentError, match="needs a site"):
        TiledCholesky().factor(GramOperator(source, rows), [1.0])
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ExperimentError, match="greater than zero"):
            solve(tmp_path, source, rows, [ridge], Y)
    with pytest.raises(DataError, match="sample 4 is not finite"):
        solve(tmp_path, source, rows, [1.0], np.where(np.arange(20)[:, None] == 4, np.nan, Y))
    assert not (tmp_path / "factors").exists()


def test_values_too_large_for_float32_are_named(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects from a factor of infinities."""
    side(8)
    matrix = points(20)
    matrix[3, 3] = 1e300
    with pytest.raises(
        NumericalError, match=r"not finite in float32; scale the samples .* or compute in float64"
    ):
        solve(tmp_path, stored(tmp_path, matrix, 8), np.arange(20), [1.0], targets(20), dtype="float32")


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def cluster(request: pytest.FixtureRequest) -> Iterator[tasks.Workers]:
    with open_cluster(Profile(workers=request.param)) as client:
        yield tasks.Workers(client, request.param)


def test_the_same_bits_on_any_number_of_workers(
    tmp_path: Path, side: Callable[[int], None], cluster: tasks.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects resuming elsewhere: processes of their own, whoever makes which tile, give this process's bits."""
    side(24)
    n = 230  # ten tiles a side, the last ragged: three blocks in the substitutions
    matrix, rows, Y = points(n, "float32"), np.r_[0:100, 103:n], targets(n - 3)
    source = stored(tmp_path, matrix, 32)
    expected = solve(tmp_path, source, rows, [1e-1, 1e-4], Y, name="here", dtype="mixed")
    got = solve(tmp_path, source, rows, [1e-1, 1e-4], Y, lambda: cluster, name="there", dtype="mixed")
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one.alpha, other.alpha)
        assert one.effective_dimension == other.effective_dimension


class Schedule:
    """Runs a source's tasks on pretended workers, one task each at a time, in the order that ``pick`` says."""

    def __init__(self, order: Any, pick: Callable[[int], int]) -> None:
        self.finished: list[Any] = []
        flying: list[Any] = []
        while True:
            task = order.next()
            if task is not None and not isinstance(task, tasks.Wait):
                flying.append(task)
                self.check(task)
            elif flying:
                done = flying.pop(pick(len(flying)))
                order.done(done)
                self.finished.append(done)
            else:
                assert task is None, "waits for ever"
                return

    def check(self, task: Any) -> None:
        made = {step.tile for step in self.finished if step.finish} | self.present
        i, j = task.tile
        needed = {(i, k) for k in range(task.products)} | {(j, k) for k in range(task.products)}
        if task.finish:
            assert task.products == j
            needed |= {(j, j)} - {(i, j)}
        assert needed <= made, "handed out before what it needs"
        assert task.tile not in made

    present: frozenset[tuple[int, int]] = frozenset()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_every_missing_tile_is_made_once_and_in_time(count: int, workers: int, data: st.DataObject) -> None:
    """Protects the order of the work: from any set of present tiles, with workers of any speed."""
    tiles = [(i, j) for i in range(count) for j in range(i + 1)]
    there = data.draw(st.sets(st.sampled_from(tiles)))

    class Resumed(Schedule):
        present = frozenset(there)

    seed = np.random.default_rng(data.draw(st.integers(0, 99)))
    schedule = Resumed(FactorOrder(count, there, workers), lambda size: int(seed.integers(size)))
    finished = [step.tile for step in schedule.finished if step.finish]
    assert sorted(finished) == sorted(set(tiles) - there)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 99))
def test_every_block_is_taken_once_and_in_time(count: int, seed: int) -> None:
    """Protects the substitutions: a part is solved for when all its products are there, and before it is needed."""
    random = np.random.default_rng(seed)

    class Blocks(Schedule):
        def check(self, task: tuple[int, int]) -> None:
            row, column = task
            needed = {(row, k) for k in range(row)} if row == column else {(column, column)}
            assert needed <= set(self.finished)

    taken = Blocks(BlockOrder(count), lambda size: int(random.integers(size))).finished
    assert sorted(taken) == [(i, j) for i in range(count) for j in range(i + 1)]


def test_begun_tiles_are_finished_where_they_are() -> None:
    """Protects the look-ahead: with two workers and few tiles, updates go on while a diagonal tile is awaited."""
    order = FactorOrder(5, (), 2)
    begun: dict[tuple[int, int], int] = {}
    flying: list[Step] = []
    stepped = 0
    while (step := order.next()) is not None:
        if isinstance(step, tasks.Wait):
            order.done(flying.pop(0))
            continue
        worker = order.owner(step)
        assert begun.setdefault(step.tile, worker) == worker
        stepped += not step.finish
        flying.append(step)
    assert stepped


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tiles_are_worked_on_in_place(dtype: str) -> None:
    """Protects memory and time: BLAS copies in silence what is not in its order."""
    rng = np.random.default_rng(0)
    tile, a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((6, 5), (6, 4), (5, 4)))
    expected = tile - a @ b.T
    result = tile_arithmetic.subtract_product(tile, a, b)
    assert np.shares_memory(result, tile)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    square = points(6, dtype) * 9
    lower = np.tril(square - a @ a.T)
    result = tile_arithmetic.subtract_square(square, a)
    assert np.shares_memory(result, square)
    np.testing.assert_allclose(np.tril(result), lower, rtol=1e-5, atol=1e-6)
    triangle = points(5, dtype)
    expected = np.linalg.cholesky(triangle)
    result = tile_arithmetic.factor(triangle)
    assert np.shares_memory(result, triangle)
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, expected, atol=1e-6)
    expected = scipy.linalg.solve_triangular(result, tile.T, lower=True).T
    divided = tile_arithmetic.divide(tile, result)
    assert np.shares_memory(divided, tile)
    np.testing.assert_allclose(divided, expected, rtol=1e-4)


class OnDevice(np.ndarray):
    """Stands in for a device's array: it is not a plain NumPy array to ``kernels.arrays``."""


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], np.ndarray]:
    """CuPy's names over NumPy: the calls made on a device, computed on the host."""
    cupy = ModuleType("cupy")
    here = lambda values: np.asarray(values).view(OnDevice)  # noqa: E731
    cupy.ndarray = OnDevice  # type: ignore[attr-defined]
    cupy.asarray = here  # type: ignore[attr-defined]
    cupy.asnumpy = lambda values: np.array(values)  # type: ignore[attr-defined]
    cupy.linalg = SimpleNamespace(cholesky=lambda a: here(np.linalg.cholesky(a)))  # type: ignore[attr-defined]
    cupyx, linalg = ModuleType("cupyx"), ModuleType("cupyx.scipy.linalg")
    cupyx.errstate = np.errstate  # type: ignore[attr-defined]
    cupyx.errstate = lambda linalg: np.errstate()  # type: ignore[attr-defined]
    linalg.solve_triangular = lambda a, b, trans, lower: here(  # type: ignore[attr-defined]
        scipy.linalg.solve_triangular(np.asarray(a), np.asarray(b), trans=trans, lower=lower)
    )
    for name, module in (("cupy", cupy), ("cupyx", cupyx), ("cupyx.scipy.linalg", linalg)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupyx.scipy", ModuleType("cupyx.scipy"))
    return here


def test_a_device_computes_the_same(pretended_device: Callable[[np.ndarray], np.ndarray]) -> None:
    """Protects the path of GPU workers, as far as it can be without one: its algebra is the host's."""
    rng = np.random.default_rng(0)
    tile, a, b = (rng.standard_normal(shape) for shape in ((6, 5), (6, 4), (5, 4)))
    on = pretended_device
    product = tile_arithmetic.subtract_product(on(tile.copy()), on(a), on(b))
    assert isinstance(product, OnDevice)
    np.testing.assert_allclose(np.asarray(product), tile - a @ b.T)
    square = points(6) * 9
    reduced = tile_arithmetic.subtract_square(on(square.copy()), on(a))
    np.testing.assert_allclose(np.tril(np.asarray(reduced)), np.tril(square - a @ a.T))
    triangle = tile_arithmetic.factor(on(points(5)))
    assert isinstance(triangle, OnDevice)
    host = np.asarray(triangle)
    np.testing.assert_allclose(host, np.linalg.cholesky(points(5)))
    divided = tile_arithmetic.divide(on(tile.copy()), triangle)
    np.testing.assert_allclose(np.asarray(divided), tile_arithmetic.divide(tile.copy(), host))
    for transposed in (False, True):
        got = tile_arithmetic.solve(triangle, on(b), transposed)
        np.testing.assert_allclose(np.asarray(got), tile_arithmetic.solve(host, b, transposed))
    bad = points(5)
    bad[3, 3] = -1.0
    with pytest.raises(tile_arithmetic.NotPositive) as caught:
        tile_arithmetic.factor(on(bad))
    assert caught.value.position == 3


def test_what_is_planned_is_what_lies_there(tmp_path: Path, side: Callable[[int], None]) -> None:
    """Protects the plan: a factor's bytes on disk are those of its chunks."""
    store = FactorStore.open_or_create(tmp_path, {"of": "test"}, 50, "float32", 12)
    np.save(tmp_path / "rows.npy", np.arange(50))
    job = tiled_factor.FactorJob(
        stored(tmp_path, points(50), 16), tmp_path / "rows.npy", store, 0.01, 0.5, 50, MEMORY
    )
    tiled_factor.complete(job, tasks.Workers)
    lying = sum(path.stat().st_size for path in store.path.glob("factor/c/*/*"))
    assert lying == tiled_cholesky.factor_bytes(50, 12, 4)


def test_what_single_precision_failed_at_is_remembered(
    tmp_path: Path, side: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects hours: a start after a death in the float64 factor does not make the float32 one again, and that one
    is gone before the float64 one takes the disk."""
    side(16)
    x = np.linspace(0, 1, 60)
    source = stored(tmp_path, np.exp(-((x[:, None] - x) ** 2)), 32)
    rows, ridges, Y = np.arange(60), [1e-1, 1e-8, 1e-9], targets(60)
    whole = solve(tmp_path, source, rows, ridges, Y, name="whole", dtype="mixed")
    opened: list[tuple[str, int]] = []
    create = FactorStore.open_or_create

    def opening(root: Path, description: dict[str, Any], n: int, dtype: str, side: int) -> FactorStore:
        opened.append((dtype, len(list((root / "factors").iterdir()))))
        if len(opened) == 3:
            raise KeyboardInterrupt
        return create(root, description, n, dtype, side)

    monkeypatch.setattr(FactorStore, "open_or_create", opening)
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path, source, rows, ridges, Y, dtype="mixed")
    resumed = solve(tmp_path, source, rows, ridges, Y, dtype="mixed")
    assert opened == [("float32", 0), ("float32", 0), ("float64", 0), ("float64", 0), ("float64", 0)]
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one.alpha, other.alpha)


def job_of(root: Path, n: int = 50, side: int = 12) -> tiled_factor.FactorJob:
    np.save(root / "rows.npy", np.arange(n))
    store = FactorStore.open_or_create(root, {"of": "test"}, n, "float64", side)
    source = stored(root, points(n), 16)
    return tiled_factor.FactorJob(source, root / "rows.npy", store, 0.01, 0.5, n, MEMORY)


def maps_factor() -> bool:
    return "/factor/c/" in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to say what is mapped")
def test_workers_let_go_of_a_factor(tmp_path: Path, cluster: tasks.Workers) -> None:
    """Protects disk and memory: a removed factor's tiles take both for as long as a process holds them."""
    # A map may be smaller than a page, never than nothing: tiles of 12 x 12 are mapped too.
    tiled_factor.complete(job_of(tmp_path), lambda: cluster)
    assert any(cluster.client.run(maps_factor).values())
    tiled_factor.release_all(cluster)
    assert not any(cluster.client.run(maps_factor).values())


def test_finished_tiles_are_mapped_and_memory_is_used_again(tmp_path: Path) -> None:
    """Protects time: fresh memory for every tile costs the system half of what the arithmetic takes."""
    job = job_of(tmp_path)
    tiled_factor.complete(job, tasks.Workers)
    tile = job.store.map_tile(4, 2)
    assert not tile.flags.writeable
    assert tile.flags.c_contiguous
    for one in job.store.present():
        np.testing.assert_array_equal(job.store.map_tile(*one), job.store.read_tile(*one))
    held = tiled_factor.Held()
    assert held.tile(job, (1, 0)) is held.tile(job, (1, 0))
    first = held.memory(job, (4, 4))
    assert first.shape == (2, 2)
    held.give_back(job, first)
    second = held.memory(job, (1, 0))
    assert second.shape == (12, 12)
    assert np.shares_memory(first, second)
    assert not np.shares_memory(second, held.memory(job, (1, 0)))
    held.give_back(job, np.empty((3, 3)))  # not from there: memory of another size
    assert held.memory(job, (2, 1)).shape == (12, 12)
    tiled_factor.release()


def test_a_tile_mapped_again_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from both: damage that is never looked for, and a look at every reading."""
    job = job_of(tmp_path)
    tiled_factor.complete(job, tasks.Workers)
    asked: list[bool] = []
    mapping = FactorStore.map_tile

    def asking(store: FactorStore, i: int, j: int, verify: bool = True) -> np.ndarray:
        asked.append(verify)
        return mapping(store, i, j, verify)

    monkeypatch.setattr(FactorStore, "map_tile", asking)
    held = tiled_factor.Held()
    for _ in range(3):
        held.tile(job, (1, 0), keep=False)
    assert asked == [True, False, False]
    tiled_factor.release()
