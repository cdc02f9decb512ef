"""Pairs of images per second on a GPU: fused code, and the general path on CuPy beside it; accuracy of both; and
what patch norms cost.

Needs kernels/, NumPy and CuPy alone, and a GPU. Times are of the device, by its events: medians of repeated calls
on blocks that are prepared there, every other one on other images. How busy a stream of tiles, with its copies to
the host, keeps the device is not measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# The code that is measured is the code beside this file, whatever is installed.
sys.path.insert(0, str(HERE.parents[1]))

from kernels import fused  # noqa: E402
from kernels.arrays import to_device, to_host, why_no_device  # noqa: E402
from kernels.convolutional import Convolutional, Layer  # noqa: E402
from kernels.cuda import device, programs  # noqa: E402
from kernels.network import network_on  # noqa: E402

SHAPE = (32, 32, 3)
NORMS_GOAL = 1.0
"""What the patch norms of one image may cost, in units of two pairs of fused code."""
EXP: dict[str, Any] = {"patch": 3, "kernel": "exponential", "sigma": 0.6}
RELU: dict[str, Any] = {"patch": 3, "kernel": "relu"}


@dataclass(frozen=True)
class Case:
    """goal, stretch: microseconds for a pair on one H200; sides: of a block, for fused and for general code."""

    what: str
    kernel: Convolutional
    sides: tuple[int, int]
    goal: float | None = None
    stretch: float | None = None


def pooled(layer: dict[str, Any], strides: tuple[int, ...], tangent: bool = False) -> Convolutional:
    return Convolutional(tuple(Layer(**layer, subsampling=t) for t in strides), tangent)


def global_mean(depth: int) -> Convolutional:
    hidden = (Layer(**RELU, pooling="average"),) * (depth - 1)
    return Convolutional((*hidden, Layer(**RELU, pooling="global")), True)


CASES = (
    Case("(a): exponential 2-5", pooled(EXP, (2, 5)), (192, 32), 2.0, 0.8),
    Case("ReLU RF 2-5", pooled(RELU, (2, 5)), (192, 32)),
    Case("ReLU NTK 2-5", pooled(RELU, (2, 5), True), (160, 24), 3.5),
    Case("exponential 2-2-2", pooled(EXP, (2, 2, 2)), (192, 32)),
    Case("CNTK, 14 layers, GAP", global_mean(14), (64, 8), 30.0, 15.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small blocks, to see that it works")
    parser.add_argument("--write", action="store_true", help="keep the table as results/device.md")
    parser.add_argument("--images", type=Path, help="float images (n, 32, 32, 3) as .npy; noise where absent")
    given = parser.parse_args()
    reason = why_no_device()
    if reason is not None:
        sys.exit(f"no GPU to measure: {reason}")
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    lines = [
        "# Pairs of images per second on a device",
        "",
        f"{date.today().isoformat()} · {properties['name'].decode()}, {properties['multiProcessorCount']}"
        f" multiprocessors, {properties['totalGlobalMem'] / 2**30:.0f} GiB · CuPy {cupy.__version__}, CUDA runtime"
        f" {cupy.cuda.runtime.runtimeGetVersion()}, driver {cupy.cuda.runtime.driverGetVersion()}, NumPy"
        f" {np.__version__} · images {SHAPE}, float32: "
        f"{'noise' if given.images is None else 'from a file'}."
        + (" Quick sizes: figures mean little." if given.quick else ""),
        "",
        "| model | path | us per pair | pairs/s | goal, stretch | verdict | largest error | time of the call |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes, norms = [], []
    for case in CASES:
        sides = tuple(max(4, side // 8) for side in case.sides) if given.quick else case.sides
        repeats = 3 if given.quick else 9
        for path, side in zip(("auto", "general"), sides, strict=True):
            row, each = measure(case, path, side, given.images, repeats)
            lines.append(row)
            print(row, flush=True)
            if path == "auto":
                norms.append(measure_norms(case, side, given.images, repeats, each))
                print(norms[-1], flush=True)
        notes += describe_programs(case)
    text = "\n".join(
        [
            *lines,
            "",
            "Error: against the general path in float64, relative to sqrt(K_ii K_jj), over a symmetric block of 12.",
            "Time of the call: of the host, until `pair` returns, against that until the device is done.",
            "",
            "Patch norms of images that are on the device, all layers:",
            "",
            "| model | us per image | two pairs, us | share | goal | verdict |",
            "| --- | --- | --- | --- | --- | --- |",
            *norms,
            "",
            "Programs, as compiled for this device:",
            "",
            *notes,
        ]
    )
    print(f"\n{text}")
    if given.write:
        (HERE / "results" / "device.md").write_text(text + "\n", encoding="utf-8")


def measure(case: Case, path: str, side: int, file: Path | None, repeats: int) -> tuple[str, float]:
    """One line of the table: the median time of a block of side x side pairs, its error, the host's part; and the
    microseconds for a pair."""
    kernel = case.kernel
    os.environ[fused.VARIABLE] = path
    X = load(file, 4 * side)
    blocks = [
        kernel.prepare(part, np.arange(n * side, n * side + side), "pool").on_device()
        for n, part in enumerate(np.split(X, 4))
    ]
    pairs = [(blocks[0], blocks[1]), (blocks[2], blocks[3]), (blocks[0], blocks[3]), (blocks[2], blocks[1])]
    seconds, call = timed(lambda turn: kernel.pair(*pairs[turn % 4]), repeats)
    each = seconds / side**2 * 1e6
    name = kernel.path(blocks[0])
    met = "" if case.goal is None or path != "auto" else verdict(each, case.goal, case.stretch)
    goal = ", ".join(str(limit) for limit in (case.goal, case.stretch) if limit is not None)
    row = (
        f"| {case.what} | {name} | {each:.3g} | {1e6 / each:,.0f} | {goal if path == 'auto' else ''} | {met} |"
        f" {largest_error(kernel, X[:12]):.1e} | {call / seconds:.0%} |"
    )
    return row, each


def measure_norms(case: Case, side: int, file: Path | None, repeats: int, pair: float) -> str:
    """One line of the table of norms; pair: microseconds for a pair of fused code."""
    os.environ[fused.VARIABLE] = "auto"
    halves = [to_device(half) for half in np.split(load(file, 4 * side), 2)]
    seconds, _ = timed(lambda turn: case.kernel.prepare(halves[turn % 2]), repeats)
    each = seconds / len(halves[0]) * 1e6
    share = each / (2 * pair)
    return (
        f"| {case.what} | {each:.3g} | {2 * pair:.3g} | {share:.2f} | {NORMS_GOAL} |"
        f" {verdict(share, NORMS_GOAL)} |"
    )


def timed(run: Callable[[int], object], repeats: int) -> tuple[float, float]:
    """Median seconds of ``run(turn)`` on the device, and of its call on the host; after a first one that compiles."""
    import cupy

    run(0)
    cupy.cuda.runtime.deviceSynchronize()
    times, calls = [], []
    for turn in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        began = time.perf_counter()
        run(turn)
        calls.append(time.perf_counter() - began)
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / 1e3)
    return statistics.median(times), statistics.median(calls)


def verdict(measured: float, goal: float, stretch: float | None = None) -> str:
    if stretch is not None and measured <= stretch:
        return "stretch met"
    return "met" if measured <= goal else "**missed**"


def largest_error(kernel: Convolutional, X: np.ndarray) -> float:
    """Of this path in float32, against the general path in float64 on the device."""
    a = kernel.prepare(X, pool="pool").on_device()
    found = to_host(kernel.pair(a, a))
    forced = os.environ[fused.VARIABLE]
    os.environ[fused.VARIABLE] = "general"
    exact = kernel.prepare(X.astype(np.float64), pool="pool").on_device()
    wanted = to_host(kernel.pair(exact, exact))
    os.environ[fused.VARIABLE] = forced
    scale = np.sqrt(wanted.diagonal())
    return float((np.abs(found - wanted) / (scale[:, None] * scale)).max())


def describe_programs(case: Case) -> list[str]:
    """Registers, memory, and threads at once of each program, in one line each."""
    from cupy.cuda import driver

    kernel = case.kernel
    network = network_on(kernel.layers, kernel.pooling_mode, SHAPE[:2])
    chosen = programs.plan(network, bool(kernel.tangent), SHAPE[2], device.shared_limit())
    lines = []
    for number, program in enumerate(chosen.programs, 1):
        function = device.compiled(program)
        blocks = driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.kernel.ptr, program.threads, program.shared_bytes
        )
        lines.append(
            f"- {case.what}, {program.name} {number}: {function.num_regs} registers, {function.local_size_bytes}"
            f" bytes spilt, {program.shared_bytes:,} bytes of shared memory, {program.threads} threads, {blocks}"
            f" blocks at once ({blocks * program.threads} threads on a multiprocessor)"
        )
    return lines


def load(file: Path | None, n: int) -> np.ndarray:
    """n images, float32: the file's first, or smooth noise."""
    if file is not None:
        X = np.load(file, allow_pickle=False)
        if len(X) < n:
            sys.exit(f"{file} holds {len(X)} images, and {n} are needed")
        return np.ascontiguousarray(X[:n], np.float32)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, *SHAPE))
    for axis in (1, 2):
        X = X + np.roll(X, 1, axis) + np.roll(X, 2, axis)
    return X.astype(np.float32)


if __name__ == "__main__":
    main()
