"""Exact features of polynomial, linear and square kernels of vectors: symmetric monomials (SPEC F2, K6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..arrays import Array, namespace
from ..base import Cost, Kernel, KernelError
from ..dot_product import DotProduct
from ..explicit import monomial_weights, monomials
from ..workspace import block_bytes
from .base import FeatureMap

LARGEST_WIDTH = 1 << 20
"""More monomials of a sample than this are refused."""

_LEAST_ROWS = 16
"""Samples at a time, at least: monomials are multiplied along them."""


@dataclass(frozen=True)
class Monomials(FeatureMap):
    """The features of a ``DotProduct`` kernel ``polynomial``, ``linear`` or ``square``, which they give exactly.

    For vectors of d numbers, all comb(d + q - 1, q) monomials of degree q, each once, times the square root of how
    often it occurs in the q-th power; of the unit vector, times the norm, for ``polynomial`` and ``linear``.
    """

    kind: ClassVar[str] = "monomials"

    def __post_init__(self) -> None:
        _degree(self.kernel)

    def width(self, shape: tuple[int, ...]) -> int:
        q = _degree(self.kernel)
        return math.comb(shape[0] + q - 1, q)

    def check(self, shape: tuple[int, ...]) -> None:
        """As ``Kernel.check``; also KernelError where there are more than ``LARGEST_WIDTH`` monomials."""
        super().check(shape)
        width = self.width(shape)
        if width > LARGEST_WIDTH:
            raise KernelError(
                f"vectors of {shape[0]} numbers have {width:,} monomials of degree {_degree(self.kernel)}, "
                f"{4 * width:,} bytes a sample in float32, and at most {LARGEST_WIDTH:,} are taken: take kind "
                "'nystrom', or reduce the dimension first"
            )

    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        assert isinstance(self.kernel, DotProduct)
        self.check(tuple(X.shape[1:]))
        prepared = self.kernel.prepare(X)
        unit, norm = prepared.arrays["unit"], prepared.arrays["norm"]
        xp = namespace(X)
        q, d = _degree(self.kernel), X.shape[1]
        weight = self.kernel.weights(norm)
        if self.kernel.kernel == "linear":
            assert self.kernel.scale is not None
            weight = weight * math.sqrt(self.kernel.scale)
        unit *= (weight ** (1 / q))[:, None]
        weights = xp.asarray(monomial_weights(d, q), dtype=X.dtype)
        out = xp.empty((len(X), len(weights)), X.dtype)
        step = _step(out.shape[1] * X.dtype.itemsize, block_bytes(xp))
        for start in range(0, len(X), step):
            part = slice(start, start + step)
            powers = monomials(xp.ascontiguousarray(unit[part].T), q)
            xp.multiply(powers.T, weights, out=out[part])
        return out

    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        width = self.width(shape)
        # Monomials of two degrees at a time, the lower ones fewer; the weights, as a list of integers at first.
        block = min(n, _step(width * itemsize, block_bytes(np))) * 2 * width * itemsize
        return Cost(n * (3.0 * shape[0] + 2.0 * width), n, n * shape[0] * itemsize + block + 64 * width)


def _step(row_bytes: int, budget: int) -> int:
    """How many samples to take at a time."""
    return max(_LEAST_ROWS, budget // max(1, row_bytes))


def _degree(kernel: Kernel) -> int:
    """Degree of the monomials of ``kernel``.

    Raises:
        KernelError: it is no polynomial.
    """
    match kernel:
        case DotProduct(kernel="polynomial"):
            assert kernel.degree is not None
            return int(kernel.degree)
        case DotProduct(kernel="square"):
            return 2
        case DotProduct(kernel="linear"):
            return 1
    raise KernelError(
        "kernel must be a dot-product kernel polynomial, linear or square, which have monomials: for others take "
        "kind 'random' (vectors), 'convolutional-random' or 'nystrom-ckn' (images), or 'nystrom' (any kernel)"
    )
