"""What every path keeps: the same bits for the same tile, nearly the same for other cuts, positive matrices."""

from __future__ import annotations

import models
import numpy as np
import pytest

from kernels import fused, native
from kernels.base import KernelError

NAMES = (
    "exp/exp, gaussian, same",
    "relu both, gaussian, reference",
    "no pooling, exp x 3",
    "poly2/linear, gaussian, same",
)
CUTS = {np.float32: 1e-6, np.float64: 1e-12}


@pytest.fixture(params=["general", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled":
        try:
            native.load()
        except KernelError as error:
            pytest.skip(str(error))
    monkeypatch.setenv(fused.VARIABLE, request.param)
    return request.param


def samples(dtype: type) -> np.ndarray:
    """Images without patches that are nearly parallel: there tangent kernels tell roundings apart (K13)."""
    return np.random.default_rng(3).standard_normal((13, 9, 9, 2)).astype(dtype)


@pytest.mark.parametrize("dtype", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_tile_has_the_same_bits(name: str, dtype: type, path: str) -> None:
    """Computed twice, from blocks prepared twice, rectangular and symmetric."""
    kernel, X = models.MODELS[name], samples(dtype)
    once, again = ((kernel.prepare(X[:6], pool="x"), kernel.prepare(X[6:], pool="y")) for _ in range(2))
    np.testing.assert_array_equal(kernel.pair(*once), kernel.pair(*again))
    np.testing.assert_array_equal(kernel.pair(once[0], once[0]), kernel.pair(again[0], again[0]))


@pytest.mark.parametrize("dtype", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_where_samples_are_cut_changes_little(name: str, dtype: type, path: str) -> None:
    """C11: tiles of 13 x 13, of 5 and of 1, of a block with itself and with a copy of it."""
    kernel, X = models.MODELS[name], samples(dtype)
    a = kernel.prepare(X, pool="x")
    whole = kernel.pair(a, a)
    root = np.sqrt(np.diagonal(whole, axis1=-2, axis2=-1))
    scale = root[..., :, None] * root[..., None, :]
    for side in (5, 1):
        parts = np.empty_like(whole)
        for rows, part_a in a.blocks(side):
            for columns, part_b in a.blocks(9):
                parts[..., rows, columns] = kernel.pair(part_a, part_b)
        assert (np.abs(parts - whole) / scale).max() <= CUTS[dtype]


@pytest.mark.parametrize("dtype", CUTS)
@pytest.mark.parametrize("name", ["relu NTK 2-5", "one layer, relu both, 5"])
def test_where_flat_images_are_cut_changes_little(name: str, dtype: type, path: str) -> None:
    """Parallel patches, of which kappa_0 makes 1e-8 of a last bit: the two images of a pair may change sides, as they
    do in tiles whose one side fills the lanes better."""
    if path == "general" and dtype is np.float64:
        pytest.skip("matrix products of other sizes give other last bits, as kernels/README.md says")
    X = models.flat_images(8, 24)[..., :1]
    kernel = models.MODELS[name]
    a = kernel.prepare(X.astype(dtype), pool="x")
    whole = kernel.pair(a, a)
    root = np.sqrt(np.diagonal(whole, axis1=-2, axis2=-1))
    scale = root[..., :, None] * root[..., None, :]
    parts = np.empty_like(whole)
    for rows, part_a in a.blocks(3):
        for columns, part_b in a.blocks(5):
            parts[..., rows, columns] = kernel.pair(part_a, part_b)
    assert (np.abs(parts - whole) / scale).max() <= CUTS[dtype]
    turned = kernel.pair(a[5:], a[:5]).swapaxes(-1, -2)
    assert (np.abs(kernel.pair(a[:5], a[5:]) - turned) / scale[..., :5, 5:]).max() <= CUTS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp/exp 2-5", "relu NTK 2-5"])
def test_float32_matrices_are_positive(name: str, path: str, real_data) -> None:
    """The smallest eigenvalue of whitened CIFAR-10 images stays above -1e-6 of the largest."""
    from pipelines import datasets
    from pipelines.preprocessing import whiten_patches

    if path == "general":
        pytest.skip("takes minutes; its values are those of the compiled path within 1e-6")
    X = whiten_patches(datasets.load("cifar10").train.X[:250] / 255.0).astype(np.float32)
    eigenvalues = np.linalg.eigvalsh(models.MODELS[name].gram(X).astype(np.float64))
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]
