"""Random features of convolutional kernels: networks with random filters (SPEC F5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from ..arrays import Array, namespace
from ..base import Cost, Kernel, KernelError, require_float
from ..convolutional import Convolutional
from ..dot_product import inverse_norms
from ..network import Network, Stage
from ..parameters import whole
from ..patches import extract_patches
from .base import FeatureMap
from .draws import fourier_features, layer_widths, phases, relu_features, weight_bytes, weights

_BLOCK_BYTES = 1 << 26
"""Images are taken so many at a time that patches and features of a layer take about this, or else one at a time."""


@dataclass(frozen=True)
class ConvolutionalRandom(FeatureMap):
    """Features of a ``Convolutional`` kernel whose layers are relu, exponential or linear; errors are of order
    m^(-1/2) in the width of each layer.

    At each layer a patch z becomes sqrt(2/m) relu(W z), random Fourier features, or sqrt(scale/m) W z, and maps are
    pooled as the kernel pools (C4). The features of all positions are concatenated, row by row of the last grid. Over
    the last layer's filters the expectation of inner products is exact, given the features that these see.

    widths: number of random filters m, of each layer (a list) or of all (a number). seed: of the filters.
    """

    widths: tuple[int, ...]
    seed: int = 0

    kind: ClassVar[str] = "convolutional-random"

    def __post_init__(self) -> None:
        kernel = _drawable(self.kernel)
        object.__setattr__(self, "widths", layer_widths(self.widths, len(kernel.layers)))
        object.__setattr__(self, "seed", whole(0)("seed", self.seed))

    def width(self, shape: tuple[int, ...]) -> int:
        last = self._network(shape).stages[-1]
        return len(last.rows) * len(last.columns) * self.widths[-1]

    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        dtype = require_float(X)
        shape = tuple(X.shape[1:])
        self.check(shape)
        network = self._network(shape)
        layers = random_layers(network, self.widths, self.seed, X)
        out = namespace(X).empty((len(X), self.width(shape)), dtype)
        step = images_at_a_time(network, self.widths, shape[2], dtype.itemsize)
        for start in range(0, len(X), step):
            part = slice(start, start + step)
            maps = X[part]
            for layer in layers:
                maps = pooled(layer.maps(maps), layer.stage)
            out[part] = maps.reshape(len(maps), -1)
        return out

    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        return layers_cost(n, self._network(shape), self.widths, shape[2], itemsize)

    def _network(self, shape: Sequence[int]) -> Network:
        return _drawable(self.kernel).network(shape)


class RandomLayer(NamedTuple):
    """A layer with its filters: weights (m, d) and, of an exponential layer, phases (m,)."""

    stage: Stage
    periodic: bool
    W: Array
    phase: Array | None

    def maps(self, X: Array) -> Array:
        """(n, h, w, m) random features of the patches of maps X (n, h, w, c), not pooled yet."""
        layer, xp = self.stage.layer, namespace(X)
        z = extract_patches(X, layer.patch, self.periodic).reshape(-1, self.W.shape[1])
        if layer.patch_norm:
            z *= 1 / layer.patch
        norm = xp.sqrt(xp.einsum("ij,ij->i", z, z))
        z *= inverse_norms(norm, layer.floor)[:, None]
        if layer.sigma is not None:
            assert self.phase is not None
            features = fourier_features(z, norm, self.W, self.phase, layer.sigma)
        else:
            z *= norm[:, None]
            if layer.kernel == "relu":
                features = relu_features(z, self.W)
            else:
                z *= math.sqrt(layer.number() / len(self.W))
                features = xp.matmul(z, self.W.T)
        return features.reshape(*X.shape[:3], len(self.W))


def random_layers(network: Network, widths: Sequence[int], seed: int, X: Array) -> list[RandomLayer]:
    """The layers of ``network`` with filters for images like X (n, h, w, c), in their dtype and on their device."""
    xp = namespace(X)
    shapes = _filter_shapes(network, widths, X.shape[3])
    drawn = weights(seed, shapes, False, np.dtype(X.dtype), xp)
    layers = []
    for number, (stage, W) in enumerate(zip(network.stages, drawn, strict=True)):
        phase = phases(seed, number, shapes[number], X) if stage.layer.kernel == "exponential" else None
        layers.append(RandomLayer(stage, network.periodic, W, phase))
    return layers


def pooled(maps: Array, stage: Stage) -> Array:
    """Maps (n, h, w, m) pooled over rows and columns (C4): (n, h', w', m)."""
    if stage.passes_on:
        return maps
    xp = namespace(maps)
    H, C = (xp.asarray(matrix, maps.dtype) for matrix in (stage.rows, stage.columns))
    n, h, _, m = maps.shape
    columns = xp.matmul(C, maps).reshape(n, h, len(C) * m)
    return xp.matmul(H, columns).reshape(n, len(H), len(C), m)


def images_at_a_time(network: Network, widths: Sequence[int], channels: int, itemsize: int) -> int:
    """How many images go through the layers together."""
    return max(1, _BLOCK_BYTES // (_image_numbers(network, widths, channels) * itemsize))


def layers_cost(n: int, network: Network, widths: Sequence[int], channels: int, itemsize: int) -> Cost:
    """Cost of the pooled features of n images, through all layers."""
    shapes = _filter_shapes(network, widths, channels)
    operations, waves = 0.0, 0
    for stage, (m, d) in zip(network.stages, shapes, strict=True):
        h, w = stage.grid
        products = h * w * (d + len(stage.columns)) + len(stage.rows) * len(stage.columns) * h
        operations += 2.0 * m * products + h * w * (4.0 * d + m)
        waves += h * w * m if stage.layer.kernel == "exponential" else 0
    images = min(n, images_at_a_time(network, widths, channels, itemsize))
    scratch = images * _image_numbers(network, widths, channels) * itemsize
    return Cost(n * operations, n * waves, scratch + weight_bytes(shapes, itemsize))


def _image_numbers(network: Network, widths: Sequence[int], channels: int) -> int:
    """How many numbers the largest layer has of an image at a time: patches and a scaled copy with features, or
    features as they are pooled; and the maps before."""
    shapes = _filter_shapes(network, widths, channels)
    most = before = 0
    for stage, (m, d) in zip(network.stages, shapes, strict=True):
        h, w = stage.grid
        across, pooled = h * len(stage.columns) * m, len(stage.rows) * len(stage.columns) * m
        most = max(most, before + h * w * (2 * d + m), h * w * m + across + pooled)
        before = pooled
    return most


def _filter_shapes(network: Network, widths: Sequence[int], channels: int) -> tuple[tuple[int, int], ...]:
    """(m, d) of each layer's filters."""
    inputs = (channels, *widths)
    return tuple(
        (m, stage.layer.patch**2 * c) for m, c, stage in zip(widths, inputs, network.stages, strict=False)
    )


def _drawable(kernel: Kernel) -> Convolutional:
    """``kernel``, where random filters can stand for it.

    Raises:
        KernelError: they cannot; the message says what else there is.
    """
    drawable = ("relu", "exponential", "linear")
    if not isinstance(kernel, Convolutional):
        other = "'random' or 'nystrom'" if kernel.inputs == "vectors" else "'nystrom'"
        raise KernelError(f"kernel must be convolutional, got {kernel.kind}: take kind {other}")
    if kernel.tangent:
        raise KernelError(
            "kernel must not be a tangent kernel, whose features are too many to write down: kernel kind "
            "'convolutional-tangent-random' has inner products of random features for it"
        )
    for number, layer in enumerate(kernel.layers):
        if layer.kernel not in drawable:
            raise KernelError(
                f"kernel must have layers {', '.join(drawable)} alone, for random filters; layers[{number}] is "
                f"{layer.kernel}: take kind 'nystrom-ckn'"
            )
    return kernel
