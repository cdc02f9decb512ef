"""``megagram server``: a Prefect server that runs for as long as the command does, its database kept between.

A server takes tens of seconds to start, so no run starts one. This command writes down where its server
is, and runs of the same user find it there.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from pipelines.errors import MegagramError

STARTING = 300.0
"""Seconds that a server may take to start; the first start also makes its database."""

_STOPPING = 15.0
_HEALTH_TIMEOUT = 1.0


class ServerError(MegagramError):
    """The Prefect server does not start, or has ended by itself."""


@dataclass(frozen=True)
class RecordedServer:
    """A server that ``megagram server`` started. url: of its API; pid: its process; started: Unix time."""

    url: str
    pid: int
    started: float

    @property
    def ui(self) -> str:
        """Address of its pages."""
        return self.url.removesuffix("/api")


def home_folder() -> Path:
    """Where megagram keeps what belongs to the user: MEGAGRAM_HOME, else the XDG data folder."""
    if home := os.environ.get("MEGAGRAM_HOME"):
        return Path(home).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "megagram"


def is_healthy(url: str, timeout: float = _HEALTH_TIMEOUT) -> bool:
    """Whether a Prefect API answers at ``url`` (with ``/api``) within ``timeout`` seconds."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        # Prefect's cloud has no such page below a workspace; that it answers is enough.
        return "/workspaces/" in url and error.code < 500
    except (OSError, ValueError, http.client.HTTPException):
        return False


def find_recorded_server(home: Path | None = None) -> RecordedServer | None:
    """The server that ``megagram server`` started, if it lives and answers; a stale record is ignored."""
    server = _read_record(home or home_folder())
    if server is None or not _alive(server.pid) or not is_healthy(server.url):
        return None
    return server


def describe_server(home: Path | None = None) -> str:
    """One sentence on the server that ``megagram server`` started."""
    server = find_recorded_server(home)
    if server is None:
        return "no Prefect server is running; 'megagram server' starts one"
    minutes = (time.time() - server.started) / 60
    return f"Prefect server at {server.ui} (process {server.pid}), running for {minutes:.0f} minutes"


def serve(
    host: str = "127.0.0.1",
    port: int = 4200,
    home: Path | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Start a Prefect server and stay until Ctrl-C or SIGTERM, which also end the server.

    Its database and log lie in ``home``; ``report`` gets lines for the user. From the moment it answers
    until it ends, ``find_recorded_server`` finds it.

    Raises:
        ServerError: one is running already, the port is taken, or the server ends by itself.
    """
    home = home or home_folder()
    if running := find_recorded_server(home):
        raise ServerError(f"a Prefect server is running already: {running.ui} (process {running.pid})")
    _require_free(host, port)
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://{socket.gethostname() if host in ('0.0.0.0', '::') else host}:{port}/api"
    log = home / "server.log"
    report(f"starting a Prefect server, its database in {home}; the first start takes up to a minute")
    with _sigterm_interrupts(), _child(host, port, url, home, log) as child:
        try:
            _wait_until_healthy(child, url, log)
            _write_record(home, RecordedServer(url, child.pid, time.time()))
            report(f"Prefect is at {url.removesuffix('/api')}; runs show there from now on. Ctrl-C stops it.")
            child.wait()
            raise ServerError(f"the Prefect server ended with status {child.returncode}; {_tail(log)}")
        except KeyboardInterrupt:
            report("stopping the Prefect server")
        finally:
            _record(home).unlink(missing_ok=True)


def server_environment(host: str, port: int, url: str, home: Path) -> dict[str, str]:
    """Variables of the server's process; a database that the user has chosen stays."""
    return {
        **os.environ,
        "PREFECT_HOME": str(home / "prefect"),
        # All three: the pages call the port of the settings, not the one the server listens on.
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


@contextlib.contextmanager
def _child(host: str, port: int, url: str, home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command,
            env=server_environment(host, port, url, home),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the server in order
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOPPING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_until_healthy(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTING
    while not is_healthy(url):
        if child.poll() is not None:
            raise ServerError(f"the Prefect server did not start; {_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the Prefect server does not answer after {STARTING:.0f} s; {_tail(log)}")
        time.sleep(0.3)


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another port with --port"
            ) from error


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"its last words: {lines[-1].strip() if lines else 'none'} (more in {log})"


def _record(home: Path) -> Path:
    return home / "server.json"


def _write_record(home: Path, server: RecordedServer) -> None:
    temporary = home / f"server.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(server)))
    temporary.replace(_record(home))


def _read_record(home: Path) -> RecordedServer | None:
    try:
        record = json.loads(_record(home).read_text())
        return RecordedServer(str(record["url"]), int(record["pid"]), float(record["started"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut short
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
