"""Experiment files: found by path or shipped name, and merged into the base that they extend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ExperimentError
from .explanations import nearest
from .kernel_tables import absolute_kernel_paths
from .schema import ARRAY_KEYS
from .toml import merged, read_toml


def shipped() -> dict[str, Path]:
    """Name and path of every shipped experiment."""
    # Found beside the package that ships them, without importing it: imports run the other way.
    folder = Path(__file__).resolve().parent.parent.parent / "flows" / "experiments"
    return {path.stem: path for path in sorted(folder.glob("*.toml")) if not path.stem.startswith("_")}


def find(where: str | Path) -> Path:
    """The file of an experiment given by path or shipped name.

    Raises:
        ExperimentError: neither exists; the nearest shipped name is given.
    """
    path = Path(where)
    if _is_file(path):
        return path
    known = shipped()
    if str(where) in known:
        return known[str(where)]
    base = Path(__file__).resolve().parent.parent.parent / "flows" / "experiments" / f"{where}.toml"
    if str(where).startswith("_") and base.is_file():
        return base
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise ExperimentError(f"{_short(where)}: no such file")
    raise ExperimentError(
        f'no shipped experiment is called "{_short(where)}"{nearest(str(where), known)}; see: megagram list'
    )


def resolved(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The file's table with ``extends`` followed and relative paths made absolute."""
    path = path.resolve()
    if path in chain:
        raise ExperimentError(f"{path}: extends itself, by way of {', '.join(str(p) for p in chain)}")
    table = read_toml(path)
    _absolute_paths(table, path.parent)
    variants = table.get("variants")
    for variant in variants if isinstance(variants, list) else ():
        if isinstance(variant, dict):
            _absolute_paths(variant, path.parent)
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ExperimentError(f"{path}: extends must be a path or the name of a shipped experiment")
    beside = path.parent / base
    return merged(resolved(beside if _is_file(beside) else find(base), (*chain, path)), table)


def _absolute_paths(table: dict[str, Any], folder: Path) -> None:
    data = table.get("data")
    if isinstance(data, dict):
        for key in ("folder", *ARRAY_KEYS):
            if isinstance(data.get(key), str):
                data[key] = str(folder / Path(data[key]).expanduser())
    if isinstance(table.get("kernel"), dict):
        absolute_kernel_paths(table["kernel"], folder)


def _is_file(path: Path) -> bool:
    """As Path.is_file, and False for what the system takes for no path at all."""
    try:
        return path.is_file()
    except OSError:
        return False


def _short(where: str | Path) -> str:
    text = str(where)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"
