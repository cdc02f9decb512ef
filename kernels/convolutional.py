"""Exact kernels of convolutional networks: patches P, pointwise kernel M, pooling A (SPEC C1 to C12)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from . import native
from .arrays import Array, namespace
from .base import Cost, Kernel, KernelError, Prepared, require_float, row_ids, same_rows
from .fused import asked, choose, path_told, why_general
from .general import engine
from .layers import Layer
from .network import Network, Tangent, network_on
from .parameters import choice, flag
from .pooling import MODES

__all__ = ["Convolutional", "Layer", "NetworkKernel"]

_DIAGONAL_IMAGES = 64
"""Diagonals that are computed in float64 take so many images at a time."""


class NetworkKernel(Kernel):
    """A kernel of networks of ``layers`` on images (n, h, w, c), whose prepared blocks hold the images as ``image``;
    subclasses are dataclasses with these three fields."""

    layers: tuple[Layer, ...]
    tangent: Tangent
    pooling_mode: str

    inputs: ClassVar[Literal["vectors", "images"]] = "images"
    tile_sides: ClassVar[dict[str, int]] = {"float32": 128, "float64": 128}

    @property
    def outputs(self) -> tuple[Kernel, ...]:
        if self.tangent != "both":
            return (self,)
        return self._with(False), self._with(True)

    def joint(self) -> Kernel:
        return self._with("both") if self.tangent else self

    def _with(self, tangent: Tangent) -> Self:
        return replace(self, tangent=tangent)  # type: ignore[call-arg]  # a field of subclasses

    @abstractmethod
    def block(self, a: Prepared, b: Prepared) -> Array:
        """As ``pair``, always (outputs, n, m), computed in the dtype of the images throughout."""

    @abstractmethod
    def diagonal(self, a: Prepared) -> Array:
        """As ``diag``, always (outputs, n), computed in the dtype of the images throughout."""

    def pair(self, a: Prepared, b: Prepared) -> Array:
        result = self.block(a, b)
        image = a.arrays["image"]
        i, j = same_rows(a, b)
        if len(i) and self._rounds_diagonals(image):
            i, j = (namespace(image).asarray(index) for index in (i, j))
            result[-1, i, j] = self._tangent_diagonal(image[i])
        return result if len(self.outputs) > 1 else result[0]

    def diag(self, a: Prepared) -> Array:
        image = a.arrays["image"]
        if not self._rounds_diagonals(image):
            result = self.diagonal(a)
            return result if len(self.outputs) > 1 else result[0]
        self._check_preparation(a)
        tangent = self._tangent_diagonal(image)
        if len(self.outputs) == 1:
            return tangent
        return namespace(image).stack([self._with(False).diag(a), tangent])

    def _rounds_diagonals(self, image: Array) -> bool:
        """Whether tangent diagonals in the dtype of the images would be off by more than other entries are (K13).

        Flat ground makes many patches of one image equal, at different positions too. There the rounding of cosines
        counts sqrt(2 e)/pi in kappa_0, always downwards, which in float32 comes to 5e-5 of an entry.
        """
        return bool(self.tangent) and image.dtype == np.float32

    def _tangent_diagonal(self, images: Array) -> Array:
        """The tangent kernel (n,) of images (n, h, w, c) with themselves, computed in float64, in their dtype."""
        kernel = self._with(True)
        result = namespace(images).empty(len(images), images.dtype)
        # The path that is asked for may not take float64: that of CUDA never does.
        with path_told("" if asked() == "general" else "auto"):
            for start in range(0, len(images), _DIAGONAL_IMAGES):
                part = slice(start, start + _DIAGONAL_IMAGES)
                result[part] = kernel.diag(kernel.prepare(images[part].astype(np.float64)))
        return result

    def _images(self, a: Prepared, b: Prepared) -> tuple[Array, Array]:
        """The images of two blocks.

        Raises:
            KernelError: they differ in shape or dtype.
            TypeError: one is on the host and one on a device.
        """
        image_a, image_b = a.arrays["image"], b.arrays["image"]
        namespace(image_a, image_b)
        if image_a.shape[1:] != image_b.shape[1:] or image_a.dtype != image_b.dtype:
            raise KernelError(
                f"prepared blocks do not match: {image_a.dtype} images of shape {image_a.shape[1:]} "
                f"against {image_b.dtype} images of shape {image_b.shape[1:]}"
            )
        return image_a, image_b

    def network(self, shape: Sequence[int]) -> Network:
        """The layers on images of ``shape``, which begins with h and w.

        Raises:
            KernelError: when the grid vanishes, or a patch is larger than its grid.
        """
        return network_on(self.layers, self.pooling_mode, (int(shape[0]), int(shape[1])))


@dataclass(frozen=True)
class Convolutional(NetworkKernel):
    """The kernel of a convolutional network of ``layers`` on images (n, h, w, c), unnormalised (C5).

    tangent: False for the random-feature kernel, True for the tangent kernel (every layer relu, C8),
        ``"both"`` for the two, (2, n, m), from one pass.
    pooling_mode: ``reference``, ``same`` or ``periodic`` (C4).
    """

    layers: tuple[Layer, ...]
    tangent: Tangent = False
    pooling_mode: str = "reference"

    kind: ClassVar[str] = "convolutional"
    revision: ClassVar[int] = 2

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

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if min(shape) < 1:
            raise KernelError(f"images of shape {tuple(shape)} are empty")
        self.network(shape)

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        """Keep the images, and compute the patch norms of every layer in float64 (C6).

        Arrays: ``image`` (n, h, w, c), and ``norm1``, ``norm2``, ... (n, positions of the layer's grid).
        """
        require_float(X)
        self.check(X.shape[1:])
        rows = row_ids(X, rows)
        X = namespace(X).ascontiguousarray(X)
        network = self.network(X.shape[1:])
        norms = choose(network, self.tangent, X, preparing=True).patch_norms(network, X)
        arrays = {"image": X} | {f"norm{k}": norm for k, norm in enumerate(norms, 1)}
        return Prepared(arrays, rows, pool, self.preparation)

    def block(self, a: Prepared, b: Prepared) -> Array:
        image, _ = self._images(a, b)
        network = self.network(image.shape[1:])
        for part in (a, b):
            self._check_preparation(part)
            _check_norms(network, part)
        return choose(network, self.tangent, image).pair(network, self.tangent, a, b, same_rows(a, b))

    def diagonal(self, a: Prepared) -> Array:
        image = a.arrays["image"]
        network = self.network(image.shape[1:])
        self._check_preparation(a)
        _check_norms(network, a)
        return choose(network, self.tangent, image).diag(network, self.tangent, a)

    def path(self, a: Prepared) -> str:
        image = a.arrays["image"]
        return choose(self.network(image.shape[1:]), self.tangent, image).name(image)

    def remark(self, a: Prepared) -> str:
        image = a.arrays["image"]
        return why_general(self.network(image.shape[1:]), self.tangent, image)

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """As ``Kernel.cost``, of the general path; scratch memory is a bound for the compiled one as well."""
        self.check(shape)
        dtype = np.dtype(np.float32 if itemsize == 4 else np.float64)
        network = self.network(shape)
        cost = engine(network, self.tangent, np, dtype, shape[2]).cost(n, m)
        if asked() == "general":
            return cost
        compiled = native.scratch_bytes(network, self.tangent, n, m, shape[2], dtype)
        return replace(cost, scratch_bytes=max(cost.scratch_bytes, compiled))


def _check_norms(network: Network, part: Prepared) -> None:
    """Compiled code reads norms by the network's own sizes, wherever they end.

    Raises:
        KernelError: the block was prepared for layers on other grids.
    """
    expected = {f"norm{k}": (len(part), math.prod(stage.grid)) for k, stage in enumerate(network.stages, 1)}
    found = {name: array.shape for name, array in part.arrays.items() if name.startswith("norm")}
    if found != expected:
        raise KernelError(
            f"blocks were prepared by a kernel with other layers: patch norms of shapes {found} where "
            f"{expected} is needed; prepare them with this kernel"
        )
