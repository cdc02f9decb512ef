"""Nystrom layers and spherical k-means on one core.

Features: two layers on images of 32 x 32 x 3 in float32, CIFAR-10's where MEGAGRAM_DATA names a folder that has
them, else blurred noise; the operations of its products of matrices alone, in the time of everything, against the
rate of single-precision products as large as the second layer's, in the same run.
k-means, on patches of blurred noise: until the objective that scikit-learn's MiniBatchKMeans ends at, on the
same patches, with the centroids of both normalised.
"""

from __future__ import annotations

import os
import time

import common
import numpy as np
from workload import convolutional

from kernels.features.ckn import NystromCKN
from kernels.features.spherical_kmeans import spherical_kmeans
from kernels.patches import extract_patches
from kernels.registry import from_description
from pipelines import datasets

RATE_TARGET = 0.85
K_MEANS_TARGET = 1.0
REPEATS = 3
SHAPE = (32, 32, 3)
CENTROIDS = 256


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("features", "Feature maps of convolutional kernels on one core", options)
    named, X = images(24 if options.quick else 200)
    for kernel in ("exponential", "relu"):
        for anchors in ((256, 1024), (256, 4096)):
            layers(report, kernel, anchors, named, X)
    k_means(report, 50_000 if options.quick else 1_000_000)
    report.finish()


def layers(report: common.Report, kernel: str, anchors: tuple[int, int], named: str, X: np.ndarray) -> None:
    """One row: how much of the rate of products is kept, on images X that are ``named`` so."""
    described = from_description(convolutional((kernel, 2), (kernel, 5)))
    phi = random_anchors(NystromCKN(described, anchors))
    positions, (m, M), D = ((1024, 225, 4), anchors, 9 * anchors[0])
    products = positions[0] * m * 27 + positions[1] * (m * m + M * D) + positions[2] * M * M
    patches = np.random.default_rng(1).standard_normal((4096, D), dtype=np.float32)
    Z, out = phi.arrays["anchors_2"], np.empty((len(patches), M), np.float32)
    phi.features(X[:2])
    runs = common.interleaved(
        {
            "features": lambda: common.timed(lambda: phi.features(X)),
            "products": lambda: common.timed(lambda: np.matmul(patches, Z.T, out=out)),
        },
        REPEATS,
    )
    ours = 2e-9 * len(X) * products / common.best_cpu(runs["features"])
    bound = 2e-9 * len(patches) * D * M / common.best_cpu(runs["products"])
    report.add(
        f"Nystrom CKN, {kernel}, anchors {anchors[0]} and {anchors[1]:,}, {named}",
        f"{1e3 * common.best_cpu(runs['features']) / len(X):.1f} ms an image, {ours:.0f} GFLOP/s in products",
        target=f"{RATE_TARGET:.0%} of sgemm",
        ratio=f"{ours / bound:.0%} of {bound:.0f} GFLOP/s",
        met=ours >= RATE_TARGET * bound,
    )


def random_anchors(phi: NystromCKN) -> NystromCKN:
    """The map with random anchors and roots: the time is that of learned ones."""
    rng = np.random.default_rng(0)
    arrays, channels = {}, SHAPE[2]
    for number, m in enumerate(phi.anchors, 1):
        Z = rng.standard_normal((m, 9 * channels), dtype=np.float32)
        arrays[f"anchors_{number}"] = Z / np.linalg.norm(Z, axis=1, keepdims=True)
        arrays[f"root_{number}"] = np.eye(m, dtype=np.float32)
        channels = m
    return phi.knowing(arrays)


def images(n: int) -> tuple[str, np.ndarray]:
    """What they are, and n images (n, 32, 32, 3) float32."""
    if os.environ.get("MEGAGRAM_DATA"):
        return "CIFAR-10", datasets.load("cifar10").train.X[:n].astype(np.float32) / np.float32(255)
    return "blurred noise", smooth_images(n)


def smooth_images(n: int) -> np.ndarray:
    """(n, 32, 32, 3) float32: noise, blurred as natural images are."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).standard_normal((n, *SHAPE), dtype=np.float32)
    return gaussian_filter(noise, (0, 1, 1, 0)) + 0.1 * noise


def k_means(report: common.Report, n: int) -> None:
    """Two rows: the time to the peer's objective, and how far the default stopping goes beyond it."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    patches = extract_patches(smooth_images(-(-n // 1024)), 3).reshape(-1, 27)[:n]
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    with threadpool_limits(1):
        peer = common.timed(lambda: MiniBatchKMeans(CENTROIDS, random_state=0).fit(patches).cluster_centers_)
    centroids = peer.value / np.linalg.norm(peer.value, axis=1, keepdims=True)
    wanted = float(
        np.mean([(block @ centroids.T).max(axis=1).mean() for block in np.array_split(patches, 64)])
    )
    after: list[float] = []
    begun = time.process_time()
    found = spherical_kmeans(
        patches, CENTROIDS, 0, progress=lambda *_: after.append(time.process_time() - begun)
    )
    reached = [seconds for seconds, value in zip(after, found.objective, strict=True) if value >= wanted]
    ours = reached[0] if reached else float("inf")
    report.add(
        f"spherical k-means, {n:,} patches of 27, {CENTROIDS} centroids, to the objective {wanted:.5f}",
        f"{ours:.2f} s ({len(after) - len(reached)} updates), MiniBatchKMeans {peer.cpu:.2f} s",
        target=f"{K_MEANS_TARGET:g}x its time",
        ratio=f"{ours / peer.cpu:.2f}x",
        met=ours <= K_MEANS_TARGET * peer.cpu,
    )
    report.add(
        "the same until it stops by itself",
        f"{after[-1]:.1f} s, {len(after) - 1} updates, objective {found.objective[-1]:.5f}",
    )


if __name__ == "__main__":
    main()
