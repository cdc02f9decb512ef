"""How fast the error of random features falls in their number (F6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kernels.base import Kernel


def rate(
    make: Callable[[int, int], Kernel], exact: Kernel, X: np.ndarray, widths: Sequence[int], seeds: int
) -> tuple[float, float]:
    """The slope of relF in the width, log-log, of the root of the mean square over seeds, and its standard error.

    make: from a width and a seed to a map. Weights are nested, so the errors of one seed are not independent: the
    standard error is the jackknife's over seeds.
    """
    K = exact.gram(X)
    squares = np.array(
        [[np.linalg.norm(make(m, seed).gram(X) - K) ** 2 for m in widths] for seed in range(seeds)]
    )

    def slope(kept: np.ndarray) -> float:
        return float(np.polyfit(np.log2(widths), np.log2(kept.mean(axis=0)) / 2, 1)[0])

    without = [slope(np.delete(squares, seed, axis=0)) for seed in range(seeds)]
    return slope(squares), float(np.std(without) * np.sqrt(seeds - 1))
