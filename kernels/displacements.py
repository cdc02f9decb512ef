"""The recursion over layers one displacement at a time, for lists of pairs of images (SPEC C6, C9, C10).

Sums over patches leave the displacement of two positions as it is, so for each displacement all layers without
pooling run on arrays of one grid, which stay in the cache; pooling mixes near displacements. This is the way to
go where few displacements are needed, as for the norms of patches, or where nothing is pooled before the end.
Arrays are laid out (rows, columns, pairs): what moves along rows and columns is long runs of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from . import costs, pointwise
from .arrays import Array
from .base import Cost, Prepared
from .blocks import Side
from .network import Network, Support
from .patches import patch_offsets, shifts
from .support import through_pooling
from .workspace import Workspace, block_bytes, budget_bytes

_LEAST_BLOCK_BYTES = 1 << 20
"""Arrays of a displacement are small and many: fewer calls outweigh some cache misses."""


@dataclass(frozen=True)
class Axis:
    """Rows or columns of one layer's grid.

    needed: displacements at which the layer's pointwise kernel is needed, ascending; a periodic axis counts them
    modulo its length. H: the matrix that pools the axis.
    """

    n: int
    periodic: bool
    needed: tuple[int, ...]
    H: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, H: np.ndarray, periodic: bool) -> Axis:
        """The axis whose needed displacements are those of the pairs in ``mask`` (n, n), and 0."""
        n = len(mask)
        first, second = np.nonzero(mask)
        steps = (second - first) % n if periodic else second - first
        return cls(n, periodic, tuple(int(d) for d in np.union1d(steps, 0)), H)

    def before(self, H: np.ndarray) -> Axis:
        """The axis of the layer before, which is pooled by H: it needs all that is pooled to these displacements,
        at any position."""
        every = np.zeros((self.n, self.n), bool)
        for d in self.needed:
            u = np.arange(self.n)[self.first(d)]
            every[u, (u + d) % self.n] = True
        return Axis.of(through_pooling(every, H), H, self.periodic)

    def first(self, d: int) -> slice:
        """Positions of the first image that have a partner at displacement d."""
        return slice(0, self.n) if self.periodic else slice(max(0, -d), self.n - max(0, d))

    def second(self, d: int) -> slice:
        """Their partners; a periodic axis goes on beyond its end."""
        here = self.first(d)
        return slice(here.start + d, here.stop + d)

    def extended(self, array: Array, axis: int, xp: ModuleType) -> Array:
        """What ``second`` refers to."""
        return xp.concatenate([array, array], axis=axis) if self.periodic else array

    def lines(self, displacements: Sequence[int]) -> int:
        """How many positions of the first image have partners, over all these displacements."""
        return sum(self.n if self.periodic else self.n - abs(d) for d in displacements)

    @cached_property
    def half(self) -> tuple[int, ...]:
        """Of each displacement and its opposite, one."""
        return tuple(d for d in self.needed if (d <= (-d) % self.n if self.periodic else d >= 0))

    def opposite(self, d: int) -> bool:
        """Whether the opposite displacement is another one."""
        return (-d) % self.n != d if self.periodic else d != 0

    def pooling(self, d: int, targets: Sequence[int], turned: bool) -> np.ndarray:
        """How displacement d is pooled to each of the displacements ``targets`` of the following grid: (their
        number, size of the following grid, size of ``first(d)``).

        turned: the same numbers seen from their partners, displacement -d.
        """
        u = np.arange(self.n)[self.first(d)]
        v = (u + d) % self.n
        if turned:
            u, v = v, u
        out = len(self.H)
        a = np.arange(out)
        matrices = np.zeros((len(targets), out, len(u)))
        for matrix, D in zip(matrices, targets, strict=True):
            inside = np.ones(out, bool) if self.periodic else (a + D >= 0) & (a + D < out)
            matrix[inside] = self.H[np.ix_(a[inside], u)] * self.H[np.ix_((a[inside] + D) % out, v)]
        return matrices


Displacement = tuple[int, int]


@dataclass
class Pairs:
    """Pairs of images in a block.

    first, second: images (c, h, w, pairs); norms: for each layer those of the first side (h, w, pairs); before,
    after: for each layer the factors of both sides (None where they are 1); pooled: for each layer whose pooling
    was executed B and T, (row displacements, h, column displacements, w, pairs); equal: positions of pairs of
    one sample; short: of both sides the first layer's ``pointwise.shortfall``, only for tangent kernels. What
    belongs to a second side is extended.
    """

    first: Array
    second: Array
    norms: list[Array] = field(default_factory=list)
    before: list[tuple[Array, Array] | None] = field(default_factory=list)
    after: list[tuple[Array, Array] | None] = field(default_factory=list)
    pooled: list[list[Array] | None] = field(default_factory=list)
    equal: Any = None
    short: list[Array | None] = field(default_factory=list)


class Displacements:
    """The recursion for lists of pairs of images (h, w, channels) of one size and dtype.

    norms: only for ``norms``: both images of a pair are the same, so that half of the displacements tell the other
    half, and of the last layer displacement 0 is all.
    """

    def __init__(
        self,
        network: Network,
        tangent: bool,
        xp: ModuleType,
        dtype: np.dtype,
        channels: int,
        norms: bool = False,
    ) -> None:
        self.stages = network.stages
        self.tangent = tangent
        self.dtype = dtype
        self.channels = channels
        self._network = network
        self._xp = xp
        self._symmetric = norms
        self._workspace = Workspace(xp, dtype)
        last = network.support[-1]
        if norms:
            last = Support(*(np.eye(n, dtype=bool) for n in self.stages[-1].grid))
        self.rows = self._axes(last.rows, [stage.rows for stage in self.stages])
        self.columns = self._axes(last.columns, [stage.columns for stage in self.stages])
        self._matrices: dict[tuple[int, bool, int | None], tuple[slice, slice, Array] | None] = {}

    def _axes(self, last: np.ndarray, matrices: Sequence[np.ndarray]) -> list[Axis]:
        axes = [Axis.of(last, matrices[-1], self._network.periodic)]
        for H in reversed(matrices[:-1]):
            axes.append(axes[-1].before(H))
        return axes[::-1]

    @cached_property
    def pairs_per_block(self) -> int:
        h, w = self.stages[0].grid
        most = max(block_bytes(self._xp), _LEAST_BLOCK_BYTES) // (h * w * self.dtype.itemsize)
        # Few of the arrays are as small as that of one displacement.
        return max(1, min(most, int(budget_bytes(self._xp) / costs.bytes_per_pair(self))))

    @property
    def group_size(self) -> int:
        # There is nothing to keep.
        return sys.maxsize

    # What is asked for

    def first(self, part: Prepared) -> Side:
        return self._side(part).map(lambda array: array[:, None])

    def second(self, part: Prepared) -> Side:
        return self._side(part).map(lambda array: array[None])

    def _side(self, part: Prepared) -> Side:
        norms = [part.arrays[f"norm{number}"] for number in range(1, len(self.stages) + 1)]
        return Side(part.arrays["image"], norms, [], [])

    def block(self, a: Side, b: Side, equal: tuple[Array, Array] | None) -> list[Array]:
        xp = self._xp
        p, q = a.features.shape[0], b.features.shape[1]

        def listed(array: Array) -> Array:
            """(p or 1, q or 1, ...) as (..., pairs), rows first."""
            every = xp.broadcast_to(array, (p, q, *array.shape[2:]))
            return xp.ascontiguousarray(xp.moveaxis(every, (0, 1), (-2, -1))).reshape(*array.shape[2:], p * q)

        images = [listed(xp.moveaxis(side.features, -1, 2)) for side in (a, b)]
        pairs = Pairs(images[0], self._extended(0, images[1]))
        if equal is not None:
            pairs.equal = equal[0] * q + equal[1]
        last = len(self.stages) - 1
        for number, stage in enumerate(self.stages):
            norms = (listed(side.norms[number]).reshape(*stage.grid, -1) for side in (a, b))
            self._add_layer(pairs, number, *norms)
        for number in range(last):
            self._pool(pairs, number)
        totals = [xp.zeros(p * q, np.float64) for _ in range(1 + self.tangent)]
        for d in self._needed(last):
            weights = self._trace_weights(d)
            if weights is not None:
                for total, array in zip(totals, self._mapped(pairs, last, d), strict=False):
                    total += self._weighted_sum(array, *weights)
        return [total.reshape(p, q) for total in totals]

    def cost(self, n: int, m: int) -> Cost:
        return costs.of_displacements(self, n, m)

    def norms(self, images: Array) -> list[Array]:
        """Patch norms of every layer, each (n, positions), of images (n, h, w, c) (C6)."""
        xp = self._xp
        first = xp.ascontiguousarray(xp.moveaxis(images, (0, 3), (3, 0)))
        pairs = Pairs(first, self._extended(0, first), equal=slice(None))
        for number in range(len(self.stages)):
            B = self._patches(pairs, number, (0, 0))[0]
            self._add_layer(pairs, number, *[xp.sqrt(xp.maximum(B, 0))] * 2)
            self._pool(pairs, number)
        return [xp.ascontiguousarray(norm.reshape(-1, norm.shape[2]).T) for norm in pairs.norms]

    # The two sides

    def _extended(self, number: int, array: Array) -> Array:
        """The second side of arrays (..., h, w, pairs) on the grid of a layer."""
        array = self.rows[number].extended(array, -3, self._xp)
        return self.columns[number].extended(array, -2, self._xp)

    def _add_layer(self, pairs: Pairs, number: int, first: Array, second: Array) -> None:
        """Add the norms (h, w, pairs) of a layer and the factors that they give."""
        layer = self.stages[number].layer
        pairs.norms.append(first)
        sides = [pointwise.factors(layer, norm, k == 0) for k, norm in enumerate((first, second))]
        for kept, (a, b) in zip((pairs.before, pairs.after), zip(*sides, strict=True), strict=True):
            kept.append(None if a is None else (a, self._extended(number, b)))
        pairs.pooled.append(None)
        if number == 0 and self.tangent:
            here, there = (pointwise.shortfall(layer, norm) for norm in (first, second))
            pairs.short = [here, None if there is None else self._extended(0, there)]

    # Layers

    def _needed(self, number: int) -> Iterator[Displacement]:
        for dj in self.columns[number].needed:
            for di in self.rows_taken(number):
                yield di, dj

    def rows_taken(self, number: int) -> tuple[int, ...]:
        """Displacements of rows at which a layer is computed."""
        rows = self.rows[number]
        return rows.half if self._symmetric else rows.needed

    def _patches(self, pairs: Pairs, number: int, d: Displacement) -> tuple[Array, Array | None]:
        """B^P and T^P at displacement d, (rows, columns, pairs) in memory of their own (C2)."""
        layer = self.stages[number].layer
        sources: tuple[Array, ...]
        if number == 0:
            sources = (self._products(pairs, d),)
        elif pairs.pooled[number - 1] is None:
            sources = tuple(array for array in self._mapped(pairs, number - 1, d) if array is not None)
        else:
            sources = self._pooled_at(pairs, number, d)
        found: list[Array | None] = [None, None]
        # T first: it may lie where B is to go.
        for k in reversed(range(len(sources))):
            source = sources[k]
            target = self._workspace.take("BT"[k], source.shape)
            if layer.patch == 1:
                target[...] = source
            else:
                scratch = self._workspace.take("scratch1", source.shape)
                self._sum_over_offsets(source, scratch, 0, layer.patch)
                self._sum_over_offsets(scratch, target, 1, layer.patch)
            if layer.patch_norm:
                target *= 1 / layer.patch**2
            found[k] = target
        return found[0], found[1]

    def _sum_over_offsets(self, source: Array, target: Array, axis: int, size: int) -> None:
        """Sum over the offsets of a patch along rows (axis 0) or columns (1)."""
        if axis == 1:
            source, target = source.swapaxes(0, 1), target.swapaxes(0, 1)
        n = len(source)
        d, *others = [offset for offset in patch_offsets(size) if offset]
        for to, origin in shifts(n, d, self._network.periodic):
            self._xp.add(source[to], source[origin], out=target[to])
        if not self._network.periodic:
            alone = slice(0, min(-d, n)) if d < 0 else slice(max(0, n - d), n)
            target[alone] = source[alone]
        for d in others:
            for to, origin in shifts(n, d, self._network.periodic):
                target[to] += source[origin]

    def _places(self, number: int, d: Displacement) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Positions of both sides at displacement d."""
        rows, columns = self.rows[number], self.columns[number]
        return (rows.first(d[0]), columns.first(d[1])), (rows.second(d[0]), columns.second(d[1]))

    def _products(self, pairs: Pairs, d: Displacement) -> Array:
        """Inner products of the images' pixels at displacement d."""
        here, there = self._places(0, d)
        first, second = pairs.first[:, *here], pairs.second[:, *there]
        return self._xp.einsum("chwn,chwn->hwn", first, second)

    def _pooled_at(self, pairs: Pairs, number: int, d: Displacement) -> tuple[Array, ...]:
        """B and T on the grid of a layer after an executed pooling, at displacement d."""
        rows, columns = self.rows[number], self.columns[number]
        i, j = self.rows_taken(number).index(d[0]), columns.needed.index(d[1])
        pooled = pairs.pooled[number - 1]
        assert pooled is not None
        return tuple(array[i, rows.first(d[0]), j, columns.first(d[1])] for array in pooled)

    def _mapped(self, pairs: Pairs, number: int, d: Displacement) -> tuple[Array, Array | None]:
        """B^M and T^M at displacement d (C3, C8)."""
        layer = self.stages[number].layer
        here, there = self._places(number, d)
        B: Array
        T: Array | None = None
        if self._symmetric and d == (0, 0):
            B = self._workspace.take("B", pairs.norms[number].shape)
            self._xp.multiply(pairs.norms[number], pairs.norms[number], out=B)
        else:
            B, T = self._patches(pairs, number, d)
        index: Any = None
        T_before: Array | None = None
        if pairs.equal is not None and d == (0, 0) and layer.kernel != "square":
            index = (slice(None), slice(None), pairs.equal)
            T_before = None if T is None else T[index]
        before, after = pairs.before[number], pairs.after[number]
        if before is not None:
            B *= before[0][here]
            B *= before[1][there]
        short: list[Array | None] = []
        if number == 0:
            places = zip(pairs.short, (here, there), strict=False)
            short = [None if factor is None else factor[place] for factor, place in places]
        B, T = pointwise.apply(layer, B, T, self.tangent, self._workspace.take, short)
        if index is not None:
            norm = pairs.norms[number][index]
            value = pointwise.value_at_1(layer, norm)
            pointwise.set_equal(norm > layer.floor, value, T_before, B, T, index)
        factors = None if after is None else (after[0][here], after[1][there])
        pointwise.complete(B, T, factors, number == 0)
        return B, T

    def _pool(self, pairs: Pairs, number: int) -> None:
        """Execute the pooling of a layer for all displacements that follow, unless it changes nothing."""
        if number == len(self.stages) - 1 or self.stages[number].passes_on:
            return
        xp, take = self._xp, self._workspace.take
        n = pairs.first.shape[3]
        columns = self.columns[number]
        down, across = self.rows_taken(number + 1), self.columns[number + 1].needed
        h, w = self.stages[number + 1].grid
        lines = self._lines(number)
        arrays = "BT"[: 1 + self.tangent]
        pooled = [take(f"pooled {name}{number}", (len(down), h, len(across), w, n)) for name in arrays]
        for array in pooled:
            array[...] = 0
        for name in arrays:
            take(
                f"rows {name}", (lines[-1].stop, columns.n, n)
            )  # as large as it gets, so that it never grows
        for dj in columns.needed:
            width = columns.lines((dj,))
            # All displacements of rows one below the other: one product pools them.
            stacks = [take(f"rows {name}", (lines[-1].stop, width, n)) for name in arrays]
            for di, here in zip(self.rows_taken(number), lines, strict=True):
                mapped = self._mapped(pairs, number, (di, dj))
                for stack, array in zip(stacks, mapped, strict=False):
                    stack[here] = array
            for turned in (False, True) if self._symmetric else (False,):
                rows_matrix, columns_matrix = self._matrix(number, turned), self._matrix(number, turned, dj)
                if rows_matrix is None or columns_matrix is None:
                    continue
                (to_rows, taken, R), (to_columns, _, S) = rows_matrix, columns_matrix
                for array, stack in zip(pooled, stacks, strict=True):
                    part = take("pool1", (len(R), width, n))
                    xp.matmul(R, stack[taken].reshape(-1, width * n), out=part.reshape(len(R), -1))
                    product = take("pool2", (len(R), len(S), n))
                    xp.matmul(S, part, out=product)
                    array[to_rows, :, to_columns] += product.reshape(-1, h, len(S) // w, w, n)
        pairs.pooled[number] = pooled

    def _lines(self, number: int) -> list[slice]:
        """Where each displacement of rows lies, one below the other."""
        lines = [slice(0, 0)]
        for di in self.rows_taken(number):
            lines.append(slice(lines[-1].stop, lines[-1].stop + self.rows[number].lines((di,))))
        return lines[1:]

    def reached_columns(self, number: int) -> int:
        """Displacements of columns that one displacement is pooled to, at most."""
        found = (self._matrix(number, False, dj) for dj in self.columns[number].needed)
        return max(to.stop - to.start for to, _, _ in filter(None, found))

    def _matrix(self, number: int, turned: bool, dj: int | None = None) -> tuple[slice, slice, Array] | None:
        """What pools rows, all displacements one below the other, or columns at displacement dj.

        Displacements of the next grid that are reached, lines that are used, and the matrix (displacements and
        positions of the next grid, lines); None where there are none.
        """
        key = (number, turned, dj)
        if key not in self._matrices:
            axis, following = (self.rows, self.columns)[dj is not None][number : number + 2]
            if dj is None:
                targets, sources = self.rows_taken(number + 1), self.rows_taken(number)
            else:
                targets, sources = following.needed, (dj,)
            each = [axis.pooling(d, targets, turned) for d in sources]
            for d, matrix in zip(sources, each, strict=True):
                if dj is None and turned and not axis.opposite(d):
                    matrix[...] = 0
            whole = np.concatenate(each, axis=2)
            reached, used = (np.flatnonzero(whole.any(axis=axes)) for axes in ((1, 2), (0, 1)))
            found = None
            if len(used):
                to, taken = (slice(int(k[0]), int(k[-1]) + 1) for k in (reached, used))
                if dj is not None:
                    taken = slice(0, whole.shape[2])
                flat = np.ascontiguousarray(whole[to, :, taken]).reshape(-1, taken.stop - taken.start)
                found = to, taken, self._xp.asarray(flat, self.dtype)
            self._matrices[key] = found
        return self._matrices[key]

    # The trace

    def _trace_weights(self, d: Displacement) -> tuple[Array, Array] | None:
        """Weights of rows and of columns at displacement d (C9); None where one of them is zero."""
        found = []
        for W, axis, step in zip(self._network.trace_weights, (self.rows, self.columns), d, strict=True):
            u = np.arange(axis[-1].n)[axis[-1].first(step)]
            found.append(W[u, (u + step) % axis[-1].n])
        if not all(weights.any() for weights in found):
            return None
        return self._xp.asarray(found[0], self.dtype), self._xp.asarray(found[1])

    def _weighted_sum(self, array: Array, rows: Array, columns: Array) -> Array:
        """Sum over positions, (pairs,) float64; in two levels, as one float32 sum would lose a digit."""
        h, w, n = array.shape
        lines = self._xp.matmul(rows, array.reshape(h, -1)).reshape(w, n)
        return self._xp.matmul(columns, lines.astype(np.float64))
