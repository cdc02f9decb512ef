"""The convolutional tangent kernel from random features (SPEC C7).

Its feature map y is a tensor product at every layer, M(x, y) = (phi_0(x) ⊗ y; phi_1(x)), and is never formed: inner
products of tensor products are products of inner products, and only phi_0 and phi_1 are replaced by random features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ..arrays import Array, namespace
from ..base import Cost, Kernel, KernelError, Prepared, require_float, row_ids
from ..convolutional import Convolutional
from ..network import Network
from ..parameters import whole
from ..patches import sum_over_patches
from .convolutional_random import images_at_a_time, pooled, random_layers
from .draws import layer_widths

_BLOCK_BYTES = 1 << 24
"""So many pairs of images are taken at a time that an array of all their pairs of positions takes about this."""


@dataclass(frozen=True)
class ConvolutionalTangentRandom(Kernel):
    """What a tangent ``Convolutional`` kernel becomes with random features in every layer: it tends to it with an
    error of order m^(-1/2) (C7, C8).

    Layer by layer phi_1 is sqrt(2/m) relu(W z) and phi_0 is sqrt(2/m) 1{W z > 0}, of the same filters. Both are kept
    once for each image; a pair of images takes products of matrices of positions, as the exact kernel does.

    kernel: the exact one. widths: number of random filters m, of each layer (a list) or of all (a number).
    seed: of the filters.
    """

    kernel: Kernel
    widths: tuple[int, ...]
    seed: int = 0

    kind: ClassVar[str] = "convolutional-tangent-random"
    inputs: ClassVar[Literal["vectors", "images"]] = "images"
    tile_sides: ClassVar[dict[str, int]] = {"float32": 128, "float64": 128}

    def __post_init__(self) -> None:
        if not (isinstance(self.kernel, Convolutional) and self.kernel.tangent is True):
            raise KernelError(
                "kernel must be convolutional with tangent = true; 'convolutional-random' has others"
            )
        object.__setattr__(self, "widths", layer_widths(self.widths, len(self.kernel.layers)))
        object.__setattr__(self, "seed", whole(0)("seed", self.seed))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "kernel": self.kernel.describe(),
            "widths": list(self.widths),
            "seed": self.seed,
        }

    def revisions(self) -> Any:
        return [self.revision, self.kernel.revisions()]

    def check(self, shape: tuple[int, ...]) -> None:
        self.kernel.check(shape)

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        """Arrays: ``image`` (n, h, w, c), and ``relu1``, ``relu2``, ... (n, positions of the layer's grid, m), the
        features phi_1. Where they are positive phi_0 is sqrt(2/m), else 0: patches of zeros have none."""
        dtype = require_float(X)
        self.check(tuple(X.shape[1:]))
        rows = row_ids(X, rows)
        xp = namespace(X)
        network = self._network(X.shape[1:])
        layers = random_layers(network, self.widths, self.seed, X)
        arrays = {
            f"relu{k}": xp.empty((len(X), math.prod(layer.stage.grid), len(layer.W)), dtype)
            for k, layer in enumerate(layers, 1)
        }
        step = images_at_a_time(network, self.widths, X.shape[3], dtype.itemsize)
        for start in range(0, len(X), step):
            part = slice(start, start + step)
            maps = X[part]
            for features, layer in zip(arrays.values(), layers, strict=True):
                found = layer.maps(maps)
                features[part] = found.reshape(features[part].shape)
                maps = pooled(found, layer.stage)
        return Prepared({"image": xp.ascontiguousarray(X), **arrays}, rows, pool)

    def pair(self, a: Prepared, b: Prepared) -> Array:
        image, other = a.arrays["image"], b.arrays["image"]
        xp = namespace(image, other)
        if image.shape[1:] != other.shape[1:] or image.dtype != other.dtype:
            raise KernelError(
                f"prepared blocks do not match: {image.dtype} images of shape {image.shape[1:]} "
                f"against {other.dtype} images of shape {other.shape[1:]}"
            )
        network = self._network(image.shape[1:])
        result = xp.empty((len(a), len(b)), image.dtype)
        for columns, part in b.blocks(_pairs_at_a_time(network, image.dtype.itemsize)):
            for i in range(len(a)):
                result[i, columns] = self._values(network, a[i : i + 1], part)
        return result

    def diag(self, a: Prepared) -> Array:
        image = a.arrays["image"]
        network = self._network(image.shape[1:])
        result = namespace(image).empty(len(a), image.dtype)
        for rows, part in a.blocks(_pairs_at_a_time(network, image.dtype.itemsize)):
            result[rows] = self._values(network, part, part)
        return result

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        network = self._network(shape)
        operations = 2.0 * math.prod(shape[:2]) ** 2 * shape[2]
        for stage, width in zip(network.stages, self.widths, strict=True):
            positions, after = math.prod(stage.grid), len(stage.rows) * len(stage.columns)
            operations += positions**2 * (4.0 * width + 4 * stage.layer.patch + 3)
            operations += 2.0 * after * positions * (positions + after)
        largest = math.prod(network.stages[0].grid)
        pairs = min(m, _pairs_at_a_time(network, itemsize))
        # The tangent array, two products or what patches are summed in; steps of both sides.
        scratch = pairs * largest * (4 * largest + max(self.widths)) + largest * max(self.widths)
        return Cost(n * m * operations, 0.0, scratch * itemsize)

    def _network(self, shape: Sequence[int]) -> Network:
        assert isinstance(self.kernel, Convolutional)
        return self.kernel.network(shape)

    def _values(self, network: Network, a: Prepared, b: Prepared) -> Array:
        """(n,) values between the images of ``a``, n or one, and the n images of ``b``, each with its partner."""
        xp = namespace(a.arrays["image"])
        first, second = (x.arrays["image"].reshape(len(x), -1, x.arrays["image"].shape[3]) for x in (a, b))
        T = _products(first, second)
        for number, stage in enumerate(network.stages, 1):
            T = T.reshape(len(T), *stage.grid, *stage.grid)
            sum_over_patches(T, xp.empty_like(T), stage.layer.patch, network.periodic)
            if stage.layer.patch_norm:
                T *= stage.layer.patch**-2
            T = T.reshape(len(T), math.prod(stage.grid), -1)
            phi_a, phi_b = (x.arrays[f"relu{number}"] for x in (a, b))
            steps = _products(*((phi > 0).astype(phi.dtype) for phi in (phi_a, phi_b)))
            steps *= 2 / phi_a.shape[-1]
            T *= steps
            T += _products(phi_a, phi_b)
            if number < len(network.stages):
                A = xp.asarray(np.kron(stage.rows, stage.columns), T.dtype)
                T = xp.matmul(xp.matmul(A, T), A.T)
        W = xp.asarray(np.kron(*network.trace_weights), T.dtype)
        return xp.einsum("nuv,uv->n", T, W)


def _products(a: Array, b: Array) -> Array:
    """(n, u, v) inner products of features (n or 1, u, m) and (n, v, m) of positions."""
    return namespace(a, b).matmul(a, b.swapaxes(-1, -2))


def _pairs_at_a_time(network: Network, itemsize: int) -> int:
    return max(1, _BLOCK_BYTES // (math.prod(network.stages[0].grid) ** 2 * itemsize))
