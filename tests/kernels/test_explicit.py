"""First layers by explicit features: the same kernel from products of monomials (K6)."""

from __future__ import annotations

import math

import models
import numpy as np
import pytest

from kernels import explicit, general
from kernels.convolutional import Convolutional, Layer
from kernels.patches import extract_patches

KERNELS = [models.LINEAR | {"scale": 2.0}, models.SQUARE, models.POLY2, models.POLY3, models.POLY4]


@pytest.mark.parametrize("floor", [1e-6, 0.5])
@pytest.mark.parametrize("mode", ["reference", "same", "periodic"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_features_are_the_pooled_kernel(kernel: dict, mode: str, floor: float) -> None:
    """C3 and C4 written out on all pairs of positions; norms below the floor by K2, patches of zeros give 0."""
    layer = Layer(2, **kernel, subsampling=2, floor=floor, patch_norm=True)
    X = models.images(3, (7, 8, 2))
    stage = Convolutional((layer,), pooling_mode=mode).network(X.shape[1:]).stages[0]
    patches = extract_patches(X, 2, mode == "periodic").reshape(3, 56, -1) / 2
    norm = np.linalg.norm(patches, axis=2)
    features = explicit.features(X, norm, stage, mode == "periodic")
    K = np.einsum("auf,bvf->aubv", patches, patches)
    if layer.kernel == "square":
        K = K**2
    else:
        unit = 1 / np.maximum(norm, floor)
        cosines = K * unit[:, :, None, None] * unit
        K = norm[:, :, None, None] * norm * (layer.scale or 1) * cosines ** (layer.degree or 1)
    A = np.kron(stage.rows, stage.columns)
    expected = np.einsum("pu,aubv,qv->apbq", A, K, A)
    assert features.shape == (3, len(A), explicit.count(layer, 2))
    found = np.einsum("apf,bqf->apbq", features, features)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * expected.max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_monomial_is_there_once(kernel: dict) -> None:
    """As few features as there are monomials: their weights squared add up to the number of all products."""
    layer = Layer(2, **kernel)
    q, size = explicit.degree(layer), 4 * 3
    assert q is not None
    weights = explicit.monomial_weights(size, q)
    assert len(weights) == explicit.count(layer, 3) == math.comb(size + q - 1, q)
    assert (weights**2).sum() == pytest.approx(size**q)


def test_they_are_taken_where_they_are_cheaper() -> None:
    """378 monomials for poly2 in colour, but 98,280 for poly5; none for other functions or a single layer."""
    colour = (32, 32, 3)

    def taken(kernel: Convolutional, shape: tuple[int, int, int] = colour) -> bool:
        return explicit.pays(kernel.network(shape), shape[2])

    assert taken(models.MODELS["poly2/exp 2-5"])
    assert taken(models.MODELS["linear/exp"])
    assert taken(models.network([models.POLY3, models.EXP], (2, 5)), (28, 28, 1))
    assert not taken(models.network([models.POLY3, models.EXP], (2, 5)))
    assert not taken(models.MODELS["poly5/square"])
    assert not taken(models.MODELS["exp/poly2 2-5"])
    assert not taken(models.network([models.POLY2], (2,)))
    assert not taken(models.network([models.POLY2, models.EXP], (1, 1), "average"))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["poly2/exp 2-5", "poly2/poly2 2-5", "square/linear", "linear/exp"])
def test_kernels_do_not_depend_on_them(name: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features and without; blocks of an image with itself, where cosines are 1, included (K13)."""
    kernel = models.MODELS[name]
    X = models.images(5, (28, 28, 1), dtype=dtype)
    a, b = kernel.prepare(X), kernel.prepare(X[1:4], np.array([1, 2, 77]))
    network = kernel.network((28, 28, 1))
    same = (np.array([1, 2]), np.array([0, 1]))
    found = []
    for forced in (True, False):
        monkeypatch.setattr(explicit, "pays", lambda network, channels, forced=forced: forced)
        monkeypatch.setattr(general, "by_displacement", lambda *_: False)
        found.append([general.pair(network, False, a, b, same), general.paired(network, False, a, a, True)])
        K = general.pair(network, False, a, a, (np.arange(5), np.arange(5)))[0]
        np.testing.assert_array_equal(K, K.T)
        np.testing.assert_allclose(np.diag(K), found[-1][1][0], rtol=1e-12 if dtype == np.float64 else 2e-6)
    error = 1e-12 if dtype == np.float64 else 2e-6
    for explicitly, directly in zip(*found, strict=True):
        np.testing.assert_allclose(explicitly, directly, rtol=0, atol=error * np.abs(directly).max())
