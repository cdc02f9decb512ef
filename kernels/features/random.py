"""Random features of kernels of vectors: networks with random weights, and random Fourier features (SPEC F1, F2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..arrays import Array, namespace
from ..base import Cost, Kernel, KernelError
from ..convolutional import Convolutional
from ..deep import FullyConnected
from ..dot_product import DotProduct, HomogeneousKernel
from ..parameters import flag, whole
from .base import FeatureMap
from .draws import fourier_features, layer_widths, phases, relu_features, weight_bytes, weights

_ROWS = 1024
"""Samples whose hidden features are there at a time."""

_Form = Literal["relu", "tangent", "step", "fourier"]


@dataclass(frozen=True)
class RandomFeatures(FeatureMap):
    """Features whose inner products tend to the kernel's values, with an error of order m^(-1/2).

    They stand for ``FullyConnected`` of family ``rf`` and any depth from 2 on, features of a random ReLU network with
    depth - 1 layers (F1); of family ``ntk`` and depth 2, [sqrt(2/m) relu(W x); sqrt(2/m) 1{W x >= 0} x], m (d + 1) of
    them; and for ``DotProduct`` ``exponential``, random Fourier features, and ``arc-cosine`` (F2). Zero vectors have
    zero features. Vectors shorter than the kernel's floor are not what the ReLU kernels' cosines make of them (K2):
    their features' lengths are at most their own, which is what that can change.

    widths: number of random weights m, of each layer (a list) or of all (a number). seed: of the weights.
    orthogonal: weights that are orthogonal in blocks of d, which have less variance (Yu et al. 2016).
    """

    widths: tuple[int, ...]
    seed: int = 0
    orthogonal: bool = False

    kind: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        form = _form(self.kernel)
        layers = self.kernel.depth - 1 if form == "relu" and isinstance(self.kernel, FullyConnected) else 1
        object.__setattr__(self, "widths", layer_widths(self.widths, layers))
        object.__setattr__(self, "seed", whole(0)("seed", self.seed))
        flag("orthogonal", self.orthogonal)

    def width(self, shape: tuple[int, ...]) -> int:
        return self.widths[-1] * (1 + shape[0] if _form(self.kernel) == "tangent" else 1)

    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        assert isinstance(self.kernel, HomogeneousKernel)
        prepared = self.kernel.prepare(X)
        unit, norm = prepared.arrays["unit"], prepared.arrays["norm"]
        xp = namespace(X)
        shapes = self._shapes(tuple(X.shape[1:]))
        layers = weights(self.seed, shapes, self.orthogonal, np.dtype(X.dtype), xp)
        weight = self.kernel.weights(norm)
        out = xp.empty((len(X), self.width(tuple(X.shape[1:]))), X.dtype)
        for start in range(0, len(X), _ROWS):
            part = slice(start, start + _ROWS)
            self._write(unit[part], weight[part], layers, out[part])
        return out

    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        shapes = self._shapes(shape)
        operations = n * (3.0 * shape[0] + sum(2.0 * m * d + m for m, d in shapes) + self.width(shape))
        waves = n * self.widths[-1] if _form(self.kernel) == "fourier" else 0
        # Unit rows, and of a block scaled copies and hidden layers.
        rows = n * shape[0] + 2 * min(n, _ROWS) * (shape[0] + max(self.widths))
        return Cost(operations, waves, rows * itemsize + weight_bytes(shapes, itemsize))

    def _shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(m, d) of each layer's weights."""
        sizes = (shape[0], *self.widths)
        return tuple((m, d) for d, m in zip(sizes, self.widths, strict=False))

    def _write(self, unit: Array, weight: Array, layers: tuple[Array, ...], out: Array) -> None:
        """Features of unit rows (k, d) with their weights (k,), to ``out``."""
        xp = namespace(unit)
        form = _form(self.kernel)
        if form == "fourier":
            assert isinstance(self.kernel, DotProduct)
            assert self.kernel.sigma is not None
            phase = phases(self.seed, 0, layers[0].shape, unit)
            fourier_features(unit, weight, layers[0], phase, self.kernel.sigma, out)
            return
        if form == "step":
            scale = weight * weight.dtype.type(math.sqrt(2 / len(layers[0])))
            xp.multiply(xp.matmul(unit, layers[0].T) >= 0, scale[:, None], out=out)
            return
        z = unit * weight[:, None]
        if form == "relu":
            for W in layers[:-1]:
                z = relu_features(z, W)
            relu_features(z, layers[-1], out)
            return
        assert isinstance(self.kernel, FullyConnected)
        m = len(layers[0])
        if self.kernel.normalized:
            z *= math.sqrt(1 / self.kernel.depth)
        out[:, :m] = relu_features(z, layers[0])
        z *= math.sqrt(2 / m)
        # Zero rows have zero features whatever the sign.
        steps = out[:, :m] > 0
        xp.multiply(steps[:, :, None], z[:, None, :], out=out[:, m:].reshape(len(z), m, -1))


def _form(kernel: Kernel) -> _Form:
    """Which features stand for ``kernel``.

    Raises:
        KernelError: there are none; the message says which maps there are for it.
    """
    match kernel:
        case DotProduct(kernel="exponential"):
            return "fourier"
        case DotProduct(kernel="arc-cosine"):
            return "relu" if kernel.order == 1 else "step"
        case FullyConnected(family="rf", bias=False) if kernel.depth > 1:
            return "relu"
        case FullyConnected(family="ntk", bias=False, depth=2):
            return "tangent"
    raise KernelError(
        "kernel must be one that random weights make features for (fully-connected rf, or ntk of depth 2, without "
        f"bias; exponential; arc-cosine): {_instead(kernel)}"
    )


def _instead(kernel: Kernel) -> str:
    """The clause that says which map can stand for a kernel that this one cannot."""
    if isinstance(kernel, DotProduct) and kernel.kernel in ("polynomial", "linear", "square"):
        return f"for {kernel.kernel} take kind 'monomials', which is exact"
    if isinstance(kernel, Convolutional) and not kernel.tangent:
        return "for convolutional kernels take kind 'convolutional-random' or 'nystrom-ckn'"
    return "for other kernels take kind 'nystrom'"
