"""Pairs of images per second and core, for every path that is here: general, compiled, CUDA.

A second figure travels between machines: the time of a pair in units of ``np.exp`` over a million float32
numbers, taken in pieces that stay in the cache, in the same run. Where the published C++ package ``ckn_kernel``
can be imported, it runs on the same images, with norms that are computed before.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import common
import numpy as np
from workload import convolutional, layers

from kernels.base import Kernel, KernelError, Prepared
from kernels.fused import VARIABLE
from kernels.registry import from_description
from pipelines import device, provenance

COLOUR, GREY, DIGITS = (32, 32, 3), (28, 28, 1), (8, 8, 1)
MILLION = 1_000_000
PIECE = 1 << 14
UNITS = 50
GROUP = 16
IMAGES = 128
"""Whose norms are computed in one call, as those of a tile's side are."""
STRETCH = 40
INSTRUCTION_SET = "MEGAGRAM_INSTRUCTION_SET"
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
PUBLISHED_UNITS = 28
"""What a pair of model (a) takes the published package's best build."""

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
PEER_NAMES = {"exponential": "exp", "relu": "relu", "linear": "linear"}


@dataclass(frozen=True)
class Case:
    """published: pairs per second of the published package's best build, on one core of the machine where it was
    measured. general, compiled: how many times as many are asked for."""

    what: str
    kernel: dict[str, Any]
    shape: tuple[int, ...] = COLOUR
    dtype: str = "float32"
    published: float | None = None
    general: float | None = None
    compiled: float | None = None


@dataclass(frozen=True)
class Timer:
    """Calls that are timed, and for how many pairs or images each stands. wall: by the clock, not the processor."""

    call: Callable[[], Any]
    count: int
    wall: bool = False


@dataclass(frozen=True)
class Peer:
    """Seconds and units of one of its pairs, and how far its values are from ours, relative to the largest."""

    seconds: float
    units: float
    apart: float


def cases() -> list[Case]:
    two = ("exponential", 2), ("exponential", 5)
    relu = ("relu", 2), ("relu", 5)
    poly = {"patch": 3, "kernel": "polynomial", "degree": 2, "subsampling": 2}
    unpooled = {"patch": 3, "kernel": "relu", "pooling": "average"}
    gap = [*([unpooled] * 4), {"patch": 3, "kernel": "relu", "pooling": "global"}]

    def of(*table: dict[str, Any], tangent: bool = False) -> dict[str, Any]:
        return {"kind": "convolutional", "tangent": tangent, "layers": list(table)}

    return [
        Case("(a) exponential 2-5", convolutional(*two), published=65, general=5, compiled=25),
        Case("ReLU RF 2-5", convolutional(*relu), published=51, general=4, compiled=20),
        Case("ReLU NTK 2-5", convolutional(*relu, tangent=True), published=41, general=4, compiled=20),
        Case("exponential 2-2-2", convolutional(*[("exponential", 2)] * 3), published=62),
        Case("polynomial 2 / exponential 2-5", of(poly, *layers(("exponential", 5)))),
        Case("exponential / linear 2-5", convolutional(("exponential", 2), ("linear", 5))),
        Case("(a) on 28x28x1", convolutional(*two), GREY),
        Case("exponential 2-1 on 8x8x1", convolutional(("exponential", 2), ("exponential", 1)), DIGITS),
        Case("ReLU NTK, 5 layers, global average", of(*gap, tangent=True)),
        Case("(a), float64", convolutional(*two), dtype="float64", published=32),
    ]


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("pair_kernels", "Pairs of images per second", options)
    repeats, seconds = (2, 0.2) if options.quick else (5, 1.0)
    apart = [compare(report, case, repeats, seconds) for case in cases()]
    report.note(
        f"CPU time of one core, median of {repeats} runs in turn with each other and with the unit, which is np.exp"
        f" over {MILLION:,} float32 numbers in pieces of {PIECE:,}; on a device the clock's time"
    )
    report.note(
        "published: the C++ package ckn_kernel with its best flags, one core of the machine where it was measured;"
        f" a pair of (a) took it {PUBLISHED_UNITS} units"
    )
    if importlib.util.find_spec("ckn_kernel") is not None:
        report.note(
            "ckn_kernel, in a process of its own, allocates arrays of megabytes for every pair; with memory kept: with"
            f" {' '.join(KEPT)} set, so that the C library does not return them to the system each time"
        )
        report.note(f"ckn_kernel's values differ from ours by at most {max(apart):.0e} of the largest")
    report.note("norms: what an image costs to prepare, in pairs of the same path")
    for name, state in provenance.paths().items():
        report.note(f"{name} path: {state}")
    report.finish()


def compare(report: common.Report, case: Case, repeats: int, seconds: float) -> float:
    """Rows of one model: a line for each path, one for its norms, two for the peer. Returns how far the peer's
    values are from ours, 0 where it is not here."""
    kernel = from_description(case.kernel)
    timers: dict[str, Timer] = {"unit": Timer(unit, UNITS)}
    found = paths(kernel, case)
    for path, asked in found.items():
        timers[path] = pairs(kernel, case, asked, seconds)
        if not lower(path):
            timers[f"{path}: norms"] = norms(kernel, case, asked, seconds / 4)
    taken = measured(timers, repeats)
    peer, kept = (beside(case, repeats, seconds, keep=keep) for keep in (False, True))
    for path in found:
        units = taken[path] / taken["unit"]
        ratios = [f"{1 / taken[path] / case.published:.1f} x published"] if case.published else []
        if peer and kept:
            ratios.append(
                f"{peer.units / units:.1f} x ckn_kernel here ({kept.units / units:.1f} x with memory kept)"
            )
        asked, met = target(case, path, taken, peer)
        report.add(
            f"{case.what}, {path}",
            f"{1 / taken[path]:,.0f} pairs/s, {units:.3g} units",
            target=asked,
            ratio="; ".join(ratios),
            met=met,
        )
        if lower(path):
            continue
        ratio = taken[f"{path}: norms"] / taken[path]
        report.add(
            f"{case.what}, {path}: norms",
            f"{1e3 * taken[f'{path}: norms']:.2f} ms an image",
            target="at most 2 pairs",
            ratio=f"{ratio:.2f} pairs",
            met=ratio <= 2,
        )
    for what, one in (("ckn_kernel", peer), ("ckn_kernel with memory kept", kept)):
        if one:
            report.add(f"{case.what}, {what}", f"{1 / one.seconds:,.0f} pairs/s, {one.units:.3g} units")
    return peer.apart if peer else 0.0


def measured(timers: dict[str, Timer], repeats: int) -> dict[str, float]:
    """Seconds of one pair, image or unit of each timer: the median of turns."""
    runs = common.interleaved({name: clocked(timer) for name, timer in timers.items()}, repeats)
    return {name: median(run.value for run in runs[name]) / timer.count for name, timer in timers.items()}


def target(case: Case, path: str, taken: dict[str, float], peer: Peer | None) -> tuple[str, bool | None]:
    """What is asked of a path, and whether it is there."""
    if lower(path):
        return "", None
    factor = case.general if path == "numpy" else case.compiled if path.startswith("compiled") else None
    if factor is not None and case.published is not None:
        stretch = f" (stretch {STRETCH} x)" if factor == 25 else ""
        if peer is None:
            return f"{factor:g} x published{stretch}", 1 / taken[path] >= factor * case.published
        # What runs beside ours meets the same machine.
        return f"{factor:g} x ckn_kernel{stretch}", peer.units >= factor * taken[path] / taken["unit"]
    if path.startswith("compiled") and "numpy" in taken:
        return "faster than numpy", taken[path] < taken["numpy"]
    return "", None


def lower(path: str) -> bool:
    """Compiled for another instruction set than the best that this processor has."""
    return path.startswith("compiled") and path != provenance.paths()["compiled"]


def paths(kernel: Kernel, case: Case) -> dict[str, dict[str, str]]:
    """Name of every path that takes the kernel here, with the variables that ask for it."""
    found: dict[str, dict[str, str]] = {}
    sets = [{VARIABLE: "compiled", INSTRUCTION_SET: name} for name in INSTRUCTION_SETS]
    for asked in ({VARIABLE: "general"}, *sets, {VARIABLE: "cuda"}):
        state = provenance.paths().get(asked[VARIABLE], "")
        if not state.startswith("absent"):
            with environment(asked), suppress(KernelError):  # a set that this processor lacks
                found.setdefault(kernel.path(samples(kernel, case, 1)), asked)
    return found


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def images(case: Case, n: int) -> np.ndarray:
    return np.random.default_rng(0).random((n, *case.shape)).astype(case.dtype)


def samples(kernel: Kernel, case: Case, n: int, pool: str = "") -> Prepared:
    return device.placed(kernel.prepare(images(case, n), pool=pool))


def pairs(kernel: Kernel, case: Case, asked: dict[str, str], seconds: float) -> Timer:
    """Blocks of a few first images by many second ones, no pair of one sample: about ``seconds`` of work, in whole
    groups."""
    with environment(asked):
        on_device = device.used()
        general = asked[VARIABLE] == "general"
        rows, columns = (1, 2) if general else (1, 2 * GROUP)
        if on_device:
            rows, columns = 16, 64
        b, a = samples(kernel, case, columns), samples(kernel, case, rows, "others")
        call = calling(kernel, a, b, asked)
        call()
        once = max(clocked(Timer(call, 1, on_device))().value, 1e-5)
        wanted = int(rows * columns * seconds / once)
        if wanted > 2 * rows * columns:
            side = kernel.tile_side(case.dtype)
            columns = int(np.clip(wanted // 4 // GROUP * GROUP, GROUP, side))
            rows = int(np.clip(wanted // columns, 1, columns))
            b, a = samples(kernel, case, columns), samples(kernel, case, rows, "others")
        return Timer(calling(kernel, a, b, asked), rows * columns, on_device)


def calling(kernel: Kernel, a: Prepared, b: Prepared, asked: dict[str, str]) -> Callable[[], Any]:
    def call() -> None:
        with environment(asked):
            kernel.pair(a, b)
            device.finish()

    return call


def norms(kernel: Kernel, case: Case, asked: dict[str, str], seconds: float) -> Timer:
    """Calls for as many images as a tile's side has: about ``seconds`` of work."""
    X = images(case, IMAGES)

    def call() -> None:
        with environment(asked):
            kernel.prepare(X)

    call()
    calls = int(np.clip(seconds / max(common.timed(call).cpu, 1e-5), 1, 1000))

    def several() -> None:
        for _ in range(calls):
            call()

    return Timer(several, calls * IMAGES)


def beside(case: Case, repeats: int, seconds: float, *, keep: bool = False) -> Peer | None:
    """The published package on the same images, in a process of its own: it would profit from what ours has told
    the allocator. None where it cannot be imported, or does not know the model."""
    if importlib.util.find_spec("ckn_kernel") is None or case.dtype != "float32" or None in peer_layers(case):
        return None
    with environment(KEPT if keep else {}):
        return common.in_child(measure_peer, case, repeats, seconds)


def measure_peer(case: Case, repeats: int, seconds: float) -> Peer:
    """Runs in a process of its own."""
    import ckn_kernel

    kernel, table = from_description(case.kernel), peer_layers(case)
    prepared = kernel.prepare(images(case, GROUP))
    X, theirs = prepared.arrays["image"], ckn_kernel.CKNKernel(case.shape, model=table)
    # Its own function for them returns nothing where a number is promised, and crashes in optimised builds.
    norm = np.zeros((GROUP, len(table), X[0, :, :, 0].size), np.float32)
    for number in range(len(table)):
        values = prepared.arrays[f"norm{number + 1}"]
        norm[:, number, : values.shape[1]] = values
    norm = norm.reshape(GROUP, -1)
    inverse = 1 / np.maximum(norm, 1e-6)

    def block(rows: int, columns: int) -> np.ndarray:
        sides = (X[:rows], X[:columns], norm[:rows], norm[:columns], inverse[:rows], inverse[:columns])
        return theirs.compute_kernel_matrix(*sides, ntk=case.kernel["tangent"])

    ours = kernel.pair(prepared[:2], prepared[:2])
    apart = float(np.max(np.abs(block(2, 2) - ours)) / np.max(np.abs(ours)))
    columns = int(np.clip(4 * seconds / max(common.timed(lambda: block(1, 4)).cpu, 1e-5), 2, GROUP))
    timers = {"pairs": Timer(lambda: block(1, columns), columns), "unit": Timer(unit, UNITS)}
    taken = measured(timers, repeats)
    return Peer(taken["pairs"], taken["pairs"] / taken["unit"], apart)


def peer_layers(case: Case) -> list[dict[str, Any] | None]:
    return [peer_layer(layer) for layer in case.kernel["layers"]]


def peer_layer(layer: dict[str, Any]) -> dict[str, Any] | None:
    """A layer in the peer's words; None where it has none."""
    if layer.get("pooling", "gaussian") != "gaussian":
        return None
    degree = layer.get("degree")
    name = f"poly{degree}" if degree in (2, 3, 4) else PEER_NAMES.get(layer["kernel"])
    words = {"npatch": layer["patch"], "subsampling": layer["subsampling"], "pooling": "gaussian"}
    return None if name is None else {**words, "kernel": name, "sigma": layer.get("sigma", 1.0)}


def clocked(timer: Timer) -> Callable[[], common.Timed]:
    """A call that returns, as its value, the seconds that count."""

    def run() -> common.Timed:
        measured = common.timed(timer.call)
        seconds = measured.wall if timer.wall else measured.cpu
        return common.Timed(measured.wall, measured.cpu, seconds)

    return run


_numbers = np.linspace(-4, 0, PIECE, dtype=np.float32)
_values = np.empty_like(_numbers)


def unit() -> None:
    """``UNITS`` times the exponentials of a million numbers."""
    for _ in range(UNITS * MILLION // PIECE):
        np.exp(_numbers, out=_values)


if __name__ == "__main__":
    main()
