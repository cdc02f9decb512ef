"""Features whose driver or worker is killed: the same command again computes only what was in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feature_driver
import psutil
import pytest
import small
from drivers import SECONDS, Driver, wait_for

from pipelines import leases, results
from pipelines.explicit import mapfiles

PROGRAM = Path(feature_driver.__file__)


class Runs(Driver):
    """Runs of ``feature_driver.py`` on one set of samples."""

    def start(self, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, str(PROGRAM), str(self.folder / "data"), *arguments]
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def finish(self, root: Path, workers: int = 0) -> list[int]:
        """Blocks made and found by a run that nobody disturbs."""
        out, _ = self.run(str(root), str(workers), "0")
        return [int(word) for word in out.split()]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    small.Samples(tmp_path / "data").write(feature_driver.SAMPLES)
    yield made
    for process in made.started:
        if process.poll() is None:
            made.kill(process)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of blocks and of the map that a run left which nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = Runs(folder)
    small.Samples(folder / "data").write(feature_driver.SAMPLES)
    assert runs.finish(folder / "root") == [
        1 + feature_driver.BLOCKS,
        1,
    ]  # the first block of preprocessed samples
    return kept(folder / "root")


def kept(root: Path) -> dict[str, bytes]:
    """Blocks of features and learned arrays by their place, as they lie on the disk."""
    files = [*root.glob("features/*/features/c/*/0"), *root.glob("maps/*/*.npy")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def made(root: Path) -> list[str]:
    return (root / "made").read_text().splitlines() if (root / "made").exists() else []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_driver_loses_only_blocks_in_flight(
    runs: Runs, root: Path, undisturbed: dict[str, bytes], workers: int
) -> None:
    """Protects hours of features: killed in the middle, run again, the same bits, and nothing is learned again."""
    process = runs.start(str(root), str(workers), "0.2")
    wait_for(lambda: len(made(root)) >= 4, process)
    runs.kill(process)
    left = [name for name in kept(root) if name.startswith("features")]
    assert 3 <= len(left) < feature_driver.BLOCKS
    assert runs.finish(root, workers) == [feature_driver.BLOCKS - len(left), 2 + len(left)]
    assert kept(root) == undisturbed
    assert made(root).count("learn") == 1
    # A block that was in flight at the kill may have been made twice, one for each worker; no other one.
    assert len(made(root)) <= 1 + feature_driver.BLOCKS + max(workers, 1)
    assert all(not leases.living(path) for path in root.glob("features/*"))


def test_a_driver_killed_while_it_learns_learns_again(
    runs: Runs, root: Path, undisturbed: dict[str, bytes]
) -> None:
    """Protects from half of a map: nothing lies under its name, and the next start learns the same."""
    process = runs.start(str(root), "0", "5")
    wait_for(lambda: made(root) == ["learn"], process)
    runs.kill(process)
    assert mapfiles.paths(root) == []
    runs.finish(root)
    assert made(root).count("learn") == 2
    assert kept(root) == undisturbed


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_only_its_blocks(
    runs: Runs, root: Path, undisturbed: dict[str, bytes]
) -> None:
    """Protects a stage from the loss of a worker: it goes on, and every bit is that of an undisturbed run."""
    process = runs.start(str(root), "2", "0.3")
    pids: set[int] = set()

    def one_computes() -> bool:
        pids.update(int(line.split()[1]) for line in made(root) if line != "learn")
        return any(psutil.pid_exists(pid) for pid in pids)

    wait_for(one_computes, process)
    os.kill(next(iter(pids)), signal.SIGKILL)
    out, err = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, err
    assert int(out.split()[0]) >= feature_driver.BLOCKS
    assert kept(root) == undisturbed


FEATURES = {"kind": "nystrom", "landmarks": 30, "selection": "k-means", "blocks": "stored"}


def outcome(driver: Driver, root: Path) -> tuple[dict[str, Any], bytes]:
    """What a run of an experiment with features comes to, and the weights of its model."""
    facts = driver.facts(root)
    (weights,) = root.glob("results/**/weights.npy")
    return {name: facts[name] for name in ("ridge", "validation_accuracy")}, weights.read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    driver = Driver(tmp_path_factory.mktemp("whole"))
    driver.write(features=FEATURES)
    return outcome(driver, driver.folder / "root")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["data", "features"])
def test_a_whole_run_on_features_killed_before_its_solve_is_resumed(
    driver: Driver, root: Path, expected: tuple[dict[str, Any], bytes], stage: str
) -> None:
    """Protects the stages of an experiment with features: killed in it, run again, the same weights bit by bit."""
    driver.write(features=FEATURES)
    process = driver.start(*driver.command(root), before=("--delay", "0.1"))

    def reached() -> bool:
        blocks = list(root.glob("features/*/features/c/*/0"))
        stages = [s["name"] for j in results.journals(root, "small") for s in j["stages"]]
        return stage in stages and (stage != "features" or len(blocks) >= 3)

    wait_for(reached)
    driver.kill(process)
    assert not list(root.glob("results/**/weights.npy"))
    assert outcome(driver, root) == expected
