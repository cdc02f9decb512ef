"""A driver for each test, ended with it; and one run that nothing disturbed, to compare with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from drivers import TILES, Driver, Undisturbed, tile_files


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path)
    made.write()
    yield made
    for process in made.started:
        if process.poll() is None:
            made.kill(process)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    driver = Driver(tmp_path_factory.mktemp("undisturbed"))
    driver.write()
    root = driver.folder / "root"
    facts = driver.facts(root)
    assert facts["tiles_computed"] == TILES
    return Undisturbed(root, facts, tile_files(root))


@pytest.fixture
def finished(undisturbed: Undisturbed, root: Path) -> Path:
    """A root with that run in it, to be spoilt."""
    shutil.copytree(undisturbed.root, root, symlinks=True)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, 1 MiB large."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)
