"""Reading a store chunk by chunk: what is wrong is named, repair discards it and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import small

from pipelines import leases, results
from pipelines.errors import StoreError
from pipelines.stores import FactorStore, GramStore
from pipelines.verify import Verified, verify, verify_rows

pytestmark = pytest.mark.usefixtures("tiles_of_16")


@pytest.fixture
def store(samples: small.Samples, root: Path) -> GramStore:
    """A finished run's matrix: 12 tiles."""
    made = small.make(samples.experiment(), root)
    journal = results.Journal(root, "small", results.new_run_id())
    needed = results.by_row(made.store.present())
    journal.stores([{"role": "train", "path": str(made.store.path), "needed": needed}])
    journal.finish("done")
    return made.store


def spoil(store: GramStore) -> None:
    """One tile of each fault: a flipped byte, cut short, emptied, NaN under a right checksum, deleted."""
    for tile, content in (((0, 0), None), ((1, 0), slice(0, -7)), ((1, 1), slice(0, 0))):
        file = store.chunk("gram", tile)
        whole = bytearray(file.read_bytes())
        if content is None:
            whole[100] ^= 4
        file.write_bytes(whole if content is None else whole[content])
    rows, columns = store.grid.extent((2, 0))
    store.array("gram")[rows, columns] = np.where(np.eye(16), np.nan, 1.0)
    store.chunk("gram", (2, 1)).unlink()


FAULTS = {"0/0": "damaged", "1/0": "damaged", "1/1": "damaged", "2/0": "16 values are not finite"}


def test_a_sound_root_is_found_sound(store: GramStore, root: Path) -> None:
    """Protects from false alarms: every store read whole, none of it changed."""
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    found = verify(root)
    assert [v.kind for v in found] == ["pools", "features", "gram"]
    assert [(v.bad, v.missing, v.temporaries) for v in found] == [([], [], 0)] * 3
    assert found[2].chunks == 12
    assert found[2].absent == 3  # tiles that no run needed
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("whole_root", [False, True])
def test_every_fault_is_named(store: GramStore, root: Path, whole_root: bool) -> None:
    """Protects ``names missing, damaged and non-finite ones``: each tile by its number, the store by its path."""
    spoil(store)
    found = verify(root if whole_root else store.path)[-1]
    assert len(found.bad) == len(FAULTS)
    for line, (tile, fault) in zip(found.bad, FAULTS.items(), strict=True):
        assert line.startswith(f"{store.path}: tile {tile}: {fault}")
    assert found.missing == [f"{store.path}: tile 2/1: missing"]
    assert found.chunks == 11
    assert store.present() == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 2)} | {
        (i, j) for i in (3, 4) for j in range(3)
    }


def test_repair_discards_the_bad_and_the_next_run_computes_exactly_those(
    store: GramStore, samples: small.Samples, root: Path
) -> None:
    """Protects ``--repair``: five tiles are computed again, the rest is reused, and all is sound."""
    before = small.make(samples.experiment(), root).dense()
    spoil(store)
    found = verify(store.path, repair=True)[0]
    assert len(found.bad) == 4
    assert len(store.present()) == 7
    assert not list((store.path / "damaged").glob("*"))
    again = small.make(samples.experiment(), root)
    assert again.computed == {"train": 5}
    np.testing.assert_array_equal(again.dense(), before)
    assert not any(v.bad or v.missing for v in verify(root))


def test_prepared_blocks_and_pools_are_verified_too(
    store: GramStore, samples: small.Samples, root: Path
) -> None:
    """Protects what tiles are made from: named by array and chunk, mended by the next run."""
    for kind, name in (("pools", "X"), ("features", "unit")):
        (chunk,) = list(root.glob(f"{kind}/*/{name}/c/0/0"))
        chunk.write_bytes(chunk.read_bytes()[:-1])
    found = verify(root, repair=True)
    assert [len(v.bad) for v in found] == [1, 1, 0]
    assert "X chunk 0/0: damaged" in found[0].bad[0]
    assert "unit chunk 0/0: damaged" in found[1].bad[0]
    small.make(samples.experiment(), root)
    assert not any(v.bad or v.absent for v in verify(root)[:2])


def test_temporaries_of_dead_writers_are_swept(store: GramStore, root: Path) -> None:
    """Protects disks: what killed processes left goes with ``--repair``, leases of the dead included."""
    stray = store.path / "gram" / "c" / "0" / "0.0123abcd.partial"
    stray.write_bytes(b"half")
    (store.path / "leases").mkdir(exist_ok=True)
    dead = store.path / "leases" / "x.json"
    with leases.Lease(store.path) as lease:
        dead.write_text(lease.path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194305'))
    assert verify(store.path)[0].temporaries == 1
    assert stray.exists()
    found = verify(store.path, repair=True)[0]
    assert (found.temporaries, found.swept) == (1, 2)
    assert not stray.exists()
    assert not dead.exists()


def test_what_a_living_writer_is_writing_is_left_alone(store: GramStore) -> None:
    """Protects a run beside ``verify --repair``: its unfinished files stay, damaged tiles still go."""
    spoil(store)
    stray = store.path / "gram" / "c" / "0" / "0.0123abcd.partial"
    stray.write_bytes(b"half")
    with leases.Lease(store.path):
        found = verify(store.path, repair=True)[0]
    assert f"in use by process {os.getpid()}" in found.remark
    assert stray.exists()
    assert not store.has((0, 0))


def test_stores_that_were_never_finished_are_swept(store: GramStore, root: Path) -> None:
    """Protects disks: folders of stores whose maker died, once they are old; they are no stores."""
    half = root / "gram" / ".0123.abcd"
    half.mkdir()
    (half / "zarr.json").write_text("{}")
    assert len(verify(root)) == 3
    os.utime(half, (0, 0))
    found = verify(root)
    assert (found[-1].kind, found[-1].temporaries) == ("root", 1)
    assert half.exists()
    assert verify(root, repair=True)[-1].swept == 1
    assert not half.exists()


def test_a_store_that_cannot_be_opened_does_not_hide_the_others(store: GramStore, root: Path) -> None:
    """Protects ``verify ROOT``: a broken zarr.json is a finding like any other."""
    (document,) = root.glob("features/*/zarr.json")
    document.write_text("{")
    found = verify(root)
    assert [len(v.bad) for v in found] == [0, 1, 0]
    assert str(document) in found[1].bad[0]


def test_places_without_a_store_are_refused(tmp_path: Path) -> None:
    """Protects from ``all is well`` over an empty or misspelt path."""
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="neither a store nor a root"):
            verify(path)


def test_rows_of_the_table_fit_its_header() -> None:
    """Protects the table of the command line: one cell for each of its columns."""
    (row,) = verify_rows([Verified("s", "gram", chunks=3, bad=["x"], missing=["y", "z"])])
    assert row[:4] == ["s", 3, 2, 1]


def test_a_factor_is_read_like_a_matrix(root: Path) -> None:
    """Protects ``verify`` of a whole root: tiles of an unfinished solve's factor, the upper triangle not missed."""
    factor = FactorStore.open_or_create(root, {"of": "a" * 24, "shift": 1.0}, 40, "float64", 16)
    for tile in ((0, 0), (1, 0), (1, 1)):
        factor.write_tile(tile, np.ones((16, 16)))
    (found,) = verify(root)
    assert (found.chunks, found.absent, found.bad) == (3, 3, [])
    factor.chunk("factor", (1, 0)).write_bytes(b"")
    (found,) = verify(root, repair=True)
    assert [line.split(": ")[1] for line in found.bad] == ["tile 1/0"]
    assert not factor.chunk("factor", (1, 0)).exists()


def test_the_folder_of_a_solve_that_was_half_removed_is_swept(root: Path) -> None:
    """Protects the disk from what a killed ``store clean`` left."""
    FactorStore.open_or_create(root, {"of": "a" * 24, "shift": 1.0}, 40, "float64", 16)
    gone = root / "solves" / f".{'b' * 24}.removed"
    gone.mkdir(parents=True)
    assert verify(root)[-1].temporaries == 1
    assert verify(root, repair=True)[-1].swept == 1
    assert not gone.exists()
