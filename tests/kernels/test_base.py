"""Composition of kernels (K14) and prepared blocks."""

from __future__ import annotations

import numpy as np
import pytest
from contracts import KernelContract

from kernels.base import KernelError, Prepared, Product, Scaled, Sum, same_rows
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct

EXP = DotProduct("exponential", sigma=0.6)
POLY = DotProduct("polynomial", degree=2)
NTK = FullyConnected("ntk", 3)
X = np.random.default_rng(0).standard_normal((6, 5))


class TestSum(KernelContract):
    kernel = EXP + 0.25 * NTK
    different = EXP + 0.5 * NTK
    shape = (5,)


class TestProduct(KernelContract):
    kernel = EXP * POLY * NTK
    different = EXP * POLY
    shape = (5,)


class TestScaled(KernelContract):
    kernel = 3 * NTK
    different = 4 * NTK
    shape = (5,)


class TestSumOfImageKernels(KernelContract):
    kernel = Convolutional((Layer(3, "relu"),), tangent=True) + Convolutional((Layer(2, "relu"),))
    different = Convolutional((Layer(3, "relu"),)) + Convolutional((Layer(2, "relu"),))
    shape = (4, 5, 2)


def test_composition_is_pointwise() -> None:
    combined = 2.0 * (EXP + POLY) * NTK
    expected = 2.0 * (EXP.gram(X) + POLY.gram(X)) * NTK.gram(X)
    np.testing.assert_allclose(combined.gram(X), expected, rtol=1e-13)


def test_sums_and_products_are_flat() -> None:
    """Terms of a sum of sums stand side by side, whichever way it was written."""
    assert (EXP + POLY) + NTK == EXP + (POLY + NTK) == Sum((EXP, POLY, NTK))
    assert Product((EXP, POLY, NTK)) == (EXP * POLY) * NTK


def test_terms_share_what_they_prepare() -> None:
    """Rows and norms are stored once, not once for each term."""
    prepared = (EXP + POLY + NTK).prepare(X)
    assert prepared.nbytes == EXP.prepare(X).nbytes
    assert len(prepared.arrays) == 2
    apart = (EXP + DotProduct("linear", floor=1e-3)).prepare(X)
    assert len(apart.arrays) == 4


def test_blocks_of_other_terms_are_refused() -> None:
    """Protects from terms that would take each other's blocks, of equal shapes, by their place in the sum."""
    plain, floored = DotProduct("square"), DotProduct("square", floor=0.5)
    a = (plain + floored).prepare(np.ones((2, 3)))
    with pytest.raises(KernelError, match="prepare them with this kernel"):
        (floored + plain).pair(a, a)
    (2.0 * (plain + floored)).pair(a[:1], a)


def test_weights_are_numbers_that_are_not_negative() -> None:
    assert (2 * EXP).fingerprint == Scaled(EXP, 2.0).fingerprint == Scaled(EXP, 2).fingerprint  # type: ignore[arg-type]
    np.testing.assert_array_equal((0 * EXP).gram(X), np.zeros((6, 6)))
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(KernelError, match="weight"):
            Scaled(EXP, weight)


def test_what_cannot_be_combined() -> None:
    images = Convolutional((Layer(3, "relu"),))
    with pytest.raises(KernelError, match="cannot mix"):
        _ = EXP + images
    with pytest.raises(KernelError, match="one output"):
        _ = EXP * FullyConnected("both", 3)
    with pytest.raises(KernelError, match="one output"):
        Scaled(FullyConnected("both", 3), 2.0)
    with pytest.raises(KernelError, match="at least one term"):
        Sum(())


def test_revision_of_a_term_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a sum are as old as its oldest term."""
    before = (EXP + POLY).fingerprint
    monkeypatch.setattr(DotProduct, "revision", DotProduct.revision + 1)
    assert (DotProduct("exponential", sigma=0.6) + POLY).fingerprint != before


def test_same_rows() -> None:
    """K13: the same sample is an equal row id of the same pool, wherever it stands."""
    a = Prepared({}, np.array([3, 5, 8]), "pool")
    b = Prepared({}, np.array([8, 1, 3]), "pool")
    i, j = same_rows(a, b)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 2), (2, 0)]
    assert len(same_rows(a, Prepared({}, b.rows, "another"))[0]) == 0


def test_prepared_blocks() -> None:
    prepared = EXP.prepare(X, np.arange(10, 16), "pool")
    parts = list(prepared.blocks(4))
    assert [len(part) for _, part in parts] == [4, 2]
    np.testing.assert_array_equal(parts[1][1].rows, [14, 15])
    np.testing.assert_array_equal(parts[1][1].arrays["unit"], prepared.arrays["unit"][4:])
    assert parts[0][1].pool == "pool"


def test_row_ids_do_not_repeat() -> None:
    with pytest.raises(KernelError, match="repeat"):
        EXP.prepare(X, np.zeros(6, np.int64))
