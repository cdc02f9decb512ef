"""The recursion of convolutional kernels over layers, for blocks of pairs of images (SPEC C1 to C9).

A pair of images is followed through the layers as its cross-Gram array B[u, v], u a position of the
first image, v one of the second, and for tangent kernels a second array T. The last pooling and the trace
collapse into weights (C9). Pairs are taken in blocks that fit in the cache; where one pair does not fit,
its first layer is taken in strips of image rows, against those rows of the other image that are needed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import costs, explicit, pointwise
from .arrays import Array
from .base import Cost, Prepared
from .blocks import Side
from .dot_product import inverse_norms
from .network import Network, Stage
from .patches import extract_patches, patch_offsets, sum_over_patches
from .workspace import Workspace, block_bytes, budget_bytes, padded

_BLOCK_FACTOR = 4
"""A block of several pairs may be so much larger than a strip: fewer calls outweigh some cache misses."""

_GROUP_BYTES = 1 << 23
"""Features of the second images are kept for as many images as fit in this."""

_EXPLICIT_GROUP_BYTES = 1 << 25
"""The same for explicit features, which are dearer to compute again."""

_KRONECKER_POSITIONS = 256
"""Up to so many positions both axes are pooled by one matrix, and patches are summed by shifts of whole arrays:
fewer, larger calls."""


class Strip(NamedTuple):
    """Image rows of the first side, and those of the second that are needed with them."""

    rows: slice
    others: slice


class Recursion:
    """The recursion over layers for blocks of pairs of images (h, w, channels) of one size and dtype."""

    def __init__(
        self, network: Network, tangent: bool, xp: ModuleType, dtype: np.dtype, channels: int
    ) -> None:
        self.stages = network.stages
        self._network = network
        self._periodic = network.periodic
        self.tangent = tangent
        self._xp = xp
        self.dtype = dtype
        self.channels = channels
        self._workspace = Workspace(xp, dtype)
        self._strip_entries = block_bytes(xp) // dtype.itemsize
        self.start = int(explicit.pays(network, channels))
        """The first layer whose scalar function is evaluated at pairs of positions."""
        self.pooling = [self._pooling_matrices(stage) for stage in self.stages[:-1]]
        # Patches of the first layer are those of the images.
        self.shifts = [(), *(self._masked_shifts(stage) for stage in self.stages[1:])]
        self.folds = (
            self.start == 0
            and len(self.stages) > 1
            and len(self.pooling[0]) == 3
            and self.stages[0].layer.kernel == "relu"
        )
        self.column_groups = [self._groups(stage.columns) for stage in self.stages[:-1]]
        self._first_strips = self._strips_of_rows()
        rows, columns = network.trace_weights
        uniform = np.all(rows == rows[0, 0]) and np.all(columns == columns[0, 0])
        self.uniform = float(rows[0, 0] * columns[0, 0]) if uniform else None
        """What every pair of positions of the last grid counts in the trace, where all count the same."""

    @cached_property
    def _weights(self) -> Array:
        """What each pair of positions of the last grid counts in the trace (C9)."""
        rows, columns = self._network.trace_weights
        h, w = self.stages[-1].grid
        weights = np.empty((h, w, h, w), self.dtype)
        np.multiply(rows[:, None, :, None], columns[None, :, None, :], out=weights, casting="same_kind")
        return self._xp.asarray(weights.reshape(h * w, h * w))

    def _pooling_matrices(self, stage: Stage) -> tuple[Array, ...]:
        """Nothing for the identity, one matrix for both axes of a small grid, else one for each axis."""
        if stage.passes_on:
            return ()
        if math.prod(stage.grid) <= _KRONECKER_POSITIONS:
            return (self._xp.asarray(np.kron(stage.rows, stage.columns), self.dtype),)
        H, C = (self._xp.asarray(H, self.dtype) for H in stage[2:])
        return H, C, self._xp.ascontiguousarray(C.T)

    def _masked_shifts(self, stage: Stage) -> tuple[list[tuple[int, Array]], ...]:
        """How patches are summed over a small grid, along rows and along columns: for each offset how far an array
        (positions squared) is shifted, and where what then comes from beyond the border is dropped."""
        h, w = stage.grid
        positions = h * w
        if self._periodic or positions > _KRONECKER_POSITIONS:
            return ()
        found = []
        for axis, n in enumerate(stage.grid):
            index = np.arange(positions) // w if axis == 0 else np.arange(positions) % w
            step = w if axis == 0 else 1
            shifts = []
            for d in patch_offsets(stage.layer.patch):
                inside = (index + d >= 0) & (index + d < n)
                if d and inside.any():
                    mask = (inside[:, None] & inside).ravel()
                    shifts.append((d * step * (positions + 1), self._xp.asarray(mask, self.dtype)))
            found.append(shifts)
        return tuple(found)

    @staticmethod
    def _groups(C: np.ndarray) -> list[tuple[slice, slice]]:
        """Outputs of the pooling of columns, and the inputs that they need: in halves, where that saves much."""
        half = len(C) // 2
        for groups in ([slice(0, half), slice(half, len(C))], [slice(0, len(C))]):
            inputs = [_hull(C[out].any(axis=0)) for out in groups]
            work = sum((o.stop - o.start) * (i.stop - i.start) for o, i in zip(groups, inputs, strict=True))
            if half >= 4 and work < 0.7 * C.size:
                break
        return list(zip(groups, inputs, strict=True))

    def _strips_of_rows(self) -> list[Strip]:
        """Strips of the first layer, for pairs that do not fit in the cache."""
        first = self.stages[0]
        h, w = first.grid
        # Sums of values of both signs could be large where the next layer's norms are small: then nothing may be
        # left out of them.
        odd = first.layer.kernel == "linear" or (first.layer.degree or 0) % 2 == 1
        support = np.ones((h, h), bool)
        if len(self.stages) == 1 or (not odd and len(self.pooling[0]) == 3):
            support = self._network.support[0].rows
        step = min(h, max(1, self._strip_entries // (w * h * w)))
        strips = [slice(start, min(start + step, h)) for start in range(0, h, step)]
        return [Strip(rows, _hull(support[rows].any(axis=0))) for rows in strips]

    # Sizes of blocks

    @property
    def positions(self) -> int:
        return math.prod(self.stages[self.start].grid)

    @cached_property
    def pairs_per_block(self) -> int:
        most = max(1, _BLOCK_FACTOR * self._strip_entries // self.positions**2)
        budget = budget_bytes(self._xp)

        def needed(pairs: int) -> int:
            return costs.recursion_bytes(self, pairs, self.group_size)

        if needed(most) <= budget:
            return most
        return max(1, bisect_right(range(1, most), budget, key=needed))

    @property
    def group_size(self) -> int:
        """Second images whose features are kept at a time."""
        features = self.feature_count * padded(self.positions, self.dtype) * self.dtype.itemsize
        return max(1, (_EXPLICIT_GROUP_BYTES if self.start else _GROUP_BYTES) // features)

    @property
    def feature_count(self) -> int:
        layer = self.stages[0].layer
        if self.start:
            return explicit.count(layer, self.channels)
        return layer.patch**2 * self.channels + (2 if layer.kernel == "exponential" else 0)

    def strips(self, number: int, pairs: int) -> list[Strip]:
        """Strips of the first layer, where one pair does not fit in the cache; otherwise all."""
        if number == 0 and pairs == 1 and self.positions > _KRONECKER_POSITIONS:
            return self._first_strips
        rows = slice(0, self.stages[number].grid[0])
        return [Strip(rows, rows)]

    def cost(self, n: int, m: int) -> Cost:
        return costs.of_recursion(self, n, m)

    # The two sides

    def first(self, part: Prepared) -> Side:
        side = self._side(part, True)
        if self.folds:
            after = side.after[0].reshape(len(part), self.stages[0].grid[0], 1, -1)
            side.pooling, side.after[0] = after * self.pooling[0][1], None
        return side.map(lambda array: array[:, None])

    def second(self, part: Prepared) -> Side:
        return self._side(part, False).map(lambda array: array[None])

    def _side(self, part: Prepared, first: bool) -> Side:
        norms = [part.arrays[f"norm{number}"] for number in range(1, len(self.stages) + 1)]
        image = part.arrays["image"]
        if self.start:
            features = explicit.features(image, norms[0], self.stages[0], self._periodic)
            side = Side(features if first else features.swapaxes(1, 2), [], [], [])
        else:
            side = Side(self._features(self._patches(image), norms[0], first), [], [], [])
        for number, norm in enumerate(norms):
            before, after = pointwise.factors(self.stages[number].layer, norm, first)
            if number == 0:
                # In the features; those of the exponential kernel hold the norms as well.
                before = None
                after = after if self.stages[0].layer.kernel == "relu" else None
            axis = (..., slice(None), None) if first else (..., None, slice(None))
            side.norms.append(norm)
            side.before.append(None if before is None else before[axis])
            side.after.append(None if after is None else after[axis])
            if number == 0 and self.tangent:
                short = pointwise.shortfall(self.stages[0].layer, norm)
                side.short = None if short is None else short[axis]
        return side

    def _patches(self, images: Array) -> Array:
        """Patches of the first layer, (n, positions, features of a patch)."""
        layer = self.stages[0].layer
        patches = extract_patches(images, layer.patch, self._periodic)
        patches = patches.reshape(len(images), self.positions, -1)
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
        total = self.feature_count
        if first:
            features = xp.empty((n, positions, total), self.dtype)
        else:
            lines = xp.empty((n, total, padded(positions, self.dtype)), self.dtype)
            features = lines[:, :, :positions].swapaxes(1, 2)
        if folded:
            exponent = layer.number()
            root = math.sqrt(exponent) * inverse_norms(norm, layer.floor)
            xp.multiply(patches, root[..., None], out=features[..., :count])
            # exp of it is zero in this dtype, whatever the other side adds: the kernel of a zero patch.
            nothing = 4 * math.log(np.finfo(self.dtype).tiny)
            logarithm = xp.log(xp.where(norm > 0, norm, 1)) - exponent / 2
            features[..., count if first else count + 1] = xp.where(norm > 0, logarithm, nothing)
            features[..., count + 1 if first else count] = 1
        else:
            before, _ = pointwise.factors(layer, norm, first)
            xp.multiply(patches, 1 if before is None else before[..., None], out=features)
        return features if first else features.swapaxes(1, 2)

    # The recursion

    def block(self, a: Side, b: Side, equal: tuple[Array, Array] | None) -> list[Array]:
        """The trace of B, and with ``tangent`` that of T, (p, q) float64, for the pairs of two sides.

        ``equal`` are the positions in the block of pairs of one sample (K13).
        """
        B: Array | None = None
        T: Array | None = None
        last = len(self.stages) - 1
        if self.start:
            shape = (a.features.shape[0], b.features.shape[1], self.positions, self.positions)
            B = self._xp.matmul(a.features, b.features, out=self._workspace.take("B1", shape))
        for number in range(self.start, last):
            if number:
                self._sum_patches(number, B, T)
            B, T = self._layer(number, a, b, equal, B, T)
        if last:
            self._sum_patches(last, B, T)
        return self._trace(a, b, equal, B, T)

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
        after_a, after_b = a.after[number], b.after[number]
        for strip, here, there, *arrays in self._mapped(number, a, b, equal, B, T):
            after = None if after_a is None else (after_a[:, :, here], after_b[..., there])
            pointwise.complete(arrays[0], arrays[1], after, number == 0)
            for k, array in enumerate(arrays):
                if array is not None:
                    results[k] = self._pool(number, array, strip, "BT"[k], a, b)
        return results[0], results[1]

    def _mapped(
        self,
        number: int,
        a: Side,
        b: Side,
        equal: tuple[Array, Array] | None,
        B: Array | None,
        T: Array | None,
    ) -> Iterator[tuple[Strip, slice, slice, Array, Array | None]]:
        """Strips, their positions on both sides, and what ``pointwise.apply`` gives there for B and T.

        Arrays are (p, q, positions of the rows, positions of the others).
        """
        xp = self._xp
        w = self.stages[number].grid[1]
        p, q = a.features.shape[0], b.features.shape[1]
        for strip in self.strips(number, p * q):
            here, there = (slice(rows.start * w, rows.stop * w) for rows in strip)
            length = there.stop - there.start
            if number == 0:
                # Products of one image row with a whole image are small enough for BLAS to skip its packing.
                lines = w if self.positions > _KRONECKER_POSITIONS else here.stop - here.start
                B = self._workspace.take("B0", (p, q, here.stop - here.start, padded(length, self.dtype)))
                xp.matmul(
                    a.features[:, :, here].reshape(p, 1, -1, lines, a.features.shape[3]),
                    b.features[:, :, None, :, there],
                    out=B[..., :length].reshape(p, q, -1, lines, length),
                )
                if a.short is None and b.short is None:
                    # One run of memory takes half the time of as many lines: the padding goes along, as zeros.
                    B[..., length:] = 0
                else:
                    B = B[..., :length]
            assert B is not None
            B_mapped, T_mapped = self._scalar_function(number, a, b, equal, B, T, here, there)
            yield (
                strip,
                here,
                there,
                B_mapped[..., :length],
                None if T_mapped is None else T_mapped[..., :length],
            )

    def _padded(self, name: str, shape: tuple[int, ...]) -> Array:
        """Scratch memory whose lines do not lie whole pages apart."""
        lines = self._workspace.take(name, (*shape[:-1], padded(shape[-1], self.dtype)))
        return lines[..., : shape[-1]]

    def _scalar_function(
        self,
        number: int,
        a: Side,
        b: Side,
        equal: tuple[Array, Array] | None,
        B: Array,
        T: Array | None,
        here: slice,
        there: slice,
    ) -> tuple[Array, Array | None]:
        """``pointwise.apply`` to B^P and T^P at these positions, with what is exact for pairs of one sample (K13)."""
        layer = self.stages[number].layer
        index: Any = None
        T_before: Array | None = None
        if equal is not None and layer.kernel != "square":
            both = slice(max(here.start, there.start), min(here.stop, there.stop))
            u = self._xp.arange(both.start, both.stop)
            norm = a.norms[number][equal[0], 0][:, both]
            index = (equal[0][:, None], equal[1][:, None], u - here.start, u - there.start)
            T_before = None if T is None else T[index]
        before_a, before_b = a.before[number], b.before[number]
        if before_a is not None:
            B *= before_a
            B *= before_b
        if number == 0 and layer.kernel == "exponential":
            self._xp.exp(B, out=B)
            value = None if index is None else norm * norm
        else:
            short = (
                None if number or a.short is None else a.short[:, :, here],
                None if number or b.short is None else b.short[..., there],
            )
            B, T = pointwise.apply(layer, B, T, self.tangent, self._workspace.take, short)
            value = None if index is None else pointwise.value_at_1(layer, norm)
        if index is not None:
            pointwise.set_equal(norm > layer.floor, value, T_before, B, T, index)
        return B, T

    def _sum_patches(self, number: int, *arrays: Array | None) -> None:
        stage = self.stages[number]
        for array in arrays:
            if array is None:
                continue
            if self.shifts[number]:
                for shifts in self.shifts[number]:
                    self._add_shifted(array, shifts)
            else:
                shape = (*array.shape[:-2], *stage.grid, *stage.grid)
                scratch = self._workspace.take("scratch1", shape)
                sum_over_patches(array.reshape(shape), scratch, stage.layer.patch, self._periodic)
            if stage.layer.patch_norm:
                array *= 1 / stage.layer.patch**2

    def _add_shifted(self, array: Array, shifts: list[tuple[int, Array]]) -> None:
        """Add to ``array`` all its shifts, of which only the unmasked part counts."""
        size = array.shape[-2] * array.shape[-1]
        flat = array.reshape(-1, size)
        source = self._workspace.take("scratch1", flat.shape)
        source[...] = flat
        for shift, mask in shifts:
            to = slice(max(0, -shift), size - max(0, shift))
            product = self._workspace.take("scratch2", (len(flat), to.stop - to.start))
            self._xp.multiply(source[:, to.start + shift : to.stop + shift], mask[to], out=product)
            flat[:, to] += product

    def _pool(self, number: int, array: Array, strip: Strip, name: str, a: Side, b: Side) -> Array | None:
        """Pool a strip; the pooled array once this was the last one, else None.

        array: (p, q, positions of the rows, positions of the others); the result (p, q, positions, positions) of
        the next grid.
        """
        xp, take = self._xp, self._workspace.take
        h, w = self.stages[number].grid
        positions = h * w
        p, q = leading = array.shape[:2]
        pairs = p * q
        target = f"{name}{1 + number % 2}"
        matrices = self.pooling[number]
        rows, others = strip
        if len(matrices) == 0:
            whole = take(target, (*leading, positions, positions))
            whole[:, :, rows.start * w : rows.stop * w] = array
            return whole if rows.stop == h else None
        if len(matrices) == 1:
            (H,) = matrices
            right = take("pool1", (pairs * positions, len(H)))
            xp.matmul(array.reshape(-1, positions), H.T, out=right)
            pooled = take(target, (*leading, len(H), len(H)))
            xp.matmul(H, right.reshape(*leading, positions, len(H)), out=pooled)
            return pooled
        H, C, C_transposed = matrices
        r, k = rows.stop - rows.start, others.stop - others.start
        columns = self._padded("pool1", (p, q, r, len(C), k * w))
        lines = array.reshape(p, q, r, w, k * w)
        for out, inside in self.column_groups[number]:
            across = C[out, inside] if a.pooling is None or number else a.pooling[:, :, rows, out, inside]
            xp.matmul(across, lines[:, :, :, inside], out=columns[:, :, :, out])
        if number == 0 and a.pooling is not None:
            columns *= b.after[0][:, :, None, :, others.start * w : others.stop * w]
        both = take("pool2", (p, q, r * len(C), len(H), w))
        xp.matmul(H[:, others], columns.reshape(p, q, r * len(C), k, w), out=both)
        # Only pairs that come one by one are cut into strips, so these rows are one piece of memory.
        part = take(f"rows {name}", (pairs, h, len(C) * len(H) * len(C)))
        xp.matmul(both.reshape(-1, w), C_transposed, out=part[:, rows].reshape(-1, len(C)))
        if rows.stop < h:
            return None
        pooled = take(target, (*leading, len(H) * len(C), len(H) * len(C)))
        xp.matmul(H, part, out=pooled.reshape(pairs, len(H), -1))
        return pooled

    def _trace(
        self,
        a: Side,
        b: Side,
        equal: tuple[Array, Array] | None,
        B: Array | None,
        T: Array | None,
    ) -> list[Array]:
        """Scalar function of the last layer, and the sum with the weights of its pooling and the trace (C9)."""
        last = len(self.stages) - 1
        totals: list[Any] = [0.0, 0.0]
        for _, here, there, *arrays in self._mapped(last, a, b, equal, B, T):
            after_a, after_b = a.after[last], b.after[last]
            for k, array in enumerate(arrays):
                if array is None:
                    continue
                if self.uniform is None:
                    array *= self._weights[here, there]
                if after_b is None or (k == 1 and last > 0):
                    totals[k] = totals[k] + self._sum(array)
                else:
                    array *= after_b[..., there]
                    totals[k] = totals[k] + self._sum(array, after_a[:, :, here, 0])
        if self.tangent and last:
            # T^M is T^P kappa_0 and B^M.
            totals[1] = totals[1] + totals[0]
        scale = 1.0 if self.uniform is None else self.uniform
        return [total * scale for total in totals[: 1 + self.tangent]]

    @staticmethod
    def _sum(array: Array, weights: Array | None = None) -> Array:
        """Sum over both positions, those of the first side weighted, (p, q) float64.

        It goes in two levels: one float32 sum over all positions would lose a digit.
        """
        lines = array.sum(axis=-1)
        return (lines if weights is None else lines * weights).sum(axis=-1, dtype=np.float64)


def _hull(used: Any) -> slice:
    """The shortest slice that holds all of ``used``; never empty."""
    places = np.flatnonzero(used)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 1)
