"""Products shared out over workers: the dense product, the same bits however many workers, nothing left behind."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import Samples, make, use_tile_side

from pipelines import fit, products, tasks
from pipelines.errors import ChunkLost, NumericalError
from pipelines.operators import GramOperator, predict
from pipelines.products import product
from pipelines.recomputed import RecomputedTiles
from pipelines.site import Site
from pipelines.stores import GramStore
from pipelines.tilesource import TileSource

N = 62
WHOLE = {"data": {"train": N, "validation": None}, "solve": {"select": "loo"}}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


@pytest.fixture
def few_tiles_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many squares of few tiles, ragged ones among them, as large matrices have."""
    monkeypatch.setattr(products, "SQUARE", 16)
    use_tile_side(8, monkeypatch.setattr)


@pytest.fixture(params=["stored", "recomputed"])
def source(request: pytest.FixtureRequest, few_tiles_a_square: None, tmp_path: Path) -> TileSource:
    """A symmetric matrix over 62 samples in tiles of 8."""
    experiment = Samples(tmp_path / "data").write(N).experiment(**WHOLE)
    made = make(experiment, tmp_path / "root")
    if request.param == "stored":
        return made.store
    path = Path(made.features[0].store)
    return RecomputedTiles.of(experiment.kernel_object, path, path, "float64", 2**30)


def dense(source: TileSource) -> np.ndarray:
    return GramOperator(source, np.arange(N)).dense()


def test_a_recomputed_matrix_has_the_bits_of_the_stored_one(few_tiles_a_square: None, tmp_path: Path) -> None:
    """Protects the choice between the two: it is of time alone."""
    experiment = Samples(tmp_path / "data").write(N).experiment(**WHOLE)
    made = make(experiment, tmp_path / "root")
    path = Path(made.features[0].store)
    recomputed = RecomputedTiles.of(experiment.kernel_object, path, path, "float64", 2**30)
    assert recomputed.shape == made.store.shape
    assert recomputed.symmetric
    for tile in made.store.present():
        np.testing.assert_array_equal(recomputed.read_tile(*tile), made.store.read_tile(*tile))


def test_a_source_that_travels_is_small_and_reads_the_same(source: TileSource) -> None:
    """Protects the scheduler: what goes to workers is an address."""
    text = pickle.dumps(source)
    assert len(text) < 2000
    np.testing.assert_array_equal(pickle.loads(text).read_tile(1, 0), source.read_tile(1, 0))


@pytest.mark.parametrize("rows", [np.arange(N), np.arange(3, 40), np.array([0, 7, 8, 9, 30, 61])])
def test_workers_give_the_product_and_its_bits(
    source: TileSource, rows: np.ndarray, client: Any, tmp_path: Path
) -> None:
    """Protects "the same bits on any number of workers": in this process, on one, on four."""
    V = np.random.default_rng(0).standard_normal((len(rows), 3))
    here = GramOperator(source, rows).matmul(V)
    np.testing.assert_allclose(here, dense(source)[np.ix_(rows, rows)] @ V, rtol=1e-12)
    for workers in (tasks.Workers(), tasks.Workers(client, 4)):
        with Site(tmp_path / "solves" / "a", lambda opened=workers: opened, 2**30) as site:
            np.testing.assert_array_equal(GramOperator(source, rows, site).matmul(V), here)
            assert not list(site.folder.glob("scratch-*/*")), "arrays on their way are removed"


def test_predictions_of_other_rows_are_shared_out(source: TileSource, client: Any, tmp_path: Path) -> None:
    rows, columns = np.arange(50, N), np.arange(0, 50, 3)
    alpha = np.random.default_rng(1).standard_normal((2, len(columns), 3))
    with Site(tmp_path / "solves" / "a", lambda: tasks.Workers(client, 4), 2**30) as site:
        shared = predict(source, rows, columns, alpha, site)
    np.testing.assert_array_equal(shared, predict(source, rows, columns, alpha))
    np.testing.assert_allclose(shared, dense(source)[np.ix_(rows, columns)] @ alpha, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_are_those_of_the_matrix(source: TileSource, dtype: str, client: Any, tmp_path: Path) -> None:
    """Protects sketches by columns: in the order asked for, rounded as asked for, on any number of workers."""
    rows = np.arange(3, N - 1)
    positions = np.random.default_rng(2).permutation(len(rows))[:40]
    expected = dense(source)[np.ix_(rows, rows)][:, positions].astype(dtype)
    here = GramOperator(source, rows).columns(positions, dtype)
    assert here.dtype == np.float64
    np.testing.assert_array_equal(here, expected)
    found = []
    for workers in (tasks.Workers(client, 1), tasks.Workers(client, 4)):
        with Site(tmp_path / "solves" / "a", lambda opened=workers: opened, 2**30) as site:
            found.append(GramOperator(source, rows, site).columns(positions, dtype))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_a_missing_tile_ends_the_product(few_tiles_a_square: None, client: Any, tmp_path: Path) -> None:
    """Protects "never solved through": a matrix with a hole has no product."""
    experiment = Samples(tmp_path / "data").write(N).experiment(**WHOLE)
    store = make(experiment, tmp_path / "root").store
    store.chunk("gram", (3, 2)).unlink()
    with (
        Site(tmp_path / "solves" / "a", lambda: tasks.Workers(client, 4), 2**30) as site,
        pytest.raises(ChunkLost, match="gram chunk 3/2 is missing"),
    ):
        product(store, np.arange(N), np.arange(N), np.ones((N, 1)), site)


def test_a_recomputed_value_that_is_not_finite_is_named(few_tiles_a_square: None, tmp_path: Path) -> None:
    samples = Samples(tmp_path / "data").write(N)
    experiment = samples.experiment(**WHOLE)
    made = make(experiment, tmp_path / "root")
    path = Path(made.features[0].store)
    source = RecomputedTiles.of(experiment.kernel_object, path, path, "float64", 2**30)
    from pipelines import gram

    block = gram.block_cache(source.cache_bytes).block(source.rows, 2, source.samples[0])
    next(iter(block.arrays.values()))[3] = np.nan
    with pytest.raises(NumericalError, match="between samples 19 and 0"):
        source.read_tile(2, 0)
    gram.forget()


def test_recomputed_matrices_are_told_apart_by_their_preprocessing(
    few_tiles_a_square: None, tmp_path: Path
) -> None:
    """Protects from another matrix's solution: raw samples and kernel are the same, the prepared ones are not."""
    samples = Samples(tmp_path / "data").write(N)
    found = []
    for steps in (["scale"], ["scale", "normalise"]):
        experiment = samples.experiment(
            data={"train": N, "validation": None, "preprocess": steps}, solve={"select": "loo"}
        )
        path = Path(make(experiment, tmp_path / "root").features[0].store)
        found.append(RecomputedTiles.of(experiment.kernel_object, path, path, "float64", 2**30))
    assert found[0].kernel == found[1].kernel
    assert found[0].samples == found[1].samples
    assert fit.matrix_identity(found[0]) != fit.matrix_identity(found[1])


def test_a_store_that_grew_is_opened_again_by_a_worker(few_tiles_a_square: None, tmp_path: Path) -> None:
    """Protects workers that outlive a run: what they opened of a store is not what it became."""
    samples = Samples(tmp_path / "data").write(N)
    store = make(samples.experiment(**WHOLE), tmp_path / "root").store
    kept = pickle.loads(pickle.dumps(store))
    assert pickle.loads(pickle.dumps(store)) is kept
    samples.write(N + 9)
    grown = make(samples.experiment(**WHOLE), tmp_path / "root").store
    assert grown.path == store.path
    assert pickle.loads(pickle.dumps(GramStore(grown.path))).shape == (N + 9, N + 9)


@dataclass(frozen=True)
class Number:
    number: int


@dataclass(frozen=True)
class Sums:
    out: Path


def write_late(task: Number, job: Sums) -> int:
    """The first task waits until no other is begun any more. Returns how many results lie on the disk then."""
    if task.number:
        products.write_sums(task, job, [np.full(2, float(task.number))])
        return 0
    before, lying = -1, 0
    while lying != before:
        time.sleep(0.5)
        before, lying = lying, len(list(job.out.parent.glob(f"{job.out.name}.*")))
    products.write_sums(task, job, [np.zeros(2)])
    return lying


def test_results_do_not_pile_up_behind_a_straggler(client: Any, tmp_path: Path) -> None:
    """Protects the disk: whatever one task takes, no more files lie there than are planned for; none is lost."""
    listed = [Number(k) for k in range(100)]
    with Site(tmp_path / "solves" / "a", lambda: tasks.Workers(client, 4), 2**30) as site:
        got = list(products.in_turn(write_late, listed, Sums(site.path("sums")), site))
    assert [int(values[0]) for _, values in got] == list(range(100))
    assert 0 < got[0][0] < products.outstanding(4)
