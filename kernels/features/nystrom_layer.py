"""One Nystrom layer of a convolutional kernel network: patches, their features by anchors, pooling (SPEC F3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from .. import fused
from ..arrays import Array, namespace
from ..base import Cost
from ..cuda import entrywise
from ..explicit import scale
from ..layers import Layer
from ..network import Stage
from ..patches import patch_offsets
from ..pointwise import apply, factors, value_at_1
from ..workspace import Workspace, block_bytes
from .convolutional_random import pooled

_ROWS = 1 << 11
"""Fewest rows of one product with anchors beyond the cache: these are packed anew for each, as dear as some 80 rows."""
_POINTWISE = {
    "relu": (10, 2),
    "exponential": (3, 1),
    "polynomial": (5, 0),
    "square": (1, 0),
    "linear": (0, 0),
}
"""Operations and transcendental calls of the scalar functions, for one inner product."""


@dataclass(frozen=True, eq=False)
class NystromLayer:
    """psi(z) = |z| R kappa(Z z/|z|) at every patch z, then pooling (C4).

    stage: the layer on its grid. periodic: patches wrap around. anchors: Z (m, D) unit rows, D numbers of a patch;
    None for a linear layer, whose patches are their own features. root: R (m, m), which goes behind the pooling, as
    it acts on channels alone and there are fewer positions there.
    """

    stage: Stage
    periodic: bool
    anchors: Array | None = None
    root: Array | None = None

    def maps(self, X: Array, workspace: Workspace) -> Array:
        """(n, h', w', m) pooled features of maps X (n, h, w, c)."""
        xp, layer = namespace(X), self.stage.layer
        n, size = len(X), layer.patch**2 * X.shape[3]
        width = size if self.anchors is None else len(self.anchors)
        anchors = self.anchors
        if anchors is not None and layer.kernel == "linear":
            anchors = anchors * scale(_beside(layer), xp.ones((width, 1), X.dtype))
        out = xp.empty((n, len(self.stage.rows), len(self.stage.columns), width), X.dtype)
        step = images_at_a_time(xp, self.stage, size, width, X.dtype.itemsize)
        for start in range(0, n, step):
            part = slice(start, start + step)
            out[part] = pooled(self._features(X[part], anchors, workspace), self.stage)
        return out if self.root is None else xp.matmul(out.reshape(-1, width), self.root).reshape(out.shape)

    def _features(self, X: Array, anchors: Array | None, workspace: Workspace) -> Array:
        """|z| kappa(Z z/|z|), or z times the root of the scale, at every position: (n, h, w, m), valid until the
        workspace is used again."""
        xp, layer = namespace(X), self.stage.layer
        n, h, w, _ = X.shape
        around = _surrounded(X, layer.patch, self.periodic, workspace)
        norm = _norms(around, layer)
        before, after = factors(layer, norm, first=True)
        patches = workspace.take("patches", (n, h, w, layer.patch, layer.patch, X.shape[3]))
        each = (1 if before is None else before[..., None, None, None]) * X.dtype.type(_share(layer))
        xp.multiply(_windows(around, layer.patch), each, out=patches)
        if anchors is None:
            return patches.reshape(n, h, w, -1)
        rows = patches.reshape(n * h * w, -1)
        B = xp.matmul(rows, anchors.T, out=workspace.take("products", (len(rows), len(anchors))))
        _values(layer, B, None if after is None else after.reshape(-1), workspace)
        return B.reshape(n, h, w, -1)


def _values(layer: Layer, B: Array, weights: Array | None, workspace: Workspace) -> None:
    """The scalar function of inner products B (rows, m) in place, times weights (rows,) after it."""
    if layer.kernel == "linear":
        return
    if fused.runs_entrywise(B):
        entrywise.scalar_function(layer, B, weights)
        return
    compiled = fused.compiled_entrywise(B)
    if compiled is not None:
        compiled.map_entries(layer, B, weights)
        return
    xp = namespace(B)
    # Several passes: strip by strip they run in the cache.
    step = max(1, block_bytes(xp) // (B.shape[1] * B.dtype.itemsize))
    for start in range(0, len(B), step):
        strip = B[start : start + step]
        values, _ = apply(layer, strip, None, False, workspace.take)
        if weights is not None:
            xp.multiply(values, weights[start : start + step, None], out=strip)


def anchor_matrix(layer: Layer, anchors: Array) -> Array:
    """kappa(Z Z^T) of unit rows Z (m, D), (m, m) float64."""
    layer = _beside(layer)
    Z = anchors.astype(np.float64)
    xp = namespace(Z)
    Z /= xp.sqrt((Z * Z).sum(axis=1, keepdims=True))
    one = xp.ones((len(Z), 1))
    (before, after), (other, _) = factors(layer, one, first=True), factors(layer, one, first=False)
    Y = Z if other is None else Z * other
    K = (Z if before is None else Z * before) @ Y.T
    K, _ = apply(layer, K, None, False, Workspace(xp, K.dtype).take)
    xp.fill_diagonal(K, value_at_1(layer, 1.0))
    return K if after is None else K * after


def patch_norms(X: Array, layer: Layer, periodic: bool) -> Array:
    """(n, h, w) norms of the patches that ``layer`` sees in maps X (n, h, w, c)."""
    return _norms(_surrounded(X, layer.patch, periodic, Workspace(namespace(X), X.dtype)), layer)


def images_at_a_time(xp: ModuleType, stage: Stage, size: int, width: int, itemsize: int) -> int:
    """How many images to take together through a layer with so many anchors of so many numbers."""
    positions = math.prod(stage.grid)
    cached = 4 * block_bytes(xp) // (positions * max(size, width) * itemsize)
    rows = _ROWS if size * width * itemsize > block_bytes(xp) else 1
    return max(1, cached, -(-rows // positions))


def layer_cost(stage: Stage, size: int, width: int, exact: bool, n: int, itemsize: int) -> Cost:
    """Cost of ``maps`` for n images on a host. exact: a linear layer without anchors."""
    (h, w), H, C = stage.grid, len(stage.rows), len(stage.columns)
    functions, calls = (0, 0) if exact else _POINTWISE[stage.layer.kernel]
    entries = n * h * w * width
    products = 0.0 if exact else 2.0 * entries * size + 2.0 * n * H * C * width**2
    pooling = 0.0 if stage.passes_on else 2.0 * n * width * C * (h * w + H * h)
    passes = 3.0 * n * h * w * size + (1.0 + functions) * entries
    step = min(n, images_at_a_time(np, stage, size, width, itemsize))
    # Surrounded maps and patches, products as they are pooled, norms in float64; what comes out twice, for the root.
    held = step * (h * w * (2 * size + width) + (h + H) * C * width) + 2 * n * H * C * width
    return Cost(
        products + pooling + passes,
        float(calls * entries),
        held * itemsize + 64 * step * h * w + 3 * block_bytes(np),
    )


def _beside(layer: Layer) -> Layer:
    """The layer as anchors meet it: they are directions, of norm 1, which no floor shortens."""
    return replace(layer, floor=min(layer.floor, 1.0))


def _share(layer: Layer) -> float:
    """What patches are multiplied by (C2)."""
    return 1 / layer.patch if layer.patch_norm else 1.0


def _surrounded(X: Array, size: int, periodic: bool, workspace: Workspace) -> Array:
    """Maps X (n, h, w, c) with what their patches meet beyond the border: (n, h + size - 1, w + size - 1, c)."""
    if size == 1:
        return X
    xp = namespace(X)
    n, h, w, c = X.shape
    first = -patch_offsets(size)[0]
    if periodic:
        rows, columns = ((xp.arange(side + size - 1) - first) % side for side in (h, w))
        return X[:, rows[:, None], columns]
    around = workspace.take("around", (n, h + size - 1, w + size - 1, c))
    around[...] = 0
    around[:, first : first + h, first : first + w] = X
    return around


def _windows(around: Array, size: int) -> Array:
    """The patches in surrounded maps, by row, column, channel: a view (n, h, w, size, size, c)."""
    n, h, w, c = around.shape
    image, row, column, channel = around.strides
    return namespace(around).lib.stride_tricks.as_strided(
        around,
        (n, h - size + 1, w - size + 1, size, size, c),
        (image, row, column, row, column, channel),
    )


def _norms(around: Array, layer: Layer) -> Array:
    """(n, h, w) norms of the patches in surrounded maps, in their dtype, by sums in float64."""
    squares = namespace(around).einsum("ijkc,ijkc->ijk", around, around, dtype=np.float64)
    for axis in (1, 2):
        length = squares.shape[axis] - layer.patch + 1
        squares = sum(
            squares[:, d : d + length] if axis == 1 else squares[:, :, d : d + length]
            for d in range(layer.patch)
        )
    return (squares**0.5 * _share(layer)).astype(around.dtype)
