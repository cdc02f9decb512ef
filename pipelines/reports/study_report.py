"""The page of a study: several runs side by side, each beside what was expected of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..wording import (
    METRICS,
    NO_PLOTS,
    ORACLE,
    count_text,
    difference_text,
    ridge_text,
    score_text,
    seconds_text,
)
from . import plots
from .document import Block, Cell, Figure, Page, Section, Table, Text
from .report_computed import counted, model_phrase
from .verdict import TONES, Result, Verdict, at_ridge, is_oracle, metric_of, trained_on, verdict

Rows = tuple[list[str], list[list[str]]]
"""Header and rows, for a terminal."""


def make_study(
    name: str, title: str, run: str, created: str, variants: Sequence[tuple[str, Result, str]]
) -> dict[str, Any]:
    """A study as a JSON value, from (label, result, address of its report relative to the study's page)."""
    entries = [
        {"label": label, "report": report, "result": dict(result)} for label, result, report in variants
    ]
    return {"study": name, "title": title, "run": run, "created": created, "variants": entries}


def study_table(study: Mapping[str, Any]) -> Rows:
    """Header and rows of the table that a study prints: one row per variant, obtained beside expected."""
    table = _variants_table(study)
    return list(table.header), [[cell.text for cell in row] for row in table.rows]


def ridge_table(study: Mapping[str, Any]) -> Rows | None:
    """Header and rows of every variant's test score at every ridge, the expected one in brackets; None
    where no test score or expected value belongs to a ridge."""
    ridges = _study_ridges(study)
    if not ridges:
        return None
    rows = []
    for row in _ridge_rows(study, ridges):
        cells = [(_text(cell), cell.note.partition(",")[0] if isinstance(cell, Cell) else "") for cell in row]
        rows.append([f"{text} ({expected})" if expected else text for text, expected in cells])
    return ["", *(ridge_text(ridge) for ridge in ridges)], rows


def study_page(study: Mapping[str, Any]) -> Page:
    """The page of a study: every variant beside what was expected of it."""
    variants = study["variants"]
    marked = any(is_oracle(variant["result"]) for variant in variants)
    blocks: list[Block] = [_variants_table(study, links=True)]
    drawing = plots.available()
    figures = list(_study_figures(study)) if drawing else []
    blocks += figures if drawing else [Text(NO_PLOTS, "note")]
    sections = [Section("Variants", tuple(blocks))]
    ridges = _study_ridges(study)
    if ridges:
        caption = (
            "Test scores, accuracies in percent; below each the expected one and the difference."
            f" A ridge picked here is {ORACLE}."
        )
        table = Table.of(("", *(ridge_text(r) for r in ridges)), _ridge_rows(study, ridges), caption)
        sections.append(Section("Test scores at each ridge λ", (table,)))
    sections.append(
        Section(
            "What was run",
            (Table.of(("", "model", "data", "computed", "made by", "time", "run"), _runs(study)),),
        )
    )
    warnings = dict.fromkeys(w for variant in variants for w in variant["result"]["data"]["warnings"])
    summary = _study_summary(study) + (f" The ridges were {ORACLE}." if marked else "")
    foot = f"megagram {variants[0]['result']['megagram']} · run {study['run']} · {study['created']}"
    return Page(study["title"], summary, tuple(warnings), tuple(sections), foot)


def _study_summary(study: Mapping[str, Any]) -> str:
    variants = study["variants"]
    found = [one for one in (verdict(variant["result"]) for variant in variants) if one is not None]
    opening = f"{count_text(len(variants), 'model')} compared on {variants[0]['result']['data']['source']}."
    if not found:
        return f"{opening} No expected values are known."
    counts = {status: sum(one.status == status for one in found) for status in TONES}
    parts = [f"{n} {status}" for status, n in counts.items() if n]
    without = len(variants) - len(found)
    parts += [f"{without} without an expected value"] if without else []
    reasons = dict.fromkeys(one.reason for one in found if one.status == "not comparable")
    sentence = f"{opening} Against the expected values: {', '.join(parts)}."
    return sentence + (f" Not comparable: {'; '.join(reasons)}." if reasons else "")


def _variants_table(study: Mapping[str, Any], links: bool = False) -> Table:
    rows: list[list[str | Cell]] = []
    tested, marked = "test", False
    for variant in study["variants"]:
        result = variant["result"]
        evaluation = result["evaluation"]
        metric = evaluation["metric"]
        marked = marked or is_oracle(result)
        row: list[str | Cell] = [
            Cell(variant["label"], href=variant["report"] if links else ""),
            score_text(metric_of(evaluation["test"], metric), metric),
            score_text(metric_of(evaluation["validation"], metric), metric),
            ridge_text(evaluation["ridge"]),
        ]
        rows.append(row + _verdict_cells(verdict(result), result.get("expected") or {}))
    caption = f"* The ridge was {ORACLE}." if marked else ""
    tested += " *" if marked else ""
    header = ("", tested, "validation", "ridge λ", "expected", "difference", "tolerance", "verdict")
    empty = [k for k in range(2, len(header)) if all(_text(row[k]) == "–" for row in rows)]
    kept = [k for k in range(len(header)) if k not in empty]
    return Table.of([header[k] for k in kept], [[row[k] for k in kept] for row in rows], caption)


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _verdict_cells(found: Verdict | None, expected: Mapping[str, Any]) -> list[str | Cell]:
    """Expected, difference, tolerance, verdict; a whole path is summed up by its largest difference."""
    if found is None:
        return ["–", "–", "–", "–"]
    largest, single = found.largest, found.comparisons[0]
    value = (
        score_text(single.expected, found.metric)
        if single.ridge is None
        else f"at {len(found.comparisons)} ridges"
    )
    difference = difference_text(largest.difference, found.metric) if largest else "–"
    return [
        value,
        difference,
        f"{expected.get('tolerance', 0):g}",
        Cell(found.status, tone=TONES[found.status]),
    ]


def _study_ridges(study: Mapping[str, Any]) -> list[float]:
    """The ridges at which any variant has a test score or an expected one, the largest first."""
    ridges: dict[str, float] = {}
    for variant in study["variants"]:
        found = verdict(variant["result"])
        known = [c.ridge for c in found.comparisons if c.ridge is not None] if found else []
        known += [entry["ridge"] for entry in variant["result"]["evaluation"]["path"] if entry.get("test")]
        ridges.update({ridge_text(r): r for r in known})
    return sorted(ridges.values(), reverse=True)


def _ridge_rows(study: Mapping[str, Any], ridges: Sequence[float]) -> list[list[str | Cell]]:
    rows: list[list[str | Cell]] = []
    for variant in study["variants"]:
        evaluation = variant["result"]["evaluation"]
        found = verdict(variant["result"])
        metric = found.metric if found else evaluation["metric"]
        row: list[str | Cell] = [variant["label"]]
        for ridge in ridges:
            entry = at_ridge(evaluation["path"], ridge)
            obtained = _plain_score(metric_of(entry.get("test"), metric) if entry else None, metric)
            comparison = found.at(ridge) if found else None
            if found and comparison:
                apart = difference_text(comparison.difference, metric)
                note = f"{_plain_score(comparison.expected, metric)}, {apart}"
                row.append(Cell(obtained, note=note, tone=found.tone(comparison)))
            else:
                row.append(obtained)
        rows.append(row)
    return rows


def _plain_score(value: float | None, metric: str) -> str:
    """A score without its unit, which the table's caption gives: many columns must fit on a page."""
    return score_text(value, metric).removesuffix(" %")


def _study_figures(study: Mapping[str, Any]) -> Iterator[Block]:
    variants = study["variants"]
    found = [verdict(variant["result"]) for variant in variants]
    metric = variants[0]["result"]["evaluation"]["metric"]
    label = "test " + METRICS[metric] + (", percent" if metric == "accuracy" else "")
    marked = any(is_oracle(variant["result"]) for variant in variants)
    comparable = [one.comparisons if one and one.status != "not comparable" else () for one in found]
    finals = [next((c for c in comparisons if c.ridge is None), None) for comparisons in comparable]
    if any(finals):
        svg = plots.comparison(
            [variant["label"] for variant in variants],
            [metric_of(variant["result"]["evaluation"]["test"], metric) for variant in variants],
            [c.expected if c else None for c in finals],
            [c.tolerance if c else None for c in finals],
            label,
        )
        yield Figure(
            svg, "Obtained and expected test scores." + (f" The ridges were {ORACLE}." if marked else "")
        )
    if _study_ridges(study):
        series = []
        for colour, variant in enumerate(variants):
            path = [entry for entry in variant["result"]["evaluation"]["path"] if entry.get("test")]
            ridges = [entry["ridge"] for entry in path]
            values = [metric_of(entry["test"], metric) for entry in path]
            series.append(plots.Series(variant["label"], ridges, values, colour))
        yield Figure(
            plots.against_ridge(series, label), f"Test scores at every ridge; one picked here is {ORACLE}."
        )


def _runs(study: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for variant in study["variants"]:
        result = variant["result"]
        data = result["data"]
        test = (result["evaluation"]["test"] or {}).get("n", 0)
        sizes = f"{data['source']}, {trained_on(result):,} training, {test:,} test"
        (computed, made_by), time = counted(result), seconds_text(result["seconds"])
        rows.append([variant["label"], model_phrase(result), sizes, computed, made_by, time, result["run"]])
    return rows
