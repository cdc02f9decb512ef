"""Pairs of images per second and core, for the general NumPy path of convolutional kernels.

A second figure travels between machines: the time of a pair in units of ``np.exp`` over a million float32
numbers, taken in pieces that stay in the cache, in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from workload import convolutional, plan

from kernels.registry import from_description

COLOUR, DIGITS = (32, 32, 3), (8, 8, 1)
MILLION = 1_000_000
PIECE = 1 << 14

# The published C++ package, its best build, on one core of the machine where it was measured: pairs per
# second of model (a), and the units that one pair takes it.
PUBLISHED_PAIRS, PUBLISHED_UNITS = 65, 28
FACTOR = 3


@dataclass(frozen=True)
class Case:
    """published: pairs per second of the published package's best build, where it was measured."""

    what: str
    kernel: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    published: float | None = None


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("pair_kernels", "Pairs of images per second, NumPy path", options)
    two_five = (("relu", 2), ("relu", 5))
    model_a = convolutional(("exponential", 2), ("exponential", 5))
    digits = convolutional(("exponential", 2), ("exponential", 1))
    three = convolutional(("exponential", 2), ("exponential", 2), ("exponential", 2))
    cases = [
        Case("model (a): exponential 2-5, float32", model_a, COLOUR, "float32", PUBLISHED_PAIRS),
        Case("model (a), float64", model_a, COLOUR, "float64", 32),
        Case("ReLU RF 2-5, float32", convolutional(*two_five), COLOUR, "float32", 51),
        Case("ReLU NTK 2-5, float32", convolutional(*two_five, tangent=True), COLOUR, "float32", 41),
        Case("exponential 2-2-2, float32", three, COLOUR, "float32", 62),
        Case("digits, exponential 2-1, float32", digits, DIGITS, "float32"),
    ]
    repeats = 2 if options.quick else 5
    for number, case in enumerate(cases):
        pairs, units = measure(case, repeats, 0.3 if options.quick else 1.5)
        first = number == 0
        against = "" if case.published is None else f"; {pairs / case.published:.1f} x published"
        report.add(
            case.what,
            f"{pairs:,.0f} pairs/s",
            target=f"{FACTOR * PUBLISHED_PAIRS} pairs/s" if first else "",
            ratio=f"{pairs / (FACTOR * PUBLISHED_PAIRS):.2f}{against}" if first else against.lstrip("; "),
            met=pairs >= FACTOR * PUBLISHED_PAIRS if first else None,
        )
        report.add(
            f"{case.what}: time of a pair",
            f"{units:.2f} units",
            target=f"at most {PUBLISHED_UNITS / FACTOR:.1f} units" if first else "",
            ratio=f"{units * FACTOR / PUBLISHED_UNITS:.2f}" if first else "",
            met=units <= PUBLISHED_UNITS / FACTOR if first else None,
        )
    report.note(
        f"CPU time, best of {repeats} runs interleaved with the unit, which is np.exp over {MILLION:,} float32"
        f" numbers in pieces of {PIECE:,}"
    )
    report.note(
        "published: the C++ package ckn_kernel, one core of the machine where it was measured; its best build"
        f" takes {PUBLISHED_UNITS} units for a pair of (a)"
    )
    report.finish()


def measure(case: Case, repeats: int, seconds: float) -> tuple[float, float]:
    """Pairs per CPU second, and the time of one pair in units."""
    kernel = from_description(case.kernel)
    rows, columns = 4, 16
    a, b = (plan.sample(kernel, case.shape, case.dtype, n) for n in (rows, columns))
    once = common.timed(lambda: kernel.pair(a, b)).cpu
    columns = int(np.clip(columns * seconds / max(once, 1e-4), 8, 2048))
    b = plan.sample(kernel, case.shape, case.dtype, columns)
    runs = common.interleaved(
        {"pairs": lambda: common.timed(lambda: kernel.pair(a, b)), "unit": lambda: common.timed(unit)},
        repeats,
    )
    taken = common.best_cpu(runs["pairs"]) / (rows * columns)
    return 1 / taken, taken / (common.best_cpu(runs["unit"]) / UNITS)


UNITS = 50
_numbers = np.linspace(-4, 0, PIECE, dtype=np.float32)
_values = np.empty_like(_numbers)


def unit() -> None:
    """``UNITS`` times the exponentials of a million numbers."""
    for _ in range(UNITS * MILLION // PIECE):
        np.exp(_numbers, out=_values)


if __name__ == "__main__":
    main()
