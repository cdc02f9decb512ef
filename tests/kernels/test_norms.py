"""Patch norms by the band that they need (C6) against the whole self-Gram arrays."""

from __future__ import annotations

import math

import models
import numpy as np
import pytest

from kernels import displacements
from kernels.convolutional import Convolutional
from kernels.norms import patch_norms


def shifted(B: np.ndarray, axes: tuple[int, int], d: int, periodic: bool) -> np.ndarray:
    """B[u + d, v + d] along two axes, zero beyond the border."""
    if periodic:
        return np.roll(B, (-d, -d), axes)
    n = B.shape[axes[0]]
    pad = [(abs(d), abs(d)) if axis in axes else (0, 0) for axis in range(4)]
    inside = [slice(abs(d) + d, abs(d) + d + n) if axis in axes else slice(None) for axis in range(4)]
    return np.pad(B, pad)[tuple(inside)]


def patch_gram(B: np.ndarray, size: int, periodic: bool) -> np.ndarray:
    """C2 for arrays (h, w, h, w), offset by offset."""
    offsets = range(-(size - 1 - (size - 1) // 2), (size - 1) // 2 + 1)
    rows = sum(shifted(B, (0, 2), d, periodic) for d in offsets)
    return sum(shifted(rows, (1, 3), d, periodic) for d in offsets)


def kappa(layer, cosine: np.ndarray) -> np.ndarray:
    match layer.kernel:
        case "relu":
            u = np.clip(cosine, -1, 1)
            return (u * (np.pi - np.arccos(u)) + np.sqrt((1 - u) * (1 + u))) / np.pi
        case "exponential":
            return np.exp((cosine - 1) / layer.sigma**2)
        case "polynomial":
            return cosine**layer.degree
    return layer.scale * cosine


def from_self_gram(kernel: Convolutional, x: np.ndarray) -> list[np.ndarray]:
    """Norms of every layer of one image, from all pairs of its positions; nothing is left out."""
    periodic = kernel.pooling_mode == "periodic"
    B = np.einsum("ijc,kmc->ijkm", x, x)
    norms = []
    for layer, stage in zip(kernel.layers, kernel.network(x.shape).stages, strict=True):
        B = patch_gram(B, layer.patch, periodic) * (layer.patch**-2 if layer.patch_norm else 1)
        norm = np.sqrt(np.maximum(np.einsum("ijij->ij", B), 0))
        norms.append(norm.ravel())
        if layer.kernel == "square":
            M = B**2
        else:
            floored = np.maximum(norm, layer.floor)
            cosine = B / floored / floored[:, :, None, None]
            i, j = np.nonzero(norm > layer.floor)
            cosine[i, j, i, j] = 1
            M = norm * norm[:, :, None, None] * kappa(layer, cosine)
        B = np.einsum("ai,ijkm->ajkm", stage.rows, M)
        B = np.einsum("bj,ajkm->abkm", stage.columns, B)
        B = np.einsum("ck,abkm->abcm", stage.rows, B)
        B = np.einsum("dm,abcm->abcd", stage.columns, B)
    return norms


def check(kernel: Convolutional, shape: tuple[int, int, int]) -> None:
    X = models.images(3, shape, seed=sum(shape))
    X[1, :, : shape[1] // 2] = 0
    network = kernel.network(shape)
    found = patch_norms(network, X)
    for i, x in enumerate(X):
        for norm, expected in zip(found, from_self_gram(kernel, x), strict=True):
            np.testing.assert_allclose(norm[i], expected, rtol=0, atol=1e-12 * expected.max())


@pytest.mark.parametrize("shape", [(8, 8, 1), (13, 10, 2)])
@pytest.mark.parametrize("name", models.MODELS)
def test_band_equals_whole_self_gram(name: str, shape: tuple[int, int, int]) -> None:
    """C6: no displacement that a norm needs is left out, in any mode, and none is counted twice."""
    kernel = models.MODELS[name]
    if not models.admissible(kernel, shape):
        pytest.skip("the grid vanishes")
    check(kernel, shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
def test_band_equals_whole_self_gram_at_published_sizes(name: str) -> None:
    """The same at 32 x 32, and on images that are not square."""
    for shape in ((32, 32, 3), (31, 20, 1)):
        if models.admissible(models.MODELS[name], shape):
            check(models.MODELS[name], shape)


def test_blocks_of_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are taken many at a time: each has the norms that it has alone."""
    kernel, shape = models.MODELS["exp 2-2-2"], (24, 24, 2)
    network, X = kernel.network(shape), models.images(7, shape)
    together = patch_norms(network, X)
    monkeypatch.setattr(displacements, "_LEAST_BLOCK_BYTES", 1)
    monkeypatch.setattr(displacements, "block_bytes", lambda xp: 2 * 8 * math.prod(shape[:2]))
    for norm, alone in zip(together, patch_norms(network, X), strict=True):
        np.testing.assert_allclose(norm, alone, rtol=1e-14)


def test_norms_are_computed_in_double_precision() -> None:
    """float32 images get the float64 norms, rounded once: norms enter every pair of an image."""
    kernel, shape = models.MODELS["relu RF 2-5"], (28, 28, 1)
    X = models.images(2, shape, dtype=np.float32)
    single, double = (patch_norms(kernel.network(shape), x) for x in (X, X.astype(np.float64)))
    for norm, exact in zip(single, double, strict=True):
        assert norm.dtype == np.float32
        np.testing.assert_array_equal(norm, exact.astype(np.float32))


def test_an_image_of_zeros_has_norms_of_zero() -> None:
    """K2: no NaN where nothing is."""
    for kernel in (
        models.MODELS["exp/exp 2-5"],
        models.MODELS["relu RF 2-5"],
        models.MODELS["poly2/exp 2-5"],
    ):
        assert not np.concatenate(patch_norms(kernel.network((28, 28, 1)), np.zeros((1, 28, 28, 1))), 1).any()
