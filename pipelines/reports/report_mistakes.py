"""What a report says of wrong predictions: the confusion matrix, or the errors of a regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..wording import ORACLE, count_text, score_text
from . import plots
from .document import Block, Cell, Figure, Section, Table, Text
from .verdict import Result, is_oracle

_LARGEST_NUMBERED_MATRIX = 20


def mistakes(result: Result, drawing: bool) -> Iterator[Section]:
    """The section on wrong predictions, where there is a test set."""
    evaluation = result["evaluation"]
    if evaluation["task"] != "classification":
        if evaluation["test"] is not None:
            yield Section("Predictions", (_regression_table(result),))
        return
    matrix = evaluation["confusion"]
    if not matrix:
        return
    names = _class_names(result)
    caption = "Rows are the true classes, columns the predicted ones; shading is the share of the row."
    if is_oracle(result):
        caption += f" The ridge was {ORACLE}."
    blocks: list[Block] = []
    if len(matrix) <= _LARGEST_NUMBERED_MATRIX:
        rows: list[list[str | Cell]] = []
        for name, row in zip(names, matrix, strict=True):
            total = sum(row) or 1
            rows.append([name, *(Cell(str(n) if n else "·", shade=n / total) for n in row)])
        blocks.append(Table.of(("true \\ predicted", *names), rows, caption, heat=True))
    elif drawing:
        blocks.append(Figure(plots.confusion(matrix), caption))
    blocks.append(_confusions(matrix, names))
    yield Section("Confusion matrix", tuple(blocks))


def _class_names(result: Result) -> list[str]:
    """Names of the rows of the confusion matrix; labels name the class ids 0, 1, ..."""
    labels = result["data"].get("labels") or ()
    return [
        str(labels[c]) if labels and c in range(len(labels)) else str(c)
        for c in result["evaluation"]["classes"]
    ]


def _confusions(matrix: Sequence[Sequence[int]], names: Sequence[str], most: int = 8) -> Block:
    """The most frequent mistakes."""
    wrong = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    if not wrong:
        return Text("No test sample was mistaken.")
    wrong.sort(key=lambda item: (-item[0], item[1], item[2]))
    rows = [[names[i], names[j], f"{n:,}", f"{100 * n / sum(matrix[i]):.1f} %"] for n, i, j in wrong[:most]]
    kinds = sum(n for n, _, _ in wrong)
    caption = f"Most frequent of {count_text(kinds, 'mistake')}."
    return Table.of(("true class", "taken for", "times", "of the class"), rows, caption)


def _regression_table(result: Result) -> Table:
    evaluation = result["evaluation"]
    kept = [
        (key, evaluation[key])
        for key in ("train", "validation", "loo", "gcv", "test")
        if evaluation.get(key) is not None
    ]
    words = {"train": "training", "validation": "validation", "loo": "leave-one-out", "test": "test"}
    words["gcv"] = "generalised cross-validation"
    rows = [
        [words[key], f"{scores['n']:,}", *(score_text(scores[m], m) for m in ("rmse", "mse", "mae", "r2"))]
        for key, scores in kept
    ]
    caption = "R² is the share of the variance explained: 1 is perfect, 0 is no better than the mean."
    if is_oracle(result):
        caption += f" The ridge was {ORACLE}."
    return Table.of(("samples", "number", "RMSE", "MSE", "MAE", "R²"), rows, caption)
