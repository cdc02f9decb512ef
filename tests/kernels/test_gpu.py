"""The general path on a GPU gives the host's numbers; needs kernels/, NumPy and CuPy alone."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.arrays import to_host, why_no_device
from kernels.base import Kernel
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_no_device() is not None, reason=f"needs a GPU: {why_no_device()}"),
]

RELU = (Layer(patch=3, kernel="relu", subsampling=2), Layer(patch=3, kernel="relu", subsampling=2))
EXPONENTIAL = (
    Layer(patch=3, kernel="exponential", sigma=0.6, subsampling=2),
    Layer(patch=3, kernel="exponential", sigma=0.6, subsampling=2),
)
VECTORS: list[Kernel] = [
    DotProduct("exponential", sigma=0.6),
    DotProduct("polynomial", degree=3),
    DotProduct("arc-cosine", order=0),
    DotProduct("laplace"),
    FullyConnected("rf", depth=3),
    FullyConnected("both", depth=4),
    0.5 * FullyConnected("ntk", depth=2) + DotProduct("linear"),
]
IMAGES: list[Kernel] = [
    Convolutional(EXPONENTIAL),
    Convolutional(RELU, tangent="both"),
    Convolutional(RELU, tangent=True, pooling_mode="periodic"),
    Convolutional((Layer(patch=3, kernel="relu"), Layer(patch=3, kernel="relu", pooling="global"))),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", VECTORS + IMAGES, ids=lambda k: str(k.describe())[:80])
def test_the_device_gives_the_host_s_numbers(kernel, dtype):
    """Rectangular blocks, symmetric blocks with equal rows (K13) and diagonals."""
    rng = np.random.default_rng(0)
    shape = (40,) if kernel.inputs == "vectors" else (13, 11, 3)
    X = rng.normal(size=(9, *shape)).astype(dtype)
    a = kernel.prepare(X, pool="pool")
    b = kernel.prepare(X[:4], np.arange(2, 6), pool="pool")
    scale = np.sqrt(np.abs(kernel.diag(a)))
    tolerance = 2e-6 if dtype == np.float32 else 1e-10
    # Without equal rows a tangent kernel's float32 entries near the diagonal are right to 1e-4 only (K13).
    for left, right in ((a, b), (a, a)):
        device = kernel.pair(left.on_device(), right.on_device())
        assert kernel.path(left.on_device()) == "cupy"
        error = np.abs(to_host(device) - kernel.pair(left, right))
        bound = scale[..., :, None] * np.sqrt(np.abs(kernel.diag(right)))[..., None, :]
        assert (error <= tolerance * bound + np.finfo(dtype).tiny).all(), (error / bound).max()
    np.testing.assert_allclose(to_host(kernel.diag(a.on_device())), kernel.diag(a), rtol=1e-5)


@pytest.mark.parametrize("kernel", VECTORS + IMAGES, ids=lambda k: str(k.describe())[:80])
def test_samples_are_prepared_on_the_device_too(kernel):
    import cupy

    shape = (40,) if kernel.inputs == "vectors" else (13, 11, 3)
    X = np.random.default_rng(1).normal(size=(6, *shape))
    host, device = kernel.prepare(X), kernel.prepare(cupy.asarray(X))
    assert host.arrays.keys() == device.arrays.keys()
    for name, values in host.arrays.items():
        np.testing.assert_allclose(to_host(device.arrays[name]), values, rtol=1e-9, atol=1e-12)
