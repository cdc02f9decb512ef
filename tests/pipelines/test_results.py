"""Results: one immutable folder a run, a latest that is always whole, and journals of what runs do."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import inventory, results
from pipelines.errors import DiskFull, StoreError
from pipelines.files import unsealed
from pipelines.results import Journal, ResultStore


@pytest.fixture
def store(root: Path) -> ResultStore:
    return ResultStore(root, "name", "0123456789abcdef")


def publish(store: ResultStore, run: str, value: int) -> Path:
    folder = store.begin(run)
    results.save_array(folder, "alpha", np.arange(value))
    return store.commit(run, {"value": value})


def test_run_ids_sort_by_time_and_never_repeat() -> None:
    """Protects ``newest``: runs that begin within one second sort in the order in which they began."""
    made = [results.new_run_id() for _ in range(200)]
    assert sorted(made) == made
    assert len(set(made)) == 200


def test_a_result_appears_whole_or_not_at_all(store: ResultStore) -> None:
    """Protects readers: before the commit there is no result; then folder, arrays, JSON and latest."""
    assert store.latest() is None
    folder = store.begin("r1")
    results.save_array(folder, "alpha", np.ones((3, 2)))
    assert store.latest() is None
    assert not list(results.found(store.folder.parent.parent, "name"))
    final = store.commit("r1", {"value": 1})
    assert store.latest() == final == store.folder / "r1"
    assert results.read(final) == {"value": 1}
    np.testing.assert_array_equal(np.load(final / "alpha.npy", allow_pickle=False), np.ones((3, 2)))
    assert not folder.exists()


def test_latest_moves_and_older_results_stay(store: ResultStore, root: Path) -> None:
    """Protects history: a new run points latest elsewhere and changes nothing of the one before."""
    first = publish(store, "r1", 1)
    before = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
    second = publish(store, "r2", 2)
    assert store.latest() == second
    assert {p.name: p.stat().st_mtime_ns for p in first.iterdir()} == before
    assert next(results.found(root, "name"))[0] == second
    other = publish(ResultStore(root, "name", "f" * 64), "r3", 3)
    assert next(results.found(root, "name"))[0] == other
    assert not list(results.found(root, "nam"))


def test_a_result_is_never_replaced(store: ResultStore) -> None:
    """Protects an immutable folder: committing another result under the same run's id fails."""
    first = publish(store, "r1", 1)
    folder = store.begin("r1")
    results.save_array(folder, "alpha", np.zeros(1))
    with pytest.raises((OSError, StoreError)):
        store.commit("r1", {"value": 2})
    assert results.read(first) == {"value": 1}


@pytest.mark.parametrize("moment", ["result.json", "rename", "latest"])
def test_a_process_that_dies_while_committing_leaves_the_old_latest(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Protects latest: cut off anywhere, it is the old result or the new one, never half of one."""
    old = publish(store, "r1", 1)

    class Died(Exception):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        if moment == "result.json":
            patch.setattr(Path, "write_text", die)
        elif moment == "rename":
            patch.setattr(os, "rename", die)
        else:
            patch.setattr(ResultStore, "_point_latest", die)
        with pytest.raises(Died):
            publish(store, "r2", 2)
    assert store.latest() == old
    assert results.read(old) == {"value": 1}
    assert publish(store, "r3", 3) == store.latest()


def test_what_was_committed_is_durable(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects results from power loss: every file and the folder are synced before latest points there."""
    synced: list[str] = []
    sync, point = results.sync, ResultStore._point_latest
    monkeypatch.setattr(results, "sync", lambda path: (synced.append(path.name), sync(path)))
    monkeypatch.setattr(
        ResultStore, "_point_latest", lambda self, run: (synced.append("latest"), point(self, run))
    )
    publish(store, "r1", 1)
    before = synced[: synced.index("latest")]
    assert {"alpha.npy", "result.json", ".r1"} <= set(before)


@pytest.mark.parametrize("text", ["", "{", "\udcff"])
def test_a_damaged_result_is_no_result(store: ResultStore, text: str) -> None:
    """Protects a rerun: a result.json that cannot be read is named, and solving again makes another."""
    final = publish(store, "r1", 1)
    (final / "result.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=str(final)):
        results.read(final)
    assert publish(store, "r2", 2) == store.latest()


def test_a_changed_number_in_a_result_is_noticed(store: ResultStore) -> None:
    """Protects the next run, reports and comparisons from a score that no run found; whatever a result may hold."""
    given = {"value": 1, "by class": {10: (0.1, None), 9: float("inf")}}
    store.begin("r1")
    path = store.commit("r1", given) / "result.json"
    found = results.read(path.parent)
    assert found == {"value": 1, "by class": {"10": [0.1, None], "9": float("inf")}}
    path.write_text(path.read_text().replace('"value": 1', '"value": 2'))
    with pytest.raises(StoreError, match="not as it was written"):
        results.read(path.parent)


def test_many_runs_commit_at_once(store: ResultStore) -> None:
    """Protects two drivers of one experiment: every result is there, latest is one of them."""
    threads = [threading.Thread(target=publish, args=(store, f"r{k}", k)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latest = store.latest()
    assert latest is not None
    assert re.fullmatch(r"r\d", latest.name)
    assert sorted(p.name for p in store.folder.iterdir()) == ["latest", *(f"r{k}" for k in range(8))]


def test_a_full_disk_is_said_so(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the last step of a long run: the error is one line with exit code 8."""
    folder = store.begin("r1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFull):
        results.save_array(folder, "alpha", np.ones(3))


def test_an_array_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    """Protects an earlier result, whose file a later run has under a second name."""
    (tmp_path / "later").mkdir()
    checksum = results.save_array(tmp_path, "alpha", np.ones(3))
    results.link(tmp_path / "alpha.npy", tmp_path / "later" / "alpha.npy")
    results.save_array(tmp_path / "later", "alpha", np.zeros(3))
    np.testing.assert_array_equal(results.load_array(tmp_path, "alpha", checksum), np.ones(3))
    assert [path.name for path in (tmp_path / "later").iterdir()] == ["alpha.npy"]


def test_a_journal_tells_what_a_run_does(root: Path) -> None:
    """Protects ``status``: stages, progress and stores can be read at any moment, newest run first."""
    first = Journal(root, "name", "r1")
    first.stage("gram")
    first.progress(3, 10)
    first.end_stage()
    first.stores([{"role": "train", "path": "p", "needed": {"0": [[0, 1]]}}])
    first.uses(["a", "b"])
    Journal(root, "name", "r2")
    second, first_read = results.journals(root, "name")
    assert (second["run"], second["state"]) == ("r2", "running")
    assert first_read["stages"][0]["done"] == 3
    assert first_read["stages"][0]["seconds"] >= 0
    assert first_read["uses"] == ["a", "b"]
    first.finish("done", report="r.html")
    assert results.journals(root, "name")[1]["state"] == "done"


@pytest.mark.parametrize("damaged", ['"state', '"path', '"running', '"name', ""])
def test_a_damaged_journal_stops_nobody(root: Path, damaged: str) -> None:
    """Protects every command from a bit flipped in the journal of one run, be it in a name or in what it says: those of
    others are read."""
    for run in ("r1", "r2"):
        Journal(root, "name", run).stores([{"role": "train", "path": "gram/a", "needed": []}])
    path = root / "runs" / "name" / "r2.json"
    path.write_text(path.read_text().replace(damaged, damaged[:-1] + "~") if damaged else "{")
    assert [journal["run"] for journal in results.journals(root, "name")] == ["r1"]
    inventory.inventory(root)


def test_a_journal_of_an_earlier_version_still_says_what_its_run_uses(root: Path) -> None:
    """Protects tiles that took weeks from being cleaned up as nobody's after an upgrade: journals had no seal."""
    journal = Journal(root, "name", "r1")
    journal.stores([{"role": "train", "path": "gram/a", "needed": []}])
    journal.finish("done")
    path = root / "runs" / "name" / "r1.json"
    path.write_text(json.dumps(unsealed(json.loads(path.read_text()))))
    (read,) = results.journals(root, "name")
    assert read["stores"][0]["path"] == "gram/a"


def test_progress_is_not_written_for_every_tile(root: Path) -> None:
    """Protects the disk from a write a tile; the last one is always written."""
    journal = Journal(root, "name", "r1")
    journal.stage("gram")
    for done in range(1, 101):
        journal.progress(done, 101)
    assert results.journals(root, "name")[0]["stages"][0]["done"] < 100
    journal.progress(101, 101)
    assert results.journals(root, "name")[0]["stages"][0]["done"] == 101


@settings(deadline=None, max_examples=60)
@given(st.sets(st.tuples(st.integers(0, 20), st.integers(0, 20))))
def test_tiles_in_a_journal_are_read_back(tiles: set[tuple[int, int]]) -> None:
    """Protects the short form of tiles, through JSON."""
    assert results.tiles_of(json.loads(json.dumps(results.by_row(tiles)))) == tiles


def test_used_tiles_are_those_of_finished_runs(root: Path) -> None:
    """Protects ``verify``: what a finished run needed must be there; what a failed one wanted need not."""
    store = root / "gram" / "0123"
    store.mkdir(parents=True)
    for run, state, tiles in (("r1", "done", {(0, 0)}), ("r2", "failed", {(1, 0)}), ("r3", "done", {(1, 1)})):
        journal = Journal(root, "name", run)
        journal.stores([{"role": "train", "path": str(store), "needed": results.by_row(tiles)}])
        journal.finish(state)
    other = Journal(root, "other", "r4")
    other.stores([{"role": "train", "path": str(store) + "-1", "needed": results.by_row({(2, 2)})}])
    other.finish("done")
    assert results.tiles_used(store) == {(0, 0), (1, 1)}
