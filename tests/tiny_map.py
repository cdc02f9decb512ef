"""A feature map that learns a few of the samples, and a pool that it learns from: small enough for every test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from kernels.arrays import Array, namespace
from kernels.base import Cost, Kernel
from kernels.features.base import FeatureMap, Progress, Samples, unwatched
from kernels.registry import _map, from_description, register
from pipelines import pools
from pipelines.experiment import Experiment


@dataclass(frozen=True)
class TinyMap(FeatureMap):
    """cosh of inner products with samples drawn at random, which is neither linear nor zero."""

    anchors: int = 4
    seed: int = 0

    kind: ClassVar[str] = "tiny"
    learns: ClassVar[bool] = True

    def width(self, shape: tuple[int, ...]) -> int:
        return self.anchors

    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        xp = namespace(X)
        Z = self.array("anchors", X)
        return xp.cosh(X.reshape(len(X), -1) @ Z.reshape(len(Z), -1).T / X[0].size)

    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        return Cost(2.0 * n * self.anchors * float(np.prod(shape)), n * self.anchors, 0)

    def learn(self, samples: Samples, progress: Progress = unwatched) -> Self:
        drawn = np.random.default_rng(self.seed).choice(samples.count, self.anchors, replace=False)
        anchors = samples.take(np.sort(drawn))
        progress(1, 1, "anchors drawn")
        return self.knowing(
            {"anchors": anchors, "norms": np.linalg.norm(anchors.reshape(len(anchors), -1), axis=1)}
        )


register("tiny", lambda table: _map(TinyMap)(table, "kernel", ()))

LINEAR = {"kind": "dot-product", "kernel": "linear"}
IMAGES = {"kind": "convolutional", "layers": [{"patch": 1, "kernel": "linear", "subsampling": 1}]}


def tiny(anchors: int = 4, seed: int = 0, kernel: dict[str, Any] = LINEAR) -> TinyMap:
    return TinyMap(from_description(kernel), anchors, seed)


def preprocessed(experiment: Experiment, kernel: Kernel) -> np.ndarray:
    """All samples of an experiment's pool as a kernel takes them, made in one piece."""
    resolved = pools.resolve(experiment)
    X, steps = resolved.train.X, resolved.preprocessing
    state = steps.fit(lambda start, stop: X[start:stop]) if steps.fitted else {}
    made = steps.apply(X, state, np.dtype(experiment.gram.dtype))
    return made.reshape(len(made), *pools.kernel_shape(kernel.inputs, made.shape[1:]))
