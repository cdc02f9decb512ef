"""A driver that is killed: the same command again finishes the work and computes only what was in flight."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from drivers import TILES, Driver, Undisturbed, tile_files, tiles_computed, wait_for

from pipelines import leases, results

SLOW = ("--delay", "0.03")


def test_a_killed_driver_loses_only_what_was_in_flight(
    driver: Driver, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects hours of work: killed in the middle, run again, the bits are those of an undisturbed run."""
    process = driver.start(*driver.command(root), before=SLOW)
    wait_for(lambda: len(tile_files(root)) >= 8, process)
    driver.kill(process)
    (journal,) = results.journals(root, "small")
    assert journal["state"] == "running"
    assert not journal["alive"]
    left = tile_files(root)
    assert 8 <= len(left) < TILES
    again = driver.facts(root)
    assert again["tiles_computed"] == TILES - len(left)
    assert again["tiles_reused"] == len(left)
    for fact in ("ridge", "validation_accuracy"):
        assert again[fact] == undisturbed.facts[fact]
    assert tile_files(root) == undisturbed.tiles
    # The tile that was written at the moment of the kill may be without its record, no other one.
    assert len(set(tiles_computed(again["store"]))) >= TILES - 1
    assert leases.living(Path(again["store"])) == []
    # What the killed driver left behind is found and swept, and nothing else.
    driver.run("verify", str(root), "--repair")
    assert tile_files(root) == undisturbed.tiles
    assert leases.holders(Path(again["store"])) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_driver_keeps_what_it_stored(
    driver: Driver, root: Path, number: signal.Signals
) -> None:
    """Protects Ctrl-C and a batch system's notice: no traceback, no lease left, the next run goes on."""
    process = driver.start(*driver.command(root), before=SLOW)
    wait_for(lambda: len(tile_files(root)) >= 4, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in err
    left = len(tile_files(root))
    again = driver.facts(root)
    assert (again["tiles_computed"], again["tiles_reused"]) == (TILES - left, left)
    (path,) = (root / "gram").iterdir()
    if number == signal.SIGINT:
        assert leases.holders(path) == []


@pytest.mark.slow
def test_a_driver_killed_again_and_again_gets_there(
    driver: Driver, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects any moment: killed after every few tiles, also while it starts, each run adds to the last."""
    before = -1
    while len(tile_files(root)) < TILES:
        goal = min(len(tile_files(root)) + 7, TILES)
        process = driver.start(*driver.command(root), before=SLOW)
        wait_for(lambda goal=goal: len(tile_files(root)) >= goal, process)  # type: ignore[misc]
        driver.kill(process)
        assert len(tile_files(root)) > before
        before = len(tile_files(root))
    assert driver.facts(root)["tiles_computed"] == 0
    assert tile_files(root) == undisturbed.tiles
    # A tile that was in flight at a kill may be computed twice, no other one.
    (store,) = (root / "gram").iterdir()
    assert len(tiles_computed(str(store))) <= TILES + 7
    assert not list(store.glob("damaged/*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["data", "features", "gram", "solve"])
def test_a_driver_killed_in_any_stage_is_resumed(
    driver: Driver, root: Path, undisturbed: Undisturbed, stage: str
) -> None:
    """Protects every stage: whatever was begun when the process died, the result is the same."""
    process = driver.start(*driver.command(root), before=SLOW)

    def reached() -> bool:
        return any(s["name"] == stage for j in results.journals(root, "small") for s in j["stages"])

    wait_for(reached)
    driver.kill(process)
    again = driver.facts(root)
    assert again["validation_accuracy"] == undisturbed.facts["validation_accuracy"]
    assert tile_files(root) == undisturbed.tiles
