"""Predictions of a fitted model for new samples, however many: slab by slab, tiles computed as they are multiplied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kernels.base import Prepared

from . import features, leases, operators
from .model import Model
from .pools import axis_of, kernel_shape
from .products import SQUARE, Progress, unwatched
from .recomputed import RecomputedTiles
from .site import Site
from .stores import FeatureStore, PoolStore, disk_errors

SLAB_BYTES = 2**28
"""Prepared samples that lie on the disk at a time."""


def predict(
    model: Model, X: np.ndarray, root: Path, site: Site, progress: Progress = unwatched
) -> np.ndarray:
    """(n, t) float64 scores of samples X (n, ...) as the source has them, all at once.

    Raises:
        DataError: X cannot be used (see ``Model.check``).
        StoreError, NumericalError: as ``slabs``.
    """
    return np.concatenate([scores for _, scores in slabs(model, model.check(X, "X"), root, site, progress)])


def slabs(
    model: Model, X: np.ndarray, root: Path, site: Site, progress: Progress = unwatched
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, scores (k, t) float64) for checked samples X (n, ...), in order; neither memory nor disk grows
    with n.

    root: where the training samples were prepared. progress: called with the samples done, and all of them. The same
    samples get the same bits with any number of workers.

    Raises:
        StoreError: the training samples' store is gone (see ``Model.store``), or a block of it is damaged.
        NumericalError: a value is not finite.
    """
    store = model.store(root)
    state = None
    if model.preprocessing.fitted:
        state = site.path("state").with_suffix(".npz")
        with disk_errors(state.parent):
            np.savez(state, allow_pickle=False, **model.state)
    like = _like(model, X[:1])
    # Whole squares of tiles: what is summed in which order depends on the kernel alone.
    square = max(1, SQUARE // store.side) * store.side
    step = max(1, SLAB_BYTES // (square * like.nbytes)) * square
    with leases.Lease(store.path):
        for start in range(0, len(X), step):
            rows = slice(start, min(start + step, len(X)))
            count = rows.stop - rows.start

            def told(done: int, total: int, start: int = start, count: int = count) -> None:
                progress(start + count * done // total, len(X))

            folder = site.path("samples")
            prepared = _prepare(model, X[rows], folder, like, state, store.side, site)
            tiles = RecomputedTiles.of(model.kernel, prepared, store.path, model.dtype, site.memory_bytes)
            yield rows, operators.predict(tiles, np.arange(count), model.rows, model.alpha, site, told)
            shutil.rmtree(folder, ignore_errors=True)


def _like(model: Model, X: np.ndarray) -> Prepared:
    """One prepared sample, to learn shapes from."""
    one = model.preprocessing.apply(X, model.state, model.dtype)
    return model.kernel.prepare(one.reshape(1, *kernel_shape(model.kernel.inputs, one.shape[1:])))


def _prepare(
    model: Model, X: np.ndarray, folder: Path, like: Prepared, state: Path | None, side: int, site: Site
) -> Path:
    """Samples in a feature store of their own, in blocks of as many as those of the training samples; its path."""
    axis = axis_of(X)
    # A name that no pool has: none of these samples is one of the training samples.
    described = {"pool": {"new": folder.name, "of": folder.parent.name}}
    source = PoolStore.materialise(folder, described, axis, X)
    store = FeatureStore.open_or_create(folder, described, axis, like, side)
    job = features.FeatureJob(
        str(source.path),
        str(store.path),
        model.dtype,
        tuple(model.preprocessing.describe()),
        model.scale,
        None if state is None else str(state),
        json.dumps(model.kernel_description, sort_keys=True),
    )
    features.fill(job, store, range(store.block_count), site.workers, features.silent, "preparing")
    return store.path
