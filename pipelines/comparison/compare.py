"""Explicit features beside the exact kernel that they stand for, on some of an experiment's samples (SPEC F6).

The exact matrix comes from stored tiles, which are computed where they are missing. What was found for one map of one
size and seed is a point: a small file that is written once, so that a comparison that is started again goes on from
there, and one with more sizes or seeds adds to it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kernels.arrays import to_host
from kernels.base import Kernel, Prepared, digest
from kernels.features.base import FEATURES, FeatureMap

from .. import device, evaluate, features, gram, leases, operators, provenance, speed, tasks
from ..errors import NumericalError
from ..explicit import mapfiles, maps
from ..fit import SMALL, Place, few_threads, train_targets
from ..matrices import matrix_plans
from ..solvers import Eigen
from ..stores import address
from . import measures, store
from .sizes import Size, seed_of
from .subject import BLOCK, Subject, sample_bytes

ALONE_SECONDS = 10.0
"""What this process would do in less is not worth starting workers for."""

_POOL = "compared"


def compare(subject: Subject, root: Path, place: Place, progress: features.Progress) -> dict[str, Any]:
    """Every size and seed that the subject asks for beside the exact kernel, as a JSON value.

    What an earlier call found is not computed again.

    Raises:
        ChunkLost: something stored is missing or damaged; the next call computes it again.
        DoesNotFit: see ``Subject.check_memory``.
        NumericalError: values that are not finite, or a system that cannot be solved.
    """
    folder = root / store.FOLDER / store.POINTS
    own = digest({"exact": subject.identity})
    named = [(size, made, _point_address(own, made)) for size, made in subject.wanted]
    found = {name: value for name in (own, *(n for _, _, n in named)) if (value := store.read(folder / name))}
    if len(found) < 1 + len(named):
        subject.check_memory()
        with contextlib.ExitStack() as stack, few_threads(subject.counts["train"] < SMALL):
            work = _Work(subject, root, place, progress, lambda path: stack.enter_context(leases.Lease(path)))
            exact = work.exact_matrix()
            if own not in found:
                found[own] = store.keep(folder / own, work.scored(exact))
            for done, (size, made, name) in enumerate(named):
                progress(done, len(named), "feature maps compared")
                if name not in found:
                    found[name] = store.keep(folder / name, work.point(exact, found[own], size, made))
            progress(len(named), len(named), "feature maps compared")
    return {
        "experiment": subject.experiment.name,
        "label": subject.experiment.label,
        "table": subject.experiment.table(),
        "kernel": subject.kernel.describe(),
        "kind": subject.approximation.kind,
        "key": subject.approximation.key,
        "source": subject.pools.dataset.source,
        "counts": subject.counts,
        "repeats": subject.repeats,
        "asked_repeats": subject.request.repeat,
        "dtype": subject.dtype,
        "exact": found[own],
        # One map may be asked for by several sizes, such as 8 and 8x8.
        "points": [{**found[name], "size": list(size.numbers)} for size, _, name in named],
    }


def _point_address(exact: str, made: Kernel) -> str:
    return digest({"exact": exact, "map": made.describe(), "revisions": made.revisions()})


@dataclass(frozen=True)
class _Work:
    """What computes points. use: called with the path of every store that is read."""

    subject: Subject
    root: Path
    place: Place
    progress: features.Progress
    use: Callable[[Path], Any]

    def exact_matrix(self) -> np.ndarray:
        """(train + validation + test, train) values of the exact kernel, of the tiles' dtype."""
        subject, few, split = self.subject, self.subject.pools, self.subject.pools.split
        matrices = matrix_plans(subject.exact, few, subject.kernel, self.root)
        workers, tile_seconds = self._means(sum(matrix.missing_entries for matrix in matrices))
        blocks: dict[str, features.FeatureReport] = {}
        stores: dict[str, gram.GramStore] = {}
        for matrix in matrices:
            test = matrix.role == "test"
            rows = split.test if test else split.pool_rows
            assert rows is not None
            blocks[matrix.role] = features.materialise(
                few, subject.kernel, subject.dtype, self.root, rows, workers,
                test=test, progress=self.progress, use=self.use,
            )  # fmt: skip
            (store,) = gram.open_stores(few, subject.kernel, subject.dtype, self.root, test=test)
            self.use(store.path)
            gram.assemble(
                subject.kernel,
                [store],
                Path(blocks[matrix.role].store),
                Path(blocks["train"].store),
                matrix.needed,
                workers,
                tile_seconds=tile_seconds,
                memory_bytes=self.place.memory_bytes,
                progress=self.progress,
            )
            stores[matrix.role] = store
        parts = []
        for name, rows in few.sets.items():
            if rows is not None:
                source = stores["test" if name == "test" and not split.test_in_pool else "train"]
                parts.append(operators.cross_block(source, rows, split.train, subject.dtype))
        gram.forget()
        return np.concatenate(parts)

    def _means(self, entries: int) -> tuple[tasks.Open, float]:
        """Where missing entries are computed, and how long a tile takes."""
        if not entries:
            return self.place.workers, 1.0
        kernel, dtype = self.subject.kernel, self.subject.dtype
        rate = speed.entries_per_second(kernel, self.subject.shape, dtype, 0.1)
        workers = tasks.Workers if entries < ALONE_SECONDS * rate else self.place.workers
        return workers, kernel.tile_side(dtype) ** 2 / rate

    def point(self, exact: np.ndarray, own: Mapping[str, Any], size: Size, made: Kernel) -> dict[str, Any]:
        """What is found of one map beside the (m, n) exact matrix and its score."""
        subject = self.subject
        n = subject.counts["train"]
        learning = 0.0
        if isinstance(made, FeatureMap) and made.learns:
            whole = subject.whole
            made, folder = maps.learned(
                whole, made, subject.dtype, self.root, whole.split.train, self.place.workers,
                progress=self.progress, use=self.use,
            )  # fmt: skip
            if folder is not None:
                learning = float(mapfiles.describe(folder)["facts"]["seconds"])
        try:
            matrix, seconds = approximate(
                made, self._samples, n, self._rows, address(subject.pools.pool_description)
            )
            errors = measures.errors(exact[:n], matrix[:n])
            scored = self.scored(matrix)
        except NumericalError as error:
            raise NumericalError(f"{subject.approximation.key} = {size.text}: {error}") from None
        sign = 1 if own["metric"] == "accuracy" else -1
        return {
            "seed": seed_of(made),
            "errors": errors,
            **scored,
            "gap": sign * (own["score"] - scored["score"]),
            "learning_seconds": learning,
            "seconds_per_sample": seconds / len(matrix),
            "bytes_per_sample": sample_bytes(made, subject.shape, subject.dtype),
            "made_with": provenance.arithmetic(device.used()),
        }

    @cached_property
    def _samples(self) -> np.ndarray:
        """(train + validation + test, ...) samples as the kernel takes them."""
        few, subject = self.subject.pools, self.subject
        parts = []
        for name, rows in few.sets.items():
            if rows is None:
                continue
            test = name == "test" and not few.split.test_in_pool
            samples, _, _ = features.preprocessed(
                few, subject.dtype, self.root, rows, features.PREPROCESSED_SIDE, self.place.workers,
                test=test, progress=self.progress, use=self.use,
            )  # fmt: skip
            size = (few.test_axis if test else few.pool_axis).rows
            chosen = maps.TrainingSamples(samples, rows, size, subject.kernel.inputs)
            parts.append(chosen.take(np.arange(len(rows))))
        return np.concatenate(parts)

    @property
    def _rows(self) -> np.ndarray:
        """The pool's row ids of these samples; below zero for those of a test set, which is another pool."""
        few = self.subject.pools
        outside = not few.split.test_in_pool
        parts = [
            -1 - rows if name == "test" and outside else rows
            for name, rows in few.sets.items()
            if rows is not None
        ]
        return np.concatenate(parts)

    def scored(self, matrix: np.ndarray) -> dict[str, Any]:
        """How well ridge regression with the (m, n) matrix does, by the ridge that the experiment's rule chooses."""
        subject, solve = self.subject, self.subject.exact.solve
        train = train_targets(subject.pools, subject.pools.split.train)
        n = len(train.y)
        ends = np.cumsum(list(subject.counts.values()))
        held = {
            name: evaluate.Held(subject.truth(name), _Predict(matrix[start:stop]))
            for name, start, stop in zip(list(subject.counts)[1:], ends, ends[1:], strict=False)
        }
        solver = Eigen(jitter=solve.jitter, absolute=solve.absolute, loo=solve.select == "loo")
        K = operators.GramOperator(Dense(matrix[:n]), np.arange(n))
        solutions = solver.solve(solver.factor(K, solve.ridges), train.matrix)
        found = evaluate.evaluate(
            solutions, train, solve.select, validation=held.get("validation"), test=held.get("test")
        )
        part = next(name for name in ("test", "validation", "loo", "gcv") if found[name] is not None)
        metric = found["metric"]
        return {"metric": metric, "part": part, "score": found[part][metric], "ridge": found["ridge"]}


@dataclass(frozen=True)
class _Predict:
    """Scores (m, t) or (r, m, t) of coefficients (n, t) or (r, n, t), from a block (m, n) of the matrix."""

    block: np.ndarray

    def __call__(self, alpha: np.ndarray) -> np.ndarray:
        return np.matmul(self.block.astype(np.float64), alpha)


@dataclass(frozen=True)
class Dense:
    """A symmetric matrix in memory as a source of one tile."""

    matrix: np.ndarray

    @property
    def side(self) -> int:
        return len(self.matrix)

    @property
    def shape(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def symmetric(self) -> bool:
        return True

    def read_tile(self, i: int, j: int) -> np.ndarray:
        return self.matrix


def approximate(
    made: Kernel, X: np.ndarray, n: int, rows: np.ndarray | None = None, pool: str = ""
) -> tuple[np.ndarray, float]:
    """(m, n) values of a map's or random kernel's own matrix between m samples X (m, ...) and the first n of them, and
    the seconds that it took to prepare all of them; of the samples' dtype, on the host.

    rows, pool: as of ``FeatureMap.features``.
    """
    started = time.perf_counter()
    known = np.arange(len(X)) if rows is None else rows
    blocks = [_prepared(made, X, start, min(start + BLOCK, stop), known, pool) for start, stop in ((0, n), (n, len(X)))
              for start in range(start, stop, BLOCK)]  # fmt: skip
    seconds = time.perf_counter() - started
    out = np.empty((len(X), n), X.dtype)
    columns = [block for block in blocks if block.rows[0] < n]
    for i, a in enumerate(blocks):
        placed = device.placed(a)
        for b in columns[: i + 1]:
            values = to_host(made.pair(placed, device.placed(b) if b is not a else placed))
            out[np.ix_(a.rows, b.rows)] = values
            if a.rows[0] < n:
                out[np.ix_(b.rows, a.rows)] = values.T
    return out, seconds


def _prepared(made: Kernel, X: np.ndarray, start: int, stop: int, rows: np.ndarray, pool: str) -> Prepared:
    part, positions = slice(start, stop), np.arange(start, stop)
    if isinstance(made, FeatureMap):
        phi = features.mapped(made, X[part], rows[part], pool)
        return Prepared({FEATURES: to_host(phi)}, positions, _POOL)
    return made.prepare(X[part], positions, _POOL)
