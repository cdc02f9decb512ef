"""Random features of convolutional kernels and of convolutional tangent kernels (F5, C7)."""

from __future__ import annotations

import math

import models
import numpy as np
import pytest
import reference
from contracts import KernelContract
from convergence import rate

from kernels.base import Kernel, KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.features.convolutional_random import ConvolutionalRandom
from kernels.features.draws import weights
from kernels.features.tangent import ConvolutionalTangentRandom
from kernels.registry import feature_map, from_description

LINEAR2 = {"kernel": "linear", "scale": 2.0}

MODELS = {
    f"{name}, {pooling}, {mode}": models.network(kernels, (2, 1), pooling, mode)
    for mode in ("reference", "same", "periodic")
    for pooling in ("gaussian", "average", "strided")
    for name, kernels in (
        ("relu/relu", [models.RELU, models.RELU]),
        ("exp/linear", [models.EXP, LINEAR2]),
    )
} | {
    "relu, global": models.gap(models.RELU, 2),
    "relu, patch norm": models.network([models.RELU, models.RELU], (2, 1), patch=2, patch_norm=True),
}
"""On images of 8 x 8 pixels."""


def layer_by_layer(x: np.ndarray, layers: list[dict], filters: list[np.ndarray], mode: str) -> np.ndarray:
    """(h', w', m) features of an image (h, w, c) with relu layers, position by position (F5, C2, C4)."""
    maps = x
    for layer, W in zip(layers, filters, strict=True):
        h, w, c = maps.shape
        size = layer["patch"]
        q = (size - 1) // 2
        out = np.zeros((h, w, len(W)))
        for i in range(h):
            for j in range(w):
                z = np.zeros((size, size, c))
                for d in range(size):
                    for e in range(size):
                        row, column = i + d - (size - 1 - q), j + e - (size - 1 - q)
                        if mode == "periodic":
                            z[d, e] = maps[row % h, column % w]
                        elif 0 <= row < h and 0 <= column < w:
                            z[d, e] = maps[row, column]
                out[i, j] = math.sqrt(2 / len(W)) * np.maximum(0, W @ z.ravel())
        t = layer["subsampling"]
        H, C = (reference.pooling_matrix(n, layer["pooling"], t, t, mode) for n in (h, w))
        maps = np.einsum("ai,bj,ijm->abm", H, C, out)
    return maps


class TestConvolutionalRandom(KernelContract):
    kernel = ConvolutionalRandom(MODELS["relu/relu, gaussian, reference"], (8, 6))
    different = ConvolutionalRandom(MODELS["relu/relu, gaussian, reference"], (8, 6), seed=1)
    shape = (8, 8, 2)


class TestConvolutionalRandomFourier(KernelContract):
    kernel = ConvolutionalRandom(MODELS["exp/linear, gaussian, same"], (8, 6))
    different = ConvolutionalRandom(MODELS["exp/linear, gaussian, same"], (8, 7))
    shape = (8, 8, 1)
    float32_error = 5e-6


class TestConvolutionalTangentRandom(KernelContract):
    kernel = ConvolutionalTangentRandom(models.network([models.RELU] * 2, (2, 1), tangent=True), (8, 6))
    different = ConvolutionalTangentRandom(
        models.network([models.RELU] * 2, (2, 1), tangent=True), (8, 6), seed=1
    )
    shape = (8, 8, 2)
    float32_error = 5e-6


@pytest.mark.parametrize("mode", ["reference", "same", "periodic"])
@pytest.mark.parametrize("pooling", ["gaussian", "average", "strided"])
def test_features_are_the_network_written_out(pooling: str, mode: str) -> None:
    """F5 position by position, on images that are not square; positions are concatenated row by row."""
    layers = [
        {"patch": 3, "pooling": pooling, "subsampling": 2},
        {"patch": 2, "pooling": pooling, "subsampling": 1},
    ]
    kernel = Convolutional(tuple(Layer(kernel="relu", **layer) for layer in layers), pooling_mode=mode)
    X = models.images(3, (8, 9, 2))
    phi = ConvolutionalRandom(kernel, (5, 4), seed=7)
    filters = weights(7, ((5, 9 * 2), (4, 4 * 5)), False, np.dtype(np.float64), np)
    for x, found in zip(X, phi.features(X), strict=True):
        expected = layer_by_layer(x, layers, list(filters), mode)
        assert found.shape == (phi.width((8, 9, 2)),) == (expected.size,)
        np.testing.assert_allclose(found, expected.ravel(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_wide_networks_come_near_the_kernel(name: str) -> None:
    """Every pooling and mode (C4, C5, C10), patch norms, and every function of layers that there is."""
    X = models.images(4, (8, 8, 1))
    K = MODELS[name].gram(X)
    found = np.mean([ConvolutionalRandom(MODELS[name], 512, seed).gram(X) for seed in range(6)], axis=0)
    assert np.linalg.norm(found - K) <= 0.1 * np.linalg.norm(K)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "tangent"), [(ConvolutionalRandom, False), (ConvolutionalTangentRandom, True)], ids=["F5", "X28"]
)
def test_error_falls_like_the_root_of_the_width(cls: type, tangent: bool) -> None:
    """F5: relF against the width of both layers has slope -0.5 +- 0.15; X28: products of inner products of random
    features come to the tangent kernel, C8, as fast."""
    kernel = models.network([models.RELU, models.RELU], (2, 1), tangent=tangent)
    X = np.random.default_rng(0).standard_normal((8, 8, 8, 1))
    slope, error = rate(lambda m, seed: cls(kernel, m, seed), kernel, X, [2**a for a in range(5, 11)], 32)
    assert abs(slope + 0.5) <= 0.15
    assert 2 * error <= 0.15


@pytest.mark.parametrize("mode", ["reference", "same", "periodic"])
@pytest.mark.parametrize("pooling", ["gaussian", "average"])
def test_tangent_products_are_those_of_the_tensors_formed(pooling: str, mode: str) -> None:
    """C7 with phi_0 ⊗ y written down, patches of it and its pooling included."""
    layers = (
        Layer(2, "relu", pooling=pooling, subsampling=2),
        Layer(2, "relu", pooling=pooling, patch_norm=True),
    )
    kernel = Convolutional(layers, True, mode)
    X = models.images(3, (6, 7, 1))
    found = ConvolutionalTangentRandom(kernel, (3, 2), seed=1)
    network = kernel.network((6, 7))
    filters = weights(1, ((3, 4), (2, 12)), False, np.dtype(np.float64), np)
    x = y = X
    for stage, W in zip(network.stages, filters, strict=True):
        x, y = (_patches(maps, stage.layer, mode) for maps in (x, y))
        product = x @ W.T
        phi_0, phi_1 = (math.sqrt(2 / len(W)) * f for f in (product > 0, np.maximum(0, product)))
        tensor = np.einsum("nijm,nijd->nijmd", phi_0, y).reshape(*y.shape[:3], -1)
        x, y = (
            np.einsum("ai,bj,nijf->nabf", stage.rows, stage.columns, maps)
            for maps in (phi_1, np.concatenate([tensor, phi_1], axis=3))
        )
    flat = y.reshape(3, -1)
    np.testing.assert_allclose(found.gram(X), flat @ flat.T, rtol=1e-12)


def _patches(maps: np.ndarray, layer: Layer, mode: str) -> np.ndarray:
    """(n, h, w, size * size * c) patches (C2), by padding."""
    size = layer.patch
    before = size - 1 - (size - 1) // 2
    around = (before, size - 1 - before)
    padding = [(0, 0), around, around, (0, 0)]
    padded = np.pad(maps, padding, mode="wrap" if mode == "periodic" else "constant")
    h, w = maps.shape[1:3]
    parts = [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return np.concatenate(parts, axis=3) / (size if layer.patch_norm else 1)


def test_images_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time gives what all together give; so do pairs of the tangent kernel."""
    X = models.images(5, (8, 8, 1))
    phi = ConvolutionalRandom(MODELS["relu/relu, gaussian, reference"], 16)
    tangent = TestConvolutionalTangentRandom.kernel
    whole, K = phi.features(X), tangent.gram(X)
    monkeypatch.setattr("kernels.features.convolutional_random._BLOCK_BYTES", 1)
    monkeypatch.setattr("kernels.features.tangent._BLOCK_BYTES", 1)
    np.testing.assert_allclose(phi.features(X), whole, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(tangent.gram(X), K, rtol=1e-12)


def test_patches_of_zeros_have_no_features() -> None:
    """K2 inside images: borders of zeros stay zero, and nothing is NaN."""
    X = models.images(2, (8, 8, 1))
    X[:, :, 4:] = 0
    for name in ("relu/relu, strided, same", "exp/linear, strided, same"):
        network = Convolutional(MODELS[name].layers[:1], pooling_mode="same")
        maps = ConvolutionalRandom(network, 8).features(X).reshape(2, 4, 4, 8)
        assert np.all(maps[:, :, 3] == 0)
        assert np.all(np.isfinite(maps))
        assert np.any(maps[:, :, 0] != 0)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (FullyConnected("rf", 2), "kernel must be convolutional.*'random'"),
        (models.network([models.RELU], (2,), tangent=True), "'convolutional-tangent-random'"),
        (models.network([models.EXP, models.POLY2], (2, 1)), r"layers\[1\] is polynomial.*'nystrom-ckn'"),
    ],
)
def test_other_kernels_are_refused(kernel: Kernel, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        feature_map({"kind": "convolutional-random", "widths": 8}, kernel, seed=0)


def test_descriptions() -> None:
    """From tables and back; the seed is part of the identity, and one width stands for all layers."""
    kernel = MODELS["relu/relu, gaussian, reference"]
    made = feature_map({"kind": "convolutional-random", "widths": [8, 8]}, kernel, seed=2)
    assert made == ConvolutionalRandom(kernel, 8, seed=2)
    assert made.fingerprint != ConvolutionalRandom(kernel, 8, seed=3).fingerprint
    with pytest.raises(KernelError, match=r"^kernel\.kernel must be convolutional with tangent"):
        from_description({"kind": "convolutional-tangent-random", "kernel": kernel.describe(), "widths": 8})
    with pytest.raises(KernelError, match=r"^kernel\.widths is missing"):
        from_description({"kind": "convolutional-tangent-random", "kernel": kernel.describe()})


def test_cost_counts_products_and_filters() -> None:
    """Operations of both layers; scratch memory of a block of images and of all filters, however many images."""
    phi = ConvolutionalRandom(models.network([models.RELU] * 2, (2, 5)), (64, 128))
    few, many = (phi.feature_cost(n, (32, 32, 3)) for n in (1000, 2000))
    products = 2000 * (1024 * 27 * 64 + 225 * 576 * 128)
    assert products <= few.operations <= 2 * products
    assert many.operations == 2 * few.operations
    assert many.scratch_bytes == few.scratch_bytes >= 4 * (27 * 64 + 576 * 128)
