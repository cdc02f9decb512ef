"""Real drivers, in processes of their own, to be killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import small

from pipelines.stores import GramStore

DRIVER = Path(__file__).with_name("faults") / "driver.py"
SIDE = 16
TILES = 44
"""That the experiment needs: all of the lower triangle but the last tile, in which no training sample is."""
SECONDS = 180.0


@dataclass
class Driver:
    """Runs of one experiment file by ``driver.py``, and what they left under a root."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: {**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    side: int = SIDE
    started: list[subprocess.Popen] = field(default_factory=list)

    def write(self, **sections: Any) -> Path:
        """The experiment file: 144 samples, nine tiles of 16 wide."""
        samples = small.Samples(self.folder / "data").write(144)
        table = samples.table(data={"train": 120, "validation": 24}, **sections)
        path = self.folder / "e.toml"
        path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in table.items()))
        return path

    def start(self, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, str(DRIVER), str(self.side), *before, *arguments]
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, before: tuple[str, ...] = (), code: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that ends with ``code``."""
        out, err = self.start(*arguments, before=before).communicate(timeout=SECONDS)
        assert self.started[-1].returncode == code, (out, err)
        return out, err

    def facts(self, root: Path, *arguments: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
        """The JSON of a run of the experiment that succeeds."""
        out, _ = self.run(*self.command(root, *arguments), "--json", before=before)
        return json.loads(out.splitlines()[-1])

    def command(self, root: Path, *arguments: str) -> tuple[str, ...]:
        """Arguments of a run of the experiment, in one process unless another profile is given."""
        cluster = () if "--cluster" in arguments else ("--cluster", "serial")
        return ("run", str(self.folder / "e.toml"), "--root", str(root), *cluster, *arguments)

    def kill(self, process: subprocess.Popen) -> None:
        """Kill a driver and what it started, without warning and the driver first."""
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate(timeout=SECONDS)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@dataclass(frozen=True)
class Undisturbed:
    """A finished run of the experiment that every driver runs. tiles: the bytes of each by its place."""

    root: Path
    facts: dict[str, Any]
    tiles: dict[str, bytes]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Wait until ``condition`` holds; an error after three minutes, or when ``process`` ends before."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate())
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def tile_files(root: Path) -> dict[str, bytes]:
    """Every tile under a root by its place in its store, its bytes as they lie on the disk."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.glob("gram/*/gram/c/*/*")
        if path.suffix != ".partial"
    }


def tiles_computed(store: str) -> list[tuple[int, int]]:
    """Tiles of a store as often as its records say that they were computed."""
    return [tuple(tile) for line in GramStore(Path(store)).records() for tile in line.get("tiles", ())]


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk up to ``leave`` bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
    return ballast


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + " }"
    return json.dumps(value)
