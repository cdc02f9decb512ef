"""What lies under a root, who uses it, and what may go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from pipelines import fit, leases, results
from pipelines.inventory import inventory, inventory_rows, remove, resumable_bytes, unused
from pipelines.results import Journal
from pipelines.stores import FactorStore, folder_bytes

pytestmark = pytest.mark.usefixtures("tiles_of_16")

LINEAR = {"kind": "dot-product", "kernel": "linear"}


def run(samples: small.Samples, root: Path, state: str | None = "done", **sections: Any) -> small.Made:
    """A run with journal and result, as a flow leaves it; ``state`` None: killed while it ran."""
    one = samples.experiment(**sections)
    made = small.make(one, root)
    run_id = results.new_run_id()
    journal = results.Journal(root, one.name, run_id)
    journal.stores([{"role": "train", "path": str(made.store.path), "needed": {}}])
    journal.uses([*(str(p) for p in (root / "pools").iterdir()), *(r.store for r in made.features)])
    if state is not None:
        journal.finish(state)
    if state == "done":
        store = results.ResultStore(root, one.name, "0" * 12)
        store.begin(run_id)
        store.commit(run_id, {})
    return made


def free(root: Path) -> set[Path]:
    return {entry.path for entry in unused(inventory(root))}


def test_every_store_is_listed_with_its_bytes_and_users(samples: small.Samples, root: Path) -> None:
    """Protects ``store list``: kinds, sizes on disk, largest first, what each holds and for whom."""
    run(samples, root)
    found = inventory(root)
    assert {entry.kind for entry in found} == {"pools", "features", "gram"}
    assert [entry.bytes for entry in found] == sorted((folder_bytes(e.path) for e in found), reverse=True)
    assert all(entry.used_by == ("small",) for entry in found)
    holds = {entry.kind: entry.holds for entry in found}
    assert "72 samples" in holds["pools"]
    assert "prepared blocks" in holds["features"]
    assert "dot-product exponential" in holds["gram"]
    assert "72 x 72" in holds["gram"]
    assert all(len(row) == 5 for row in inventory_rows(found))
    assert inventory(root / "nowhere") == []


def test_what_an_older_result_rests_on_stays_until_that_result_goes(
    samples: small.Samples, root: Path
) -> None:
    """Protects results: the experiment was run again with another kernel, its first result is still there."""
    old = run(samples, root)
    new = run(samples, root, kernel=LINEAR)
    assert free(root) == set()
    oldest = min((root / "results").glob("*/*/result.json"), key=lambda path: path.parent.name)
    shutil.rmtree(oldest.parent)
    assert free(root) == {old.store.path}
    assert new.store.path not in free(root)
    run(samples, root, name="other")
    assert free(root) == set()


@pytest.mark.parametrize("state", ["failed", None])
def test_what_an_unfinished_run_left_may_be_resumed(
    samples: small.Samples, root: Path, state: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects hours of tiles: a failed or killed run newer than the last finished one keeps its stores."""
    run(samples, root)
    killed = run(samples, root, state, kernel=LINEAR)
    monkeypatch.setattr(leases, "process_started", lambda pid: 0.0)  # the process is gone
    assert free(root) == set()
    run(samples, root)
    assert free(root) == {killed.store.path}


def test_what_a_running_process_works_on_stays(samples: small.Samples, root: Path) -> None:
    """Protects a long run that a shorter one of the same name has overtaken, and any holder of a lease."""
    long = run(samples, root, None, kernel=LINEAR)
    run(samples, root)
    assert free(root) == set()
    stray = small.make(
        samples.experiment(kernel={"kind": "dot-product", "kernel": "arc-cosine", "order": 1}), root
    )
    assert free(root) == {stray.store.path}
    with leases.Lease(stray.store.path):
        assert free(root) == set()
    assert long.store.path.exists()


def test_removing_removes_what_was_listed(samples: small.Samples, root: Path) -> None:
    """Protects ``store clean``: what is unused goes, the rest still makes a run without computing."""
    small.make(samples.experiment(kernel=LINEAR), root)
    run(samples, root)
    entries = unused(inventory(root))
    assert "1 stores" in remove(entries)
    assert not any(entry.path.exists() for entry in entries)
    assert small.make(samples.experiment(), root).computed == {"train": 0}


def test_a_broken_store_is_listed_and_may_go(samples: small.Samples, root: Path) -> None:
    """Protects the list from one bad file: it says so, and that nobody uses it."""
    made = small.make(samples.experiment(), root)
    (made.store.path / "zarr.json").write_text("{")
    (entry,) = [e for e in inventory(root) if e.path == made.store.path]
    assert "cannot be read" in entry.holds
    assert entry.kind == "gram"
    assert made.store.path in free(root)


def test_stores_being_made_are_not_listed(samples: small.Samples, root: Path) -> None:
    """Protects a driver that is just creating a store from ``store clean``."""
    small.make(samples.experiment(), root)
    half = root / "gram" / ".half.0123"
    half.mkdir()
    (half / "zarr.json").write_text("{}")
    assert half not in {entry.path for entry in inventory(root)}


def test_what_an_unfinished_run_left_counts_as_its_own(tmp_path: Path) -> None:
    """Protects a resume on a nearly full disk: the factor that is there already needs no more room; another's does."""
    for name, run, state in (("mine", "a", "failed"), ("mine", "b", "done"), ("other", "c", "failed")):
        solve = tmp_path / fit.SOLVES / run
        solve.mkdir(parents=True)
        (solve / "state").write_bytes(b"x" * 100)
        store = FactorStore.open_or_create(tmp_path, {"of": run}, 8, "float64", 8)
        store.write_tile((0, 0), np.eye(8))
        journal = Journal(tmp_path, name, run)
        journal.uses([str(solve)])
        journal.finish(state)
    assert 8 * 8 * 8 + 100 < resumable_bytes(tmp_path, "mine") < 2 * 8 * 8 * 8 + 2000
    assert resumable_bytes(tmp_path, "mine") == pytest.approx(resumable_bytes(tmp_path, "other"), abs=50)
    assert resumable_bytes(tmp_path, "nobody") == 0
