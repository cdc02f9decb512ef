"""Copies of images moved by whole pixels: a training pool of millions made from a published one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .datasets import Pool
from .errors import ExperimentError

LARGEST = 10
"""Pixels by which a copy is moved at most."""


def _displacements() -> tuple[tuple[int, int], ...]:
    steps = range(-LARGEST, LARGEST + 1)
    found = [(dy, dx) for dy in steps for dx in steps if 0 < dy**2 + dx**2 <= LARGEST**2]
    return tuple(sorted(found, key=lambda d: (d[0] ** 2 + d[1] ** 2, abs(d[0]), abs(d[1]), -d[0], -d[1])))


DISPLACEMENTS = _displacements()
"""Pixels down and to the right by which copy 1, copy 2, ... are moved; the nearest first."""


def with_copies(pool: Pool, shifts: int) -> Pool:
    """The pool's images, then copy 1 of all of them, then copy 2 of all, and so on; zeros move in.

    X keeps its dtype, and grows to ((1 + shifts) * n, h, w, c).

    Raises:
        ExperimentError: the samples are vectors, or there are not so many displacements that leave something
            of such images.
    """
    shape = pool.X.shape[1:]
    if len(shape) != 3:
        raise ExperimentError(
            f"data.shifts = {shifts} moves images, but {pool.name} holds vectors of {shape[0]} numbers: leave it out"
        )
    outside = (k for k, (dy, dx) in enumerate(DISPLACEMENTS) if abs(dy) >= shape[0] or abs(dx) >= shape[1])
    most = next(outside, len(DISPLACEMENTS))
    if shifts > most:
        raise ExperimentError(
            f"data.shifts = {shifts}: of images of {shape[0]}x{shape[1]} pixels there are at most {most}"
            f" moved copies, by up to {LARGEST} pixels and never out of sight"
        )
    n = len(pool)
    X = np.empty(((1 + shifts) * n, *shape), pool.X.dtype)
    X[:n] = pool.X
    for copy, (dy, dx) in enumerate(DISPLACEMENTS[:shifts], 1):
        _move(pool.X, dy, dx, X[copy * n : (copy + 1) * n])
    return replace(pool, X=X, y=None if pool.y is None else np.concatenate([pool.y] * (1 + shifts)))


def with_copies_of(rows: np.ndarray, n: int, shifts: int) -> np.ndarray:
    """Rows (k,) of a pool of n images and, after them, those of their copies: ((1 + shifts) * k,), increasing."""
    return (np.arange(1 + shifts, dtype=np.int64)[:, None] * n + rows).ravel()


def _move(X: np.ndarray, dy: int, dx: int, out: np.ndarray) -> None:
    """Images (n, h, w, c) moved dy pixels down and dx to the right, into ``out``."""
    h, w = X.shape[1:3]
    out[...] = 0
    out[:, max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = X[
        :, max(-dy, 0) : h - max(dy, 0), max(-dx, 0) : w - max(dx, 0)
    ]
