"""A regression on features whose driver or worker is killed: the same command again gives the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small
from solve_runs import SolveRun

from kernels.dot_product import DotProduct
from kernels.features.monomials import Monomials
from pipelines import features, pools, tasks

PROGRAM = Path(__file__).with_name("summing.py")
STRIPS = 9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored features of 144 samples, in blocks of 16."""
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        small.use_tile_side(16, patch.setattr)
        samples = small.Samples(folder / "data").write(144)
        resolved = pools.resolve(
            samples.experiment(data={"train": 144, "validation": None}, solve={"select": "loo"})
        )
        kernel = Monomials(DotProduct("polynomial", degree=2))
        rows = np.arange(144)
        report = features.materialise(resolved, kernel, "float64", folder / "root", rows, tasks.Workers)
        return Path(report.store)


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    weights, strips = SolveRun(PROGRAM, store, tmp_path_factory.mktemp("undisturbed")).finish()
    assert sorted(set(strips)) == list(range(1, STRIPS + 1))
    return weights


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_bits(
    store: Path, undisturbed: np.ndarray, tmp_path: Path
) -> None:
    """Protects hours of summing, killed twice: no strip but the one in flight is summed again."""
    run = SolveRun(PROGRAM, store, tmp_path)
    run.kill_driver(0.05, lambda strip: strip >= 3)
    reached = run.kill_driver(0.05, lambda strip: strip >= 6)
    again, strips = run.finish()
    np.testing.assert_array_equal(again, undisturbed)
    assert strips[0] >= reached
    assert not list(run.site.glob("scratch-*")), "what the dead left is swept"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(store: Path, undisturbed: np.ndarray, tmp_path: Path) -> None:
    """Protects the bits: another worker does its strips, and the sums are taken in the same order."""
    found = SolveRun(PROGRAM, store, tmp_path).kill_worker(0.3, at=2)
    np.testing.assert_array_equal(found, undisturbed)
