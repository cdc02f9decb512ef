"""What lies under a root: every store, its size, and which experiments use it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import leases
from .errors import StoreError
from .results import has_result, journals
from .stores import Store, folder_bytes, open_store, store_paths
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
    for path in store_paths(root):
        holders = [lease.holder for lease in leases.living(path)]
        used = sorted(users.get((path.parent.name, path.name), set())) + holders
        try:
            holds = _holds(open_store(path))
        except (StoreError, KeyError, TypeError) as error:
            holds = f"cannot be read: {error}"
        entries.append(Entry(path, path.parent.name, folder_bytes(path), holds, tuple(used)))
    return sorted(entries, key=lambda entry: -entry.bytes)


def unused(entries: Sequence[Entry]) -> list[Entry]:
    """The stores that no result, nothing to be resumed and no living process needs."""
    return [entry for entry in entries if not entry.used_by]


def remove(entries: Sequence[Entry]) -> str:
    """Remove stores; returns how much was freed, in words.

    A store that somebody began to use since the entries were made is kept.
    """
    removed = [entry for entry in entries if not leases.living(entry.path)]
    for entry in removed:
        # Renamed first: no other process may find half of a store.
        going = entry.path.with_name(f".{entry.path.name}.removed")
        entry.path.rename(going)
        shutil.rmtree(going)
    return f"{len(removed)} stores, {bytes_text(sum(entry.bytes for entry in removed))}"


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


def _users(root: Path) -> dict[tuple[str, str], set[str]]:
    """From a store (kind, address) to the experiments that need it.

    An experiment needs what each of its results rests on, what runs since the newest one have left to resume,
    and what any run works on. Stores go by kind and address, so that a root may be moved.
    """
    users: dict[tuple[str, str], set[str]] = {}
    for folder in sorted((root / "runs").glob("*")):
        finished = False
        for journal in journals(root, folder.name):
            done = journal.get("state") == "done"
            if not (journal["alive"] or (has_result(root, journal) if done else not finished)):
                continue
            finished = finished or done
            named = [*journal.get("uses", ()), *(store["path"] for store in journal.get("stores", ()))]
            for used in map(Path, named):
                users.setdefault((used.parent.name, used.name), set()).add(folder.name)
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
