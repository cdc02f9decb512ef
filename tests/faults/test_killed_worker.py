"""A worker that is killed: its tasks are done by another, and the matrix is what it would have been."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import small
from drivers import TILES, Driver, Undisturbed, tile_files, tiles_computed, wait_for

from cluster.local import open_cluster
from cluster.profiles import Profile
from cluster.watchdog import Watchdog
from pipelines import tasks


def test_a_worker_killed_in_the_middle_costs_only_its_tasks(
    driver: Driver, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects a run from the loss of a worker: it goes on, and every bit is that of an undisturbed run."""
    profile = driver.folder / "two.toml"
    profile.write_text('kind = "local"\nworkers = 2\n')
    process = driver.start(*driver.command(root, "--cluster", str(profile)), before=("--delay", "0.1"))
    killed: list[int] = []

    def kill_one_that_computes() -> bool:
        if len(tile_files(root)) < 4:
            return False
        records = list(root.glob("gram/*/records/*.jsonl"))
        pids = [int(path.stem.rsplit("-", 1)[1]) for path in records]
        killed.extend(pid for pid in pids if psutil.pid_exists(pid))
        return bool(killed)

    wait_for(kill_one_that_computes, process)
    os.kill(killed[0], signal.SIGKILL)
    stored = len(tile_files(root))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert stored < TILES, "killed too late to mean anything"
    assert "1 worker lost" in err
    assert tile_files(root) == undisturbed.tiles
    (store,) = (root / "gram").iterdir()
    computed = tiles_computed(str(store))
    assert set(computed) == {(i, j) for i in range(9) for j in range(i + 1) if (i, j) != (8, 8)}
    assert "accuracy" in out


@pytest.mark.slow
def test_every_worker_killed_at_once(driver: Driver, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a run from the loss of all workers: they are started anew, or the error says what was lost."""
    small.use_tile_side(16, monkeypatch.setattr)
    one = small.Samples(driver.folder / "data").write(144).experiment(data={"train": 120, "validation": 24})
    with open_cluster(Profile(workers=2)) as client:
        assert client is not None
        pids = list(client.run(os.getpid).values())
        watchdog = Watchdog(client, 2)

        def strike(done: int, total: int, message: str) -> None:
            while "tiles" in message and pids:
                os.kill(pids.pop(), signal.SIGKILL)

        workers = tasks.Workers(client, 2, None, watchdog.check)
        made = small.make(one, root, lambda: workers, strike)
    assert pids == []
    assert made.store.present() == {(i, j) for i in range(9) for j in range(i + 1) if (i, j) != (8, 8)}
    assert small.make(one, root).computed == {"train": 0}


@pytest.mark.slow
def test_a_worker_out_of_memory_ends_in_one_clear_error(driver: Driver, finished: Path) -> None:
    """Protects from a task that kills worker after worker: memory is named, exit code 7, stored tiles stay."""
    root = finished
    before = tile_files(root)
    driver.side = 6000
    profile = driver.folder / "narrow.toml"
    # Enough for an idle worker, not for what each tile holds, for longer than the nanny takes to see it; by the plan
    # not for a tile of 6,000 samples either.
    profile.write_text('kind = "local"\nworkers = 1\nmemory = "330MiB"\n')
    arguments = driver.command(root, "--cluster", str(profile))
    _, err = driver.run(*arguments, before=("--no-check", "--hold", "400"), code=7)
    last = err.strip().splitlines()[-1]
    assert last.startswith("megagram: error: ")
    assert "memory" in last
    assert "Traceback" not in err
    assert {name: content for name, content in tile_files(root).items() if name in before} == before
    # The plan knew: without being told to go on it refuses before any worker starts.
    _, err = driver.run(*arguments, code=4)
    assert "a worker needs" in err
    # With more memory the same command goes through.
    profile.write_text('kind = "local"\nworkers = 1\n')
    assert driver.facts(root, "--cluster", str(profile))["tiles_computed"] == 1
