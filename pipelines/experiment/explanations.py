"""What is wrong with a table, in one line that names the key and the nearest valid one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean "x"?`` for the nearest of ``known``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem of a table: its key path, what is wrong, the nearest valid key."""
    problems = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    first = problems[0]
    key, known = _place(first["loc"], model)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message.replace("Input should be", "must be").replace("valid tuple", "list")
    message = re.sub(r"valid dictionary( or instance of .*)?", "table", message)
    field = ".".join(re.split(r"[.\[]", key)[:2])
    if field in _SHAPES:
        key, message = field, _SHAPES[field]
    shown = f"{key}: {message}, got {json.dumps(first['input'], default=str)[:80]}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        shown += nearest(first["input"], re.findall(r"'([^']*)'", first["msg"]))
    return shown


# Where several shapes are allowed, what is wrong with each of them would only confuse.
_SHAPES = {
    "name": "must be 1 to 100 letters, digits, dots, underscores or hyphens, the first a letter or a digit",
    "data.order": 'must be "canonical" or { permutation = SEED }',
    "data.train": "must be a positive count or [start, stop]",
    "data.validation": "must be a positive count, [start, stop] or { random = COUNT }",
    "data.test": "must be a positive count or [start, stop]",
    "data.preprocess": "must be a list of step names, or tables with a name",
}


def _place(location: Sequence[int | str], model: type[BaseModel]) -> tuple[str, list[str]]:
    """The key path that a location names, and the keys that are valid beside its last one.

    Unions add the names of their members to a location; keys are what the file knows.
    """
    key = ""
    tables: dict[str, type[BaseModel]] = {"": model}
    known = list(model.model_fields)
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(part, int):
            key += f"[{part}]"
        elif part in tables:
            known = list(tables[part].model_fields)
        elif part in known or last:
            key += ("." if key else "") + part
            fields = [t.model_fields[part] for t in tables.values() if part in t.model_fields]
            tables = _tables(fields[0].annotation) if fields else {}
            if not last and len(tables) == 1:
                known = list(next(iter(tables.values())).model_fields)
    return key, known


def _tables(annotation: Any) -> dict[str, type[BaseModel]]:
    """The tables that an annotation allows, by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation.__name__: annotation}
    return {name: t for inner in get_args(annotation) for name, t in _tables(inner).items()}
