"""Compiled code for convolutional kernels on the host: optional, absent where it was not built.

The second images stand in the lanes of vectors. A first layer that pools, or is the last, goes by pairs of
rows and stays in the cache; several first layers that do not pool go by the displacement between the two
positions, which they leave as it is.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .. import explicit
from ..arrays import Array
from ..base import KernelError, Prepared
from ..network import Network, Support, Tangent
from ..support import half
from .library import Library, NotBuilt, Plan, load

_LARGEST_SCRATCH = 1 << 30
"""Bytes; one thread needs as much at most, for a block that fills the lanes."""

_GROUP_BYTES = 1 << 26
"""Images of each side are made ready in groups of as many bytes, but for the lanes at least."""

_POINTWISE = 10
"""Entry by entry, the scalar function and the pooling of a polynomial first layer are counted as so many
multiplications in a product of features."""


def name(image: Array) -> str:
    """``compiled`` and the instruction set."""
    return f"compiled {load().instruction_set}"


def obstacle(network: Network, tangent: Tangent, image: Array) -> str | None:
    """As ``fused.Path.obstacle``: no library, or scratch arrays of more than a gigabyte.

    Raises:
        KernelError: ``MEGAGRAM_INSTRUCTION_SET`` is misspelt, or names what this processor lacks.
    """
    return _obstacle(network, tangent, image.shape[3], np.dtype(image.dtype))


def scratch_bytes(
    network: Network, tangent: Tangent, n: int, m: int, channels: int, dtype: np.dtype | str | type
) -> int:
    """All memory in bytes, beside prepared blocks and the result, that ``pair`` takes for n x m images with so many
    channels; a bound, and 0 where this path does not take the network."""
    dtype = np.dtype(dtype)
    if _obstacle(network, tangent, channels, dtype) is not None:
        return 0
    return _Work(network, tangent, channels, dtype).scratch_bytes(n, m)


def _obstacle(network: Network, tangent: Tangent, channels: int, dtype: np.dtype) -> str | None:
    try:
        library = load()
    except NotBuilt as error:
        return str(error)
    try:
        work = _Work(network, tangent, channels, dtype)
        norms = _norm_plan(library, network, channels)
    except (KernelError, MemoryError) as error:
        return str(error) or "there is no memory for the compiled path"
    needed = max(work.scratch_bytes(work.lanes, work.lanes), norms.scratch_bytes)
    if needed > _LARGEST_SCRATCH:
        return f"the compiled path would need {needed / 2**30:.1f} GiB of scratch memory on each thread"
    return None


def pair(
    network: Network, tangent: Tangent, a: Prepared, b: Prepared, same: tuple[np.ndarray, np.ndarray]
) -> Array:
    """As ``fused.Path.pair``."""
    image = a.arrays["image"]
    work = _Work(network, tangent, image.shape[3], np.dtype(image.dtype))
    n, m = len(a), len(b)
    result = np.empty((work.outputs, n, m), image.dtype)
    if a is not b and -(-m // work.lanes) * n > -(-n // work.lanes) * m:
        # The side that fills the lanes better goes there.
        _fill(work, b, a, same[::-1], result.swapaxes(1, 2))
    else:
        _fill(work, a, b, same, result)
    if a is b:
        for i in range(n):
            result[:, i + 1 :, i] = result[:, i, i + 1 :]
    return result


def paired(network: Network, tangent: Tangent, a: Prepared, b: Prepared, same: bool) -> Array:
    """As ``fused.Path.paired``; each lane holds an image of both sides, so that no first image is broadcast."""
    image = a.arrays["image"]
    work = _Work(network, tangent, image.shape[3], np.dtype(image.dtype))
    result = np.empty((work.outputs, len(a)), image.dtype)
    for part, second in b.blocks(work.group):
        images = work.images(second)
        values = np.empty((work.outputs, len(second)), image.dtype)
        work.plan.paired(images if a is b else work.images(a[part]), images, same, values)
        result[:, part] = values
    return result


def patch_norms(network: Network, images: Array) -> list[Array]:
    """As ``fused.Path.patch_norms``; computed in float64."""
    norms = [np.empty((len(images), h * w), images.dtype) for _, (h, w), *_ in network.stages]
    if len(images):
        plan = _norm_plan(load(), network, images.shape[3])
        plan.patch_norms(np.ascontiguousarray(images), norms)
    return norms


class _Work:
    """What is left to the compiled code: where a first layer is written out in features, these are the images of the
    layers after it.

    lanes: how many second images go together; group: how many images to make ready at a time.
    """

    def __init__(self, network: Network, tangent: Tangent, channels: int, dtype: np.dtype) -> None:
        self._network, self._channels = network, channels
        self._itemsize = dtype.itemsize
        self._explicit = explicit.pays(network, channels, channels + _POINTWISE)
        rest, features = network, channels
        if self._explicit:
            rest, features = _without_first_layer(network), explicit.count(network.stages[0].layer, channels)
        library = load()
        self.plan = _plan(library, rest, tangent, features, dtype)
        self.outputs = 1 + (tangent == "both")
        self.lanes = library.lanes(dtype)
        grids = [math.prod(stage.grid) for stage in rest.stages]
        self._image_bytes = (grids[0] * features + sum(grids)) * dtype.itemsize
        self.group = max(self.lanes, _GROUP_BYTES // self._image_bytes)

    def images(self, part: Prepared) -> list[np.ndarray]:
        """Images and then patch norms in each layer that is left, C-contiguous."""
        image = part.arrays["image"]
        stages = self._network.stages
        norms = [part.arrays[f"norm{number}"] for number in range(1, len(stages) + 1)]
        if self._explicit:
            image = explicit.features(image, norms[0], stages[0], self._network.periodic)
            image = image.reshape(len(part), *stages[1].grid, -1)
            norms = norms[1:]
        return [np.ascontiguousarray(array) for array in (image, *norms)]

    def scratch_bytes(self, n: int, m: int) -> int:
        """Of ``pair``, n x m images."""
        first, second = min(n, self.group), min(m, self.group)
        sides = (first + second) * self._image_bytes
        if self._explicit:
            stage = self._network.stages[0]
            sides += explicit.scratch_bytes(stage, max(first, second), self._channels, self._itemsize)
        values = self.outputs * max(first, second) * self.lanes * self._itemsize
        # For each image of a side the place of its like on the other, and what a part of that takes meanwhile.
        places = 32 * max(n, m)
        return self.plan.scratch_bytes + sides + values + places


def _fill(
    work: _Work, a: Prepared, b: Prepared, same: tuple[np.ndarray, np.ndarray], result: np.ndarray
) -> None:
    """Fill ``result`` (outputs, n, m), with second images of ``b``; the upper triangle where ``b is a``."""
    match = np.full(len(a), -1)
    match[same[0]] = same[1]

    def fill(rows: slice, columns: slice, second: list[np.ndarray]) -> None:
        first = second if a is b and rows == columns else work.images(a[rows])
        for start in range(columns.start, columns.stop, work.lanes):
            stop = min(start + work.lanes, columns.stop)
            part = slice(rows.start, min(rows.stop, stop) if a is b else rows.stop)
            inside = (match[part] >= start) & (match[part] < stop)
            values = np.empty((work.outputs, part.stop - part.start, stop - start), result.dtype)
            work.plan.pairs(
                [array[: part.stop - part.start] for array in first],
                [array[start - columns.start : stop - columns.start] for array in second],
                np.where(inside, match[part] - start, -1),
                values,
            )
            result[:, part, start:stop] = values

    def fill_columns(columns: slice, part: Prepared) -> None:
        second = work.images(part)
        for start in range(0, columns.stop if a is b else len(a), work.group):
            fill(slice(start, min(start + work.group, len(a))), columns, second)

    for columns, part in b.blocks(work.group):
        fill_columns(columns, part)


@lru_cache(maxsize=64)
def _without_first_layer(network: Network) -> Network:
    return Network(network.stages[1:], network.periodic)


@lru_cache(maxsize=64)
def _plan(library: Library, network: Network, tangent: Tangent, channels: int, dtype: np.dtype) -> Plan:
    return Plan(library, network, network.support, tangent, channels, dtype)


@lru_cache(maxsize=64)
def _norm_plan(library: Library, network: Network, channels: int) -> Plan:
    """The plan for patch norms: pairs that later norms need, and the positions themselves.

    The last norms need a position of the pooled grid with itself: to that, a pair of positions before the pooling and
    its mirror image give the same.
    """
    last = (np.zeros((n, n), bool) for n in network.stages[-1].grid)
    supports = [
        Support(*(mask | np.eye(len(mask), dtype=bool) for mask in support))
        for support in (*network.norm_support, last)
    ]
    before_last = len(supports) - 2
    if before_last >= 0:
        rows, columns = supports[before_last]
        supports[before_last] = Support(half(rows, network.periodic), columns)
    return Plan(library, network, supports, False, channels, np.dtype(np.float64), halved=[before_last])
