"""The report's drawings as inline SVG. Needs matplotlib, an optional extra: callers ask ``available`` first.

Colours are written as CSS variables of the page that holds the drawing, so that one file serves light
and dark; the hexadecimal values below are what matplotlib draws with and the fall-back of each variable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _RULE = "#1c2431", "#5d6877", "#dfe4ea"
_SERIES = ("#1f6fb2", "#d9730d", "#2c8a57", "#b23a7e", "#7a5cc0", "#8a6d1c", "#1797a6", "#c0392b", "#66707c")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule"} | {
    c: f"--s{k}" for k, c in enumerate(_SERIES)
}

_ENLARGED = (
    1.2  # how much larger than drawn, at most, a drawing is shown; the same for all, for even lettering
)


@dataclass(frozen=True)
class Series:
    """One curve or set of points over ridges.

    colour: number of the colour, the same for what belongs together; points that are not finite are left out.
    """

    label: str
    ridges: Sequence[float]
    values: Sequence[float | None]
    colour: int
    style: Literal["line", "dashed", "hollow", "star"] = "line"


@dataclass(frozen=True)
class Curve:
    """Values over sizes, several at each where it was repeated. line: two points (size, value) of a fitted line."""

    label: str
    sizes: Sequence[float]
    repeats: Sequence[Sequence[float]]
    colour: int
    line: Sequence[Sequence[float]] | None = None


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def against_ridge(series: Sequence[Series], ylabel: str, chosen: float | None = None) -> str:
    """Curves over a logarithmic axis of ridges, a vertical line at the chosen one; SVG."""

    def draw(ax: Axes) -> None:
        formats: dict[str, dict[str, Any]] = {
            "line": {"marker": "o", "markersize": 4, "linewidth": 1.6},
            "dashed": {"marker": "o", "markersize": 4, "linewidth": 1.6, "linestyle": (0, (4, 2))},
            "hollow": {"marker": "o", "markersize": 8, "linewidth": 0, "markerfacecolor": "none"},
            "star": {"marker": "*", "markersize": 12, "linewidth": 0},
        }
        if chosen is not None:
            ax.axvline(chosen, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)), label="chosen")
        for one in series:
            points = [
                (r, v)
                for r, v in zip(one.ridges, one.values, strict=True)
                if v is not None and np.isfinite(v)
            ]
            if points:
                colour = _SERIES[one.colour % len(_SERIES)]
                ax.plot(*zip(*points, strict=True), color=colour, label=one.label, **formats[one.style])
        ax.set_xscale("log")
        ax.set_xlabel("ridge λ")
        ax.set_ylabel(ylabel)
        _legend(ax)

    return _svg(draw, f"{ylabel} against ridge")


def against_size(
    curves: Sequence[Curve], xlabel: str, ylabel: str, goals: Sequence[tuple[str, float]] = ()
) -> str:
    """Errors over numbers of features, both axes logarithmic: root mean squares, a band that holds all repeats, the
    fitted line; goals as horizontal lines with their names; SVG. What is not a positive number is left out."""
    from matplotlib.ticker import LogLocator

    def draw(ax: Axes) -> None:
        for one in curves:
            usable = [k for k, values in enumerate(one.repeats) if all(0 < v < np.inf for v in values)]
            means = [float(np.sqrt(np.mean(np.square(one.repeats[k])))) for k in usable]
            _banded(ax, one, usable, means)
        for name, value in goals:
            ax.axhline(value, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)), label=f"{name} = {value:g}")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _sized(ax, curves, xlabel, ylabel)

    return _svg(draw, f"{ylabel} against {xlabel}")


def score_against_size(curve: Curve, exact: float, xlabel: str, ylabel: str) -> str:
    """Scores over numbers of features, a logarithmic axis, with a horizontal line at the exact kernel's; SVG."""

    def draw(ax: Axes) -> None:
        ax.axhline(exact, color=_SERIES[1], linewidth=1.4, label="exact kernel")
        _banded(ax, curve, range(len(curve.sizes)), [float(np.mean(values)) for values in curve.repeats])
        _sized(ax, [curve], xlabel, ylabel)

    return _svg(draw, f"{ylabel} against {xlabel}", height=2.6)


def _banded(ax: Axes, curve: Curve, usable: Sequence[int], means: Sequence[float]) -> None:
    colour, sizes = _SERIES[curve.colour % len(_SERIES)], [curve.sizes[k] for k in usable]
    ax.plot(
        sizes,
        means,
        color=colour,
        label=curve.label,
        marker="o",
        markersize=4,
        linewidth=0 if curve.line else 1.6,
    )
    least, most = ([end(curve.repeats[k]) for k in usable] for end in (min, max))
    ax.fill_between(sizes, least, most, color=colour, alpha=0.2, linewidth=0)
    if curve.line:
        ax.plot(*zip(*curve.line, strict=True), color=colour, linewidth=1.2, linestyle=(0, (4, 2)))


def _sized(ax: Axes, curves: Sequence[Curve], xlabel: str, ylabel: str) -> None:
    """An axis of sizes, with ticks at those that there are."""
    sizes = sorted({size for one in curves for size in one.sizes})
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    _legend(ax)


def tile_seconds(seconds: Sequence[float]) -> str:
    """Histogram of the seconds that single tiles took; SVG."""

    def draw(ax: Axes) -> None:
        values = np.asarray(seconds, dtype=float)
        ax.hist(values, bins=min(30, max(5, int(np.sqrt(len(values)) * 2))), color=_SERIES[0], rwidth=0.92)
        ax.set_xlim(left=0)
        ax.set_xlabel("seconds per tile")
        ax.set_ylabel("tiles")
        ax.locator_params(axis="y", integer=True)

    return _svg(draw, "Histogram of seconds per tile", height=2.1)


def confusion(matrix: Sequence[Sequence[int]]) -> str:
    """A large confusion matrix, rows the true classes, shaded by the share of the row; SVG."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    def draw(ax: Axes) -> None:
        counts = np.asarray(matrix, dtype=float)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        truth, predicted = np.nonzero(counts)
        colours = [to_rgba(_SERIES[0], max(0.08, share)) for share in shares[truth, predicted]]
        squares = [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j in zip(truth, predicted, strict=True)]
        ax.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))
        ax.set(xlim=(-0.5, len(counts) - 0.5), ylim=(len(counts) - 0.5, -0.5), aspect="equal")
        ax.grid(False)
        ax.set_xlabel("predicted class (number)")
        ax.set_ylabel("true class (number)")

    return _svg(draw, "Confusion matrix", height=4.6)


def comparison(
    labels: Sequence[str],
    obtained: Sequence[float | None],
    expected: Sequence[float | None],
    tolerances: Sequence[float | None],
    xlabel: str,
) -> str:
    """One line per variant: the obtained value as a dot over the expected one with its tolerance; SVG."""

    def draw(ax: Axes) -> None:
        places = np.arange(len(labels))
        bands = [
            (k, e, t or 0.0)
            for k, (e, t) in enumerate(zip(expected, tolerances, strict=True))
            if e is not None
        ]
        if bands:
            rows, centres, widths = zip(*bands, strict=True)
            ax.errorbar(centres, rows, xerr=widths, fmt="|", markersize=11, elinewidth=5,
                        color=_SERIES[1], alpha=0.55, label="expected, with tolerance")  # fmt: skip
        dots = [(v, k) for k, v in enumerate(obtained) if v is not None and np.isfinite(v)]
        if dots:
            ax.plot(*zip(*dots, strict=True), "o", color=_SERIES[0], markersize=6, label="obtained")
        ax.set_yticks(places, labels, parse_math=False)
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.set_xlabel(xlabel)
        _legend(ax)

    return _svg(draw, "Obtained and expected values", height=0.9 + 0.3 * len(labels))


def _legend(ax: Axes) -> None:
    """A legend below the axes, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        below = -0.42 / ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted()).height
        legend = ax.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(0.5, below),  # 0.42 inches below, in heights of the axes
            ncols=3,
            frameon=False,
            labelcolor=_INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a label may hold a dollar sign


def _svg(draw: Callable[[Axes], None], title: str, height: float = 3.0) -> str:
    """What ``draw`` puts on one pair of axes (5.2 x ``height`` inches) as an SVG element titled ``title``."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style would break the page's colours
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": title,
                "font.sans-serif": ["DejaVu Sans", "sans-serif"],
                "font.size": 9,
                "text.color": _INK,
                "axes.labelcolor": _MUTED,
                "axes.edgecolor": _RULE,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.formatter.useoffset": False,
                "grid.color": _RULE,
                "grid.linewidth": 0.6,
                "xtick.color": _MUTED,
                "ytick.color": _MUTED,
            }
        )
        figure = Figure(figsize=(5.2, height))
        draw(figure.subplots())
        return _inline(figure, title)


def _inline(figure: Figure, title: str) -> str:
    """``figure`` as an SVG element for an HTML page: no prolog, no fixed size, colours as variables."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # matplotlib's group names repeat from drawing to drawing
    width = re.search(r'width="([\d.]+)pt"', svg)
    largest = float(width[1]) * _ENLARGED if width else 0.0
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}" style="max-width: {largest:.0f}pt"', 1)
    return re.sub("|".join(_VARIABLES), lambda m: f"var({_VARIABLES[m.group()]}, {m.group()})", svg)
