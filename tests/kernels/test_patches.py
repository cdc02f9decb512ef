"""Patch extraction and sums over patches (C2)."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.patches import extract_patches, patch_offsets, sum_over_patches


@pytest.mark.parametrize(
    ("size", "offsets"),
    [(1, [0]), (2, [-1, 0]), (3, [-1, 0, 1]), (4, [-2, -1, 0, 1]), (6, [-3, -2, -1, 0, 1, 2])],
)
def test_even_patches_reach_further_to_the_top_and_left(size: int, offsets: list[int]) -> None:
    assert list(patch_offsets(size)) == offsets


def test_patch_runs_by_row_column_channel() -> None:
    X = np.arange(24.0).reshape(1, 3, 4, 2)
    patches = extract_patches(X, 2)
    np.testing.assert_array_equal(patches[0, 1, 2], X[0, 0:2, 1:3].ravel())
    np.testing.assert_array_equal(patches[0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(
        extract_patches(X, 2, periodic=True)[0, 0, 0], X[0][np.ix_([2, 0], [3, 0])].ravel()
    )


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    c=st.integers(1, 3),
    size=st.integers(1, 7),
    periodic=st.booleans(),
)
def test_sum_over_patches_is_the_gram_of_patches(h: int, w: int, c: int, size: int, periodic: bool) -> None:
    """Against inner products of extracted patches, and against loops; patches may exceed the grid."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, h, w, c))
    B = np.einsum("ijc,kmc->ijkm", x, y)
    expected = reference.patch_gram(B, size, periodic)
    p, q = (extract_patches(z[None], size, periodic)[0].reshape(h * w, -1) for z in (x, y))
    np.testing.assert_allclose((p @ q.T).reshape(B.shape), expected, rtol=1e-12, atol=1e-12)
    stacked = np.stack([B, 2 * B])
    sum_over_patches(stacked, np.empty_like(stacked), size, periodic)
    np.testing.assert_allclose(stacked, [expected, 2 * expected], rtol=1e-12, atol=1e-12)
