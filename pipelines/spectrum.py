"""How the eigenvalues of a Gram matrix fall, guessed from a small sample: on it rests what iterations are expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels.arrays import to_host
from kernels.base import Kernel

from . import device
from .pools import Pools, kernel_shape

SAMPLES = 1000
"""Of the training set, at most: their matrix and its eigenvalues take half a second where entries are cheap."""

LEAST = 200
"""Fewer say nothing of how eigenvalues fall."""

SECONDS = 1.0
"""That the sample's matrix may take."""


@dataclass(frozen=True)
class Spectrum:
    """values: (m,) eigenvalues of K / m over m samples, descending, of at least zero. decay: of the power law that
    goes on where the sample ends. smallest, growth: the smallest eigenvalue of K over m samples, and the exponent by
    which it changes with their number (negative: it falls).
    """

    values: np.ndarray
    decay: float
    smallest: float
    growth: float

    @classmethod
    def of(cls, K: np.ndarray) -> Spectrum:
        """From the (m, m) matrix of m samples in random order; m at least ``LEAST``."""
        m = len(K)
        values = np.linalg.eigvalsh(K)[::-1]
        rounding = m * np.finfo(np.float64).eps * values[0]
        # The lower half of a sample's eigenvalues falls faster than those of more samples.
        first, last = m // 8, m // 2
        steps = np.log(np.arange(first, last) + 1.0)
        decay = -float(np.polyfit(steps, np.log(np.maximum(values[first:last], rounding)), 1)[0])
        smallest = max(float(values[-1]), rounding)
        logarithms = [math.log(smallest)]
        for parts in (2, 4, 8):
            size = m // parts
            blocks = (K[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(parts))
            found = [max(float(np.linalg.eigvalsh(block)[0]), rounding) for block in blocks]
            logarithms.append(float(np.log(found).mean()))
        growth = min(float(np.polyfit(-np.log([1, 2, 4, 8]), logarithms, 1)[0]), 0.0)
        return cls(np.maximum(values, 0.0) / m, max(decay, 0.0), smallest, growth)

    def eigenvalue(self, n: int, j: int) -> float:
        """About the j-th largest eigenvalue, from 1, of K over n samples."""
        trusted = len(self.values) // 2
        if j <= trusted:
            return n * float(self.values[j - 1])
        return n * float(self.values[trusted - 1]) * (trusted / j) ** self.decay

    def smallest_eigenvalue(self, n: int) -> float:
        """About the smallest eigenvalue of K over n samples."""
        return self.smallest * (n / len(self.values)) ** self.growth


def sampled(pools: Pools, kernel: Kernel, dtype: str, entries: float) -> Spectrum | None:
    """The spectrum over a few training samples; None where they, or their preprocessing, would take too long.

    entries: of the matrix per second; not as timed, since the preconditioner rests on what is found here.
    """
    rows = pools.split.train
    m = min(SAMPLES, len(rows), math.isqrt(int(SECONDS * entries)))
    if m < LEAST or pools.preprocessing.fitted or pools.preprocessing.expensive:
        return None
    chosen = rows[np.sort(np.random.default_rng(0).choice(len(rows), m, replace=False))]
    X = pools.preprocessing.apply(pools.train.X[chosen], {}, np.dtype(dtype))
    shuffled = np.random.default_rng(1).permutation(m)
    X = X[shuffled].reshape(m, *kernel_shape(kernel.inputs, X.shape[1:]))
    # What is wrong with such samples is said when tiles are computed, by name.
    with np.errstate(over="ignore", invalid="ignore"):
        block = device.placed(kernel.prepare(X, chosen[shuffled]))
        K = to_host(kernel.pair(block, block)).astype(np.float64)
    return Spectrum.of(K) if np.isfinite(K).all() and K.any() else None
