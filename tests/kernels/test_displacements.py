"""The recursion by displacement gives the kernels that the recursion over whole arrays gives."""

from __future__ import annotations

from types import SimpleNamespace

import models
import numpy as np
import pytest

from kernels import displacements, general, recursion
from kernels.blocks import Engine
from kernels.convolutional import Convolutional
from kernels.cuda import device
from kernels.displacements import Displacements
from kernels.recursion import Recursion


def blocks(kernel: Convolutional, a, b, c) -> list[np.ndarray]:
    return [kernel.pair(a, b), kernel.pair(a, c), kernel.pair(a, a), kernel.diag(a)]


@pytest.fixture(autouse=True)
def general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", "general")


def check(kernel: Convolutional, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    X = models.images(5, shape)
    a, b, c = kernel.prepare(X), kernel.prepare(X[1:4], np.array([1, 2, 77])), kernel.prepare(X[2:], pool="c")
    monkeypatch.setattr(general, "by_displacement", lambda *_: False)
    expected = blocks(kernel, a, b, c)
    monkeypatch.setattr(general, "by_displacement", lambda *_: True)
    # Of two cosines near 1 that differ in rounding, kappa_0 makes more (K13).
    rtol = 1e-8 if kernel.tangent else 1e-12
    for found, whole in zip(blocks(kernel, a, b, c), expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=0, atol=rtol * np.abs(whole).max())


@pytest.mark.parametrize("name", [n for n, k in models.MODELS.items() if models.admissible(k, (8, 8, 1))])
def test_both_recursions_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9 and C10 for every model that small images admit, within a sample and between samples."""
    check(models.MODELS[name], (8, 8, 1), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
def test_both_recursions_agree_on_larger_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where strips and explicit features are taken, on images that are not square."""
    shape = (22, 23, 1) if name in models.PUBLISHED else (13, 12, 2)
    if models.admissible(models.MODELS[name], shape):
        check(models.MODELS[name], shape, monkeypatch)


@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_tangent_below_the_floor(depth: int, displaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There T still takes inner products, not cosines times norms (C8, K2), in the first layer as well."""
    monkeypatch.setattr(general, "by_displacement", lambda *_: displaced)
    kernel = models.network([models.RELU] * depth, (1,) * depth, "average", tangent="both", floor=3.0)
    a = kernel.prepare(np.random.default_rng(0).standard_normal((3, 6, 5, 2)))
    models.check_below_the_floor(kernel, a, kernel.pair(a, a))


@pytest.mark.parametrize("strip_bytes", [1 << 16, 1 << 24])
def test_tangent_below_the_floor_in_strips(strip_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a grid whose norms are folded into the matrices that pool it."""
    monkeypatch.setattr(recursion, "block_bytes", lambda xp: strip_bytes)
    check(models.network([models.RELU] * 2, (3, 2), tangent="both", floor=2.0), (18, 20, 1), monkeypatch)


@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-12])
def test_tangent_of_images_that_are_nearly_zero(
    scale: float, displaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small a norm is, no factor overflows; against an image of ordinary size T is half the inner product of
    patches and what B is of patches at right angles (C8, K2)."""
    monkeypatch.setattr(general, "by_displacement", lambda *_: displaced)
    kernel = models.network([models.RELU], (1,), "average", tangent="both", patch=1)
    X = models.busy_images(2, (8, 8, 2), dtype=np.float32)
    small, other = (X[0] * np.float32(scale)).astype(np.float32), X[1]
    a, b = kernel.prepare(small[None], pool="a"), kernel.prepare(other[None], pool="b")
    rf, ntk = kernel.pair(a, b)[:, 0, 0]
    x, y = small.astype(float), other.astype(float)
    wanted = (np.linalg.norm(x, axis=2) * np.linalg.norm(y, axis=2)).sum() / np.pi
    tolerance = max(1e-5 * wanted, 1e-42)
    assert abs(rf - wanted) <= tolerance
    assert abs(ntk - wanted - (x * y).sum() / 2) <= tolerance


@pytest.mark.parametrize("name", ["exp/exp, average, periodic", "relu both, gaussian, same", "GAP, exp, 2"])
def test_blocks_of_few_pairs_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that covers parts of both sides places pairs, and pairs of one sample, where they belong."""
    monkeypatch.setattr(displacements, "_LEAST_BLOCK_BYTES", 1)
    monkeypatch.setattr(displacements, "block_bytes", lambda xp: 4 * 8 * 64)
    check(models.MODELS[name], (8, 8, 1), monkeypatch)


def test_few_displacements_go_one_by_one() -> None:
    """Without pooling displacement 0 is all, small last windows need few; wide ones and global means need most."""

    def few(name: str) -> bool:
        kernel = models.MODELS[name]
        return general.by_displacement(kernel.network((32, 32, 3)), bool(kernel.tangent), 4, 3)

    assert few("no pooling, relu both")
    assert few("four layers, average")
    assert few("exp/exp, strided, reference")
    assert not few("exp/exp 2-5")
    assert not few("relu NTK 2-5")


def test_symmetric_blocks_are_symmetric_to_the_last_bit() -> None:
    kernel = models.MODELS["no pooling, relu both"]
    a = kernel.prepare(models.images(4, (9, 7, 2), dtype=np.float32))
    rf, ntk = kernel.pair(a, a)
    np.testing.assert_array_equal(rf, rf.T)
    np.testing.assert_array_equal(ntk, ntk.T)


DEVICE = SimpleNamespace(asarray=np.asarray, ascontiguousarray=np.ascontiguousarray)
"""Enough of a device's array library to count with."""


def on_device(kernel: Convolutional, shape: tuple[int, int, int], dtype: type) -> list[Engine]:
    chosen = kernel.network(shape[:2]), bool(kernel.tangent), DEVICE, np.dtype(dtype), shape[2]
    return [Recursion(*chosen), Displacements(*chosen)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", models.MODELS)
def test_scratch_memory_on_a_device_has_a_limit(
    name: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way blocks are as large as a gigabyte of scratch memory allows, whatever the sides of a tile."""
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 40)
    for engine in on_device(models.MODELS[name], (32, 32, 3), dtype):
        assert engine.pairs_per_block > 1
        for sides in ((128, 128), (16384, 1), (1, 16384), (5, 3)):
            assert engine.cost(*sides).scratch_bytes <= 1 << 30


@pytest.mark.parametrize("free", [1 << 29, 1 << 16])
def test_scratch_memory_on_a_device_leaves_half_of_what_is_free(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to blocks of one pair, which are taken wherever they fit or not."""
    monkeypatch.setattr(device, "free_bytes", lambda: free)
    for name in ("even patches", "relu NTK 2-5", "poly2/exp 2-5"):
        for engine in on_device(models.MODELS[name], (32, 32, 3), np.float32):
            assert engine.cost(128, 128).scratch_bytes <= free // 2 or engine.pairs_per_block == 1


def test_uniform_weights_are_found_without_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images: all pairs of positions are counted, and not held, where only a cost is asked for."""
    monkeypatch.setattr(np, "kron", None)
    mean = models.MODELS["GAP, exp, 2"]
    for kernel, uniform in ((mean, True), (models.MODELS["no pooling, relu both"], False)):
        network = kernel.network((96, 96))
        one = Recursion(network, False, np, np.dtype(np.float32), 3)
        assert (one.uniform is not None) == uniform
        assert (one.cost(2, 2).scratch_bytes > 96**4 * 4) or uniform
        assert "_weights" not in vars(one)
    assert Recursion(mean.network((4, 5)), False, np, np.dtype(np.float32), 1).uniform == pytest.approx(
        1 / 20**2
    )
