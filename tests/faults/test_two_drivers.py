"""Two drivers on one store at once: both finish, and the work is shared out rather than done twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import TILES, Driver, Undisturbed, tile_files, tiles_computed, wait_for

from pipelines import leases


def test_two_drivers_of_one_experiment_share_its_tiles(
    driver: Driver, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects two terminals, or two batch jobs: every tile is there, few are computed twice."""
    pair = [driver.start(*driver.command(root), "--json", before=("--delay", "0.05")) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], answers
    assert tile_files(root) == undisturbed.tiles
    (store,) = (root / "gram").iterdir()
    made = tiles_computed(str(store))
    assert set(made) == {(i, j) for i in range(9) for j in range(i + 1) if (i, j) != (8, 8)}
    # Both may begin one task, of nine tiles at most, where neither sees the other's lease in time.
    assert len(made) <= TILES + 9, len(made)
    assert leases.holders(store) == []
    for out, _ in answers:
        assert f'"validation_accuracy": {undisturbed.facts["validation_accuracy"]}' in out


@pytest.mark.slow
def test_a_driver_takes_over_from_one_that_is_killed(
    driver: Driver, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects the survivor: what the dead driver had leased is computed as soon as it is known to be dead."""
    pair = [driver.start(*driver.command(root), before=("--delay", "0.1")) for _ in range(2)]
    wait_for(lambda: len(tile_files(root)) >= 6, pair[0])
    wait_for(lambda: any(len(leases.living(store)) == 2 for store in (root / "gram").iterdir()))
    driver.kill(pair[0])
    _, err = pair[1].communicate(timeout=120)
    assert pair[1].returncode == 0, err
    assert tile_files(root) == undisturbed.tiles


@pytest.mark.slow
def test_different_experiments_over_one_pool_run_at_once(driver: Driver, root: Path) -> None:
    """Protects shared stores: two ridges, two splits, one pool, started in the same moment."""
    commands = [
        driver.command(root, "--set", "solve.ridges=[0.5]", "--set", "name=a"),
        driver.command(root, "--set", "data.train=100", "--set", "name=b"),
        driver.command(root, "--set", 'kernel={kind="dot-product", kernel="linear"}', "--set", "name=c"),
    ]
    started = [driver.start(*command) for command in commands]
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert len(list((root / "gram").iterdir())) == 2
    assert len(list((root / "features").iterdir())) == 1
    driver.run("verify", str(root))
