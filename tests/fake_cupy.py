"""A stand-in for the little of CuPy that computing tiles on a device needs: a stream that works by itself.

Arrays stay NumPy's where kernels compute with them. What is enqueued on a stream is done in order by a thread, some
time later, as a device does it; an array that nobody holds loses its contents, as memory that is used again.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class DeviceArray:
    """An array on the device: its values are there when the stream has come to it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = np.array(values)
        self.dtype, self.shape, self.size, self.nbytes = (
            values.dtype,
            values.shape,
            values.size,
            values.nbytes,
        )
        self.data = self

    def copy_to_host_async(self, target: ctypes.c_void_p, size: int, stream: Stream) -> None:
        values = self._values  # and not self, which would be held
        assert size == values.nbytes
        stream.enqueue(lambda: ctypes.memmove(target, values.ctypes.data, size))

    def __del__(self) -> None:
        self._values.view(np.uint8)[...] = 0xFF


class Event:
    def __init__(self) -> None:
        self._reached = threading.Event()
        self._error: BaseException | None = None

    def reach(self, error: BaseException | None) -> None:
        self._error = error
        self._reached.set()

    def synchronize(self) -> None:
        assert self._reached.wait(10)
        if self._error is not None:
            raise self._error


class Stream:
    """Runs what is enqueued on it in a thread of its own; an error makes every later event raise it."""

    current: Stream | None = None

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def enqueue(self, work: Callable[[], Any]) -> None:
        self._work.put(work)

    def record(self) -> Event:
        event = Event()
        self.enqueue(lambda: event.reach(self._error))
        return event

    def __enter__(self) -> Stream:
        Stream.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current = None

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except Exception as error:
                self._error = error


def module() -> ModuleType:
    """What ``import cupy`` would give on a machine with one device."""
    fake: Any = ModuleType("cupy")
    fake.__version__ = "14.0.0"
    fake.ndarray = DeviceArray
    fake.asarray = np.asarray
    fake.ascontiguousarray = lambda block: block if isinstance(block, DeviceArray) else DeviceArray(block)
    fake.pinned = []
    fake.cuda = SimpleNamespace(
        Stream=Stream,
        Device=lambda: SimpleNamespace(synchronize=lambda: None, mem_info=(2**30, 2**30)),
        alloc_pinned_memory=lambda size: fake.pinned.append(size) or bytearray(size),
        runtime=SimpleNamespace(
            getDeviceCount=lambda: 1, getDeviceProperties=lambda number: {"name": b"a device"}
        ),
    )
    return fake
