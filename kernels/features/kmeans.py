"""Clusters of vectors: their means as landmarks of kernels of vectors."""

from __future__ import annotations

import numpy as np

from ..arrays import Array, namespace
from ..base import Kernel, KernelError, Product, Scaled, Sum
from ..dot_product import HomogeneousKernel
from .base import Progress, unwatched
from .spherical_kmeans import have_direction, spherical_kmeans

FLATTENING = 10.0
"""A sphere of this many times the largest length is nearly flat where the vectors are."""


def means(kernel: Kernel, X: Array, number: int, seed: int, progress: Progress = unwatched) -> Array:
    """Means (number, d) of clusters of vectors X (n, d).

    Of a homogeneous kernel, |x| |y| kappa(cos(x, y)) and products and sums of such, a landmark's direction alone
    matters: the clusters are those of spherical k-means (F4) on the vectors' directions, those as good as zero left
    out, and the means have the mean length. For any other kernel distances matter, and spherical k-means is Euclidean
    k-means where the sphere is nearly flat: beside the vectors stands a constant, ten times the largest length, so
    that angles are distances, and normalised sums are means, to about one percent.

    Raises:
        KernelError: fewer vectors that have a direction than ``number``.
    """
    xp = namespace(X)
    norms = xp.sqrt((X.astype(np.float64) ** 2).sum(axis=1))
    if not _homogeneous(kernel):
        radius = FLATTENING * float(norms.max()) or 1.0
        lifted = xp.concatenate((X.astype(np.float64), xp.full((len(X), 1), radius)), axis=1)
        lifted /= xp.sqrt(norms**2 + radius**2)[:, None]
        centroids = _centroids(lifted, number, seed, progress)
        return (radius * centroids[:, :-1] / centroids[:, -1:]).astype(X.dtype)
    kept = have_direction(norms)
    if int(kept.sum()) < number:
        raise KernelError(
            f"landmarks must be at most {int(kept.sum())}, the number of samples among {len(X)} candidates whose "
            f"norm is not as good as zero, got {number}"
        )
    unit = X[kept] / norms[kept, None].astype(X.dtype)
    centroids = _centroids(unit, number, seed, progress)
    return (centroids * norms[kept].mean()).astype(X.dtype)


def _centroids(unit: Array, number: int, seed: int, progress: Progress) -> Array:
    try:
        return spherical_kmeans(unit, number, seed, progress=progress).centroids
    except KernelError as error:
        raise KernelError(f"landmarks by k-means: {error}") from None


def _homogeneous(kernel: Kernel) -> bool:
    if isinstance(kernel, Sum | Product):
        return all(map(_homogeneous, kernel.terms))
    return _homogeneous(kernel.term) if isinstance(kernel, Scaled) else isinstance(kernel, HomogeneousKernel)
