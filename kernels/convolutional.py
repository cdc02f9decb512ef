"""Exact kernels of convolutional networks: patches P, pointwise kernel M, pooling A (SPEC C1 to C12)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np

from .arrays import Array, namespace
from .base import Cost, Kernel, KernelError, Prepared, require_float, row_ids, same_rows
from .layers import Layer, Stage, stages_on
from .parameters import choice, flag
from .pooling import MODES
from .recursion import Recursion

__all__ = ["Convolutional", "Layer"]


@dataclass(frozen=True)
class Convolutional(Kernel):
    """The kernel of a convolutional network of ``layers`` on images (n, h, w, c), unnormalised (C5).

    tangent: False for the random-feature kernel, True for the tangent kernel (every layer relu, C8),
        ``"both"`` for the two, (2, n, m), from one pass.
    pooling_mode: ``reference``, ``same`` or ``periodic`` (C4).
    """

    layers: tuple[Layer, ...]
    tangent: bool | Literal["both"] = False
    pooling_mode: str = "reference"

    kind: ClassVar[str] = "convolutional"
    inputs: ClassVar[Literal["vectors", "images"]] = "images"
    tile_sides: ClassVar[dict[str, int]] = {"float32": 128, "float64": 128}

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise KernelError("layers is empty: a convolutional kernel needs at least one layer")
        choice(MODES)("pooling_mode", self.pooling_mode)
        if self.tangent != "both":
            flag("tangent", self.tangent)
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise KernelError(f"layers must hold Layer values, got {type(layer).__name__}")
            if self.tangent and layer.kernel != "relu":
                raise KernelError(f"tangent needs relu in every layer; layers[{number}] is {layer.kernel}")
            if layer.pooling == "global" and number < len(self.layers) - 1:
                raise KernelError(f"layers[{number}] pools globally, which only the last layer may")

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tangent": self.tangent,
            "pooling_mode": self.pooling_mode,
            "layers": [layer.describe() for layer in self.layers],
        }

    def prepared_description(self) -> dict[str, Any]:
        last = self.layers[-1]
        return {
            "prepare": "images and patch norms",
            "pooling_mode": self.pooling_mode,
            "layers": [layer.describe() for layer in self.layers[:-1]],
            "last": {"patch": last.patch, "patch_norm": last.patch_norm},
        }

    @property
    def outputs(self) -> tuple[Kernel, ...]:
        if self.tangent != "both":
            return (self,)
        return replace(self, tangent=False), replace(self, tangent=True)

    def joint(self) -> Kernel:
        return replace(self, tangent="both") if self.tangent else self

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if min(shape) < 1:
            raise KernelError(f"images of shape {tuple(shape)} are empty")
        self._stages(shape)

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        """Keep the images, and compute the patch norms of every layer in float64 (C6).

        Arrays: ``image`` (n, h, w, c), and ``norm1``, ``norm2``, ... (n, positions of the layer's grid).
        """
        xp = namespace(X)
        dtype = require_float(X)
        self.check(X.shape[1:])
        rows = row_ids(X, rows)
        recursion = self._recursion(X.shape[1:], xp, np.dtype(np.float64), tangent=False)
        norms = [xp.empty((len(X), math.prod(stage.grid)), dtype) for stage in recursion.stages]
        step = recursion.pairs_per_block
        for start in range(0, len(X), step):
            block = X[start : start + step].astype(np.float64)
            for norm, values in zip(norms, recursion.patch_norms(block), strict=True):
                norm[start : start + step] = values
        arrays = {"image": xp.ascontiguousarray(X)}
        arrays.update({f"norm{number}": norm for number, norm in enumerate(norms, 1)})
        return Prepared(arrays, rows, pool)

    def pair(self, a: Prepared, b: Prepared) -> Array:
        image_a, image_b = a.arrays["image"], b.arrays["image"]
        xp = namespace(image_a, image_b)
        if image_a.shape[1:] != image_b.shape[1:] or image_a.dtype != image_b.dtype:
            raise KernelError(
                f"prepared blocks do not match: {image_a.dtype} images of shape {image_a.shape[1:]} "
                f"against {image_b.dtype} images of shape {image_b.shape[1:]}"
            )
        recursion = self._recursion(image_a.shape[1:], xp, np.dtype(image_a.dtype), bool(self.tangent))
        result = xp.empty((len(self.outputs), len(a), len(b)), image_a.dtype)
        same = same_rows(a, b)
        symmetric = a is b
        for group, part_b in b.blocks(recursion.group_size(image_b.shape[3])):
            second = recursion.second(part_b)
            p, q = recursion.block_shape(len(part_b))
            for rows, part_a in a.blocks(p):
                if symmetric and group.stop <= rows.start:
                    continue
                first = recursion.first(part_a)
                for start in range(0, len(part_b), q):
                    stop = min(start + q, len(part_b))
                    columns = slice(group.start + start, group.start + stop)
                    if symmetric and columns.stop <= rows.start:
                        continue
                    equal = _within(same, rows, columns, xp)
                    values = recursion.block(first, second[start:stop], equal)
                    for k, value in enumerate(values[-len(result) :]):
                        result[k, rows, columns] = value
        if symmetric:
            for i in range(len(a)):
                result[:, i + 1 :, i] = result[:, i, i + 1 :]
        return result if len(self.outputs) > 1 else result[0]

    def diag(self, a: Prepared) -> Array:
        image = a.arrays["image"]
        xp = namespace(image)
        recursion = self._recursion(image.shape[1:], xp, np.dtype(image.dtype), bool(self.tangent))
        result = xp.empty((len(self.outputs), len(a)), image.dtype)
        for rows, part in a.blocks(recursion.pairs_per_block):
            first, second = recursion.first(part), recursion.second(part).paired()
            equal = (xp.arange(len(part)), xp.zeros(len(part), np.int64))
            values = recursion.block(first, second, equal)
            for k, value in enumerate(values[-len(result) :]):
                result[k, rows] = value[:, 0]
        return result if len(self.outputs) > 1 else result[0]

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        self.check(shape)
        dtype = np.dtype(np.float32 if itemsize == 4 else np.float64)
        return self._recursion(shape, np, dtype, bool(self.tangent)).cost(n, m, shape[2])

    def _stages(self, shape: tuple[int, ...]) -> tuple[Stage, ...]:
        return stages_on(self.layers, self.pooling_mode, (int(shape[0]), int(shape[1])))

    def _recursion(self, shape: tuple[int, ...], xp: ModuleType, dtype: np.dtype, tangent: bool) -> Recursion:
        return Recursion(self._stages(shape), self.pooling_mode == "periodic", tangent, xp, dtype)


def _within(
    same: tuple[np.ndarray, np.ndarray], rows: slice, columns: slice, xp: ModuleType
) -> tuple[Array, Array] | None:
    """The pairs of ``same`` inside a block, as positions in the block; None where there are none."""
    i, j = same
    inside = (i >= rows.start) & (i < rows.stop) & (j >= columns.start) & (j < columns.stop)
    if not inside.any():
        return None
    return xp.asarray(i[inside] - rows.start), xp.asarray(j[inside] - columns.start)
