"""The general path of convolutional kernels: every network, on NumPy or CuPy (SPEC C1 to C12).

Each block of pairs goes through ``recursion``; this module cuts matrices into such blocks.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import numpy as np

from .arrays import Array, namespace
from .base import Prepared
from .blocks import Engine, block_shape
from .costs import seconds
from .displacements import Displacements
from .network import Network, Tangent
from .norms import patch_norms
from .recursion import Recursion

TILE = 128
"""Images on a side of the block that costs are compared for."""

__all__ = ["name", "obstacle", "pair", "paired", "patch_norms"]


def name(image: Array) -> str:
    """``numpy`` or ``cupy``."""
    return namespace(image).__name__


def obstacle(network: Network, tangent: Tangent, image: Array) -> str | None:
    """There is none."""
    return None


def pair(
    network: Network,
    tangent: Tangent,
    a: Prepared,
    b: Prepared,
    same: tuple[np.ndarray, np.ndarray],
) -> Array:
    """As ``fused.Path.pair``."""
    image_a, image_b = a.arrays["image"], b.arrays["image"]
    xp = namespace(image_a, image_b)
    recursion = engine(network, tangent, xp, np.dtype(image_a.dtype), image_a.shape[3])
    result = xp.empty((1 + (tangent == "both"), len(a), len(b)), image_a.dtype)
    symmetric = a is b
    for group, part_b in b.blocks(recursion.group_size):
        second = recursion.second(part_b)
        p, q = block_shape(recursion, len(part_b))
        for rows, part_a in a.blocks(p):
            if symmetric and group.stop <= rows.start:
                continue
            first = recursion.first(part_a)
            for start in range(0, len(part_b), q):
                stop = min(start + q, len(part_b))
                columns = slice(group.start + start, group.start + stop)
                if symmetric and columns.stop <= rows.start:
                    continue
                equal = _within(same, rows, columns, xp)
                values = recursion.block(first, second[start:stop], equal)
                for k, value in enumerate(values[-len(result) :]):
                    result[k, rows, columns] = value
    if symmetric:
        for i in range(len(a)):
            result[:, i + 1 :, i] = result[:, i, i + 1 :]
    return result


def paired(network: Network, tangent: Tangent, a: Prepared, b: Prepared, same: bool) -> Array:
    """As ``fused.Path.paired``."""
    image = a.arrays["image"]
    xp = namespace(image, b.arrays["image"])
    recursion = engine(network, tangent, xp, np.dtype(image.dtype), image.shape[3])
    result = xp.empty((1 + (tangent == "both"), len(a)), image.dtype)
    for rows, part in a.blocks(recursion.pairs_per_block):
        first, second = recursion.first(part), recursion.second(b[rows]).paired()
        equal = (xp.arange(len(part)), xp.zeros(len(part), np.int64)) if same else None
        values = recursion.block(first, second, equal)
        for k, value in enumerate(values[-len(result) :]):
            result[k, rows] = value[:, 0]
    return result


def engine(network: Network, tangent: Tangent, xp: ModuleType, dtype: np.dtype, channels: int) -> Engine:
    """What computes blocks of pairs: the recursion over whole arrays, or by displacement where that takes less
    time on a host."""
    if by_displacement(network, bool(tangent), dtype.itemsize, channels):
        return Displacements(network, bool(tangent), xp, dtype, channels)
    return Recursion(network, bool(tangent), xp, dtype, channels)


@lru_cache(maxsize=64)
def by_displacement(network: Network, tangent: bool, itemsize: int, channels: int) -> bool:
    """Whether ``Displacements`` takes less time for a tile of pairs than ``Recursion`` on one core of a host.

    Devices follow the same choice: what they take is not known here, but where one way does far less work it is
    the quicker one there too.
    """
    dtype = np.dtype(f"f{itemsize}")
    dense = Recursion(network, tangent, np, dtype, channels)
    sparse = Displacements(network, tangent, np, dtype, channels)
    taken = [seconds(one.cost(TILE, TILE), itemsize) for one in (dense, sparse)]
    return taken[1] < taken[0]


def _within(
    same: tuple[np.ndarray, np.ndarray], rows: slice, columns: slice, xp: ModuleType
) -> tuple[Array, Array] | None:
    """The pairs of ``same`` inside a block, as positions in the block; None where there are none."""
    i, j = same
    inside = (i >= rows.start) & (i < rows.stop) & (j >= columns.start) & (j < columns.stop)
    if not inside.any():
        return None
    return xp.asarray(i[inside] - rows.start), xp.asarray(j[inside] - columns.start)
