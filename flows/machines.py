"""The machines of a run: a cluster that opens when it is needed, and what is asked of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import ProfileError
from cluster.local import open_cluster
from cluster.preflight import preflight
from cluster.profiles import KERNEL_PATH_VARIABLE, Profile, Resources
from cluster.watchdog import Watchdog
from cluster.worker import describe_worker, kernel_path_set
from pipelines import gram, memory, tasks
from pipelines.explicit import featuresource
from pipelines.solvers import tiled_factor

T = TypeVar("T")


class Cluster:
    """A cluster that starts when the first task needs it, and is shared by all runs of a study.

    A context manager, within which this process, too, computes by the profile's kernel path.
    """

    def __init__(self, profile: Profile, root: Path, say: Callable[[str], None]) -> None:
        self.profile = profile
        self.worker: dict[str, Any] = {}
        self._root = root
        self._say = say
        self._said: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._told = contextlib.ExitStack()
        if profile.assume is not None:
            raise ProfileError(
                f"profile {profile.name} assumes machines that are not there: it serves megagram plan alone;"
                " take another --cluster"
            )
        self._workers: tasks.Workers | None = None

    def say_path(self, path: str, remark: str) -> None:
        """Say which code computes the tiles, and why none quicker does: once each, in however many runs."""
        for text in (f"tiles are computed by {path}", remark):
            if text and text not in self._said:
                self._said.add(text)
                self._say(text)

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)`` on a machine like those of the workers: on this one, or on one of theirs."""
        if self.profile.kind == "address":
            return tasks.ask(self.workers(), function, *arguments)
        return function(*arguments)

    @cached_property
    def resources(self) -> Resources:
        """Workers and memory of each: of the profile, or of the running cluster that it names."""
        return self._found() if self.profile.kind == "address" else self.profile.resources()

    def _found(self) -> Resources:
        workers = self.workers().client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
        gpus = tuple(str(k) for k, worker in enumerate(workers) if worker["resources"].get("GPU"))
        return Resources(len(workers), min(limits, default=memory.available_bytes()), gpus)

    def workers(self) -> tasks.Workers:
        """Where tasks run; opened when it is not open."""
        if self._workers is not None:
            return self._workers
        client = self._stack.enter_context(open_cluster(self.profile))
        preflight(client, self._root)
        if client is None:
            self.worker = describe_worker()
            self._workers = tasks.Workers()
            return self._workers
        if self.profile.dashboard:
            self._say(f"Dask's pages are at {client.dashboard_link}")
        self.worker = next(iter(client.run(describe_worker).values()))
        expected = len(client.scheduler_info(n_workers=-1)["workers"])
        watchdog = Watchdog(client, expected, self.profile.worker_timeout, self._say)
        info = client.scheduler_info(n_workers=-1)["workers"].values()
        gpus = sum(1 for worker in info if worker["resources"].get("GPU"))
        needs = {"GPU": 1.0} if gpus else None
        told = told_path(self.profile)
        self._workers = tasks.Workers(client, gpus or len(info), needs, watchdog.check, told)
        return self._workers

    def rest(self) -> None:
        """Have idle workers give back the memory of what they kept."""
        if self._workers is not None and self._workers.client is not None:
            self._workers.client.run(_forget)
        _forget()

    def close(self) -> None:
        self._workers = None
        self._stack.close()

    def __enter__(self) -> Cluster:
        self._told.enter_context(kernel_path_set(self.profile))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._told.close()


def _forget() -> None:
    """Give back the memory of kept blocks, features and tiles of factors; runs on workers."""
    tiled_factor.release()
    gram.forget()
    featuresource.forget()


def told_path(profile: Profile) -> str:
    """What workers are told to take for convolutional kernels; empty leaves it to the environment in which they were
    started: a profile's "auto" is no wish, that of this process's environment is one."""
    path = profile.kernel_path
    return "" if path == "auto" and KERNEL_PATH_VARIABLE not in os.environ else path
