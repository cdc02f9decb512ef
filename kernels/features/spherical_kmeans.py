"""Spherical k-means: unit vectors that stand for unit vectors (SPEC F4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csc_array

from ..arrays import Array, namespace, to_host
from ..base import KernelError, require_float
from ..workspace import Workspace, block_bytes
from .base import Progress, unwatched

_LEAST_NORM = 1e-6
"""Vectors shorter than this times the mean length have no direction (F3)."""
_START_ROWS = 64
"""Rows for each centroid of the part that a larger set of patches begins with."""
_SUM_ROWS = 1 << 14
"""Rows whose sums are formed in the dtype of the patches."""
_START_TOLERANCE = 1e-3
"""Relative increase of the objective on that part below which all patches take over."""
_CANDIDATES = 4096
"""Most patches that are looked at for new places of empty clusters."""


@dataclass(frozen=True)
class SphericalKMeans:
    """Centroids and how good they are.

    centroids: (k, d) unit rows, in the dtype and on the device of the patches.
    objective: mean over the patches of the largest inner product with a centroid, before each update of the
        centroids and after the last; it never decreases, up to rounding.
    """

    centroids: Array
    objective: tuple[float, ...]


def have_direction(norms: Array) -> Array:
    """Which of the vectors with these norms are not as good as zero beside the others; bool, of their shape."""
    return (norms > 0) & (norms >= _LEAST_NORM * norms.mean())


def spherical_kmeans(
    patches: Array,
    k: int,
    seed: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    progress: Progress = unwatched,
) -> SphericalKMeans:
    """k centroids on the sphere, the same for the same patches and seed.

    A patch belongs to the centroid of largest inner product, a centroid is the normalised sum of its members, and
    one without members moves to the patch that is represented worst. The first centroids are patches drawn at
    random, moved on a part of the patches alone where there are many. Memory beside the patches is a block of inner
    products, and two numbers for each patch.

    patches: (n, d) unit rows, float32 or float64. iterations: most updates of the centroids. tolerance: relative
    increase of the objective below which it stops.

    Raises:
        KernelError: fewer patches, or fewer distinct ones, than k.
    """
    require_float(patches)
    n = len(patches)
    require_patches(n, k)
    order = np.random.default_rng(seed).permutation(n)
    centroids = _rows(patches, order[:k])
    if first := start_rows(n, k):
        part = _rows(patches, order[:first])
        centroids = _descend(
            part, centroids, iterations, max(tolerance, _START_TOLERANCE), unwatched
        ).centroids
    found = _descend(patches, centroids, iterations, tolerance, progress)
    if found.distinct is not None:
        raise KernelError(
            f"{k} anchors need as many distinct patches, and there are {found.distinct} to the precision of"
            f" {patches.dtype}: ask for fewer anchors"
        )
    return SphericalKMeans(found.centroids, tuple(found.objective))


def start_rows(count: int, k: int) -> int:
    """How many of so many patches are copied to begin with; 0 where all of them are taken at once."""
    return _START_ROWS * k if count >= 4 * _START_ROWS * k else 0


def require_patches(count: int, k: int) -> None:
    """Raise KernelError for fewer patches than centroids."""
    if count < k:
        raise KernelError(f"{k} anchors need as many patches, and there are {count}: ask for fewer anchors")


@dataclass
class _Descent:
    """Centroids, objective, and the number of distinct patches where they are fewer than the centroids."""

    centroids: Array
    objective: list[float]
    distinct: int | None = None


def _rows(patches: Array, positions: np.ndarray) -> Array:
    return patches[namespace(patches).asarray(np.sort(positions))]


def _descend(
    patches: Array, centroids: Array, iterations: int, tolerance: float, progress: Progress
) -> _Descent:
    """Update centroids (k, d) at most so many times, until the objective stands still."""
    xp = namespace(patches)
    k = len(centroids)
    labels, nearness = xp.empty(len(patches), np.int64), xp.empty(len(patches), patches.dtype)
    found = _Descent(centroids, [])
    for done in range(iterations + 1):
        _assign(patches, found.centroids, labels, nearness)
        now = float(nearness.mean(dtype=np.float64))
        still = done > 0 and now - found.objective[-1] < tolerance * abs(now)
        found.objective.append(now)
        progress(done, iterations, f"spherical k-means, objective {now:.6f}")
        empty = to_host(xp.flatnonzero(xp.bincount(labels, minlength=k) == 0))
        if done == iterations or (still and not len(empty)):
            break
        found.centroids = _updated(found.centroids, _member_sums(patches, labels, k))
        if len(empty) and not _reseed(patches, found.centroids, empty, nearness):
            found.distinct = k - len(empty)
            break
    return found


def _assign(patches: Array, centroids: Array, labels: Array, nearness: Array) -> None:
    """Write each patch's nearest centroid, the first of equals, and its inner product with it."""
    xp = namespace(patches)
    workspace = Workspace(xp, patches.dtype)
    k, d = centroids.shape
    # Every product packs the centroids anew, which is dear where they are long.
    step = max(block_bytes(xp) // (k * patches.dtype.itemsize), 2048 if d >= 512 else 512)
    for start in range(0, len(patches), step):
        part = slice(start, min(start + step, len(patches)))
        rows = patches[part]
        products = xp.matmul(rows, centroids.T, out=workspace.take("products", (len(rows), k)))
        labels[part] = chosen = products.argmax(axis=1)
        nearness[part] = products[xp.arange(len(rows)), chosen]


def _member_sums(patches: Array, labels: Array, k: int) -> Array:
    """(k, d) float64 sums of the patches of each label: blocks in the patches' dtype, in a fixed order."""
    xp = namespace(patches)
    sums = xp.zeros((k, patches.shape[1]), np.float64)
    for start in range(0, len(patches), _SUM_ROWS):
        rows, chosen = patches[start : start + _SUM_ROWS], labels[start : start + _SUM_ROWS]
        if xp is np:
            # One member in every column.
            ends = np.arange(len(rows) + 1)
            members = csc_array((np.ones(len(rows), patches.dtype), chosen, ends), shape=(k, len(rows)))
        else:
            members = (xp.arange(k)[:, None] == chosen).astype(patches.dtype)
        sums += members @ rows
    return sums


def _updated(centroids: Array, sums: Array) -> Array:
    """The sums normalised; members that cancel leave no direction, and their centroid where it is."""
    xp = namespace(sums)
    norms = xp.sqrt((sums * sums).sum(axis=1, keepdims=True))
    some = norms > 0
    return xp.where(some, sums / xp.where(some, norms, 1), centroids).astype(centroids.dtype)


def _reseed(patches: Array, centroids: Array, empty: np.ndarray, nearness: Array) -> int:
    """Move the centroids ``empty`` to the patches of least ``nearness``, each as if those before it were centroids
    already; return how many moved. None moves to a patch that is represented as well as rounding lets it be."""
    xp = namespace(patches)
    represented = 1 - 4 * float(np.finfo(patches.dtype).eps) * math.sqrt(patches.shape[1])
    count = min(len(patches), max(len(empty), _CANDIDATES))
    worst = xp.sort(xp.argpartition(nearness, count - 1)[:count])
    candidates, near = patches[worst], nearness[worst]
    for moved, cluster in enumerate(empty):
        one = int(near.argmin())
        if near[one] > represented:
            return moved
        centroids[int(cluster)] = candidates[one]
        near = xp.maximum(near, candidates @ candidates[one])
    return len(empty)
