"""Conjugate gradients whose driver or worker is killed: the same command again gives the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small
from solve_runs import SolveRun

PROGRAM = Path(__file__).with_name("iterating.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored matrix of 144 samples in tiles of 16."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        small.use_tile_side(16, patch.setattr)
        samples = small.Samples(folder / "data").write(144)
        experiment = samples.experiment(data={"train": 144, "validation": None}, solve={"select": "loo"})
        return small.make(experiment, folder / "root").store.path


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[int]]:
    return SolveRun(PROGRAM, store, tmp_path_factory.mktemp("undisturbed")).finish()


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_bits(
    store: Path, undisturbed: tuple[np.ndarray, list[int]], tmp_path: Path
) -> None:
    """Protects a solve of hours, killed twice: no iteration but those in flight is done again."""
    alpha, iterations = undisturbed
    assert len(iterations) > 20
    run = SolveRun(PROGRAM, store, tmp_path)
    once = run.kill_driver(0.02, lambda iteration: iteration >= 6)
    reached = run.kill_driver(0.02, lambda iteration: iteration >= once + 6)
    again, done = run.finish()
    np.testing.assert_array_equal(again, alpha)
    assert done[0] > reached - 2
    assert done[-1] == iterations[-1]
    assert not list(run.site.glob("scratch-*")), "what the dead left is swept"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(
    store: Path, undisturbed: tuple[np.ndarray, list[int]], tmp_path: Path
) -> None:
    """Protects the bits: another worker does its squares, and the sums are taken in the same order."""
    found = SolveRun(PROGRAM, store, tmp_path).kill_worker(0.02, at=5)
    np.testing.assert_array_equal(found, undisturbed[0])
