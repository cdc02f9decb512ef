"""The page and the table of a comparison: features beside the exact kernel, by size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..reports import plots
from ..reports.document import Block, Cell, Code, Figure, Page, Section, Table, Text, Tone
from ..wording import (
    METRICS,
    NO_PLOTS,
    ORACLE,
    bytes_text,
    count_text,
    difference_text,
    kernel_phrase,
    number_text,
    plain_text,
    ridge_text,
    score_text,
    seconds_text,
)
from .findings import SEVERAL
from .measures import MEASURES, mean_error

Entry = Mapping[str, Any]
"""One experiment's part of a comparison, as ``compare_findings.findings`` makes it."""

_STATUS: dict[str, Tone] = {"pass": "good", "not reached": "bad", "not clear": "quiet"}

_MEASURES = (
    "relF and relOp: Frobenius and operator norm of the difference of the two matrices, relative to the exact one's;"
    " relMax: the largest difference of an entry, relative to the root of its two diagonal entries."
)


def sizes_table(entry: Entry) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: one row for each size, after that of the exact kernel."""
    table = _sizes(entry)
    return list(table.header), [[cell.text for cell in row] for row in table.rows]


def sentences(entry: Entry) -> list[str]:
    """What was found, in words."""
    found = [_slope_sentence(entry)]
    found += [target["text"] for target in entry["targets"]]
    if entry["landmarks"]:
        found.append(
            "Errors are measured on training samples, which may be landmarks themselves, where the error is 0; on"
            " other samples it is larger."
        )
    if entry["repeats"] == 1 and entry["asked_repeats"] > 1:
        found.append("Nothing in these features is drawn at random: one seed tells all.")
    return found


def compare_page(comparison: Mapping[str, Any]) -> Page:
    """The page of a comparison of one experiment, or of a table of them."""
    entries: Sequence[Entry] = comparison["entries"]
    several = len(entries) > 1
    drawing = plots.available()
    sections = []
    if several:
        blocks: list[Block] = [_slopes(entries), Text(_MEASURES, "note")]
        if drawing:
            curves = [_curve(entry, "relF", k, entry["label"]) for k, entry in enumerate(entries)]
            caption = (
                "relF of every kernel against size; bands hold all seeds, dashed lines are fitted."
                + _places(entries[0])
            )
            blocks.append(Figure(plots.against_size(curves, "size", "relF"), caption))
        sections.append(Section("All kernels", tuple(blocks)))
    for entry in entries:
        if several:
            texts = [Text(text) for text in sentences(entry)]
            sections.append(Section(entry["label"], (*texts, *_error_blocks(entry, drawing))))
        else:
            texts = [Text(text) for text in sentences(entry)[1:]]  # the first is the summary's
            errors = (*texts, *_error_blocks(entry, drawing), Text(_MEASURES, "note"))
            sections.append(Section("Error by number of features", errors))
            sections.append(Section("Ridge regression", tuple(_score_blocks(entry, drawing))))
            if drawing:  # without, the table of sizes says it all
                sections.append(Section("Time and memory", tuple(_price_blocks(entry))))
    sections.append(Section("What was compared", tuple(_facts(comparison))))
    foot = f"megagram {comparison['megagram']} · {comparison['created']}"
    return Page(comparison["title"], _summary(comparison), (), tuple(sections), foot)


def _summary(comparison: Mapping[str, Any]) -> str:
    entries: Sequence[Entry] = comparison["entries"]
    first = entries[0]
    samples = f"{first['counts']['train']:,} training samples of {first['source']}"
    if len(entries) == 1:
        kernel = kernel_phrase(first["kernel"])
        return f"Features of kind {first['kind']} beside {kernel}, on {samples}. {_slope_sentence(first)}"
    judged = [entry["slope"]["status"] for entry in entries if entry["slope"]]
    counts = ", ".join(f"{judged.count(status)} {status}" for status in _STATUS if status in judged)
    opening = f"Features beside {count_text(len(entries), 'kernel')}, on {samples}."
    return f"{opening} Slopes against the expected ones: {counts}." if counts else opening


def _slope_sentence(entry: Entry) -> str:
    fit, slope = entry["fits"]["relF"], entry["slope"]
    if fit is None:
        return "How the error falls with size takes three sizes or more to tell, with errors above zero."
    interval = (
        f"one seed, so no interval: give {SEVERAL}"
        if fit["low"] is None
        else f"95 % confidence: {_interval(fit)}"
    )
    text = f"relF goes like {entry['key']} to the power {fit['slope']:.2f} ({interval})"
    if slope is None:
        return f"{text}."
    return f"{text}; expected {slope['value']:g} ± {slope['tolerance']:g} (SPEC F6): {slope['status']}."


def _interval(fit: Mapping[str, Any]) -> str:
    return f"{fit['low']:.2f} to {fit['high']:.2f}"


def _slopes(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        fit, slope, largest = entry["fits"]["relF"], entry["slope"], entry["sizes"][-1]
        rows.append(
            [
                entry["label"],
                number_text(mean_error(largest["errors"]["relF"])),
                "–" if fit is None else f"{fit['slope']:.2f}",
                "–" if fit is None or fit["low"] is None else _interval(fit),
                f"{slope['value']:g} ± {slope['tolerance']:g}" if slope else "–",
                Cell(slope["status"], tone=_STATUS[slope["status"]]) if slope else "–",
            ]
        )
    header = (
        "",
        f"relF at {entries[0]['sizes'][-1]['text']}",
        "slope",
        "95 % confidence",
        "expected",
        "verdict",
    )
    return Table.of(header, rows)


def slopes_table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: one row for each experiment of a table."""
    table = _slopes(entries)
    return list(table.header), [[cell.text for cell in row] for row in table.rows]


def _error_blocks(entry: Entry, drawing: bool) -> Iterator[Block]:
    yield _sizes(entry)
    if not drawing:
        yield Text(NO_PLOTS, "note")
        return
    curves = [_curve(entry, measure, k, measure) for k, measure in enumerate(MEASURES)]
    goals = [(t["measure"], t["error"]) for t in entry["targets"]]
    yield Figure(plots.against_size(curves, entry["key"], "error", goals), _figure_caption(entry))


def _figure_caption(entry: Entry) -> str:
    bands = f" Bands hold all of {count_text(entry['repeats'], 'seed')}." if entry["repeats"] > 1 else ""
    return f"Error against {entry['key']}, both logarithmic; dashed lines are fitted.{_places(entry)}{bands}"


def _places(entry: Entry) -> str:
    """Where sizes of several numbers stand on an axis, in words; nothing where each is a number."""
    last = entry["sizes"][-1]
    if last["text"] == str(last["size"][0]):
        return ""
    return (
        " A size stands at the number that varies, or at the geometric mean of those that do:"
        f" {last['text']} at {last['position']:,.0f}."
    )


def _price_blocks(entry: Entry) -> Iterator[Block]:
    """What the features of a sample take, against their number."""
    places = [row["position"] for row in entry["sizes"]]
    for number, (name, key, unit, scale) in enumerate(_PRICES):
        curve = plots.Curve(name, places, [[row[key] / scale] for row in entry["sizes"]], number)
        caption = f"{name.capitalize()} of a sample's features against {entry['key']}, both logarithmic."
        yield Figure(plots.against_size([curve], entry["key"], unit), caption + _places(entry))


_PRICES = (("time", "seconds_per_sample", "µs", 1e-6), ("memory", "bytes_per_sample", "KiB", 1024))
"""Name, key, and the unit in which it is drawn, with its size."""


def _curve(entry: Entry, measure: str, colour: int, label: str) -> plots.Curve:
    rows, fit = entry["sizes"], entry["fits"][measure]
    return plots.Curve(
        label,
        [row["position"] for row in rows],
        [row["errors"][measure] for row in rows],
        colour,
        None if fit is None else fit["line"],
    )


def _score_blocks(entry: Entry, drawing: bool) -> Iterator[Block]:
    metric, part = entry["exact"]["metric"], _PARTS[entry["exact"]["part"]]
    rule = (
        ORACLE
        if entry["table"]["solve"]["select"] == "oracle"
        else "chosen for each by the experiment's own rule"
    )
    yield Text(
        f"{METRICS[metric].capitalize()} {part} of kernel ridge regression trained on the samples compared;"
        f" the ridge is {rule}."
    )
    if drawing:
        rows = entry["sizes"]
        curve = plots.Curve("features", [r["position"] for r in rows], [r["score"] for r in rows], 0)
        caption = (
            f"{METRICS[metric].capitalize()} {part} against {entry['key']}; the line is the exact kernel's."
            + _places(entry)
        )
        yield Figure(
            plots.score_against_size(curve, entry["exact"]["score"], entry["key"], METRICS[metric]), caption
        )


_PARTS = {
    "test": "on the test samples",
    "validation": "on the validation samples",
    "loo": "by leave-one-out",
    "gcv": "by generalised cross-validation",
}


def _sizes(entry: Entry) -> Table:
    metric = entry["exact"]["metric"]
    exact = entry["exact"]
    header = (entry["key"], *MEASURES, METRICS[metric], "gap", "time", "memory")
    rows: list[list[str | Cell]] = [
        ["exact kernel", "–", "–", "–", score_text(exact["score"], metric), "–", "–", "–"]
    ]
    for row in entry["sizes"]:
        cells: list[str | Cell] = [row["text"]]
        cells += [_error(row["errors"][m]) for m in MEASURES]
        cells.append(score_text(_mean(row["score"]), metric))
        cells.append(difference_text(_mean(row["gap"]), metric))
        cells += [seconds_text(row["seconds_per_sample"]), bytes_text(row["bytes_per_sample"])]
        rows.append(cells)
    repeats = (
        f" Of errors root mean squares, else means, over {count_text(entry['repeats'], 'seed')}, below them the range."
        if entry["repeats"] > 1
        else ""
    )
    gap = f"Gap: what the features lose in {METRICS[metric]}; below zero they gain. Time and memory are a sample's."
    return Table.of(header, rows, gap + repeats)


def _error(errors: Sequence[float]) -> Cell:
    """The mean, and the range below it where there are several errors."""
    note = f"{min(errors):.2g} – {max(errors):.2g}" if len(errors) > 1 else ""
    return Cell(number_text(mean_error(errors)), note=note)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _facts(comparison: Mapping[str, Any]) -> Iterator[Block]:
    for entry in comparison["entries"]:
        features = entry["table"].get("features") or entry["table"]["kernel"]
        own = {k: v for k, v in features.items() if k not in (entry["key"], "kernel", "blocks")}
        learning = [row["learning_seconds"] for row in entry["sizes"]]
        rows = [
            ("Experiment", entry["experiment"]),
            ("Exact kernel", kernel_phrase(entry["kernel"])),
            ("Features", plain_text(own)),
            ("Samples", ", ".join(f"{n:,} {name}" for name, n in entry["counts"].items())),
            ("Seeds", ", ".join(str(s) for s in sorted({p["seed"] for p in entry["points"]}))),
            ("Dtype", entry["dtype"]),
            ("Ridges", ", ".join(map(ridge_text, entry["table"]["solve"]["ridges"]))),
            ("Exact kernel's ridge", ridge_text(entry["exact"]["ridge"])),
            (
                "Learning took",
                f"{seconds_text(min(learning))} to {seconds_text(max(learning))}" if any(learning) else "",
            ),
            ("Made with", "; ".join(dict.fromkeys(p["made_with"] for p in entry["points"]))),
        ]
        yield Table.of((), [(name, value) for name, value in rows if value], entry["label"])
    yield Text("To compare again; what was found is not computed twice, and more sizes or seeds add to it:")
    yield Code(comparison["command"], "sh")
