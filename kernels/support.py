"""Which pairs of positions a result needs, layer by layer, going backwards (SPEC C6, C9).

Patches, pooling and the trace all treat rows and columns of a grid apart: what follows is about one axis, and
what is needed of a grid is the product of what is needed of its two axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .patches import patch_offsets, shifts

Axis = Sequence[tuple[int, np.ndarray]]
"""For each layer its patch size and the matrix that pools this axis."""


def trace_support(axis: Axis, periodic: bool) -> tuple[np.ndarray, ...]:
    """For each layer the pairs (i, k) of positions at which its pointwise kernel is needed for the trace
    after the last pooling (C9); (n, n) bool, i of the first image and k of the second."""
    outputs = axis[-1][1].shape[0]
    return _backwards(axis, periodic, through_pooling(np.eye(outputs, dtype=bool), axis[-1][1]))


def norm_support(axis: Axis, periodic: bool) -> tuple[np.ndarray, ...]:
    """For each layer but the last the pairs of positions of an image with itself at which its pointwise
    kernel is needed for the patch norms of all layers after it (C6); (n, n) bool."""
    nothing = np.zeros((axis[-1][1].shape[1],) * 2, dtype=bool)
    return _backwards(axis, periodic, nothing, norms=True)[:-1]


def _backwards(axis: Axis, periodic: bool, last: np.ndarray, norms: bool = False) -> tuple[np.ndarray, ...]:
    """The masks of all layers from that of the last; with ``norms`` each layer's patch norms are needed too."""
    masks = [last]
    for (_, H), (patch, _) in zip(reversed(axis[:-1]), reversed(axis[1:]), strict=True):
        mask = masks[-1] | np.eye(len(masks[-1]), dtype=bool) if norms else masks[-1]
        masks.append(through_pooling(through_patches(mask, patch, periodic), H))
    return tuple(reversed(masks))


def trace_counts(axis: Axis, periodic: bool) -> np.ndarray:
    """What the product of the patches at positions (i, k) of the first layer's grid would count in the trace, were
    all scalar functions the identity; (n, n) float64, symmetric."""
    counts = axis[-1][1].T @ axis[-1][1]
    for (_, H), (patch, _) in zip(reversed(axis[:-1]), reversed(axis[1:]), strict=True):
        reached = np.zeros_like(counts)
        for d in patch_offsets(patch):
            parts = shifts(len(counts), d, periodic)
            for to_u, from_u in parts:
                for to_v, from_v in parts:
                    reached[from_u, from_v] += counts[to_u, to_v]
        counts = H.T @ reached @ H
    return counts


def through_patches(mask: np.ndarray, patch: int, periodic: bool) -> np.ndarray:
    """Pairs (u + d, v + d) of the pairs (u, v) in ``mask``, d the offsets of a patch."""
    reached = np.zeros_like(mask)
    for d in patch_offsets(patch):
        parts = shifts(len(mask), d, periodic)
        for to_u, from_u in parts:
            for to_v, from_v in parts:
                reached[from_u, from_v] |= mask[to_u, to_v]
    return reached


def half(mask: np.ndarray, periodic: bool) -> np.ndarray:
    """Of each pair in ``mask`` (n, n) and its mirror image one, those of few displacements."""
    first, second = np.indices(mask.shape)
    steps = second - first
    if periodic:
        steps = steps % len(mask)
        return mask & ((2 * steps < len(mask)) | ((2 * steps == len(mask)) & (first < second)))
    return mask & (steps >= 0)


def through_pooling(mask: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Pairs of inputs that the pairs of outputs in ``mask`` are pooled from by the matrix H."""
    windows = (H != 0).astype(int)
    return windows.T @ mask @ windows > 0
