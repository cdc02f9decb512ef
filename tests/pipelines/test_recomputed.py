"""Tiles of scattered columns alone, computed when they are read, against those of the stored matrix (R7, K13)."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from systems import same

from kernels.base import Prepared
from kernels.dot_product import DotProduct
from pipelines import products, tasks
from pipelines.errors import NumericalError
from pipelines.operators import GramOperator, cross_block, predict
from pipelines.recomputed import GatheredTiles, RecomputedTiles, gathered
from pipelines.site import Site
from pipelines.solvers.base import Solution
from pipelines.solvers.nystrom import Nystrom

pytestmark = pytest.mark.usefixtures("tiles_of_16")

CENTRES = np.array([1, 17, 18, 30, 35, 47, 48, 50, 51, 66])
"""In all five tiles of 72 samples."""


@pytest.fixture
def made(samples: small.Samples, root: Path) -> small.Made:
    return small.make(samples.experiment(data={"test": [60, 72], "validation": [44, 60]}), root)


def recomputed(made: small.Made) -> RecomputedTiles:
    path = Path(made.features[0].store)
    return RecomputedTiles.of(made.kernel, path, path, "float64", small.MEMORY)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path / "site", tasks.Workers, small.MEMORY) as opened:
        yield opened


def test_scattered_columns_are_those_of_the_whole_matrix(made: small.Made, site: Site) -> None:
    """Protects R7: to rounding the stored entries, those of a sample with itself among them, at all rows."""
    whole = recomputed(made)
    source, columns = gathered(whole, CENTRES, site)
    assert isinstance(source, GatheredTiles)
    rows = np.arange(whole.shape[0])
    expected = cross_block(whole, rows, CENTRES)
    np.testing.assert_allclose(cross_block(source, rows, columns), expected, rtol=1e-12)
    square = cross_block(source.among_columns, columns, columns)
    np.testing.assert_allclose(square, expected[CENTRES], rtol=1e-12)
    V = np.random.default_rng(0).standard_normal((len(CENTRES), 2))
    np.testing.assert_allclose(predict(source, rows[5:40], columns, V), expected[5:40] @ V, rtol=1e-11)
    assert len(pickle.dumps(source)) < 3000, "it travels to workers with each task"


def test_gathered_samples_are_known_by_their_rows(made: small.Made, site: Site) -> None:
    """Protects pairs of the same sample, whose cosine is exactly one (K13): ids and pool are the whole pool's."""
    source, _ = gathered(recomputed(made), CENTRES, site)
    assert isinstance(source, GatheredTiles)
    block = source.columns.block(0, 16)
    np.testing.assert_array_equal(block.rows, CENTRES)
    from pipelines.stores import FeatureStore

    assert block.pool == FeatureStore(Path(made.features[0].store)).read_block(0).pool


def test_columns_that_fill_their_tiles_are_left_where_they_are(made: small.Made, site: Site) -> None:
    """Protects from computing tiles twice over: whole tiles of a symmetric matrix serve both triangles."""
    whole = recomputed(made)
    for columns in (np.arange(72), np.arange(16, 48)):
        assert (
            gathered(whole, columns, site) == (whole, columns) or gathered(whole, columns, site)[0] is whole
        )
    assert gathered(whole, CENTRES, None)[0] is whole, "nowhere to gather them"
    assert gathered(made.store, CENTRES, site)[0] is made.store


def fitted(
    made: small.Made, source: Any, folder: Path, workers: tasks.Workers, rows: np.ndarray
) -> tuple[Solution, ...]:
    Y = np.random.default_rng(1).standard_normal((len(rows), 2))
    solver = Nystrom(centres=12, tolerance=1e-10)
    with Site(folder, lambda: workers, small.MEMORY) as opened:
        return solver.solve(solver.factor(GramOperator(source, rows, opened), [1e-1, 1e-3]), Y)


def test_a_fit_on_centres_is_that_of_the_stored_matrix_on_any_number_of_workers(
    made: small.Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    monkeypatch.setattr(products, "SQUARE", 32)
    rows = np.arange(44)
    K = made.dense()[:60, :60]
    stored = fitted(made, DenseRows(K), tmp_path / "stored", tasks.Workers(), rows)
    here = fitted(made, recomputed(made), tmp_path / "0", tasks.Workers(), rows)
    for one, expected in zip(here, stored, strict=True):
        scale = np.abs(expected.alpha).max()
        np.testing.assert_allclose(one.alpha, expected.alpha, rtol=1e-6, atol=1e-8 * scale)
    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as client:
        for count in (1, 4):
            workers = tasks.Workers(client, count)
            same(fitted(made, recomputed(made), tmp_path / str(count), workers, rows), here)


class DenseRows:
    """A tile source over a matrix in memory."""

    side = 16
    symmetric = True

    def __init__(self, K: np.ndarray) -> None:
        self.K, self.shape = K, K.shape

    def read_tile(self, i: int, j: int) -> np.ndarray:
        return self.K[i * 16 : (i + 1) * 16, j * 16 : (j + 1) * 16].copy()


def test_no_entry_is_computed_that_centres_do_not_need(
    made: small.Made, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the price of millions of samples: a pass computes n times the number of centres, not n^2 / 2."""
    sizes: list[int] = []
    pair = DotProduct.pair

    def counted(self: DotProduct, a: Prepared, b: Prepared) -> Any:
        sizes.append(len(a) * len(b))
        return pair(self, a, b)

    monkeypatch.setattr(DotProduct, "pair", counted)
    rows = np.arange(60)
    K = GramOperator(recomputed(made), rows, site)
    state = Nystrom(centres=10).factor(K, [1e-2])
    sizes.clear()
    state.apply(np.ones((3, 10)), np.zeros(3, np.int64))
    assert sum(sizes) == 64 * 10, "the last block of rows is whole"


def test_a_value_that_is_not_finite_is_named_by_its_samples(
    made: small.Made, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = gathered(recomputed(made), CENTRES, site)
    pair = DotProduct.pair

    def spoilt(self: DotProduct, a: Prepared, b: Prepared) -> Any:
        block = pair(self, a, b)
        block[3, 4] = np.nan
        return block

    monkeypatch.setattr(DotProduct, "pair", spoilt)
    with pytest.raises(
        NumericalError, match="1 values that are not finite in float64, the first between samples 19 and 35"
    ):
        source.read_tile(1, 0)
