"""``megagram server``: found while it lives, never when it does not, gone when told to go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prefect_servers import free_port, running_server

from flows import server
from flows.server import ServerError, describe_server, find_recorded_server, home_folder, serve

ROOT = Path(__file__).resolve().parents[2]


def record(home: Path, **changes: object) -> None:
    facts = {"url": "http://127.0.0.1:9/api", "pid": os.getpid(), "started": time.time(), **changes}
    (home / "server.json").write_text(json.dumps(facts))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_home_is_the_users_choice_else_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAGRAM_HOME", str(tmp_path / "mine"))
    assert home_folder() == tmp_path / "mine"
    monkeypatch.delenv("MEGAGRAM_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert home_folder() == tmp_path / "megagram"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert home_folder() == Path.home() / ".local/share/megagram"


def test_no_record_no_server(tmp_path):
    assert find_recorded_server(tmp_path) is None
    assert "megagram server" in describe_server(tmp_path)


def test_the_record_of_a_dead_process_is_ignored_without_asking_its_address(tmp_path, monkeypatch):
    """Its port may by now belong to anybody."""
    monkeypatch.setattr(server, "is_healthy", lambda url: pytest.fail("asked"))
    record(tmp_path, pid=ended_process())
    assert find_recorded_server(tmp_path) is None


def test_a_record_whose_server_does_not_answer_is_ignored(tmp_path):
    record(tmp_path)
    assert find_recorded_server(tmp_path) is None


@pytest.mark.parametrize("text", ["", '{"url": "http://', "[]", '{"url": "x"}', '{"url": 1, "pid": "a"}'])
def test_a_damaged_record_is_ignored(tmp_path, text):
    (tmp_path / "server.json").write_text(text)
    assert find_recorded_server(tmp_path) is None


def test_a_living_record_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "is_healthy", lambda url: url == "http://here:1/api")
    record(tmp_path, url="http://here:1/api", started=time.time() - 120)
    found = find_recorded_server(tmp_path)
    assert found is not None
    assert found.ui == "http://here:1"
    assert f"http://here:1 (process {os.getpid()}), running for 2 minutes" in describe_server(tmp_path)
    with pytest.raises(ServerError, match="running already: http://here:1"):
        serve(home=tmp_path)


def test_a_taken_port_is_named_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"cannot listen at 127\.0\.0\.1:{port} .*--port"):
            serve(port=port, home=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "nonsense://")
    monkeypatch.setattr(server.sys, "executable", "/bin/false")
    with pytest.raises(ServerError, match=rf"did not start; its last words: none \(more in {tmp_path}"):
        serve(home=tmp_path, port=free_port(), report=lambda line: None)
    assert not (tmp_path / "server.json").exists()


@pytest.mark.slow
def test_the_pages_call_the_port_that_the_server_listens_on(prefect_server):
    with urllib.request.urlopen(f"{prefect_server.record.ui}/ui-settings", timeout=20) as answer:
        assert json.load(answer)["api_url"] == prefect_server.record.url


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_with_its_command(tmp_path, number):
    """Ctrl-C and SIGTERM: the record is removed, the process gone, the database kept."""
    with running_server(tmp_path) as running:
        running.process.send_signal(number)
        assert running.process.wait(30) == 0
        assert not (tmp_path / "server.json").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(running.record.pid, 0)
    assert (tmp_path / "prefect" / "prefect.db").exists()
