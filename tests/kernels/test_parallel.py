"""Which entries of tangent kernels need float64: those of images with many parallel patches (K13)."""

from __future__ import annotations

import models
import numpy as np
import pytest

from kernels import fused, parallel
from kernels.base import Prepared
from kernels.convolutional import Convolutional, Layer
from kernels.groups import RotoTranslation
from kernels.patches import extract_patches

NAMES = ("relu both, gaussian, reference", "one layer, relu both, strided", "GAP, relu both, 2")
GROUPS = {
    f"{final} {rotations}": RotoTranslation(
        (
            Layer(3, "relu", pooling="gaussian"),
            Layer(3, "relu", pooling="global" if final == "rot+gap" else "gaussian"),
        ),
        final,
        rotations,
        True,
    )
    for final, rotations in (("rot", 4), ("rot+gap", 4), ("orbit", 4), ("rot", 8), ("orbit", 8))
}
KERNELS = {name: models.MODELS[name] for name in NAMES} | GROUPS


@pytest.fixture(params=["general", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(fused.VARIABLE, request.param)
    return request.param


def some_parallel(side: int) -> np.ndarray:
    """Images (18, side, side, 3): some of one colour, some that are grey but for a spot, of which two are negative, and
    noise."""
    noise = np.random.default_rng(6).standard_normal((6, side, side, 3))
    grey = models.images_of_one_colour(6, side).mean(3, keepdims=True) * np.ones(3)
    grey[:2] *= -1
    X = np.concatenate([models.images_of_one_colour(6, side), noise, grey])
    return X[np.random.default_rng(7).permutation(18)].astype(np.float32)


def tangent(block: np.ndarray) -> np.ndarray:
    return block if block.ndim == 2 else block[-1]


def errors(kernel, single: Prepared, double: Prepared, block: np.ndarray) -> np.ndarray:
    """Of a block (n, n) of the tangent kernel, relative to sqrt(K_ii K_jj)."""
    exact = tangent(kernel.pair(double, double))
    root = np.sqrt(np.diagonal(exact))
    return np.abs(block - exact) / (root[:, None] * root)


TANGENT = [name for name in models.MODELS if models.MODELS[name].tangent]


@pytest.mark.parametrize(
    "name", ["relu NTK 2-5", "relu both, average, reference", "GAP after pooling", *NAMES]
)
def test_images_of_one_colour_are_exact(name: str, path: str) -> None:
    """Protects entries off the diagonal where two images share flat ground, which float32 alone leaves 1e-5 off."""
    kernel, X = models.MODELS[name], models.images_of_one_colour(5, 24).astype(np.float32)
    a, b = kernel.prepare(X, pool="x"), kernel.prepare(X.astype(np.float64), pool="x")
    others = ~np.eye(len(X), dtype=bool)
    assert errors(kernel, a, b, tangent(kernel.block(a, a)))[others].max() > 2e-6
    K = tangent(kernel.pair(a, a))
    assert errors(kernel, a, b, K).max() <= 1e-6
    np.testing.assert_array_equal(K, K.T)


@pytest.mark.parametrize(
    "name",
    [
        "relu NTK 2-5",
        "relu both, average, reference",
        pytest.param("GAP, relu both, 2", marks=pytest.mark.slow),
    ],
)
def test_images_of_opposite_colours_are_exact(name: str, path: str) -> None:
    """Centred images have them: at a cosine of -1 kappa_0 makes as much of its error as at 1."""
    kernel, X = models.MODELS[name], models.images_of_one_colour(5, 24)
    darker = np.random.default_rng(1).random((5, 1, 1, 1))
    X = np.concatenate([X, -X[::-1] * darker]).astype(np.float32)
    a, b = kernel.prepare(X, pool="x"), kernel.prepare(X.astype(np.float64), pool="x")
    opposite = slice(5), slice(5, 10)
    assert errors(kernel, a, b, tangent(kernel.block(a, a)))[opposite].max() > 2e-6
    K = tangent(kernel.pair(a, a))
    assert errors(kernel, a, b, K).max() <= 1e-6
    # Beside images without a negative pixel, too.
    np.testing.assert_array_equal(kernel.too_parallel(a[:5], a[5:]), kernel.too_parallel(a, a)[opposite])
    np.testing.assert_array_equal(kernel.too_parallel(a[5:], a[:5]), kernel.too_parallel(a, a)[opposite].T)


@pytest.mark.parametrize("name", GROUPS)
def test_images_of_one_colour_are_exact_at_every_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of kernels that turn images, of which one may be flat where the other is once it is turned."""
    monkeypatch.delenv(fused.VARIABLE, raising=False)
    kernel, X = GROUPS[name], models.images_of_one_colour(4, 12)
    rng = np.random.default_rng(8)
    X[0, :6] = rng.random((6, 12, 3))
    X[1, :, 6:] = rng.random((12, 6, 3))
    X = X.astype(np.float32)
    a, b = kernel.prepare(X, pool="x"), kernel.prepare(X.astype(np.float64), pool="x")
    assert errors(kernel, a, b, tangent(kernel.pair(a, a))).max() <= 1e-6


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_computed_in_float64_depends_on_the_pair_alone(name: str) -> None:
    """Protects stores from other numbers where tiles are cut otherwise, or where the images change sides."""
    kernel, X = KERNELS[name], some_parallel(12)
    a = kernel.prepare(X, pool="x")
    whole = kernel.too_parallel(a, a)
    assert 0.1 < whole.mean() < 0.9
    np.testing.assert_array_equal(whole, whole.T)
    parts = np.empty_like(whole)
    for rows, part_a in a.blocks(7):
        for columns, part_b in a.blocks(5):
            parts[rows, columns] = kernel.too_parallel(part_a, part_b)
    np.testing.assert_array_equal(parts, whole)


def test_which_of_two_images_is_turned_does_not_matter() -> None:
    """Turned, flat ground comes to other positions than those of a sample: each image is turned against the other."""
    kernel, X = GROUPS["orbit 4"], models.images_of_one_colour(30, 12)
    rng = np.random.default_rng(8)
    for image in X:
        (i, j), side = rng.integers(0, 9, 2), rng.integers(3, 6)
        noise = rng.random(image.shape)
        noise[i : i + side, j : j + side] = image[0, 0]
        image[:] = noise
    a = kernel.prepare(X.astype(np.float32), pool="x")
    found = kernel.too_parallel(a, a)
    assert 0.05 < found.mean() < 0.5
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_the_same_to_the_last_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in blocks of one image, and with other steps: a threshold would tell roundings apart."""
    kernel, X = models.MODELS[name], some_parallel(12)
    network, a = kernel.network(X.shape[1:]), kernel.prepare(X)

    def estimates(x: Prepared, y: Prepared) -> np.ndarray:
        return parallel._errors(network, parallel._Side(network, x), parallel._Side(network, y))

    whole = estimates(a, a)
    np.testing.assert_array_equal(whole, whole.T)
    monkeypatch.setattr(parallel, "block_bytes", lambda xp: 1 << 12)
    for i in range(len(X)):
        np.testing.assert_array_equal(estimates(a[i : i + 1], a)[0], whole[i])


def test_tiles_and_sides_change_little(path: str) -> None:
    """Blocks of a tile, and turned ones, have its numbers: float64 leaves no more than the rounding to float32."""
    kernel, X = models.MODELS["relu both, gaussian, reference"], models.images_of_one_colour(8, 16)
    a = kernel.prepare(X.astype(np.float32), pool="x")
    whole = kernel.pair(a, a)[1]
    eps = 2 * np.finfo(np.float32).eps
    np.testing.assert_allclose(kernel.pair(a[5:], a[:5])[1], whole[5:, :5], rtol=eps)
    np.testing.assert_allclose(kernel.pair(a[:5], a[5:])[1], whole[:5, 5:], rtol=eps)


def test_images_that_share_no_flat_ground_stay_in_float32() -> None:
    """Flat ground of other colours, and noise: nothing is computed twice."""
    kernel = models.MODELS["relu NTK 2-5"]
    X = models.flat_images(6, 24)
    X[3:] = np.random.default_rng(9).standard_normal(X[3:].shape)
    a = kernel.prepare(X.astype(np.float32), pool="x")
    found = kernel.too_parallel(a, a)
    np.testing.assert_array_equal(found, np.eye(6, dtype=bool) & (np.arange(6) < 3))


def test_a_copy_under_another_row_id_is_exact(path: str) -> None:
    """K13: its patches are all parallel to those of the first."""
    kernel, X = models.MODELS["relu NTK 2-5"], models.busy_images(2, (28, 28, 3)).astype(np.float32)
    found = np.diagonal(kernel.pair(kernel.prepare(X, pool="x"), kernel.prepare(X, pool="y")))
    np.testing.assert_allclose(found, kernel.diag(kernel.prepare(X)), rtol=1e-6)


def test_patches_of_few_numbers_are_always_computed_in_float64(path: str) -> None:
    """2 x 2 grey pixels: parallel ones are the rule, and too scattered for a sample."""
    kernel = models.MODELS["GAP, relu both, patches 2 and 1, periodic"]
    X = np.round(np.random.default_rng(10).random((4, 12, 12, 1)) * 2).astype(np.float32)
    a, b = kernel.prepare(X, pool="x"), kernel.prepare(X.astype(np.float64), pool="x")
    K = tangent(kernel.pair(a, a))
    np.testing.assert_allclose(K, tangent(kernel.pair(b, b)), rtol=2 * np.finfo(np.float32).eps)
    assert kernel.cost(8, 8, (12, 12, 1)).operations > 1.9 * kernel.block_cost(8, 8, (12, 12, 1)).operations


@pytest.mark.filterwarnings("error")
def test_images_that_are_not_finite_give_blocks_that_are_not() -> None:
    """Without a warning of what was only an estimate; whoever stores a block says which images they were."""
    kernel, X = (
        models.MODELS["relu both, strided, same"],
        models.busy_images(3, (12, 12, 1)).astype(np.float32),
    )
    X[1, 5, 5] = np.inf
    a = kernel.prepare(X)
    finite = np.array([True, False, True])
    np.testing.assert_array_equal(np.isfinite(kernel.pair(a, a)[1]), finite[:, None] & finite)


@pytest.mark.parametrize("mode", ["reference", "same", "periodic"])
def test_counts_are_those_of_linear_layers(mode: str) -> None:
    """Where scalar functions are the identity, the kernel is the sum of products of patches, so often."""
    layers = (
        Layer(3, "linear", scale=1.0, subsampling=2),
        Layer(2, "linear", scale=1.0, pooling="average", subsampling=2),
    )
    kernel = Convolutional(layers, pooling_mode=mode)
    X = np.random.default_rng(11).random((2, 11, 9, 2))
    network = kernel.network(X.shape[1:])
    patches = extract_patches(X, 3, mode == "periodic").reshape(2, 99, -1)
    counts = np.kron(*network.trace_counts)
    wanted = np.einsum("iuf,jvf,uv->ij", patches, patches, counts)
    np.testing.assert_allclose(kernel.gram(X), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["relu NTK 2-5", "one layer, relu both, strided", "GAP, relu both, 2"])
def test_samples_are_drawn_by_what_pairs_count(name: str) -> None:
    """Each pair with its opposite; displacements as they count, and none where none counts."""
    network = models.MODELS[name].network((32, 32))
    (i, j), (k, m), weights = parallel._sample(network)
    assert weights.sum() == pytest.approx(1)
    drawn = sorted(zip(i, j, k, m, weights, strict=True))
    assert drawn == sorted(zip(k, m, i, j, weights, strict=True))
    for counts, first, second in zip(network.trace_counts, (i, j), (k, m), strict=True):
        found = np.zeros_like(counts)
        np.add.at(found, (first, second), weights)
        by_displacement = [
            [np.trace(array, d) for d in range(1 - len(counts), len(counts))]
            for array in (found, counts / counts.sum())
        ]
        assert np.abs(np.cumsum(by_displacement, axis=1)).max() <= 1 + 1e-9
        assert np.abs(np.diff(np.cumsum(by_displacement, axis=1), axis=0)).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", TANGENT)
def test_the_flattest_images(name: str, path: str, real_data) -> None:
    """Those of CIFAR-10 whose neighbouring pixels differ least, all pairs: 6e-5 off in float32 alone."""
    from pipelines import datasets

    X = datasets.load("cifar10").train.X / 255.0
    rough = sum(np.abs(np.diff(X, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))
    X = X[np.argsort(rough)[:16]].astype(np.float32)
    kernel = models.MODELS[name]
    a, b = kernel.prepare(X, pool="x"), kernel.prepare(X.astype(np.float64), pool="x")
    assert errors(kernel, a, b, tangent(kernel.pair(a, a))).max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["relu both, strided, same", "one layer, relu both, strided", "no pooling, relu both"]
)
@pytest.mark.parametrize("source", ["cifar10", "mnist", "fashion-mnist"])
def test_published_images(source: str, name: str, real_data) -> None:
    """Many pairs of the models that average least: all are right, and few are computed in float64."""
    from pipelines import datasets

    X = datasets.load(source).train.X[:400] / 255.0
    X = X.reshape(len(X), *(X.shape[1:] if X.ndim == 4 else (28, 28, 1))).astype(np.float32)
    kernel = models.MODELS[name]
    a, b = kernel.prepare(X, pool="x"), kernel.prepare(X.astype(np.float64), pool="x")
    assert errors(kernel, a, b, tangent(kernel.pair(a, a))).max() <= 1e-6
    assert kernel.too_parallel(a, a)[np.triu_indices(len(X), 1)].mean() < 0.04
