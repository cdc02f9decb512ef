"""Status from the files of a root alone, without a server and without heavy imports."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipelines import leases
from pipelines.errors import StoreError
from pipelines.results import blocks_of, journals, tiles_of
from pipelines.stores import FeatureStore, GramStore, Store, open_store
from pipelines.tiles import Tile
from pipelines.wording import ITERATIONS, seconds_text

RECENT_SECONDS = 300.0
"""The rate is that of the last five minutes of work."""


def store_status(path: Path, needed: set[Tile] | None = None) -> dict[str, Any]:
    """Tiles done, rate, remaining time and failures of a Gram store; chunks on disk of any other store.

    needed: the tiles that a run wants; all of the matrix when absent.
    """
    store = open_store(path)
    if not isinstance(store, GramStore):
        return {"title": str(path), "kind": store.kind, "chunks": _chunks(store), "bytes": store.size()}
    rows, columns = store.grid.shape
    total = rows * (rows + 1) // 2 if store.symmetric else rows * columns
    present = store.present()
    done = len(present) if needed is None else len(present & needed)
    total = total if needed is None else len(needed)
    records = store.records()
    rate = _rate(records)
    failed = {tuple(tile): r["error"] for r in records for tile in r.get("failed", ())}
    return {
        "title": str(path),
        "kind": store.kind,
        "tiles_done": done,
        "tiles_total": total,
        "rate_per_second": rate,
        "remaining_seconds": (total - done) / rate
        if rate and done < total
        else (0.0 if done == total else None),
        "failed": [
            {"tile": list(tile), "error": error} for tile, error in failed.items() if tile not in present
        ],
        "set_aside": len(list((path / "damaged").glob("*"))),
        "workers": sorted({lease.holder for lease in leases.living(path)}),
    }


def experiment_status(what: str, root: Path) -> list[dict[str, Any]]:
    """The newest run of each experiment of a file or shipped name.

    Raises:
        StoreError: the root holds no run of it.
    """
    found = []
    for name in _names(what, root):
        newest = next(iter(journals(root, name)), None)
        if newest is not None:
            found.append(_of_run(newest))
    if not found:
        raise StoreError(f"{root} holds no run of {what}; start one with: megagram run {what} --root {root}")
    return found


def status_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for a table: what, and how it stands."""
    if "tiles_done" in found:
        rows = [("tiles", _tiles(found))]
        if found["workers"]:
            rows.append(("worked on by", ", ".join(found["workers"])))
        if found["set_aside"]:
            rows.append(("damaged tiles set aside", str(found["set_aside"])))
        return rows + _failures(found)
    if "chunks" in found:
        return [("kind", found["kind"]), ("chunks stored", str(found["chunks"]))]
    rows = [("run", found["run"]), ("state", found["state"])]
    for stage in found["stages"]:
        if "seconds" in stage:
            text = f"done in {stage['seconds']:.1f} s"
        elif stage["total"]:
            text = f"{stage['done']} of {stage['total']}"
            if stage.get("message"):
                text += f" {stage['message']}"
            if found["state"] == "running" and "began" in stage:
                text += _pace(stage)
        else:
            text = "begun"
        rows.append((f"stage {stage['name']}", text))
    for store in found["stores"]:
        if "blocks_total" in store:
            rows.append(
                (
                    f"{store['role']} features",
                    f"{store['blocks_done']} of {store['blocks_total']} blocks stored",
                )
            )
        else:
            rows.append((f"{store['role']} tiles", _tiles(store)))
            rows += _failures(store)
    for key in ("report", "error"):
        if found.get(key):
            rows.append((key, found[key]))
    return rows


def _of_run(journal: dict[str, Any]) -> dict[str, Any]:
    state = journal["state"]
    if state == "running" and not journal["alive"]:
        state = (
            f"its process ({journal['pid']} on {journal['host']}) died; run the experiment again to resume"
        )
    stores = []
    for store in journal["stores"]:
        try:
            if "blocks" in store:
                status = _blocks_status(Path(store["path"]), blocks_of(store["blocks"]))
            else:
                status = store_status(Path(store["path"]), tiles_of(store["needed"]))
        except StoreError:
            continue  # removed since: nothing of it can be told
        stores.append({"role": store["role"], **status})
    return {
        "title": journal["experiment"],
        "run": journal["run"],
        "state": state,
        "started": journal["started"],
        "stages": journal["stages"],
        "stores": stores,
        "report": journal.get("report"),
        "error": journal.get("error"),
    }


def _blocks_status(path: Path, needed: set[int]) -> dict[str, Any]:
    """How many of the blocks of features that a run needs are stored."""
    store = open_store(path)
    assert isinstance(store, FeatureStore)
    done = sum(block < store.block_count and store.has(block) for block in needed)
    return {"title": str(path), "kind": store.kind, "blocks_done": done, "blocks_total": len(needed)}


def _names(what: str, root: Path) -> list[str]:
    """Names of experiments: of a run in the root, else of the file or shipped experiment."""
    if (root / "runs" / what).is_dir():
        return [what]
    from pipelines.experiment import load

    return [experiment.name for experiment in load(what).experiments]


def _rate(records: list[dict[str, Any]]) -> float | None:
    """Tiles per second over the newest minutes in which tiles were computed."""
    made = [(r["time"], len(r["tiles"]), sum(r["seconds"])) for r in records if "tiles" in r]
    if not made:
        return None
    latest = max(at for at, _, _ in made)
    recent = [m for m in made if latest - m[0] < RECENT_SECONDS]
    began = min(at - seconds for at, _, seconds in recent)
    # While work goes on, the time since the last tile counts too: a stalled run slows down.
    until = time.time() if time.time() - latest < RECENT_SECONDS else latest
    return sum(count for _, count, _ in recent) / max(until - began, 1e-3)


def _chunks(store: Store) -> int:
    return sum(1 for path in store.path.glob("*/c/**/*") if path.is_file() and path.suffix != ".partial")


def _tiles(found: dict[str, Any]) -> str:
    text = f"{found['tiles_done']} of {found['tiles_total']} stored"
    if found["tiles_done"] < found["tiles_total"]:
        if found["rate_per_second"]:
            text += f", {found['rate_per_second']:.3g} a second"
        if found["remaining_seconds"] is not None:
            text += f", about {seconds_text(found['remaining_seconds'])} to go"
    return text


def _pace(stage: dict[str, Any]) -> str:
    """Rate and remaining time of what a stage counts, where it has counted some."""
    counted, seconds = stage["done"] - stage["first"], stage["now"] - stage["began"]
    if counted <= 0 or seconds <= 0:
        return ""
    rate, left = counted / seconds, stage["total"] - stage["done"]
    # How many iterations it takes is known when they are done; these are the most that may be.
    about = "at most" if stage["message"].startswith(ITERATIONS) else "about"
    return f", {rate:.3g} a second" + (f", {about} {seconds_text(left / rate)} to go" if left else "")


def _failures(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"failed tile {f['tile'][0]}/{f['tile'][1]}", f["error"]) for f in found["failed"][:10]]
