"""The recursion over layers for networks whose patches are turned by 0 or 45 degrees (SPEC C14).

For a pair of images it follows B[u, v] = <x(u), y(v)>, where the patches of x and those of y have each their own
angle, and for tangent kernels T. Turned offsets of a patch fall between positions: what lies there is interpolated
bilinearly. Arrays of a block of pairs are laid out (positions, p, positions, q), so that shifts move long runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import pointwise
from .arrays import Array, namespace
from .base import Cost, Prepared
from .layers import Layer
from .network import Network, Tangent
from .patches import patch_offsets, shifts, sum_over_patches
from .workspace import Workspace, block_bytes, budget_bytes

_BLOCK_FACTOR = 4
"""A block may be so much larger than a scratch array of the general path: shifts of longer runs outweigh cache
misses."""

_LEAST_RUN = 8
"""Second images taken together, even where a block then is larger."""


class Tap(NamedTuple):
    """A whole offset of rows and columns, and its weight."""

    rows: int
    columns: int
    weight: float


def bilinear(row: float, column: float) -> list[Tap]:
    """The positions that a point at this offset is interpolated from; at most four."""
    i, j = math.floor(row), math.floor(column)
    taps = [
        Tap(i + k, j + m, (row - i if k else 1 - row + i) * (column - j if m else 1 - column + j))
        for k in (0, 1)
        for m in (0, 1)
    ]
    return [tap for tap in taps if tap.weight]


def half_turn(row: float, column: float) -> tuple[float, float]:
    """(row, column) turned by 45 degrees; twice is what ``numpy.rot90`` does to the offsets in an image."""
    root = math.sqrt(0.5)
    return root * (row + column), root * (column - row)


@lru_cache(maxsize=64)
def patch_taps(size: int, parity: int) -> tuple[list[Tap], ...]:
    """For each offset of a patch, by row and column, its taps after a turn by 45 * parity degrees."""
    offsets = [(float(d), float(e)) for d in patch_offsets(size) for e in patch_offsets(size)]
    return tuple(bilinear(*(half_turn(*offset) if parity else offset)) for offset in offsets)


def turn_by_45(images: Array) -> Array:
    """Square images (n, h, h, c) turned by 45 degrees about their centre, interpolated, zero beyond the border."""
    xp = namespace(images)
    n, h, _, c = images.shape
    centre = (h - 1) / 2
    turning = np.zeros((h * h, h * h))
    for position, (i, j) in enumerate(np.ndindex(h, h)):
        row, column = half_turn(i - centre, j - centre)
        for k, m, weight in bilinear(row + centre, column + centre):
            if 0 <= k < h and 0 <= m < h:
                turning[position, k * h + m] += weight
    flat = xp.moveaxis(images, 3, 1).reshape(n * c, h * h)
    turned = flat @ xp.asarray(turning.T, images.dtype)
    return xp.ascontiguousarray(xp.moveaxis(turned.reshape(n, c, h, h), 1, 3))


class Angles(NamedTuple):
    """By how many times 45 degrees, 0 or 1, the patches of the first and of the second images are turned."""

    first: int
    second: int


class TurnedRecursion:
    """The recursion for blocks of pairs of images (h, h, channels) of one size and dtype, each grid being h x h.

    quarters: in the trace after the last pooling a position of the first image meets that of the second which is
    turned back by 90 * quarters degrees.
    """

    def __init__(
        self,
        network: Network,
        tangent: Tangent,
        turns: Angles,
        quarters: int,
        xp: ModuleType,
        dtype: np.dtype,
        channels: int,
    ) -> None:
        self._network = network
        self._tangent = bool(tangent)
        self._turns = turns
        self._xp = xp
        self._dtype = dtype
        self._channels = channels
        self._quarters = quarters
        self._workspace = Workspace(xp, dtype)
        self._side = network.stages[0].grid[0]
        self._positions = self._side**2
        self._pooling = [_pooling(stage.rows, xp, dtype) for stage in network.stages[:-1]]
        factors = turned_trace_weights(network, quarters)
        uniform = all(np.all(factor == factor[0, 0]) for factor in factors)
        self._uniform = float(factors[0][0, 0] * factors[1][0, 0]) if uniform else None

    @cached_property
    def _weights(self) -> Array:
        """What B^M_L[u, v] counts in the result, where that differs, (positions, positions)."""
        h = self._side
        weights = np.empty((h, h, h, h), self._dtype)
        first, second = turned_trace_weights(self._network, self._quarters)
        if self._quarters % 2:
            factors = first[:, None, None, :], second[None, :, :, None]
        else:
            factors = first[:, None, :, None], second[None, :, None, :]
        np.multiply(*factors, out=weights, casting="same_kind")
        return self._xp.asarray(weights.reshape(h * h, h * h))

    def block_shape(self, m: int) -> tuple[int, int]:
        """First and second images in one block, where there are m second ones."""
        most = _BLOCK_FACTOR * block_bytes(self._xp) // (self._dtype.itemsize * self._positions**2)
        room = budget_bytes(self._xp) / self._dtype.itemsize - self._kept
        fit = max(1, int(room / self._numbers_per_pair))
        q = min(m, fit, max(_LEAST_RUN, most))
        return max(1, min(most, fit) // q), q

    @property
    def _kept(self) -> int:
        """Numbers that are kept whatever the block: the weights."""
        return 0 if self._uniform is not None else self._positions**2

    @property
    def _numbers_per_pair(self) -> float:
        """Numbers in scratch arrays for each pair of a block, with the patches of an image for each side."""
        turned = self._turns != (0, 0)
        summed = min(2, len(self._network.stages) - 1) if turned else 0
        pooled = any(H is not None for H in self._pooling)
        # Two scratch arrays and, where patches are turned, one of a shifted array times its weight.
        arrays = 2 + bool(summed) + (1 + self._tangent) * (1 + summed + pooled)
        return self._positions * (arrays * self._positions + 2 * self._features)

    @property
    def _features(self) -> int:
        return self._network.stages[0].layer.patch ** 2 * self._channels

    # What a block is made of

    def patches(self, images: Array, parity: int) -> Array:
        """Patches of the first layer, turned by 45 * parity degrees: (positions, n, features)."""
        xp, layer = self._xp, self._network.stages[0].layer
        n, h, w, c = images.shape
        taps = patch_taps(layer.patch, parity)
        source = xp.moveaxis(images, 0, 2)
        out = xp.zeros((h, w, n, len(taps), c), self._dtype)
        for number, point in enumerate(taps):
            self._add_shifted(out[:, :, :, number], source, point, (0, 1))
        if layer.patch_norm:
            out *= 1 / layer.patch
        return out.reshape(h * w, n, -1)

    def _crossed(self, a: Array, b: Array) -> Array:
        """Products of the patches of every first with every second image, (positions, p, positions, q)."""
        positions, p, count = a.shape
        q = b.shape[1]
        B = self._workspace.take("B", (positions, p, positions, q))
        left, right = a.reshape(positions * p, count), b.reshape(positions * q, count)
        self._xp.matmul(left, right.T, out=B.reshape(positions * p, positions * q))
        return B

    def _paired(self, a: Array, b: Array) -> Array:
        """Products of the patches of image k with those of image k alone, (positions, 1, positions, n)."""
        B = self._workspace.take("B", (a.shape[0], 1, b.shape[0], a.shape[1]))
        products = self._xp.matmul(a.transpose(1, 0, 2), b.transpose(1, 2, 0))
        B[:, 0] = products.transpose(1, 2, 0)
        return B

    def _norms(self, part: Prepared) -> list[Array]:
        """Patch norms of a prepared block, layer by layer, (n, positions) each."""
        return [part.arrays[f"norm{k}"] for k in range(1, len(self._network.stages) + 1)]

    # The recursion

    def patch_norms(self, images: Array, parity: int) -> list[Array]:
        """Patch norms of every layer, each (n, positions), of the patches turned by 45 * parity degrees (C6)."""
        xp = self._xp
        patches = self.patches(images, parity)
        B = self._paired(patches, patches)
        every = xp.arange(len(images))
        equal = (xp.zeros_like(every), every)
        norms: list[Array] = []
        for number, stage in enumerate(self._network.stages):
            if number:
                B = self._sum_patches(number, B, "B")
            norm = xp.sqrt(xp.maximum(xp.einsum("ukun->un", B), 0))
            norms.append(norm.T.copy())
            if number < len(self._network.stages) - 1:
                self._scalar_function(stage.layer, B, None, norm[:, None, None], norm, equal)
                B = self._pool(number, B, "B")
        return norms

    def crossed(self, a: Prepared, b: Prepared, equal: tuple[Array, Array] | None) -> list[Array]:
        """The result for every first with every second image, (p, q) float64: of B, and of T if ``tangent``.

        equal: positions (i, j) in the block of pairs of one sample at one turn (K13).
        """
        patches_a, patches_b = self._both(a, b)
        B = self._crossed(patches_a, patches_b)
        return self._values(B, [norm.T[:, :, None, None] for norm in self._norms(a)], b, equal)

    def paired(self, a: Prepared, b: Prepared, equal: bool) -> list[Array]:
        """As ``crossed`` for image k with image k alone, (n,); ``equal``: whether they are one sample at one
        turn."""
        patches_a, patches_b = self._both(a, b)
        B = self._paired(patches_a, patches_b)
        every = self._xp.arange(len(a))
        index = (self._xp.zeros_like(every), every) if equal else None
        values = self._values(B, [norm.T[:, None, None] for norm in self._norms(a)], b, index)
        return [value[0] for value in values]

    def _both(self, a: Prepared, b: Prepared) -> tuple[Array, Array]:
        first = self.patches(a.arrays["image"], self._turns.first)
        return first, self.patches(b.arrays["image"], self._turns.second)

    def _values(
        self, B: Array, norms_a: Sequence[Array], b: Prepared, equal: tuple[Array, Array] | None
    ) -> list[Array]:
        """norms_a: for each layer, ready to broadcast against B."""
        stages = self._network.stages
        T: Array | None = None
        if self._tangent:
            T = self._workspace.take("T", B.shape)
            T[...] = B
        for number, (stage, norm_a, norm_b) in enumerate(zip(stages, norms_a, self._norms(b), strict=True)):
            if number:
                B = self._sum_patches(number, B, "B")
                T = None if T is None else self._sum_patches(number, T, "T")
            self._scalar_function(stage.layer, B, T, norm_a, norm_b.T, equal)
            if number < len(stages) - 1:
                B = self._pool(number, B, "B")
                T = None if T is None else self._pool(number, T, "T")
        totals = []
        for array in (B, T):
            if array is None:
                continue
            if self._uniform is None:
                array *= self._weights[:, None, :, None]
            # In two levels: one float32 sum over all pairs of positions would lose a digit.
            total = array.sum(axis=2, dtype=np.float64).sum(axis=0)
            totals.append(total if self._uniform is None else total * self._uniform)
        return totals

    def _scalar_function(
        self,
        layer: Layer,
        B: Array,
        T: Array | None,
        norm_a: Array,
        norm_b: Array,
        equal: tuple[Array, Array] | None,
    ) -> None:
        """B^M and T^M in place of B^P and T^P (C3, C8)."""
        xp = self._xp
        index: Any = None
        T_before: Array | None = None
        if equal is not None and layer.kernel != "square":
            u = xp.arange(self._positions)[:, None]
            index = (u, equal[0], u, equal[1])
            norm = norm_b[:, equal[1]]
            T_before = None if T is None else T[index]
        before_a, after_a = pointwise.factors(layer, norm_a, True)
        before_b, after_b = pointwise.factors(layer, norm_b, False)
        if before_a is not None:
            B *= before_a
            B *= before_b
        # T is given from the first layer on: nothing is left to be derived there.
        values, T = pointwise.apply(layer, B, T, False, self._workspace.take)
        if values is not B:
            # They lie in scratch memory, which the next layer takes again.
            B[...] = values
        if index is not None:
            value = pointwise.value_at_1(layer, norm)
            pointwise.set_equal(norm > layer.floor, value, T_before, B, T, index)
        pointwise.complete(B, T, None if after_a is None else (after_a, after_b), False)

    def _sum_patches(self, number: int, array: Array, name: str) -> Array:
        """The sum over the offsets d of a patch of B[u + turned d, v + turned d]; may be in other memory."""
        layer = self._network.stages[number].layer
        h, periodic = self._side, self._network.periodic
        p, q = array.shape[1], array.shape[3]
        source = array.reshape(h, h, p, h, h, q)
        scratch = self._workspace.take("scratch1", source.shape)
        if self._turns == (0, 0):
            order = (2, 5, 0, 1, 3, 4)
            sum_over_patches(source.transpose(order), scratch.transpose(order), layer.patch, periodic)
            result = array
        else:
            result = self._workspace.take(f"{name} patches{number % 2}", array.shape)
            total = result.reshape(source.shape)
            total[...] = 0
            both = (patch_taps(layer.patch, parity) for parity in self._turns)
            for taps_a, taps_b in zip(*both, strict=True):
                scratch[...] = 0
                self._add_shifted(scratch, source, taps_b, (3, 4))
                self._add_shifted(total, scratch, taps_a, (0, 1))
        if layer.patch_norm:
            result *= 1 / layer.patch**2
        return result

    def _add_shifted(self, target: Array, source: Array, taps: list[Tap], axes: tuple[int, int]) -> None:
        """Add to target[i, j] the sum of weight * source[i + rows, j + columns], i and j along ``axes``."""
        periodic = self._network.periodic
        for tap in taps:
            for to_row, from_row in shifts(source.shape[axes[0]], tap.rows, periodic):
                for to_column, from_column in shifts(source.shape[axes[1]], tap.columns, periodic):
                    to, origin = [slice(None)] * source.ndim, [slice(None)] * source.ndim
                    to[axes[0]], to[axes[1]] = to_row, to_column
                    origin[axes[0]], origin[axes[1]] = from_row, from_column
                    part = source[tuple(origin)]
                    target[tuple(to)] += part if tap.weight == 1 else tap.weight * part

    def _pool(self, number: int, array: Array, name: str) -> Array:
        """One matrix along each of the four axes of positions; may be in other memory."""
        H = self._pooling[number]
        if H is None:
            return array
        shape, h = array.shape, self._side
        other = self._workspace.take("scratch1", shape)
        result = self._workspace.take(f"{name} pooled", shape)
        columns = (h * h * shape[1] * h, h, shape[3])
        lines = (h * h * shape[1], h, h * shape[3])
        self._xp.matmul(H, array.reshape(columns), out=other.reshape(columns))
        self._xp.matmul(H, other.reshape(lines), out=result.reshape(lines))
        self._xp.matmul(H, result.reshape(h, h, -1), out=other.reshape(h, h, -1))
        self._xp.matmul(H, other.reshape(h, -1), out=result.reshape(h, -1))
        return result

    def cost(self, n: int, m: int) -> Cost:
        """Cost of n x m pairs."""
        p, q = self.block_shape(m)
        p = min(n, p)
        arrays = 1 + self._tangent
        stages = self._network.stages
        entries = float(self._positions**2)
        operations, transcendentals = 2.0 * self._features * entries, 0.0
        for number, stage in enumerate(stages):
            layer = stage.layer
            relu = layer.kernel == "relu"
            if number:
                taps = [patch_taps(layer.patch, parity) for parity in self._turns]
                passes = (
                    2 * layer.patch if self._turns == (0, 0) else 2 * sum(len(t) for ts in taps for t in ts)
                )
                operations += arrays * passes * entries
            operations += entries * (5 + 6 * relu + 2 * relu * self._tangent)
            transcendentals += entries * (2 * relu + (layer.kernel == "exponential"))
            if number < len(stages) - 1 and self._pooling[number] is not None:
                operations += arrays * 8.0 * self._side * entries
        operations += 2.0 * arrays * entries
        sides = self._positions * self._features
        scratch = p * q * (self._numbers_per_pair - 2 * sides) + (p + q) * sides
        scratch += self._kept
        return Cost(n * m * operations, n * m * transcendentals, int(scratch) * self._dtype.itemsize)


def _pooling(H: np.ndarray, xp: ModuleType, dtype: np.dtype) -> Array | None:
    """The matrix of both axes, or None for the identity."""
    return None if np.array_equal(H, np.eye(len(H))) else xp.asarray(H, dtype)


def turned_trace_weights(network: Network, quarters: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors F and G, (h, h) each, of what B^M_L counts between positions (i, j) and (k, m): F[i, k] G[j, m], and
    after an odd number of quarters F[i, m] G[j, k].

    That is H[u, (i, j)] H[v, (k, m)] summed over the positions u after the last pooling, v being u turned back by
    90 * quarters degrees.
    """
    rows, columns = network.stages[-1][2:]
    # Position (a, b) meets (a, b), (end - b, a), (end - a, end - b) or (b, end - a).
    first, second = (columns, rows) if quarters % 2 else (rows, columns)
    flips_first, flips_second = quarters in (2, 3), quarters in (1, 2)
    return rows.T @ first[:: -1 if flips_first else 1], columns.T @ second[:: -1 if flips_second else 1]
