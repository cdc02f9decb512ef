"""The array namespace is inferred from the arrays, never passed: NumPy on a host, CuPy on a device."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

Array = Any
"""A ``numpy.ndarray`` or a ``cupy.ndarray``; every public function says which shapes it takes."""


PANEL = 8192
"""Rows of ``inner_products`` that are computed at a time."""


def _is_device(array: Array) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def namespace(*arrays: Array) -> ModuleType:
    """Return ``numpy`` or ``cupy``, whichever made all of ``arrays``.

    Raises:
        TypeError: when host and device arrays are mixed, or something is not an array.
    """
    device = [_is_device(array) for array in arrays]
    if arrays and all(device):
        return sys.modules["cupy"]
    if any(device):
        raise TypeError("host and device arrays are mixed; move them to one side with to_host or to_device")
    for array in arrays:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")
    return np


def to_host(array: Array) -> np.ndarray:
    """Return ``array`` as a NumPy array; a host array is returned as it is, not copied."""
    if _is_device(array):
        return sys.modules["cupy"].asnumpy(array)
    return np.asarray(array)


def to_device(array: Array) -> Array:
    """Return ``array`` as a CuPy array on the current device.

    Raises:
        RuntimeError: when CuPy is not installed or finds no GPU; the message says which.
    """
    reason = why_no_device()
    if reason is not None:
        raise RuntimeError(f"no GPU can be used: {reason}")
    import cupy

    return cupy.asarray(array)


def inner_products(a: Array, b: Array, out: Array | None = None) -> Array:
    """The (n, m) products a @ b.T of the rows of a (n, d) and b (m, d), in ``out`` where it is given.

    By panels of a's rows. Of an array with itself NumPy would compute all of them by BLAS's syrk, and OpenBLAS' own on
    several threads writes beyond its buffers where n exceeds some 16,000: the process dies.
    """
    xp = namespace(a, b)
    if out is None:
        out = xp.empty((len(a), len(b)), xp.result_type(a, b))
    for start in range(0, len(a), PANEL):
        panel = slice(start, start + PANEL)
        xp.matmul(a[panel], b.T, out=out[panel])
    return out


def why_no_device() -> str | None:
    """Return None where CuPy finds a GPU, else one line that says why there is none."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install 'megagram[gpu]')"
    try:
        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy {cupy.__version__} finds no usable GPU ({error})"
    return f"CuPy {cupy.__version__} finds no GPU"
