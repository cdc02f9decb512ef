"""What lies under a root: every store, its size, and which experiments use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import leases
from .stores import KINDS, Store, open_store
from .wording import bytes_text


@dataclass(frozen=True)
class Entry:
    """One store. used_by: experiments whose results or running processes need it."""

    path: Path
    kind: str
    bytes: int
    holds: str
    used_by: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def inventory(root: Path) -> list[Entry]:
    """Every store under a root, largest first."""
    users = _users(root)
    entries = []
    for kind in KINDS:
        for document in sorted(root.glob(f"{kind}/*/zarr.json")):
            store = open_store(document.parent)
            holders = [lease.holder for lease in leases.living(store.path)]
            used = sorted(users.get(str(store.path.resolve()), set())) + holders
            entries.append(Entry(store.path, kind, store.size(), _holds(store), tuple(used)))
    return sorted(entries, key=lambda entry: -entry.bytes)


def unused(entries: Sequence[Entry]) -> list[Entry]:
    """The stores that no result and no living process needs."""
    return [entry for entry in entries if not entry.used_by]


def remove(entries: Sequence[Entry]) -> str:
    """Remove stores; returns how much was freed, in words."""
    for entry in entries:
        shutil.rmtree(entry.path)
    return f"{len(entries)} stores, {bytes_text(sum(entry.bytes for entry in entries))}"


def inventory_rows(entries: Sequence[Entry]) -> list[list[object]]:
    """Rows for a table: store, kind, size, what it holds, who uses it."""
    return [
        [
            entry.path.name,
            entry.kind,
            bytes_text(entry.bytes),
            entry.holds,
            ", ".join(entry.used_by) or "nobody",
        ]
        for entry in entries
    ]


def _users(root: Path) -> dict[str, set[str]]:
    """From a store's path to the experiments whose newest journals name it, with what those stores rest on."""
    users: dict[str, set[str]] = {}
    for path in sorted((root / "runs").glob("*/*.json")):
        try:
            journal = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if journal.get("state") != "done" and not leases.is_running(journal):
            continue
        for used in journal.get("uses", ()):
            users.setdefault(str(Path(used).resolve()), set()).add(journal["experiment"])
    return users


def _holds(store: Store) -> str:
    described = store.description
    if store.kind == "pools":
        return f"{described['source']} ({described['part']}), {store.axes[0]['rows']} samples"
    if store.kind == "features":
        what = "prepared blocks" if "prepared" in described else "preprocessed samples"
        return f"{what} of {described['pool']['source']} ({described['pool']['part']})"
    kernel = described["kernel"]
    rows = described["rows"]
    family = kernel.get("family") or kernel.get("kernel") or ("ntk" if kernel.get("tangent") else "")
    sizes = " x ".join(str(axis["rows"]) for axis in (store.axes if len(store.axes) > 1 else store.axes * 2))
    return f"{kernel['kind']} {family} over {rows['source']} ({rows['part']}), {sizes}, {described['dtype']}"
