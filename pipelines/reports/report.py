"""The report of a run: from its result (a JSON value) to a page, and to the short table of a terminal.

``build`` writes the page of one run, ``build_study`` that of several runs side by side (a published
table, say). A number that was chosen on the test set (``select = "oracle"``) is marked as such wherever
it appears (SPEC R8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluate import entries
from ..solvers.base import UNSOLVED
from ..wording import (
    GCV_CAUTION,
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
from . import plots
from .document import Block, Cell, Code, Figure, Page, Section, Table, Text, write
from .report_computed import computed_rows, map_rows, model_phrase, stores_tables, time_blocks
from .report_mistakes import mistakes
from .study_report import Rows, make_study, ridge_table, study_page, study_table
from .verdict import TONES, Result, final_fit, final_solve, is_oracle, metric_of, trained_on, verdict

__all__ = ["build", "build_study", "make_study", "page", "ridge_table", "study_table", "terminal_table"]

ITERATIVE = ("conjugate-gradient", "nystrom", "falkon")
"""Methods whose effective dimensions are estimates."""

ESTIMATED = "effective dimension estimated"
"""In the notes of a direct solver whose effective dimension is one."""


def _how_chosen(result: Result) -> str:
    evaluation = result["evaluation"]
    how = evaluation["select"]
    if how == "oracle":
        return ORACLE
    if len(evaluation["path"]) == 1:
        return "given, the only one tried"
    if how == "loo":
        return "chosen by leave-one-out on the training samples"
    if how == "gcv":
        return "chosen by generalised cross-validation on the training samples"
    return f"chosen on {count_text(evaluation['validation']['n'], 'validation sample')}"


def _summary(result: Result) -> str:
    evaluation, data = result["evaluation"], result["data"]
    test = evaluation["test"]
    trained = f"Trained on {count_text(trained_on(result), 'sample')} of {data['source']}, a model built on "
    trained += model_phrase(result)
    if test is None:
        return f"{trained}; no test samples were given."
    # Not where duplicates or the choice of the ridge say otherwise.
    unseen = count_text(test["n"], "test sample")
    if not is_oracle(result) and not any("also stand in" in text for text in data["warnings"]):
        unseen += " that it had not seen"
    if evaluation["task"] == "classification":
        sentence = f"{trained} recognises {score_text(test['accuracy'], 'accuracy')} of {unseen}"
        chance = _most_frequent(evaluation["confusion"])
        if chance is not None:
            sentence += f" (always giving the most frequent answer: {score_text(chance, 'accuracy')})"
    else:
        error = score_text(test["rmse"], "rmse")
        sentence = f"{trained} predicts {unseen} with a root mean squared error of {error}"
        if metric_of(test, "r2") is not None:
            sentence += f" and explains {100 * test['r2']:.1f} % of their variance"
    return f"{sentence}. Its ridge, {ridge_text(evaluation['ridge'])}, was {_how_chosen(result)}."


def _most_frequent(confusion: Sequence[Sequence[int]] | None) -> float | None:
    """Accuracy, in percent, of always answering the class that is most frequent in the test set."""
    rows = [sum(row) for row in confusion or ()]
    return 100 * max(rows) / sum(rows) if sum(rows) else None


def _headline(result: Result) -> list[tuple[str, Cell, str]]:
    """The rows (what, value, remark) of the first table, which the terminal shows as well."""
    evaluation = result["evaluation"]
    metric = evaluation["metric"]
    name = METRICS[metric]
    rows = []
    if evaluation["test"] is not None:
        value = Cell(score_text(evaluation["test"][metric], metric), tone="strong")
        rows.append((f"Test {name}", value, _test_remark(result)))
    if evaluation["validation"] is not None:
        remark = f"on {count_text(evaluation['validation']['n'], 'sample')}"
        if evaluation.get("refit"):
            remark += ", before the final model was fitted on these as well"
        rows.append(
            (f"Validation {name}", Cell(score_text(evaluation["validation"][metric], metric)), remark)
        )
    if evaluation["loo"] is not None:
        remark = f"on {count_text(evaluation['loo']['n'], 'training sample')}, each left out in turn"
        if result["solver"]["method"] == "tiled-cholesky":
            remark += "; estimated"
        known = _loo_metric(evaluation)
        value = Cell(score_text(evaluation["loo"][known], known))
        rows.append((f"Leave-one-out {METRICS[known]}", value, remark))
    if evaluation["select"] == "gcv":
        n = count_text(evaluation["gcv"]["n"], "training sample")
        remark = f"generalised cross-validation on {n}: {GCV_CAUTION}"
        rows.append((f"GCV {name}", Cell(score_text(evaluation["gcv"][metric], metric)), remark))
    fit = final_fit(result)
    remark = f"on {count_text(fit['n'], 'training sample')}"
    rows.append((f"Training {name}", Cell(score_text(fit[metric], metric)), remark))
    tried = len(evaluation["path"])
    remark = _how_chosen(result) + (f", best of {tried}" if tried > 1 else "") + _edge_remark(evaluation)
    rows.append(("Ridge λ", Cell(ridge_text(evaluation["ridge"])), remark))
    solve = final_solve(result)
    if solve["status"] in UNSOLVED:
        remark = (
            f"relative residual {number_text(solve['residual'])}; scores are of the coefficients as they are"
        )
        rows.append(("Solve", Cell(str(solve["status"]), tone="bad"), remark))
    rows += _expected_rows(result)
    return rows


def _test_remark(result: Result) -> str:
    test = result["evaluation"]["test"]
    of, *turned = result["data"].get("test_of", "pool").split(", ")
    where = ", ".join([{"test set": "the source's own test set"}.get(of, f"the {of}"), *turned])
    remark = f"on {count_text(test['n'], 'sample')} of {where}"
    accuracy = test.get("accuracy")
    if accuracy is not None and math.isfinite(accuracy):
        share = accuracy / 100
        remark += f"; standard error {100 * math.sqrt(share * (1 - share) / test['n']):.2f} points"
    return f"{remark}; {ORACLE}" if is_oracle(result) else remark


def _edge_remark(evaluation: Mapping[str, Any]) -> str:
    """A hint where the best ridge is the first or last of the grid, so that a wider grid may do better."""
    ridges = [entry["ridge"] for entry in evaluation["path"]]
    if len(ridges) < 3 or evaluation["ridge"] not in (min(ridges), max(ridges)):
        return ""
    end, beyond = ("smallest", "smaller") if evaluation["ridge"] == min(ridges) else ("largest", "larger")
    return f"; the {end} of the grid, so {beyond} ones may do better"


def _expected_rows(result: Result) -> list[tuple[str, Cell, str]]:
    found = verdict(result)
    if found is None:
        return []
    expected = result["expected"]
    remark = "; ".join(str(expected[key]) for key in ("source", "note") if expected.get(key))
    tolerance = f"±\u00a0{expected.get('tolerance', 0):g}"
    rows = [
        ("Expected value", Cell(f"{score_text(c.expected, found.metric)} {tolerance}"), remark)
        for c in found.comparisons
        if c.ridge is None
    ] or [("Expected values", Cell(f"{count_text(len(found.comparisons), 'ridge')}, {tolerance}"), remark)]
    remark = found.reason
    if found.largest:
        which = "largest difference" if len(found.comparisons) > 1 else "difference"
        remark = f"{which} {difference_text(found.largest.difference, found.metric)}; {remark}"
    rows.append(("Verdict", Cell(found.status, tone=TONES[found.status]), remark))
    return rows


def terminal_table(result: Result) -> Rows:
    """Header and rows of the table that a run prints: what, value, remark."""
    rows = [[what, cell.text, remark] for what, cell, remark in _headline(result)]
    rows += computed_rows(result)
    rows.append(["Time", seconds_text(result["seconds"]), result["engine"]])
    return ["", "value", "remark"], rows


def page(result: Result) -> Page:
    """The page of one run."""
    drawing = plots.available()
    blocks: list[Block] = [Table.of(("", "value", "remark"), _headline(result))]
    if not drawing:
        blocks.append(Text(NO_PLOTS, "note"))
    path = (
        "Accuracy against ridge"
        if result["evaluation"]["task"] == "classification"
        else "Error against ridge"
    )
    sections = (
        Section("Result", tuple(blocks)),
        Section(path, tuple(_path_blocks(result, drawing))),
        *mistakes(result, drawing),
        Section(f"Time and {'tiles' if result['gram'] else 'features'}", tuple(time_blocks(result, drawing))),
        Section("Data", (Table.of((), _data_rows(result)),)),
        Section("Kernel and solver", (Table.of((), _model_rows(result)),)),
        Section("Configuration", (Code(result["experiment_toml"], "toml"),)),
        Section("Provenance", tuple(_provenance_blocks(result))),
    )
    warnings = tuple(dict.fromkeys((*result["data"]["warnings"], *result["evaluation"].get("notes", ()))))
    foot = f"megagram {result['megagram']} · run {result['run']} · {result['created']}"
    return Page(result["experiment"], _summary(result), warnings, sections, foot)


def _path_blocks(result: Result, drawing: bool) -> Iterator[Block]:
    evaluation = result["evaluation"]
    path, metric = evaluation["path"], evaluation["metric"]
    if drawing and len(path) > 1:
        caption = "Training scores are optimistic; the dotted line is the chosen ridge."
        if is_oracle(result):
            caption += f" Test scores at every ridge are shown, the chosen one was {ORACLE}."
        label = METRICS[metric] + (", percent" if metric == "accuracy" else "")
        yield Figure(plots.against_ridge(_path_series(result), label, evaluation["ridge"]), caption)
    yield _path_table(result)
    yield _solves_table(result)
    notes: dict[str, list[str]] = {}
    for entry in path:
        for note in entry.get("notes") or ():
            notes.setdefault(note, []).append(ridge_text(entry["ridge"]))
    for note, ridges in notes.items():
        yield Text(f"At ridge {', '.join(ridges)}: {note}", "note")


def _loo_metric(evaluation: Mapping[str, Any]) -> str:
    """What leaving one out is measured in: an estimate knows no accuracy."""
    return evaluation["metric"] if evaluation["metric"] in evaluation["loo"] else "rmse"


def _path_series(result: Result) -> list[plots.Series]:
    evaluation = result["evaluation"]
    path, metric = evaluation["path"], evaluation["metric"]
    ridges = [entry["ridge"] for entry in path]
    named = (
        ("validation", "validation", 0),
        ("loo", "leave-one-out", 2),
        ("gcv", "generalised cross-validation", 4),
        ("train", "training", 8),
    )
    series = [
        plots.Series(name, ridges, [metric_of(entry.get(key), metric) for entry in path], colour)
        for key, name, colour in named
        if any(metric_of(entry.get(key), metric) is not None for entry in path)
    ]
    if is_oracle(result):
        values = [metric_of(entry.get("test"), metric) for entry in path]
        series.append(plots.Series("test (for comparison only)", ridges, values, 1, "dashed"))
    elif evaluation["test"] is not None:
        series.append(
            plots.Series(
                "test (scored once)",
                [evaluation["ridge"]],
                [metric_of(evaluation["test"], metric)],
                1,
                "star",
            )
        )
    found = verdict(result)
    points = [c for c in found.comparisons if c.ridge is not None] if found else []
    if points:
        known = [c.ridge for c in points if c.ridge is not None]
        series.append(plots.Series("expected", known, [c.expected for c in points], 3, "hollow"))
    return series


def _path_table(result: Result) -> Table:
    evaluation = result["evaluation"]
    path, metric = evaluation["path"], evaluation["metric"]
    columns: list[tuple[str, list[str | Cell]]] = [
        ("ridge λ", [ridge_text(entry["ridge"]) for entry in path])
    ]
    if len(path) > 1:
        columns.append(
            ("", ["←\u00a0chosen" if entry["ridge"] == evaluation["ridge"] else "" for entry in path])
        )
    for key, name in (
        ("train", "training"),
        ("validation", "validation"),
        ("loo", "leave-one-out"),
        ("gcv", "GCV"),
        ("test", "test *"),
    ):
        if any(entry.get(key) for entry in path):
            shown = _loo_metric(evaluation) if key == "loo" else metric
            name += "" if shown == metric else f", {METRICS[shown]}"
            columns.append((name, [score_text(metric_of(entry.get(key), shown), shown) for entry in path]))
    found = verdict(result)
    known = [found.at(entry["ridge"]) if found else None for entry in path]
    if found and any(known):
        columns.append(("expected", [score_text(c.expected, metric) if c else "–" for c in known]))
        apart = [
            Cell(difference_text(c.difference, metric), tone=found.tone(c)) if c else Cell("–") for c in known
        ]
        columns.append(("difference", list(apart)))
    caption = f"* The ridge was {ORACLE}." if is_oracle(result) else ""
    return _table(columns, caption)


def _solves_table(result: Result) -> Table:
    path = entries(result["evaluation"])
    ridges: list[str | Cell] = [ridge_text(entry["ridge"]) for entry in path]
    if result["evaluation"].get("refit"):
        ridges[-1] = f"{ridges[-1]}, on training and validation samples"
    columns: list[tuple[str, list[str | Cell]]] = [("ridge λ", ridges)]
    columns.append(("solver", [str(entry["status"]) for entry in path]))
    columns.append(("residual", [number_text(entry.get("residual")) for entry in path]))
    method = result["solver"]["method"]
    columns.append(("effective dimension", [_dimension_text(entry, method) for entry in path]))
    if any(entry.get("iterations") for entry in path):
        columns.append(("iterations", [str(entry["iterations"]) for entry in path]))
    if any(entry.get("jitter") for entry in path):
        columns.append(("jitter", [number_text(entry["jitter"]) for entry in path]))
    columns.append(("time", [seconds_text(entry.get("seconds")) for entry in path]))
    columns.append(("memory", [bytes_text(entry.get("peak_bytes")) for entry in path]))
    caption = (
        f"Each ridge is one linear system; {_residual(result)}. Effective dimensions marked ≈ are estimates."
    )
    return _table(columns, caption)


def _residual(result: Result) -> str:
    """What a residual is one of."""
    if result.get("features"):
        return "residual: |(ΦᵀΦ + nλI)w − ΦᵀY| / |ΦᵀY|, Φ the features"
    if result["solver"]["method"] == "nystrom":
        return "residual of the preconditioned normal equations"
    return "residual: |(K + nλI)α − Y| / |Y|"


def _dimension_text(entry: Mapping[str, Any], method: str) -> str:
    """An effective dimension, marked where it is an estimate."""
    text = number_text(entry.get("effective_dimension"))
    estimated = method in ITERATIVE or any(ESTIMATED in note for note in entry.get("notes") or ())
    return f"≈\u00a0{text}" if estimated and entry.get("effective_dimension") is not None else text


def _table(columns: Sequence[tuple[str, Sequence[str | Cell]]], caption: str) -> Table:
    """A table from its columns."""
    rows = [list(row) for row in zip(*(values for _, values in columns), strict=True)]
    return Table.of([name for name, _ in columns], rows, caption)


def _data_rows(result: Result) -> list[tuple[str, str]]:
    data = result["data"]
    rows = [
        ("Source", data["source"]),
        ("Identity", data["identity"]),
        ("Digest of the pool", data["digest"]),
        ("Digest of the test set", data["test_digest"]),
        ("Order", plain_text(data["order"])),
        ("Training", _range(data["train"])),
        ("Validation", _range(data["validation"])),
        ("Test", f"{_range(data['test'])} of the {data['test_of']}" if data["test"] else None),
        ("Sample shape", " × ".join(map(str, data["shape"]))),
        ("Preprocessing", "; ".join(map(plain_text, data["preprocess"])) or "none"),
    ]
    return [(name, value) for name, value in rows if value]


def _range(rows: Any) -> str:
    match rows:
        case [int(start), int(stop)]:
            return f"rows {start:,} to {stop - 1:,} ({stop - start:,})"
        case None:
            return ""
    return plain_text(rows)


def _model_rows(result: Result) -> list[tuple[str, str]]:
    solver = result["solver"]
    description = dict(result["kernel"]["description"])
    layers = description.pop("layers", [])
    return [
        ("Kernel", kernel_phrase(result["kernel"]["description"])),
        ("Parameters", plain_text(description)),
        *((f"Layer {k}", plain_text(layer)) for k, layer in enumerate(layers, 1)),
        ("Fingerprint", result["kernel"]["fingerprint"]),
        *map_rows(result),
        ("Solver", f"{solver['method']}, {solver['dtype']}"),
        ("Why this solver", solver.get("reason") or "–"),
    ]


def _provenance_blocks(result: Result) -> Iterator[Block]:
    made, cluster = result["provenance"], result["cluster"]
    rows = [
        ("Run", result["run"]),
        ("Created", result["created"]),
        ("Ran by", result["engine"]),
        ("Workers", f"{cluster['workers']} (profile {cluster['profile']})"),
        ("Each worker", plain_text(cluster.get("worker"))),
        ("Processor", f"{made['cpu']}, {count_text(made['cores'], 'core')}"),
        ("Memory", bytes_text(made["memory_bytes"])),
        ("GPU", made.get("gpu") or "none"),
        ("Kernel path asked for", cluster.get("kernel_path", "auto")),
        ("Paths beside the general one", "; ".join(made.get("paths", {}).values())),
        ("BLAS", plain_text(made["blas"])),
        ("Platform", made["platform"]),
        ("Python", made["python"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())),
    ]
    yield Table.of((), [(name, value) for name, value in rows if value not in ("", "–")])
    yield from stores_tables(result)
    yield Text("To reproduce this run; a second time, what is stored is reused:")
    yield Code(made["command"], "sh")


def build(result: Result, folder: Path) -> Path:
    """Write ``report.md`` and ``report.html`` of one run into ``folder``; returns the path of the HTML.

    result: the run's JSON value; a page that is there already is replaced as a whole. Plots need
    matplotlib; without it the page says so and is otherwise complete.
    """
    return write(page(result), folder)


def build_study(study: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.md`` and ``report.html`` of a study (see ``make_study``); returns the HTML."""
    return write(study_page(study), folder)
