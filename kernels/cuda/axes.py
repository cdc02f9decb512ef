"""What fused code wants to know of the pooling of one axis: a stride and one row of taps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """Output o of an axis is the sum of taps[n] times input stride * o + first + n.

    begin, end: the inputs that some output has a tap for; beyond the border where the axis is periodic, where
    inputs are meant modulo their number.
    """

    inputs: int
    outputs: int
    stride: int
    first: int
    taps: tuple[float, ...]
    begin: int
    end: int

    @property
    def last(self) -> int:
        return self.first + len(self.taps) - 1

    @property
    def kept(self) -> int:
        """How many outputs have met an input and still wait for another, at most."""
        return -(-(len(self.taps) - 1) // self.stride)

    def window(self, outputs: int) -> int:
        """How many inputs so many neighbouring outputs reach."""
        return self.stride * (outputs - 1) + len(self.taps)


def pooled(H: np.ndarray, stride: int, periodic: bool) -> Axis:
    """The axis that the matrix H (outputs, inputs) of ``pooling.pooling_matrix`` pools."""
    outputs, inputs = H.shape
    taps: dict[int, float] = {}
    for o, i in zip(*np.nonzero(H), strict=True):
        offset = int(i) - stride * int(o)
        taps[offset % inputs if periodic else offset] = float(H[o, i])
    offsets = sorted(taps)
    if periodic:
        # The window is what the largest gap between taps, around the circle, leaves.
        following = [*offsets[1:], offsets[0] + inputs]
        gaps = [after - offset for offset, after in zip(offsets, following, strict=True)]
        largest = int(np.argmax(gaps))
        first = offsets[(largest + 1) % len(offsets)]
        length = inputs - gaps[largest] + 1
        first -= inputs if first + length > inputs else 0
    else:
        first, length = offsets[0], offsets[-1] - offsets[0] + 1
    row = [taps.get((first + n) % inputs if periodic else first + n, 0.0) for n in range(length)]
    reach = stride * (outputs - 1) + first + length
    begin, end = (first, reach) if periodic else (0, min(inputs, reach))
    return Axis(inputs, outputs, stride, first, tuple(row), begin, end)


def unpooled(inputs: int) -> Axis:
    """The axis as it is."""
    return Axis(inputs, inputs, 1, 0, (1.0,), 0, inputs)
