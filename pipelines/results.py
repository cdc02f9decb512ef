"""Results: one immutable folder per run, an atomically replaced ``latest``, and a journal while it runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from . import leases
from .errors import RootError, StoreError
from .files import disk_errors, replacing, sealed, sync, unsealed
from .tiles import as_ranges


def new_run_id() -> str:
    """Sorts by time, unique between processes."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:6]}"


class ResultStore:
    """The results of one experiment at one address: ``<root>/results/<name>-<address>/<run id>/``."""

    def __init__(self, root: Path, name: str, address: str) -> None:
        self.folder = root / "results" / f"{name}-{address[:12]}"

    def begin(self, run: str) -> Path:
        """A working folder for a run, invisible as a result until it is committed."""
        folder = self.folder / f".{run}"
        with disk_errors(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, run: str, result: Mapping[str, Any]) -> Path:
        """Write result.json, sealed, make everything durable, and publish the folder under the run's id."""
        working = self.folder / f".{run}"
        final = self.folder / run
        with disk_errors(self.folder):
            (working / "result.json").write_text(json.dumps(sealed(result), indent=1))
            for path in working.iterdir():
                sync(path)
            sync(working)
            os.rename(working, final)
            self._point_latest(run)
            sync(self.folder)
        return final

    def _point_latest(self, run: str) -> None:
        temporary = self.folder / f".latest.{uuid.uuid4().hex[:8]}"
        temporary.symlink_to(run)
        os.replace(temporary, self.folder / "latest")

    def latest(self) -> Path | None:
        """The newest run's folder, or None; its result may be damaged."""
        link = self.folder / "latest"
        return link.resolve() if link.exists() else None


def read(folder: Path) -> dict[str, Any]:
    """A run's result.json.

    Raises:
        StoreError: missing or damaged.
    """
    try:
        return unsealed(json.loads((folder / "result.json").read_text()))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: the result cannot be read ({error})") from None


_DECISIVE = ("data", "kernel", "features", "gram", "solve", "seed")
"""Keys of an experiment that its numbers depend on."""


def found(root: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and result of every run of an experiment under a root, newest first; damaged ones left out."""
    documents = (root / "results").glob(f"{name}-????????????/*/result.json")
    folders = {path.parent.resolve() for path in documents if not path.parent.name.startswith(".")}
    for folder in sorted(folders, key=lambda folder: folder.name, reverse=True):
        with contextlib.suppress(StoreError):
            yield folder, read(folder)


def newest(root: Path, name: str, table: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Folder and result of the newest run of an experiment as its table describes it now.

    Raises:
        StoreError: there is none under the root.
    """
    for folder, result in found(root, name):
        before = result["experiment_table"]
        if all(before.get(key) == table.get(key) for key in _DECISIVE):
            return folder, result
    raise StoreError(f"{root} holds no result of {name} as it is now; run it first")


def save_array(folder: Path, name: str, values: np.ndarray) -> int:
    """Save ``folder/name.npy``, plain NumPy; returns its crc32c, for ``load_array``.

    A file of that name is replaced, never written into: it may be a result's under a second name (see ``link``).

    Raises:
        DiskFull: no space is left.
    """
    # By way of memory: NumPy's own writing to a file does not say that a disk is full, only that it failed.
    encoded = io.BytesIO()
    np.save(encoded, values, allow_pickle=False)
    content = encoded.getvalue()
    with replacing(folder / f"{name}.npy") as temporary:
        temporary.write_bytes(content)
    return _checksum(content)


def load_array(folder: Path, name: str, checksum: int) -> np.ndarray:
    """What ``save_array`` saved and returned ``checksum`` for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content = (folder / f"{name}.npy").read_bytes()
    if _checksum(content) != checksum:
        raise ValueError(f"{name}.npy is damaged: stored and computed checksum do not match")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _checksum(content: bytes) -> int:
    import google_crc32c

    return google_crc32c.value(content)


def link(source: Path, target: Path) -> None:
    """One file under two names, where the file system can; else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with disk_errors(target.parent):
            shutil.copyfile(source, target)


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


class Journal:
    """What a run is doing, in one small file that ``status`` reads: ``<root>/runs/<name>/<run id>.json``, sealed."""

    def __init__(self, root: Path, name: str, run: str) -> None:
        self._path = root / "runs" / name / f"{run}.json"
        self._value: dict[str, Any] = {
            "experiment": name,
            "run": run,
            "host": leases.host(),
            "machine": leases.machine(),
            "pid": os.getpid(),
            "process_started": leases.process_started(os.getpid()),
            "started": time.time(),
            "state": "running",
            "stages": [],
            "stores": [],
        }
        self._written = 0.0
        self._counted: str | None = None
        self._ended = threading.Event()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except (OSError, StoreError) as error:
            raise RootError(f"{root} cannot be used as root ({error}); choose another --root") from None
        threading.Thread(target=self._beat, name="journal", daemon=True).start()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._value["stages"].append({"name": name, "started": time.time(), "done": 0, "total": 0})
        self._counted = None
        self._write()

    def progress(self, done: int, total: int, message: str = "") -> None:
        """How far the newest stage is, and of what; written at most every second.

        What is counted stands before a comma: where it changes, the count begins anew, and ``began`` says when and
        ``first`` with what.
        """
        stage, now = self._value["stages"][-1], time.time()
        if message.partition(", ")[0] != self._counted or done < stage["done"]:
            self._counted = message.partition(", ")[0]
            stage.update(began=now, first=done)
        stage.update(done=done, total=total, message=message, now=now)
        if time.monotonic() - self._written > 1.0 or done == total:
            self._write()

    def end_stage(self) -> None:
        self._value["stages"][-1]["seconds"] = time.time() - self._value["stages"][-1]["started"]
        self._write()

    def stores(self, stores: list[dict[str, Any]]) -> None:
        """Which Gram stores the run fills, and the tiles it ``needed`` of each, as runs of columns by row; or which
        stores of features, and the ``blocks`` of each, as ranges."""
        self._value["stores"] = stores
        self._write()

    def uses(self, paths: list[str]) -> None:
        """Paths of the stores that the run rests on, so that none of them is cleaned away."""
        self._value["uses"] = paths
        self._write()

    def way(self, way: dict[str, str]) -> None:
        """What was chosen where the experiment leaves it open (see ``begun``), by the digest of the experiment."""
        self._value["way"] = way
        self._write()

    def finish(self, state: str, **facts: Any) -> None:
        """The run ended: ``done`` with the report's path, or ``failed`` with the error."""
        self._ended.set()
        self._value.update(state=state, ended=time.time(), **facts)
        self._write()

    def _beat(self) -> None:
        """Renew the file's time, by which other machines know that this run lives."""
        while not self._ended.wait(leases.HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with disk_errors(self._path.parent):
            temporary.write_text(json.dumps(sealed(self._value)))
            os.replace(temporary, self._path)
        self._written = time.monotonic()


def journals(root: Path, name: str) -> list[dict[str, Any]]:
    """The journals of an experiment's runs, newest first; ``alive`` tells whether the process runs."""
    return sorted(_journals(root, name), key=lambda journal: journal["run"], reverse=True)


def all_journals(root: Path) -> list[dict[str, Any]]:
    """The journals of all runs under a root."""
    return _journals(root, "*")


def _journals(root: Path, name: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted((root / "runs").glob(f"{name}/*.json")):
        try:
            journal = _journal(json.loads(path.read_text()))
        except (OSError, ValueError):  # damaged, or removed meanwhile
            continue
        found.append({**journal, "alive": leases.is_running(path, journal)})
    return found


_ALWAYS = {"experiment", "run", "host", "pid", "process_started", "started", "state", "stages", "stores"}
"""Keys of a journal from its beginning on."""


def _journal(document: Any) -> dict[str, Any]:
    """A journal that is as it was written. One without a seal is of an earlier version: what its run uses, weeks of
    work maybe, is still somebody's.

    Raises:
        ValueError: it is damaged.
    """
    if isinstance(document, dict) and "seal" not in document and document.keys() >= _ALWAYS:
        return document
    return unsealed(document)


def result_of(root: Path, journal: Mapping[str, Any]) -> Path | None:
    """The folder of a finished run's result, under a root that may have been moved; None where it is gone."""
    found = next((root / "results").glob(f"*/{journal['run']}/result.json"), None)
    return None if found is None else found.parent


def unfinished(root: Path) -> list[Path]:
    """What runs that died left behind under a root: working folders and half-written links and journals."""
    alive = {journal["run"] for journal in all_journals(root) if journal["alive"]}
    folders = [path for path in (root / "results").glob("*/.*") if path.name.removeprefix(".") not in alive]
    now = leases.clock(root)
    strays = [*folders, *(root / "runs").glob("*/*.tmp")]
    return [path for path in strays if now - path.lstat().st_mtime > leases.EXPIRY_SECONDS]


def tiles_used(store: Path) -> frozenset[tuple[int, int]]:
    """Tiles of a Gram store that finished runs under its root needed."""
    return frozenset(tile for entry in _entries(store) for tile in tiles_of(entry["needed"]))


def blocks_used(store: Path) -> frozenset[int]:
    """Blocks of features that finished runs under a store's root solved with; none of prepared blocks of a matrix,
    which is what such runs rest on."""
    return frozenset(block for entry in _entries(store) for block in blocks_of(entry["blocks"]))


def _entries(store: Path) -> list[dict[str, Any]]:
    """What finished runs under its root noted of a store."""
    return [
        entry
        for journal in all_journals(store.parent.parent)
        for entry in (journal["stores"] if journal.get("state") == "done" else ())
        if (Path(entry["path"]).parent.name, Path(entry["path"]).name) == (store.parent.name, store.name)
    ]


def by_row(tiles: Iterable[tuple[int, int]]) -> dict[str, list[list[int]]]:
    """Tiles as runs [start, stop) of columns by tile row, small enough for a journal."""
    rows: dict[int, list[int]] = {}
    for i, j in sorted(tiles):
        rows.setdefault(i, []).append(j)
    return {str(i): [list(run) for run in as_ranges(columns)] for i, columns in rows.items()}


def tiles_of(rows: Mapping[str, list[list[int]]]) -> set[tuple[int, int]]:
    """The inverse of ``by_row``."""
    return {(int(i), j) for i, runs in rows.items() for start, stop in runs for j in range(start, stop)}


def blocks_of(ranges: Iterable[Sequence[int]]) -> set[int]:
    """Numbers from ranges [start, stop)."""
    return {block for start, stop in ranges for block in range(start, stop)}
