"""Explicit features in memory for solvers, and their regression solved densely."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np


class MemoryFeatures:
    """A feature source over a matrix (N, width) in memory; counts how often each block is read."""

    symmetric = False

    def __init__(self, phi: np.ndarray, side: int) -> None:
        self.phi, self.side = phi, side
        self.shape: tuple[int, int] = phi.shape
        self.reads: Counter[int] = Counter()

    def block(self, number: int) -> np.ndarray:
        assert 0 <= number * self.side < len(self.phi), "there is no such block"
        self.reads[number] += 1
        return self.phi[number * self.side : (number + 1) * self.side].copy()

    def read_tile(self, i: int, j: int) -> np.ndarray:
        return self.block(i)[:, j * self.side : (j + 1) * self.side]


def features(
    n: int, width: int, rank: int | None = None, dtype: str = "float32", seed: int = 0
) -> np.ndarray:
    """(n, width) features whose singular values fall, of ``rank`` alone where one is given."""
    rng = np.random.default_rng((seed, n, width))
    r = min(n, width) if rank is None else rank
    falling = rng.standard_normal((n, r)) * np.linspace(1.0, 0.03, r)
    return (falling @ rng.standard_normal((r, width)) / np.sqrt(width)).astype(dtype)


@dataclass(frozen=True)
class Dense:
    """Ridge regression in the dual on features (n, width), all in memory (R1, R5, R9, F7).

    fitted, loo: (n, t); weights: (width, t).
    """

    fitted: np.ndarray
    loo: np.ndarray
    weights: np.ndarray
    effective_dimension: float

    @classmethod
    def of(cls, phi: np.ndarray, Y: np.ndarray, shift: float) -> Dense:
        F = phi.astype(np.float64)
        K = F @ F.T
        R = np.linalg.inv(K + shift * np.eye(len(K)))
        alpha = np.linalg.solve(K + shift * np.eye(len(K)), Y)
        return cls(K @ alpha, Y - alpha / np.diag(R)[:, None], F.T @ alpha, float(np.trace(K @ R)))
