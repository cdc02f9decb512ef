"""Where tiles are computed: on a GPU, one behind the other on one stream, or on the host.

On a device nothing waits for the host: while one tile is computed, the one before it is copied into pinned
memory, and a thread checks and writes it. On the host such a thread would take its time from the arithmetic.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from queue import SimpleQueue
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from kernels.arrays import Array, why_no_device
from kernels.base import KernelError, Prepared
from kernels.fused import VARIABLE, asked

BUFFERS = 2
"""One is written while the other is filled."""

Keep = Callable[[Any, Array, float], None]
"""Takes a key, the block that was computed for it, and since when: ``time.perf_counter`` as the work on this block
alone began. On a device the block is a host array, valid during the call."""


def used() -> bool:
    """Whether this process computes on a GPU: there is one, and the path asked for is not the host's."""
    return asked() != "compiled" and why_no_device() is None


def placed(prepared: Prepared) -> Prepared:
    """A prepared block where it is to be computed with.

    Raises:
        KernelError: the path asked for is the device's, and there is no device.
    """
    if used():
        return prepared.on_device()
    if asked() == "cuda":
        raise KernelError(f"{VARIABLE}=cuda, but {why_no_device()}; choose auto, general or compiled")
    return prepared


def finish() -> None:
    """Wait until the device has done what it was given; on a host there is nothing to wait for."""
    if used():
        _cupy().cuda.Device().synchronize()


def memory_bytes() -> int:
    """Memory of the device."""
    return int(_cupy().cuda.Device().mem_info[1])


def queue(keep: Keep) -> Queue:
    """What computes blocks in the order of their coming and hands each to ``keep``."""
    return Streamed(_cupy(), keep) if used() else InTurn(keep)


class Queue(Protocol):
    """A context manager: at its end all that was computed is kept, or an error is raised."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, key: Any, compute: Callable[[], Array]) -> None:
        """Compute a block; raises what ``compute`` raises, and what ``keep`` did of this or an earlier block."""


class InTurn:
    """On the host: a block is kept before the next is computed."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def add(self, key: Any, compute: Callable[[], Array]) -> None:
        started = time.perf_counter()
        self._keep(key, compute(), started)


class Streamed:
    """On a device: blocks are computed on one stream, and kept in their order by a thread that follows.

    ``add`` waits while all buffers are full. What was computed before an error is kept all the same.
    """

    def __init__(self, cupy: ModuleType, keep: Keep, buffers: int = BUFFERS) -> None:
        self._cupy = cupy
        self._keep = keep
        self._stream = _stream(cupy)
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(_Buffer(cupy))
        self._filled: SimpleQueue[_Filled | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._keep_all, name="tiles", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._filled.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def add(self, key: Any, compute: Callable[[], Array]) -> None:
        buffer = self._free.get()
        try:
            if self._error is not None:
                raise self._error
            started = time.perf_counter()
            with self._stream:
                block = self._cupy.ascontiguousarray(compute())
                copy = buffer.like(block)
                target = ctypes.c_void_p(copy.ctypes.data)
                block.data.copy_to_host_async(target, block.nbytes, self._stream)
                copied = self._stream.record()
        except BaseException:
            self._free.put(buffer)
            raise
        self._filled.put(_Filled(key, block, copy, buffer, copied, started))

    def _keep_all(self) -> None:
        before = 0.0
        while (filled := self._filled.get()) is not None:
            try:
                filled.copied.synchronize()
                self._keep(filled.key, filled.copy, max(before, filled.started))
            except BaseException as error:
                self._error = self._error or error
            before = time.perf_counter()
            self._free.put(filled.buffer)


class _Filled(NamedTuple):
    """A block on its way to the host; it is held until ``copied``, so that its memory is not used again before."""

    key: Any
    block: Array
    copy: np.ndarray
    buffer: _Buffer
    copied: Any
    started: float


class _Buffer:
    """Pinned host memory: a device copies to it without the processor's help."""

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self._memory: Any = b""
        self._bytes = 0

    def like(self, block: Array) -> np.ndarray:
        """A host array of a block's shape and dtype."""
        if block.nbytes > self._bytes:
            self._memory, self._bytes = self._cupy.cuda.alloc_pinned_memory(block.nbytes), block.nbytes
        return np.frombuffer(self._memory, block.dtype, block.size).reshape(block.shape)


@lru_cache(maxsize=1)
def _stream(cupy: ModuleType) -> Any:
    """One for the whole process: CuPy keeps freed memory apart for each stream."""
    return cupy.cuda.Stream()


def _cupy() -> ModuleType:
    import cupy

    return cupy
