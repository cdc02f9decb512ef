"""Solves in processes of their own, to be killed: programs run as ``python PROGRAM SOURCE FOLDER OUT WORKERS DELAY``.

SOURCE: the store to solve with. FOLDER: where the solve keeps what it goes on from. OUT: gets the coefficients of all
ridges. WORKERS: processes, or 0 for the program alone. DELAY: seconds that every step takes longer. The program prints
its workers' process ids, where there are any, and the number of each step that is done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

PATIENCE = 300.0
IMPORTED = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
"""Where the programs and their workers import from."""


@dataclass(frozen=True)
class SolveRun:
    """Runs of one program on one store; each begins where the last one was killed."""

    program: Path
    source: Path
    folder: Path

    @property
    def site(self) -> Path:
        return self.folder / "solves" / "a"

    @property
    def out(self) -> Path:
        return self.folder / "out.npy"

    def finish(self) -> tuple[np.ndarray, list[int]]:
        """What a run that nobody disturbs finds, and the steps that it does."""
        process = self._start(0, 0.0)
        steps = list(_steps(process))
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        return np.load(self.out), steps

    def kill_driver(self, delay: float, at: Callable[[int], bool]) -> int:
        """Kill a run without warning at the first step where ``at`` holds; returns that step."""
        process = self._start(0, delay)
        reached = next(step for step in _steps(process) if at(step))
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        assert not self.out.exists()
        return reached

    def kill_worker(self, delay: float, at: int) -> np.ndarray:
        """What a run on two workers finds of which one is killed at a step."""
        process = self._start(2, delay)
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()[1:]]
        try:
            next(step for step in _steps(process) if step >= at)
            os.kill(pids[0], signal.SIGKILL)
            process.communicate(timeout=PATIENCE)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(process.pid).kill()
        assert process.returncode == 0
        return np.load(self.out)

    def _start(self, workers: int, delay: float) -> subprocess.Popen[str]:
        words = (self.source, self.site, self.out, workers, delay)
        return subprocess.Popen(
            [sys.executable, str(self.program), *map(str, words)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(IMPORTED)},
        )


def _steps(process: subprocess.Popen[str]) -> Iterator[int]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit():
            yield int(line)


def serve(solve: Callable[..., Sequence[np.ndarray]], steps: str) -> None:
    """Be such a program. solve: from the store's path, the site and what hears of progress to coefficients of each
    ridge. steps: word of the messages of those steps that count."""
    source, folder, out = (Path(word) for word in sys.argv[1:4])
    count, delay = int(sys.argv[4]), float(sys.argv[5])
    from cluster.worker import set_blas_environment

    set_blas_environment()
    from cluster.local import open_cluster
    from cluster.profiles import Profile
    from pipelines import tasks
    from pipelines.site import Site

    def told(done: int, total: int, message: str) -> None:
        if steps in message:
            print(done, flush=True)
            time.sleep(delay)

    with contextlib.ExitStack() as stack:
        workers = tasks.Workers()
        if count:
            client = stack.enter_context(open_cluster(Profile(workers=count)))
            workers = tasks.Workers(client, count)
            print("workers", *client.run(os.getpid).values(), flush=True)
        site = stack.enter_context(Site(folder, lambda: workers, 2**30, told))
        np.save(out, np.stack(solve(source, site, told)))
