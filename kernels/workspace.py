"""Scratch memory that is allocated once and reused, in blocks that stay in the cache."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from .arrays import Array

_HOST_BYTES = 1 << 18
_DEVICE_BYTES = 1 << 26


def block_bytes(xp: ModuleType) -> int:
    """Bytes of one scratch array: a few of them fit in a core's L2 cache; a device wants large calls."""
    return _HOST_BYTES if xp is np else _DEVICE_BYTES


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
