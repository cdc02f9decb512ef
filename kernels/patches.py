"""Patch extraction P: square patches of images, and their effect on a cross-Gram array (SPEC C2)."""

from __future__ import annotations

from .arrays import Array, namespace


def patch_offsets(size: int) -> range:
    """Offsets of a patch along one axis; an even patch reaches one further to the top and left."""
    after = (size - 1) // 2
    return range(after - size + 1, after + 1)


def extract_patches(X: Array, size: int, periodic: bool = False) -> Array:
    """Patches of images X (n, h, w, c) around every pixel: (n, h, w, size * size * c).

    A patch runs by row, column, channel. Beyond the border are zeros, or the opposite side if ``periodic``.
    """
    xp = namespace(X)
    n, h, w, c = X.shape
    offsets = patch_offsets(size)
    out = xp.zeros((n, h, w, size, size, c), X.dtype)
    for k, d in enumerate(offsets):
        for to_row, from_row in shifts(h, d, periodic):
            for m, e in enumerate(offsets):
                for to_column, from_column in shifts(w, e, periodic):
                    out[:, to_row, to_column, k, m] = X[:, from_row, from_column]
    return out.reshape(n, h, w, size * size * c)


def shifts(n: int, d: int, periodic: bool) -> list[tuple[slice, slice]]:
    """Pairs (to, from) of slices of an axis of length n such that out[to] = x[from] is out[i] = x[i + d]."""
    if periodic:
        d %= n
        wrapped = [(slice(n - d, n), slice(0, d))] if d else []
        return [(slice(0, n - d), slice(d, n)), *wrapped]
    if abs(d) >= n:
        return []
    return [(slice(max(0, -d), n - max(0, d)), slice(max(0, d), n + min(0, d)))]


def sum_over_patches(B: Array, scratch: Array, size: int, periodic: bool = False) -> None:
    """Replace B[..., u, v] by the sum over offsets d of B[..., u + d, v + d], in place.

    B and scratch are (..., h, w, h, w); the sum over the square is one over rows, then one over columns.
    """
    if size == 1:
        return
    _sum_over_shifts(B, scratch, (-4, -2), size, periodic)
    _sum_over_shifts(scratch, B, (-3, -1), size, periodic)


def _sum_over_shifts(source: Array, target: Array, axes: tuple[int, int], size: int, periodic: bool) -> None:
    n = source.shape[axes[0]]
    target[...] = source
    for d in patch_offsets(size):
        if d == 0:
            continue
        parts = shifts(n, d, periodic)
        for to_u, from_u in parts:
            for to_v, from_v in parts:
                to, origin = [slice(None)] * source.ndim, [slice(None)] * source.ndim
                to[axes[0]], to[axes[1]] = to_u, to_v
                origin[axes[0]], origin[axes[1]] = from_u, from_v
                target[tuple(to)] += source[tuple(origin)]
