"""Products of the rows of arrays, by panels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import arrays
from kernels.arrays import inner_products


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 12), m=st.integers(1, 9), dtype=st.sampled_from(["float32", "float64"]))
def test_panels_are_the_whole_product(n: int, m: int, dtype: str) -> None:
    """Protects the last panel, and an output that is part of another array."""
    rng = np.random.default_rng(n + 100 * m)
    a, b = rng.standard_normal((n, 4)).astype(dtype), rng.standard_normal((m, 4)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "PANEL", 5)
        whole = np.full((n, 2 * m), np.nan, dtype)
        found = inner_products(a, b, whole[:, ::2])
        assert np.shares_memory(found, whole)
        assert np.isnan(whole[:, 1::2]).all()
        np.testing.assert_allclose(found, a @ b.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(inner_products(a, a), a @ a.T, rtol=1e-5, atol=1e-5)
        assert inner_products(a, b).dtype == dtype


@pytest.mark.slow
def test_an_array_with_itself_beyond_openblas_s_buffers() -> None:
    """Protects against the death of the process in NumPy's A @ A.T of so many rows on several threads."""
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="sets the number of threads")
    a = np.random.default_rng(0).standard_normal((20_000, 256))
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        found = inner_products(a, a)
    for i, j in ((0, 0), (0, 19_999), (19_999, 3), (12_345, 12_346)):
        assert found[i, j] == pytest.approx(a[i] @ a[j], rel=1e-12, abs=1e-12)
