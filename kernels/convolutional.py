"""Exact kernels of convolutional networks: patches P, pointwise kernel M, pooling A (SPEC C1 to C12)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from . import native, parallel
from .arrays import Array, namespace, to_host
from .base import Cost, Kernel, KernelError, Prepared, require_float, row_ids, same_rows
from .fused import asked, choose, path_told, why_general
from .general import engine
from .layers import Layer
from .network import Network, Tangent, network_on
from .parameters import choice, flag
from .pooling import MODES

__all__ = ["Convolutional", "Layer", "NetworkKernel"]

_PAIRS_AT_ONCE = 16
"""What is computed in float64 beside float32 blocks takes so many pairs of images, and images of a side, at a time."""

_PAIRS_ON_DEVICE = 1024
"""The same on a device, which wants much to do at once."""


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
    def paired(self, a: Prepared, b: Prepared, same: bool) -> Array:
        """The values (outputs, n) of each image of ``a`` with that of its number in ``b``, computed in the dtype of the
        images throughout; same: they are the same samples."""

    @abstractmethod
    def too_parallel(self, a: Prepared, b: Prepared) -> Array:
        """(n, m) bool: for which images of two float32 blocks parallel patches would make the tangent kernel's error
        too large (``parallel``)."""

    def pair(self, a: Prepared, b: Prepared) -> Array:
        result = self.block(a, b)
        if self._rounds(a.arrays["image"]):
            self._correct(result[-1], a, b)
        return result if len(self.outputs) > 1 else result[0]

    def diag(self, a: Prepared) -> Array:
        image = a.arrays["image"]
        if not self._rounds(image):
            result = self.paired(a, a, True)
            return result if len(self.outputs) > 1 else result[0]
        self._check_preparation(a)
        every = np.arange(len(a))
        tangent = self._in_float64(image, every, image, every, True)
        if len(self.outputs) == 1:
            return tangent
        return namespace(image).stack([self._with(False).diag(a), tangent])

    def _correction_cost(self, n: int, m: int, shape: tuple[int, ...]) -> Cost:
        """Cost of what n x m pairs of float32 images take in float64, on any path of the host."""
        network, channels = self.network(shape), shape[2]
        pairs = max(1, min(n * m, _PAIRS_AT_ONCE))
        exact = self._with(True).cost(pairs, 1, shape, 8)
        # Images of both sides in float64 with their norms, those of each pair, and of one side as they were.
        numbers = channels * math.prod(shape[:2]) + sum(math.prod(stage.grid) for stage in network.stages)
        scratch = exact.scratch_bytes + pairs * 36 * numbers
        times = parallel.share(network, channels) * n * m / pairs
        return replace(exact * times, scratch_bytes=scratch)

    def _rounds(self, image: Array) -> bool:
        """Whether tangent kernels in the dtype of the images are off where patches are parallel (K13)."""
        return bool(self.tangent) and image.dtype == np.float32

    def _correct(self, values: Array, a: Prepared, b: Prepared) -> None:
        """Compute in float64 what in a block (n, m) of the tangent kernel is off for parallel patches: all entries of
        one sample with itself, where they are parallel at different positions too, and some of other pairs."""
        image_a, image_b = a.arrays["image"], b.arrays["image"]
        xp = namespace(image_a)
        off = to_host(self.too_parallel(a, b))
        same = same_rows(a, b)
        off[same] = False
        if a is b:
            off = np.triu(off)
        for (i, j), one in ((same, True), (np.nonzero(off), False)):
            found = self._in_float64(image_a, i, image_b, j, one)
            at = xp.asarray(i), xp.asarray(j)
            values[at] = found
            if a is b:
                values[at[::-1]] = found

    def _in_float64(self, image_a: Array, i: np.ndarray, image_b: Array, j: np.ndarray, same: bool) -> Array:
        """The tangent kernel (pairs,) of images i of one side with images j of the other, computed in float64, in
        their dtype; same: they are the same samples, each once.

        Images are prepared a few at a time, but few times: of flat ones many pairs are asked for.
        """
        xp = namespace(image_a)
        kernel = self._with(True)
        result = xp.empty(len(i), image_a.dtype)
        step = _PAIRS_AT_ONCE if xp is np else _PAIRS_ON_DEVICE

        def pieces(index: np.ndarray) -> list[np.ndarray]:
            return [index[start : start + step] for start in range(0, len(index), step)]

        def prepared(images: Array, chosen: np.ndarray) -> Prepared:
            return kernel.prepare(images[xp.asarray(chosen)].astype(np.float64))

        # The path that is asked for may not take float64: that of CUDA never does.
        with path_told("" if asked() == "general" else "auto"):
            for rows in pieces(np.unique(i)):
                first, here = prepared(image_a, rows), np.flatnonzero(np.isin(i, rows))
                for columns in [rows] if same else pieces(np.unique(j[here])):
                    second = first if same else prepared(image_b, columns)
                    for pairs in pieces(here if same else here[np.isin(j[here], columns)]):
                        left = first.take(np.searchsorted(rows, i[pairs]))
                        right = left if same else second.take(np.searchsorted(columns, j[pairs]))
                        result[xp.asarray(pairs)] = kernel.paired(left, right, same)[0]
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
    revision: ClassVar[int] = 3

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
        network, image = self._checked(a, b)
        return choose(network, self.tangent, image).pair(network, self.tangent, a, b, same_rows(a, b))

    def paired(self, a: Prepared, b: Prepared, same: bool) -> Array:
        network, image = self._checked(a, b)
        return choose(network, self.tangent, image).paired(network, self.tangent, a, b, same)

    def too_parallel(self, a: Prepared, b: Prepared) -> Array:
        network, _ = self._checked(a, b)
        return parallel.too_parallel(network, a, b)

    def _checked(self, a: Prepared, b: Prepared) -> tuple[Network, Array]:
        """The network on the images of two blocks, and those of the first.

        Raises:
            KernelError: the blocks do not match, or were prepared for another kernel.
        """
        image, _ = self._images(a, b)
        network = self.network(image.shape[1:])
        for part in (a, b):
            self._check_preparation(part)
            _check_norms(network, part)
        return network, image

    def path(self, a: Prepared) -> str:
        image = a.arrays["image"]
        return choose(self.network(image.shape[1:]), self.tangent, image).name(image)

    def remark(self, a: Prepared) -> str:
        image = a.arrays["image"]
        return why_general(self.network(image.shape[1:]), self.tangent, image)

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """As ``Kernel.cost``, of the general path; scratch memory is a bound for the compiled one as well."""
        cost = self.block_cost(n, m, shape, itemsize)
        if self.tangent and itemsize == 4:
            cost = (
                cost + parallel.cost(self.network(shape), n, m, shape[2]) + self._correction_cost(n, m, shape)
            )
        return cost

    def block_cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """As ``cost``, of ``block``."""
        self.check(shape)
        dtype = np.dtype(np.float32 if itemsize == 4 else np.float64)
        network = self.network(shape)
        cost = engine(network, self.tangent, np, dtype, shape[2]).cost(n, m)
        if asked() != "general":
            compiled = native.scratch_bytes(network, self.tangent, n, m, shape[2], dtype)
            cost = replace(cost, scratch_bytes=max(cost.scratch_bytes, compiled))
        return cost


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
