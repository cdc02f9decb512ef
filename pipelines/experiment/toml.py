"""TOML: read from files, merged into one another, overridden key by key, written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExperimentError


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ExperimentError: unreadable or not TOML, with the file and the line.
    """
    try:
        # Editors of some systems write a mark in front of UTF-8, which TOML does not know.
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not valid TOML: {error}") from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` merged into it table by table; arrays and values are replaced.

    A ``[kernel]`` or ``[features]`` of another ``kind`` replaces the base's whole.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        other_kind = key in ("kernel", "features") and isinstance(value, dict) and "kind" in value
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and not (other_kind and value["kind"] != old.get("kind"))
        ):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def override(table: dict[str, Any], text: str, *, only_present: bool = False) -> None:
    """Apply ``key.path=value``; a variant takes it only where it sets that key itself."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ExperimentError(f'--set takes key.path=value, for example data.train=500; got "{text}"')
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    here: Any = table
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not (part.isdigit() and int(part) < len(here)):
                raise ExperimentError(f'--set {key}: "{part}" is not an index into {len(here)} entries')
            step: Any = int(part)
        elif isinstance(here, dict):
            step = part
            if part not in here:
                if only_present:
                    return
                if not last:
                    here[part] = {}
        else:
            raise ExperimentError(f"--set {key}: {'.'.join(parts[:depth])} is not a table")
        if last:
            here[step] = parsed
        else:
            here = here[step]


def to_toml(table: dict[str, Any]) -> str:
    """An experiment's plain values as TOML text."""
    values = [f"{key} = {_toml_value(v)}" for key, v in table.items() if not isinstance(v, dict)]
    for key, inner in table.items():
        if isinstance(inner, dict):
            values += ["", f"[{key}]", *(f"{k} = {_toml_value(v)}" for k, v in inner.items())]
    return "\n".join(values) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else f'"{key}"'
