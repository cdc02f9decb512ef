"""What a tiled Cholesky does with tiles: products, triangular solves, factors; in place on a host, or on a device.

A tile is a (rows, columns) array in C order, whose transpose is what LAPACK calls an array in Fortran order: on a
host BLAS works in the tiles themselves, without a copy. The lower triangle of a tile on the diagonal is meant; what
is above it is arbitrary until the tile is factored, and zero after.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from kernels.arrays import Array, namespace, to_host

from .. import device


class NotPositive(ArithmeticError):
    """A pivot that is not positive. position: in its tile."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def placed(tile: np.ndarray) -> Array:
    """A tile where this process computes."""
    if not device.used():
        return tile
    import cupy

    return cupy.asarray(tile)


def subtract_product(tile: Array, a: Array, b: Array) -> Array:
    """tile - a @ b.T, in place on a host. tile: (m, n), a: (m, k), b: (n, k)."""
    if namespace(tile, a, b) is not np:
        tile -= a @ b.T
        return tile
    (gemm,) = get_blas_funcs(("gemm",), (tile,))
    return gemm(-1.0, b.T, a.T, beta=1.0, c=tile.T, trans_a=1, overwrite_c=1).T


def subtract_square(tile: Array, a: Array) -> Array:
    """tile - a @ a.T on and below the diagonal, in place on a host. tile: (n, n), a: (n, k)."""
    if namespace(tile, a) is not np:
        return subtract_product(tile, a, a)
    (syrk,) = get_blas_funcs(("syrk",), (tile,))
    return syrk(-1.0, a.T, beta=1.0, c=tile.T, trans=1, lower=0, overwrite_c=1).T


def factor(tile: Array) -> Array:
    """The lower Cholesky factor of an (n, n) tile, in its place on a host.

    Raises:
        NotPositive: a pivot is not positive; the tile is spent.
    """
    xp = namespace(tile)
    if xp is np:
        (potrf,) = get_lapack_funcs(("potrf",), (tile,))
        upper, failed = potrf(tile.T, lower=0, clean=1, overwrite_a=1)
        if failed:
            raise NotPositive(failed - 1)
        return upper.T
    from cupyx import errstate

    try:
        with errstate(linalg="raise"):
            return xp.linalg.cholesky(tile)
    except np.linalg.LinAlgError:
        return xp.asarray(factor(to_host(tile)))  # a device does not say where; where the host succeeds, good


def pivot(tile: Array, position: int) -> tuple[float, np.ndarray]:
    """What is left of diagonal entry ``position`` of a tile once the entries before it are eliminated, v^T tile v, and
    v, (position + 1,) float64, whose last entry is 1."""
    values, v = to_host(tile), np.ones(position + 1)
    left = float(values[position, position])
    if position:
        before = factor(np.ascontiguousarray(values[:position, :position]))
        row = divide(np.ascontiguousarray(values[position : position + 1, :position]), before)
        left -= float(np.square(row, dtype=np.float64).sum())
        v[:-1] = -solve(before, row.T, transposed=True)[:, 0]
    return left, v


def divide(tile: Array, triangle: Array) -> Array:
    """tile @ triangle^-T, in place on a host. tile: (m, n), triangle: (n, n) lower."""
    if namespace(tile, triangle) is not np:
        return solve(triangle, tile.T).T
    (trsm,) = get_blas_funcs(("trsm",), (tile,))
    return trsm(1.0, triangle.T, tile.T, side=0, lower=0, trans_a=1, overwrite_b=1).T


def solve(triangle: Array, V: Array, transposed: bool = False) -> Array:
    """triangle^-1 @ V, or triangle^-T @ V. triangle: (n, n) lower, V: (n, t)."""
    if namespace(triangle, V) is np:
        (trsm,) = get_blas_funcs(("trsm",), (triangle,))
        # The factor's transpose is upper, and in Fortran order.
        return trsm(1.0, triangle.T, V, side=0, lower=0, trans_a=0 if transposed else 1)
    from cupyx.scipy.linalg import solve_triangular

    return solve_triangular(triangle, V, lower=True, trans=1 if transposed else 0)
