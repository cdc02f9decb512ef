"""A Dask cluster of this machine's processes, open for as long as a ``with`` block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import ClusterError
from .profiles import Profile, Resources
from .signals import sigterm_unwinds
from .worker import blas_environment, kernel_path_set

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

_PATIENCE = 1.0
"""Seconds that a running task is waited for when the cluster closes."""

_CLOSING = 8.0
"""Seconds after which a cluster that does not close is left behind; its workers end with this process."""

_MALLOC = {
    # One thread computes: with an arena for each of Zarr's helper threads, freed tiles lie idle in several,
    # and a worker holds a third more than it uses, never twice the same.
    "MALLOC_ARENA_MAX": "1",
    # Tiles are allocated and freed all the time; their pages are kept, not mapped anew for each.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}


@contextlib.contextmanager
def open_cluster(profile: Profile) -> Iterator[Client | None]:
    """Yield a client of the cluster that ``profile`` describes, or None for kind "serial".

    Workers are processes with one thread each; the next tile goes to another process, not to another
    thread. They, and their temporary folder, are gone when the block ends, also by Ctrl-C or SIGTERM;
    they end by themselves when this process is killed.

    Raises:
        ClusterError: the processes do not start, or no scheduler answers at the profile's address,
            within ``profile.worker_timeout`` seconds.
    """
    if profile.kind == "serial":
        with kernel_path_set(profile):
            yield None
        return
    import dask
    import distributed  # noqa: F401  # its defaults must be loaded before they are changed for a while

    with sigterm_unwinds(), kernel_path_set(profile), dask.config.set(_dask_config(profile)):
        opened = _connected(profile) if profile.kind == "address" else _started(profile)
        with opened as client:
            yield client


def worker_options(resources: Resources, scratch: str) -> list[dict[str, Any]]:
    """Options of each worker's nanny: threads, memory limit, folder, and a GPU for the first of them."""
    common: dict[str, Any] = {
        "nthreads": 1,
        "memory_limit": resources.memory,
        "local_directory": scratch,
        "host": "127.0.0.1",
        "protocol": "tcp://",
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    options = []
    for number in range(resources.workers):
        own: dict[str, Any] = {}
        if number < len(resources.gpus):
            own = {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": resources.gpus[number]}}
        elif resources.gpus:
            own = {"env": {"CUDA_VISIBLE_DEVICES": ""}}
        options.append({**common, **own})
    return options


@contextlib.contextmanager
def _started(profile: Profile) -> Iterator[Client]:
    from distributed import Client, Nanny, Scheduler, SpecCluster

    resources = profile.resources()
    scheduler = {
        "host": "127.0.0.1",
        "port": 0,
        "protocol": "tcp://",
        "dashboard": bool(profile.dashboard),
        # Any port when there are no pages: the default one may belong to another cluster.
        "dashboard_address": f"127.0.0.1:{int(profile.dashboard)}",
    }
    if profile.scratch:
        os.makedirs(profile.scratch, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(
                prefix="megagram-workers-", dir=profile.scratch or None, ignore_cleanup_errors=True
            )
        )
        workers = {
            number: {"cls": Nanny, "options": options}
            for number, options in enumerate(worker_options(resources, scratch))
        }
        # The variables must be there when a worker's process starts, NumPy reads them too early for any
        # later way. So this process has them for a moment too; kept, they would slow it.
        with _environment_kept():
            os.environ.update(blas_environment(profile))
            try:
                cluster = SpecCluster(
                    scheduler={"cls": Scheduler, "options": scheduler},
                    workers=workers,
                    silence_logs=logging.CRITICAL,
                )
                stack.callback(_close, cluster)
                client = stack.enter_context(Client(cluster, timeout=profile.worker_timeout))
                client.wait_for_workers(resources.workers, timeout=profile.worker_timeout)
            except (OSError, RuntimeError) as error:  # time-outs are OSErrors
                raise ClusterError(
                    f"{resources.workers} worker processes did not start within {profile.worker_timeout:g} s "
                    f"({type(error).__name__}: {error}); try fewer workers, or the profile 'serial'"
                ) from error
        yield client


@contextlib.contextmanager
def _connected(profile: Profile) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(profile.address, timeout=profile.worker_timeout)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {profile.address} within {profile.worker_timeout:g} s; start one with "
            "'dask scheduler', or correct the profile's address"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=profile.worker_timeout)
        except OSError as error:
            raise ClusterError(
                f"the scheduler at {profile.address} has no workers; start some with "
                f"'dask worker {profile.address} --nthreads 1'"
            ) from error
        yield client


def _close(cluster: SpecCluster) -> None:
    """Close the cluster within seconds, whatever its tasks do: a task may be killed at any moment."""

    async def stop_workers() -> None:
        await asyncio.gather(*(nanny.close(timeout=_PATIENCE) for nanny in cluster.workers.values()))

    with contextlib.suppress(TimeoutError):  # a scheduler that has died is waited for in vain
        cluster.sync(stop_workers, callback_timeout=_CLOSING)
        cluster.close(timeout=_CLOSING)


def _dask_config(profile: Profile) -> dict[str, Any]:
    return {
        # In place of Dask's own list, whose MALLOC_TRIM_THRESHOLD_ returns freed memory to the system at
        # every turn: mapping it anew for the next block made tiles 1.5 times slower.
        "distributed.nanny.pre-spawn-environ": _MALLOC | blas_environment(profile),
        "distributed.scheduler.allowed-failures": 3,
        "distributed.scheduler.no-workers-timeout": f"{profile.worker_timeout} s",
        # Workers hold blocks that they read from stores and can read again: there is nothing to spill.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": 0.85,
        "distributed.worker.memory.terminate": 0.95,
        "distributed.worker.profile.enabled": False,
        # By default each process looks fifty times a second whether its event loop is late: half of what an idle
        # cluster costs.
        "distributed.admin.tick.interval": "500ms",
    }


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Give this process's variables the values back that they had before the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
