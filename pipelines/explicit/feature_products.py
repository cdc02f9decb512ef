"""One pass over explicit features for all that is asked of them: Phi W, Phi^T (Phi W), Phi^T Y, leverages.

Workers take strips of rows (see ``covariance``); sums are taken in the order of the strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels.arrays import Array, namespace, to_host

from ..errors import DataError
from ..products import Progress, in_turn, unwatched, write_sums
from ..site import Site
from ..tilesource import index_set
from .feature_strips import Strip, panels, strips
from .featuresource import FeatureSource

STRIP = 4096
"""Samples of a task at most: what it gives is small, and features may have to be computed for it."""


@dataclass(frozen=True)
class Asked:
    """What is asked of features at n rows; None for what is not.

    W: (width, k) float64, for Phi W. Y: (n, t) float64, for Phi^T Y, and Phi^T Phi W where W is given as well.
    vectors, weights: (width, width) and (width, r) float64, for the leverages sum_j (Phi vectors)_ij^2 weights_jr.
    """

    W: np.ndarray | None = None
    Y: np.ndarray | None = None
    vectors: np.ndarray | None = None
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """What was asked for, float64: values (n, k) Phi W, leverages (n, r); normal (width, k) Phi^T Phi W, seen
    (width, t) Phi^T Y, squares (width,) the diagonal of Phi^T Phi. What was not asked for is empty."""

    values: np.ndarray
    leverages: np.ndarray
    normal: np.ndarray
    seen: np.ndarray
    squares: np.ndarray

    @classmethod
    def zeros(cls, n: int, width: int, asked: Asked) -> Found:
        k, t, r = (0 if one is None else one.shape[1] for one in (asked.W, asked.Y, asked.weights))
        summed = width if asked.Y is not None else 0
        return cls(
            np.zeros((n, k)), np.zeros((n, r)), np.zeros((summed, k)), np.zeros((summed, t)), np.zeros(summed)
        )

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.values, self.leverages, self.normal, self.seen, self.squares

    def place(self, rows: slice, part: Found) -> None:
        """Take over what was found at some of the rows."""
        self.values[rows], self.leverages[rows] = part.values, part.leverages
        for total, added in zip(self.arrays[2:], part.arrays[2:], strict=True):
            total += added


@dataclass(frozen=True)
class Job:
    """What a worker needs; small. asked: paths of arrays, as in ``Asked``. out: a path that each strip's number is
    appended to."""

    source: FeatureSource
    rows: Path
    asked: dict[str, Path]
    out: Path


def stream(
    source: FeatureSource,
    rows: np.ndarray,
    asked: Asked,
    site: Site | None = None,
    progress: Progress = unwatched,
) -> Found:
    """What is asked of Phi[rows], in one pass over its blocks.

    site: where workers are; without one this process computes. A worker holds a block, a panel of it in float64, what
    was asked and what its strip gives. progress: called with the strips done, and all of them.

    Raises:
        ChunkLost: a block is missing or damaged.
    """
    listed = strips(source, rows, STRIP)
    found = Found.zeros(len(rows), source.shape[1], asked)
    ranges = list(_ranges(source, rows, listed))
    if site is None:
        for strip in listed:
            found.place(ranges[strip.number], _strip(source, rows, asked, strip))
            progress(strip.number + 1, len(listed))
        return found
    given = {name: values for name, values in vars(asked).items() if values is not None}
    job = Job(
        source,
        site.save("rows", rows),
        {name: site.save(name, values) for name, values in given.items()},
        site.path("strip"),
    )
    try:
        for number, (_, values) in enumerate(in_turn(multiply, listed, job, site)):
            at = ranges[number]
            part = Found.zeros(at.stop - at.start, source.shape[1], asked)
            start = 0
            for array in part.arrays:
                array[...] = values[start : start + array.size].reshape(array.shape)
                start += array.size
            found.place(at, part)
            progress(number + 1, len(listed))
    finally:
        for path in (job.rows, *job.asked.values()):
            path.unlink(missing_ok=True)
    return found


def predict(
    source: FeatureSource,
    rows: np.ndarray,
    weights: np.ndarray,
    site: Site | None = None,
    progress: Progress = unwatched,
) -> np.ndarray:
    """Phi[rows] @ weights as (len(rows), t) or (r, len(rows), t) float64, for weights (width, t) or (r, width, t).

    Raises:
        DataError: rows are not an index set of the source, or the weights do not fit its width.
    """
    row_ids, width = index_set(rows, source.shape[0], "rows"), source.shape[1]
    stack = np.asarray(weights, np.float64)
    if stack.ndim not in (2, 3) or stack.shape[-2] != width:
        raise DataError(f"weights of shape {stack.shape} do not fit {width} features")
    flat = flattened(stack)
    return unflattened(stream(source, row_ids, Asked(W=flat), site, progress).values, stack.shape)


def flattened(stack: np.ndarray) -> np.ndarray:
    """(k, t) as it is, or (r, k, t) as (k, r * t): the columns of all ridges side by side."""
    return np.ascontiguousarray(np.moveaxis(stack, -2, 0).reshape(stack.shape[-2], -1))


def unflattened(columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(m, r * t) columns as (r, m, t), or (m, t) as it is, where ``flattened`` was given ``shape``."""
    split = columns.reshape(len(columns), *shape[:-2], shape[-1])
    return np.ascontiguousarray(np.moveaxis(split, 0, -2))


def multiply(strip: Strip, job: Job) -> None:
    """Write what a strip gives, one file; runs on a worker."""
    rows = np.load(job.rows, mmap_mode="r")
    asked = Asked(**{name: np.load(path, mmap_mode="r") for name, path in job.asked.items()})
    write_sums(strip, job, _strip(job.source, rows, asked, strip).arrays)


def _strip(source: FeatureSource, rows: np.ndarray, asked: Asked, strip: Strip) -> Found:
    """What is asked for, of a strip."""
    (at,) = _ranges(source, rows, [strip])
    found = Found.zeros(at.stop - at.start, source.shape[1], asked)
    placed: dict[str, Array] = {}

    def on(xp: Any, name: str) -> Array:
        if name not in placed:
            placed[name] = xp.asarray(getattr(asked, name))
        return placed[name]

    for positions, X in panels(source, rows, strip.blocks):
        xp = namespace(X)
        here = slice(positions.start - at.start, positions.stop - at.start)
        if asked.W is not None:
            values = X @ on(xp, "W")
            found.values[here] = to_host(values)
            if asked.Y is not None:
                found.normal[:] += to_host(values.T @ X).T
        if asked.Y is not None:
            found.seen[:] += to_host(xp.asarray(asked.Y[positions]).T @ X).T
            found.squares[:] += to_host(xp.einsum("ij,ij->j", X, X))
        if asked.vectors is not None:
            Z = X @ on(xp, "vectors")
            Z *= Z
            found.leverages[here] = to_host(Z @ on(xp, "weights"))
    return found


def _ranges(source: FeatureSource, rows: np.ndarray, listed: list[Strip]) -> Iterator[slice]:
    """Positions in ``rows`` of each strip's samples."""
    for strip in listed:
        bounds = (strip.blocks[0] * source.side, (strip.blocks[-1] + 1) * source.side)
        start, stop = (int(k) for k in np.searchsorted(rows, bounds))
        yield slice(start, stop)
