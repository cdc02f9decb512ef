"""Fitted models: an expansion over training samples, or weights of explicit features."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Kernel, KernelError
from kernels.features.base import FeatureMap

from . import datasets, features
from .errors import DataError, StoreError
from .experiment.kernel_tables import kernel_leaves
from .explicit import mapfiles
from .pools import kernel_shape
from .preprocessing import Preprocessing
from .stores import FeatureStore

MAP = "map"
"""Folder of what a model's feature map learned."""


@dataclass(frozen=True, eq=False)
class Model(ABC):
    """What a fit left, whatever it fitted.

    folder: where it was read. source: the data set's name. labels: (t,) classes as the data had them, integers,
    booleans or text; None for regression. dtype: of tiles or features. shape, raw: of one sample as the source has
    it, before preprocessing. state: what fitted steps learned. rows: (n,) int64, the pool rows it was trained on.
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
    rows: np.ndarray

    @property
    @abstractmethod
    def coefficients(self) -> np.ndarray:
        """(k, t) numbers that were fitted, a column for each output."""

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel, or the feature map with what it learned, rebuilt from its description.

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
            kernel = self._rebuilt()
        except (KernelError, KeyError, TypeError, ValueError, StoreError) as error:
            raise StoreError(
                f"{self.folder}: the model's kernel is damaged ({error}); run the experiment again"
            ) from None
        if kernel.fingerprint != self.fingerprint:
            raise StoreError(
                f"{self.folder}: the model's kernel has other numbers in this version; run the experiment again"
            )
        return kernel

    def sample_shape(self, kernel: Kernel) -> tuple[int, ...]:
        """Of one sample, preprocessed, as ``kernel`` takes it."""
        return kernel_shape(kernel.inputs, self.preprocessing.output_shape(self.shape))

    def _rebuilt(self) -> Kernel:
        return features.load_kernel(json.dumps(self.kernel_description, sort_keys=True))

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
            if X.dtype.kind == "f" or (X.dtype.kind == "b" and self.raw.kind != "b"):
                raise DataError(f"{name} holds {X.dtype} values; the model takes {takes}, not scaled yet")
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

    def answers(self, scores: np.ndarray) -> np.ndarray:
        """What scores (n, t) say: (n,) labels, ties to the first of them (R2), or the values themselves."""
        return scores if self.labels is None else self.labels[np.argmax(scores, axis=1)]


@dataclass(frozen=True, eq=False)
class Expansion(Model):
    """A kernel's expansion over training samples: f(x) = sum_i alpha_i K(x_i, x) (R1).

    features, axis: address of the training samples' feature store, and the samples it held. alpha: (n, t), of ``rows``.
    """

    features: str
    axis: dict[str, Any]
    alpha: np.ndarray

    @property
    def coefficients(self) -> np.ndarray:
        return self.alpha

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


@dataclass(frozen=True, eq=False)
class LinearModel(Model):
    """Weights of explicit features: f(x) = Phi(x) w (F7). It needs nothing but its folder.

    weights: (width, t).
    """

    weights: np.ndarray

    @property
    def coefficients(self) -> np.ndarray:
        return self.weights

    @property
    def feature_map(self) -> FeatureMap:
        """The kernel, a feature map; raises as ``kernel``."""
        kernel = self.kernel
        assert isinstance(kernel, FeatureMap)
        return kernel

    def _rebuilt(self) -> Kernel:
        kernel = (
            mapfiles.read(self.folder / MAP) if self.kernel_description.get("learned") else super()._rebuilt()
        )
        if not isinstance(kernel, FeatureMap):
            raise ValueError(f"a {kernel.kind} kernel has no explicit features")
        width = kernel.width(self.sample_shape(kernel))
        if width != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights for {width} features")
        return kernel


def _continues(axis: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether the samples of an axis are those that were there before, or begin with their whole blocks."""
    if axis["rows"] == before["rows"]:
        return axis["digests"] == before["digests"]
    whole = int(before["rows"]) // datasets.DIGEST_ROWS
    return axis["rows"] > before["rows"] and axis["digests"][:whole] == before["digests"][:whole]
