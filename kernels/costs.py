"""What the general path of convolutional kernels costs, counted from the sizes of its arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Cost
from .blocks import block_shape
from .dot_product import raising_steps
from .layers import Layer
from .workspace import padded

if TYPE_CHECKING:
    from .displacements import Displacements
    from .recursion import Recursion


@dataclass(frozen=True)
class Rates:
    """Seconds that the parts of a ``Cost`` take.

    product: an operation of a product of matrices; entry: one that goes entry by entry, in the cache;
    transcendental: a call of exp, arccos or sqrt; call: of the array library.
    """

    product: float
    entry: float
    transcendental: float
    call: float


RATES = {4: Rates(1 / 110e9, 0.098e-9, 0.56e-9, 0.55e-6), 8: Rates(1 / 52e9, 0.27e-9, 1.2e-9, 0.5e-6)}
"""By the size of a number in bytes, 4 or 8: of one core of the machine of the benchmarks."""


def seconds(cost: Cost, itemsize: int) -> float:
    """Time of a cost counted by this module; other kernels do not fill all that is summed here."""
    rates = RATES[itemsize]
    return (
        cost.products * rates.product
        + cost.passes * rates.entry
        + cost.transcendentals * rates.transcendental
        + cost.calls * rates.call
    )


_CACHE_BYTES = 1 << 20
"""Arrays larger than this are read and written far from the core,"""

_FAR = 4
"""which takes as long as so many passes over the same numbers nearby."""


class Work:
    """Sums over the steps for one pair of images, and the scratch arrays of a block by name, in numbers.

    near: how long a pass over numbers takes, compared with one in a core's own cache. fixed: numbers that are kept
    whatever the block.
    """

    def __init__(self, near: float = 1) -> None:
        self.near = near
        self.products = self.operations = self.passes = self.transcendentals = self.calls = 0.0
        self.arrays: dict[str, float] = {}
        self.fixed = 0.0

    def multiply(self, operations: float, calls: float) -> None:
        """Products of matrices."""
        self.products += operations
        self.calls += calls

    def go_over(self, operations: float, calls: float, far: bool = False) -> None:
        """So many operations entry by entry."""
        self.operations += operations
        self.passes += operations * (_FAR if far else self.near)
        self.calls += calls

    def pointwise(self, layer: Layer, tangent: bool, entries: float, calls: float, far: bool = False) -> None:
        """The scalar function of a layer on so many entries, each step in so many calls."""
        relu = layer.kernel == "relu"
        steps = {"relu": 8.0, "exponential": 1.0, "linear": 0.0, "square": 1.0}
        power = raising_steps(int(layer.number())) if layer.kernel == "polynomial" else 0
        each = steps.get(layer.kernel, power) + 2 * (relu and tangent)
        transcendentals = 2.0 * relu + (layer.kernel == "exponential")
        self.go_over(each * entries, (each + transcendentals) * calls, far)
        self.transcendentals += transcendentals * entries

    def take(self, name: str, size: float) -> None:
        """A named array is as large as its largest use."""
        self.arrays[name] = max(self.arrays.get(name, 0), size)

    def cost(self, pairs: int, scratch_bytes: float) -> Cost:
        """Of so many pairs."""
        return Cost(
            pairs * (self.products + self.operations),
            pairs * self.transcendentals,
            int(scratch_bytes),
            pairs * self.products,
            pairs * self.passes,
            pairs * self.calls,
        )


def of_recursion(recursion: Recursion, n: int, m: int) -> Cost:
    """Cost of n x m pairs by ``Recursion``."""
    group = min(m, recursion.group_size)
    p, q = block_shape(recursion, group)
    p = min(n, p)
    work = _recursion_work(recursion, p * q)
    scratch = _recursion_scratch(recursion, work, p, group, group < m)
    # The features of every second image once, and those of every first image for each group of them: they are part
    # of the time, not of the operations of a pair.
    images, each = m + n * -(-m // group), _features(recursion)
    time = Cost(0.0, 0.0, 0, images * each.products, images * each.passes, images * each.calls)
    return work.cost(n * m, scratch * recursion.dtype.itemsize) + time


def recursion_bytes(recursion: Recursion, pairs: int, group: int) -> int:
    """Scratch memory of ``Recursion`` for blocks of so many pairs, at most."""
    work = _recursion_work(recursion, pairs)
    return int(_recursion_scratch(recursion, work, pairs, group, True) * recursion.dtype.itemsize)


def _recursion_work(recursion: Recursion, pairs: int) -> Work:
    """What a pair takes, in blocks of so many; each array is counted by its name."""
    arrays = 1 + recursion.tangent
    features = recursion.feature_count
    work = Work()
    if recursion.uniform is None:
        work.fixed += math.prod(recursion.stages[-1].grid) ** 2
    if recursion.start:
        work.take("B1", pairs * recursion.positions**2)
        work.multiply(2.0 * features * recursion.positions**2, 1 / pairs)
    last = len(recursion.stages) - 1
    for number, (layer, (h, w), H, C) in enumerate(recursion.stages):
        if number < recursion.start:
            continue
        positions = h * w
        strips = recursion.strips(number, pairs)
        sizes = [(a.stop - a.start) * (b.stop - b.start) * w * w for a, b in strips]
        entries, largest, calls = float(sum(sizes)), max(sizes), len(strips) / pairs
        r = strips[0].rows.stop
        relu, exponential = layer.kernel == "relu", layer.kernel == "exponential"
        # Whole arrays of a large grid leave the cache.
        far = number > 0 and pairs * largest * recursion.dtype.itemsize > _CACHE_BYTES
        if number == 0:
            work.multiply(2.0 * features * entries, (r + 1) * calls)
            # The scalar function goes over the padding of lines as well.
            largest = r * w * padded(largest // (r * w), recursion.dtype)
            work.take("B0", pairs * largest)
        else:
            work.go_over(2 * entries, 2 * calls, far)
            if layer.patch > 1:
                offsets = 2 * (layer.patch - 1)
                masked = len(recursion.shifts[number]) > 0
                work.take("scratch1", pairs * positions**2)
                if masked:
                    work.take("scratch2", pairs * positions**2)
                    work.fixed += sum(len(shifts) for shifts in recursion.shifts[number]) * positions**2
                steps = arrays * (2 + offsets * (1 + masked))
                work.go_over(steps * entries, steps / pairs, far)
        work.pointwise(layer, recursion.tangent, entries, calls, far)
        if relu or layer.kernel == "polynomial":
            work.take("scratch1", pairs * largest)
        if relu:
            work.take("scratch2", pairs * largest)
        if number == last:
            work.go_over(3 * arrays * entries, 5 * arrays * calls, far)
            continue
        folds = number == 0 and recursion.folds
        if (relu and not folds) or (exponential and number):
            work.go_over(2 * arrays * entries, 2 * arrays * calls, far)
        matrices = recursion.pooling[number]
        h_out, w_out = len(H), len(C)
        out = h_out * w_out
        for name in "BT"[:arrays]:
            work.take(f"{name}{1 + number % 2}", pairs * (out if matrices else positions) ** 2)
            if len(matrices) == 3:
                work.take(f"rows {name}", pairs * h * w_out * out)
        if not matrices:
            work.go_over(arrays * entries, arrays * calls, far=True)
        elif len(matrices) == 1:
            work.take("pool1", pairs * positions * out)
            work.multiply(2.0 * arrays * positions * out * (positions + out), arrays * (1 + 1 / pairs))
        else:
            work.take("pool1", pairs * r * w_out * padded(max(sizes) // (r * w), recursion.dtype))
            work.take("pool2", pairs * r * w_out * h_out * w)
            groups = recursion.column_groups[number]
            across = sum((o.stop - o.start) * (i.stop - i.start) for o, i in groups) * entries / w
            lines = entries / w * w_out
            rest = h * w_out * h_out * w * w_out + h_out * h * w_out * out
            work.multiply(
                2.0 * arrays * (across + lines * h_out + rest),
                arrays * ((4 + r * (len(groups) + w_out)) * calls + 2 / pairs),
            )
            if folds:
                work.go_over(arrays * lines, arrays * calls)
    return work


def _recursion_scratch(recursion: Recursion, work: Work, p: int, group: int, several: bool) -> float:
    """Numbers that blocks of p first images with a group of second ones take; several: whether there are more
    groups."""
    features = recursion.feature_count
    side = recursion.positions * features
    factors = 2 * sum(math.prod(stage.grid) for stage in recursion.stages)
    if recursion.folds:
        factors += recursion.stages[0].columns.size * recursion.stages[0].grid[0]
    scratch = group * (side + factors) + p * (2 * side + factors) + sum(work.arrays.values()) + work.fixed
    if recursion.start:
        # Monomials of an image before and while they are pooled, beside what is kept.
        (h, w), H, C = recursion.stages[0][1:]
        scratch += features * (h * w + h * len(C) + len(H) * len(C))
    elif not several:
        # A new group's patches are there beside the features made of them.
        scratch = max(scratch, group * (2 * side + factors))
    if several:
        scratch += group * side
    return scratch


def _features(recursion: Recursion) -> Work:
    """What an image takes before it is paired."""
    work = Work()
    layer, (h, w), H, C = recursion.stages[0]
    patch = layer.patch**2 * recursion.channels
    work.go_over(6 * patch * h * w, 30, far=True)
    if recursion.start:
        features, out = recursion.feature_count, len(H) * len(C)
        work.multiply(2.0 * features * (h * w * len(C) + h * out), features)
        # One monomial at a time, beside patches that do not stay near.
        work.go_over(features * (4 * h * w + 4 * h * len(C) + 8 * out), 2 * patch)
    return work


def of_displacements(displacements: Displacements, n: int, m: int) -> Cost:
    """Cost of n x m pairs by ``Displacements``."""
    p, q = block_shape(displacements, m)
    pairs = min(n, p) * q
    return _displacement_work(displacements, pairs).cost(n * m, pairs * bytes_per_pair(displacements))


def bytes_per_pair(displacements: Displacements) -> float:
    """Scratch memory of ``Displacements`` for each pair of a block."""
    return sum(_displacement_work(displacements, 1).arrays.values()) * displacements.dtype.itemsize


def _displacement_work(displacements: Displacements, pairs: int) -> Work:
    """What a pair takes, in blocks of so many; arrays are those of one pair."""
    arrays = 1 + displacements.tangent
    # Blocks of many pairs are about as large as the cache.
    work = Work(near=2)
    # A periodic second side goes on beyond its end, along both axes.
    extension = 4 if displacements.rows[0].periodic else 1
    sides = math.prod(displacements.stages[0].grid) * displacements.channels * (1 + extension)
    last = len(displacements.stages) - 1
    for number, stage in enumerate(displacements.stages):
        layer, (h, w) = stage.layer, stage.grid
        rows, columns = displacements.rows[number], displacements.columns[number]
        taken = displacements.rows_taken(number)
        lines, width = rows.lines(taken), columns.lines(columns.needed)
        entries, calls = float(lines * width), len(taken) * len(columns.needed) / pairs
        relu, exponential = layer.kernel == "relu", layer.kernel == "exponential"
        if number == 0:
            work.go_over((2 * displacements.channels - 1) * entries, 2 * calls)
            work.take("products", h * w)
        sums = (1 if number == 0 else arrays) * (2 * layer.patch if layer.patch > 1 else 1)
        steps = sums + 2 + 2 * (relu or exponential) + displacements.tangent
        work.go_over(steps * entries, (2 * steps + 4) * calls)
        work.pointwise(layer, displacements.tangent, entries, calls)
        for name in ("B", "T")[:arrays] + ("scratch1", "scratch2")[: 1 + relu]:
            work.take(name, h * w)
        first, second = {"relu": (3, 2), "exponential": (2, 2), "square": (1, 0)}.get(layer.kernel, (2, 1))
        sides += h * w * (first + second * extension)
        if number == last:
            work.multiply(2 * arrays * entries, 6 * arrays * calls)
        elif not stage.passes_on:
            down, across = displacements.rows_taken(number + 1), displacements.columns[number + 1].needed
            h_out, w_out = displacements.stages[number + 1].grid
            R, S = len(down) * h_out, displacements.reached_columns(number) * w_out
            work.multiply(
                2.0 * arrays * R * width * (lines + S), arrays * len(columns.needed) * (6 + R) / pairs
            )
            work.go_over(arrays * (entries + 2 * R * S * len(columns.needed)), arrays * calls)
            widest = max(columns.lines((d,)) for d in columns.needed)
            work.take("pool1", R * widest)
            work.take("pool2", R * S)
            for name in "BT"[:arrays]:
                work.take(f"rows {name}", lines * widest)
                work.take(f"pooled {name}{number}", R * len(across) * w_out)
    # Images, norms and factors of both sides are copied out pair by pair.
    work.go_over(3 * sides, 16 * len(displacements.stages) / pairs, far=True)
    work.take("sides", sides)
    return work
