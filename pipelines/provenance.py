"""What made a result: versions, hardware, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from kernels import cuda, native
from kernels.arrays import Array, to_device, why_no_device
from kernels.base import KernelError
from kernels.fused import Path
from kernels.layers import Layer
from kernels.network import Network, network_on

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


@lru_cache(maxsize=2)
def arithmetic(on_device: bool = False) -> str:
    """What a number's last bits depend on: versions, BLAS core type, processor; one line."""
    made_with = f"megagram {version('megagram')}, "
    if on_device:
        import cupy

        return f"{made_with}cupy {cupy.__version__}, {gpu()}"
    loaded = blas()
    library = f"{loaded.get('library')} {loaded.get('version')} {loaded.get('core_type')}"
    return f"{made_with}numpy {version('numpy')}, {library}, {cpu_name()}"


@lru_cache(maxsize=1)
def paths() -> dict[str, str]:
    """The paths of convolutional kernels beside the general one: the name of each, or ``absent: `` and why, a
    misspelt variable among it."""
    network = network_on((Layer(3, "relu"),), "reference", (8, 8))
    image = np.zeros((1, 8, 8, 1), np.float32)
    found = {"compiled": _state(native, network, image)}
    reason = why_no_device()
    return found | {"cuda": f"absent: {reason}" if reason else _state(cuda, network, to_device(image))}


def _state(path: Path, network: Network, image: Array) -> str:
    try:
        reason = path.obstacle(network, False, image)
    except KernelError as error:
        reason = str(error)
    return path.name(image) if reason is None else f"absent: {reason}"


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
        "paths": paths(),
        "blas": blas(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
