"""Anchors of Nystrom layers: unit vectors that stand for the patches of a data set (SPEC F3, F4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import Array, namespace, to_host
from ..base import SamplesError
from ..network import Stage
from ..patches import extract_patches
from .base import Progress, Samples
from .landmarks import draw
from .nystrom_layer import patch_norms
from .spherical_kmeans import have_direction

_IMAGES = 1024
"""Images that patches are drawn from, at least, where there are so many."""
_SHARE = 4
"""No more than one patch of so many in an image is drawn, on average, where there are enough images."""


def images_drawn(count: int, patches: int, positions: int) -> int:
    """How many images out of ``count`` with so many patches each are looked at for a number of patches."""
    return min(count, max(_IMAGES, -(-_SHARE * patches // positions)))


def draw_patches(
    samples: Samples,
    maps: Callable[[Array], Array],
    stage: Stage,
    periodic: bool,
    patches: int,
    rng: np.random.Generator,
    block: int,
    progress: Progress,
) -> Array:
    """Unit patches (k, D) of a layer, drawn uniformly without replacement from images drawn uniformly; k is
    ``patches``, or how many there are that are not as good as zero.

    maps: from images (n, h, w, c) to the layer's input. block: how many images to take at a time. Memory is that of
    the patches, and two numbers for each patch of the images drawn.

    Raises:
        SamplesError: all patches are zero, or an image holds a value that is not finite.
    """
    positions = stage.grid[0] * stage.grid[1]
    images = np.sort(draw(samples.count, images_drawn(samples.count, patches, positions), rng))
    starts = range(0, len(images), block)
    norms = np.empty((len(images), positions))
    for start in starts:
        part = images[start : start + block]
        found = to_host(patch_norms(maps(samples.take(part)), stage.layer, periodic)).reshape(len(part), -1)
        wrong = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(wrong):
            raise SamplesError(
                f"number {part[wrong[0]]} of the samples to learn from has a value that is not finite; "
                "correct it, leave it out, or scale the samples"
            )
        norms[start : start + block] = found
        progress(start + len(part), 2 * len(images), "norms of patches")
    eligible = np.flatnonzero(have_direction(norms))
    if not len(eligible):
        raise SamplesError("nothing can be learned: all patches are zero")
    chosen = np.sort(eligible[draw(len(eligible), patches, rng)])
    ends = np.searchsorted(chosen, (np.arange(len(starts) + 1) * block) * positions)
    collected: Array = None
    for number, start in enumerate(starts):
        here = chosen[ends[number] : ends[number + 1]]
        if not len(here):
            continue
        X = maps(samples.take(images[start : start + block]))
        xp = namespace(X)
        flat = extract_patches(X, stage.layer.patch, periodic).reshape(len(X) * positions, -1)
        if collected is None:
            collected = xp.empty((len(chosen), flat.shape[1]), X.dtype)
        rows = flat[xp.asarray(here - start * positions)]
        length = xp.sqrt(xp.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        collected[ends[number] : ends[number + 1]] = rows / length[:, None]
        progress(len(images) + start + len(X), 2 * len(images), "patches")
    return collected
