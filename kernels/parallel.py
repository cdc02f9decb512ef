"""Which pairs of images have so many nearly parallel patches that their tangent kernel needs float64 (SPEC K13).

kappa_0 has an infinite slope at 1: of an error e of the cosine of two patches it makes e / (pi t) where they are an
angle t apart, and sqrt(2 e) / pi where they are parallel; at -1 it is the same, of patches that are opposite. On flat
ground of one colour, or of opposite ones, in both images all these errors are alike and add up. What they come to is
estimated here from the first layer's patches at a sample of the pairs of positions that the kernel sums over, drawn in
proportion to what each counts in it.

Products and sums are exact in float32 where they count: of two patches up to 90 degrees apart, of one and the opposite
of the other where they are further. So an estimate depends on the two images alone, to the last bit: neither on which
is the first, nor on what else is in a block, nor on how a library adds up.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from .arrays import Array, namespace
from .base import Cost, Prepared
from .network import Network
from .patches import patch_offsets
from .workspace import Workspace, block_bytes

LARGEST_ERROR = 4e-7
"""An estimated error above it, relative to sqrt(K_ii K_jj), is too large. True ones can be some times the estimate, as
patches of later layers are nearly parallel too and a sample is one: where the estimate is below it they were at most
9e-7 of raw images of CIFAR-10, MNIST and Fashion-MNIST, and 1.5e-6 of those of MNIST less their mean."""

_COSINE_ERROR = 6e-8
"""Of float32."""

_SAMPLES = 1024
"""Pairs of positions in a sample, at most."""

_STEPS = (0.7548776662466927, 0.5698402909980532)
"""Multiples of these two numbers, without their whole parts, fill a square evenly."""

_LENGTH = 2000
"""Patches are scaled to this norm and rounded to whole numbers: their squared distances are whole numbers that
float32 holds."""

_LIMIT = 1 << 16
"""``LARGEST_ERROR`` in the unit in which errors are added up, as whole numbers. The largest that there can be, of two
images that are parallel throughout, is within what float32 counts."""

_LEAST = 2.0**-20
"""What a patch counts at least: far less than matters."""

_FEW = 4
"""Numbers in a patch, as in 2 x 2 pixels of one channel, of which so many patches are parallel that no sample tells."""

_SIDE = 128
"""Images of each side that are compared at a time."""

_GATHERED = 36
"""Passes over numbers in the cache that making one number of the vectors takes, which is gathered from far away."""


def too_parallel(network: Network, a: Prepared, b: Prepared) -> Array:
    """(n, m) bool: for which images of two float32 blocks, with ``image`` and ``norm1``, the tangent kernel's error
    would be too large."""
    image_a, image_b = a.arrays["image"], b.arrays["image"]
    xp = namespace(image_a, image_b)
    if _always_parallel(network, image_a.shape[3]):
        return xp.ones((len(a), len(b)), bool)
    result = xp.empty((len(a), len(b)), bool)
    # Images that are not finite have no estimate, and blocks that say so.
    with np.errstate(over="ignore", invalid="ignore"):
        for columns, part_b in b.blocks(_SIDE):
            second = _Side(network, part_b)
            for rows, part_a in a.blocks(_SIDE):
                result[rows, columns] = _errors(network, _Side(network, part_a), second) > _LIMIT
    return result


def share(network: Network, channels: int) -> float:
    """Which share of entries are expected to need float64, by what was seen in CIFAR-10 and MNIST."""
    return 1.0 if _always_parallel(network, channels) else 0.01


def cost(network: Network, n: int, m: int, channels: int) -> Cost:
    """Cost of ``too_parallel`` on a host; scratch memory beside its result."""
    if _always_parallel(network, channels):
        return Cost(0.0, 0.0, 0)
    entries, samples = float(n * m), len(_sample(network).counts)
    (h, w), patch = network.stages[0].grid, network.stages[0].layer.patch
    features = patch**2 * channels
    # Twice, as of images with negative numbers, against patches and their opposites.
    products, passes = 4.0 * (features + 2) * samples * entries, 5.0 * samples * entries
    # The vectors of either side once for each block of the other: of the time, not of the operations of a pair.
    made = n * -(-m // _SIDE) + m * -(-n // _SIDE)
    gathered = _GATHERED * samples * (features + 2.0) * made
    n, m = min(n, _SIDE), min(m, _SIDE)
    step = _step(n, m, np)
    # What is kept of both sides, and while that of one is made its pixels, positions and norms in float64; later the
    # vectors of both sides, and the patches of one.
    pixels = (h + patch - 1) * (w + patch - 1) * channels
    kept = (n + m) * (pixels + 2 * h * w)
    making = max(n, m) * (pixels + 8 * h * w + 4 * samples)
    vectors = step * (features + 2) * (n + m + max(n, m))
    scratch = 4 * (kept + max(making, vectors + 2 * n * m * step) + 2 * n * m)
    calls = 40.0 * (entries > 0)
    return Cost(products + passes, samples * entries, scratch, products, passes + gathered, calls)


class _Sample(NamedTuple):
    """Pairs of positions of the first layer's grid, and what each counts among all of them.

    first, second: rows and columns in the first and in the second image, (2, pairs); counts: (pairs,) float64.
    """

    first: np.ndarray
    second: np.ndarray
    counts: np.ndarray


@lru_cache(maxsize=64)
def _sample(network: Network) -> _Sample:
    """All pairs that count, where they are few; else some, each with its opposite."""
    rows, columns = network.trace_counts
    if np.count_nonzero(rows) * np.count_nonzero(columns) <= _SAMPLES:
        (i, k), (j, m) = np.nonzero(rows), np.nonzero(columns)
        i, k = (np.repeat(index, len(j)) for index in (i, k))
        j, m = (np.tile(index, len(i) // len(j)) for index in (j, m))
        counts = rows[i, k] * columns[j, m]
        return _Sample(np.stack([i, j]), np.stack([k, m]), counts / counts.sum())
    numbers = np.arange(_SAMPLES // 2) + 0.5
    places = []
    for counts, step in zip((rows, columns), _STEPS, strict=True):
        sums = np.cumsum(counts)
        index = np.searchsorted(sums, (numbers * step) % 1 * sums[-1], side="right")
        places.append(np.divmod(index, len(counts)))
    (i, k), (j, m) = places
    first, second = np.stack([i, j]), np.stack([k, m])
    both = np.concatenate([first, second], 1), np.concatenate([second, first], 1)
    return _Sample(*both, np.full(_SAMPLES, 1 / _SAMPLES))


def _always_parallel(network: Network, channels: int) -> bool:
    """Whether patches have so few numbers that all entries are computed in float64."""
    return network.stages[0].layer.patch ** 2 * channels <= _FEW


def _step(n: int, m: int, xp: ModuleType) -> int:
    """Pairs of positions that are taken at a time for n x m images."""
    return min(_SAMPLES, max(1, block_bytes(xp) // (4 * max(1, n * m))))


class _Side:
    """Images whose patches are compared, n of one side; they number the last axis, which is short to gather.

    pixels: with what lies beyond the border, (rows, columns, channels, n); scales: what makes patches so long, 0 for
    those below the floor, (h, w, n); squares: of the inverse of what a patch of that norm counts in the image's own
    kernel, (h, w, n), rounded to powers of 2 so that they leave products exact; signed: whether a pixel is negative.
    """

    def __init__(self, network: Network, part: Prepared) -> None:
        image = part.arrays["image"]
        xp = namespace(image)
        layer, grid = network.stages[0].layer, network.stages[0].grid
        offsets = patch_offsets(layer.patch)
        around = ((0, 0), (-offsets[0], offsets[-1]), (-offsets[0], offsets[-1]), (0, 0))
        pixels = xp.pad(image, around, mode="wrap" if network.periodic else "constant")
        norms = part.arrays["norm1"].reshape(-1, *grid)
        first, second, weights = (xp.asarray(array) for array in _sample(network))
        products = norms[:, first[0], first[1]] * weights * norms[:, second[0], second[1]]
        total = xp.ascontiguousarray(products).sum(1)
        above = norms > layer.floor
        counts = xp.where(above, norms, 0) / xp.sqrt(xp.where(total > 0, total, 1))[:, None, None]
        mantissa, exponent = xp.frexp(xp.maximum(counts, _LEAST))
        exponent -= mantissa < math.sqrt(0.5)
        length = _LENGTH / layer.patch if layer.patch_norm else _LENGTH
        scales = xp.where(above, length / xp.where(above, norms, 1), 0).astype(np.float32)
        self.patch = layer.patch
        self.signed = bool((image < 0).any())
        self.pixels = xp.ascontiguousarray(xp.moveaxis(pixels, 0, 3))
        self.scales = xp.ascontiguousarray(xp.moveaxis(scales, 0, 2))
        self.squares = xp.ascontiguousarray(xp.moveaxis(xp.ldexp(np.float32(1), -2 * exponent), 0, 2))

    def __len__(self) -> int:
        return self.pixels.shape[3]

    def vectors(self, positions: np.ndarray, first: bool, workspace: Workspace) -> Array:
        """Of the patches at positions, given by rows and columns, (positions, features + 2, n): the product of a first
        and a second one is the square of the distance of the scaled patches plus 1/2, divided by the squares of what
        both count."""
        xp = namespace(self.pixels)
        rows, columns = xp.asarray(positions)
        offsets = xp.arange(self.patch)
        at = (rows[:, None, None] + offsets[:, None], columns[:, None, None] + offsets)
        patches = self.pixels[at].reshape(len(rows), -1, len(self))
        result = workspace.take(f"vectors {first}", (len(rows), patches.shape[1] + 2, len(self)))
        scaled = result[:, :-2]
        xp.multiply(patches, self.scales[rows, columns][:, None], out=scaled)
        xp.rint(scaled, out=scaled)
        square, one = (-2, -1) if first else (-1, -2)
        result[:, square] = xp.einsum("pfn,pfn->pn", scaled, scaled)
        result[:, one] = 1
        if not first:
            # Parallel patches that are rounded alike are about as far apart as the error of a cosine makes them.
            result[:, square] += 0.5
            scaled *= -2
        result *= self.squares[rows, columns][:, None]
        return result


def _errors(network: Network, a: _Side, b: _Side) -> Array:
    """Estimated errors in float32 of the tangent kernel, (n, m) float32: whole numbers of unit
    ``LARGEST_ERROR / _LIMIT``, relative to sqrt(K_ii K_jj)."""
    xp = namespace(a.pixels)
    sample = _sample(network)
    total = xp.zeros((len(a), len(b)), np.float32)
    workspace = Workspace(xp, np.dtype(np.float32))
    step = _step(len(a), len(b), xp)
    units = xp.asarray(_LIMIT / LARGEST_ERROR * _COSINE_ERROR / math.pi * _LENGTH * sample.counts, np.float32)
    for start in range(0, len(units), step):
        part = slice(start, start + step)
        first = a.vectors(sample.first[:, part], True, workspace)
        second = b.vectors(sample.second[:, part], False, workspace)
        errors = workspace.take("errors", (len(first), len(a), len(b)))
        xp.matmul(first.swapaxes(1, 2), second, out=errors)
        if a.signed or b.signed:  # else no patch is nearer to the opposite of another
            xp.negative(second[:, :-2], out=second[:, :-2])
            opposite = workspace.take("opposite", errors.shape)
            xp.minimum(errors, xp.matmul(first.swapaxes(1, 2), second, out=opposite), out=errors)
        xp.sqrt(errors, out=errors)
        xp.divide(units[part, None, None], errors, out=errors)
        xp.rint(errors, out=errors)
        total += errors.sum(0)
    return total
