"""What the benchmarks share: timers, child processes, memory readings, and the table that they print.

To be imported before NumPy: it sets the linear algebra library to one thread, and to the core type that
workers use.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# The code that is measured is the code beside this file, whatever is installed.
sys.path.insert(0, str(HERE.parents[1]))

from cluster.profiles import Profile, available_memory  # noqa: E402
from cluster.worker import blas_environment, describe_worker  # noqa: E402

os.environ.update(blas_environment(Profile()))

RAM_DISK = Path("/dev/shm")
LIBRARIES = ("numpy", "scipy", "zarr", "distributed", "scikit-learn", "prefect")
T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """What a call took: wall seconds, CPU seconds of this process's threads, and what it returned."""

    wall: float
    cpu: float
    value: Any = None


@dataclass(frozen=True)
class Options:
    """The command line of every benchmark. quick: small sizes, to see that it works."""

    quick: bool
    write: bool


class Report:
    """A table of figures beside their targets, with the machine that they were taken on."""

    def __init__(self, name: str, title: str, options: Options) -> None:
        self._path = RESULTS / f"{name}.md"
        self._title = title
        self._options = options
        self._load = os.getloadavg()[0]
        self._rows: list[tuple[str, ...]] = []
        self._notes: list[str] = []

    def add(
        self, what: str, figure: str, *, target: str = "", ratio: str = "", met: bool | None = None
    ) -> None:
        """One row; ``met`` is None where there is no target. Printed at once, as runs take minutes."""
        verdict = "" if met is None else "met" if met else "**missed**"
        self._rows.append((what, target, figure, ratio, verdict))
        print(f"  {what}: {figure}" + "".join(f"; {part}" for part in (ratio, target, verdict) if part))

    def note(self, text: str) -> None:
        self._notes.append(text)
        print(f"  ({text})")

    def finish(self) -> None:
        """Print the table; with ``--write`` keep it under ``results``."""
        text = "\n\n".join(part for part in (f"# {self._title}", self._machine(), self._table()) if part)
        if self._notes:
            text += "\n\n" + "\n".join(f"- {note}" for note in self._notes)
        print(f"\n{text}")
        if self._options.write:
            self._path.write_text(text + "\n", encoding="utf-8")

    def _table(self) -> str:
        header = ("what", "target", "figure", "ratio", "verdict")
        lines = [header, tuple("---" for _ in header), *self._rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _machine(self) -> str:
        worker = describe_worker()
        blas = ", ".join(
            sorted({f"{b['name']} {b['version']} {b['coretype']} x{b['threads']}" for b in worker["blas"]})
        )
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
        quick = " Quick sizes: figures mean little." if self._options.quick else ""
        return (
            f"{date.today().isoformat()} · {worker['cpu']}, {worker['cores']} cores,"
            f" {available_memory() / 1e9:.0f} GB free, load {self._load:.1f} before the start · BLAS {blas} ·"
            f" Python {platform.python_version()}, {versions}.{quick}"
        )


def options(description: str) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--write", action="store_true", help=f"keep the table under {RESULTS.name}/")
    given = parser.parse_args()
    return Options(given.quick, given.write)


def timed(function: Callable[[], Any]) -> Timed:
    """Call once."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, value)


def interleaved(functions: Mapping[str, Callable[[], Timed]], repeats: int) -> dict[str, list[Timed]]:
    """Call all in turn, ``repeats`` times and every other time in reverse: what else happens on the machine
    then meets all of them alike."""
    measured: dict[str, list[Timed]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name in list(functions) if turn % 2 == 0 else reversed(functions):
            measured[name].append(functions[name]())
    return measured


def best_wall(runs: Iterable[Timed]) -> float:
    return min(run.wall for run in runs)


def best_cpu(runs: Iterable[Timed]) -> float:
    return min(run.cpu for run in runs)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of neighbours in time."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function`` in a new process, whose memory and imports are its own; returns what it returns."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Begin a new high-water mark of this process's resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used so far."""
    import psutil

    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def system_seconds(pids: Iterable[int]) -> float:
    """What of them went to the system: files, and memory that is touched for the first time."""
    import psutil

    return sum(psutil.Process(pid).cpu_times().system for pid in pids)


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
