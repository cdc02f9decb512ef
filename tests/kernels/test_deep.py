"""Fully connected kernels: G2, G3, variants, and the facts of K8 to K13."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from contracts import KernelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import KernelError
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct

COSINES = np.array([-1, -0.5, 0, 0.3, 0.9, 1])
GOLDEN_RF = [
    [0, 0.318309886183790672, 0.493731090200371548, 0.604825720112944547],
    [0.108997781044229358, 0.374701498320752092, 0.528279387719837036, 0.627998626904348917],
    [0.318309886183790672, 0.493731090200371548, 0.604825720112944547, 0.680953533355736348],
    [0.482744283835487622, 0.597548485180468999, 0.675820854521664856, 0.732161916784790567],
    [0.909538398844672076, 0.917741144229242615, 0.924850895418363944, 0.931056846510213319],
    [1, 1, 1, 1],
]
GOLDEN_NTK = [
    [0, 0.318309886183790672, 0.685708636282942492, 1.06038810680258304],
    [-0.0576688856224373086, 0.343862246272726864, 0.742249322561179696, 1.13062213085789677],
    [0.318309886183790672, 0.685708636282942492, 1.06038810680258304, 1.43039049721036742],
    [0.661840289041691109, 1.03460129961284331, 1.40403372656695011, 1.76582657532255402],
    [1.68032873502883643, 2.36881366271826478, 2.98569318737471367, 3.54595815757135183],
    [2, 3, 4, 5],
]


class TestRandomFeatures(KernelContract):
    kernel = FullyConnected("rf", 4)
    different = FullyConnected("rf", 3)
    shape = (8,)


class TestTangent(KernelContract):
    kernel = FullyConnected("ntk", 3, normalized=True)
    different = FullyConnected("ntk", 3)
    shape = (8,)


class TestBothNormalised(KernelContract):
    kernel = FullyConnected("both", 3, normalized=True, normalize_inputs=True)
    different = FullyConnected("both", 3)
    shape = (8,)


class TestTangentWithBias(KernelContract):
    kernel = FullyConnected("ntk", 2, bias=True)
    different = FullyConnected("ntk", 2)
    shape = (8,)


class TestBothWithBias(KernelContract):
    kernel = FullyConnected("both", 2, bias=True)
    different = FullyConnected("rf", 2, bias=True)
    shape = (8,)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_golden_values(depth: int) -> None:
    """G2 and G3 to 1e-12."""
    rf, ntk = FullyConnected("rf", depth), FullyConnected("ntk", depth)
    np.testing.assert_allclose(rf.kappa(COSINES), np.array(GOLDEN_RF)[:, depth - 2], atol=1e-12)
    np.testing.assert_allclose(ntk.kappa(COSINES), np.array(GOLDEN_NTK)[:, depth - 2], atol=1e-12)
    both = FullyConnected("both", depth).kappa(COSINES)
    np.testing.assert_array_equal(both, [rf.kappa(COSINES), ntk.kappa(COSINES)])


def test_depth_one_is_linear() -> None:
    """K8: one weight matrix has no ReLU layer."""
    X = np.random.default_rng(0).standard_normal((5, 3))
    for family in ("rf", "ntk"):
        np.testing.assert_allclose(FullyConnected(family, 1).gram(X), X @ X.T, rtol=1e-12, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["rf", "ntk"]),
    depth=st.integers(1, 6),
    n=st.integers(1, 6),
    d=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_equals_loops(family: str, depth: int, n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((n, d)), rng.standard_normal((3, d))
    expected = reference.homogeneous(lambda u: reference.fully_connected(family, depth, u), X, Y)
    np.testing.assert_allclose(FullyConnected(family, depth).gram(X, Y), expected, rtol=1e-7, atol=1e-9)


def test_options() -> None:
    """K8: normalized divides the NTK by L; normalize_inputs drops the norms but keeps zeros."""
    X = np.random.default_rng(0).standard_normal((5, 3))
    X[2] = 0
    plain = FullyConnected("ntk", 3).gram(X)
    np.testing.assert_allclose(FullyConnected("ntk", 3, normalized=True).gram(X), plain / 3, rtol=1e-14)
    norms = np.linalg.norm(X, axis=1)
    norms[2] = 1
    unit = FullyConnected("ntk", 3, normalize_inputs=True).gram(X)
    np.testing.assert_allclose(unit, plain / np.outer(norms, norms), rtol=1e-12, atol=1e-15)
    assert np.all(unit[2] == 0)


def test_bias_variants() -> None:
    """K9: RF (1 + u) kappa_1(u), NTK ((1 + u) kappa_0(u) + kappa_1(u))/2."""
    k0 = np.array([reference.kappa_0(u) for u in COSINES])
    k1 = np.array([reference.kappa_1(u) for u in COSINES])
    rf, ntk = (FullyConnected(family, 2, bias=True).kappa(COSINES) for family in ("rf", "ntk"))
    np.testing.assert_allclose(rf, (1 + COSINES) * k1, atol=1e-14)
    np.testing.assert_allclose(ntk, ((1 + COSINES) * k0 + k1) / 2, atol=1e-14)
    np.testing.assert_array_equal(FullyConnected("both", 2, bias=True).kappa(COSINES), [rf, ntk])


def test_random_features_are_compositions_of_kappa_1() -> None:
    """K14, E3: L layers are L - 1 compositions."""
    layer = DotProduct("arc-cosine")
    np.testing.assert_allclose(
        FullyConnected("rf", 4).kappa(COSINES), layer.kappa(layer.kappa(layer.kappa(COSINES))), atol=1e-15
    )


def test_gradients_of_a_wide_network() -> None:
    """K11: inner products of gradients of a two-layer network tend to the NTK."""
    rng = np.random.default_rng(0)
    m = 200_000
    x, y = np.array([1.0, 0.5, -0.2]), np.array([0.3, -1.0, 0.8])
    W, v = rng.standard_normal((m, 3)), rng.standard_normal(m)
    a, b = W @ x, W @ y
    first = np.maximum(a, 0) * np.maximum(b, 0)
    second = v**2 * (x @ y) * (a >= 0) * (b >= 0)
    terms = 2 * (first + second)
    K = FullyConnected("ntk", 2).gram(np.stack([x, y]))[0, 1]
    assert abs(terms.mean() - K) < 5 * terms.std() / math.sqrt(m)


def _distance(kernel: FullyConnected | DotProduct, x: np.ndarray, y: np.ndarray) -> float:
    K = kernel.gram(np.stack([x, y]))
    return math.sqrt(max(0.0, K[0, 0] + K[1, 1] - 2 * K[0, 1]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(1e-4, 2))
def test_lipschitz_and_hoelder_bounds(seed: int, spread: float) -> None:
    """K12, with unit constants."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(4) * 10 ** rng.uniform(-2, 2)
    other = z + spread * np.linalg.norm(z) * rng.standard_normal(4)
    gap = np.linalg.norm(z - other)
    slack = 1 + 1e-6
    assert _distance(DotProduct("arc-cosine"), z, other) <= gap * slack
    smaller = min(np.linalg.norm(z), np.linalg.norm(other))
    assert _distance(FullyConnected("ntk", 2), z, other) <= (math.sqrt(smaller * gap) + 2 * gap) * slack
    unit, unit_2 = z / np.linalg.norm(z), other / np.linalg.norm(other)
    step = _distance(DotProduct("arc-cosine", order=0), unit, unit_2)
    assert step <= math.sqrt(np.linalg.norm(unit - unit_2)) * slack


def test_tangent_map_is_not_lipschitz() -> None:
    """K12: at angle t the NTK map moves by sqrt(2 t/pi), the RF map by order t."""
    for t, tolerance in ((1e-2, 0.05), (1e-4, 0.005)):
        x, y = np.array([1.0, 0]), np.array([math.cos(t), math.sin(t)])
        assert _distance(FullyConnected("ntk", 2), x, y) / math.sqrt(2 * t / math.pi) == pytest.approx(
            1, abs=tolerance
        )
        assert _distance(FullyConnected("rf", 2), x, y) <= t * 1.001


def test_slopes() -> None:
    assert FullyConnected("rf", 5).kappa_prime_at_1 == 1
    assert FullyConnected("rf", 5).is_nonexpansive
    assert FullyConnected("ntk", 2).kappa_prime_at_1 == math.inf
    assert FullyConnected("rf", 2, bias=True).kappa_prime_at_1 == 3
    with pytest.raises(KernelError, match="two kernels"):
        _ = FullyConnected("both", 2).kappa_prime_at_1


def test_tangent_diagonal_in_single_precision() -> None:
    """K13: the diagonal is L |x|^2, not off by 1e-4."""
    X = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)
    diagonal = np.diag(FullyConnected("ntk", 5).gram(X))
    np.testing.assert_allclose(diagonal, 5 * (X.astype(np.float64) ** 2).sum(1), rtol=2e-6)


def test_normalized_means_nothing_for_random_features() -> None:
    """Two descriptions of one kernel have one fingerprint."""
    assert FullyConnected("rf", 3, normalized=True).fingerprint == FullyConnected("rf", 3).fingerprint


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"family": "nkt"}, "did you mean 'ntk'"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"depth": 3, "bias": True}, "bias is defined for depth 2"),
        ({"family": "ntk", "bias": True, "normalized": True}, "drop one"),
        ({"normalized": 1}, "normalized must be true or false"),
    ],
)
def test_invalid_parameters_are_named(parameters: dict, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        FullyConnected(**parameters)
