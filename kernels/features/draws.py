"""Random weights that follow from a seed, and the features of one layer of them (SPEC F1, F2, F5).

Weights are drawn by (seed, layer, size of the input): those of fewer features are the first of those of more, so that
errors at growing widths are of one draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from numbers import Integral
from types import ModuleType
from typing import Any, Literal

import numpy as np

from .. import fused
from ..arrays import Array, namespace
from ..base import KernelError
from ..cuda import entrywise
from ..parameters import whole
from ..workspace import block_bytes

_DRAWN = 1 << 20
"""About so many numbers are drawn at a time."""
LARGEST_WIDTH = 1 << 31
"""More weights than any memory holds."""


def layer_widths(value: Any, layers: int) -> tuple[int, ...]:
    """The parameter ``widths``: a whole number for every layer, or one for each of ``layers``.

    Raises:
        KernelError: it is neither, or a number is below 1.
    """
    if isinstance(value, Integral):
        value = (value,) * layers
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != layers:
        each = f"a list of {layers}, one for each layer" if layers > 1 else "a list of one"
        raise KernelError(f"widths must be a whole number or {each}, got {value!r}")
    return tuple(whole(1, LARGEST_WIDTH)("widths", width) for width in value)


@lru_cache(maxsize=2)
def weights(
    seed: int,
    shapes: tuple[tuple[int, int], ...],
    orthogonal: bool,
    dtype: np.dtype,
    xp: ModuleType,
) -> tuple[Array, ...]:
    """For each layer its weights (m, d), rows N(0, I); kept for the next block of samples.

    shapes: (m, d) of every layer. orthogonal: blocks of d rows are orthogonal, each row N(0, I) by itself (Yu et al.,
    Orthogonal Random Features, 2016); the first rows of more are then the same up to rounding.
    """
    return tuple(
        xp.asarray(_drawn(seed, layer, shape, orthogonal, dtype)) for layer, shape in enumerate(shapes)
    )


def weight_bytes(shapes: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Memory that weights of ``shapes`` take: as they are kept, and while they are drawn; a bound."""
    kept = sum(m * d for m, d in shapes) * itemsize
    return kept + max(24 * min(m * d, max(_DRAWN, d * d)) for m, d in shapes)


def phases(seed: int, layer: int, shape: tuple[int, int], like: Array) -> Array:
    """(m,) phases of a layer with weights of ``shape``, uniform on [0, 2 pi), in the dtype of ``like``."""
    m, d = shape
    drawn = _stream(seed, layer, d, "phases").uniform(0, 2 * math.pi, m)
    return namespace(like).asarray(drawn, dtype=like.dtype)


def relu_features(z: Array, W: Array, out: Array | None = None) -> Array:
    """(n, m) sqrt(2/m) relu(W z), of rows z (n, d): inner products tend to |z| |z'| kappa_1(cos) (F1).

    out: where they are written, if not to a new array.
    """
    xp = namespace(z, W)
    out = xp.matmul(z * z.dtype.type(math.sqrt(2 / len(W))), W.T, out=out)
    return xp.maximum(out, 0, out=out)


def fourier_features(
    unit: Array, weight: Array, W: Array, phase: Array, sigma: float, out: Array | None = None
) -> Array:
    """(n, m) weight sqrt(2/m) cos(W unit / sigma + phase): inner products tend to those of the exponential kernel
    of unit rows, times weights (F2).

    unit: (n, d) rows of norm 1, or of less below a floor: there the Gaussian kernel, which the cosines are of, is made
    the exponential one by a factor. out: where they are written, if not to a new array.
    """
    xp = namespace(unit, weight, W, phase)
    out = xp.matmul(unit * unit.dtype.type(1 / sigma), W.T, out=out)
    missing = (xp.einsum("ij,ij->i", unit, unit) - 1) * (0.5 / sigma**2)
    scale = weight * xp.exp(missing) * math.sqrt(2 / len(W))
    if fused.runs_entrywise(out):
        entrywise.weighted_cosines(out, scale, phase)
        return out
    for strip in _strips(out):
        block = out[strip]
        block += phase
        xp.cos(block, out=block)
        block *= scale[strip, None]
    return out


def _strips(out: Array) -> Iterator[slice]:
    """Rows of ``out`` (n, m), so many at a time that they stay in the cache through several passes."""
    step = max(1, block_bytes(namespace(out)) // max(1, out.shape[1] * out.dtype.itemsize))
    return (slice(start, start + step) for start in range(0, len(out), step))


def _stream(
    seed: int, layer: int, size: int, what: Literal["rows", "norms", "phases"]
) -> np.random.Generator:
    """What is drawn for one layer; each of the three has a stream of its own."""
    number = ("rows", "norms", "phases").index(what)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(layer, size, number)))


def _drawn(seed: int, layer: int, shape: tuple[int, int], orthogonal: bool, dtype: np.dtype) -> np.ndarray:
    """(m, d) weights of a layer in ``dtype``, on the host."""
    m, d = shape
    rows, norms = (_stream(seed, layer, d, what) for what in ("rows", "norms"))
    W = np.empty((m, d), dtype)
    step = d if orthogonal else max(1, _DRAWN // d)
    for start in range(0, m, step):
        block = rows.standard_normal((min(step, m - start), d))
        if orthogonal:
            Q, R = np.linalg.qr(block.T)
            # QR leaves the signs open: with those of R's diagonal Q is uniformly distributed.
            Q *= np.sign(np.diag(R))
            block = Q.T * np.sqrt(norms.chisquare(d, len(block)))[:, None]
        W[start : start + len(block)] = block
    return W
