"""Numbers and kernels in words, the same on every page and on the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

ORACLE = "chosen on the test set: for comparison with published numbers only"
GCV_CAUTION = "optimistic, and leaning to small ridges, where the leverages of samples differ"
NO_PLOTS = "Plots are left out because matplotlib is not installed: pip install 'megagram[plot]' adds them."
METRICS = {
    "accuracy": "accuracy",
    "rmse": "error (RMSE)",
    "mse": "error (MSE)",
    "mae": "error (MAE)",
    "r2": "R²",
}

ITERATIONS = "iterations"
"""What an iterative solve counts, for its progress."""


def first_line(error: BaseException) -> str:
    """Of an error's message, cut off between words where it is long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    parts = textwrap.wrap(line, 156, break_on_hyphens=False)
    return line if len(parts) == 1 else f"{parts[0]} ..."


def score_text(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f} %" if metric == "accuracy" else f"{value:.4g}"


def difference_text(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{round(value, 2) + 0.0:+.2f}" if metric == "accuracy" else f"{value + 0.0:+.3g}"


def ridge_text(value: float | None) -> str:
    if value is None:
        return "–"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def number_text(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if 1e3 <= abs(float(text)) < 1e7 else text


def seconds_text(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    if value < 100:
        return f"{value:.3g} s"
    if value > 172800:
        return f"{value / 86400:.3g} days"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if value < 6000 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def count_text(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def paths_text(tiles: Mapping[str, int]) -> str:
    """How many tiles each code made, in words; a dash for none."""
    return ", ".join(f"{path}: {n:,}" for path, n in tiles.items()) or "–"


def plain_text(value: Any) -> str:
    """Any JSON value in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain_text(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain_text(v) for v in value)
    return "–" if value is None else str(value)


def kernel_phrase(description: Mapping[str, Any]) -> str:
    """A kernel in a few words, from its description."""
    match description:
        case {"kind": "fully-connected", "family": "ntk", "depth": depth}:
            return f"the neural tangent kernel of a fully connected network of {depth} layers"
        case {"kind": "fully-connected", "depth": depth}:
            return f"the random-feature kernel of a fully connected network of {depth} layers"
        case {"kind": "convolutional" | "roto-translation" as kind, "layers": layers}:
            what = "neural tangent kernel" if description.get("tangent") else "kernel"
            names = " / ".join(_layer_name(layer) for layer in layers)
            if kind == "roto-translation":
                names += f"; {description['final']} over {description['rotations']} rotations"
            return f"a {kind} {what} of {count_text(len(layers), 'layer')} ({names})"
        case {"kind": "dot-product", "kernel": name}:
            return f"the {name} kernel"
        case {"kind": "scaled", "term": term}:
            return kernel_phrase(term)
        case {"kind": "sum" | "product" as kind, "terms": terms}:
            return f"a {kind} of {len(terms)} kernels"
        case {"kind": "precomputed"}:
            return "a precomputed kernel"
    return f"a {description.get('kind', 'user-defined')} kernel"


def _layer_name(layer: Mapping[str, Any]) -> str:
    name, parameter = layer["kernel"], layer.get("sigma") or layer.get("degree")
    return f"{name} {parameter:g}" if parameter and name in ("exponential", "polynomial") else str(name)
