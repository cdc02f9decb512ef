"""A cluster of real processes: what they are told, that their death is survived, and that none is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ClusterError, ClusterLost, WorkersKilled
from cluster.local import open_cluster, worker_options
from cluster.profiles import Profile, Resources
from cluster.watchdog import Watchdog, explain
from cluster.worker import describe_worker

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 700 * 2**20


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr("cluster.profiles.visible_gpus", lambda: ())


def gone(pid: int, within: float = 10.0) -> bool:
    """Whether the process ends (a zombie has ended) within so many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_workers_are_processes_with_one_blas_thread_and_a_memory_limit(tmp_path, monkeypatch):
    """Also: the driver's own variables are left alone, and nothing remains when the block ends."""
    monkeypatch.setenv("MINE", "driver")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    profile = Profile(
        workers=2,
        memory=MEMORY,
        blas_coretype="Haswell",
        environment={"MINE": "worker"},
        scratch=str(tmp_path / "scratch"),
    )
    before = dict(os.environ)
    with open_cluster(profile) as client:
        assert {name: value for name, value in os.environ.items() if before.get(name) != value} == {}
        workers = list(client.run(describe_worker).values())
        assert list(client.run(lambda: os.environ["MINE"]).values()) == ["worker", "worker"]
        assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert len({worker["pid"] for worker in workers} | {os.getpid()}) == 3
    for worker in workers:
        assert worker["memory_limit"] == MEMORY
        for library in worker["blas"]:
            assert library["threads"] == 1
            if library["name"] == "openblas":
                assert library["coretype"] == "Haswell"
        assert gone(worker["pid"])
    assert list((tmp_path / "scratch").iterdir()) == []


def test_serial_has_no_client():
    with open_cluster(Profile(kind="serial")) as client:
        assert client is None


def test_two_clusters_can_be_open_at_once(recwarn):
    """Without pages no port is claimed that another cluster on the machine may hold."""
    profile = Profile(workers=1, memory=MEMORY)
    with open_cluster(profile) as first, open_cluster(profile) as second:
        assert first.submit(os.getpid).result() != second.submit(os.getpid).result()
    assert [str(w.message) for w in recwarn if "Port" in str(w.message)] == []


def test_gpus_are_pinned_one_to_a_worker():
    options = worker_options(Resources(workers=3, memory=1, gpus=("0", "GPU-b")), "/scratch")
    assert [o["env"]["CUDA_VISIBLE_DEVICES"] for o in options] == ["0", "GPU-b", ""]
    assert [o.get("resources") for o in options] == [{"GPU": 1}, {"GPU": 1}, None]
    for plain in worker_options(Resources(workers=2, memory=1), "/scratch"):
        assert "env" not in plain
        assert "resources" not in plain


def test_a_killed_worker_is_replaced_and_its_task_done(tmp_path):
    """SIGKILL in the middle of a task: another worker does it, and the watchdog tells."""
    lines: list[str] = []

    def slow(name: str) -> str:
        with open(name, "a") as started:
            started.write(f"{os.getpid()}\n")
        time.sleep(1.5)
        return "done"

    with open_cluster(Profile(workers=2, memory=MEMORY)) as client:
        watchdog = Watchdog(client, 2, timeout=30, report=lines.append)
        future = client.submit(slow, str(tmp_path / "started"))
        deadline = time.monotonic() + 20
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int((tmp_path / "started").read_text()), signal.SIGKILL)
        while not future.done() or len(lines) == 0:
            watchdog.check()
            assert time.monotonic() < deadline + 20
            time.sleep(0.05)
        assert future.result() == "done"
        assert len((tmp_path / "started").read_text().split()) == 2
    assert watchdog.lost == 1
    assert lines[0].startswith("1 worker lost; ")


def test_a_cluster_without_workers_is_lost_not_waited_for():
    with open_cluster(Profile(workers=1, memory=MEMORY)) as client:
        watchdog = Watchdog(client, 1, timeout=0.5)
        client.cluster.scale(0)
        with pytest.raises(ClusterLost, match=r"no worker for .* run the same command again"):  # noqa: PT012
            for _ in range(400):
                watchdog.check()
                time.sleep(0.05)


@pytest.mark.slow
def test_a_task_that_needs_too_much_memory_ends_in_one_clear_error():
    def hog() -> int:
        blocks = []
        for _ in range(40):
            blocks.append(bytearray(b"x") * (50 * 2**20))
            time.sleep(0.02)
        return len(blocks)

    with open_cluster(Profile(workers=1, memory=500 * 2**20)) as client:
        future = client.submit(hog)
        error = future.exception(timeout=120)
        explained = explain(error)
        assert isinstance(explained, WorkersKilled)
        assert "(0.5 GiB)" in str(explained)
        assert "\n" not in str(explained)
        assert explained.exit_code == 7
        assert client.submit(os.getpid).result(timeout=60), "the cluster lives on"


def test_other_errors_are_not_the_clusters():
    assert explain(ValueError("a tile")) is None
    assert explain(OSError(28, "No space left on device")) is None
    mine = ClusterError("x")
    assert explain(mine) is mine


BUSY = """
import os, sys, time
from cluster.local import open_cluster
from cluster.profiles import Profile
if __name__ == "__main__":
    with open_cluster(Profile(workers=2, memory=700 * 2**20, scratch=sys.argv[1])) as client:
        futures = [client.submit(time.sleep, 600 + i) for i in range(4)]
        print(*client.run(os.getpid).values(), flush=True)
        client.gather(futures)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_driver(tmp_path, number):
    """Ctrl-C goes to the whole group as a terminal sends it; SIGKILL leaves the driver no time at all."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    scratch = tmp_path / "scratch"
    driver = subprocess.Popen(
        [sys.executable, str(script), str(scratch)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    workers = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(workers) == 2
    (os.killpg if number == signal.SIGINT else os.kill)(driver.pid, number)
    _, errors = driver.communicate(timeout=30)
    assert all(gone(pid) for pid in workers)
    if number == signal.SIGTERM:
        assert driver.returncode == 128 + number
        assert errors == ""
    if number != signal.SIGKILL:
        assert list(scratch.iterdir()) == []


def test_an_address_where_nobody_listens_is_named():
    profile = Profile(kind="address", address="tcp://127.0.0.1:9", worker_timeout=1)
    with (
        pytest.raises(ClusterError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"),
        open_cluster(profile),
    ):
        pass


def _quietly(module: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def scheduler_and_worker(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    address = folder / "scheduler.json"
    common = ["--scheduler-file", str(address), "--no-dashboard"]
    scheduler = _quietly("distributed.cli.dask_scheduler", *common, "--host", "127.0.0.1", "--port", "0")
    worker = _quietly(
        "distributed.cli.dask_worker", *common, "--nthreads", "1", "--local-directory", str(folder)
    )
    try:
        deadline = time.monotonic() + 30
        while not address.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield json.loads(address.read_text())["address"], scheduler
    finally:
        for process in (worker, scheduler):
            process.terminate()
        for process in (worker, scheduler):
            process.wait(30)


@pytest.mark.slow
def test_a_killed_scheduler_is_noticed(tmp_path):
    """Waiting futures fail in words, and the watchdog calls the cluster lost."""
    with scheduler_and_worker(tmp_path) as (address, scheduler):
        profile = Profile(kind="address", address=address, worker_timeout=30)
        with open_cluster(profile) as client:
            watchdog = Watchdog(client, 1, timeout=2)
            future = client.submit(time.sleep, 600)
            time.sleep(0.5)
            scheduler.kill()
            with pytest.raises(Exception, match="scheduler-connection-lost") as caught:
                future.result(timeout=60)
            assert isinstance(explain(caught.value), ClusterLost)
            with pytest.raises(ClusterLost):  # noqa: PT012
                for _ in range(600):
                    watchdog.check()
                    time.sleep(0.05)
