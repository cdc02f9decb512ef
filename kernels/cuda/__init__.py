"""Fused CUDA code for convolutional kernels on a GPU, in float32 (SPEC C1 to C10).

``programs`` turns a network into specialised kernels, ``device`` compiles and launches them; here pairs of images
are laid out for them, in batches that fit in the device's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np

from .. import general
from ..arrays import Array, namespace
from ..base import Prepared
from ..network import Network, Tangent
from . import device
from .programs import Plan, plan

__all__ = ["name", "obstacle", "pair", "paired", "patch_norms"]

_MOST_BYTES = 1 << 30
"""Arrays between layers take at most this, and at most a quarter of the memory that is free."""
_MOST_PAIRS = 1 << 22
"""Pairs are listed for so many at a time; the lists and what comes of them take a few dozen bytes a pair."""


def name(image: Array) -> str:
    """``cuda``."""
    return "cuda"


def obstacle(network: Network, tangent: Tangent, image: Array) -> str | None:
    """Why this path cannot take the network, in one line; None if it can."""
    if image.dtype != np.float32:
        return f"fused CUDA code computes in float32, and the images are {image.dtype}"
    return _plan(network, tangent, image).obstacle


def pair(
    network: Network,
    tangent: Tangent,
    a: Prepared,
    b: Prepared,
    same: tuple[np.ndarray, np.ndarray],
) -> Array:
    """As ``fused.Path.pair``; asynchronous on the current stream."""
    xp = namespace(a.arrays["image"], b.arrays["image"])
    n, m = len(a), len(b)
    symmetric = a is b
    partner = np.full(n, -1, np.int32)
    partner[same[0]] = same[1]
    partner = xp.asarray(partner)
    result = xp.empty((1 + (tangent == "both"), n, m), np.float32)
    for first, second in _listed(n, m, symmetric, xp):
        values = _compute(network, tangent, a, b, first, second, partner)
        result[:, first, second] = values
        if symmetric:
            result[:, second, first] = values
    return result


def paired(network: Network, tangent: Tangent, a: Prepared, b: Prepared, same: bool) -> Array:
    """As ``fused.Path.paired``."""
    xp = namespace(a.arrays["image"], b.arrays["image"])
    index = xp.arange(len(a), dtype=np.int32)
    partner = index if same else xp.full(len(a), -1, np.int32)
    return _compute(network, tangent, a, b, index, index, partner)


def patch_norms(network: Network, images: Array) -> list[Array]:
    """As ``fused.Path.patch_norms``: by the general path, on the device."""
    return general.patch_norms(network, images)


def _plan(network: Network, tangent: Tangent, image: Array) -> Plan:
    return plan(network, bool(tangent), int(image.shape[3]), device.shared_limit())


def _compute(
    network: Network,
    tangent: Tangent,
    a: Prepared,
    b: Prepared,
    first: Array,
    second: Array,
    partner: Array,
) -> Array:
    """Values (outputs, pairs) of the pairs of images (first[p], second[p]); partner[i] is the image of ``b`` that
    is the sample i of ``a``, or -1."""
    xp = namespace(a.arrays["image"], b.arrays["image"])
    image_a, image_b = _plain(a, "image", xp), _plain(b, "image", xp)
    chosen = _plan(network, tangent, image_a)
    programs = chosen.programs
    arrays = 1 + bool(tangent)
    pairs = len(first)
    values = xp.empty((arrays, pairs), np.float32)
    if chosen.all_layers:
        norms = [(_all_norms(network, a, xp), _all_norms(network, b, xp))]
    else:
        names = [f"norm{k}" for k in range(1, len(programs) + 1)]
        norms = [(_plain(a, each, xp), _plain(b, each, xp)) for each in names]
    sizes = [math.prod(program.result) for program in programs[:-1]]
    batch = min(pairs, _pairs_at_once(arrays * sum(sizes[-2:] if len(sizes) < 3 else _largest_two(sizes))))
    for start in range(0, pairs, max(1, batch)):
        stop = min(start + batch, pairs)
        left, right = image_a, image_b
        for program, (norm_a, norm_b) in zip(programs, norms, strict=True):
            if program.result:
                results = xp.empty((arrays, stop - start, *program.result), np.float32)
            else:
                results = values[:, start:stop]
            sides = (left, right, norm_a, norm_b, first[start:stop], second[start:stop], partner)
            device.launch(program, stop - start, (*sides, results[0], results[-1]))
            left, right = results[0], results[-1]
    return values[-(1 + (tangent == "both")) :]


def _listed(n: int, m: int, symmetric: bool, xp: ModuleType) -> Iterator[tuple[Array, Array]]:
    """Images (first[p], second[p]), int32, of all pairs, or of those with first <= second; many pairs at a time.

    Images that follow one another on one side share what the caches hold of the other.
    """
    # Rows n - r and r of the upper triangle (where n is even: n - 1 - r and r) follow one another in one line.
    width, lines = (n | 1, (n + 1) // 2) if symmetric else (m, n)
    at_once = max(1, _MOST_PAIRS // max(1, width))
    for start in range(0, lines, at_once):
        count = min(at_once, lines - start)
        first, second = xp.divmod(xp.arange(count * width, dtype=np.int32), np.int32(width))
        first += np.int32(start)
        if symmetric:
            other = first + second >= n
            second += xp.where(other, np.int32(n - width), first)
            first = xp.where(other, np.int32(2 * n - width) - first, first)
        yield first, second


def _plain(part: Prepared, name: str, xp: ModuleType) -> Array:
    """An array of ``part`` as the programs read it: entries one behind the other."""
    return xp.ascontiguousarray(part.arrays[name], np.float32)


def _largest_two(sizes: list[int]) -> list[int]:
    """Sizes of the neighbours that are there at the same time and take the most."""
    return list(max(pairwise(sizes), key=sum))


def _pairs_at_once(entries: int) -> int:
    """Pairs whose arrays between layers, of so many float32 entries, fit in memory."""
    if entries == 0:
        return np.iinfo(np.int32).max
    return max(1, min(_MOST_BYTES, device.free_bytes() // 4) // (4 * entries))


def _all_norms(network: Network, part: Prepared, xp: ModuleType) -> Array:
    """Patch norms of all layers, (n, layers, positions)."""
    return xp.stack([_plain(part, f"norm{k}", xp) for k in range(1, len(network.stages) + 1)], axis=1)
