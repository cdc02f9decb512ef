"""The recursion of convolutional kernels over layers, for blocks of pairs of images (SPEC C1 to C9).

A pair of images is followed through the layers as its cross-Gram array B[u, v], u a position of the
first image, v one of the second, and for tangent kernels a second array T. The last pooling and the trace
collapse into weights (C9). Pairs are taken in blocks that fit in the cache; where one pair does not fit,
its first layer is taken in strips of image rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import Array
from .base import Cost, Prepared
from .dot_product import angles, inverse_norms, raise_to
from .layers import Layer
from .network import Network, Stage
from .patches import extract_patches, sum_over_patches
from .workspace import Workspace, block_bytes

_BLOCK_FACTOR = 4
"""A block of several pairs may be so much larger than a strip: fewer calls outweigh some cache misses."""

_GROUP_BYTES = 1 << 23
"""Patches of the second images are kept for as many images as fit in this."""

_KRONECKER_POSITIONS = 256
"""Up to so many positions both axes are pooled by one matrix: fewer, larger products."""


@dataclass
class Side:
    """One side of a block of pairs, broadcast against the other.

    features: what the first layer multiplies; norms, before, after: for each layer, patch norms and the
    factors of this side before and after the scalar function (None where all are 1). The first two axes
    number the images of the first and of the second side.
    """

    features: Array
    norms: list[Array]
    before: list[Array | None]
    after: list[Array | None]

    def __getitem__(self, columns: slice) -> Side:
        return self._map(lambda array: array[:, columns])

    def paired(self) -> Side:
        """This second side turned, so that image i meets image i of the first side alone."""
        return self._map(lambda array: array.swapaxes(0, 1))

    def _map(self, view: Any) -> Side:
        def each(arrays: Sequence[Array | None]) -> list[Any]:
            return [None if array is None else view(array) for array in arrays]

        return Side(view(self.features), each(self.norms), each(self.before), each(self.after))


class Recursion:
    """The recursion over layers for blocks of pairs of images of one size and dtype."""

    def __init__(self, network: Network, tangent: bool, xp: ModuleType, dtype: np.dtype) -> None:
        self.stages = network.stages
        self._periodic = network.periodic
        self._tangent = tangent
        self._xp = xp
        self._dtype = dtype
        self._workspace = Workspace(xp, dtype)
        self._strip_entries = block_bytes(xp) // dtype.itemsize
        self._pooling = [self._pooling_matrices(stage) for stage in self.stages[:-1]]
        weights = np.kron(*network.trace_weights)
        self._uniform = float(weights[0, 0]) if np.all(weights == weights[0, 0]) else None
        self._weights = None if self._uniform is not None else xp.asarray(weights, dtype)

    def _pooling_matrices(self, stage: Stage) -> tuple[Array, ...]:
        """Nothing for the identity, one matrix for both axes of a small grid, else one for each axis."""
        if all(H.shape[0] == H.shape[1] and np.array_equal(H, np.eye(len(H))) for H in stage[2:]):
            return ()
        if math.prod(stage.grid) <= _KRONECKER_POSITIONS:
            return (self._xp.asarray(np.kron(stage.rows, stage.columns), self._dtype),)
        H, C = (self._xp.asarray(H, self._dtype) for H in stage[2:])
        return H, C, self._xp.ascontiguousarray(C.T)

    # Sizes of blocks

    @property
    def _positions(self) -> int:
        return math.prod(self.stages[0].grid)

    @property
    def pairs_per_block(self) -> int:
        return max(1, _BLOCK_FACTOR * self._strip_entries // self._positions**2)

    def block_shape(self, m: int) -> tuple[int, int]:
        """Images of the first and of the second side in one block, where the second side has m."""
        q = min(m, self.pairs_per_block)
        return max(1, self.pairs_per_block // q), q

    def group_size(self, channels: int) -> int:
        """Second images whose features are kept at a time."""
        features = self._feature_count(channels) * self._positions * self._dtype.itemsize
        return max(1, _GROUP_BYTES // features)

    def _feature_count(self, channels: int) -> int:
        layer = self.stages[0].layer
        return layer.patch**2 * channels + (2 if layer.kernel == "exponential" else 0)

    def _strips(self, number: int, pairs: int) -> Iterator[slice]:
        """Image rows of the first side taken at a time: some, where one pair does not fit in the cache."""
        h, w = self.stages[number].grid
        step = h
        if number == 0 and pairs == 1 and self._positions > _KRONECKER_POSITIONS:
            step = min(h, max(1, self._strip_entries // (w * self._positions)))
        for start in range(0, h, step):
            yield slice(start, min(start + step, h))

    # The two sides

    def first(self, part: Prepared) -> Side:
        side = self._side(part, True)
        return side._map(lambda array: array[:, None])

    def second(self, part: Prepared) -> Side:
        return self._side(part, False)._map(lambda array: array[None])

    def _side(self, part: Prepared, first: bool) -> Side:
        norms = [part.arrays[f"norm{number}"] for number in range(1, len(self.stages) + 1)]
        patches = self._patches(part.arrays["image"])
        side = Side(self._features(patches, norms[0], first), [], [], [])
        for number, norm in enumerate(norms):
            self._append(side, number, norm, first)
        return side

    def _append(self, side: Side, number: int, norm: Array, first: bool) -> None:
        """Add the norms (..., positions) of a layer to a side, and the factors that they give."""
        layer = self.stages[number].layer
        before, after = self._factors(layer, norm, first)
        axis = (..., slice(None), None) if first else (..., None, slice(None))
        side.norms.append(norm)
        side.before.append(None if number == 0 or before is None else before[axis])
        side.after.append(None if after is None or (number == 0 and layer.kernel != "relu") else after[axis])

    def _factors(self, layer: Layer, norm: Array, first: bool) -> tuple[Array | None, Array | None]:
        """What multiplies inner products before, and values after, the scalar function of the layer (C3).

        Constants go to the first side. For a power the norms go inside, (|z|^(1/q) |z'|^(1/q) cos)^q.
        """
        inverse = inverse_norms(norm, layer.floor)
        match layer.kernel:
            case "relu":
                return inverse, norm / math.pi if first else norm
            case "exponential":
                return inverse * layer.number() if first else inverse, norm
            case "polynomial":
                return inverse * norm ** (1 / layer.number()), None
            case "linear":
                return inverse * norm * (layer.number() if first else 1.0), None
        return None, None

    def _patches(self, images: Array) -> Array:
        """Patches of the first layer, (n, positions, features of a patch)."""
        layer = self.stages[0].layer
        patches = extract_patches(images, layer.patch, self._periodic)
        patches = patches.reshape(len(images), self._positions, -1)
        if layer.patch_norm:
            patches *= 1 / layer.patch
        return patches

    def _features(self, patches: Array, norm: Array, first: bool) -> Array:
        """Rows whose products are what the first layer's scalar function takes.

        (n, positions, features) for the first side, (n, features, positions) for the second. For the
        exponential kernel these products are log(|z| |z'| kappa): two more features carry the norms.
        """
        xp = self._xp
        layer = self.stages[0].layer
        n, positions, count = patches.shape
        folded = layer.kernel == "exponential"
        features = xp.empty((n, positions, count + 2 * folded), self._dtype)
        if not first:
            features = features.reshape(n, count + 2 * folded, positions).swapaxes(1, 2)
        if folded:
            exponent = layer.number()
            root = math.sqrt(exponent) * inverse_norms(norm, layer.floor)
            xp.multiply(patches, root[..., None], out=features[..., :count])
            # exp of it is zero in this dtype, whatever the other side adds: the kernel of a zero patch.
            nothing = 4 * math.log(np.finfo(self._dtype).tiny)
            logarithm = xp.log(xp.where(norm > 0, norm, 1)) - exponent / 2
            features[..., count if first else count + 1] = xp.where(norm > 0, logarithm, nothing)
            features[..., count + 1 if first else count] = 1
        else:
            before, _ = self._factors(layer, norm, first)
            xp.multiply(patches, 1 if before is None else before[..., None], out=features)
        return features if first else features.swapaxes(1, 2)

    def cost(self, n: int, m: int, channels: int) -> Cost:
        """Cost of n x m pairs; every array of this class is counted by its name."""
        group = min(m, self.group_size(channels))
        p, q = self.block_shape(group)
        p = min(n, p)
        pairs = p * q
        arrays = 1 + self._tangent
        sizes: dict[str, float] = {}

        def take(name: str, size: float) -> None:
            sizes[name] = max(sizes.get(name, 0), size)

        features = self._feature_count(channels)
        operations = 2.0 * features * self._positions**2
        transcendentals = 0.0
        for number, (layer, (h, w), H, C) in enumerate(self.stages):
            positions = h * w
            entries = positions**2
            rows = next(self._strips(number, pairs)).stop
            strip = pairs * rows * w * positions
            relu, polynomial = layer.kernel == "relu", layer.kernel == "polynomial"
            if number == 0:
                take("B0", strip)
            elif layer.patch > 1:
                operations += arrays * 2.0 * layer.patch * entries
                take("scratch1", strip)
            operations += entries * (4 + 7 * relu + 4 * relu * self._tangent)
            transcendentals += entries * (2 * relu + (layer.kernel == "exponential"))
            if relu or polynomial:
                take("scratch1", strip)
            if relu:
                take("scratch2", strip)
            if number == len(self.stages) - 1:
                operations += 2.0 * arrays * entries
                continue
            matrices = self._pooling[number]
            h_out, w_out = len(H), len(C)
            positions_out = h_out * w_out
            for name in "BT"[:arrays]:
                take(f"{name}{1 + number % 2}", pairs * (positions_out if matrices else positions) ** 2)
                if len(matrices) > 1:
                    take(f"rows {name}", pairs * h * w_out * positions_out)
            if len(matrices) == 1:
                take("pool1", pairs * positions * positions_out)
                operations += arrays * 2.0 * positions * positions_out * (positions + positions_out)
            elif matrices:
                take("pool1", pairs * rows * w_out * positions)
                take("pool2", pairs * rows * w_out * h * w_out)
                columns = h * w * w_out * positions + h * w_out * h * w * w_out
                lines = h * w_out * h * h_out * w_out + h_out * h * w_out * positions_out
                operations += arrays * 2.0 * (columns + lines)
        factors = 2 * sum(math.prod(stage.grid) for stage in self.stages)
        side = self._positions * features
        scratch = group * (side + factors) + p * (2 * side + factors) + sum(sizes.values())
        if self._weights is not None:
            scratch += self._weights.size
        # A new group's patches are there beside the features made of them.
        scratch = max(scratch, group * (2 * side + factors)) if group == m else scratch + group * side
        return Cost(n * m * operations, n * m * transcendentals, int(scratch) * self._dtype.itemsize)

    # The recursion

    def patch_norms(self, images: Array) -> list[Array]:
        """Patch norms of every layer, each (n, positions), from the images' own Gram arrays (C6)."""
        xp = self._xp
        patches = self._patches(images)
        norm = xp.sqrt((patches * patches).sum(axis=2))
        sides = []
        for first in (True, False):
            side = Side(self._features(patches, norm, first)[:, None], [], [], [])
            self._append(side, 0, norm[:, None], first)
            sides.append(side)
        equal = (xp.arange(len(images)), xp.zeros(len(images), np.int64))
        B: Array | None = None
        for number in range(1, len(self.stages)):
            B, _ = self._layer(number - 1, sides[0], sides[1], equal, B, None)
            self._sum_patches(number, B)
            norm = xp.sqrt(xp.maximum(xp.einsum("...uu->...u", B), 0))
            for side, first in zip(sides, (True, False), strict=True):
                self._append(side, number, norm, first)
        return [norm[:, 0] for norm in sides[0].norms]

    def block(self, a: Side, b: Side, equal: tuple[Array, Array] | None) -> list[Array]:
        """The trace of B, and with ``tangent`` that of T, (p, q) float64, for the pairs of two sides.

        ``equal`` are the positions in the block of pairs of one sample (K13).
        """
        B: Array | None = None
        T: Array | None = None
        for number in range(len(self.stages) - 1):
            if number:
                self._sum_patches(number, B, T)
            B, T = self._layer(number, a, b, equal, B, T)
        last = len(self.stages) - 1
        if last:
            self._sum_patches(last, B, T)
        totals: list[Any] = [0.0, 0.0]
        for rows, *arrays in self._mapped(last, a, b, equal, B, T):
            for k, array in enumerate(arrays):
                if array is not None:
                    totals[k] = totals[k] + self._weighted_sum(array, rows)
        return totals[: 1 + self._tangent]

    def _layer(
        self,
        number: int,
        a: Side,
        b: Side,
        equal: tuple[Array, Array] | None,
        B: Array | None,
        T: Array | None,
    ) -> tuple[Array, Array | None]:
        """Scalar function and pooling of one layer that is not the last: the next B, and T."""
        results: list[Any] = [None, None]
        for rows, *arrays in self._mapped(number, a, b, equal, B, T):
            for k, array in enumerate(arrays):
                if array is not None:
                    results[k] = self._pool(number, array, rows, "BT"[k])
        return results[0], results[1]

    def _mapped(
        self,
        number: int,
        a: Side,
        b: Side,
        equal: tuple[Array, Array] | None,
        B: Array | None,
        T: Array | None,
    ) -> Iterator[tuple[slice, Array, Array | None]]:
        """Image rows of the first side with B^M and T^M on them, (p, q, positions of the rows, positions)."""
        w = self.stages[number].grid[1]
        if number:
            rows = slice(0, self.stages[number].grid[0])
            yield rows, *self._scalar_function(number, a, b, equal, B, T, slice(None))
            return
        xp = self._xp
        p, q = a.features.shape[0], b.features.shape[1]
        # Products of one image row with a whole image are small enough for BLAS to skip its packing.
        lines = w if self._positions > _KRONECKER_POSITIONS else self._positions
        for rows in self._strips(0, p * q):
            here = slice(rows.start * w, rows.stop * w)
            product = self._workspace.take("B0", (p, q, here.stop - here.start, self._positions))
            xp.matmul(
                a.features[:, :, here].reshape(p, 1, -1, lines, a.features.shape[3]),
                b.features[:, :, None],
                out=product.reshape(p, q, -1, lines, self._positions),
            )
            yield rows, *self._scalar_function(0, a, b, equal, product, None, here)

    def _scalar_function(
        self,
        number: int,
        a: Side,
        b: Side,
        equal: tuple[Array, Array] | None,
        B: Array,
        T: Array | None,
        here: slice,
    ) -> tuple[Array, Array | None]:
        """B^M and T^M in place of B^P and T^P (C3, C8); ``here`` are the positions of the first side."""
        xp = self._xp
        layer = self.stages[number].layer
        index = None
        if equal is not None and layer.kernel != "square":
            norm = a.norms[number][equal[0], 0][:, here]
            u = xp.arange(norm.shape[1])
            index = (equal[0][:, None], equal[1][:, None], u, u + (here.start or 0))
            square = norm * norm
            tangent_before = T[index] if T is not None else square
        before_a, before_b = a.before[number], b.before[number]
        after_a, after_b = a.after[number], b.after[number]
        if before_a is not None:
            B *= before_a[:, :, here]
            B *= before_b
        match layer.kernel:
            case "exponential":
                if number:
                    B -= layer.number()
                xp.exp(B, out=B)
            case "polynomial":
                raise_to(B, int(layer.number()), self._workspace.take("scratch1", B.shape))
            case "square":
                B *= B
            case "relu":
                angle = self._workspace.take("scratch1", B.shape)
                sine = self._workspace.take("scratch2", B.shape)
                angles(B, angle, sine)
                B *= angle
                if self._tangent and number == 0:
                    # T^P is B^P here: with c kappa_0 still in B, T^M is that much more than B^M.
                    sine += B
                    B += sine
                    B, T = sine, B
                    T *= after_a[:, :, here]  # type: ignore[index]
                    T *= after_b
                else:
                    B += sine
        if after_a is not None:
            B *= after_a[:, :, here]
            B *= after_b
        if self._tangent and number:
            assert T is not None
            angle *= 1 / math.pi
            T *= angle
            T += B
        if index is not None:
            regular = norm > layer.floor
            at_1 = layer.number() if layer.kernel == "linear" else 1.0
            B[index] = xp.where(regular, at_1 * square, B[index])
            if T is not None:
                T[index] = xp.where(regular, tangent_before + square, T[index])
        return B, T

    def _sum_patches(self, number: int, *arrays: Array | None) -> None:
        stage = self.stages[number]
        for array in arrays:
            if array is None:
                continue
            shape = (*array.shape[:-2], *stage.grid, *stage.grid)
            scratch = self._workspace.take("scratch1", shape)
            sum_over_patches(array.reshape(shape), scratch, stage.layer.patch, self._periodic)
            if stage.layer.patch_norm:
                array *= 1 / stage.layer.patch**2

    def _pool(self, number: int, array: Array, rows: slice, name: str) -> Array | None:
        """Pool the given image rows; the pooled array once these were the last rows, else None.

        array: (p, q, positions of the rows, positions); the result (p, q, positions, positions) of the next
        grid, or (pairs, ...) of it.
        """
        xp, take = self._xp, self._workspace.take
        h, w = self.stages[number].grid
        positions = h * w
        leading = array.shape[:2]
        pairs = math.prod(leading)
        target = f"{name}{1 + number % 2}"
        matrices = self._pooling[number]
        if len(matrices) == 0:
            whole_array = take(target, (*leading, positions, positions))
            whole_array[:, :, rows.start * w : rows.stop * w] = array
            return whole_array if rows.stop == h else None
        if len(matrices) == 1:
            (H,) = matrices
            right = take("pool1", (pairs * positions, len(H)))
            xp.matmul(array.reshape(-1, positions), H.T, out=right)
            pooled = take(target, (*leading, len(H), len(H)))
            xp.matmul(H, right.reshape(*leading, positions, len(H)), out=pooled)
            return pooled
        H, C, C_transposed = matrices
        r = rows.stop - rows.start
        first_columns = take("pool1", (pairs * r, len(C), positions))
        xp.matmul(C, array.reshape(pairs * r, w, positions), out=first_columns)
        columns = take("pool2", (pairs * r * len(C) * h, len(C)))
        xp.matmul(first_columns.reshape(-1, w), C_transposed, out=columns)
        # Only pairs that come one by one are cut into strips, so these rows are one piece of memory.
        part = take(f"rows {name}", (pairs, h, len(C) * len(H) * len(C)))
        view = part[:, rows].reshape(pairs * r * len(C), len(H), len(C))
        xp.matmul(H, columns.reshape(pairs * r * len(C), h, len(C)), out=view)
        if rows.stop < h:
            return None
        pooled = take(target, (*leading, len(H) * len(C), len(H) * len(C)))
        xp.matmul(H, part, out=pooled.reshape(pairs, len(H), -1))
        return pooled

    def _weighted_sum(self, array: Array, rows: slice) -> Array:
        """The sum over positions with the weights of the last pooling and the trace (C9), (p, q) float64.

        It goes in two levels: one float32 sum over all positions would lose a digit.
        """
        w = self.stages[-1].grid[1]
        if self._weights is not None:
            array *= self._weights[rows.start * w : rows.stop * w]
        total = array.sum(axis=-1).sum(axis=-1, dtype=np.float64)
        return total if self._uniform is None else total * self._uniform
