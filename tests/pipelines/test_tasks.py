"""Driving tasks: every one done, few in flight, retries where they can help, no waiting for ever."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernels.base import KernelError
from kernels.fused import VARIABLE, asked
from pipelines import tasks
from pipelines.errors import DiskFull, StoreError


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A Dask cluster inside this process: the protocol is real, the workers are threads."""
    from distributed import Client

    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


@pytest.fixture(params=["here", "dask"])
def workers(request: pytest.FixtureRequest) -> tasks.Workers:
    if request.param == "here":
        return tasks.Workers()
    return tasks.Workers(request.getfixturevalue("client"), 2)


def double(task: int, folder: Path | None = None) -> int:
    if folder is not None:
        with (folder / str(task)).open("a") as stream:
            stream.write("x")
    return 2 * task


def tries(folder: Path) -> Counter[str]:
    return Counter({path.name: path.stat().st_size for path in folder.iterdir()})


def failing(task: int, folder: Path, error: Exception, times: int) -> int:
    double(task, folder)
    if task == 3 and tries(folder)["3"] <= times:
        raise error
    return task


def test_every_task_is_done_once(workers: tasks.Workers, tmp_path: Path) -> None:
    """Protects the loop: all tasks, each with its own result, none twice."""
    done = dict(tasks.run(double, tasks.Listed(list(range(40))), (tmp_path,), workers))
    assert done == {k: 2 * k for k in range(40)}
    assert set(tries(tmp_path).values()) == {1}


def test_nothing_to_do(workers: tasks.Workers) -> None:
    """Protects runs that find everything stored."""
    assert list(tasks.run(double, tasks.Listed([]), (), workers)) == []


class Watched:
    """A source that makes its consumer wait, and counts what is in flight."""

    def __init__(self, n: int, waits: int) -> None:
        self.left = list(range(n))
        self.waits = waits
        self.flying = self.most = 0

    def next(self) -> int | tasks.Wait | None:
        if self.left and (self.waits == 0 or len(self.left) > 2):
            self.flying += 1
            self.most = max(self.most, self.flying)
            return self.left.pop(0)
        if self.waits:
            self.waits -= 1
            return tasks.WAIT
        return None

    def done(self, task: int) -> None:
        self.flying -= 1


def test_a_source_may_ask_to_wait(workers: tasks.Workers) -> None:
    """Protects sharing with another driver: what it holds is asked for again, and nothing is lost."""
    source = Watched(12, waits=3)
    assert sorted(task for task, _ in tasks.run(double, source, (), workers)) == list(range(12))
    assert (source.flying, source.waits) == (0, 0)


def test_few_tasks_are_in_flight(client: Any) -> None:
    """Protects the scheduler from a million tasks at once: three for each worker."""
    source = Watched(60, waits=0)
    list(tasks.run(double, source, (), tasks.Workers(client, 2)))
    assert source.most == 6


def test_failures_that_may_pass_are_tried_again(client: Any, tmp_path: Path) -> None:
    """Protects against a shaky file system: two more tries, then the error itself."""
    error = OSError(errno.EIO, "input/output error")
    work = tasks.Workers(client, 2)
    done = dict(tasks.run(failing, tasks.Listed(list(range(6))), (tmp_path, error, tasks.RETRIES), work))
    assert sorted(done) == list(range(6))
    assert tries(tmp_path)["3"] == tasks.RETRIES + 1
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(OSError, match="input/output error"):
        list(tasks.run(failing, tasks.Listed(list(range(6))), (tmp_path, error, 99), work))
    assert tries(tmp_path)["3"] == tasks.RETRIES + 1


@pytest.mark.parametrize(
    "error",
    [
        StoreError("wrong"),
        DiskFull("full"),
        ValueError("bug"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failures_that_stay_are_raised_at_once(
    workers: tasks.Workers, tmp_path: Path, error: Exception
) -> None:
    """Protects time and messages: a user's error, a bug or a full disk is not tried again."""
    with pytest.raises(type(error), match=str(error).split("]")[-1].strip()):
        list(tasks.run(failing, tasks.Listed(list(range(6))), (tmp_path, error, 99), workers))
    assert tries(tmp_path)["3"] == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, ""), True),
        (ConnectionResetError(errno.ECONNRESET, ""), True),
        (TimeoutError(), True),
        (OSError(errno.ENOSPC, ""), False),
        (OSError(errno.EDQUOT, ""), False),
        (OSError(errno.EROFS, ""), False),
        (MemoryError(), False),
        (DiskFull(""), False),
    ],
    ids=repr,
)
def test_which_failures_may_pass(error: Exception, passes: bool) -> None:
    """Protects the list of failures that trying again can help."""
    assert tasks.may_pass(error) == passes


def test_a_lost_cluster_ends_the_loop(client: Any) -> None:
    """Protects from waiting for ever: the check is asked while tasks run, and its error is raised."""

    def check() -> None:
        raise StoreError("the cluster is lost")

    started = time.monotonic()
    with pytest.raises(StoreError, match="lost"):
        list(tasks.run(time.sleep, tasks.Listed([0.5] * 4), (), tasks.Workers(client, 2, None, check)))
    assert time.monotonic() - started < 20


def test_tasks_left_over_are_cancelled(client: Any) -> None:
    """Protects workers from work that nobody waits for: a driver that stops takes its tasks back."""
    running = tasks.run(time.sleep, tasks.Listed([0.05, *[0.5] * 9]), (), tasks.Workers(client, 2))
    next(running)
    assert any(client.processing().values())
    running.close()
    deadline = time.monotonic() + 10
    while any(client.processing().values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_task_taken_back_from_outside_is_done_all_the_same(client: Any) -> None:
    """Protects a run from futures that are cancelled, as Dask does with those of a worker that is retired."""
    from distributed import Future

    taken: list[str] = []

    def check() -> None:
        if not taken:
            taken.extend(list(client.futures)[:1])
            client.cancel([Future(key, client) for key in taken], force=True)

    work = tasks.Workers(client, 2, None, check)
    done = [task for task, _ in tasks.run(time.sleep, tasks.Listed([0.2, 0.21, 0.22, 0.23]), (), work)]
    assert taken
    assert sorted(done) == [0.2, 0.21, 0.22, 0.23]


# What workers are told.


def path_asked(task: int = 0) -> str:
    time.sleep(0.05)  # so that tasks meet on the workers, which are threads of this process
    return asked()


def test_workers_take_the_path_they_are_told(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a profile's kernel path on workers that were started elsewhere, in another environment."""
    monkeypatch.setenv(VARIABLE, "general")
    leave = tasks.Workers(client, 2)
    assert tasks.ask(leave, path_asked) == "general"
    told = tasks.Workers(client, 2, kernel_path="compiled")
    assert [path for _, path in tasks.run(path_asked, tasks.Listed([1, 2, 3]), (), told)] == ["compiled"] * 3
    assert tasks.ask(told, path_asked) == "compiled"
    assert tasks.ask(leave, path_asked) == "general"  # once they are done, workers are as they were


def test_this_process_is_asked_when_there_is_no_cluster() -> None:
    """Protects plans of serial profiles; errors come through as they are."""
    assert tasks.ask(tasks.Workers(), double, 4) == 8
    with pytest.raises(TypeError):
        tasks.ask(tasks.Workers(), double, None)


def test_errors_of_asked_workers_come_through(client: Any) -> None:
    """Protects the message of a path that a worker lacks."""
    with pytest.raises(KernelError, match="no such path"):
        tasks.ask(tasks.Workers(client, 2), refuse)


def refuse() -> None:
    raise KernelError("no such path")
