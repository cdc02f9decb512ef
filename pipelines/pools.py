"""From an experiment's ``[data]`` to ordered pools, index sets over them, and what names them in a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import datasets
from .errors import DataError, ExperimentError
from .experiment import Data, Experiment, RandomRows
from .precomputed import sizes
from .preprocessing import Preprocessing
from .shifts import with_copies, with_copies_of
from .stores import Axis
from .tiles import Grid


@dataclass(frozen=True)
class Split:
    """Index sets of an experiment: increasing int64 row ids.

    train, validation: rows of the pool. test: rows of the pool, or of the source's own test set.
    samples, shifts: of a pool with moved copies, how many samples are not moved, and how many copies each of them
    has; training rows hold all copies of their samples, the other sets none.
    """

    train: np.ndarray
    validation: np.ndarray | None
    test: np.ndarray | None
    test_in_pool: bool
    samples: int = 0
    shifts: int = 0

    @property
    def pool_rows(self) -> np.ndarray:
        """All rows of the pool that the experiment touches, trained again on validation rows or not."""
        rows = fit_rows(self)
        return rows if self.test is None or not self.test_in_pool else _joined(rows, self.test)

    def with_copies(self, samples: int, shifts: int) -> Split:
        """The split of a pool of so many samples, once it has been given copies of them."""
        train = with_copies_of(self.train, samples, shifts)
        return replace(self, train=train, samples=samples, shifts=shifts)


@dataclass(frozen=True)
class Pools:
    """The samples of an experiment, resolved: ordered pools, the split, preprocessing, addresses' parts.

    turned: degrees counter-clockwise by which the images of ``test`` are turned: those of the source's own test
    set or, where it has none, all of ``train``.
    shifts: how many moved copies of each image ``train`` has after the images themselves (see ``shifts``).
    """

    dataset: datasets.Dataset
    train: datasets.Pool
    test: datasets.Pool | None
    permutation: int | None
    split: Split
    preprocessing: Preprocessing
    task: str
    warnings: tuple[str, ...]
    turned: int = 0
    shifts: int = 0

    @cached_property
    def pool_description(self) -> dict[str, Any]:
        copies = {"shifts": self.shifts} if self.shifts else {}
        return {**self._samples_description, **copies}

    @property
    def _samples_description(self) -> dict[str, Any]:
        return {"source": self.dataset.identity, "part": "train", "permutation": self.permutation}

    @cached_property
    def test_description(self) -> dict[str, Any]:
        if self.turned and self.dataset.test is None:
            return {**self._samples_description, "turned": self.turned}
        own = {"source": self.dataset.identity, "part": "test", "permutation": None}
        return {**own, "turned": self.turned} if self.turned else own

    @cached_property
    def pool_axis(self) -> Axis:
        return axis_of(self.train.X)

    @cached_property
    def test_axis(self) -> Axis:
        if self.test is None:
            raise DataError(f"{self.dataset.source} has no test set of its own")
        return axis_of(self.test.X)

    @cached_property
    def preprocessing_description(self) -> dict[str, Any]:
        """The steps and, for fitted ones, the digest of what they were fitted on."""
        steps = self.preprocessing.describe()
        fitted: list[Any] = [
            datasets.block_digests(self.train.X[slice(*step["fit_on"])]) for step in steps if "fit_on" in step
        ]
        return {"steps": steps, "scale": self.dataset.scale, "fitted_on": fitted}

    @property
    def test_of(self) -> str:
        """What the test rows are rows of, in words."""
        where = "pool" if self.dataset.test is None else "test set"
        return f"{where}, turned by {self.turned} degrees" if self.turned else where

    @property
    def raw_shape(self) -> tuple[int, ...]:
        return tuple(self.train.X.shape[1:])

    @property
    def sets(self) -> dict[str, np.ndarray | None]:
        """Row ids of training, validation and test set by name."""
        return {"train": self.split.train, "validation": self.split.validation, "test": self.split.test}

    def y(self, rows: np.ndarray, *, test: bool = False) -> np.ndarray:
        """Labels or targets of pool rows, or of rows of the test set."""
        pool = self.test if test else self.train
        if pool is None or pool.y is None:
            raise DataError(f"{self.dataset.source}: no labels")
        return pool.y[rows]


def resolve(experiment: Experiment) -> Pools:
    """Load, check, order and split the data of an experiment.

    Raises:
        DataError: data missing, damaged or of wrong values.
        ExperimentError: the split does not fit the data, or sets overlap.
    """
    data = experiment.data
    kernel = experiment.kernel_object
    side = kernel.tile_side(experiment.gram.dtype)
    dataset = _load(experiment)
    if dataset.train.y is None:
        raise DataError(f"{dataset.source} is unlabelled: give data.y, one label or target per sample")
    task = experiment.task or datasets.infer_task(dataset.train.y)
    datasets.validate(dataset.train, task)
    if dataset.test is not None:
        datasets.validate(dataset.test, task)
        if dataset.test.X.shape[1:] != dataset.train.X.shape[1:]:
            raise DataError(
                f"{dataset.source}: test samples have shape {dataset.test.X.shape[1:]},"
                f" training samples {dataset.train.X.shape[1:]}"
            )
    split = _split(data, dataset, experiment.seed)
    preprocessing = Preprocessing.from_spec(data.preprocess, scale=dataset.scale)
    permutation, shifts = data.permutation, data.shifts or 0
    # A fitted step's range of rows is one of the order that was asked for. A pool with copies keeps that order too:
    # what it trains on then fills whole tiles.
    if not preprocessing.fitted and not shifts:
        permutation, split = _layout(permutation, len(dataset.train.X), split, side)
    train = datasets.order(dataset.train, permutation)
    test = dataset.test
    if data.turn_test is not None:
        test = turned(train if test is None else test, data.turn_test)
        split = replace(split, test_in_pool=False)
    if task == "classification" and train.y is not None:
        datasets.require_two_classes(train.y[split.train], "training")
    if preprocessing.fitted:
        preprocessing = _fitted_on(preprocessing, split.train, len(train))
    shape = preprocessing.output_shape(tuple(train.X.shape[1:]))
    kernel.check(kernel_shape(kernel.inputs, shape))
    short = _short_samples(train, experiment)
    if shifts:
        split = split.with_copies(len(train), shifts)
        train = with_copies(train, shifts)
    warnings = (*dataset.warnings, *_duplicates(train, test, split), *short)
    turn = data.turn_test or 0
    return Pools(dataset, train, test, permutation, split, preprocessing, task, warnings, turn, shifts)


def _fitted_on(preprocessing: Preprocessing, rows: np.ndarray, n: int) -> Preprocessing:
    """The steps, those that do not say what they are fitted on to be fitted on the training rows.

    n: samples of the pool, copies left out.

    Raises:
        ExperimentError: training rows are not one range, or ``fit_on`` lies outside the pool.
    """
    first, last = int(rows[0]), int(rows[-1]) + 1
    if last - first != len(rows):
        raise ExperimentError(
            "data.preprocess: a fitted step needs fit_on = [start, stop] where the training rows are not one range"
        )
    preprocessing = preprocessing.with_default_fit_range(first, last)
    for step in preprocessing.describe():
        if "fit_on" in step and step["fit_on"][1] > n:
            raise ExperimentError(
                f"data.preprocess: fit_on = {step['fit_on']} lies outside the pool of {n} samples"
            )
    return preprocessing


def turned(pool: datasets.Pool, degrees: int) -> datasets.Pool:
    """The pool with its images turned counter-clockwise by 90, 180 or 270 degrees.

    Raises:
        ExperimentError: the samples are vectors, or images that are not square.
    """
    shape = pool.X.shape[1:]
    if len(shape) != 3 or shape[0] != shape[1]:
        what = (
            f"images of {shape[0]}x{shape[1]} pixels" if len(shape) == 3 else f"vectors of {shape[0]} numbers"
        )
        raise ExperimentError(
            f"data.turn_test = {degrees} turns square images, but {pool.name} holds {what}: leave it out"
        )
    return replace(pool, X=np.ascontiguousarray(np.rot90(pool.X, degrees // 90, axes=(1, 2))))


def kernel_shape(inputs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sample shape a kernel sees: images are flattened for a kernel of vectors."""
    return (int(np.prod(shape)),) if inputs == "vectors" and len(shape) > 1 else shape


def axis_of(X: np.ndarray) -> Axis:
    """The axis of the samples X (n, ...)."""

    def prefix(rows: int) -> tuple[str, ...]:
        return tuple(datasets.block_digests(X[:rows]))

    return Axis(len(X), prefix(len(X)), prefix)


def _load(experiment: Experiment) -> datasets.Dataset:
    data = experiment.data
    if data.source != "arrays":
        folder = Path(data.folder) if data.folder else None
        return datasets.load(data.source, data_dir=folder, task=experiment.task)
    paths = {key: str(getattr(data, key)) for key in ("X", "y", "X_test", "y_test") if getattr(data, key)}
    if data.X is None:
        return _indices(experiment, paths)
    return datasets.load("arrays", paths=paths, task=experiment.task)


def _indices(experiment: Experiment, paths: dict[str, str]) -> datasets.Dataset:
    """Samples of a precomputed kernel: their indices. Labels come from ``y`` and, for ``cross``, ``y_test``."""
    n, m = sizes(experiment.kernel_object)
    y, labels = datasets.read_labels(paths["y"], "y", task=experiment.task)
    train = datasets.Pool("arrays", np.arange(n, dtype=np.float64)[:, None], y, labels)
    test = None
    if "y_test" in paths and m:
        y_test, _ = datasets.read_labels(paths["y_test"], "y_test", labels, task=experiment.task)
        test = datasets.Pool("arrays/test", np.arange(n, n + m, dtype=np.float64)[:, None], y_test, labels)
    return datasets.Dataset("arrays", train, test, 1.0, (), f"precomputed-{n}")


def _split(data: Data, dataset: datasets.Dataset, seed: int) -> Split:
    n = len(dataset.train.X)
    train = _range("data.train", data.train, n, from_end=False)
    if isinstance(data.validation, RandomRows):
        if data.validation.random >= len(train):
            raise ExperimentError(
                f"data.validation draws {data.validation.random} of the {len(train)} training rows: none would be left"
            )
        drawn = np.random.default_rng(seed).choice(len(train), data.validation.random, replace=False)
        validation: np.ndarray | None = np.sort(train[drawn])
        train = np.delete(train, drawn)
    elif data.validation is None:
        validation = None
    else:
        end = n
        if dataset.test is None and isinstance(data.test, tuple) and data.test[1] == n:
            end = data.test[0]  # the end of the training pool is where the test range begins
        counted = isinstance(data.validation, int)
        validation = _range("data.validation", data.validation, end if counted else n, from_end=True)
    test, in_pool = None, dataset.test is None
    if data.test is not None:
        if dataset.test is not None:
            test = _range("data.test", data.test, len(dataset.test.X), from_end=False)
        elif isinstance(data.test, tuple):
            test = _range("data.test", data.test, n, from_end=False)
        else:
            raise ExperimentError(
                f"data.test = {data.test}: {data.source} has no test set of its own;"
                f" give [start, stop] of its {n} samples, for example [{n - data.test}, {n}]"
            )
    sets = {"train": train, "validation": validation, "test": test if in_pool else None}
    _check_overlap({name: rows for name, rows in sets.items() if rows is not None})
    return Split(train, validation, test, in_pool)


def _range(key: str, value: int | tuple[int, int], n: int, *, from_end: bool) -> np.ndarray:
    if isinstance(value, int):
        start, stop = (n - value, n) if from_end else (0, value)
    else:
        start, stop = value
    if start < 0 or stop > n:
        shown = value if isinstance(value, int) else list(value)
        raise ExperimentError(f"{key} = {shown}, but there are only {n} samples")
    return np.arange(start, stop, dtype=np.int64)


def _check_overlap(sets: dict[str, np.ndarray]) -> None:
    names = list(sets)
    for k, name in enumerate(names):
        for other in names[k + 1 :]:
            common = np.intersect1d(sets[name], sets[other])
            if len(common):
                raise ExperimentError(
                    f"data.{name} and data.{other} overlap in {len(common)} rows"
                    f" ({common[0]} to {common[-1]} of the pool); make the ranges disjoint"
                )


def _layout(permutation: int | None, n: int, split: Split, side: int) -> tuple[int | None, Split]:
    """Choose between a permuted pool and a permuted split of the canonical pool.

    Ridge regression does not care about order. Where the split touches (nearly) all tiles of the
    canonical pool anyway, its index sets are mapped there, so that one matrix serves every permutation;
    a small subset keeps a pool of its own in the permuted order, which touches far fewer tiles.
    """
    if permutation is None:
        return None, split
    order = np.random.RandomState(permutation).permutation(n)

    def mapped(rows: np.ndarray | None) -> np.ndarray | None:
        return None if rows is None else np.sort(order[rows])

    train = mapped(split.train)
    assert train is not None
    there = Split(
        train,
        mapped(split.validation),
        mapped(split.test) if split.test_in_pool else split.test,
        split.test_in_pool,
    )
    if _tiles_touched(there, n, side) <= 1.25 * _tiles_touched(split, n, side):
        return None, there
    return permutation, split


def _tiles_touched(split: Split, n: int, side: int) -> int:
    return int(np.count_nonzero(needed_tiles(Grid(n, n, side, symmetric=True), split)))


def needed_tiles(grid: Grid, split: Split, *, refit: bool = False) -> np.ndarray:
    """Tiles of the pool's matrix that training and evaluation read, as a boolean array over the grid."""
    wanted = np.zeros(grid.shape, bool)
    for training in (split.train, fit_rows(split)) if refit else (split.train,):
        for rows in (training, *evaluation_rows(split)):
            wanted |= grid.mask(rows, training)
    return wanted


def fit_rows(split: Split) -> np.ndarray:
    """Rows that a refit trains on: training and validation rows together, with their copies."""
    if split.validation is None:
        return split.train
    return _joined(split.train, with_copies_of(split.validation, split.samples, split.shifts))


def _joined(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The union of two sets that share no row; NumPy's own takes half a minute for millions."""
    return np.sort(np.concatenate([rows, others]), kind="stable")


def evaluation_rows(split: Split) -> Sequence[np.ndarray]:
    """Rows of the pool on which predictions are made."""
    candidates = (split.validation, split.test if split.test_in_pool else None)
    return [rows for rows in candidates if rows is not None]


def _short_samples(train: datasets.Pool, experiment: Experiment) -> list[str]:
    """Samples of own arrays so short that a kernel, which divides by norms, makes (nearly) nothing of them."""
    floor = max(_floors(experiment.kernel_object.describe()), default=0.0)
    if experiment.data.source != "arrays" or experiment.data.preprocess or not floor:
        return []
    zero, short = datasets.short_samples(train.X, floor)
    n = len(train.X)
    found = []
    if zero:
        verb = "is" if zero == 1 else "are"
        found.append(f"{zero} of {n} samples {verb} all zero: their kernel with any sample is 0 (SPEC K2)")
    if short:
        verb = "has" if short == 1 else "have"
        found.append(
            f"{short} of {n} samples {verb} a norm below {floor:g} and nearly count as zero (SPEC K2); scale the data"
        )
    return found


def _floors(description: Any) -> Iterator[float]:
    """The norms below which the kernels of a description normalise no further."""
    if isinstance(description, dict):
        if isinstance(description.get("floor"), float):
            yield description["floor"]
        description = list(description.values())
    if isinstance(description, list):
        for value in description:
            yield from _floors(value)


def _duplicates(train: datasets.Pool, test: datasets.Pool | None, split: Split) -> list[str]:
    """Samples that stand in the training set and in the validation or test set as well."""
    return datasets.duplicates_across(
        train.X,
        {
            "validation": None if split.validation is None else train.X[split.validation],
            "test": None
            if split.test is None
            else (train.X if split.test_in_pool or test is None else test.X)[split.test],
        },
        split.train,
    )
