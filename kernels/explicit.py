"""First layers whose feature map is small enough to write down: polynomial, square and linear (SPEC K6, C3).

A power of an inner product is an inner product of monomials. Those are pooled image by image, and what the
second layer starts from is one product of two images' pooled features, on the smaller grid.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from itertools import combinations_with_replacement
from types import ModuleType

import numpy as np

from .arrays import Array, namespace
from .dot_product import inverse_norms
from .layers import Layer
from .network import Network, Stage
from .patches import extract_patches
from .workspace import block_bytes

_POINTWISE = 24
"""Entry by entry, the scalar function and the pooling of the general path are counted as so many
multiplications in a product of matrices."""


def degree(layer: Layer) -> int | None:
    """Degree of the monomials that are the layer's features; None where there are no such features."""
    match layer.kernel:
        case "polynomial":
            return int(layer.number())
        case "square":
            return 2
        case "linear":
            return 1
    return None


def count(layer: Layer, channels: int) -> int:
    """How many features a patch of images with ``channels`` channels has."""
    q = degree(layer)
    assert q is not None
    return math.comb(layer.patch**2 * channels + q - 1, q)


def products(network: Network, channels: int) -> float:
    """Multiplications for a pair of images that the product of explicit features takes; infinite where the
    first layer has none, or where it is the last."""
    first = network.stages[0].layer
    if len(network.stages) == 1 or degree(first) is None:
        return math.inf
    return float(count(first, channels)) * math.prod(network.stages[1].grid) ** 2


def pays(network: Network, channels: int, entry: float | None = None) -> bool:
    """Whether explicit features take less than the kernel of the first layer at every pair of positions.

    entry: what one pair of positions takes, in multiplications of a product of features; by default that of the
    general path, an inner product of patches and all that follows.
    """
    if entry is None:
        entry = network.stages[0].layer.patch ** 2 * channels + _POINTWISE
    return products(network, channels) < entry * network.support[0].entries


def scale(layer: Layer, norm: Array) -> Array | None:
    """What multiplies a patch of this norm so that inner products of patches, raised to ``degree``, are the
    layer's kernel: |z|^(1/q) / max(|z|, floor) (K2); None where that is 1."""
    if layer.kernel == "polynomial":
        return inverse_norms(norm, layer.floor) * norm ** (1 / layer.number())
    if layer.kernel == "linear":
        return inverse_norms(norm, layer.floor) * norm * math.sqrt(layer.number())
    return None


def features(images: Array, norm1: Array, stage: Stage, periodic: bool) -> Array:
    """Features of the first layer, pooled.

    images: (n, h, w, c), float32 or float64; norm1: (n, h w), their patch norms in the first layer; stage: the
    first layer, polynomial, square or linear. Returns (n, positions of the next grid, features) in the dtype
    of the images: products over the last axis are the pooled kernel between positions (C4). Where an image meets
    itself they are so up to rounding (K13).
    """
    xp = namespace(images, norm1)
    layer = stage.layer
    q = degree(layer)
    assert q is not None
    n, h, w, channels = images.shape
    F = count(layer, channels)
    H, C = (xp.asarray(matrix, images.dtype) for matrix in (stage.rows, stage.columns))
    weights = xp.asarray(monomial_weights(layer.patch**2 * channels, q), images.dtype)
    factor = scale(layer, norm1)

    def pool(part: slice) -> Array:
        # A function of its own, so that its arrays are gone when the next ones come.
        patches = extract_patches(images[part], layer.patch, periodic)
        if layer.patch_norm:
            patches *= 1 / layer.patch
        if factor is not None:
            patches *= factor[part].reshape(-1, h, w, 1)
        powers = monomials(xp.ascontiguousarray(xp.moveaxis(patches, -1, 0)), q)
        columns = xp.matmul(powers.reshape(-1, w), C.T).reshape(-1, h, len(C))
        both = xp.matmul(H, columns).reshape(F, -1, len(H) * len(C))
        return xp.moveaxis(both, 0, -1)

    pooled = xp.empty((n, len(H) * len(C), F), images.dtype)
    step = _step(xp, F * h * w * images.dtype.itemsize)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        pooled[part] = pool(part)
    pooled *= weights
    return pooled


def scratch_bytes(stage: Stage, n: int, channels: int, itemsize: int) -> int:
    """Memory on the host that ``features`` takes for n images, beside what it returns; a bound."""
    layer, (h, w), H, C = stage
    q = degree(layer)
    assert q is not None
    D, F = layer.patch**2 * channels, count(layer, channels)
    lower = math.comb(D + q - 2, q - 1)
    step = min(n, _step(np, F * h * w * itemsize))
    image = h * w * (2 * D + F + lower) + F * len(C) * (h + len(H))
    # What patches are scaled by is found before there is room for the features.
    scales = n * h * w + max(step * image, n * (3 * h * w - F * len(H) * len(C)))
    # The weights, as a list of integers and then as an array.
    return (scales + F) * itemsize + 64 * F


def _step(xp: ModuleType, image_bytes: int) -> int:
    """How many images to take at a time, where the monomials of one take so many bytes."""
    return max(1, block_bytes(xp) // image_bytes)


def monomials(z: Array, degree: int) -> Array:
    """Products of ``degree`` rows of z (D, ...), each product once, in the order of
    ``combinations_with_replacement``."""
    xp = namespace(z)
    lower = z
    for number in range(2, degree + 1):
        higher = xp.empty((math.comb(len(z) + number - 1, number), *z.shape[1:]), z.dtype)
        start = 0
        for i, row in enumerate(z):
            # The last ones of lower degree are those without rows before i.
            others = lower[len(lower) - math.comb(len(z) - i + number - 2, number - 1) :]
            xp.multiply(others, row, out=higher[start : start + len(others)])
            start += len(others)
        lower = higher
    return lower


@lru_cache(maxsize=16)
def monomial_weights(size: int, degree: int) -> np.ndarray:
    """Square roots of how often each monomial occurs in the power of a sum of ``size`` terms, float64."""
    ways = [
        math.factorial(degree) // math.prod(math.factorial(k) for k in Counter(chosen).values())
        for chosen in combinations_with_replacement(range(size), degree)
    ]
    return np.sqrt(np.array(ways, dtype=np.float64))
