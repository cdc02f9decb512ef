"""Pooling matrices (C4, C10)."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.pooling import KINDS, MODES, output_size, pooling_matrix


@pytest.mark.parametrize(
    ("n", "subsamplings", "sizes"),
    [(32, (2, 5), (15, 2)), (32, (2, 2, 2), (15, 6, 2)), (28, (2, 5), (13, 1)), (8, (2, 1), (3, 2))],
)
def test_grid_sizes_of_the_reference_mode(n: int, subsamplings: tuple, sizes: tuple) -> None:
    for t, size in zip(subsamplings, sizes, strict=True):
        n = output_size(n, "gaussian", t, "reference")
        assert n == size


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
    t=st.integers(1, 4),
    p=st.integers(1, 5),
    mode=st.sampled_from(MODES),
)
def test_equals_taps_by_loops(n: int, kind: str, t: int, p: int, mode: str) -> None:
    if output_size(n, kind, t, mode) < 1:
        return
    np.testing.assert_allclose(
        pooling_matrix(n, kind, t, p, mode), reference.pooling_matrix(n, kind, t, p, mode), atol=1e-15
    )


def test_last_window_loses_exactly_one_tap() -> None:
    """C4: with poolfactor = subsampling dividing n, and no renormalisation."""
    sums = pooling_matrix(12, "gaussian", 3, 3, "reference").sum(axis=1)
    np.testing.assert_allclose(sums[:-1], 1, rtol=1e-15)
    taps = np.exp(-(np.arange(-3, 4) ** 2) / 9)
    assert sums[-1] == pytest.approx(1 - taps[-1] / taps.sum(), rel=1e-14)


def test_without_subsampling_the_gaussian_is_symmetric() -> None:
    for mode in ("same", "periodic"):
        H = pooling_matrix(9, "gaussian", 1, 2, mode)
        np.testing.assert_array_equal(H, H.T)


def test_no_pooling_is_the_identity() -> None:
    np.testing.assert_array_equal(pooling_matrix(6, "average", 1, 1, "reference"), np.eye(6))
    np.testing.assert_array_equal(pooling_matrix(6, "strided", 1, 1, "same"), np.eye(6))
