"""Spherical k-means: F4, item by item."""

from __future__ import annotations

import types

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import KernelError
from kernels.features import spherical_kmeans as module
from kernels.features.spherical_kmeans import spherical_kmeans


def unit(X: np.ndarray) -> np.ndarray:
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def random_patches(n: int, d: int, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, d))).astype(dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 200),
    st.integers(2, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, np.float64]),
)
def test_the_objective_never_decreases(k, more, d, seed, dtype):
    """F4; also where clusters become empty, and where a part of the patches comes first."""
    patches = random_patches(k + more, d, seed, dtype)
    found = spherical_kmeans(patches, k, seed)
    assert np.diff(found.objective).min(initial=0) >= -8 * np.finfo(dtype).eps
    assert found.centroids.shape == (k, d)
    assert found.centroids.dtype == dtype
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=8 * np.finfo(dtype).eps)


def test_it_ends_where_plain_loops_stand_still():
    """Every centroid is the normalised sum of those that are nearest to it, and none is without members."""
    patches = random_patches(300, 5)
    found = spherical_kmeans(patches, 9, 1, iterations=1000, tolerance=0.0)
    again, objective, empty = reference.spherical_k_means_step(patches, found.centroids)
    np.testing.assert_allclose(again, found.centroids, atol=1e-12)
    assert found.objective[-1] == pytest.approx(objective, abs=1e-12)
    assert not empty


def test_one_update_is_that_of_plain_loops():
    """From patches drawn at random, the first update is F4's."""
    patches = random_patches(200, 4)
    start, once = (spherical_kmeans(patches, 6, 3, iterations=count) for count in (0, 1))
    np.testing.assert_array_equal((start.centroids[:, None] == patches).all(axis=2).sum(axis=1), 1)
    after, objective, _ = reference.spherical_k_means_step(patches, start.centroids)
    np.testing.assert_allclose(once.centroids, after, atol=1e-14)
    assert start.objective == pytest.approx((objective,))
    assert len(once.objective) == 2


def test_it_stops_where_the_objective_stands_still():
    """F4: at the first relative change below 1e-6, and long before the last iteration that is allowed."""
    found = spherical_kmeans(random_patches(300, 5), 9, 1, iterations=1000)
    objective = np.array(found.objective)
    changes = np.diff(objective) / objective[1:]
    assert changes[-1] < 1e-6
    assert (changes[:-1] >= 1e-6).all()
    assert 3 < len(objective) < 100


def test_planted_clusters_are_found():
    """Tight clusters far from each other are told apart, by the part of the patches that comes first as well."""
    rng = np.random.default_rng(5)
    centres = np.eye(4)
    patches = unit(np.repeat(centres, 500, axis=0) + 0.05 * rng.standard_normal((2000, 4)))
    found = spherical_kmeans(patches, 4, 2).centroids
    nearest = found[(centres @ found.T).argmax(axis=1)]
    np.testing.assert_allclose(nearest, centres, atol=0.02)


def test_empty_clusters_move_to_what_is_represented_worst():
    """500 copies of one patch draw nearly all first centroids; each of the four others gets its own in the end."""
    patches = np.concatenate([np.tile(np.eye(5)[0], (500, 1)), np.eye(5)[1:]])
    found = spherical_kmeans(patches, 5, 0)
    np.testing.assert_allclose(np.sort(found.centroids, axis=0), np.sort(np.eye(5), axis=0), atol=1e-15)
    assert found.objective[-1] == 1


def test_a_cluster_moves_to_the_worst_patch_first():
    """One empty cluster goes to the one patch that is farthest from all centroids."""
    centroids = np.array([[1.0, 0.0], [1.0, 0.0]])
    angles = np.array([0.1, 1.2, 0.4])
    patches = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    moved = module._reseed(patches, centroids, np.array([1]), patches @ centroids[0])
    assert moved == 1
    np.testing.assert_array_equal(centroids[1], patches[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_anchors_than_distinct_patches(dtype):
    """The error says how many distinct patches there are."""
    patches = np.repeat(random_patches(7, 3, dtype=dtype), 20, axis=0)
    with pytest.raises(KernelError, match="8 anchors need as many distinct patches, and there are 7"):
        spherical_kmeans(patches, 8, 0)
    assert spherical_kmeans(patches, 7, 0).objective[-1] == pytest.approx(1, abs=1e-6)


def test_fewer_patches_than_anchors():
    with pytest.raises(KernelError, match="8 anchors need as many patches, and there are 7"):
        spherical_kmeans(random_patches(7, 3), 8, 0)


def test_members_that_cancel_leave_their_centroid():
    """A sum of zero has no direction: the centroid stays where it is, a unit vector."""
    patches = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = spherical_kmeans(patches, 1, 0)
    assert abs(found.centroids[0, 0]) == 1
    assert found.objective[-1] == 0


def test_the_same_seed_gives_the_same_centroids():
    patches = random_patches(2000, 6, dtype=np.float32)
    first, again, other = (spherical_kmeans(patches, 5, seed, iterations=3) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.objective == again.objective
    assert not np.array_equal(first.centroids, other.centroids)


def test_blocks_change_nothing_but_rounding(monkeypatch):
    """Cuts of the patches into blocks of products and of sums do not show."""
    patches = random_patches(3000, 6)
    whole = spherical_kmeans(patches, 20, 0)
    monkeypatch.setattr(module, "_SUM_ROWS", 100)
    monkeypatch.setattr(module, "block_bytes", lambda xp: 1)
    parts = spherical_kmeans(patches, 20, 0)
    np.testing.assert_allclose(parts.centroids, whole.centroids, atol=1e-12)


def test_another_array_library_gives_the_same(monkeypatch):
    """Where arrays are not NumPy's, sums by members are products with dense membership; the result is the same."""
    patches = random_patches(500, 4)
    expected = spherical_kmeans(patches, 10, 0)
    other = types.ModuleType("other")
    other.__getattr__ = lambda name: getattr(np, name)  # type: ignore[method-assign]
    monkeypatch.setattr(module, "namespace", lambda *arrays: other)
    monkeypatch.setattr(module, "block_bytes", lambda xp: 1 << 20)
    found = spherical_kmeans(patches, 10, 0)
    np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-12)


def test_float32_reaches_the_objective_of_float64():
    patches = random_patches(4000, 8, dtype=np.float32)
    single = spherical_kmeans(patches, 16, 0)
    double = spherical_kmeans(patches.astype(np.float64), 16, 0)
    assert single.objective[-1] == pytest.approx(double.objective[-1], rel=1e-3)


def test_progress_is_shown_and_patches_are_left_alone():
    patches = random_patches(400, 4)
    copy = patches.copy()
    seen: list[tuple[int, int]] = []
    found = spherical_kmeans(
        patches, 3, 0, iterations=5, progress=lambda done, total, _: seen.append((done, total))
    )
    np.testing.assert_array_equal(patches, copy)
    assert seen == [(done, 5) for done in range(len(found.objective))]


def test_integers_are_refused():
    with pytest.raises(KernelError, match="float32 or float64"):
        spherical_kmeans(np.ones((5, 2), np.int64), 1, 0)
