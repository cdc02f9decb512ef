"""Explicit features on an index set, as they stream by: strips of blocks for workers, panels for arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kernels.arrays import Array, namespace

from ..tilesource import part_of
from .featuresource import FeatureSource

EVEN = 4
"""Strips are a multiple of this where there are blocks enough: as much work for each of 2 or 4 workers. Workers that
are there decide nothing, since the order of sums rests on the strips."""

PANEL = 512
"""Samples that are converted to float64 and multiplied at a time."""


@dataclass(frozen=True)
class Strip:
    """A task: numbers of blocks, and its place in the order of sums."""

    number: int
    blocks: tuple[int, ...]


def strips(source: FeatureSource, rows: np.ndarray, most: int) -> list[Strip]:
    """Blocks that hold rows, about equally many to a task, ``most`` samples or so; the same for the same rows."""
    touched = np.unique(rows // source.side).tolist()
    count = min(len(touched), EVEN * math.ceil(len(rows) / (EVEN * most)))
    bounds = [len(touched) * k // count for k in range(count + 1)]
    return [Strip(k, tuple(touched[bounds[k] : bounds[k + 1]])) for k in range(count)]


def panels(source: FeatureSource, rows: np.ndarray, blocks: tuple[int, ...]) -> Iterator[tuple[slice, Array]]:
    """Yield (positions in ``rows``, their features (k, width) in float64), in order, at most ``PANEL`` at a time."""
    for number in blocks:
        part = part_of(rows, number, source.side)
        assert part is not None
        block = source.block(number)
        xp = namespace(block)
        local = part.local if isinstance(part.local, slice) else xp.asarray(part.local)
        chosen = block[local]
        for start in range(0, len(chosen), PANEL):
            some = chosen[start : start + PANEL]
            first = part.positions.start + start
            yield slice(first, first + len(some)), some.astype(np.float64, order="C", copy=False)
