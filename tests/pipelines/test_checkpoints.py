"""Sites and checkpoints: what a solve keeps is found again whole, or not at all."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import leases, tasks
from pipelines.site import Site
from pipelines.solvers.base import Solution, Status
from pipelines.solvers.checkpoints import DAMAGED, EARLIER, Checkpoints

SOLUTION = Solution(
    alpha=np.random.default_rng(0).standard_normal((7, 3)),
    ridge=1e-7,
    shift=7e-7,
    status=Status.SOLVED,
    residual=3.1e-9,
    iterations=4,
    effective_dimension=None,
    seconds=1.5,
    peak_bytes=123,
    loo=None,
    jitter=0.0,
    notes=("one", "two"),
)


@pytest.mark.parametrize("loo", [None, np.ones((7, 3))])
def test_a_solution_comes_back_bit_by_bit(loo: np.ndarray | None, tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "solve")
    assert kept.load(1e-7) is None
    saved = replace(SOLUTION, loo=loo)
    kept.save(saved)
    kept.save(saved)  # as a second driver does
    found = Checkpoints(tmp_path / "solve").load(1e-7)
    assert found is not None
    assert found.notes == ("one", "two", EARLIER)
    found = replace(found, notes=saved.notes)
    for field in fields(Solution):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(saved, field.name))
    assert isinstance(found.status, Status)
    assert kept.load(1e-8) is None
    assert [path.name for path in (tmp_path / "solve").iterdir()] == ["ridge-1e-07"]


@pytest.mark.parametrize("name", ["alpha.npy", "solution.json"])
def test_a_damaged_checkpoint_is_none(name: str, tmp_path: Path) -> None:
    """Protects the numbers: half a file is not solved with; it is removed, and the ridge solved again."""
    kept = Checkpoints(tmp_path)
    kept.save(SOLUTION)
    path = tmp_path / "ridge-1e-07" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert kept.load(1e-7) is None
    kept.save(SOLUTION)
    assert kept.load(1e-7) is not None


@pytest.mark.parametrize("name", ["alpha", "loo"])
def test_a_flipped_bit_is_damage_and_the_ridge_is_told_of(name: str, tmp_path: Path) -> None:
    """Protects the numbers from a bit that leaves a readable file: the ridge is solved again, and a note says why."""
    saved = replace(SOLUTION, loo=np.ones((7, 3)))
    kept = Checkpoints(tmp_path)
    kept.save(saved)
    path = tmp_path / "ridge-1e-07" / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    assert kept.load(1e-7) is None
    assert not path.exists()
    assert kept.load(1e-8) is None
    assert kept.told(saved).notes == ("one", "two", DAMAGED)
    assert kept.told(replace(saved, ridge=1e-8)).notes == ("one", "two"), "nothing was kept of it"


@pytest.mark.parametrize(("key", "value"), [("ridge", 2e-7), ("shift", 48.0), ("checksums", [3])])
def test_a_changed_fact_is_damage(key: str, value: Any, tmp_path: Path) -> None:
    """Protects scores, which rest on the shift, and the path from a ridge that nobody asked for."""
    kept = Checkpoints(tmp_path)
    kept.save(SOLUTION)
    path = tmp_path / "ridge-1e-07" / "solution.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert kept.load(1e-7) is None
    assert kept.told(SOLUTION).notes == ("one", "two", DAMAGED)


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Checkpoints()
    kept.save(SOLUTION)
    assert kept.load(1e-7) is None


def test_scratch_of_the_dead_is_swept_and_of_the_living_kept(tmp_path: Path) -> None:
    """Protects the disk after a kill, and a second driver on the same solve."""
    folder = tmp_path / "solves" / "a"
    (folder / "scratch-of-the-dead").mkdir(parents=True)
    with Site(folder, tasks.Workers, 2**30) as first:
        assert not (folder / "scratch-of-the-dead").exists()
        saved = first.save("V", np.arange(6.0).reshape(3, 2).T)
        with Site(folder, tasks.Workers, 2**30):
            assert saved.exists()
        np.testing.assert_array_equal(np.load(saved, mmap_mode="r"), np.arange(6.0).reshape(3, 2).T)
    assert not list(folder.glob("scratch-*"))


def test_scratch_of_who_begins_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a second driver that begins between the first one's look at the leases and its sweep."""
    folder, living = tmp_path / "solves" / "a", leases.living

    def then_another_begins(*arguments: Any, **options: Any) -> list[leases.Holder]:
        found = living(*arguments, **options)
        (folder / "scratch-of-another").mkdir()
        return found

    monkeypatch.setattr(leases, "living", then_another_begins)
    with Site(folder, tasks.Workers, 2**30):
        assert (folder / "scratch-of-another").exists()


def test_another_living_process_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects factors that another driver still reads."""
    folder = tmp_path / "solves" / "a"
    with Site(folder, tasks.Workers, 2**30) as site:
        assert site.alone
        with leases.Lease(folder) as other:
            other.path.rename(other.path.with_name(f"elsewhere-{other.path.name}"))
            assert not site.alone
