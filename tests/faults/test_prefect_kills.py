"""The same deaths while a real Prefect server looks on: the run is resumed, and the server's account is true."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from drivers import TILES, Driver, Undisturbed, tile_files, wait_for
from prefect_servers import PrefectServer, running_server

pytestmark = pytest.mark.slow

SLOW = ("--delay", "0.05")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with running_server(tmp_path_factory.mktemp("megagram-home")) as made:
        yield made


@pytest.fixture
def watched(driver: Driver, server: PrefectServer) -> Driver:
    """A driver whose runs report to the server."""
    return replace(driver, environment={**server.environment(), "OPENBLAS_NUM_THREADS": "1"})


def test_a_driver_killed_under_prefect_is_resumed(
    watched: Driver, server: PrefectServer, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects the resumption: only missing tiles, the same bits; the second run is a completed flow run."""
    before = {run["id"] for run in server.runs("flow_runs")}
    process = watched.start(*watched.command(root), before=SLOW)
    wait_for(lambda: len(tile_files(root)) >= 8, process)
    watched.kill(process)
    left = tile_files(root)
    assert 8 <= len(left) < TILES
    again = watched.facts(root)
    assert "server" in again["engine"]
    assert server.record.url.removesuffix("/api") in again["engine"]
    assert (again["tiles_computed"], again["tiles_reused"]) == (TILES - len(left), len(left))
    assert tile_files(root) == undisturbed.tiles
    runs = [run for run in server.runs("flow_runs") if run["id"] not in before]
    assert len(runs) == 2
    assert runs[-1]["state_type"] == "COMPLETED"
    stages = server.runs("task_runs", flow_runs={"id": {"any_": [runs[-1]["id"]]}})
    assert {run["state_type"] for run in stages} == {"COMPLETED"}
    assert len(stages) >= 6


def test_a_worker_killed_under_prefect_costs_only_its_tasks(
    watched: Driver, server: PrefectServer, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects the run from the loss of a worker: no stage fails for it, every bit is the same."""
    profile = watched.folder / "two.toml"
    profile.write_text('kind = "local"\nworkers = 2\n')
    process = watched.start(*watched.command(root, "--cluster", str(profile)), before=("--delay", "0.2"))
    victims: list[int] = []

    def a_worker_computes() -> bool:
        records = list(root.glob("gram/*/records/*.jsonl"))
        victims.extend(int(path.stem.rsplit("-", 1)[1]) for path in records)
        return len(tile_files(root)) >= 4 and any(map(psutil.pid_exists, victims))

    wait_for(a_worker_computes, process)
    os.kill(next(pid for pid in victims if psutil.pid_exists(pid)), signal.SIGKILL)
    assert len(tile_files(root)) < TILES
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "1 worker lost" in err
    assert tile_files(root) == undisturbed.tiles
    newest = server.runs("flow_runs")[-1]
    assert newest["state_type"] == "COMPLETED"


def test_the_server_killed_in_the_middle_costs_nothing(
    driver: Driver, tmp_path: Path, root: Path, undisturbed: Undisturbed
) -> None:
    """Protects the work from the one who looks on: the run goes on without a server and ends as it would have."""
    home = tmp_path / "home"
    home.mkdir()
    with running_server(home) as server:
        alone = replace(driver, environment={**server.environment(), "OPENBLAS_NUM_THREADS": "1"})
        process = alone.start(*alone.command(root), before=("--delay", "0.2"))
        wait_for(lambda: len(tile_files(root)) >= 4, process)
        family = [server.process, *psutil.Process(server.process.pid).children(recursive=True)]
        for member in reversed(family):
            os.kill(member.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert tile_files(root) == undisturbed.tiles
