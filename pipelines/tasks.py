"""Driving many tasks over few workers: a bounded window of futures, retries, a look at the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from kernels.fused import path_told

from .errors import may_pass

T = TypeVar("T")
RETRIES = 2

WINDOW = 3
"""Tasks in flight for each worker."""


class Wait:
    """What a source of tasks answers when others hold what is left: ask again later."""


WAIT = Wait()


class Source(Protocol[T]):
    """Hands out tasks one at a time: a task, WAIT, or None when there is none left."""

    def next(self) -> T | Wait | None: ...

    def done(self, task: T) -> None: ...


@dataclass
class Listed(Generic[T]):
    """A source that hands out a list."""

    tasks: list[T]
    _position: int = field(default=0, init=False)

    def next(self) -> T | Wait | None:
        if self._position == len(self.tasks):
            return None
        self._position += 1
        return self.tasks[self._position - 1]

    def done(self, task: T) -> None:
        return None


@dataclass(frozen=True)
class Workers:
    """Where tasks run: a Dask client, or this process when there is none.

    check: called every second or so; raises when the cluster is lost. kernel_path: what the workers are told to
    take for convolutional kernels, in whatever environment they were started; empty leaves it to that.
    """

    client: Any = None
    count: int = 1
    resources: dict[str, float] | None = None
    check: Callable[[], None] = lambda: None
    kernel_path: str = ""


Open = Callable[[], Workers]
"""Opens the workers when the first task needs them: a run that finds everything stored starts none."""


def run(
    function: Callable[..., Any],
    source: Source[T],
    arguments: tuple[Any, ...],
    workers: Workers,
    owner: Callable[[T], int] | None = None,
) -> Iterator[tuple[T, Any]]:
    """Yield (task, function(task, *arguments)) as tasks finish, at most ``WINDOW`` a worker in flight.

    owner: a number for each task; tasks of one number go to one worker where that is possible, which then has
    in its cache what they share.

    A task that fails in a way that may pass is tried twice more; any other failure cancels what is in
    flight and is raised.
    """
    if workers.client is None:
        yield from _run_here(function, source, arguments)
    else:
        yield from _run_on(workers, function, source, arguments, owner)


def ask(workers: Workers, function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` of one worker, or of this process when there is no client."""
    if workers.client is None:
        return function(*arguments)
    return _submit(workers, function, *arguments).result()


def _submit(
    workers: Workers, function: Callable[..., Any], *arguments: Any, preferred: str | None = None
) -> Any:
    return workers.client.submit(
        _run_told,
        workers.kernel_path,
        function,
        *arguments,
        pure=False,
        resources=workers.resources,
        workers=preferred,
        allow_other_workers=preferred is not None,
    )


def _run_told(kernel_path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs on a worker."""
    with path_told(kernel_path):
        return function(*arguments)


def _run_here(
    function: Callable[..., Any], source: Source[T], arguments: tuple[Any, ...]
) -> Iterator[tuple[T, Any]]:
    while (task := source.next()) is not None:
        if isinstance(task, Wait):
            time.sleep(0.2)
            continue
        # As on a worker: one thread. Several spend their time waiting where products are small.
        with threadpool_limits(1, user_api="blas"):
            result = _tried(function, task, arguments)
        source.done(task)
        yield task, result


def _tried(function: Callable[..., Any], task: T, arguments: tuple[Any, ...]) -> Any:
    for left in range(RETRIES, -1, -1):
        try:
            return function(task, *arguments)
        except Exception as error:
            if not left or not may_pass(error):
                raise
    raise AssertionError("unreachable")


def _run_on(
    workers: Workers,
    function: Callable[..., Any],
    source: Source[T],
    arguments: tuple[Any, ...],
    owner: Callable[[T], int] | None,
) -> Iterator[tuple[T, Any]]:
    from distributed import wait

    client = workers.client
    addresses = sorted(client.scheduler_info(n_workers=-1)["workers"]) if owner else []
    pending: dict[Any, tuple[T, int]] = {}

    def submit(task: T, tries: int) -> None:
        preferred = addresses[owner(task) % len(addresses)] if owner and addresses else None
        future = _submit(workers, function, task, *arguments, preferred=preferred)
        pending[future] = (task, tries)

    window = WINDOW * max(workers.count, 1)
    exhausted = False
    try:
        while True:
            while not exhausted and len(pending) < window:
                task = source.next()
                if task is None:
                    exhausted = True
                elif isinstance(task, Wait):
                    break
                else:
                    submit(task, 0)
            if not pending:
                if exhausted:
                    return
                time.sleep(0.2)
                workers.check()
                continue
            try:
                finished = wait(list(pending), timeout=1.0, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                finished = set()
            workers.check()
            for future in finished:
                task, tries = pending.pop(future)
                error = future.exception() if future.status == "error" else None
                if future.status == "finished":
                    source.done(task)
                    yield task, future.result()
                elif error is not None and may_pass(error) and tries < RETRIES:
                    submit(task, tries + 1)
                elif error is not None:
                    raise error
                elif tries < RETRIES:  # cancelled with its worker or scheduler: the check says which
                    workers.check()
                    submit(task, tries + 1)
                else:
                    future.result()
    finally:
        if pending:
            # Tasks that have begun run on; what they write is whole and will be found.
            client.cancel(list(pending), force=True)
