"""What the command adds to its bare stages: ``megagram run quickstart`` from a shell, end to end.

Bare stages are those that the run's journal lists with their seconds, the cluster's start among them; all
else of the command's wall time, from the interpreter's start to its end, is overhead. Once with no Prefect
server, once against a running one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common

MOST_OVERHEAD = 5.0
MOST_TO_ANSWER = 1.0
SERVER_START = 300.0


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("overhead", "What the command adds to its stages", options)
    repeats = 1 if options.quick else 3
    with TemporaryDirectory(prefix="megagram-benchmark-") as scratch:
        home = Path(scratch, "home")
        plain = environment(home)
        root = Path(scratch, "root")
        first = run_quickstart(plain, root)
        again = [run_quickstart(plain, root) for _ in range(repeats)]
        show(report, "quickstart, first run, no server", [first])
        show(report, "quickstart, run again, no server", again)
        for what, words in (
            ("megagram --help", ["--help"]),
            ("megagram status quickstart", ["status", "quickstart", "--root", str(root)]),
        ):
            seconds = min(megagram(plain, *words)[0] for _ in range(repeats + 2))
            report.add(
                what,
                f"{seconds:.2f} s",
                target="under a second",
                ratio=f"{seconds / MOST_TO_ANSWER:.2f}",
                met=seconds < MOST_TO_ANSWER,
            )
        with server(home, report) as url:
            served = plain | {"PREFECT_API_URL": url}
            other = Path(scratch, "other")
            show(report, "quickstart, first run, against a server", [run_quickstart(served, other)])
            show(
                report,
                "quickstart, run again, against a server",
                [run_quickstart(served, other) for _ in range(repeats)],
            )
    report.note(f"medians of {repeats} runs; --help and status: the best of {repeats + 2}")
    report.finish()


def show(report: common.Report, what: str, runs: list[tuple[float, dict[str, Any]]]) -> None:
    bare = statistics.median(stages(journal) for _, journal in runs)
    wall = statistics.median(seconds for seconds, _ in runs)
    overhead = statistics.median(seconds - stages(journal) for seconds, journal in runs)
    report.add(
        what,
        f"{wall:.1f} s, of which stages {bare:.1f} s",
        target=f"at most {MOST_OVERHEAD:.0f} s more than its stages",
        ratio=f"{overhead:.1f} s",
        met=overhead <= MOST_OVERHEAD,
    )
    each = ", ".join(f"{stage['name']} {stage['seconds']:.2f}" for stage in runs[-1][1]["stages"])
    report.note(f"{what}: {each} s; {runs[-1][1]['engine']}")


def stages(journal: dict[str, Any]) -> float:
    return sum(stage["seconds"] for stage in journal["stages"])


def run_quickstart(variables: dict[str, str], root: Path) -> tuple[float, dict[str, Any]]:
    """Wall seconds of the command, and the journal that it left."""
    from pipelines.results import journals

    seconds, output = megagram(variables, "run", "quickstart", "--root", str(root), "--json")
    engine = json.loads(output.splitlines()[-1])["engine"]
    return seconds, {**journals(root, "quickstart")[0], "engine": engine}


def megagram(variables: dict[str, str], *words: str) -> tuple[float, str]:
    """Wall seconds of one command, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command(*words), env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"megagram {' '.join(words)} failed:\n{done.stderr}")
    return seconds, done.stdout


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *words]


def environment(home: Path) -> dict[str, str]:
    """As a user's shell has it: the libraries choose their own threads, and no server is configured."""
    own = {"PYTHONPATH": str(common.HERE.parents[1]), "MEGAGRAM_HOME": str(home), "PREFECT_HOME": str(home)}
    dropped = {*common.blas_environment(common.Profile()), "PREFECT_API_URL", "PREFECT_PROFILE"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | own


@contextmanager
def server(home: Path, report: common.Report) -> Iterator[str]:
    """A server as ``megagram server`` starts it; yields the address of its API."""
    from flows.server import is_healthy

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    started = time.perf_counter()
    process = subprocess.Popen(
        command("server", "--port", str(port)),
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not is_healthy(url):
            if process.poll() is not None or time.perf_counter() - started > SERVER_START:
                raise SystemExit("megagram server does not start")
            time.sleep(0.3)
        report.note(f"megagram server took {time.perf_counter() - started:.0f} s to start, not counted")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


if __name__ == "__main__":
    main()
