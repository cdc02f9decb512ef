"""Blocks of pairs of images, and what computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .arrays import Array
from .base import Cost, Prepared


@dataclass
class Side:
    """One side of a block of pairs, broadcast against the other.

    features: images, or what the first step multiplies; norms, before, after: for each layer, patch norms and the
    factors of this side before and after the scalar function (None where all are 1); pooling: of the first side,
    the matrices that pool columns of the first layer with the factors after in them (image rows, columns of the
    next grid, columns), where they are folded in; short: the first layer's ``pointwise.shortfall``. The first two
    axes number the images of the first and of the second side.
    """

    features: Array
    norms: list[Array]
    before: list[Any]
    after: list[Any]
    pooling: Array | None = None
    short: Array | None = None

    def __getitem__(self, columns: slice) -> Side:
        return self.map(lambda array: array[:, columns])

    def paired(self) -> Side:
        """This second side turned, so that image i meets image i of the first side alone."""
        return self.map(lambda array: array.swapaxes(0, 1))

    def map(self, view: Any) -> Side:
        def each(arrays: Sequence[Array | None]) -> list[Any]:
            return [None if array is None else view(array) for array in arrays]

        return Side(
            view(self.features),
            *map(each, (self.norms, self.before, self.after)),
            *each([self.pooling, self.short]),
        )


class Engine(Protocol):
    """What ``Recursion`` and ``Displacements`` provide: one value for each pair of a block."""

    @property
    def pairs_per_block(self) -> int:
        """How many pairs to take at a time."""

    @property
    def group_size(self) -> int:
        """How many second images to keep what ``second`` makes of them."""

    def first(self, part: Prepared) -> Side:
        """The first side of blocks, of some prepared images."""

    def second(self, part: Prepared) -> Side:
        """The second side, which can be sliced."""

    def block(self, a: Side, b: Side, equal: tuple[Array, Array] | None) -> list[Array]:
        """The kernel, and with ``tangent`` the tangent kernel, (p, q) float64, for the pairs of two sides.

        ``equal`` are the positions in the block of pairs of one sample (K13).
        """

    def cost(self, n: int, m: int) -> Cost:
        """Cost of n x m pairs on the host."""


def block_shape(engine: Engine, m: int) -> tuple[int, int]:
    """Images of the first and of the second side in one block, where the second side has m."""
    q = min(m, engine.pairs_per_block)
    return max(1, engine.pairs_per_block // q), q
