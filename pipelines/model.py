"""A fitted model as it lies in a result's folder.

``model.json`` says what the numbers beside it mean: ``alpha.npy`` and ``rows.npy``, coefficients and the pool rows
they belong to, and ``preprocessing.npz``, what fitted steps learned. The training samples themselves stay where they
were prepared, in a feature store under the root.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Kernel, KernelError

from . import datasets, features
from .errors import DataError, StoreError
from .experiment import kernel_leaves
from .pools import Pools
from .preprocessing import Preprocessing
from .stores import FeatureStore, disk_errors

FORMAT = 1
DOCUMENT = "model.json"
STATE = "preprocessing.npz"


def save(
    folder: Path, *, pools: Pools, kernel: Kernel, dtype: str, features_path: Path, ridge: float, root: Path
) -> None:
    """Write ``model.json`` and ``preprocessing.npz`` beside the ``alpha.npy`` and ``rows.npy`` of ``folder``.

    kernel: the experiment's own, of one output. dtype: of its tiles. features_path: the pool's feature store.

    Raises:
        DiskFull: no space is left.
    """
    store = FeatureStore(features_path)
    labels = pools.train.labels if pools.task == "classification" else None
    document = {
        "megagram": "model",
        "format": FORMAT,
        "source": pools.dataset.source,
        "task": pools.task,
        "labels": None if labels is None else [_own(label, pools.dataset.label_type) for label in labels],
        "ridge": ridge,
        "kernel": {"description": kernel.describe(), "fingerprint": kernel.fingerprint},
        "dtype": dtype,
        "samples": {"shape": list(pools.raw_shape), "dtype": pools.train.X.dtype.str},
        "preprocessing": {"steps": pools.preprocessing.describe(), "scale": pools.dataset.scale},
        "features": {"address": features_path.name, "axis": store.axes[0]},
    }
    state = features.fitted_state(pools, root)
    with disk_errors(folder):
        if state is not None:
            shutil.copyfile(state, folder / STATE)
        (folder / DOCUMENT).write_text(json.dumps(document, indent=1))


def load(folder: Path) -> Model:
    """The model of a result's folder. Nothing that is read can execute code.

    Raises:
        StoreError: there is none, it is damaged, of another format, or of a kernel whose numbers have changed since;
            the message says what to do.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no {DOCUMENT}: run the experiment again") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}): run the experiment again") from None
    if not isinstance(document, dict) or document.get("megagram") != "model":
        raise StoreError(f"{path} describes no model: run the experiment again")
    if document.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {document.get('format')}, this version reads format {FORMAT}: run the experiment again"
        )
    try:
        return _model(folder, document)
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{folder}: the model is damaged ({type(error).__name__}: {error}); run the experiment again"
        ) from None


def _model(folder: Path, document: Mapping[str, Any]) -> Model:
    alpha, rows = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("alpha", "rows"))
    state: dict[str, np.ndarray] = {}
    steps, scale = document["preprocessing"]["steps"], float(document["preprocessing"]["scale"])
    preprocessing = Preprocessing.from_spec(steps, scale=scale)
    if preprocessing.fitted:
        with np.load(folder / STATE, allow_pickle=False) as archive:
            state = {name: archive[name] for name in archive.files}
    labels = document["labels"]
    address = str(document["features"]["address"])
    model = Model(
        folder=folder,
        source=str(document["source"]),
        task=str(document["task"]),
        labels=None if labels is None else np.array(labels),
        ridge=float(document["ridge"]),
        kernel_description=dict(document["kernel"]["description"]),
        fingerprint=str(document["kernel"]["fingerprint"]),
        dtype=str(np.dtype(document["dtype"])),
        shape=tuple(int(k) for k in document["samples"]["shape"]),
        raw=np.dtype(document["samples"]["dtype"]),
        preprocessing=preprocessing,
        scale=scale,
        state=state,
        features=address,
        axis=dict(document["features"]["axis"]),
        alpha=alpha,
        rows=rows,
    )
    if (
        alpha.ndim != 2
        or rows.dtype != np.int64
        or rows.shape != alpha.shape[:1]
        or not np.isfinite(alpha).all()
    ):
        raise ValueError(
            f"coefficients {alpha.dtype} {alpha.shape} do not fit rows {rows.dtype} {rows.shape}"
        )
    if model.labels is not None and model.labels.shape != alpha.shape[1:]:
        raise ValueError(f"{alpha.shape[1]} columns of coefficients for labels {model.labels.shape}")
    if Path(address).name != address or address in ("", ".", ".."):
        raise ValueError(f"{address!r} is no address of a store")
    return model


@dataclass(frozen=True, eq=False)
class Model:
    """A kernel's expansion over training samples: f(x) = sum_i alpha_i K(x_i, x) (R1).

    folder: where it was read. source: the data set's name. labels: (t,) classes as the data had them, integers,
    booleans or text; None for regression. dtype: of tiles. shape, raw: of one sample as the source has it, before
    preprocessing. state: what fitted steps learned. features, axis: address of the training samples' feature store,
    and the samples it held. rows: (n,) int64, those that alpha (n, t) belongs to.
    """

    folder: Path
    source: str
    task: str
    labels: np.ndarray | None
    ridge: float
    kernel_description: dict[str, Any]
    fingerprint: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.dtype
    preprocessing: Preprocessing
    scale: float
    state: dict[str, np.ndarray]
    features: str
    axis: dict[str, Any]
    alpha: np.ndarray
    rows: np.ndarray

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel, rebuilt from its description.

        Raises:
            StoreError: it cannot be rebuilt, or its numbers have changed since.
            DataError: it is a precomputed one, which knows no new samples.
        """
        if any(leaf.get("kind") == "precomputed" for _, leaf in kernel_leaves(self.kernel_description)):
            raise DataError(
                f"{self.folder}: a precomputed kernel has no values for new samples; multiply yours,"
                " K[new, rows] of rows.npy, by alpha.npy"
            )
        try:
            kernel = features.load_kernel(json.dumps(self.kernel_description, sort_keys=True))
        except (KernelError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.folder}: the model's kernel is damaged ({error}); run the experiment again"
            ) from None
        if kernel.fingerprint != self.fingerprint:
            raise StoreError(
                f"{self.folder}: the model's kernel has other numbers in this version; run the experiment again"
            )
        return kernel

    def check(self, X: np.ndarray, name: str) -> np.ndarray:
        """New samples (n, ...) as the model takes them: shape, dtype and every value checked.

        Images of one channel may come as (n, h, w). name: what errors call them, such as their file.

        Raises:
            DataError: they cannot be used; the message says what is expected.
        """
        if X.ndim == 3 and len(self.shape) == 3 and self.shape[-1] == 1:
            X = X[..., np.newaxis]
        takes = (
            f"samples of {self.source}: an array (n, {', '.join(map(str, self.shape))}) of {self.raw.name}"
        )
        if X.dtype.kind not in "biuf" or X.shape[1:] != self.shape or X.ndim == 0:
            raise DataError(f"{name} has shape {X.shape} and dtype {X.dtype}; the model takes {takes}")
        if not len(X):
            raise DataError(f"{name} holds no samples; the model takes {takes}")
        if self.raw.kind != "f":
            if X.dtype.kind == "f":
                raise DataError(f"{name} holds {X.dtype} numbers; the model takes {takes}, not scaled yet")
            self._check_range(X, name, takes)
        datasets.validate(datasets.Pool(name, X, None, None))
        return X

    def _check_range(self, X: np.ndarray, name: str, takes: str) -> None:
        low, high = (0, 1) if self.raw.kind == "b" else (np.iinfo(self.raw).min, np.iinfo(self.raw).max)
        for start in range(0, len(X), datasets.DIGEST_ROWS):
            block = X[start : start + datasets.DIGEST_ROWS]
            for value in (int(block.min()), int(block.max())):
                if not low <= value <= high:
                    raise DataError(
                        f"{name} holds the value {value} in samples {start} to {start + len(block) - 1};"
                        f" the model takes {takes}, values from {low} to {high}"
                    )

    def store(self, root: Path) -> FeatureStore:
        """The feature store of the training samples under a root.

        Raises:
            StoreError: it was removed, or holds other samples now.
        """
        path = root / FeatureStore.kind / self.features
        remedy = "run the experiment again"
        try:
            store = FeatureStore(path)
        except StoreError as error:
            raise StoreError(
                f"the samples that the model was trained on are not there ({error}): {remedy}"
            ) from None
        if not _continues(store.axes[0], self.axis) or (self.rows.size and self.rows[-1] >= store.rows):
            raise StoreError(f"{path} holds other samples than those that the model was trained on: {remedy}")
        blocks = np.unique(self.rows // store.side).tolist()
        missing = sum(not store.has(block) for block in blocks)
        if missing:
            raise StoreError(
                f"{path}: {missing} of {len(blocks)} blocks of training samples are missing: {remedy}"
            )
        return store

    def answers(self, scores: np.ndarray) -> np.ndarray:
        """What scores (n, t) say: (n,) labels, ties to the first of them (R2), or the values themselves."""
        return scores if self.labels is None else self.labels[np.argmax(scores, axis=1)]


def _own(label: str, kind: datasets.LabelType) -> str | int | bool:
    """A label as JSON keeps it and the data had it."""
    if kind == "boolean":
        return label == "True"
    return int(label) if kind == "integer" else label


def _continues(axis: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether the samples of an axis are those that were there before, or begin with their whole blocks."""
    if axis["rows"] == before["rows"]:
        return axis["digests"] == before["digests"]
    whole = int(before["rows"]) // datasets.DIGEST_ROWS
    return axis["rows"] > before["rows"] and axis["digests"][:whole] == before["digests"][:whole]
