"""Which code runs a convolutional kernel or feature map: fused code for host or device, or the general path.

All of them compute the same numbers (within the stated tolerances) from the same prepared blocks. The fused
ones cover many networks, the general one all; the environment variable ``MEGAGRAM_KERNEL_PATH`` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np

from . import cuda, general, native
from .arrays import Array, namespace
from .base import KernelError, Prepared
from .network import Network, Tangent

VARIABLE = "MEGAGRAM_KERNEL_PATH"
CHOICES = ("auto", "general", "compiled", "cuda")

_told: ContextVar[str] = ContextVar("kernel path", default="")


class Path(Protocol):
    """What the modules ``general``, ``native`` and ``cuda`` provide."""

    def name(self, image: Array) -> str:
        """Name of the code that runs on arrays like ``image``, for reports: ``numpy``, ``compiled avx512``."""

    def obstacle(self, network: Network, tangent: Tangent, image: Array) -> str | None:
        """Why this path cannot take the network on prepared images (n, h, w, c), in one line; None if it can.

        Raises:
            KernelError: a variable of the path's own has a value that it does not know.
        """

    def pair(
        self,
        network: Network,
        tangent: Tangent,
        a: Prepared,
        b: Prepared,
        same: tuple[np.ndarray, np.ndarray],
    ) -> Array:
        """The block (outputs, n, m) between two prepared blocks; ``same`` as ``base.same_rows`` gives it.

        Where ``b is a`` the block is symmetric to the last bit.
        """

    def paired(self, network: Network, tangent: Tangent, a: Prepared, b: Prepared, same: bool) -> Array:
        """The values (outputs, n) of each image of ``a`` with that of its number in ``b``; same: they are the same
        samples."""

    def patch_norms(self, network: Network, images: Array) -> list[Array]:
        """Patch norms of every layer, (n, positions) each, in the dtype of the images (n, h, w, c) (C6)."""


def asked() -> str:
    """The path that is asked for, one of ``CHOICES``.

    Raises:
        KernelError: it is misspelt.
    """
    wanted = _told.get() or os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise KernelError(f"{VARIABLE}={wanted} is unknown: choose from {', '.join(CHOICES)}")
    return wanted


@contextmanager
def path_told(path: str) -> Iterator[None]:
    """Within it this thread takes ``path``, whatever its environment says; where it is empty, nothing changes."""
    before = _told.set(path or _told.get())
    try:
        yield
    finally:
        _told.reset(before)


def why_general(network: Network, tangent: Tangent, image: Array) -> str:
    """Why the general path runs ``network`` on images (n, h, w, c) though nobody asked for it, in one line; empty
    where a fused path runs, or one path was asked for."""
    return "" if asked() != "auto" else _fused(image).obstacle(network, tangent, image) or ""


def _fused(image: Array) -> Path:
    return native if namespace(image) is np else cuda


def choose(network: Network, tangent: Tangent, image: Array, *, preparing: bool = False) -> Path:
    """The path that runs ``network`` on images (n, h, w, c).

    preparing: for norms alone. Blocks are often prepared on the host and paired on the device, so a path of the
    other side is no contradiction then.

    Raises:
        KernelError: the environment asks for a path that does not exist, or that cannot take this.
    """
    wanted = asked()
    if wanted == "general":
        return general
    host = namespace(image) is np
    if preparing and wanted == ("cuda" if host else "compiled"):
        wanted = "auto"
    if wanted == ("cuda" if host else "compiled"):
        raise KernelError(
            f"{VARIABLE}={wanted}, but the arrays are on the {'host' if host else 'device'}: "
            f"use {VARIABLE}=auto, general or {'compiled' if host else 'cuda'}"
        )
    fused = _fused(image)
    reason = fused.obstacle(network, tangent, image)
    if reason is None:
        return fused
    if wanted != "auto":
        raise KernelError(f"{VARIABLE}={wanted}, but {reason}")
    return general


def runs_entrywise(B: Array) -> bool:
    """Whether the passes of ``cuda.entrywise`` run on products B (n, m) of a feature map, not NumPy's or CuPy's.

    Raises:
        KernelError: the environment asks for a path that does not exist.
    """
    wanted = asked()
    return wanted != "general" and namespace(B) is not np and B.dtype == np.float32 and B.flags.c_contiguous


def compiled_entrywise(B: Array) -> native.Library | None:
    """The compiled code whose ``map_entries`` takes products B (n, m) of a feature map on the host; None
    where NumPy does.

    Raises:
        KernelError: the environment asks for a path or an instruction set that does not exist, or for compiled code
            that was not built.
    """
    wanted = asked()
    if wanted not in ("auto", "compiled") or namespace(B) is not np or not B.flags.c_contiguous:
        return None
    try:
        return native.load()
    except native.NotBuilt:
        if wanted == "compiled":
            raise
        return None
