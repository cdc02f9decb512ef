"""Convolutional kernels that every path must compute alike, and the images to compute them on.

The models of the published tables at their own sizes, and one of everything else: pooling kinds and modes, patch
sizes, depths, scalar functions, floors.
"""

from __future__ import annotations

import numpy as np
import reference

from kernels.base import KernelError, Prepared
from kernels.convolutional import Convolutional, Layer

EXP = {"kernel": "exponential", "sigma": 0.6}
RELU = {"kernel": "relu"}
POLY2 = {"kernel": "polynomial", "degree": 2}
POLY3 = {"kernel": "polynomial", "degree": 3}
POLY4 = {"kernel": "polynomial", "degree": 4}
POLY5 = {"kernel": "polynomial", "degree": 5}
LINEAR = {"kernel": "linear"}
SQUARE = {"kernel": "square"}


def network(kernels, subsampling, pooling="gaussian", mode="reference", tangent=False, patch=3, **options):
    """One layer for each pair of a scalar function and a subsampling."""
    layers = (
        Layer(**{"patch": patch, **kernel, "pooling": pooling, "subsampling": t, **options})
        for kernel, t in zip(kernels, subsampling, strict=True)
    )
    return Convolutional(tuple(layers), tangent, mode)


def gap(kernel, depth, tangent=False, mode="reference", **options):
    """``depth`` layers without pooling, then the mean over all pairs of positions (C10)."""
    hidden = (Layer(**{"patch": 3, **kernel, "pooling": "average", **options}) for _ in range(depth - 1))
    return Convolutional((*hidden, Layer(3, **kernel, pooling="global")), tangent, mode)


# The tables of CIFAR-10 (R13, R14).
PUBLISHED = {
    "exp/exp 2-5": network([EXP, EXP], (2, 5)),
    "exp/poly3 2-5": network([EXP, POLY3], (2, 5)),
    "exp/poly2 2-5": network([EXP, POLY2], (2, 5)),
    "exp/poly4 2-5": network([EXP, POLY4], (2, 5)),
    "poly2/exp 2-5": network([POLY2, EXP], (2, 5)),
    "poly2/poly2 2-5": network([POLY2, POLY2], (2, 5)),
    "exp/linear 2-5": network([EXP, LINEAR], (2, 5)),
    "relu RF 2-5": network([RELU, RELU], (2, 5)),
    "relu NTK 2-5": network([RELU, RELU], (2, 5), tangent=True),
    "exp 2-2-2": network([EXP, EXP, EXP], (2, 2, 2)),
}

# Those of the golden values (G4) and their like: every pooling, in every mode.
POOLED = {
    f"{name}, {pooling}, {mode}": network(kernels, (2, 1), pooling, mode, tangent)
    for mode in ("reference", "same", "periodic")
    for pooling in ("gaussian", "average", "strided")
    for name, kernels, tangent in (
        ("exp/exp", [EXP, EXP], False),
        ("relu both", [RELU, RELU], "both"),
        ("exp/poly2", [EXP, POLY2], False),
        ("poly2/linear", [POLY2, LINEAR], False),
    )
}

OTHERS = {
    "one layer, exp": network([EXP], (2,)),
    "one layer, relu both, strided": network([RELU], (1,), "strided", "same", "both"),
    "one layer, relu both, 5": network([RELU], (5,), tangent="both"),
    "three layers, relu both": network([RELU] * 3, (2, 1, 1), tangent="both"),
    "four layers, average": network([RELU, EXP, POLY3, RELU], (1, 2, 1, 2), "average"),
    "four layers, relu NTK, same": network([RELU] * 4, (2, 1, 2, 1), "gaussian", "same", True),
    "no pooling, relu both": network([RELU, RELU], (1, 1), "average", tangent="both"),
    "no pooling, exp x 3": network([EXP] * 3, (1, 1, 1), "average"),
    "GAP, relu both, 2": gap(RELU, 2, "both"),
    "GAP, relu NTK, 5": gap(RELU, 5, True),
    "GAP, relu NTK, 3, periodic": gap(RELU, 3, True, "periodic"),
    "GAP, exp, 2": gap(EXP, 2),
    "GAP, relu both, patches 2 and 1, periodic": Convolutional(
        (Layer(2, **RELU, pooling="average"), Layer(1, **RELU, pooling="global")), "both", "periodic"
    ),
    "GAP after pooling": Convolutional(
        (
            Layer(3, **RELU, subsampling=2),
            Layer(3, **RELU, pooling="average"),
            Layer(3, **RELU, pooling="global"),
        ),
        "both",
    ),
    "even patches": Convolutional((Layer(2, **EXP, poolfactor=2), Layer(4, **EXP, poolfactor=3))),
    "patches 1 and 5": Convolutional((Layer(1, **RELU, subsampling=2), Layer(5, **EXP, poolfactor=2))),
    "patch_norm": network([RELU, RELU], (2, 1), tangent="both", patch_norm=True),
    "patch_norm, exp": network([EXP, POLY3], (2, 1), patch_norm=True),
    "high floor": network([EXP, RELU], (2, 1), floor=0.5),
    "square/linear": network([SQUARE, {"kernel": "linear", "scale": 0.5}], (2, 1)),
    "linear/exp": network([{"kernel": "linear", "scale": 2.0}, EXP], (2, 1)),
    "poly5/square": network([POLY5, SQUARE], (2, 1)),
    "wide pooling": network([EXP, EXP], (2, 2), mode="same", poolfactor=5),
    "stride 3, average 2": network([RELU, RELU], (3, 1), "average", tangent="both", poolfactor=2),
    "high floor, relu both": network([RELU, RELU], (2, 1), tangent="both", floor=2.0),
}

MODELS = {**PUBLISHED, **POOLED, **OTHERS}

SIZES = ((8, 8), (13, 13), (28, 28), (32, 32), (31, 20))
CHANNELS = (1, 2, 3, 5)


def flat_images(n: int, side: int) -> np.ndarray:
    """Images (n, side, side, 3) of one colour but for a small part: most patches of an image are equal, and those of
    one channel parallel in all images."""
    rng = np.random.default_rng(4)
    X = np.broadcast_to(rng.random((n, 1, 1, 3)), (n, side, side, 3)).copy()
    X[:, 3:8, 3:6] = rng.random((n, 5, 3, 3))
    return X


def images_of_one_colour(n: int, side: int) -> np.ndarray:
    """Images (n, side, side, 3) of one colour, more or less bright, but for a small part: most patches of all images
    are parallel."""
    rng = np.random.default_rng(5)
    X = rng.random((n, 1, 1, 1)) * rng.random(3) + np.zeros((n, side, side, 3))
    X[:, 3:8, 3:6] = rng.random((n, 5, 3, 3))
    return X


def admissible(kernel: Convolutional, shape: tuple[int, int, int]) -> bool:
    """Whether the kernel takes images of ``shape`` (h, w, c)."""
    try:
        kernel.check(shape)
    except KernelError:
        return False
    return True


def check_below_the_floor(kernel: Convolutional, a: Prepared, K: np.ndarray) -> None:
    """Blocks K (2, n, n) of the random-feature and the tangent kernel, some of whose patch norms are below the floor,
    against plain loops."""
    X, layers = a.arrays["image"], [layer.describe() for layer in kernel.layers]
    norms = [norm for name, norm in a.arrays.items() if name != "image"]
    floor = kernel.layers[0].floor
    assert min(norm.min() for norm in norms) < floor < norms[0].max()
    for found, tangent in zip(K, (False, True), strict=True):
        for i, j in ((0, 0), (0, 1), (2, 1)):
            wanted = reference.convolutional(X[i], X[j], layers, tangent, same=i == j)
            np.testing.assert_allclose(found[i, j], wanted, rtol=1e-10)


def images(n: int, shape: tuple[int, int, int], seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    """(n, h, w, c) images with what trips fast code up: noise beside flat ground, a patch of zeros, one image that
    is nearly another."""
    rng = np.random.default_rng(seed)
    h, w, c = shape
    i, j = np.mgrid[:h, :w]
    X = 0.5 + 0.4 * np.sin(0.35 * i[..., None] + 0.5 * j[..., None] + np.arange(c))
    X = X + 0.3 * rng.standard_normal((n, h, w, c))
    X[:, : h // 3, : w // 3] = 0
    X[:, -(h // 4) :] = X[:, -1:, :1]
    if n > 2:
        X[2] = X[0] + 1e-3 * rng.standard_normal((h, w, c))
    return X.astype(dtype)


def busy_images(n: int, shape: tuple[int, int, int], seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    """(n, h, w, c) images of which no two patches are parallel, but for a corner of zeros: where cosines of different
    patches come near 1, each path in float32 is right to 1e-4 only (K13)."""
    X = images(n, shape, seed) + 0.4 * np.random.default_rng(seed + 1).standard_normal((n, *shape))
    X[:, : shape[0] // 3, : shape[1] // 3] = 0
    return X.astype(dtype)
