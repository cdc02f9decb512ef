"""Advisory leases: which living process works on a store, and on which tiles.

Leases only share work out between drivers. Correctness rests on chunks being written once, so a lost or
a doubled lease costs time, never a wrong number.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import StoreError

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0


@lru_cache(maxsize=1)
def host() -> str:
    return socket.gethostname()


@lru_cache(maxsize=1)
def machine() -> str:
    """Tells apart machines, and containers, that share a name: only here does a pid mean something."""
    facts = [host()]
    for fact in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = Path(fact)
            facts.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return " ".join(facts)


@dataclass(frozen=True)
class Holder:
    """A lease as read from its file.

    heartbeat, now: when the file was last written, and the present, both by the clock of the file system:
    clocks of two machines may differ.
    """

    path: Path
    host: str
    machine: str
    pid: int
    process_started: float
    heartbeat: float
    tiles: frozenset[tuple[int, int]]
    now: float

    @property
    def holder(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def alive(self) -> bool:
        """The heartbeat is fresh and, on this machine, the process that took the lease still runs."""
        # Two seconds: the clock that start times are counted from may be set right meanwhile.
        if self.machine == machine() and abs(process_started(self.pid) - self.process_started) > 2:
            return False
        return self.now - self.heartbeat < EXPIRY_SECONDS


class Lease:
    """This process's lease on a store, kept alive by a thread until it is closed."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._path = store / "leases" / f"{host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        self._temporary = self._path.with_suffix(".tmp")
        self._tiles: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def add(self, tiles: Iterable[tuple[int, int]]) -> None:
        with self._lock:
            self._tiles.update(tiles)
            self._write()

    def remove(self, tiles: Iterable[tuple[int, int]]) -> None:
        # Written with the next addition or heartbeat: a tile that is stored needs no lease.
        with self._lock:
            self._tiles.difference_update(tiles)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for path in (self._path, self._temporary):
            with contextlib.suppress(OSError):
                path.unlink()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self._path

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._lock:
                self._write()

    def _write(self) -> None:
        value: dict[str, Any] = {
            "host": host(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()),
            "tiles": sorted(self._tiles),
            "machine": machine(),
        }
        # A lease is advice: where it cannot be written, on a full disk, tiles say what to do about it.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.write_text(json.dumps(value))
            os.replace(self._temporary, self._path)


def holders(store: Path) -> list[Holder]:
    """Every lease on a store, living or not."""
    found = []
    now = clock(store / "leases")
    for path in sorted((store / "leases").glob("*.json")):
        try:
            value = json.loads(path.read_text())
            tiles = frozenset((int(i), int(j)) for i, j in value["tiles"])
            found.append(
                Holder(
                    path,
                    value["host"],
                    value["machine"],
                    int(value["pid"]),
                    float(value["process_started"]),
                    path.stat().st_mtime,
                    tiles,
                    now,
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # vanished or half written by a dying process: no lease
    return found


def living(store: Path, besides: Path | None = None) -> list[Holder]:
    """The leases whose holders are alive, without the one at ``besides``."""
    return [lease for lease in holders(store) if lease.path != besides and lease.alive]


def sweep(store: Path) -> int:
    """Remove the leases of dead holders; how many there were."""
    dead = [lease for lease in holders(store) if not lease.alive]
    for lease in dead:
        lease.path.unlink(missing_ok=True)
    return len(dead)


def process_started(pid: int) -> float:
    """When a process of this machine started; 0.0 when there is none, so that a reused pid is told apart."""
    import psutil

    try:
        process = psutil.Process(pid)
        # A killed process whose parent has not asked for it yet is dead all the same.
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0
    except psutil.AccessDenied:
        return -1.0


def is_running(path: Path, value: dict[str, Any]) -> bool:
    """Whether the process that writes the journal ``value`` at ``path`` still runs.

    On this machine by its pid and start time, elsewhere by the age of the file, which a living run renews.
    """
    if value.get("state") != "running":
        return False
    if value.get("machine") == machine():
        return abs(process_started(int(value["pid"])) - float(value["process_started"])) <= 2
    try:
        return clock(path.parent) - path.stat().st_mtime < EXPIRY_SECONDS
    except OSError:
        return False


def clock(folder: Path) -> float:
    """The present by the clock of the file system that holds ``folder``, by this machine's where it cannot
    be written."""
    probe = folder / f".clock-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


@contextlib.contextmanager
def exclusive(store: Path) -> Iterator[None]:
    """Keep every other process from changing a store's shape; a lock left by a dead one is taken over.

    Raises:
        StoreError: another process holds it.
    """
    lock = store / "growing"
    try:
        lock.mkdir()
    except FileExistsError:
        if clock(store) - lock.stat().st_mtime < EXPIRY_SECONDS:
            raise StoreError(f"{store}: another process takes in appended samples; try again") from None
        os.utime(lock)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.rmdir()
