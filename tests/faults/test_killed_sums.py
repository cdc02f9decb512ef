"""A regression on features whose driver or worker is killed: the same command again gives the same bits."""

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

from kernels.dot_product import DotProduct
from kernels.features.monomials import Monomials
from pipelines import features, pools, tasks

PROGRAM = Path(__file__).with_name("summing.py")
PATIENCE = 300.0
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


def start(store: Path, folder: Path, workers: int = 0, delay: float = 0.0) -> subprocess.Popen[str]:
    words = [str(store), str(folder / "solves" / "a"), str(folder / "weights.npy"), str(workers), str(delay)]
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


def finish(store: Path, folder: Path) -> tuple[np.ndarray, list[int]]:
    """The weights, and how many strips were summed whenever one was done."""
    process = start(store, folder)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return np.load(folder / "weights.npy"), [int(line.split()[0]) for line in out.splitlines()]


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    weights, done = finish(store, tmp_path_factory.mktemp("undisturbed"))
    assert sorted(set(done)) == list(range(1, STRIPS + 1))
    return weights


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_bits(
    store: Path, undisturbed: np.ndarray, tmp_path: Path
) -> None:
    """Protects hours of summing, killed twice: no strip but the one in flight is summed again."""
    reached = 0
    for stop in (3, 6):
        process = start(store, tmp_path, delay=0.05)
        for line in lines(process):
            reached = int(line.split()[0])
            if reached >= stop:
                break
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "weights.npy").exists()
    again, done = finish(store, tmp_path)
    np.testing.assert_array_equal(again, undisturbed)
    assert done[0] >= reached
    assert not list((tmp_path / "solves" / "a").glob("scratch-*")), "what the dead left is swept"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(store: Path, undisturbed: np.ndarray, tmp_path: Path) -> None:
    """Protects the bits: another worker does its strips, and the sums are taken in the same order."""
    process = start(store, tmp_path, workers=2, delay=0.3)
    told = lines(process)
    pids = [int(word) for word in next(told).split()[1:]]
    try:
        for line in told:
            if int(line.split()[0]) >= 2:
                os.kill(pids[0], signal.SIGKILL)
                break
        process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).kill()
    assert process.returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "weights.npy"), undisturbed)
