"""Inner products with anchors that are hard for a scalar function, and what it makes of them in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from models import EXP, POLY2, POLY3, POLY5, RELU, SQUARE
from numpy.typing import DTypeLike

from kernels import pointwise
from kernels.layers import Layer

FUNCTIONS = [EXP, {**EXP, "sigma": 0.15}, RELU, POLY2, POLY3, POLY5, SQUARE]

SHAPES = [(1, 1), (700, 3), (41, 100), (9, 256), (2, 1500)]


def name(function: dict[str, object]) -> str:
    return "-".join(map(str, function.values()))


class Case(NamedTuple):
    """B (n, m): multiplied by the factors before; after: (n,) the factors after, None for 1. wanted: (n, m) float64;
    largest: (n, 1) the value of a cosine of 1."""

    layer: Layer
    B: np.ndarray
    after: np.ndarray | None
    wanted: np.ndarray
    largest: np.ndarray


def case(function: dict[str, object], shape: tuple[int, int], dtype: DTypeLike) -> Case:
    """Rows of norm zero and below the floor, cosines of -1 and 1 and a rounding beyond."""
    rng = np.random.default_rng(0)
    layer = Layer(3, **function, floor=0.05)
    patches, anchors = (rng.standard_normal((count, 4)) for count in shape)
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    patches[1::5], patches[2::5], patches[3::5] = anchors[0], -anchors[0], 1.0001 * anchors[0]
    patches[4::10], patches[9::10] = 0, 0.01 * anchors[-1]
    norm = np.linalg.norm(patches, axis=1).astype(dtype)
    before, after = pointwise.factors(layer, norm, first=True)
    factor = 1 if before is None else before[:, None]
    B = ((1 + np.finfo(dtype).eps) * (patches * factor) @ anchors.T).astype(dtype)
    wanted, _ = pointwise.apply(layer, B.astype(np.float64), None, False, lambda _, shape: np.empty(shape))
    wanted *= 1 if after is None else after[:, None]
    largest = norm**2 if layer.kernel == "square" else norm
    return Case(layer, B, after, wanted, largest[:, None])
