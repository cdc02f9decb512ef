"""A factor in the making, its worker or its driver killed or its disk full: nothing made is lost, no bit changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from drivers import SECONDS, fill, wait_for
from factor_driver import RIDGES, TILES

DRIVER = Path(__file__).parents[1] / "factor_driver.py"
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a driver, and ends it and what it started with the test."""
    started: list[subprocess.Popen] = []

    def begin(root: Path, workers: int = 0, delay: float = 0.0) -> subprocess.Popen:
        root.mkdir(exist_ok=True)
        command = [sys.executable, str(DRIVER), str(root), str(workers), str(delay)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a driver and its workers without warning, the driver first."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=SECONDS)
    for child in children:
        if child.is_running():
            child.kill()


def made(root: Path) -> list[list[str]]:
    """A line for every tile that was made: store, row, column, process."""
    path = root / "made"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def finish(process: subprocess.Popen, root: Path) -> np.ndarray:
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert not list((root / "factors").iterdir())
    assert not list((root / "solves" / "one").glob("scratch-*"))
    return np.load(root / "alpha.npy")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    root = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, str(DRIVER), str(root), "0", "0"], check=True, timeout=SECONDS)
    assert len(made(root)) == len(RIDGES) * TILES
    return np.load(root / "alpha.npy")


@pytest.mark.parametrize("ridge", range(len(RIDGES)))
def test_a_driver_killed_in_the_middle(
    ridge: int, start: Start, tmp_path: Path, undisturbed: np.ndarray
) -> None:
    """Protects from starting again: only missing tiles are made, a solved ridge not at all, and the bits are the
    same."""
    process = start(tmp_path, delay=0.02)
    wait_for(lambda: len(made(tmp_path)) >= ridge * TILES + 20, process)
    kill(process)
    before = len(made(tmp_path))
    assert before < (ridge + 1) * TILES, "killed too late to mean anything"
    alpha = finish(start(tmp_path), tmp_path)
    np.testing.assert_array_equal(alpha, undisturbed)
    counts = Counter(tuple(line[:3]) for line in made(tmp_path))
    assert len(counts) == len(RIDGES) * TILES
    # The tile that was being written may have been whole and not yet traced.
    assert len(RIDGES) * TILES <= sum(counts.values()) <= len(RIDGES) * TILES + 1


@pytest.mark.slow
def test_a_driver_killed_with_its_workers(start: Start, tmp_path: Path, undisturbed: np.ndarray) -> None:
    """Protects a distributed solve from the death of everything at once, and its end on other workers."""
    process = start(tmp_path, workers=2, delay=0.05)
    wait_for(lambda: len(made(tmp_path)) >= 20, process)
    kill(process)
    assert len(made(tmp_path)) < TILES
    np.testing.assert_array_equal(finish(start(tmp_path, workers=1), tmp_path), undisturbed)


def test_a_worker_killed_in_the_middle(start: Start, tmp_path: Path, undisturbed: np.ndarray) -> None:
    """Protects from the loss of a worker with what it held and had begun: another makes it, bit for bit."""
    process = start(tmp_path, workers=2, delay=0.05)
    wait_for(lambda: len({line[3] for line in made(tmp_path)}) == 2 and len(made(tmp_path)) >= 12, process)
    os.kill(int(made(tmp_path)[-1][3]), signal.SIGKILL)
    assert len(made(tmp_path)) < TILES, "killed too late to mean anything"
    np.testing.assert_array_equal(finish(process, tmp_path), undisturbed)
    counts = Counter(tuple(line[:3]) for line in made(tmp_path))
    assert len(counts) == len(RIDGES) * TILES


def test_a_full_disk_leaves_the_factor_whole(start: Start, small_disk: Path, undisturbed: np.ndarray) -> None:
    """Protects what is made from a full disk: exit code 8, one line; with room, the next start makes the rest."""
    root = small_disk / "root"
    root.mkdir()
    ballast = fill(small_disk, 600_000)  # enough for the matrix, not for a factor beside it
    process = start(root)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 8, err
    assert err.strip().splitlines()[-1].startswith("error: no space left for ")
    before = made(root)
    assert 0 < len(before) < TILES
    ballast.unlink()
    np.testing.assert_array_equal(finish(start(root), root), undisturbed)
    assert len(made(root)) == len(RIDGES) * TILES
