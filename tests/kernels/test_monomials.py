"""Monomials: exact features of polynomial kernels of vectors (F2, K6)."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from contracts import KernelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import Kernel, KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.features.monomials import LARGEST_WIDTH, Monomials
from kernels.registry import feature_map, from_description

KERNELS = [
    DotProduct("linear"),
    DotProduct("linear", scale=2.5),
    DotProduct("square"),
    *(DotProduct("polynomial", degree=q) for q in (1, 2, 3, 4)),
]


class TestCubicMonomials(KernelContract):
    kernel = Monomials(DotProduct("polynomial", degree=3))
    different = Monomials(DotProduct("polynomial", degree=2))
    shape = (5,)


class TestSquareMonomials(KernelContract):
    kernel = Monomials(DotProduct("square"))
    different = Monomials(DotProduct("linear"))
    shape = (5,)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@settings(max_examples=10, deadline=None)
@given(d=st.integers(1, 6), seed=st.integers(0, 1000), floor=st.sampled_from([1e-6, 1.5]))
def test_products_are_the_kernel(kernel: DotProduct, d: int, seed: int, floor: float) -> None:
    """To rounding, of vectors over decades, zeros and those below the floor among them (K2)."""
    kernel = from_description({**kernel.describe(), "floor": floor})  # type: ignore[assignment]
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((7, d)) * 10 ** rng.uniform(-2, 2, (7, 1))
    X[3] = 0
    phi = Monomials(kernel)
    K = kernel.gram(X, X.copy())
    scale = np.sqrt(np.outer(np.diag(K), np.diag(K)))
    assert np.all(np.abs(phi.gram(X) - K) <= 1e-10 * scale)
    assert phi.features(X).shape == (7, phi.width((d,)))


def test_each_monomial_is_there_once() -> None:
    """All d^q products of coordinates, those that are equal taken together: as many as comb(d + q - 1, q)."""
    x = np.array([[0.6, -0.3, 1.1]])
    phi = Monomials(DotProduct("polynomial", degree=3))
    found = phi.features(x)[0]
    assert len(found) == phi.width((3,)) == math.comb(5, 3)
    expected: dict[tuple[int, ...], float] = {}
    norm = np.linalg.norm(x)
    for chosen in product(range(3), repeat=3):
        key = tuple(sorted(chosen))
        expected[key] = expected.get(key, 0.0) + 1
    values = [
        norm * math.sqrt(ways) * math.prod(x[0, i] / norm for i in key) for key, ways in expected.items()
    ]
    np.testing.assert_allclose(np.sort(found), np.sort(values), rtol=1e-13)


def test_work_in_blocks_of_rows_changes_nothing() -> None:
    """More samples than are taken at a time give what each gives alone."""
    X = np.random.default_rng(0).standard_normal((200, 20)).astype(np.float32)
    phi = Monomials(DotProduct("polynomial", degree=3))
    whole = phi.features(X)
    np.testing.assert_array_equal(whole[150:153], phi.features(X[150:153]))


def test_a_width_that_cannot_fit_is_refused() -> None:
    """Before anything is computed, with the width and its bytes."""
    phi = Monomials(DotProduct("polynomial", degree=4))
    width = math.comb(784 + 3, 4)
    assert phi.width((784,)) == width > LARGEST_WIDTH
    with pytest.raises(KernelError, match=f"{width:,} monomials.*{4 * width:,} bytes"):
        phi.check((784,))
    with pytest.raises(KernelError, match="monomials"):
        phi.features(np.zeros((1, 784)))
    Monomials(DotProduct("polynomial", degree=2)).check((784,))


@pytest.mark.parametrize(
    "kernel",
    [DotProduct("exponential", sigma=1.0), FullyConnected("rf", 2), Convolutional((Layer(3, "relu"),))],
    ids=lambda kernel: kernel.kind,
)
def test_other_kernels_are_refused(kernel: Kernel) -> None:
    with pytest.raises(KernelError, match=r"^features\.kernel must be.*'random'"):
        feature_map({"kind": "monomials"}, kernel, seed=0)


def test_cost_bounds_the_memory_of_a_block() -> None:
    """Operations grow with samples; scratch memory with what is there at a time."""
    phi = Monomials(DotProduct("polynomial", degree=3))
    few, many = (phi.feature_cost(n, (30,)) for n in (1000, 2000))
    assert many.operations == 2 * few.operations
    assert many.scratch_bytes - few.scratch_bytes == 1000 * 30 * 4
