"""On a GPU, fused code and the general path give the host's numbers; needs kernels/, NumPy and CuPy alone."""

from __future__ import annotations

import numpy as np
import pytest
from models import (
    CHANNELS,
    EXP,
    LINEAR,
    MODELS,
    POLY3,
    RELU,
    SIZES,
    SQUARE,
    admissible,
    busy_images,
    images,
    network,
)

from kernels import cuda, fused
from kernels.arrays import to_host, why_no_device
from kernels.base import Kernel
from kernels.convolutional import Convolutional
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.features.base import FeatureMap, InMemory
from kernels.features.ckn import NystromCKN
from kernels.features.convolutional_random import ConvolutionalRandom
from kernels.features.nystrom import NystromFeatures
from kernels.features.random import RandomFeatures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_no_device() is not None, reason=f"needs a GPU: {why_no_device()}"),
]

VECTORS: list[Kernel] = [
    DotProduct("exponential", sigma=0.6),
    DotProduct("polynomial", degree=3),
    DotProduct("arc-cosine", order=0),
    DotProduct("laplace"),
    FullyConnected("rf", depth=3),
    FullyConnected("both", depth=4),
    0.5 * FullyConnected("ntk", depth=2) + DotProduct("linear"),
]
MAPS: dict[str, FeatureMap] = {
    "anchors, exponential and relu": NystromCKN(network([EXP, RELU], (2, 1)), (24, 32), patches=500),
    "anchors, polynomial and square": NystromCKN(network([POLY3, SQUARE], (2, 1)), (24, 32), patches=500),
    "anchors, linear": NystromCKN(network([LINEAR, EXP], (2, 1)), (24, 32), patches=500),
    "random filters": ConvolutionalRandom(network([EXP, RELU], (2, 1)), (130, 200)),
    "random Fourier": RandomFeatures(DotProduct("exponential", sigma=0.6), 300),
    "landmarks": NystromFeatures(DotProduct("exponential", sigma=0.6), 8, epsilon=1e-2),
    "landmarks, ntk": NystromFeatures(FullyConnected("ntk", depth=3), 8, epsilon=1e-2),
    "random relu": RandomFeatures(FullyConnected("rf", depth=3), 300),
}
TOLERANCES = {np.float32: 2e-6, np.float64: 1e-10}


def cases():
    """Every model on images of every size; channels take turns."""
    return [
        pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}")
        for turn, name in enumerate(MODELS)
        for number, size in enumerate(SIZES)
        for shape in [(*size, CHANNELS[(turn + number) % len(CHANNELS)])]
        if admissible(MODELS[name], shape)
    ]


def check(kernel: Kernel, X: np.ndarray, dtype: type, path: str, tolerance: float) -> None:
    """A symmetric block, a block with some equal rows (K13) and a diagonal on the device, against the host in
    float64, relative to sqrt(K_ii K_jj)."""
    exact = kernel.prepare(X, pool="pool")
    whole = kernel.prepare(X.astype(dtype), pool="pool").on_device()
    part = kernel.prepare(X[1:3].astype(dtype), np.arange(1, 3), pool="pool").on_device()
    assert kernel.path(whole) == path
    wanted, diagonal = kernel.pair(exact, exact), kernel.diag(exact)
    scale = np.sqrt(np.abs(diagonal))
    symmetric = to_host(kernel.pair(whole, whole))
    np.testing.assert_array_equal(symmetric, np.swapaxes(symmetric, -1, -2))
    for found, columns in ((symmetric, slice(None)), (to_host(kernel.pair(whole, part)), slice(1, 3))):
        assert found.dtype == dtype
        assert np.isfinite(found).all()
        error = np.abs(found - wanted[..., columns])
        bound = scale[..., :, None] * scale[..., None, columns]
        assert (error <= tolerance * bound + np.finfo(dtype).tiny).all(), (error / bound).max()
    np.testing.assert_allclose(to_host(kernel.diag(whole)), diagonal, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kernel", VECTORS, ids=lambda kernel: str(kernel.describe())[:80])
def test_kernels_of_vectors(kernel, dtype):
    X = np.random.default_rng(0).normal(size=(9, 40))
    check(kernel, X, dtype, "cupy", 1e-5 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize(("name", "shape"), cases())
def test_fused_code(name, shape):
    check(MODELS[name], busy_images(4, shape), np.float32, "cuda", TOLERANCES[np.float32])


@pytest.mark.parametrize("name", MODELS)
def test_fused_code_on_awkward_images(name):
    """Flat ground, zeros, near copies: tangent kernels are right to 1e-4 there, the others as ever."""
    kernel = MODELS[name]
    for shape in ((13, 13, 1), (28, 28, 1), (32, 32, 3)):
        if admissible(kernel, shape):
            check(kernel, images(3, shape), np.float32, "cuda", 1e-4 if kernel.tangent else 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", MODELS)
def test_the_general_path(name, dtype, monkeypatch):
    monkeypatch.setenv(fused.VARIABLE, "general")
    for shape in ((13, 13, 2), (31, 20, 1)):
        if admissible(MODELS[name], shape):
            check(MODELS[name], busy_images(4, shape), dtype, "cupy", TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["exp/exp 2-5", "relu NTK 2-5", "GAP, relu NTK, 5"])
def test_the_same_blocks_give_the_same_bits(name, monkeypatch):
    kernel = MODELS[name]
    a = kernel.prepare(busy_images(24, (32, 32, 3), dtype=np.float32)).on_device()
    once, again = (to_host(kernel.pair(a, a)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    monkeypatch.setattr(cuda, "_MOST_PAIRS", 100)
    np.testing.assert_array_equal(to_host(kernel.pair(a, a)), once)
    # Cut otherwise, pairs stay what they were: each is computed by itself.
    np.testing.assert_allclose(to_host(kernel.pair(a[:7], a[7:])), once[:7, 7:], rtol=1e-6)
    np.testing.assert_allclose(to_host(kernel.pair(a[::2], a)), once[::2], rtol=1e-6)


@pytest.mark.parametrize(
    "kernel", [*VECTORS, *(MODELS[name] for name in ("exp/exp 2-5", "relu NTK 2-5"))], ids=str
)
def test_samples_are_prepared_on_the_device_too(kernel):
    import cupy

    shape = (28, 28, 1) if isinstance(kernel, Convolutional) else (40,)
    X = np.random.default_rng(1).normal(size=(6, *shape))
    host, device = kernel.prepare(X), kernel.prepare(cupy.asarray(X))
    assert host.arrays.keys() == device.arrays.keys()
    for name, values in host.arrays.items():
        np.testing.assert_allclose(to_host(device.arrays[name]), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", ["auto", "general"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", MAPS)
def test_feature_maps(name, dtype, path, monkeypatch):
    """Inner products of a map's features, with fused passes (float32, ``auto``) and without."""
    import cupy

    X = busy_images(8, (12, 13, 3))
    if MAPS[name].inputs == "vectors":
        X = X.reshape(8, -1)
    phi = MAPS[name].learn(InMemory(X))
    features = phi.features(X)
    monkeypatch.setenv(fused.VARIABLE, path)
    samples = cupy.asarray(X.astype(dtype))
    assert fused.runs_entrywise(samples) == (dtype is np.float32 and path == "auto")
    found = to_host(phi.features(samples))
    assert found.dtype == dtype
    K = features @ features.T
    scale = np.sqrt(np.outer(K.diagonal(), K.diagonal()))
    error = np.abs(found.astype(np.float64) @ found.T.astype(np.float64) - K) / scale
    assert error.max() <= (1e-5 if dtype is np.float32 else 1e-10)
