"""Nystrom features: a projection of the kernel's own features, and R7's regression on the same centres (F3, F7, R7)."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import reference
import scipy.linalg
from contracts import KernelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.arrays import to_device, to_host, why_no_device
from kernels.base import Kernel, KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.features.base import InMemory
from kernels.features.landmarks import SELECTIONS, draw
from kernels.features.nystrom import NystromFeatures, inverse_root, whitening
from kernels.registry import feature_map, from_description

EXPONENTIAL = DotProduct("exponential", sigma=0.6)
NETWORK = Convolutional(
    (Layer(3, "exponential", sigma=0.6, subsampling=2), Layer(1, "relu", pooling="global"))
)
PICKING = [name for name in SELECTIONS if name != "k-means"]


def vectors(n: int = 60, d: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * rng.uniform(0.5, 2, (n, 1))


def learned(
    kernel: Kernel, X: np.ndarray, number: int, *args: object, **parameters: object
) -> NystromFeatures:
    return NystromFeatures(kernel, number, *args, **parameters).learn(InMemory(X))  # type: ignore[arg-type]


class TestOfVectors(KernelContract):
    kernel = learned(EXPONENTIAL, vectors(), 20, epsilon=1e-3)
    different = learned(EXPONENTIAL, vectors(), 20, epsilon=1e-3, seed=1)
    shape = (5,)
    float32_error = 2e-6


class TestOfImages(KernelContract):
    kernel = learned(NETWORK, np.random.default_rng(3).standard_normal((12, 8, 8, 2)), 8, epsilon=1e-3)
    different = learned(NETWORK, np.random.default_rng(4).standard_normal((12, 8, 8, 2)), 8, epsilon=1e-3)
    shape = (8, 8, 2)
    float32_error = 2e-6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 3),
    st.sampled_from(SELECTIONS),
    st.sampled_from([EXPONENTIAL, FullyConnected("ntk", 3), 0.5 * EXPONENTIAL + DotProduct("linear")]),
)
def test_the_residual_is_positive_semidefinite(
    n: int, number: int, d: int, seed: int, selection: str, kernel: Kernel
) -> None:
    """F3: for epsilon = 0 the smallest eigenvalue of K - K_hat is at least -1e-10 times the largest of K; features
    are no longer than the kernel's own."""
    number = min(n, number)
    X = vectors(n, d, seed)
    if selection == "k-means" and d == 1:  # where there are two directions alone
        number = min(number, len(np.unique(np.sign(X))))
    K = kernel.gram(X)
    phi = learned(kernel, X, number, selection, 0.0, seed=seed).features(X)
    assert phi.shape == (n, number)
    largest = np.linalg.eigvalsh(K)[-1]
    assert np.linalg.eigvalsh(K - phi @ phi.T)[0] >= -1e-10 * largest
    assert np.all((phi**2).sum(axis=1) <= np.diag(K) + 1e-10 * largest)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_the_residual_is_positive_semidefinite_with_epsilon(epsilon: float) -> None:
    X = vectors()
    K, phi = EXPONENTIAL.gram(X), learned(EXPONENTIAL, X, 20, epsilon=epsilon).features(X)
    assert np.linalg.eigvalsh(K - phi @ phi.T)[0] >= -1e-12 * np.linalg.norm(K, 2)


@pytest.mark.parametrize("kernel", [EXPONENTIAL, FullyConnected("rf", 3), DotProduct("polynomial", degree=3)])
@pytest.mark.parametrize("selection", PICKING)
def test_all_samples_as_landmarks_are_the_exact_kernel(kernel: Kernel, selection: str) -> None:
    """F3: epsilon = 0 and M = n."""
    X = vectors(40)
    K = kernel.gram(X)
    assert np.abs(learned(kernel, X, 40, selection, 0.0).gram(X) - K).max() <= 1e-9 * np.abs(K).max()


def test_all_images_as_landmarks_are_the_exact_kernel() -> None:
    X = np.random.default_rng(0).standard_normal((10, 8, 8, 2))
    for selection in PICKING:
        K = NETWORK.gram(X)
        found = learned(NETWORK, X, 10, selection, 0.0).gram(X)
        assert np.abs(found - K).max() <= 1e-9 * np.abs(K).max()


@pytest.mark.parametrize("selection", PICKING)
def test_features_are_those_of_the_formula(selection: str) -> None:
    """Against plain linear algebra on landmarks that are found again among the samples."""
    X = vectors()
    chosen = learned(EXPONENTIAL, X, 15, selection, 0.0)
    assert chosen.arrays is not None
    where = [int(np.flatnonzero((z == X).all(axis=1))[0]) for z in chosen.arrays["landmarks"]]
    K = EXPONENTIAL.gram(X)
    np.testing.assert_allclose(
        chosen.gram(X), reference.nystrom(K, np.array(where)), atol=1e-10 * np.abs(K).max()
    )


def test_epsilon_counts_in_units_of_the_mean_diagonal() -> None:
    """psi = V^T (K_MM + epsilon d I)^(-1/2) K_M(x), against a symmetric root by another way (F3); a scaled kernel has
    scaled features."""
    X, epsilon = vectors(), 0.01
    K = EXPONENTIAL.gram(X)
    chosen = draw(60, 10, np.random.default_rng(2))
    inner = K[np.ix_(chosen, chosen)]
    shifted = inner + epsilon * np.trace(inner) / 10 * np.eye(10)
    expected = K[:, chosen] @ np.linalg.inv(scipy.linalg.sqrtm(shifted))
    found = learned(EXPONENTIAL, X, 10, epsilon=epsilon, seed=2)
    phi = found.features(X)
    np.testing.assert_allclose(phi @ phi.T, expected @ expected.T, atol=1e-11 * np.abs(K).max())
    rotation = np.linalg.lstsq(phi, expected, rcond=None)[0]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(10), atol=1e-10)
    np.testing.assert_allclose(phi @ rotation, expected, atol=1e-10)
    scaled = learned(9 * EXPONENTIAL, X, 10, epsilon=epsilon, seed=2).features(X)
    np.testing.assert_allclose(np.abs(scaled), 3 * np.abs(phi), atol=1e-9)


@pytest.mark.parametrize("selection", ["uniform", "pivoted-cholesky"])
def test_nested_landmarks_never_do_worse(selection: str) -> None:
    """F3: the error is monotone, and so is every diagonal entry of what is left."""
    X = vectors(80, 4)
    K = EXPONENTIAL.gram(X)
    left = [K - learned(EXPONENTIAL, X, m, selection, 0.0).gram(X) for m in (5, 10, 20, 40, 80)]
    norms = [np.linalg.norm(R) for R in left]
    assert all(after < before for before, after in pairwise(norms))
    for before, after in pairwise(left):
        assert np.all(np.diag(after) <= np.diag(before) + 1e-10 * np.abs(K).max())


@pytest.mark.parametrize("ridge", [1e-2, 1e-5])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_primal_ridge_is_nystrom_regression(selection: str, ridge: float) -> None:
    """(Phi^T Phi + n lambda I) w = Phi^T Y predicts what R7 does on the same centres."""
    X, new = vectors(seed=1), vectors(20, seed=2)
    Y = np.random.default_rng(3).standard_normal((60, 2))
    chosen = learned(EXPONENTIAL, X, 15, selection, 0.0)
    assert chosen.arrays is not None
    Z, shift = chosen.arrays["landmarks"], 60 * ridge
    phi = chosen.features(X)
    w = np.linalg.solve(phi.T @ phi + shift * np.eye(15), phi.T @ Y)
    K_nM, K_MM = EXPONENTIAL.gram(X, Z), EXPONENTIAL.gram(Z)
    alpha = np.linalg.solve(K_nM.T @ K_nM + shift * K_MM, K_nM.T @ Y)
    expected = EXPONENTIAL.gram(new, Z) @ alpha
    np.testing.assert_allclose(chosen.features(new) @ w, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("ridge", [1e-1, 1e-4])
def test_primal_and_dual_agree(ridge: float) -> None:
    """F7."""
    X, new, shift = vectors(seed=1), vectors(20, seed=2), 60 * ridge
    y = np.random.default_rng(3).standard_normal(60)
    chosen = learned(EXPONENTIAL, X, 15)
    phi, star = chosen.features(X), chosen.features(new)
    primal = star @ np.linalg.solve(phi.T @ phi + shift * np.eye(15), phi.T @ y)
    dual = chosen.gram(new, X) @ np.linalg.solve(chosen.gram(X) + shift * np.eye(60), y)
    np.testing.assert_allclose(primal, dual, atol=1e-8 * np.abs(dual).max())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_was_learned_travels(selection: str) -> None:
    """A map made anew from its description and its arrays is the same map; other arrays are refused."""
    X = vectors()
    first = learned(EXPONENTIAL, X, 12, selection)
    assert first.arrays is not None
    again = from_description(json.loads(json.dumps(first.describe())))
    assert isinstance(again, NystromFeatures)
    with pytest.raises(KernelError, match="nothing learned"):
        again.features(X)
    again = again.knowing(first.arrays)
    assert again == first
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.features(X), first.features(X))
    with pytest.raises(KernelError, match="not those that its description names"):
        again.knowing({**first.arrays, "whitening": 2 * first.arrays["whitening"]})
    assert learned(EXPONENTIAL, X, 12, selection).learned == first.learned
    assert learned(EXPONENTIAL, X, 12, selection, seed=1).learned != first.learned


@pytest.mark.parametrize("selection", PICKING)
@pytest.mark.parametrize("kernel", [FullyConnected("ntk", 2), FullyConnected("ntk", 3)])
def test_a_landmark_is_known_by_its_row_id(kernel: Kernel, selection: str) -> None:
    """K13: in float32 an NTK knows two copies of a sample to the root of rounding, and one sample to rounding."""
    X = vectors(60, 5).astype(np.float32)
    rows = 1000 + np.arange(60)
    chosen = NystromFeatures(kernel, 20, selection, 0.1).learn(InMemory(X, rows, "pool"))
    assert chosen.arrays is not None
    where = chosen.arrays["rows"] - 1000
    np.testing.assert_array_equal(X[where], chosen.arrays["landmarks"])

    def error(pool: str) -> float:
        exact = chosen.features(X.astype(np.float64), rows, "pool")[where]
        found = chosen.features(X, rows, pool)[where]
        return float((np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())

    assert error("pool") < 2e-5
    assert error("test") == error("") > 4e-5
    prepared = chosen.prepare(X, rows, "pool").arrays["features"]
    np.testing.assert_array_equal(prepared, chosen.features(X, rows, "pool"))
    again = from_description(chosen.describe())
    assert isinstance(again, NystromFeatures)
    np.testing.assert_array_equal(again.knowing(chosen.arrays).features(X, rows, "pool"), prepared)


def test_landmarks_that_are_no_samples_have_no_row_ids() -> None:
    """Means of clusters, and samples of a pool without a name."""
    X = vectors()
    means = NystromFeatures(EXPONENTIAL, 5, "k-means").learn(InMemory(X, np.arange(60), "pool"))
    assert sorted(means.arrays or {}) == ["landmarks", "whitening"]
    assert sorted(learned(EXPONENTIAL, X, 5).arrays or {}) == ["landmarks", "whitening"]


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-3])
def test_float32_is_near_float64(epsilon: float) -> None:
    """Directions that float32 cannot tell from noise are left out, so that nothing is amplified; a smooth kernel of
    few dimensions has many of them."""
    X = vectors(120, 3).astype(np.float32)
    smooth = DotProduct("exponential", sigma=1.5)
    chosen = learned(smooth, X, 60, epsilon=epsilon)
    K = smooth.gram(X.astype(np.float64))
    norms = np.sqrt(np.diag(K))
    found = chosen.features(X)
    assert found.dtype == np.float32
    exact = chosen.features(X.astype(np.float64))
    assert exact.dtype == np.float64
    error = np.abs(found.astype(np.float64) @ found.astype(np.float64).T - exact @ exact.T)
    assert (error / np.outer(norms, norms)).max() < 5e-6
    assert np.linalg.norm(exact @ exact.T - K) <= (2 * epsilon + 1e-5) * np.linalg.norm(K)


def test_repeated_landmarks() -> None:
    """The pseudo-inverse: landmarks that are there twice count once, and with epsilon nothing breaks."""
    X = np.repeat(vectors(10), 3, axis=0)
    K = EXPONENTIAL.gram(X)
    for selection in PICKING:
        np.testing.assert_allclose(
            learned(EXPONENTIAL, X, 30, selection, 0.0).gram(X), K, atol=1e-9 * np.abs(K).max()
        )
        single = learned(EXPONENTIAL, X.astype(np.float32), 30, selection).gram(X.astype(np.float32))
        assert np.abs(single - K).max() < 1e-5 * np.abs(K).max()


def test_samples_of_zeros() -> None:
    """A zero among the landmarks adds nothing; nothing else among them is an error."""
    X = vectors(8)
    X[5:] = 0
    chosen = learned(EXPONENTIAL, X, 8, "uniform", 0.0)
    np.testing.assert_allclose(chosen.gram(X), EXPONENTIAL.gram(X), atol=1e-9 * EXPONENTIAL.gram(X).max())
    assert np.all(chosen.features(X)[5:] == 0)
    for selection in PICKING:
        with pytest.raises(KernelError, match="nothing can be learned: the kernel is 0 at every landmark"):
            learned(EXPONENTIAL, np.zeros((6, 5)), 3, selection)


def test_samples_that_overflow() -> None:
    X = vectors(8) * 1e200
    with (
        pytest.raises(KernelError, match="the kernel is not finite among samples to learn from"),
        np.errstate(all="ignore"),
    ):
        learned(EXPONENTIAL, X, 4)


def test_rows_in_blocks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are computed in blocks of bounded size."""
    X = vectors()
    chosen = learned(EXPONENTIAL, X, 12)
    expected = chosen.features(X)
    monkeypatch.setattr("kernels.features.nystrom.BLOCK_BYTES", 8 * 12 * 7)
    np.testing.assert_allclose(chosen.features(X), expected, rtol=1e-10, atol=1e-12)
    assert chosen.feature_cost(60, (5,), 8).scratch_bytes < 8 * 12 * 60


def test_whitening_and_the_symmetric_root() -> None:
    """Both are square roots of the inverse; the one has the largest eigenvalue first, the other is symmetric, and of
    a singular matrix they are those of its pseudo-inverse."""
    K = EXPONENTIAL.gram(vectors(30))
    singular = np.zeros((33, 33))
    singular[:30, :30] = K
    rounding = float(np.finfo(np.float64).eps)
    for matrix in (K, singular):
        W, root = whitening(matrix, 0.0, rounding), inverse_root(matrix, 0.0, rounding)
        inverse = np.linalg.pinv(matrix, rcond=1e-13, hermitian=True)
        np.testing.assert_allclose(W @ W.T, inverse, atol=1e-9 * np.abs(inverse).max())
        np.testing.assert_allclose(root @ root, inverse, atol=1e-9 * np.abs(inverse).max())
        np.testing.assert_allclose(root, root.T, atol=1e-12 * np.abs(root).max())
        variances = np.diag(W.T @ matrix @ matrix @ W)
        assert np.all(np.diff(variances) <= 1e-9 * variances[0])
        assert np.all(W[:, 30:] == 0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_costs_grow_with_what_is_done(selection: str) -> None:
    """More candidates and more samples cost more, until there are no more samples."""
    few, many = (NystromFeatures(EXPONENTIAL, 50, selection, candidates=k) for k in (100, 1000))
    shape = (20,)
    assert many.feature_cost(200, shape).operations == pytest.approx(
        2 * many.feature_cost(100, shape).operations
    )
    a, b = few.learning_cost(10_000, shape), many.learning_cost(10_000, shape)
    assert (a.operations < b.operations) is (selection != "uniform")
    assert a.scratch_bytes <= b.scratch_bytes
    assert many.learning_cost(10**9, shape) == b
    assert few.learning_cost(100, shape) == many.learning_cost(100, shape)


def test_parameters_are_checked() -> None:
    """Every message names the parameter, so that the path of the table can stand in front of it."""
    for parameters, message in [
        ({"landmarks": 0}, "landmarks must be a whole number of at least 1"),
        ({"selection": "random"}, "selection = 'random' is unknown"),
        ({"epsilon": -1e-3}, "epsilon must be a number from 0 to 1"),
        ({"epsilon": float("nan")}, "epsilon must be a number from 0 to 1"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1"),
        ({"selection": "k-means", "candidates": 10}, "candidates must be at least landmarks = 1000"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
    ]:
        with pytest.raises(KernelError, match=f"^features.{message}"):
            feature_map({"kind": "nystrom", **parameters}, EXPONENTIAL, 0)
    with pytest.raises(
        KernelError, match=r"^features.selection must be one of uniform, leverage-scores, pivoted"
    ):
        feature_map({"kind": "nystrom", "selection": "k-means"}, NETWORK, 0)
    with pytest.raises(KernelError, match=r"^features.kernel must have one output"):
        feature_map({"kind": "nystrom"}, FullyConnected("both", 3), 0)
    assert feature_map({"kind": "nystrom", "landmarks": 7}, NETWORK, 5) == NystromFeatures(NETWORK, 7, seed=5)


def test_too_few_samples() -> None:
    with pytest.raises(KernelError, match="landmarks must be at most 9, the number of samples"):
        learned(EXPONENTIAL, vectors(9), 10)


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(KernelError, match="samples of shape"):
        learned(EXPONENTIAL, np.zeros((9, 4, 4, 1)), 3)


@pytest.mark.gpu
@pytest.mark.skipif(why_no_device() is not None, reason=f"needs a GPU: {why_no_device()}")
@pytest.mark.parametrize("selection", SELECTIONS)
def test_on_a_device_as_on_the_host(selection: str) -> None:
    """Samples on a device: what is learned there is what the host learns, and features stay there."""
    X = vectors(200)
    host = learned(EXPONENTIAL, X, 30, selection, 1e-3, candidates=100)
    device = learned(EXPONENTIAL, to_device(X), 30, selection, 1e-3, candidates=100)
    found = to_host(device.gram(to_device(X)))
    np.testing.assert_allclose(found, host.gram(X), atol=1e-9 * np.abs(found).max())
    single = host.features(to_device(X.astype(np.float32)))
    np.testing.assert_allclose(to_host(single @ single.T), host.gram(X), atol=5e-6 * np.abs(found).max())
