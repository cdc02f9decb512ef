"""A real Prefect server for tests, started as ``megagram server`` starts one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.server import RecordedServer, find_recorded_server

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class PrefectServer:
    """A server that ``megagram server`` runs. process: that command; home: its MEGAGRAM_HOME."""

    home: Path
    process: subprocess.Popen
    record: RecordedServer

    def ask(self, path: str, **question: Any) -> Any:
        """The API's answer to a POST of ``question``."""
        request = urllib.request.Request(
            f"{self.record.url}/{path}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def runs(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        """Flow runs or task runs (``kind``) that the filter ``wanted`` lets through, oldest first."""
        return sorted(self.ask(f"{kind}/filter", **wanted), key=lambda run: run["created"])

    def environment(self) -> dict[str, str]:
        """Variables of a process that should find this server by its record alone."""
        return clean_environment(self.home)


def clean_environment(home: Path) -> dict[str, str]:
    """Variables of a process that knows of no Prefect server but one recorded below ``home``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {
        **kept,
        "MEGAGRAM_HOME": str(home),
        "PREFECT_HOME": str(home / "client"),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[PrefectServer]:
    """Run ``serve`` in a process of its own until the block ends."""
    script = f"from flows.server import serve; serve(port={free_port()})"
    with open(home / "serve.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=clean_environment(home), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while (record := find_recorded_server(home)) is None:
            assert process.poll() is None, (home / "serve.log").read_text()
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.2)
        yield PrefectServer(home, process, record)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
