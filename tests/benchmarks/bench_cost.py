"""What ``Kernel.cost`` predicts for the general path of convolutional kernels, against the clock.

Block by block the counts become seconds by the rates in ``kernels.costs``; within 30 % on the machine that the
rates are from. Elsewhere the ratios are off by a common factor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import common
import numpy as np
from workload import plan

from kernels.base import Cost
from kernels.costs import seconds as predicted_seconds
from kernels.fused import VARIABLE
from kernels.registry import from_description

os.environ[VARIABLE] = "general"

COLOUR, GREY, DIGITS = (32, 32, 3), (28, 28, 1), (8, 8, 1)
TOLERANCE = 0.3


@dataclass(frozen=True)
class Case:
    what: str
    kernel: dict[str, Any]
    shape: tuple[int, ...] = COLOUR
    dtype: str = "float32"


def network(
    *kernels: str, subsampling: Sequence[int], pooling: str = "gaussian", **options: Any
) -> dict[str, Any]:
    """Layers of 3x3 patches by short names: exp, relu, linear, poly2, ..."""
    layers = []
    for number, (name, t) in enumerate(zip(kernels, subsampling, strict=True)):
        last = number == len(kernels) - 1
        kind: dict[str, Any] = {"kernel": name}
        if name == "exp":
            kind = {"kernel": "exponential", "sigma": 0.6}
        elif name.startswith("poly"):
            kind = {"kernel": "polynomial", "degree": int(name[4:])}
        kind |= {
            "pooling": "global" if pooling == "global" and last else pooling.replace("global", "average")
        }
        layers.append({"patch": 3, "subsampling": t, **kind})
    return {"kind": "convolutional", "layers": layers, **options}


TWO = (2, 5)
CASES = [
    *(Case(f"{a}/{b} 2-5", network(a, b, subsampling=TWO)) for a, b in (
        ("exp", "exp"), ("exp", "poly3"), ("exp", "poly2"), ("exp", "poly4"), ("poly2", "exp"), ("poly2", "poly2"),
        ("exp", "linear"), ("relu", "relu"),
    )),
    Case("relu NTK 2-5", network("relu", "relu", subsampling=TWO, tangent=True)),
    Case("exp 2-2-2", network("exp", "exp", "exp", subsampling=(2, 2, 2))),
    Case("exp/exp 2-5, float64", network("exp", "exp", subsampling=TWO), dtype="float64"),
    Case("relu NTK 2-5, float64", network("relu", "relu", subsampling=TWO, tangent=True), dtype="float64"),
    Case("exp/exp 2-5, 28x28", network("exp", "exp", subsampling=TWO), GREY),
    Case("relu NTK 2-5, 28x28", network("relu", "relu", subsampling=TWO, tangent=True), GREY),
    Case("poly3/exp 2-5, 28x28", network("poly3", "exp", subsampling=TWO), GREY),
    Case("exp/exp 2-1, digits", network("exp", "exp", subsampling=(2, 1)), DIGITS),
    Case("relu NTK 2-1, digits", network("relu", "relu", subsampling=(2, 1), tangent=True), DIGITS),
    Case("relu NTK, two averages", network("relu", "relu", subsampling=(2, 4), pooling="average", tangent=True)),
    Case("exp 1-2-1-2, averages", network(*["exp"] * 4, subsampling=(1, 2, 1, 2), pooling="average")),
    Case("exp/exp 2-1 strided", network("exp", "exp", subsampling=(2, 1), pooling="strided")),
    *(
        Case(f"relu NTK, 3 layers, {p}", network(*["relu"] * 3, subsampling=(1, 1, 1), pooling=p, tangent=True))
        for p in ("average", "global")
    ),
    Case("exp, one layer", network("exp", subsampling=(2,))),
    Case("poly5/exp 2-5", network("poly5", "exp", subsampling=TWO)),
]  # fmt: skip


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("cost", "Predicted and measured time of a block, NumPy path", options)
    seconds = 0.1 if options.quick else 0.6
    counts, times, kinds = [], [], []
    for case in CASES:
        cost, taken, shape = measure(case, seconds, 3 if options.quick else 7)
        itemsize = np.dtype(case.dtype).itemsize
        predicted = predicted_seconds(cost, itemsize)
        ratio = predicted / taken
        report.add(
            case.what,
            f"{taken / (shape[0] * shape[1]) * 1e3:.4g} ms a pair",
            target=f"{predicted / (shape[0] * shape[1]) * 1e3:.4g} ms a pair predicted, within 30 %",
            ratio=f"{ratio:.2f}",
            met=1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE,
        )
        counts.append([cost.products, cost.passes, cost.transcendentals, cost.calls])
        times.append(taken)
        kinds.append(itemsize)
    report.note(f"rates fitted to this run: {fitted(np.array(counts), np.array(times), np.array(kinds))}")
    report.note(
        "CPU time, the least of several runs; blocks are small, so features of images weigh more than in a tile"
    )
    report.finish()


def measure(case: Case, seconds: float, repeats: int) -> tuple[Cost, float, tuple[int, int]]:
    """Cost of a block, its CPU seconds, and its sides."""
    kernel = from_description(case.kernel)
    itemsize = np.dtype(case.dtype).itemsize
    n, m = 2, 16
    while m < 128 and predicted_seconds(kernel.cost(n, 2 * m, case.shape, itemsize), itemsize) < seconds:
        n, m = (n, 2 * m) if m < 8 * n else (2 * n, m)
    a, b = (plan.sample(kernel, case.shape, case.dtype, count) for count in (n, m))
    a = replace(a, pool="others")
    kernel.pair(a, b)
    taken = common.best_cpu(common.timed(lambda: kernel.pair(a, b)) for _ in range(repeats))
    return kernel.cost(n, m, case.shape, itemsize), taken, (n, m)


def fitted(counts: np.ndarray, times: np.ndarray, kinds: np.ndarray) -> str:
    """Rates that would fit best, relative to the times: nanoseconds for each of the counts."""
    from scipy.optimize import nnls

    rows = counts[kinds == 4] / times[kinds == 4, None]
    rates, _ = nnls(rows, np.ones(len(rows)))
    names = ("product", "entry", "transcendental", "call")
    return ", ".join(f"{name} {rate * 1e9:.3g} ns" for name, rate in zip(names, rates, strict=True))


if __name__ == "__main__":
    main()
