"""The general path of convolutional kernels: every network, on NumPy or CuPy (SPEC C1 to C12).

Each block of pairs goes through ``recursion``; this module cuts matrices into such blocks.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal

import numpy as np

from .arrays import Array, namespace
from .base import Prepared
from .network import Network
from .recursion import Recursion


def name(image: Array) -> str:
    """``numpy`` or ``cupy``."""
    return namespace(image).__name__


def obstacle(network: Network, tangent: bool | Literal["both"], image: Array) -> str | None:
    """There is none."""
    return None


def pair(
    network: Network,
    tangent: bool | Literal["both"],
    a: Prepared,
    b: Prepared,
    same: tuple[np.ndarray, np.ndarray],
) -> Array:
    """As ``fused.Path.pair``."""
    image_a, image_b = a.arrays["image"], b.arrays["image"]
    xp = namespace(image_a, image_b)
    recursion = Recursion(network, bool(tangent), xp, np.dtype(image_a.dtype))
    result = xp.empty((1 + (tangent == "both"), len(a), len(b)), image_a.dtype)
    symmetric = a is b
    for group, part_b in b.blocks(recursion.group_size(image_b.shape[3])):
        second = recursion.second(part_b)
        p, q = recursion.block_shape(len(part_b))
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


def diag(network: Network, tangent: bool | Literal["both"], a: Prepared) -> Array:
    """As ``fused.Path.diag``."""
    image = a.arrays["image"]
    xp = namespace(image)
    recursion = Recursion(network, bool(tangent), xp, np.dtype(image.dtype))
    result = xp.empty((1 + (tangent == "both"), len(a)), image.dtype)
    for rows, part in a.blocks(recursion.pairs_per_block):
        first, second = recursion.first(part), recursion.second(part).paired()
        equal = (xp.arange(len(part)), xp.zeros(len(part), np.int64))
        values = recursion.block(first, second, equal)
        for k, value in enumerate(values[-len(result) :]):
            result[k, rows] = value[:, 0]
    return result


def patch_norms(network: Network, images: Array) -> list[Array]:
    """As ``fused.Path.patch_norms``; computed in float64."""
    xp = namespace(images)
    recursion = Recursion(network, False, xp, np.dtype(np.float64))
    norms = [xp.empty((len(images), math.prod(stage.grid)), images.dtype) for stage in network.stages]
    step = recursion.pairs_per_block
    for start in range(0, len(images), step):
        block = images[start : start + step].astype(np.float64)
        for norm, values in zip(norms, recursion.patch_norms(block), strict=True):
            norm[start : start + step] = values
    return norms


def _within(
    same: tuple[np.ndarray, np.ndarray], rows: slice, columns: slice, xp: ModuleType
) -> tuple[Array, Array] | None:
    """The pairs of ``same`` inside a block, as positions in the block; None where there are none."""
    i, j = same
    inside = (i >= rows.start) & (i < rows.stop) & (j >= columns.start) & (j < columns.stop)
    if not inside.any():
        return None
    return xp.asarray(i[inside] - rows.start), xp.asarray(j[inside] - columns.start)
