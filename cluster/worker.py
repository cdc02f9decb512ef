"""What every worker process is told before NumPy is imported, and what it then says about itself.

Nothing here imports NumPy at its top: the linear algebra library reads these variables when it is loaded.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .profiles import KERNEL_PATH_VARIABLE, Profile

_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")


def blas_environment(profile: Profile, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that make a worker's linear algebra use the profile's threads and core type.

    A value that the user has set in ``environ`` or in the profile's environment wins over the automatic core
    type. Threads are the profile's: a variable set for a lone process cannot know that there are several.
    """
    threads = dict.fromkeys(_THREAD_VARIABLES, str(profile.blas_threads))
    return {**threads, **_core_type(profile, environ), **profile.environment}


def set_blas_environment(profile: Profile | None = None) -> dict[str, str]:
    """Choose OpenBLAS's core type for this process as for workers of ``profile``; returns what was set.

    To be called before NumPy is imported: later it changes nothing, and returns an empty table. Threads
    are left alone: the driver works while its workers rest, and may have every core.
    """
    if "numpy" in sys.modules:
        return {}
    chosen = _core_type(profile or Profile(), os.environ)
    os.environ.update(chosen)
    return chosen


@contextlib.contextmanager
def kernel_path_set(profile: Profile) -> Iterator[None]:
    """Have this process, and those that it starts meanwhile, take the profile's path for convolutional kernels.

    Where the workers are those of a running scheduler, this process is none of them and takes what it has:
    they are told with each task.
    """
    path = "auto" if profile.kind == "address" else profile.kernel_path
    before = os.environ.get(KERNEL_PATH_VARIABLE)
    if path == "auto" and (before is None or profile.kind != "address"):
        yield
        return
    os.environ[KERNEL_PATH_VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[KERNEL_PATH_VARIABLE]
        else:
            os.environ[KERNEL_PATH_VARIABLE] = before


def describe_worker(dask_worker: Any = None) -> dict[str, Any]:
    """JSON that says what this process computes with, for provenance.

    dask_worker: filled in by ``client.run(describe_worker)``. Keys: host, pid, python, cpu, cores, blas
    (name, version, core type and threads of every library that is loaded), coretype_asked, memory_limit
    (bytes, or None), gpu (name, or None).
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "blas": _loaded_blas(),
        "coretype_asked": os.environ.get("OPENBLAS_CORETYPE"),
        "memory_limit": dask_worker.memory_manager.memory_limit if dask_worker else None,
        "gpu": _gpu_name(),
    }


def recommended_core_type(vendor: str, flags: set[str]) -> str | None:
    """OpenBLAS's core type for a processor, or None where its own choice is right.

    OpenBLAS goes by model numbers and takes processors of other makers than Intel for ones without
    AVX-512 even where they have it, at half the speed.
    """
    return "SkylakeX" if vendor != "GenuineIntel" and flags >= _AVX512 else None


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _core_type(profile: Profile, environ: Mapping[str, str]) -> dict[str, str]:
    if profile.blas_coretype not in ("auto", "default"):
        return {"OPENBLAS_CORETYPE": profile.blas_coretype}
    if profile.blas_coretype == "default" or "OPENBLAS_CORETYPE" in environ:
        return {}
    info = _cpuinfo()
    name = recommended_core_type(info.get("vendor_id", ""), set(info.get("flags", "").split()))
    return {} if name is None else {"OPENBLAS_CORETYPE": name}


def _cpuinfo() -> dict[str, str]:
    """Keys and values of the first processor in /proc/cpuinfo; empty on other systems than Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _loaded_blas() -> list[dict[str, Any]]:
    import numpy  # noqa: F401  # so that there is a library to describe
    from threadpoolctl import threadpool_info

    return [
        {
            "name": library.get("internal_api"),
            "version": library.get("version"),
            "coretype": library.get("architecture"),
            "threads": library.get("num_threads"),
        }
        for library in threadpool_info()
        if library.get("user_api") == "blas"
    ]


def _gpu_name() -> str | None:
    try:
        import cupy

        return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    except ImportError:
        return None
    except cupy.cuda.runtime.CUDARuntimeError:
        return None
