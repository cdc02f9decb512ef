"""A disk that fills up in the middle: one clear line, nothing lost, and the same command goes on when there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import SECONDS, TILES, Driver, Undisturbed, fill, tile_files

from flows.arrays import _dense
from pipelines.errors import DiskFull
from pipelines.files import disk_errors

SLOW = pytest.mark.slow


@pytest.mark.parametrize("cluster", ["serial", pytest.param("local", marks=SLOW)])
@pytest.mark.parametrize("leave", [90_000, pytest.param(30_000, marks=SLOW), pytest.param(8192, marks=SLOW)])
def test_a_full_disk_stops_a_run_and_loses_nothing(
    driver: Driver, undisturbed: Undisturbed, small_disk: Path, leave: int, cluster: str
) -> None:
    """Protects what is stored from a full disk: exit code 8, one line, whole tiles; room made, the run goes on."""
    root = small_disk / "root"
    ballast = fill(small_disk, leave)
    arguments = driver.command(root, "--cluster", cluster)
    _, err = driver.run(*arguments, before=("--no-check",), code=8)
    last = err.strip().splitlines()[-1]
    assert last.startswith("megagram: error: no space left for ")
    assert "make room" in last
    assert "Traceback" not in err
    kept = tile_files(root)
    assert len(kept) < TILES
    assert all(undisturbed.tiles[name] == content for name, content in kept.items())
    # As it is, the plan refuses before any work, or there is not even room for its journal.
    process = driver.start(*arguments)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode in (4, 8), err
    assert tile_files(root) == kept
    ballast.unlink()
    again = driver.facts(root, "--cluster", cluster)
    assert again["tiles_computed"] == TILES - len(kept)
    assert tile_files(root) == undisturbed.tiles


def test_a_dense_matrix_that_does_not_fit_is_an_error_not_a_death(small_disk: Path) -> None:
    """Protects ``megagram gram``: a full disk under a mapped file would kill the process without a word."""

    class Store:
        dtype, side = "float64", 128

    def export() -> None:
        with disk_errors(small_disk):
            _dense(small_disk / "K.npy", (600, 600), Store())[:] = 1.0  # type: ignore[arg-type]

    with pytest.raises(DiskFull):
        export()
