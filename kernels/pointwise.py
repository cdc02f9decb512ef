"""The scalar functions of layers on arrays of inner products (SPEC C3, C8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import explicit
from .arrays import Array, namespace
from .dot_product import inverse_norms, raise_to
from .layers import Layer

Take = Callable[[str, tuple[int, ...]], Array]
"""Hands out scratch memory by name and shape, as ``workspace.Workspace.take``."""


def factors(layer: Layer, norm: Array, first: bool) -> tuple[Array | None, Array | None]:
    """What multiplies inner products before, and values after, ``apply``: for one side, of these norms.

    None stands for 1. Constants go to the first side. For relu they turn inner products to negated cosines;
    for a power the norms go inside, (|z|^(1/q) |z'|^(1/q) cos)^q.
    """
    match layer.kernel:
        case "relu":
            inverse = inverse_norms(norm, layer.floor)
            return (-inverse, norm / math.pi) if first else (inverse, norm)
        case "exponential":
            inverse = inverse_norms(norm, layer.floor)
            return (inverse * layer.number() if first else inverse), norm
    return explicit.scale(layer, norm), None


def shortfall(layer: Layer, norm: Array) -> Array | None:
    """max(norm, floor) / norm of relu's patches, for one side: how far cosines times norms fall short of the inner
    products below the floor (K2). None where that is 1 throughout; 1 also where norms are as good as zero."""
    least = layer.floor * float(np.finfo(norm.dtype).tiny)
    below = (norm > least) & (norm < layer.floor)
    if not below.any():
        return None
    where = namespace(norm).where
    return where(below, layer.floor / where(below, norm, layer.floor), 1).astype(norm.dtype)


def apply(
    layer: Layer,
    B: Array,
    T: Array | None,
    tangent: bool,
    take: Take,
    short: Sequence[Array | None] = (),
) -> tuple[Array, Array | None]:
    """The scalar function of inner products B that are multiplied by the factors before; B and T are overwritten.

    T: T^P. Returns B^M but for the factors after, and T^P kappa_0, to which B^M is still to be added. With
    ``tangent`` a T of None stands for B^P, as in the first layer: then T^M but for the factors after is returned.
    short: what ``shortfall`` gives for both sides, as B^P is the norms times the cosine times that.
    """
    xp = namespace(B)
    match layer.kernel:
        case "exponential":
            B -= layer.number()
            xp.exp(B, out=B)
        case "polynomial":
            raise_to(B, int(layer.number()), take("scratch1", B.shape))
        case "square":
            B *= B
        case "relu":
            # arccos(-c) = pi - arccos(c), and -c is what B holds: pi kappa_1 = c arccos(-c) + sin.
            angle, sine = take("scratch1", B.shape), take("scratch2", B.shape)
            xp.clip(B, -1, 1, out=B)
            # Squaring first would round away what is left of 1 - c^2 near 1.
            xp.subtract(1, B, out=sine)
            xp.add(1, B, out=angle)
            sine *= angle
            xp.sqrt(sine, out=sine)
            xp.arccos(B, out=angle)
            B *= angle
            sine -= B
            if T is not None:
                angle *= 1 / math.pi
                T *= angle
            elif tangent:
                # c kappa_0 is still there: T^M is that much more than B^M.
                for factor in short:
                    if factor is not None:
                        B *= factor
                T = xp.subtract(sine, B, out=B)
            return sine, T
    return B, T


def complete(B: Array, T: Array | None, after: tuple[Array, Array] | None, first: bool) -> None:
    """B^M and T^M in place of what ``apply`` returned; ``first``: in the first layer."""
    for array in (B, T) if first else (B,):
        if array is not None and after is not None:
            array *= after[0]
            array *= after[1]
    if T is not None and not first:
        T += B


def value_at_1(layer: Layer, norm: Array) -> Array | float:
    """What ``apply`` gives for a patch of this norm and itself, where it is above the floor."""
    match layer.kernel:
        case "relu":
            return math.pi
        case "exponential":
            return 1.0
        case "linear":
            return layer.number() * norm * norm
    return norm * norm


def set_equal(
    regular: Array, value: Array | float, T_before: Array | None, B: Array, T: Array | None, index: Any
) -> None:
    """Give what ``apply`` returned the values of cosine 1 at ``index``: equal positions of one sample (K13).

    regular: whether patches are above the floor; value: of B^M there; T_before: T^P, None in the first layer.
    """
    where = namespace(B).where
    B[index] = where(regular, value, B[index])
    if T is not None:
        T[index] = where(regular, 2 * value if T_before is None else T_before, T[index])
