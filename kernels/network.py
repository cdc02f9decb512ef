"""Layers on a grid: all that the code of any path needs to know of a convolutional kernel (SPEC C2 to C9)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from .base import KernelError
from .layers import Layer
from .pooling import output_size, pooling_matrix
from .support import Axis, norm_support, trace_counts, trace_support

Tangent = bool | Literal["both"]
"""The random-feature kernel, the tangent kernel (C8), or the two from one pass."""


class Stage(NamedTuple):
    """A layer and the grid that its patches lie on; the matrices pool rows and columns (float64, host)."""

    layer: Layer
    grid: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray

    @property
    def passes_on(self) -> bool:
        """Whether pooling changes nothing."""
        return all(
            len(H) == H.shape[1] and np.array_equal(H, np.eye(len(H))) for H in (self.rows, self.columns)
        )


class Support(NamedTuple):
    """Pairs of positions of a grid h x w: ((i, j), (k, m)) is in it if rows[i, k] and columns[j, m].

    rows: (h, h) bool; columns: (w, w) bool; the first index belongs to the first image.
    """

    rows: np.ndarray
    columns: np.ndarray

    @property
    def entries(self) -> int:
        """How many pairs of positions there are."""
        return int(self.rows.sum()) * int(self.columns.sum())


@dataclass(frozen=True, eq=False)
class Network:
    """Layers on images of h x w pixels.

    periodic: patches and pooling wrap around (C4).
    """

    stages: tuple[Stage, ...]
    periodic: bool

    @cached_property
    def trace_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of pairs of rows (h, h) and of columns (w, w) of the last grid, float64: the kernel is the sum
        of W[u, v] B^M_L[u, v], W their Kronecker product (C9)."""
        last = self.stages[-1]
        return last.rows.T @ last.rows, last.columns.T @ last.columns

    @cached_property
    def support(self) -> tuple[Support, ...]:
        """For each layer the pairs at which its pointwise kernel is needed (C9)."""
        masks = (trace_support(axis, self.periodic) for axis in self._axes)
        return tuple(Support(*both) for both in zip(*masks, strict=True))

    @cached_property
    def norm_support(self) -> tuple[Support, ...]:
        """For each layer but the last the pairs of an image with itself that its later norms need (C6)."""
        masks = (norm_support(axis, self.periodic) for axis in self._axes)
        return tuple(Support(*both) for both in zip(*masks, strict=True))

    @cached_property
    def trace_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of pairs of rows (h, h) and of columns (w, w) of the first grid, float64: their Kronecker product is what
        products of patches would count in the kernel, were all scalar functions the identity."""
        rows, columns = (trace_counts(axis, self.periodic) for axis in self._axes)
        return rows, columns

    @property
    def _axes(self) -> tuple[Axis, Axis]:
        rows = [(stage.layer.patch, stage.rows) for stage in self.stages]
        columns = [(stage.layer.patch, stage.columns) for stage in self.stages]
        return rows, columns


@lru_cache(maxsize=64)
def network_on(layers: tuple[Layer, ...], mode: str, grid: tuple[int, int]) -> Network:
    """``layers`` with pooling ``mode`` on images of h x w pixels.

    Raises:
        KernelError: when the grid vanishes, or a patch is larger than its grid; the message gives the sizes
            layer by layer.
    """
    stages = []
    way = f"{grid[0]}x{grid[1]}"
    for number, layer in enumerate(layers, 1):
        if layer.patch > max(grid):
            raise KernelError(
                f"the patch of layer {number} ({layer.patch}x{layer.patch}) is larger than the grid it acts on: "
                f"{way}; use a smaller patch, larger images or less subsampling"
            )
        options = (layer.pooling, layer.subsampling, mode)
        size = tuple(max(0, output_size(n, *options)) for n in grid)
        way += f" -> {size[0]}x{size[1]}"
        if 0 in size:
            raise KernelError(
                f"the grid vanishes: {way} at layer {number} ({layer.pooling} pooling, subsampling "
                f"{layer.subsampling}); use larger images, less subsampling or fewer layers"
            )
        assert layer.poolfactor is not None
        pooling = (layer.pooling, layer.subsampling, layer.poolfactor, mode)
        stages.append(Stage(layer, grid, *(pooling_matrix(n, *pooling) for n in grid)))
        grid = (size[0], size[1])
    return Network(tuple(stages), mode == "periodic")
