"""Nothing waits for ever: lost workers are noticed, and Dask's errors put into words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import ClusterError, ClusterLost, WorkersKilled

if TYPE_CHECKING:
    from distributed import Client

_INTERVAL = 1.0
"""Seconds between two questions to the scheduler, however often ``check`` is called."""


class Watchdog:
    """Watches a client's scheduler and workers; its ``check`` belongs into every loop that waits for futures.

    Dask restarts a worker that dies, but a cluster may come to have none without any future failing.

    client: an open client; expected: workers there should be; timeout: seconds without any worker, or
    without an answer of the scheduler, after which the cluster counts as lost; report: called with one
    line whenever workers are lost or come back.
    """

    def __init__(
        self,
        client: Client,
        expected: int,
        timeout: float = 60.0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._client = client
        self._expected = expected
        self._timeout = timeout
        self._report = report or (lambda line: None)
        self._workers: frozenset[str] = self._ask() or frozenset()
        self._asked = self._alive = time.monotonic()
        self.lost = 0
        """Workers lost so far; one that was restarted counts."""

    def check(self) -> None:
        """Ask the scheduler for its workers, at most once per second; takes about a millisecond.

        Raises:
            ClusterLost: the scheduler is gone, or there has been no worker for the time-out.
        """
        now = time.monotonic()
        if now - self._asked < _INTERVAL:
            return
        self._asked = now
        if self._client.status == "closed":
            raise ClusterLost("the Dask scheduler is gone; what is stored stays, run the same command again")
        workers = self._ask()
        if workers:
            self._alive = time.monotonic()
        if workers is not None and workers != self._workers:
            self._note(workers)
        silent = time.monotonic() - self._alive
        if silent > self._timeout:
            what = "the Dask scheduler has not answered" if workers is None else "there has been no worker"
            raise ClusterLost(
                f"{what} for {silent:.0f} s (worker_timeout of the profile is {self._timeout:g} s); "
                "what is stored stays, run the same command again"
            )

    def _ask(self) -> frozenset[str] | None:
        """Addresses of the workers; None when the scheduler does not answer."""
        try:
            scheduler: Any = self._client.scheduler
            identity = self._client.sync(
                scheduler.identity, n_workers=-1, callback_timeout=max(self._timeout / 4, 1)
            )
        except OSError:  # closed connections and time-outs are OSErrors
            return None
        return frozenset(identity["workers"])

    def _note(self, workers: frozenset[str]) -> None:
        gone = len(self._workers - workers)
        self.lost += gone
        self._workers = workers
        lost = f"{gone} worker{'s' if gone > 1 else ''} lost; " if gone else ""
        self._report(f"{lost}{len(workers)} of {self._expected} workers running")


def explain(error: BaseException) -> ClusterError | None:
    """Say what an error of Dask means and what to do; None for an error that is not the cluster's own.

    A driver that gathers futures raises the answer from the error, and any other error as it is.
    """
    if isinstance(error, ClusterError):
        return error
    # By name: asking must not import Dask where nothing of it ran.
    if not type(error).__module__.startswith("distributed"):
        return None
    name = type(error).__name__
    if name == "KilledWorker":
        worker = error.last_worker  # type: ignore[attr-defined]
        limit = f"{worker.memory_limit / 2**30:.1f} GiB" if worker.memory_limit else "no limit set"
        return WorkersKilled(
            f"a task killed {error.allowed_failures + 1} workers one after another, "  # type: ignore[attr-defined]
            f"most often because it needs more memory than a worker may use ({limit}); set fewer workers "
            "or more memory in the cluster profile"
        )
    if name in ("NoWorkerError", "NoValidWorkerError"):
        return ClusterLost(f"no worker could take a task: {error}")
    if name in ("FutureCancelledError", "FuturesCancelledError", "CommClosedError", "FatalCommClosedError"):
        return ClusterLost(
            "the connection to the Dask scheduler or to a worker broke "
            f"({' '.join(str(error).split())}); what is stored stays, run the same command again"
        )
    return None
