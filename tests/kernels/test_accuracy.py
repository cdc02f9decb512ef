"""float32 against float64 on images of real things, on every path: error relative to sqrt(K_ii K_jj)."""

from __future__ import annotations

import models
import numpy as np
import pytest

from kernels import fused, native
from kernels.base import Kernel
from kernels.groups import RotoTranslation
from kernels.layers import Layer

BOUND = 1e-6
PATHS = ("general", "compiled")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(fused.VARIABLE, request.param)
    return request.param


def digits(n: int, factor: int) -> np.ndarray:
    """scikit-learn's digits, each pixel smoothly enlarged: grey pixels, flat ground and patches of zeros."""
    from sklearn.datasets import load_digits

    X = load_digits().images[:n] / 16
    at = (np.arange(8 * factor) + 0.5) / factor - 0.5
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))
    return np.einsum("ai,bj,nij->nab", weights, weights, X)[..., None]


def compare(kernel: Kernel, X: np.ndarray, path: str) -> None:
    """Entries, the diagonal by itself, and pairs of one sample in a block of two different halves."""
    single = X.astype(np.float32)
    double = single.astype(np.float64)
    for x in (single, double):
        if path == "compiled":
            network = kernel.network(x.shape[1:])  # type: ignore[attr-defined]
            reason = native.obstacle(network, kernel.tangent, x)  # type: ignore[attr-defined]
            if reason is not None:
                pytest.skip(reason)
    a, b = kernel.prepare(single), kernel.prepare(double)
    values, exact = kernel.pair(a, a), kernel.pair(b, b)
    scale = np.sqrt(np.diagonal(exact, axis1=-2, axis2=-1))
    scale = scale[..., :, None] * scale[..., None, :]
    assert (np.abs(values - exact) / scale).max() <= BOUND
    diagonal = np.diagonal(exact, axis1=-2, axis2=-1)
    assert (np.abs(kernel.diag(a) - diagonal) / diagonal).max() <= BOUND
    half = len(X) // 2
    assert (np.abs(kernel.pair(a[: half + 1], a[half:]) - exact[..., : half + 1, half:])).max() <= (
        BOUND * scale.max()
    )


@pytest.mark.parametrize("name", [*models.POOLED, "one layer, relu both, strided", "GAP, relu both, 2"])
def test_digits(name: str, path: str) -> None:
    """The models of the golden values and their like, tangent diagonals included (K13)."""
    compare(models.MODELS[name], digits(6, 1), path)


@pytest.mark.parametrize("name", models.PUBLISHED)
def test_enlarged_digits(name: str, path: str) -> None:
    """The published models, on images of 32 x 32 with many patches that are nearly alike."""
    compare(models.PUBLISHED[name], digits(4, 4), path)


def check_diagonals(kernel: Kernel, X: np.ndarray) -> None:
    """``diag``, and pairs of one sample in a block with itself and in one with others."""
    single = X.astype(np.float32)
    exact = kernel.diag(kernel.prepare(single.astype(np.float64)))
    a = kernel.prepare(single, pool="x")
    half = len(X) // 2
    found = [
        kernel.diag(a),
        np.diagonal(kernel.pair(a, a), axis1=-2, axis2=-1),
        np.diagonal(kernel.pair(a[half:], a), offset=half, axis1=-2, axis2=-1),
    ]
    for values in found:
        assert (np.abs(values / exact[..., len(X) - values.shape[-1] :] - 1)).max() <= BOUND


@pytest.mark.parametrize("name", ["relu NTK 2-5", "one layer, relu both, 5", "three layers, relu both"])
def test_tangent_diagonals_of_flat_images(name: str, path: str) -> None:
    """Protects K_ii where flat ground makes patches of one image equal at different positions: float32 made 5e-5 of
    that."""
    check_diagonals(models.MODELS[name], models.flat_images(4, 24))


@pytest.mark.parametrize(("final", "rotations"), [("rot", 4), ("rot", 8), ("rot+gap", 4), ("orbit", 8)])
def test_tangent_diagonals_under_turns(final: str, rotations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of kernels that turn images: an image turned has parallel patches as well."""
    monkeypatch.delenv(fused.VARIABLE, raising=False)
    last = "global" if final == "rot+gap" else "gaussian"
    layers = (Layer(3, "relu", pooling="gaussian"), Layer(3, "relu", pooling=last))
    check_diagonals(RotoTranslation(layers, final, rotations, True), models.flat_images(4, 12))


def test_one_kernel_has_the_same_bits_beside_its_tangent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects stores: tiles of the random-feature kernel come from passes with the tangent kernel or without it."""
    monkeypatch.setenv(fused.VARIABLE, "general")
    both = models.MODELS["three layers, relu both"]
    X = models.flat_images(4, 24).astype(np.float32)
    alone = both.outputs[0]
    a = alone.prepare(X, pool="x")
    np.testing.assert_array_equal(both.pair(a, a)[0], alone.pair(a, a))
    np.testing.assert_array_equal(both.diag(a)[0], alone.diag(a))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in models.MODELS if models.MODELS[name].tangent])
def test_tangent_diagonals_of_the_flattest_images(name: str, path: str, real_data) -> None:
    """Those of CIFAR-10 whose neighbouring pixels differ least."""
    from pipelines import datasets

    X = datasets.load("cifar10").train.X / 255.0
    rough = sum(np.abs(np.diff(X, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))
    check_diagonals(models.MODELS[name], X[np.argsort(rough)[:8]])


@pytest.mark.slow
@pytest.mark.parametrize("name", models.PUBLISHED)
@pytest.mark.parametrize("source", ["mnist", "cifar10", "cifar10, whitened"])
def test_published_data(source: str, name: str, path: str, real_data) -> None:
    """MNIST, and CIFAR-10 raw and whitened (R15)."""
    from pipelines import datasets
    from pipelines.preprocessing import whiten_patches

    pool = datasets.load(source.partition(",")[0])
    X = pool.train.X[:12] / 255.0
    compare(models.PUBLISHED[name], whiten_patches(X) if "whitened" in source else X, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.OTHERS)
def test_published_data_with_other_models(name: str, path: str, real_data) -> None:
    """Deep networks, every kind of pooling, strided and one-layer tangent kernels, on CIFAR-10."""
    from pipelines import datasets

    X = datasets.load("cifar10").train.X[:6] / 255.0
    compare(models.OTHERS[name], X, path)
