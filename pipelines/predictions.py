"""Predictions of a fitted model for new samples, however many: slab by slab, tiles or features computed as they are
multiplied."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernels.arrays import Array, namespace, to_host
from kernels.base import Prepared

from . import features, leases, operators, speed
from .explicit import mapfiles
from .explicit.featuresource import StreamedFeatures
from .files import disk_errors
from .model import Expansion, LinearModel, Model
from .pools import axis_of
from .products import SQUARE, Progress, in_turn, unwatched, write_sums
from .recomputed import RecomputedTiles
from .samples import Preprocessed
from .site import Site
from .stores import FeatureStore, PoolStore

SLAB_BYTES = 2**28
"""Samples that lie on the disk at a time: prepared ones, or raw ones where features are streamed."""

PART_BYTES = 2**26
"""Features that are converted to float64 and multiplied at a time."""

PROBE_SAMPLES = 8


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

    root: where the training samples of an expansion were prepared. progress: called with the samples done, and all
    of them. The same samples get the same bits with any number of workers.

    Raises:
        StoreError: what the model needs is gone (see ``Expansion.store``) or damaged.
        NumericalError: a value is not finite.
    """
    state = None
    if model.preprocessing.fitted:
        state = site.path("state").with_suffix(".npz")
        with disk_errors(state.parent):
            np.savez(state, allow_pickle=False, **model.state)
    if isinstance(model, LinearModel):
        yield from _linear(model, X, state, site, progress)
    else:
        assert isinstance(model, Expansion)
        yield from _expanded(model, X, state, model.store(root), site, progress)


def seconds(model: Model, n: int, root: Path) -> float:
    """What predicting n samples would take one core, measured on a few random ones.

    Raises:
        StoreError: what the model needs is gone.
    """
    shape = model.sample_shape(model.kernel)
    if isinstance(model, Expansion):
        store = model.store(root)
        # Whole tiles are computed, whatever few of their columns belong to training samples.
        width = min(len(np.unique(model.rows // store.side)) * store.side, store.rows)
        return n * width / speed.entries_per_second(model.kernel, shape, model.dtype, 0.1)
    speed.sample(model.kernel, shape, model.dtype, 1)  # what is loaded, compiled or allocated once
    started = time.perf_counter()
    speed.sample(model.kernel, shape, model.dtype, PROBE_SAMPLES)
    return n * (time.perf_counter() - started) / PROBE_SAMPLES


def _expanded(
    model: Expansion, X: np.ndarray, state: Path | None, store: FeatureStore, site: Site, progress: Progress
) -> Iterator[tuple[slice, np.ndarray]]:
    like = _like(model, X[:1])
    # Whole squares of tiles: what is summed in which order depends on the kernel alone.
    square = max(1, SQUARE // store.side) * store.side
    with leases.Lease(store.path):
        for rows, told in _slabs(len(X), square, like.nbytes, progress):
            folder = site.path("samples")
            prepared = _prepare(model, X[rows], folder, like, state, store.side, site)
            tiles = RecomputedTiles.of(model.kernel, prepared, store.path, model.dtype, site.memory_bytes)
            count = np.arange(rows.stop - rows.start)
            yield rows, operators.predict(tiles, count, model.rows, model.alpha, site, told)
            shutil.rmtree(folder, ignore_errors=True)


def _slabs(n: int, multiple: int, sample_bytes: int, progress: Progress) -> Iterator[tuple[slice, Progress]]:
    """Slabs of a multiple of ``multiple`` samples, of at most ``SLAB_BYTES`` where that can be, and their progress."""
    step = max(1, SLAB_BYTES // (multiple * sample_bytes)) * multiple
    for start in range(0, n, step):
        count = min(step, n - start)

        def told(done: int, total: int, start: int = start, count: int = count) -> None:
            progress(start + count * done // total, n)

        yield slice(start, start + count), told


def _like(model: Model, X: np.ndarray) -> Prepared:
    """One prepared sample, to learn shapes from."""
    one = model.preprocessing.apply(X, model.state, model.dtype)
    return model.kernel.prepare(one.reshape(1, *model.sample_shape(model.kernel)))


def _prepare(
    model: Expansion, X: np.ndarray, folder: Path, like: Prepared, state: Path | None, side: int, site: Site
) -> Path:
    """Samples in a feature store of their own, in blocks of as many as those of the training samples; its path."""
    source = _new_pool(X, folder)
    store = FeatureStore.open_or_create(folder, source.description, axis_of(X), like, side)
    job = features.FeatureJob(
        _preprocessed(model, source, state),
        str(store.path),
        json.dumps(model.kernel_description, sort_keys=True),
    )
    features.fill(job, store, range(store.block_count), site.workers, features.silent, "preparing")
    return store.path


def _new_pool(X: np.ndarray, folder: Path) -> PoolStore:
    # A name that no pool has: none of these samples is one of the training samples.
    described = {"pool": {"new": folder.name, "of": folder.parent.name}}
    return PoolStore.materialise(folder, described, axis_of(X), X)


def _preprocessed(model: Model, source: PoolStore, state: Path | None) -> Preprocessed:
    return Preprocessed(
        str(source.path),
        model.dtype,
        json.dumps(model.preprocessing.describe()),
        model.scale,
        None if state is None else str(state),
    )


@dataclass(frozen=True)
class Scoring:
    """What a worker needs for the scores of a block of samples; small.

    weights: path of (width, t) float64. out: a path that each block's number is appended to.
    """

    source: StreamedFeatures
    weights: Path
    out: Path


@dataclass(frozen=True)
class Block:
    """A task: a block of features by its number."""

    number: int


def score(block: Block, job: Scoring) -> None:
    """Multiply a block's features by the weights and write the scores, one file; runs on a worker."""
    write_sums(block, job, [_product(job.source.block(block.number), np.load(job.weights, mmap_mode="r"))])


def _product(phi: Array, weights: np.ndarray) -> np.ndarray:
    """phi @ weights (n, t) in float64, on the device where phi is, a few samples at a time."""
    xp = namespace(phi)
    w = xp.asarray(weights)
    step = max(1, PART_BYTES // w[:, 0].nbytes)
    out = [to_host(phi[k : k + step].astype(np.float64) @ w) for k in range(0, len(phi), step)]
    return np.concatenate(out)


def _linear(
    model: LinearModel, X: np.ndarray, state: Path | None, site: Site, progress: Progress
) -> Iterator[tuple[slice, np.ndarray]]:
    feature_map, learned = model.feature_map, None
    shape = model.sample_shape(feature_map)
    if feature_map.learned:
        # A copy that belongs to this site: a worker sets aside what it finds damaged.
        learned = site.path("map")
        mapfiles.write(learned, feature_map)
    weights = site.save("weights", np.asarray(model.weights, np.float64))
    side = features.block_side(feature_map, shape, model.dtype)
    for rows, told in _slabs(len(X), side, X[:1].nbytes, progress):
        folder = site.path("samples")
        samples = _preprocessed(model, _new_pool(X[rows], folder), state)
        source = StreamedFeatures.of(feature_map, samples, learned, shape, rows.stop - rows.start)
        blocks = [Block(k) for k in range(-(-source.shape[0] // side))]
        job = Scoring(source, weights, site.path("scores"))
        scores = np.empty((source.shape[0], model.weights.shape[1]))
        for number, (_, values) in enumerate(in_turn(score, blocks, job, site)):
            scores[number * side : (number + 1) * side] = values.reshape(-1, scores.shape[1])
            told(number + 1, len(blocks))
        yield rows, scores
        shutil.rmtree(folder, ignore_errors=True)
