"""Data sets as pools: samples in a stated order, before any split, checked before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from kernels.parameters import nearest

from . import canonical
from .array_files import open_array
from .errors import DataError, ExperimentError

Task = Literal["classification", "regression"]
LabelType = Literal["text", "integer", "boolean"]

SOURCE_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "arrays")
MANY_CLASSES = 100
"""More classes than this, where nobody said they are classes, earn a warning."""
DIGEST_ROWS = 1024
"""Samples per digested block: data that grow keep the digests of their full blocks."""


@dataclass(frozen=True)
class Pool:
    """Samples in a stated order.

    name: what errors call it: ``mnist/train``, or the file of the user's array.
    X: (n, d) vectors or (n, h, w, c) images, raw: bool, integer or real, as stored.
    y: (n,) int64 class ids; (n,) or (n, t) float64 regression targets; None where there are none.
    labels: the class names that the ids count, None for regression.
    """

    name: str
    X: np.ndarray
    y: np.ndarray | None
    labels: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.X)


@dataclass(frozen=True)
class Dataset:
    """A source's pools.

    scale: the nominal maximum of a raw value: 255 for images of bytes, 16 for digits, 1 for arrays.
    warnings: what a reader of the results must know about these data.
    label_type: what labels are where the data come from, which predictions are written as.
    identity: names the source in store addresses; for arrays it stays the same when the array grows.
    """

    source: str
    train: Pool
    test: Pool | None
    scale: float
    warnings: tuple[str, ...]
    identity: str
    label_type: LabelType = "text"


def load(
    source: str,
    *,
    paths: Mapping[str, str] | None = None,
    data_dir: Path | None = None,
    task: Task | None = None,
) -> Dataset:
    """Load a data set: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, or own ``arrays``.

    paths: for arrays, the files of ``X`` and, where there are any, ``y``, ``X_test``, ``y_test``:
    .npy (memory-mapped), .npz (the member of that name, or the only one) or a Zarr array.
    data_dir: where published files lie or are downloaded to; see ``canonical.data_folder``.
    task: turns labels into class ids or targets; by ``infer_task`` where absent.

    Shapes, dtypes and the values of own y are checked here; ``validate`` checks values.

    Raises:
        ExperimentError: an unknown source or path key.
        DataError: files that are missing, damaged, or of a shape or dtype that cannot be used.
    """
    if source not in SOURCE_NAMES:
        raise ExperimentError(f"unknown data source {source!r}; {nearest(source, SOURCE_NAMES)}")
    if source == "arrays":
        return _load_arrays(paths or {}, task)
    if paths:
        raise ExperimentError(f"paths are for the source 'arrays'; {source!r} knows its own files")
    if source == "digits":
        X, y, warnings = canonical.read_digits()
        train, test, names, scale = (X, y), None, tuple("0123456789"), 16.0
    else:
        train, test, warnings = canonical.read(source, data_dir)
        names, scale = canonical.SOURCES[source].labels, 255.0

    def pool(part: str, data: canonical.Labelled) -> Pool:
        images, ids = data
        if task == "regression":
            return Pool(f"{source}/{part}", images, ids.astype(np.float64), None)
        return Pool(f"{source}/{part}", images, ids.astype(np.int64), names)

    tested = pool("test", test) if test else None
    named: LabelType = "integer" if all(name.isdigit() for name in names) else "text"
    return Dataset(source, pool("train", train), tested, scale, warnings, source, named)


def read_labels(
    path: str, key: str = "y", labels: tuple[str, ...] | None = None, task: Task | None = None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Class ids and labels, or targets and None, from one file, as ``load`` makes them of ``y``.

    key: the array's name in an .npz file. labels: those of the training samples, which ids then count.

    Raises:
        DataError: the file cannot be used, or holds a label that is none of ``labels``.
    """
    y = _read_array(key, {key: path})
    targets, own, _ = _targets({key: y}, {key: path}, task if labels is None else "classification")
    if labels is None or own is None:
        return targets[key], own
    ids = {label: i for i, label in enumerate(labels)}
    for label in own:
        if label not in ids:
            raise DataError(f"{path} holds the label {label!r}, which no training sample has")
    return np.array([ids[label] for label in own], np.int64)[targets[key]], labels


def infer_task(y: np.ndarray) -> Task:
    """Whole numbers, booleans and strings are classes; floating-point numbers are regression targets."""
    return "regression" if y.dtype.kind == "f" else "classification"


def validate(pool: Pool, task: Task | None = None) -> None:
    """Check every value of a pool before anything is computed from it.

    task: None checks X, and y only where there is one.

    Raises:
        DataError: no samples; NaN or infinite values in X or y (the first one's place and their count);
            shapes or dtypes that cannot be used; X and y of different lengths; no labels though a task
            needs them; labels that do not fit the task.
    """
    _check_samples(pool.X, pool.name)
    _check_finite(pool.X, pool.name, "X")
    y = pool.y
    if y is None:
        if task is not None:
            raise DataError(f"{pool.name} is unlabelled: {task} needs y, one label or target per sample")
        return
    if len(y) != len(pool.X):
        raise DataError(f"{pool.name} has {len(pool.X)} samples but y has {len(y)} rows")
    if y.dtype.kind not in "iuf" or y.ndim > 2:
        raise DataError(
            f"y of {pool.name} has dtype {y.dtype} and shape {y.shape}: it must be (n,) or (n, t) numbers"
        )
    _check_finite(y, pool.name, "y")
    if task == "classification" and (y.dtype.kind == "f" or y.ndim != 1):
        raise DataError(f'y of {pool.name} holds targets, not class labels: set task = "regression"')
    if task == "regression" and pool.labels is not None:
        raise DataError(f"y of {pool.name} holds class ids, not targets: load it for regression")


def require_two_classes(y: np.ndarray, part: str) -> None:
    """Raise DataError unless the class ids y (n,) of ``part``, say ``"training"``, name two classes."""
    if len(y) == 1:
        raise DataError(f"the {part} range holds one sample, hence one class: widen it")
    if len(np.unique(y)) < 2:
        raise DataError(f"all {len(y)} samples of the {part} range have one class: widen or shuffle it")


def order(pool: Pool, permutation: int | None) -> Pool:
    """The pool in the order ``RandomState(permutation).permutation(n)`` (R10); as it is when None."""
    if permutation is None:
        return pool
    rows = np.random.RandomState(permutation).permutation(len(pool))
    return replace(pool, X=pool.X[rows], y=None if pool.y is None else pool.y[rows])


def duplicates_across(
    training: np.ndarray, others: Mapping[str, np.ndarray | None], rows: np.ndarray | None = None
) -> list[str]:
    """One warning per set that holds samples which stand in the training set as well, value by value.

    training: samples (n, ...). others: a set's name, ``"validation"`` or ``"test"``, to its samples.
    rows: of ``training``, those that the training set has; all of them where absent.
    Samples are counted within their sets, from 0.
    """
    present = {name: X for name, X in others.items() if X is not None}
    if not present:
        return []
    dtype = np.result_type(training, *present.values())
    keys = {name: np.concatenate([_keys(b) for _, b in _blocks(X, dtype)]) for name, X in present.items()}
    sought = np.unique(np.concatenate(list(keys.values())))
    # Few samples have the key of another one: these are compared byte by byte.
    first: dict[bytes, int] = {}
    shared = [np.empty(0, np.uint64)]
    for start, block in _blocks(training, dtype, rows):
        own = _keys(block)
        for row in np.flatnonzero(_among(own, sought)):
            first.setdefault(block[row].tobytes(), start + int(row))
            shared.append(own[row : row + 1])
    known = np.unique(np.concatenate(shared))
    warnings = []
    for name, X in present.items():
        samples = (
            (row, np.asarray(X[row], dtype).tobytes()) for row in np.flatnonzero(_among(keys[name], known))
        )
        pairs = [(first[sample], row) for row, sample in samples if sample in first]
        if pairs:
            verb = "stands" if len(pairs) == 1 else "stand"
            warnings.append(
                f"{len(pairs)} of the {len(X)} samples of the {name} set also {verb} in the training set "
                f"(first: sample {pairs[0][1]} is training sample {pairs[0][0]}): scores are optimistic"
            )
    return warnings


def short_samples(X: np.ndarray, floor: float) -> tuple[int, int]:
    """How many of the samples X (n, ...) are zero, and how many others have a norm below ``floor``."""
    zero = short = 0
    for start in range(0, len(X), DIGEST_ROWS):
        block = X[start : start + DIGEST_ROWS]
        samples = block.reshape(len(block), -1).astype(np.float64)
        largest = np.abs(samples).max(axis=1)
        zero += int(np.count_nonzero(largest == 0))
        # Only these can be so short; and no square of them overflows.
        few = samples[(largest > 0) & (largest < floor)]
        short += int(np.count_nonzero(np.linalg.norm(few, axis=1) < floor))
    return zero, short


def block_digests(X: np.ndarray, rows: int = DIGEST_ROWS) -> tuple[str, ...]:
    """SHA-256 of each block of ``rows`` samples, with dtype and sample shape: one per block, in order.

    Whether data begin with a stored prefix of n samples is asked by ``block_digests(X[:n]) == stored``.
    """
    header = json.dumps([X.dtype.str, list(X.shape[1:])]).encode()
    digests = []
    for start in range(0, len(X), rows):
        digest = hashlib.sha256(header)
        digest.update(np.ascontiguousarray(X[start : start + rows]).reshape(-1).view(np.uint8).data)
        digests.append(digest.hexdigest())
    return tuple(digests)


def pool_digest(digests: Sequence[str]) -> str:
    """One SHA-256 for a whole pool from its ``block_digests``."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _blocks(
    X: np.ndarray, dtype: np.dtype, rows: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Samples of X, all or those of ``rows``, as bytes of ``dtype``: (start, (at most DIGEST_ROWS, bytes) uint8)."""
    for start in range(0, len(X) if rows is None else len(rows), DIGEST_ROWS):
        part = slice(start, start + DIGEST_ROWS)
        block = np.ascontiguousarray(X[part] if rows is None else X[rows[part]], dtype=dtype)
        yield start, block.reshape(len(block), -1).view(np.uint8)


def _keys(block: np.ndarray) -> np.ndarray:
    """(n,) uint64 keys of samples (n, bytes) uint8: equal for equal samples, seldom for others."""
    words = -(-block.shape[1] // 8)
    padded = (
        block if block.shape[1] == 8 * words else np.pad(block, ((0, 0), (0, 8 * words - block.shape[1])))
    )
    values = np.ascontiguousarray(padded).view(np.uint64)
    # Floats of few digits differ in their high bits alone, which a product would push out.
    return ((values ^ (values >> np.uint64(32))) * _multipliers(words)).sum(axis=1, dtype=np.uint64)


@lru_cache(maxsize=2)
def _multipliers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 2**64, count, np.uint64, endpoint=False) | np.uint64(1)


def _among(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which keys stand in ``known``, sorted."""
    if not len(known):
        return np.zeros(len(keys), bool)
    at = np.searchsorted(known, keys)
    return known[np.minimum(at, len(known) - 1)] == keys


def _check_samples(X: np.ndarray, name: str) -> None:
    if X.dtype.kind not in "biuf":
        raise DataError(f"X of {name} has dtype {X.dtype}: samples must be bool, integer or real numbers")
    if X.dtype.kind == "f" and X.dtype.itemsize > 8:
        raise DataError(f"X of {name} has dtype {X.dtype}: save it as float64, X.astype(numpy.float64)")
    if X.ndim not in (2, 4):
        raise DataError(f"X of {name} has shape {X.shape}: it must be (n, d) vectors or (n, h, w, c) images")
    if X.size == 0:
        raise DataError(f"X of {name} is empty: its shape is {X.shape}")


def _check_finite(values: np.ndarray, name: str, what: str) -> None:
    """Raise DataError that names the first NaN or infinite value and counts all of them."""
    if values.dtype.kind != "f":
        return
    count, first = 0, None
    for start in range(0, len(values), DIGEST_ROWS):
        bad = ~np.isfinite(values[start : start + DIGEST_ROWS])
        found = int(np.count_nonzero(bad))
        if found and first is None:
            row, *place = (int(i) for i in np.argwhere(bad)[0])
            first = (start + row, *place)
        count += found
    if first is None:
        return
    row, *place = first
    column = "" if not place else f", column {place[0] if len(place) == 1 else tuple(place)}"
    verb = "value is" if count == 1 else "values are"
    raise DataError(
        f"{count} {verb} NaN or infinite in {what} of {name}: "
        f"the first is {values[first]} at row {row}{column}; mend or drop those rows"
    )


def _load_arrays(paths: Mapping[str, str], task: Task | None) -> Dataset:
    known = ("X", "y", "X_test", "y_test")
    for key in paths:
        if key not in known:
            raise ExperimentError(f"unknown path {key!r} for the source 'arrays'; {nearest(key, known)}")
    for key in ("X", "X_test"):
        partner = key.replace("X", "y")
        if key not in paths and (key == "X" or partner in paths):
            raise ExperimentError(f"the source 'arrays' needs a path for {key}")
    if "y_test" in paths and "y" not in paths:
        raise ExperimentError("the source 'arrays' needs a path for y where there is one for y_test")
    arrays = {key: _read_array(key, paths) for key in known if key in paths}
    for key in ("X", "X_test"):
        if key in arrays:
            if arrays[key].ndim == 3:
                arrays[key] = arrays[key][..., np.newaxis]
            _check_samples(arrays[key], paths[key])
    if "X_test" in arrays and arrays["X"].shape[1:] != arrays["X_test"].shape[1:]:
        raise DataError(
            f"samples of {paths['X_test']} have shape {arrays['X_test'].shape[1:]}, "
            f"those of {paths['X']} {arrays['X'].shape[1:]}: they must be the same"
        )
    for key in ("y", "y_test"):
        partner = key.replace("y", "X")
        if key in arrays and arrays[key].ndim > 0 and len(arrays[key]) != len(arrays[partner]):
            raise DataError(
                f"{paths[key]} has {len(arrays[key])} labels "
                f"but {paths[partner]} has {len(arrays[partner])} samples"
            )
    ys = {key: array for key, array in arrays.items() if key.startswith("y")}
    targets, labels, warnings = _targets(ys, paths, task)

    def pool(x: str, y: str) -> Pool:
        return Pool(paths[x], arrays[x], targets.get(y), labels if y in targets else None)

    test = pool("X_test", "y_test") if "X_test" in arrays else None
    label_type: LabelType = "text"
    if labels is not None and ys["y"].dtype.kind != "U":
        label_type = "boolean" if all(y.dtype.kind == "b" for y in ys.values()) else "integer"
    return Dataset("arrays", pool("X", "y"), test, 1.0, warnings, _identity(arrays["X"]), label_type)


def _identity(X: np.ndarray) -> str:
    """Of dtype, sample shape and first sample only, so that an array that grows keeps its stores."""
    return f"arrays-{block_digests(X[:1])[0][:16]}"


def _targets(
    ys: dict[str, np.ndarray], paths: Mapping[str, str], task: Task | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None, tuple[str, ...]]:
    """Class ids over the sorted labels of all parts together, or float64 targets; labels; warnings."""
    for name, y in ys.items():
        if y.dtype.kind not in "biufUST" or y.ndim not in (1, 2):
            raise DataError(
                f"{paths[name]} has dtype {y.dtype} and shape {y.shape}: "
                "labels must be (n,) integers or strings, targets (n,) or (n, t) numbers"
            )
        _check_finite(y, paths[name], name)
        if y.ndim == 2 and y.shape[1] == 1:
            ys[name] = y[:, 0]
    if not ys:
        return {}, None, ()
    warnings = []
    kinds = {infer_task(y) for y in ys.values()}
    key = next(iter(ys))
    inferred = task is None
    if task is None:
        if len(kinds) > 1:
            raise DataError(f"{paths['y']} and {paths['y_test']} hold labels and targets: set the task")
        task = kinds.pop()
        if task == "regression" and all(y.ndim == 1 and np.array_equal(y, np.rint(y)) for y in ys.values()):
            warnings.append(
                f"{paths[key]} holds whole numbers stored as floats, taken as regression targets: "
                'set task = "classification" if they are classes'
            )
    if task == "regression":
        for name, y in ys.items():
            if y.dtype.kind in "UST":
                raise DataError(f"{paths[name]} holds strings, which cannot be regression targets")
        return {name: np.asarray(y, dtype=np.float64) for name, y in ys.items()}, None, tuple(warnings)
    for name, y in ys.items():
        if y.ndim != 1:
            raise DataError(f"{paths[name]} has shape {y.shape}: class labels must be (n,)")
        if y.dtype.kind == "f":
            if not np.array_equal(y, np.rint(y)):
                raise DataError(f'{paths[name]} holds no class labels but numbers: set task = "regression"')
            ys[name] = y.astype(np.int64)
        elif y.dtype.kind in "ST":
            ys[name] = _as_text(y, paths[name])
    if len({y.dtype.kind == "U" for y in ys.values()}) > 1:
        raise DataError(f"of {paths['y']} and {paths['y_test']} one holds strings, the other numbers")
    classes = np.unique(np.concatenate(list(ys.values())))
    if inferred and len(classes) > MANY_CLASSES and classes.dtype.kind in "iu":
        warnings.append(
            f"{paths[key]} holds {len(classes)} distinct whole numbers, taken as classes: "
            'set task = "regression" if they are quantities'
        )
    ids = {name: np.searchsorted(classes, y).astype(np.int64) for name, y in ys.items()}
    return ids, tuple(str(label) for label in classes), tuple(warnings)


def _as_text(y: np.ndarray, path: str) -> np.ndarray:
    try:
        return y.astype(np.str_)
    except UnicodeDecodeError:
        raise DataError(
            f"{path} holds byte strings that are not ASCII; save text: numpy.char.decode(y, ...)"
        ) from None


def _read_array(key: str, paths: Mapping[str, str]) -> np.ndarray:
    plain = key.removesuffix("_test")
    # The training array must not be taken for the test array where one file holds both.
    shared = plain != key and paths.get(plain) == paths[key]
    array = open_array(paths[key], (key,) if shared else (key, plain), sole=not shared)
    return array if isinstance(array, np.ndarray) else np.asarray(array[...])
