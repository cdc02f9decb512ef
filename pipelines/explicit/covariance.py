"""Phi^T Phi and Phi^T Y of explicit features over an index set, and Phi Phi^T where samples are fewer (SPEC F7).

Sums are taken in float64 whatever the features are stored in: a single-precision product of each panel (ssyrk, its
results added in float64) is 1.4 to 1.75 times as fast and leaves a relative error of 1e-7 in the covariance, which the
ridge amplifies; predictions then miss F7's 1e-8 by orders of magnitude. Converting costs 2 % of a product.

A strip of rows is a task. Workers write what strips add; the sums are taken in the order of the strips, which depends
on the rows alone, so that the same bits come out however many workers there are. What is summed so far, and strips
beyond, lie in the site's folder: a later start goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kernels.arrays import Array, namespace, to_host

from .. import tasks
from ..archives import load_arrays, save_arrays
from ..errors import NumericalError
from ..products import Progress, unwatched
from ..site import Site
from ..strided import add_square
from ..tilesource import parts
from .feature_strips import PANEL, Strip, panels, strips
from .featuresource import FeatureSource

STRIP = 16384
"""Samples of a task at most, in whole blocks: writing and adding up what it gives takes a few per cent of its time."""

COLUMNS = 512
"""Columns of the covariance that lie together in a file: only what is above the diagonal is written."""

UNSAVED = 8
"""Strips that are summed before the sum is written in their place."""

HELD_BYTES = 2**31
"""Features of the dual that stay in memory while others stream by."""


@dataclass(frozen=True)
class Moments:
    """What a ridge regression on features needs.

    covariance: (width, width) float64 in Fortran order, Phi^T Phi; what is below the diagonal is undefined. products:
    (width, t) float64, Phi^T Y.
    """

    covariance: np.ndarray
    products: np.ndarray

    @classmethod
    def zeros(cls, width: int, t: int) -> Moments:
        return cls(np.zeros((width, width), order="F"), np.zeros((width, t)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Its values in named pieces, as they are written."""
        pieces = {str(c.start): self.covariance[: c.stop, c] for c in _columns(len(self.covariance))}
        return {"products": self.products, **pieces}

    def add(self, pieces: dict[str, np.ndarray]) -> None:
        """Add what ``arrays`` gave of another."""
        for columns in _columns(len(self.covariance)):
            self.covariance[: columns.stop, columns] += pieces[str(columns.start)]
        self.products[:] += pieces["products"]


def driver_bytes(width: int, t: int) -> int:
    """What this process holds while it sums: the sum, and what a strip adds, which may be computed here as well."""
    return 2 * (width + t) * width * 8


@dataclass(frozen=True)
class Job:
    """What a worker needs; small. rows, Y: paths of the index set and of the (len(rows), t) targets."""

    source: FeatureSource
    rows: Path
    Y: Path
    folder: Path


def moments(
    source: FeatureSource,
    rows: np.ndarray,
    Y: np.ndarray,
    site: Site | None = None,
    progress: Progress = unwatched,
) -> Moments:
    """Phi[rows]^T Phi[rows] and Phi[rows]^T Y in one pass, for Y (len(rows), t) float64.

    rows: an index set of the source. site: where workers are and what was summed is kept; without one this process
    computes. A process holds a block, its panel in float64 and two matrices (width, width) at most. progress: called
    with the strips done, and all of them.

    Raises:
        ChunkLost: a block is missing or damaged.
        NumericalError: a feature is not finite, or its square is not.
    """
    listed, width = strips(source, rows, STRIP), source.shape[1]
    total = Moments.zeros(width, Y.shape[1])
    if site is None:
        for strip in listed:
            total.add(_strip(source, rows, Y, strip).arrays())
            progress(strip.number + 1, len(listed))
    else:
        kept = _Kept(site.folder / f"moments-{_named(rows, Y)}", total)
        kept.resume(len(listed))
        _on_workers(source, rows, Y, listed, kept, site, progress)
    _require_finite(total.covariance.diagonal(), "feature", "its square summed over the training samples")
    return total


def accumulate(strip: Strip, job: Job) -> None:
    """Write what a strip adds, one file; runs on a worker."""
    rows, Y = np.load(job.rows, mmap_mode="r"), np.load(job.Y, mmap_mode="r")
    save_arrays(_file(job.folder, strip.number), _strip(job.source, rows, Y, strip).arrays(), durable=False)


def inner_products(
    source: FeatureSource, rows: np.ndarray, held_bytes: int = HELD_BYTES, progress: Progress = unwatched
) -> np.ndarray:
    """Phi[rows] Phi[rows]^T as (n, n) float64 in Fortran order; what is below the diagonal is undefined.

    held_bytes: of features in float64 that are kept while the ones before them stream by; where all fit, each block
    is read once. This process computes. progress: called with the blocks done, and all of them.

    Raises:
        ChunkLost: a block is missing or damaged.
        NumericalError: a feature is not finite, or an inner product is not.
    """
    K = np.empty((len(rows), len(rows)), order="F")
    left, done = sorted(parts(rows, source.side)), 0
    while done < len(left):
        held: list[tuple[slice, Array]] = []
        earlier, size = tuple(left[:done]), 0
        while done < len(left) and (not held or size < held_bytes):
            found = list(panels(source, rows, (left[done],)))
            held += found
            size += sum(int(X.nbytes) for _, X in found)
            done += 1
        for last, (at, X) in enumerate(held):
            for before, Z in held[: last + 1]:
                K[before, at] = to_host(Z @ X.T)
        for before, Z in panels(source, rows, earlier):
            for at, X in held:
                K[before, at] = to_host(Z @ X.T)
        progress(done, len(left))
    _require_finite(K.diagonal(), "sample", "the inner product of its features")
    return K


def _strip(source: FeatureSource, rows: np.ndarray, Y: np.ndarray, strip: Strip) -> Moments:
    """What the samples of a strip add."""
    width = source.shape[1]
    out = Moments.zeros(width, Y.shape[1])
    C: Array = out.covariance
    for positions, X in panels(source, rows, strip.blocks):
        if isinstance(X, np.ndarray):
            add_square(out.covariance, X.T, lower=False)
        else:
            xp = namespace(X)
            C = xp.asarray(C)
            C += X.T @ X
        # Few columns: the product of their transposes takes half the time.
        out.products[:] += to_host(namespace(X).asarray(Y[positions]).T @ X).T
    return Moments(np.asfortranarray(to_host(C)), out.products)


def _on_workers(
    source: FeatureSource,
    rows: np.ndarray,
    Y: np.ndarray,
    listed: list[Strip],
    kept: _Kept,
    site: Site,
    progress: Progress,
) -> None:
    """Let workers do what is not done, and add it up as it arrives."""
    while kept.done < len(listed):
        workers = site.workers()
        missing = [strip for strip in listed[kept.done :] if not _file(kept.folder, strip.number).exists()]
        near = _Near(missing, kept, 2 * tasks.WINDOW * max(workers.count, 1))
        job = Job(source, site.save("rows", rows), site.save("Y", Y), kept.folder)
        try:
            kept.add_arrived(len(listed))
            for _ in tasks.run(accumulate, near, (job,), workers):
                kept.add_arrived(len(listed))
                progress(kept.done, len(listed))
        finally:
            for path in (job.rows, job.Y):
                path.unlink(missing_ok=True)
    progress(kept.done, len(listed))


@dataclass
class _Kept:
    """A sum of strips as it lies in a folder: the first so many in one file, and files of others.

    total: that they are added to. done: strips that it holds; saved: of these, in the file of the sum.
    """

    folder: Path
    total: Moments
    done: int = field(default=0, init=False)
    saved: int = field(default=0, init=False)

    def resume(self, count: int) -> None:
        """Take up what an earlier start left, of ``count`` strips."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for summed in range(count, 0, -1):
            pieces = load_arrays(self._sum(summed), self.total.arrays())
            if pieces is not None:
                self.total.add(pieces)
                self.done = self.saved = summed
                return

    def add_arrived(self, count: int) -> None:
        """Add the strips whose turn it is and that are there."""
        while self.done < count and (path := _file(self.folder, self.done)).exists():
            pieces = load_arrays(path, self.total.arrays())
            if pieces is None:  # damaged, or another process took it
                path.unlink(missing_ok=True)
                return
            self.total.add(pieces)
            self.done += 1
            if self.done - self.saved == UNSAVED or self.done == count:
                self._save()

    def _save(self) -> None:
        save_arrays(self._sum(self.done), self.total.arrays())
        if self.saved:
            self._sum(self.saved).unlink(missing_ok=True)
        for number in range(self.saved, self.done):
            _file(self.folder, number).unlink(missing_ok=True)
        self.saved = self.done

    def _sum(self, strips_done: int) -> Path:
        return self.folder / f"sum-{strips_done}.npz"


@dataclass
class _Near(tasks.Listed[Strip]):
    """Hands out strips at most ``ahead`` beyond those that are summed, so that few lie on the disk.

    It ends early where the strip whose turn it is was there and is gone: damaged, or taken by another driver.
    """

    kept: _Kept
    ahead: int
    _running: set[int] = field(default_factory=set, init=False)

    def next(self) -> Strip | tasks.Wait | None:
        if self._position == len(self.tasks):
            return None
        due, following = self.kept.done, self.tasks[self._position].number
        if due < following and due not in self._running and not _file(self.kept.folder, due).exists():
            return None
        if following >= due + self.ahead:
            return tasks.WAIT
        self._running.add(following)
        return super().next()

    def done(self, task: Strip) -> None:
        self._running.discard(task.number)


def _file(folder: Path, number: int) -> Path:
    return folder / f"strip-{number}.npz"


def _columns(width: int) -> Iterator[slice]:
    for start in range(0, width, COLUMNS):
        yield slice(start, min(start + COLUMNS, width))


def _named(rows: np.ndarray, Y: np.ndarray) -> str:
    """Of what is summed, beside the source, which names the site's folder."""
    sha = hashlib.sha256(f"{rows.shape} {Y.shape} {STRIP} ".encode())
    sha.update(np.ascontiguousarray(rows).data)
    sha.update(np.ascontiguousarray(Y).data)
    return sha.hexdigest()[:16]


def _require_finite(diagonal: np.ndarray, what: str, value: str) -> None:
    """LAPACK would fail obscurely on other values, or never return."""
    bad = np.flatnonzero(~np.isfinite(diagonal))
    if bad.size:
        raise NumericalError(
            f"{what} {bad[0]}: {value} is not finite ({bad.size} such in all); verify the store, or scale the samples"
        )


def worker_bytes(side: int, width: int, itemsize: int, targets: int) -> int:
    """Bytes that a worker holds at its peak: a block, its panel, a strip's sum and the piece of it being written."""
    return side * width * itemsize + (2 * PANEL + width + COLUMNS + 2 * targets) * width * 8


def disk_bytes(width: int, workers: int) -> int:
    """Bytes on the disk at the peak: sums old and new, and strips that wait for their turn."""
    upper = width * (width + COLUMNS) // 2 * 8
    return (2 + UNSAVED + 2 * tasks.WINDOW * workers) * upper
