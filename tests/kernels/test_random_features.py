"""Random features of kernels of vectors: they tend to the kernel at the rate they must (F1, F2, F6)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from contracts import KernelContract
from convergence import rate

from kernels.base import Kernel, KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.features.draws import phases, weights
from kernels.features.nystrom import NystromFeatures
from kernels.features.random import RandomFeatures
from kernels.groups import RotoTranslation
from kernels.registry import feature_map, from_description

KERNELS = {
    "RF_2": FullyConnected("rf", 2),
    "RF_3": FullyConnected("rf", 3),
    "RF_3 of directions": FullyConnected("rf", 3, normalize_inputs=True),
    "NTK_2": FullyConnected("ntk", 2),
    "NTK_2/2": FullyConnected("ntk", 2, normalized=True),
    "exponential": DotProduct("exponential", sigma=0.9),
    "kappa_0": DotProduct("arc-cosine", order=0),
    "kappa_1": DotProduct("arc-cosine", order=1),
}


def samples(n: int = 30, d: int = 4, seed: int = 0) -> np.ndarray:
    """Of norms over two decades."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * 10 ** rng.uniform(-1, 1, (n, 1))


class TestRandomFeaturesOfDepth3(KernelContract):
    kernel = RandomFeatures(FullyConnected("rf", 3), (40, 30), seed=3)
    different = RandomFeatures(FullyConnected("rf", 3), (40, 30), seed=4)
    shape = (5,)


class TestTangentFeatures(KernelContract):
    kernel = RandomFeatures(FullyConnected("ntk", 2), (30,))
    different = RandomFeatures(FullyConnected("ntk", 2), (31,))
    shape = (5,)


class TestFourierFeatures(KernelContract):
    kernel = RandomFeatures(DotProduct("exponential", sigma=0.6), (30,), orthogonal=True)
    different = RandomFeatures(DotProduct("exponential", sigma=0.6), (30,))
    shape = (5,)


class TestStepFeatures(KernelContract):
    kernel = RandomFeatures(DotProduct("arc-cosine", order=0), (30,))
    different = RandomFeatures(DotProduct("arc-cosine", order=1), (30,))
    shape = (5,)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith("RF_3") else name for name in KERNELS],
)
def test_error_falls_like_the_root_of_the_width(name: str, orthogonal: bool) -> None:
    """X8, F6: relF against m has slope -0.5 +- 0.15, known to two standard errors of as much. Of unit vectors: no
    few long ones decide it."""
    X = samples()
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    # Orthogonal weights of a second layer take a QR of as many rows as the first is wide.
    widths = [2**a for a in (range(5, 10) if name.startswith("RF_3") else range(6, 12))]
    kernel = KERNELS[name]
    slope, error = rate(lambda m, seed: RandomFeatures(kernel, m, seed, orthogonal), kernel, X, widths, 24)
    assert abs(slope + 0.5) <= 0.15
    assert 2 * error <= 0.15


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_the_mean_over_seeds_is_the_kernel(name: str, orthogonal: bool) -> None:
    """Unbiased, norms and all: the mean of 200 draws is within five of its own standard errors."""
    X = samples(5)
    X[4] = 0
    kernel = KERNELS[name]
    # Networks of two layers are unbiased in the last one alone.
    widths = (4096, 32) if name.startswith("RF_3") else (32,)
    repetitions = 20 if len(widths) == 2 else 200
    draws = np.array(
        [RandomFeatures(kernel, widths, seed, orthogonal).gram(X, X) for seed in range(repetitions)]
    )
    deviation = draws.std(axis=0, ddof=1) / math.sqrt(repetitions)
    allowance = 0.03 * np.abs(kernel.gram(X)) if len(widths) == 2 else 0
    assert np.all(np.abs(draws.mean(axis=0) - kernel.gram(X, X.copy())) <= 5 * deviation + allowance)
    assert np.all(draws[:, 4] == 0)


def test_relu_features_are_those_of_the_network_written_out() -> None:
    """F1 by loops: layers of sqrt(2/m) relu(W z)."""
    X = samples(4)
    phi = RandomFeatures(FullyConnected("rf", 3), (6, 5), seed=2)
    W, V = weights(2, ((6, 4), (5, 6)), False, np.dtype(np.float64), np)
    for x, found in zip(X, phi.features(X), strict=True):
        hidden = [math.sqrt(2 / 6) * max(0.0, sum(w * x)) for w in W]
        expected = [math.sqrt(2 / 5) * max(0.0, sum(v * hidden)) for v in V]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_tangent_features_are_the_gradient_written_out() -> None:
    """F2: [sqrt(2/m) relu(<w, x>); sqrt(2/m) 1{<w, x> >= 0} x]."""
    X = samples(4)
    phi = RandomFeatures(FullyConnected("ntk", 2), (6,), seed=2)
    (W,) = weights(2, ((6, 4),), False, np.dtype(np.float64), np)
    assert phi.width((4,)) == 6 * 5
    for x, found in zip(X, phi.features(X), strict=True):
        relu = [math.sqrt(1 / 3) * max(0.0, w @ x) for w in W]
        steps = [math.sqrt(1 / 3) * (w @ x >= 0) * x for w in W]
        np.testing.assert_allclose(found, np.concatenate([relu, *steps]), rtol=1e-12, atol=1e-14)


def test_exponential_features_below_the_floor() -> None:
    """K2: short vectors have cosines of less than 1 with themselves; their features make up for it."""
    kernel = DotProduct("exponential", sigma=0.8, floor=2.0)
    X = np.random.default_rng(0).standard_normal((20, 4)) / 3
    assert np.linalg.norm(X, axis=1).max() < 2
    K = kernel.gram(X, X.copy())
    found = RandomFeatures(kernel, 20_000).gram(X)
    assert np.linalg.norm(found - K) <= 0.02 * np.linalg.norm(K)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_weights_are_nested(orthogonal: bool) -> None:
    """Fewer features have the first weights of more, so that errors at growing widths are of one draw."""
    dtype = np.dtype(np.float64)
    few, many = (weights(5, ((m, 7),), orthogonal, dtype, np)[0] for m in (10, 500))
    np.testing.assert_allclose(few, many[:10], rtol=0, atol=0 if not orthogonal else 1e-12)
    like = np.empty(0)
    np.testing.assert_array_equal(phases(5, 0, (10, 7), like), phases(5, 0, (500, 7), like)[:10])


def test_weights_depend_on_seed_layer_and_input_size() -> None:
    """No two draws share numbers."""
    dtype = np.dtype(np.float64)
    first, second = weights(5, ((8, 8), (8, 8)), False, dtype, np)
    other, wider = weights(6, ((8, 8),), False, dtype, np)[0], weights(5, ((8, 9),), False, dtype, np)[0]
    numbers = np.concatenate([first, second, other, wider], axis=None)
    assert len(np.unique(numbers)) == len(numbers)


def test_large_draws_are_those_of_one_stream() -> None:
    """Drawing in pieces changes nothing: float32 weights are the float64 ones rounded."""
    shapes = ((3000, 500),)
    single, double = (weights(1, shapes, False, np.dtype(d), np)[0] for d in (np.float32, np.float64))
    np.testing.assert_array_equal(single, double.astype(np.float32))
    assert abs(double.mean()) < 5 / math.sqrt(double.size)
    assert double.std() == pytest.approx(1, abs=5 / math.sqrt(2 * double.size))


def test_orthogonal_weights() -> None:
    """Rows of a block are orthogonal; their lengths are those of Gaussian vectors, not all the same."""
    d, m = 6, 6000
    (W,) = weights(0, ((m, d),), True, np.dtype(np.float64), np)
    for block in W.reshape(-1, d, d):
        gram = block @ block.T
        assert np.abs(gram - np.diag(np.diag(gram))).max() <= 1e-12
    squares = (W**2).sum(axis=1)
    assert squares.mean() == pytest.approx(d, abs=5 * math.sqrt(2 * d / m))
    assert squares.var() == pytest.approx(2 * d, rel=0.15)
    # Uniform directions: all coordinates have mean 0 and variance 1, the last of QR included.
    assert np.abs(W.mean(axis=0)).max() <= 5 / math.sqrt(m)
    np.testing.assert_allclose((W**2).mean(axis=0), 1, atol=5 * math.sqrt(2 / m))


def test_orthogonal_weights_have_less_variance() -> None:
    """Yu et al. 2016: clearly so for a Gaussian kernel as wide as the data."""
    X = np.random.default_rng(0).standard_normal((25, 16))
    kernel = DotProduct("exponential", sigma=1.5)
    K = kernel.gram(X)

    def error(orthogonal: bool) -> float:
        made = (RandomFeatures(kernel, 64, seed, orthogonal).gram(X) for seed in range(40))
        return float(np.mean([np.linalg.norm(one - K) ** 2 for one in made]))

    assert error(True) < 0.8 * error(False)


@pytest.mark.parametrize("name", KERNELS)
def test_features_keep_dtype_and_do_not_depend_on_the_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work in blocks of rows changes nothing; float32 features are the float64 ones to rounding."""
    X = samples(50).astype(np.float32)
    phi = RandomFeatures(KERNELS[name], 32)
    whole = phi.features(X)
    assert whole.dtype == np.float32
    assert whole.shape == (50, phi.width((4,)))
    monkeypatch.setattr("kernels.features.random._ROWS", 7)
    np.testing.assert_allclose(phi.features(X), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(phi.features(X.astype(np.float64)), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (DotProduct("polynomial", degree=2), "'monomials'"),
        (DotProduct("linear"), "'monomials'"),
        (DotProduct("laplace"), "'nystrom'"),
        (FullyConnected("ntk", 3), "'nystrom'"),
        (FullyConnected("rf", 2, bias=True), "'nystrom'"),
        (FullyConnected("both", 2), "'nystrom'"),
        (2 * FullyConnected("rf", 2), "'nystrom'"),
        (Convolutional((Layer(3, "relu"),)), "'convolutional-random'"),
    ],
)
def test_other_kernels_are_refused_with_a_map_that_takes_them(kernel: Kernel, named: str) -> None:
    with pytest.raises(KernelError, match=f"^kernel must.*{named}"):
        RandomFeatures(kernel, 16)


def test_the_map_that_takes_any_kernel_is_named() -> None:
    """Protects advice that can be followed: Nystrom features stand for roto-translations, random ones do not."""
    kernel = RotoTranslation((Layer(3, "relu"),), final="rot", pooling_mode="same")
    with pytest.raises(KernelError, match=r"^kernel must .* take kind 'nystrom'"):
        RandomFeatures(kernel, 16)
    assert NystromFeatures(kernel, 4).width((5, 5, 1)) == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "features.widths is missing"),
        ({"widths": 0}, "features.widths must be a whole number of at least 1"),
        ({"widths": [8]}, "features.widths must be a whole number or a list of 2"),
        ({"widths": "8"}, "features.widths must be a whole number or"),
        ({"widths": [8, 2.5]}, "features.widths must be a whole number"),
        ({"widths": 8, "seed": -1}, "features.seed must be a whole number"),
        ({"widths": 8, "orthogonal": 1}, "features.orthogonal must be true or false"),
        ({"width": 8}, "features.width is not a key here: did you mean 'widths'"),
    ],
)
def test_a_table_with_a_mistake_is_refused(table: dict, message: str) -> None:
    """The message begins with the key's whole path."""
    with pytest.raises(KernelError, match=f"^{message}"):
        feature_map({"kind": "random", **table}, FullyConnected("rf", 3), seed=0)


def test_a_table_takes_the_seed_of_the_experiment() -> None:
    """Unless it has one of its own; one number is a width for every layer."""
    kernel = FullyConnected("rf", 3)
    made = feature_map({"kind": "random", "widths": 8}, kernel, seed=5)
    assert made == RandomFeatures(kernel, (8, 8), seed=5)
    assert (
        feature_map({"kind": "random", "widths": 8, "seed": 1}, kernel, seed=5).fingerprint
        != made.fingerprint
    )
    assert from_description(made.describe()) == made


def test_cost_counts_the_weights() -> None:
    """Operations are those of the products; scratch memory holds the weights of both layers."""
    phi = RandomFeatures(FullyConnected("rf", 3), (2048, 1024))
    cost = phi.feature_cost(100, (50,))
    products = 2 * 100 * (2048 * 50 + 1024 * 2048)
    assert products <= cost.operations <= 1.1 * products
    assert cost.scratch_bytes >= 4 * (2048 * 50 + 1024 * 2048)
