"""What made a result: versions, hardware, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import lru_cache
from typing import Any

from . import memory

PACKAGES = (
    "megagram", "numpy", "scipy", "zarr", "dask", "distributed", "prefect", "scikit-learn", "cupy-cuda13x",
    "cupy-cuda12x", "matplotlib",
)  # fmt: skip


@lru_cache(maxsize=32)
def version(package: str) -> str:
    """The installed version, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of the packages a result depends on; those not installed are left out."""
    found = {package: version(package) for package in PACKAGES}
    return {package: text for package, text in found.items() if text != "not installed"}


@lru_cache(maxsize=1)
def arithmetic() -> str:
    """What a tile's last bits depend on: versions, BLAS core type, processor; one line."""
    loaded = blas()
    library = f"{loaded.get('library')} {loaded.get('version')} {loaded.get('core_type')}"
    return f"megagram {version('megagram')}, numpy {version('numpy')}, {library}, {cpu_name()}"


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        with open("/proc/cpuinfo") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def blas() -> dict[str, Any]:
    """Name, version, core type and threads of the BLAS that NumPy loaded; empty when it cannot be told."""
    import numpy  # noqa: F401  (loads its BLAS)
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library.get("user_api") == "blas":
            return {
                "library": library.get("internal_api"),
                "version": library.get("version"),
                "core_type": library.get("architecture"),
                "threads": library.get("num_threads"),
            }
    return {}


def gpu() -> str:
    """The first GPU's name, or why there is none."""
    from kernels.arrays import why_no_device

    reason = why_no_device()
    if reason is not None:
        return f"none: {reason}"
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def machine() -> dict[str, Any]:
    """Versions, hardware and the command of this process."""
    import psutil

    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": memory.cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpu": gpu(),
        "blas": blas(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
