"""What lies under a root: every store, its size, and which experiments use it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import evaluate, leases
from .errors import StoreError
from .explicit import mapfiles
from .fit import SOLVES
from .results import journals, read, result_of
from .stores import FactorStore, Store, folder_bytes, open_store, remove_store, store_paths
from .wording import bytes_text


@dataclass(frozen=True)
class Entry:
    """One store, what a feature map learned, or the folder of a solve.

    used_by: experiments whose results or running processes need it.
    """

    path: Path
    kind: str
    bytes: int
    holds: str
    used_by: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def inventory(root: Path) -> list[Entry]:
    """Every store under a root, what maps learned, and what interrupted solves left, largest first."""
    users = _users(root)
    entries = []
    for path in (*store_paths(root), *mapfiles.paths(root), *solve_paths(root)):
        holders = [lease.holder for lease in leases.living(path)]
        solve = (SOLVES, path.name)
        try:
            if path.parent.name == SOLVES:
                holds = _kept(path)
            elif path.parent.name == mapfiles.KIND:
                holds = _known(path)
            else:
                store = open_store(path)
                holds = _holds(store)
                if isinstance(store, FactorStore):  # whoever goes on with the solve needs its factor
                    solve = (SOLVES, str(store.description.get("of")))
        except (StoreError, KeyError, TypeError) as error:
            holds = f"cannot be read: {error}"
        used = users.get((path.parent.name, path.name), set()) | users.get(solve, set())
        entries.append(Entry(path, path.parent.name, folder_bytes(path), holds, (*sorted(used), *holders)))
    return sorted(entries, key=lambda entry: -entry.bytes)


def solve_paths(root: Path) -> list[Path]:
    """The folders of solves under a root."""
    return [path for path in sorted((root / SOLVES).glob("*")) if not path.name.startswith(".")]


def resumable_bytes(root: Path, name: str) -> int:
    """Bytes of what unfinished runs of an experiment left for its next start: solves and their factors."""
    used = [
        Path(path)
        for run in journals(root, name)
        if run.get("state") != "done"
        for path in run.get("uses", ())
    ]
    folders = {root / SOLVES / path.name for path in used if path.parent.name == SOLVES}
    return sum(folder_bytes(path) for path in (*folders, *factors_of(root, {path.name for path in folders})))


def solves_of(root: Path, name: str, version: str) -> list[Path]:
    """The folders of solves that runs of a version of an experiment named; ``begun`` says what a version is."""
    used = {
        Path(path).name
        for journal in journals(root, name)
        if (journal.get("way") or {}).get("experiment") == version
        for path in journal.get("uses", ())
        if Path(path).parent.name == SOLVES
    }
    return [root / SOLVES / address for address in sorted(used)]


def half_removed(root: Path) -> list[Path]:
    """The folders of solves that were being removed when their remover died."""
    return sorted((root / SOLVES).glob(".*"))


def remove_solves(root: Path, folders: Sequence[Path]) -> None:
    """Remove what solves kept, their factors included, once their result is safe; not where a run works, or one with
    another list of ridges, or of another experiment, has something left to go on from."""
    names = {folder.name for folder in folders}
    needed = _users(root, names) if names else {}
    going = [folder for folder in folders if folder.exists() and (SOLVES, folder.name) not in needed]
    going += factors_of(root, {folder.name for folder in going})
    for path in going:
        if not leases.living(path):
            remove_store(path)


def unused(entries: Sequence[Entry]) -> list[Entry]:
    """The stores that no result, nothing to be resumed and no living process needs."""
    return [entry for entry in entries if not entry.used_by]


def remove(entries: Sequence[Entry]) -> str:
    """Remove stores; returns how much was freed, in words.

    A store that somebody began to use since the entries were made is kept.
    """
    removed = [entry for entry in entries if not leases.living(entry.path)]
    for entry in removed:
        remove_store(entry.path)
    return f"{len(removed)} stores, {bytes_text(sum(entry.bytes for entry in removed))}"


def _kept(solve: Path) -> str:
    """What the folder of a solve holds."""
    ridges = len(list(solve.glob("**/ridge-*/solution.json")))
    return f"an unfinished solve, {ridges} ridge{'' if ridges == 1 else 's'} kept"


def _known(folder: Path) -> str:
    """What the folder of a map holds."""
    document = mapfiles.describe(folder)
    facts = document["facts"]
    return f"what a {document['description']['kind']} map learned from {facts['samples']} samples of {facts['source']}"


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


def _users(root: Path, solves: Collection[str] | None = None) -> dict[tuple[str, str], set[str]]:
    """From a store (kind, address) to the experiments that need it; of solves of some names alone.

    An experiment needs what each of its results rests on, what runs since the newest one have left to resume,
    and what any run works on. A solve is of no more use to a run that finished, unless more iterations could go on
    from it and no newer run of the experiment had enough. Stores go by kind and address, so that a root may be moved.

    Of solves that are named (a finished run's own, to be removed unasked) those count as well that runs of other
    versions of an experiment's file left to resume, with another list of ridges above all: until that version has
    finished, or where it failed for its numbers or for memory, and has no way to go on in (see ``begun``).
    """
    users: dict[tuple[str, str], set[str]] = {}
    solved: set[str]
    finished: set[str | None]
    for folder in sorted((root / "runs").glob("*")):
        finished, solved = set(), set()
        for journal in journals(root, folder.name):
            done, way = journal.get("state") == "done", journal.get("way") or {}
            result = result_of(root, journal) if done else None
            version = way.get("experiment")
            overtaken = bool(finished) if solves is None else version in finished or "method" not in way
            if not (journal["alive"] or (result is not None if done else not overtaken)):
                continue
            if done:
                finished.add(version)
            named = [*journal.get("uses", ()), *(store["path"] for store in journal.get("stores", ()))]
            for used in map(Path, named):
                if solves is not None and not (used.parent.name == SOLVES and used.name in solves):
                    continue
                if (
                    used.parent.name == SOLVES
                    and result
                    and (used.name in solved or not _stopped_short(result))
                ):
                    solved.add(used.name)
                    continue
                users.setdefault((used.parent.name, used.name), set()).add(folder.name)
    return users


def _stopped_short(result: Path) -> bool:
    """Whether an iterative solve of a finished run ended above its tolerance; yes where its result does not say."""
    try:
        return evaluate.stopped_short(read(result)["evaluation"])
    except (StoreError, KeyError):
        return True


def _holds(store: Store) -> str:
    described = store.description
    if store.kind == "pools":
        return f"{described['source']} ({described['part']}), {store.axes[0]['rows']} samples"
    if store.kind == "features":
        what = "prepared blocks" if "prepared" in described else "preprocessed samples"
        return f"{what} of {described['pool']['source']} ({described['pool']['part']})"
    if store.kind == FactorStore.kind:
        n = described["n"]
        return f"factor of {n} x {n}, {described['dtype']}, of solve {described['of']}"
    kernel = described["kernel"]
    rows = described["rows"]
    family = kernel.get("family") or kernel.get("kernel") or ("ntk" if kernel.get("tangent") else "")
    sizes = " x ".join(str(axis["rows"]) for axis in (store.axes if len(store.axes) > 1 else store.axes * 2))
    return f"{kernel['kind']} {family} over {rows['source']} ({rows['part']}), {sizes}, {described['dtype']}"


def factors_of(root: Path, solves: Collection[str]) -> list[Path]:
    """The stores of factors that solves of these names made."""
    found = []
    for path in store_paths(root) if solves else ():
        if path.parent.name == FactorStore.kind:
            with contextlib.suppress(StoreError):
                if open_store(path).description.get("of") in solves:
                    found.append(path)
    return found
