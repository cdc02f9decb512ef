"""Conjugate gradients whose driver or worker is killed: the same command again gives the bits of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import small

PROGRAM = Path(__file__).with_name("iterating.py")
PATIENCE = 120.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored matrix of 144 samples in tiles of 16."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        small.use_tile_side(16, patch.setattr)
        samples = small.Samples(folder / "data").write(144)
        experiment = samples.experiment(data={"train": 144, "validation": None}, solve={"select": "loo"})
        return small.make(experiment, folder / "root").store.path


def start(store: Path, folder: Path, workers: int = 0, delay: float = 0.0) -> subprocess.Popen[str]:
    words = [str(store), str(folder / "solves" / "a"), str(folder / "alpha.npy"), str(workers), str(delay)]
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def finish(store: Path, folder: Path, workers: int = 0) -> tuple[np.ndarray, list[int]]:
    """The coefficients, and the numbers of the iterations that were done."""
    process = start(store, folder, workers)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    done = [int(line) for line in out.splitlines() if line.isdigit()]
    return np.load(folder / "alpha.npy"), done


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[int]]:
    return finish(store, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_bits(
    store: Path, undisturbed: tuple[np.ndarray, list[int]], tmp_path: Path
) -> None:
    """Protects a solve of hours, killed twice: no iteration but those in flight is done again."""
    alpha, iterations = undisturbed
    assert len(iterations) > 20
    reached = 0
    for _ in range(2):
        process = start(store, tmp_path, delay=0.02)
        for line in lines(process):
            if int(line) >= reached + 6:
                break
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        reached = int(line)
    assert not (tmp_path / "alpha.npy").exists()
    again, done = finish(store, tmp_path)
    np.testing.assert_array_equal(again, alpha)
    assert done[0] > reached - 2
    assert done[-1] == iterations[-1]
    assert not list((tmp_path / "solves" / "a").glob("scratch-*")), "what the dead left is swept"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(
    store: Path, undisturbed: tuple[np.ndarray, list[int]], tmp_path: Path
) -> None:
    """Protects the bits: another worker does its squares, and the sums are taken in the same order."""
    alpha, _ = undisturbed
    process = start(store, tmp_path, workers=2, delay=0.02)
    told = lines(process)
    pids = [int(word) for word in next(told).split()[1:]]
    try:
        for line in told:
            if int(line) == 5:
                os.kill(pids[0], signal.SIGKILL)
                break
        process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).kill()
    assert process.returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "alpha.npy"), alpha)
