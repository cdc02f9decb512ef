"""Convolutional kernel networks: explicit features of convolutional kernels, by a Nystrom layer for each (SPEC F3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from ..arrays import Array, namespace, to_host
from ..base import Cost, Kernel, KernelError, require_float
from ..convolutional import Convolutional
from ..network import Network, Stage
from ..parameters import share, whole
from ..workspace import Workspace, block_bytes
from .anchors import draw_patches, images_drawn
from .base import FeatureMap, Progress, Samples, unwatched
from .landmarks import EIGENVECTORS
from .nystrom import inverse_root
from .nystrom_layer import NystromLayer, anchor_matrix, layer_cost
from .spherical_kmeans import require_patches, spherical_kmeans, start_rows

_BLOCK_BYTES = 1 << 26
"""Images go through the network so many at a time that maps, or patches to learn from, take about this on a host."""


@dataclass(frozen=True)
class NystromCKN(FeatureMap):
    """Features of a ``Convolutional`` kernel by Nystrom layers, each a projection on the features of its anchors.

    At each layer a patch z becomes psi(z) = |z| (kappa(Z Z^T) + epsilon I)^(-1/2) kappa(Z z/|z|), Z the anchors, and
    maps are pooled as the kernel pools (C4). The features of all positions are concatenated, row by row of the last
    grid, so that inner products are C5. Of one layer K - K_hat is positive semidefinite, and |psi(z)| <= |z|.

    Anchors are learned layer by layer, by spherical k-means on patches of the maps of the layers before; float32
    samples give float32 anchors. epsilon bounds how much the rounding of features is amplified, by epsilon^(-1/2):
    in float32 1e-3 is safe. Directions among the anchors that rounding alone tells apart are left out
    (``inverse_root``), so that anchors may repeat or depend on each other.

    anchors: number of anchors, one for each layer; 0 for a linear layer that keeps its patches as they are, exactly.
    patches: how many patches, not counting those of norm 0, are sampled for each layer. iterations: most iterations
    of k-means. seed: of samples and first centroids.
    """

    anchors: tuple[int, ...]
    patches: int = 100_000
    epsilon: float = 1e-3
    iterations: int = 100
    seed: int = 0

    kind: ClassVar[str] = "nystrom-ckn"
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kernel = _approximable(self.kernel)
        checked = {
            "anchors": _anchors(self.anchors, kernel),
            "patches": whole(1)("patches", self.patches),
            "epsilon": share("epsilon", self.epsilon),
            "iterations": whole(1)("iterations", self.iterations),
            "seed": whole(0)("seed", self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if max(self.anchors) > self.patches:
            raise KernelError(
                f"patches must be at least {max(self.anchors)}, the most anchors of a layer, which are chosen among "
                f"them, got {self.patches}"
            )

    def width(self, shape: tuple[int, ...]) -> int:
        return self._sizes(shape)[-1].features

    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        dtype = require_float(X)
        shape = tuple(X.shape[1:])
        self.check(shape)
        xp = namespace(X)
        layers = self._layers(X)
        workspace = Workspace(xp, dtype)
        out = xp.empty((len(X), self.width(shape)), dtype)
        step = self._images(xp, shape, dtype.itemsize)
        for start in range(0, len(X), step):
            part = slice(start, start + step)
            out[part] = _through(layers, X[part], workspace).reshape(len(X[part]), -1)
        return out

    def learn(self, samples: Samples, progress: Progress = unwatched) -> Self:
        """Learn the anchors of each layer on patches of what comes out of the layers before it.

        Raises:
            KernelError: fewer patches, or fewer distinct ones, than anchors.
            SamplesError: no patch but zeros, or a value is not finite.
        """
        self.check(samples.shape)
        stages = self._network(samples.shape).stages
        arrays: dict[str, np.ndarray] = {}
        for number, (stage, count) in enumerate(zip(stages, self.anchors, strict=True), 1):
            if count == 0:
                continue
            with _of_layer(number):
                arrays |= self._learned(samples, number, count, stage, arrays, _named(progress, number))
        return self.knowing(arrays)

    def check_count(self, count: int, shape: tuple[int, ...]) -> None:
        for number, (size, anchors) in enumerate(zip(self._sizes(shape), self.anchors, strict=True), 1):
            positions = math.prod(size.stage.grid)
            images = images_drawn(count, self.patches, positions)
            with _of_layer(number):
                require_patches(min(self.patches, images * positions), anchors)

    def _learned(
        self,
        samples: Samples,
        number: int,
        count: int,
        stage: Stage,
        before: Mapping[str, np.ndarray],
        progress: Progress,
    ) -> dict[str, np.ndarray]:
        """Anchors and root of one layer, those of the layers before being known."""
        known = replace(self, learned="", arrays=dict(before))

        def maps(X: Array) -> Array:
            return _through(known._layers(X, number - 1), X, Workspace(namespace(X), X.dtype))

        size = self._sizes(samples.shape)[number - 1].patch
        block = max(1, _BLOCK_BYTES // (math.prod(stage.grid) * size * 8))
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,)))
        periodic = self._network(samples.shape).periodic
        patches = draw_patches(samples, maps, stage, periodic, self.patches, rng, block, progress)
        seed = int(rng.integers(1 << 32))
        Z = spherical_kmeans(patches, count, seed, iterations=self.iterations, progress=progress).centroids
        del patches
        root = inverse_root(anchor_matrix(stage.layer, Z), self.epsilon, float(np.finfo(Z.dtype).eps))
        return {f"anchors_{number}": to_host(Z), f"root_{number}": to_host(root.astype(Z.dtype))}

    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        block = min(n, self._images(np, shape, itemsize))
        total, before = Cost(0.0, 0.0, 0), 0
        for size in self._sizes(shape):
            held = size.cost(block, itemsize).scratch_bytes + block * before * itemsize
            total = total + replace(size.cost(n, itemsize), scratch_bytes=held)
            before = size.features
        return total

    def learning_cost(self, count: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """As ``FeatureMap.learning_cost``; k-means counts with the most iterations that it may take."""
        total, sizes = Cost(0.0, 0.0, 0), self._sizes(shape)
        for number, size in enumerate(sizes):
            if size.exact:
                continue
            m, positions = size.channels, math.prod(size.stage.grid)
            images = images_drawn(count, self.patches, positions)
            patches = min(self.patches, images * positions)
            copied = start_rows(patches, m) * size.patch * itemsize
            held = (
                patches * (size.patch * itemsize + 16) + 16 * images * positions + copied + 4 * _BLOCK_BYTES
            )
            total = total + Cost(2.0 * self.iterations * patches * m * size.patch, 0.0, held)
            total = total + Cost(EIGENVECTORS * m**3, 0.0, 4 * 8 * m**2)
            for before in sizes[:number]:
                # Once for the norms of patches and once for the patches.
                total = total + replace(before.cost(2 * images, itemsize), scratch_bytes=0)
        return total

    def _network(self, shape: Sequence[int]) -> Network:
        return _approximable(self.kernel).network(shape)

    def _sizes(self, shape: tuple[int, ...]) -> list[_Size]:
        """What is large in each layer, on images of ``shape`` (h, w, c)."""
        sizes, channels = [], shape[2]
        for stage, count in zip(self._network(shape).stages, self.anchors, strict=True):
            patch = stage.layer.patch**2 * channels
            channels = count or patch
            sizes.append(_Size(stage, patch, channels, count == 0))
        return sizes

    def _images(self, xp: ModuleType, shape: tuple[int, ...], itemsize: int) -> int:
        """How many images go through all layers together: many, for the roots' sake."""
        most = max(size.features for size in self._sizes(shape)) * itemsize
        return max(1, max(_BLOCK_BYTES, block_bytes(xp)) // most)

    def _layers(self, X: Array, count: int | None = None) -> list[NystromLayer]:
        """The first ``count`` layers, or all, for images like X (n, h, w, c)."""
        network = self._network(X.shape[1:])
        return [
            NystromLayer(stage, network.periodic)
            if anchors == 0
            else NystromLayer(
                stage, network.periodic, self.array(f"anchors_{number}", X), self.array(f"root_{number}", X)
            )
            for number, (stage, anchors) in enumerate(
                zip(network.stages[:count], self.anchors[:count], strict=True), 1
            )
        ]


class _Size(NamedTuple):
    """A layer on its grid: numbers of a patch, channels that come out, whether patches are kept as they are."""

    stage: Stage
    patch: int
    channels: int
    exact: bool

    @property
    def features(self) -> int:
        """Of an image, pooled."""
        return len(self.stage.rows) * len(self.stage.columns) * self.channels

    def cost(self, n: int, itemsize: int) -> Cost:
        return layer_cost(self.stage, self.patch, self.channels, self.exact, n, itemsize)


def _through(layers: Sequence[NystromLayer], X: Array, workspace: Workspace) -> Array:
    for layer in layers:
        X = layer.maps(X, workspace)
    return X


@contextmanager
def _of_layer(number: int) -> Iterator[None]:
    """A context whose errors name the layer."""
    try:
        yield
    except KernelError as error:
        raise type(error)(f"layer {number}: {error}") from None


def _named(progress: Progress, number: int) -> Progress:
    def of_layer(done: int, total: int, message: str) -> None:
        progress(done, total, f"layer {number}: {message}")

    return of_layer


def _anchors(value: Any, kernel: Convolutional) -> tuple[int, ...]:
    """The parameter ``anchors``, checked.

    Raises:
        KernelError: not a whole number for each layer, or 0 for one that is not linear.
    """
    layers = kernel.layers
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(layers):
        raise KernelError(f"anchors must be a list of {len(layers)}, one for each layer, got {value!r}")
    anchors = tuple(whole(0)("anchors", count) for count in value)
    for number, (count, layer) in enumerate(zip(anchors, layers, strict=True)):
        if count == 0 and layer.kernel != "linear":
            raise KernelError(
                f"anchors must be at least 1 for layers[{number}], which is {layer.kernel}: only a linear layer is "
                "its own features (0)"
            )
    return anchors


def _approximable(kernel: Kernel) -> Convolutional:
    """``kernel``, where Nystrom layers can stand for it.

    Raises:
        KernelError: they cannot; the message says what else there is.
    """
    if not isinstance(kernel, Convolutional):
        raise KernelError(f"kernel must be convolutional, got {kernel.kind}: kind 'nystrom' takes any kernel")
    if kernel.tangent:
        raise KernelError("kernel must not be a tangent kernel: kind 'nystrom' takes any kernel")
    return kernel
