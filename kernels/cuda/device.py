"""Compiling and launching on the current device, and what fused code wants to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .programs import Program

OPTIONS = ("--std=c++17", "--prec-div=false", "--prec-sqrt=false")
"""Divisions and roots may be off by a bit or two in 24. No fast mathematics beyond that: its exponential is
as wrong as its argument is large."""


def shared_limit() -> int:
    """Bytes of shared memory that one block may have."""
    import cupy

    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


def free_bytes() -> int:
    """Memory that arrays can still be made in."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    return int(free) + int(cupy.get_default_memory_pool().free_bytes())


def launch(program: Program, count: int, arguments: Sequence[Any]) -> None:
    """Run ``program`` for ``count`` pairs, or blocks of entries, on the current stream; it may end later."""
    function = compiled(program)
    function((count, program.blocks), (program.threads,), tuple(arguments), shared_mem=program.shared_bytes)


def compiled(program: Program) -> Any:
    """The ``cupy.RawKernel`` of ``program`` on the current device."""
    import cupy

    return _compiled(program, int(cupy.cuda.runtime.getDevice()))


@lru_cache(maxsize=256)
def _compiled(program: Program, device: int) -> Any:
    """CuPy keeps what it compiled on disk; the attribute set here belongs to one device."""
    import cupy

    module = cupy.RawModule(code=program.source, options=OPTIONS, backend="nvrtc")
    function = module.get_function(program.name)
    function.max_dynamic_shared_size_bytes = program.shared_bytes
    return function
