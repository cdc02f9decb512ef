"""Leases: who works on a store, and who has died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import leases


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def test_a_lease_is_seen_while_it_is_held(store: Path) -> None:
    """Protects the sharing out of work: another driver sees holder and tiles, and nothing once it is closed."""
    with leases.Lease(store) as lease:
        lease.add([(0, 0), (1, 0)])
        (seen,) = leases.living(store)
        assert seen.tiles == {(0, 0), (1, 0)}
        assert (seen.pid, seen.host) == (os.getpid(), leases.host())
        assert f"process {os.getpid()}" in seen.holder
        assert leases.living(store, besides=lease.path) == []
        lease.remove([(0, 0)])
        lease.add([(2, 1)])
        assert leases.living(store)[0].tiles == {(1, 0), (2, 1)}
    assert leases.holders(store) == []
    assert list((store / "leases").iterdir()) == []


def test_the_heartbeat_keeps_a_lease_alive(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects long tiles: a holder that writes nothing else is still seen as living."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.02)
    with leases.Lease(store):
        first = leases.holders(store)[0].heartbeat
        deadline = time.monotonic() + 10
        while leases.holders(store)[0].heartbeat == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _change(path: Path, age: float = 0.0, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    written = path.stat().st_mtime - age
    os.utime(path, (written, written))


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, True),
        ({"age": 90.0}, False),
        ({"process_started": 12345.0}, False),
        ({"pid": 2**22 + 1}, False),
        ({"machine": "elsewhere", "pid": 2**22 + 1}, True),
        ({"machine": "elsewhere", "age": 90.0}, False),
    ],
    ids=["own", "silent", "number reused", "no such process", "other host", "other host, silent"],
)
def test_who_is_alive(store: Path, changes: dict[str, Any], alive: bool) -> None:
    """Protects takeover: dead processes, reused process numbers and silent hosts hold nothing."""
    with leases.Lease(store) as lease:
        _change(lease.path, **changes)
        assert [holder.alive for holder in leases.holders(store)] == [alive]
        assert leases.sweep(store) == int(not alive)
        assert len(leases.holders(store)) == int(alive)


def test_a_killed_process_holds_nothing(store: Path) -> None:
    """Protects takeover from a process killed without warning, also before its parent takes note of it."""
    code = (
        "import sys, time; from pathlib import Path; from pipelines import leases\n"
        "lease = leases.Lease(Path(sys.argv[1])); lease.add([(0, 0)]); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(store)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert [holder.pid for holder in leases.living(store)] == [child.pid]
        child.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while leases.living(store) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert leases.living(store) == []  # not waited for yet: the process is a zombie
    finally:
        child.kill()
        child.wait()
    assert leases.sweep(store) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tiles": 3}', '{"tiles": [[1]], "host": "x"}'])
def test_a_half_written_lease_is_no_lease(store: Path, text: str) -> None:
    """Protects readers from what a dying process or a full disk leaves behind."""
    (store / "leases").mkdir()
    (store / "leases" / "x.json").write_text(text)
    assert leases.holders(store) == []
    assert leases.living(store) == []


def test_a_lease_that_cannot_be_written_is_no_error(store: Path) -> None:
    """Protects a run on a full disk: leases are advice, the tiles themselves say what to do."""
    (store / "leases").write_text("a file where the folder should be")
    with leases.Lease(store) as lease:
        lease.add([(0, 0)])
    assert leases.living(store) == []


def test_a_journal_runs_while_its_process_does(tmp_path: Path) -> None:
    """Protects ``megagram status``: a run whose process is gone does not count as running."""
    value = {
        "state": "running",
        "machine": leases.machine(),
        "pid": os.getpid(),
        "process_started": leases.process_started(os.getpid()),
    }
    journal = tmp_path / "journal.json"
    journal.touch()
    assert leases.is_running(journal, value)
    assert not leases.is_running(journal, {**value, "state": "done"})
    assert not leases.is_running(journal, {**value, "process_started": 1.0})
    assert not leases.is_running(journal, {**value, "pid": 2**22 + 1})
    assert leases.is_running(journal, {**value, "machine": "elsewhere", "pid": 2**22 + 1})
    os.utime(journal, (1.0, 1.0))
    assert not leases.is_running(journal, {**value, "machine": "elsewhere"}), (
        "silent for longer than a run is"
    )
