"""Scratch memory that is allocated once and reused, in blocks that stay in the cache."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from .arrays import Array

_HOST_BYTES = 1 << 19
_DEVICE_BYTES = 1 << 26
_BUDGET_BYTES = 1 << 30


def block_bytes(xp: ModuleType) -> int:
    """Bytes of one scratch array: a few of them fit in a core's L2 cache; a device wants large calls."""
    return _HOST_BYTES if xp is np else _DEVICE_BYTES


def budget_bytes(xp: ModuleType) -> int:
    """Bytes that the scratch arrays of a block may take together, where more than one pair is in it: on a device
    no more than half of what is free there."""
    if xp is np:
        return _BUDGET_BYTES
    from .cuda.device import free_bytes

    return min(_BUDGET_BYTES, free_bytes() // 2)


def padded(length: int, dtype: np.dtype) -> int:
    """Length of lines of memory that hold ``length`` numbers and do not lie a multiple of a kilobyte apart, where
    they would meet in the same few places of a cache."""
    line = 64 // dtype.itemsize
    return length + line if length * dtype.itemsize % 1024 == 0 else length


class Workspace:
    """Named scratch arrays of one dtype; asking again for a name hands out the same memory."""

    def __init__(self, xp: ModuleType, dtype: np.dtype) -> None:
        self._xp = xp
        self._dtype = dtype
        self._flat: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """A C-contiguous array of ``shape`` with undefined contents, valid until ``name`` is taken again."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            self._flat[name] = flat = self._xp.empty(size, self._dtype)
        return flat[:size].reshape(shape)
