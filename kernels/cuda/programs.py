"""Which kernels a network runs, or a feature map, specialised to it: source text, threads, shared memory.

``layer.cu``, ``displacement.cu`` and ``entrywise.cu`` are written for constants; what is put before them here
are those constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..base import KernelError
from ..deep import FullyConnected
from ..dot_product import DotProduct
from ..layers import Layer
from ..network import Network
from .axes import Axis, pooled, unpooled

LANES = 32
LARGEST_GRID = 32
"""Width of a grid that a warp's lanes hold; also the height of an image that the registers of a thread hold."""

_FOLDER = Path(__file__).parent
_TEXTS = ("scalar.cu", "layer.cu", "displacement.cu", "entrywise.cu")

_MOST_ROWS = 4
_MOST_THREADS = 512
"""Threads of a block that pools; it is cut into several rather than have more."""
_LAUNCHED_THREADS = 1024
"""Threads of a block that a device launches at all."""
_MOST_PIXELS = 64
"""Numbers of the second image that a thread keeps in registers."""
_MOST_LIVE = 8
"""Pooled columns that a thread keeps open in registers, for each of its rows."""
_MOST_TAPS = 64
_MOST_PATCH = 8
_THREADS_AT_ONCE = 512
"""Threads of one multiprocessor for which registers are set aside: 128 for each."""
_THREAD_ENTRIES = 4
_ENTRY_THREADS = 256
BLOCK_ENTRIES = _THREAD_ENTRIES * _ENTRY_THREADS
"""Entries of a matrix that one block of ``entrywise.cu`` takes."""


@dataclass(frozen=True)
class Program:
    """One specialised kernel.

    name: of the function; threads: of a block; shared_bytes: of a block; blocks: for one pair of images, or
    for ``BLOCK_ENTRIES`` entries of a matrix.
    result: shape of what it computes for one pair; () for a number, or where it works in place.
    """

    name: str
    source: str
    threads: int
    shared_bytes: int
    blocks: int
    result: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The programs that a network runs one after the other; or, in ``obstacle``, why there are none.

    all_layers: the one program computes all layers, and takes the norms of all of them.
    """

    programs: tuple[Program, ...] = ()
    all_layers: bool = False
    obstacle: str | None = None


@lru_cache(maxsize=64)
def plan(network: Network, tangent: bool, channels: int, shared_limit: int) -> Plan:
    """The programs for ``network`` on images with ``channels`` channels.

    shared_limit: bytes of shared memory that one block may have.
    """
    reason = _obstacle(network, channels)
    if reason is not None:
        return Plan(obstacle=reason)
    stages = network.stages
    if len(stages) > 1 and stages[0].grid[0] <= LARGEST_GRID and all(s.passes_on for s in stages[:-1]):
        chosen = Plan((_displacement(network, tangent, channels),), all_layers=True)
    else:
        numbers = range(len(stages))
        chosen = Plan(tuple(_layer(network, number, tangent, channels, shared_limit) for number in numbers))
    for program in chosen.programs:
        if program.shared_bytes > shared_limit:
            wanted, limit = f"{program.shared_bytes:,} bytes of shared memory", f"{shared_limit:,}"
        elif program.threads > _LAUNCHED_THREADS:
            wanted, limit = f"{program.threads:,} threads for one block", f"{_LAUNCHED_THREADS:,}"
        else:
            continue
        return Plan(obstacle=f"fused CUDA code would take {wanted}, and this device has {limit}")
    return chosen


@lru_cache(maxsize=64)
def scalar_function(layer: Layer, columns: int, weighted: bool) -> Program:
    """The program of ``entrywise.scalar_function`` for matrices with so many columns, with weights or without.

    Raises:
        KernelError: a text is missing from the installation.
    """
    # What turns inner products multiplied by the factors before into what scalar.cu takes, and its values into
    # those that the factors after are for: relu's are negated cosines, and pi kappa_1.
    before, shift, after = 1.0, 0.0, 1.0
    if layer.kernel == "relu":
        before, after = -1.0, math.pi
    elif layer.kernel == "exponential":
        before, shift = math.log2(math.e), layer.number()
    constants: dict[str, object] = {
        "FUNCTION": layer.kernel.upper(),
        "DEGREE": layer.degree or 1,
        "BEFORE": _float(before),
        "SHIFT": _float(shift),
        "AFTER": _float(after),
        "WEIGHTED": int(weighted),
    }
    return _entrywise("scalar_function", columns, constants)


@lru_cache(maxsize=64)
def weighted_cosines(columns: int) -> Program:
    """The program of ``entrywise.weighted_cosines`` for matrices with so many columns; raises as well."""
    return _entrywise("weighted_cosines", columns, {})


@lru_cache(maxsize=64)
def kernel_values(kernel: DotProduct | FullyConnected, columns: int) -> Program:
    """The program of ``entrywise.kernel_values`` for matrices with so many columns; raises as well."""
    constants: dict[str, object] = {
        "KAPPA": "NETWORK",
        "FUNCTION": "RELU",
        "DEGREE": 1,
        "RATE": 1.0,
        "GAMMA": 1.0,
        "LAYERS": 1,
    }
    match kernel:
        case FullyConnected():
            tangent = kernel.family == "ntk"
            kind = "BIASED_TANGENT" if tangent else "BIASED"
            constants["KAPPA"] = kind if kernel.bias else "TANGENT" if tangent else "NETWORK"
            constants["LAYERS"] = kernel.depth - 1
            constants["RATE"] = 1 / kernel.depth if kernel.normalized else 1.0
        case DotProduct(kernel="arc-cosine"):
            constants["KAPPA"] = "NETWORK" if kernel.order == 1 else "STEP"
        case DotProduct(kernel="laplace", c=c, gamma=gamma):
            assert c is not None
            constants |= {"KAPPA": "LAPLACE", "RATE": c * math.log2(math.e), "GAMMA": gamma}
        case _:
            constants |= {"KAPPA": "CLOSED", "FUNCTION": kernel.kernel.upper(), "DEGREE": kernel.degree or 1}
            if kernel.sigma is not None:
                constants["RATE"] = math.log2(math.e) / kernel.sigma**2
            elif kernel.scale is not None:
                constants["RATE"] = kernel.scale
    given = {key: _float(value) if isinstance(value, float) else value for key, value in constants.items()}
    return _entrywise("kernel_values", columns, given)


def _entrywise(name: str, columns: int, constants: dict[str, object]) -> Program:
    reason = _missing()
    if reason is not None:
        raise KernelError(reason)
    sizes = {"COLUMNS": columns, "ENTRIES": _THREAD_ENTRIES, "THREADS": _ENTRY_THREADS}
    return Program(name, _source("entrywise.cu", {**sizes, **constants}, ()), _ENTRY_THREADS, 0, 1, ())


def _missing() -> str | None:
    """The text that the installation lacks, as an error message; None if all are there."""
    for text in _TEXTS:
        if not (_FOLDER / text).is_file():
            return f"fused CUDA code lacks its file {_FOLDER / text}: install megagram again"
    return None


def _obstacle(network: Network, channels: int) -> str | None:
    reason = _missing()
    if reason is not None:
        return reason
    grid, widest = network.stages[0].grid, max(stage.layer.patch for stage in network.stages)
    if grid[1] > LARGEST_GRID:
        return f"fused CUDA code takes images up to {LARGEST_GRID} wide, not {grid[0]}x{grid[1]}"
    if widest > _MOST_PATCH:
        return f"fused CUDA code takes patches up to {_MOST_PATCH}x{_MOST_PATCH}, not {widest}x{widest}"
    patch = network.stages[0].layer.patch
    if patch * channels > _MOST_PIXELS:
        return f"fused CUDA code does not take {channels} channels with {patch}x{patch} patches"
    for number in range(1, len(network.stages)):
        for axis in _axes(network, number - 1):
            if _live(axis) > _MOST_LIVE or len(axis.taps) > _MOST_TAPS:
                return f"the pooling windows of layer {number} ({len(axis.taps)} wide) are too wide for fused code"
    return None


def _axes(network: Network, number: int) -> tuple[Axis, Axis]:
    stage = network.stages[number]
    stride = stage.layer.subsampling
    return pooled(stage.rows, stride, network.periodic), pooled(stage.columns, stride, network.periodic)


def _live(axis: Axis) -> int:
    return axis.last // axis.stride - axis.first // axis.stride + 1


def _layer(network: Network, number: int, tangent: bool, channels: int, shared_limit: int) -> Program:
    stage = network.stages[number]
    height, width = stage.grid
    images, pool = number == 0, number < len(network.stages) - 1
    layer, periodic = stage.layer, network.periodic
    rows, columns = _axes(network, number) if pool else (unpooled(height), unpooled(width))
    channel_stride = channels if channels < 3 else -(-channels // 4) * 4
    segment = _segment(width)
    arrays = 1 + tangent
    fixed = height * width * 8
    if images:
        fixed += ((height + layer.patch - 1) * width * channel_stride + 3) // 4 * 16

    most = rows.window(rows.outputs)  # rows of the second image that all pooled rows together need
    if not periodic:
        most = min(height, most)

    def cut(blocks: int, phase_columns: int) -> _Cut:
        wanted = -(-rows.outputs // blocks) if pool else height
        reach = rows.window(wanted)
        local = min(most, reach)
        thread_rows = min(_MOST_ROWS, -(-local * segment // LANES))
        if images:
            thread_rows = max(1, min(thread_rows, _MOST_PIXELS // channels - layer.patch + 1))
        threads = LANES * -(-local // (LANES // segment * thread_rows))
        if not pool:
            return _Cut(wanted, 1, phase_columns, thread_rows, threads, fixed + 8 * arrays * threads)
        entries = phase_columns * columns.outputs
        teams = max(1, threads // entries)
        held = threads // segment * thread_rows
        # Pooled rows beyond what was asked for keep all teams busy, where threads hold the rows that they need.
        while min(most, rows.window(-(-wanted // teams) * teams)) > held:
            teams -= 1
        pooled_rows = -(-wanted // teams) * teams
        passing = rows.window(pooled_rows) * entries
        kept = rows.kept * pooled_rows * columns.outputs**2
        shared = fixed + 4 * arrays * (2 * passing + kept)
        return _Cut(pooled_rows, teams, phase_columns, thread_rows, threads, shared)

    chosen = _least_cut(cut, rows.outputs, min(4, columns.outputs), shared_limit) if pool else cut(1, 1)

    definitions: dict[str, object] = {
        "HEIGHT": height,
        "WIDTH": width,
        "SEGMENT": segment,
        "ROWS": chosen.thread_rows,
        "THREADS": chosen.threads,
        "BLOCKS_AT_ONCE": _blocks_at_once(chosen.threads, chosen.shared_bytes, shared_limit),
        "SHARED_BYTES": chosen.shared_bytes,
        "IMAGES": int(images),
        "POOL": int(pool),
        "TANGENT": int(tangent),
        "PERIODIC": int(periodic),
        "CHANNELS": channels if images else 1,
        "CHANNEL_STRIDE": channel_stride if images else 1,
        "PATCH": layer.patch,
        "PATCH_SCALE": _float(_scale(layer)),
        "FUNCTION": layer.kernel.upper(),
        "SIGNED": int(_signed(network, number)),
        "DEGREE": layer.degree or 1,
        "NUMBER": _float(_number(layer)),
        "FLOOR": _float(layer.floor),
        "POOLED_HEIGHT": rows.outputs,
        "POOLED_WIDTH": columns.outputs,
        "POOLED_ROWS": chosen.pooled_rows,
        "TEAMS": chosen.teams,
        "PHASE_COLUMNS": chosen.phase_columns,
        "WINDOW_ROWS": rows.window(chosen.pooled_rows),
        "STORED_ROWS": rows.kept,
        "ROW_STRIDE": rows.stride,
        "ROW_FIRST": rows.first,
        "ROW_TAP_COUNT": len(rows.taps),
        "ROW_BEGIN": rows.begin,
        "ROW_END": rows.end,
        "COLUMN_STRIDE": columns.stride,
        "COLUMN_FIRST": columns.first,
        "COLUMN_TAP_COUNT": len(columns.taps),
        "COLUMN_BEGIN": columns.begin,
        "COLUMN_END": columns.end,
    }
    tables = [_table("BANDS", "short", _bands(network.support[number].rows), "__device__")]
    if pool:
        tables += [_table("ROW_TAPS", "float", rows.taps), _table("COLUMN_TAPS", "float", columns.taps)]
    else:
        tables += _weight_tables(network)
    return Program(
        "layer",
        _source("layer.cu", definitions, tables),
        chosen.threads,
        chosen.shared_bytes,
        -(-rows.outputs // chosen.pooled_rows) if pool else 1,
        (rows.outputs, rows.outputs, columns.outputs, columns.outputs) if pool else (),
    )


class _Cut(NamedTuple):
    """What of a pair one block of ``layer.cu`` takes at a time.

    pooled_rows: pooled rows of the second image, a multiple of teams; teams: groups of threads that share them;
    phase_columns: pooled columns of the first between two barriers; thread_rows: rows of the second image that a
    thread holds.
    """

    pooled_rows: int
    teams: int
    phase_columns: int
    thread_rows: int
    threads: int
    shared_bytes: int


def _least_cut(cut: Callable[[int, int], _Cut], rows: int, columns: int, shared_limit: int) -> _Cut:
    """The fewest blocks for a pair, and the longest phases, with which two blocks share a multiprocessor; else
    with which one fits."""
    for limit in (shared_limit // 2, shared_limit):
        for blocks in range(1, rows + 1):
            for phase_columns in range(columns, 0, -1):
                chosen = cut(blocks, phase_columns)
                if chosen.shared_bytes <= limit and chosen.threads <= _MOST_THREADS:
                    return chosen
    return cut(rows, 1)


def _displacement(network: Network, tangent: bool, channels: int) -> Program:
    height, width = network.stages[0].grid
    segment = _segment(width)
    row_weights, column_weights = network.trace_weights
    down, right = _cyclic_displacements(row_weights), _cyclic_displacements(column_weights)
    threads = LANES * min(8, -(-len(down) * len(right) * segment // LANES))
    shared = threads * (1 + tangent) * 8 + 3 * height * width * 8
    runs = []
    for run, same in groupby(_pointwise(network, number) for number in range(len(network.stages))):
        runs.append(f"RUN({len(list(same))}, {', '.join(run)})")
    definitions: dict[str, object] = {
        "HEIGHT": height,
        "WIDTH": width,
        "SEGMENT": segment,
        "THREADS": threads,
        "BLOCKS_AT_ONCE": max(1, min(16, _THREADS_AT_ONCE // threads)),
        "SHARED_BYTES": shared,
        "TANGENT": int(tangent),
        "PERIODIC": int(network.periodic),
        "CHANNELS": channels,
        "LAYERS": len(network.stages),
        "DOWN_COUNT": len(down),
        "RIGHT_COUNT": len(right),
        "RUNS": " ".join(runs),
    }
    tables = [
        _table("DOWN", "short", down, "__device__"),
        _table("RIGHT", "short", right, "__device__"),
        *_weight_tables(network),
    ]
    return Program("displacement", _source("displacement.cu", definitions, tables), threads, shared, 1, ())


def _pointwise(network: Network, number: int) -> tuple[str, ...]:
    """What layers of one run in ``displacement.cu`` have in common."""
    layer = network.stages[number].layer
    return (
        layer.kernel.upper(),
        str(int(_signed(network, number))),
        str(layer.degree or 1),
        str(layer.patch),
        _float(_number(layer)),
        _float(_scale(layer)),
        _float(layer.floor),
    )


def _signed(network: Network, number: int) -> bool:
    """Whether inner products of patches of this layer may be negative: those of images may, and powers of such."""
    if number == 0:
        return True
    before = network.stages[number - 1].layer
    match before.kernel:
        case "relu" | "exponential" | "square":
            return False
        case "polynomial":
            return int(before.number()) % 2 == 1 and _signed(network, number - 1)
    return _signed(network, number - 1)


def _number(layer: Layer) -> float:
    """What the second side's inverse norms are multiplied by."""
    match layer.kernel:
        case "exponential":
            return layer.number() * math.log2(math.e)
        case "linear":
            return layer.number()
    return 1.0


def _scale(layer: Layer) -> float:
    """What patch sums are multiplied by."""
    return layer.patch**-2 if layer.patch_norm else 1.0


def _segment(width: int) -> int:
    """Lanes of a warp that a row of the grid takes."""
    return max(4, 1 << (width - 1).bit_length())


def _blocks_at_once(threads: int, shared: int, shared_limit: int) -> int:
    """Blocks that one multiprocessor is to hold; the compiler leaves registers for so many."""
    return max(1, min(_THREADS_AT_ONCE // threads, shared_limit // shared, 16))


def _bands(mask: np.ndarray) -> list[int]:
    """For each row of the first image the first and last row of the second that it is needed with."""
    bands = []
    for row in mask:
        needed = np.flatnonzero(row)
        bands += [int(needed[0]), int(needed[-1])] if len(needed) else [1, 0]
    return bands


def _cyclic_displacements(weights: np.ndarray) -> list[int]:
    """Displacements d for which weights[i, (i + d) modulo n] is not zero for some i."""
    n = len(weights)
    i = np.arange(n)
    return [d for d in range(n) if weights[i, (i + d) % n].any()]


def _weight_tables(network: Network) -> Iterator[str]:
    for name, weights in zip(("ROW_WEIGHTS", "COLUMN_WEIGHTS"), network.trace_weights, strict=True):
        yield _table(name, "float", weights.ravel(), "__device__")


def _table(name: str, kind: str, values: Iterable[float], space: str = "__constant__") -> str:
    """An array in constant memory, where all threads read one entry, or in device memory, where they do not."""
    texts = [_float(value) if kind == "float" else str(value) for value in values]
    lines = (", ".join(texts[start : start + 8]) for start in range(0, len(texts), 8))
    return f"{space} const {kind} {name}[{len(texts)}] = {{\n    " + ",\n    ".join(lines) + "};"


def _float(value: float) -> str:
    return f"{float(np.float32(value))!r}f"


@cache
def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _source(name: str, definitions: dict[str, object], tables: Sequence[str]) -> str:
    lines = [f"#define {key} {value}" for key, value in definitions.items()]
    return "\n".join([_text("scalar.cu"), *lines, *tables, "", _text(name)])
