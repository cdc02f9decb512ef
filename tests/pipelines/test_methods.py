"""Every method through the whole stage: the same answers from stored and recomputed tiles, and what is kept of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from pipelines import fit, inventory, leases, results, tasks
from pipelines.recomputed import RecomputedTiles
from pipelines.site import Site
from pipelines.solvers.checkpoints import DAMAGED, EARLIER
from pipelines.solvers.cholesky import Cholesky
from pipelines.solvers.eigen import Eigen
from pipelines.solvers.tiled_cholesky import TiledCholesky
from pipelines.stores import FactorStore
from pipelines.tilesource import TileSource

pytestmark = pytest.mark.usefixtures("tiles_of_16")

RIDGES = [1e-1, 1e-2, 1e-3]
METHODS = [
    ("cholesky", {}),
    ("cholesky", {"dtype": "float32"}),
    ("cholesky", {"dtype": "mixed"}),
    ("eigen", {}),
    ("tiled-cholesky", {"method": "tiled-cholesky", "dtype": "mixed"}),
    ("conjugate-gradient", {"method": "conjugate-gradient", "tolerance": 1e-10}),
    ("nystrom", {"method": "nystrom", "centres": 40, "tolerance": 1e-10}),
]


def fitted(
    samples: small.Samples,
    root: Path,
    folder: Path,
    by: str = "cholesky",
    tiles: str = "stored",
    **solve: Any,
) -> tuple[dict[str, Any], fit.Place, list[Path]]:
    """The evaluation of a run, where it worked, and the folders of its solves."""
    one = samples.experiment(
        data={"test": [60, 72], "validation": [44, 60]}, solve={"ridges": RIDGES, **solve}
    )
    made = small.make(one, root)
    source: TileSource = made.store
    if tiles == "recomputed":
        store = Path(made.features[0].store)
        source = RecomputedTiles.of(one.kernel_object, store, store, "float64", small.MEMORY)
    folder.mkdir(parents=True, exist_ok=True)
    used: list[Path] = []
    place = fit.Place(root, tasks.Workers, small.MEMORY, used.append)
    found = fit.fit(one, made.pools, source, None, folder, choice=small.chosen(by, tiles), place=place)
    return found, place, used


@pytest.fixture
def side_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiledCholesky, "side", 16)


@pytest.mark.usefixtures("side_of_16")
@pytest.mark.parametrize(("method", "solve"), METHODS)
@pytest.mark.parametrize("refit", [False, True])
def test_every_method_finds_the_same_model(
    samples: small.Samples, root: Path, tmp_path: Path, method: str, solve: dict[str, Any], refit: bool
) -> None:
    """Protects ``method = "auto"``: another choice is another price, not another result (R3 to R7)."""
    expected, *_ = fitted(samples, root, tmp_path / "a", refit=refit)
    rows = [("recomputed", method)] if method in ("conjugate-gradient", "nystrom") else []
    for tiles, name in (("stored", method), *rows):
        centres = {"centres": 56} if method == "nystrom" and refit else {}
        found, *_ = fitted(samples, root, tmp_path / tiles, name, tiles, refit=refit, **{**solve, **centres})
        if centres:  # more centres than the first fit has samples: of it all are taken
            assert [e["validation"] for e in found["path"]] == [e["validation"] for e in expected["path"]]
        for key in ("ridge", "validation", "test", "confusion"):
            assert found[key] == expected[key], key
        alpha, beside = (np.load(tmp_path / where / "alpha.npy") for where in (tiles, "a"))
        np.testing.assert_allclose(alpha, beside, rtol=1e-4, atol=1e-6 * np.abs(beside).max())
        np.testing.assert_array_equal(*(np.load(tmp_path / w / "rows.npy") for w in (tiles, "a")))
        for mine, theirs in zip(found["path"], expected["path"], strict=True):
            assert mine["train"] == pytest.approx(theirs["train"], rel=1e-6)
            assert mine["residual"] < 1e-6
            assert mine["effective_dimension"] is not None


@pytest.mark.parametrize("method", ["conjugate-gradient", "nystrom"])
def test_stored_and_recomputed_tiles_give_the_same_numbers(
    samples: small.Samples, root: Path, tmp_path: Path, method: str
) -> None:
    """Protects the choice by the cost model: where tiles come from leaves no trace in the numbers; where centres are
    gathered from all over the pool, none beyond rounding."""
    solve = {"method": method, **({"centres": 12, "tolerance": 1e-10} if method == "nystrom" else {})}
    for tiles in ("stored", "recomputed"):
        fitted(samples, root, tmp_path / tiles, method, tiles, **solve)
    stored, recomputed = (np.load(tmp_path / t / "alpha.npy") for t in ("stored", "recomputed"))
    if method == "conjugate-gradient":
        np.testing.assert_array_equal(stored, recomputed)
    else:
        np.testing.assert_allclose(stored, recomputed, rtol=1e-6, atol=1e-8 * np.abs(stored).max())


def test_coefficients_of_nystrom_are_saved_with_their_centres(
    samples: small.Samples, root: Path, tmp_path: Path
) -> None:
    """Protects a fitted model: predictions on other samples need the rows that coefficients belong to."""
    found, *_ = fitted(samples, root, tmp_path / "a", "nystrom", method="nystrom", centres=12)
    rows, alpha = (np.load(tmp_path / "a" / f"{name}.npy") for name in ("rows", "alpha"))
    assert rows.shape == (12,)
    assert alpha.shape == (12, 3)
    assert set(rows) <= set(range(40))
    K = small.make(samples.experiment(), root).dense()
    scores = K[np.arange(60, 72)][:, rows] @ alpha
    np.testing.assert_allclose(np.load(tmp_path / "a" / "test_scores.npy"), scores, rtol=1e-9)
    _, y = samples.arrays(72)
    labels = np.argmax(K[:40][:, rows] @ alpha, axis=1)
    assert found["train"]["accuracy"] == 100 * np.mean(labels == y[:40])


@pytest.mark.parametrize("method", ["cholesky", "conjugate-gradient"])
def test_a_ridge_is_chosen_without_validation_data(
    samples: small.Samples, root: Path, tmp_path: Path, method: str
) -> None:
    """Protects ``select = "gcv"`` for direct and iterative methods: by the scores of the path it reports."""
    solve = {"select": "gcv", **({"method": method} if method != "cholesky" else {})}
    found, *_ = fitted(samples, root, tmp_path / "a", method, **solve)
    best = max(found["path"], key=lambda entry: (entry["gcv"]["accuracy"], entry["ridge"]))
    assert found["ridge"] == best["ridge"]
    assert found["gcv"] == best["gcv"]


def test_ridges_solved_in_memory_are_not_solved_again(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects hours of factors: a start after a death goes on with the next ridge, and ends with the same bits."""
    whole, *_ = fitted(samples, root, tmp_path / "whole")
    monkeypatch.setattr(fit, "SMALL", 10)
    solve_one = Cholesky.solve_one
    asked: list[float] = []

    def dying(self: Cholesky, state: Any, ridge: float, shift: float, Y: np.ndarray) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(ridge)
        return solve_one(self, state, ridge, shift, Y)

    monkeypatch.setattr(Cholesky, "solve_one", dying)
    with pytest.raises(KeyboardInterrupt):
        fitted(samples, root, tmp_path / "dead")
    (left,) = inventory.solve_paths(root)
    assert sorted(p.name for p in left.glob("ridge-*")) == ["ridge-0.01", "ridge-0.1"]
    again: list[float] = []
    monkeypatch.setattr(
        Cholesky, "solve_one", lambda self, *args: (again.append(args[1]), solve_one(self, *args))[1]
    )
    found, _, used = fitted(samples, root, tmp_path / "again")
    assert used == [left]
    assert again == [1e-3]
    for entry in (*whole["path"], *found["path"]):
        entry["seconds"] = entry["peak_bytes"] = None
    for entry in found["path"]:
        assert (EARLIER in entry["notes"]) == (entry["ridge"] != 1e-3)
        entry["notes"] = [note for note in entry["notes"] if note != EARLIER]
    assert found == whole
    for name in ("alpha", "test_scores"):
        first, second = (np.load(tmp_path / w / f"{name}.npy") for w in ("whole", "again"))
        np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("side_of_16")
@pytest.mark.parametrize("method", ["cholesky", "tiled-cholesky", "conjugate-gradient"])
def test_a_damaged_ridge_is_solved_again_with_a_warning(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Protects from a flipped bit in what an interrupted run kept: the same bits again, and the evaluation tells it."""
    monkeypatch.setattr(fit, "SMALL", 10)
    solve = {"method": method, "select": "validation"}
    whole, *_ = fitted(samples, root, tmp_path / "whole", method, **solve)
    (path,) = root.glob("solves/**/ridge-0.01/alpha.npy")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    found, *_ = fitted(samples, root, tmp_path / "again", method, **solve)
    assert found["notes"] == [*whole["notes"], f"ridge 0.01: {DAMAGED}"]
    assert [DAMAGED in entry["notes"] for entry in found["path"]] == [False, True, False]
    for key in ("ridge", "validation", "test", "checksums"):
        assert found[key] == whole[key]


def test_eigenvectors_solve_all_ridges_again_where_one_is_missing(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects "same file, same bits": a start that was killed among its saves left some, and the others alone would
    have other last digits, as products of fewer columns have."""
    monkeypatch.setattr(fit, "SMALL", 10)
    factor, asked = Eigen.factor, list[tuple[float, ...]]()

    def counted(self: Eigen, K: Any, ridges: Any) -> Any:
        asked.append(tuple(ridges))
        return factor(self, K, ridges)

    monkeypatch.setattr(Eigen, "factor", counted)
    for folder in ("whole", "again", "found"):
        found, *_ = fitted(samples, root, tmp_path / folder, "eigen")
        if folder == "whole":
            (path,) = root.glob("solves/*/ridge-0.01")
            shutil.rmtree(path)
    assert asked == [tuple(RIDGES)] * 2
    assert all(EARLIER in entry["notes"] for entry in found["path"])


def test_a_solve_has_an_address_of_all_that_it_depends_on(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from another solve's coefficients: targets, options and matrix name the folder; the way a ridge is
    chosen does not."""
    monkeypatch.setattr(fit, "SMALL", 10)
    one = {"method": "conjugate-gradient", "ridges": [1e-2]}
    seen = [fitted(samples, root, tmp_path / "a", "conjugate-gradient", **one)[2]]
    same = fitted(samples, root, tmp_path / "b", "conjugate-gradient", **one, select="gcv")[2]
    assert same == seen[0]
    seen.append(fitted(samples, root, tmp_path / "d", "conjugate-gradient", **one, jitter=1e-6)[2])
    seen.append(fitted(samples, root, tmp_path / "e", "conjugate-gradient", "recomputed", **one)[2])
    seen.append(fitted(samples, root, tmp_path / "f", "cholesky", ridges=[1e-2])[2])
    y = np.load(samples.folder / "y.npy")
    np.save(samples.folder / "y.npy", (y + 1) % 3)
    seen.append(fitted(samples, root, tmp_path / "g", "conjugate-gradient", **one)[2])
    assert len({path for (path,) in seen}) == len(seen)


@pytest.mark.usefixtures("side_of_16")
@pytest.mark.parametrize("method", ["cholesky", "tiled-cholesky"])
def test_an_edited_list_of_ridges_takes_those_that_were_solved(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Protects hours of factors from an edit of ``solve.ridges``: what is left is solved, to a clean run's bits."""
    monkeypatch.setattr(fit, "SMALL", 10)
    by, name = (Cholesky, "solve_one") if method == "cholesky" else (TiledCholesky, "_solve_one")
    solve_one = getattr(by, name)
    ridges: list[float] = []

    def counted(self: Any, *given: Any) -> Any:
        solution = solve_one(self, *given)
        ridges.append(solution.ridge)
        return solution

    monkeypatch.setattr(by, name, counted)
    edited = {"method": method, "ridges": [1e-4, 1e-2]}
    clean, *_ = fitted(samples, tmp_path / "other", tmp_path / "clean", method, **edited)
    fitted(samples, root, tmp_path / "before", method, method=method, ridges=[1e-2, 1e-3])
    ridges.clear()
    found, *_ = fitted(samples, root, tmp_path / "after", method, **edited)
    assert ridges == [1e-4]
    assert [EARLIER in entry["notes"] for entry in found["path"]] == [True, False]
    for entry in (*clean["path"], *found["path"]):
        entry["notes"] = [note for note in entry["notes"] if note != EARLIER]
        entry["seconds"] = entry["peak_bytes"] = None
    assert found == clean


@pytest.mark.usefixtures("side_of_16")
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("eigen", "float64"),
        ("cholesky", "mixed"),
        ("tiled-cholesky", "mixed"),
        ("conjugate-gradient", "float64"),
    ],
)
def test_ridges_that_others_change_the_bits_of_are_kept_by_list(
    samples: small.Samples,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    dtype: str,
) -> None:
    """Protects "same file, same bits": of such methods nothing that another list left is taken."""
    monkeypatch.setattr(fit, "SMALL", 10)
    solve = {"method": method, "dtype": dtype}
    fitted(samples, root, tmp_path / "before", method, **solve, ridges=[1e-2, 1e-3])
    again, *_ = fitted(samples, root, tmp_path / "same", method, **solve, ridges=[1e-2, 1e-3])
    assert all(EARLIER in entry["notes"] for entry in again["path"])
    found, *_ = fitted(samples, root, tmp_path / "after", method, **solve, ridges=[1e-2, 1e-4])
    assert not any(EARLIER in entry["notes"] for entry in found["path"])


@pytest.mark.usefixtures("side_of_16")
def test_what_a_solve_kept_goes_with_its_factors_when_its_result_is_safe(
    samples: small.Samples, root: Path, tmp_path: Path
) -> None:
    """Protects the disk, and others: nothing is left of this run's solves, and what somebody uses stays."""
    solve = {"method": "tiled-cholesky"}
    _, _, used = fitted(samples, root, tmp_path / "a", "tiled-cholesky", refit=True, **solve)
    assert len(used) == 2
    of, other = used[0].name, "f" * 24
    for name in (of, other):
        FactorStore.open_or_create(root, {"of": name, "shift": 1.0}, 40, "float64", 16)
    busy = root / fit.SOLVES / other
    with Site(busy, tasks.Workers, 2**30):
        inventory.remove_solves(root, [*used, busy])
        assert inventory.solve_paths(root) == [busy]
    left = [e for e in inventory.inventory(root) if e.kind in (fit.SOLVES, "factors")]
    assert {e.kind for e in left} == {fit.SOLVES}
    assert left[0].holds == "an unfinished solve, 0 ridges kept"
    inventory.remove_solves(root, [busy])
    assert inventory.solve_paths(root) == []


def a_solve_and_its_factor(samples: small.Samples, root: Path) -> tuple[Path, FactorStore]:
    """What a run leaves that ended while it solved."""
    small.make(samples.experiment(), root)
    solve = root / fit.SOLVES / ("a" * 24)
    with Site(solve, tasks.Workers, 2**30):
        pass
    return solve, FactorStore.open_or_create(root, {"of": solve.name, "shift": 1.0}, 40, "float64", 16)


def test_a_failed_runs_solve_and_factors_are_kept_for_its_next_start(
    samples: small.Samples, root: Path
) -> None:
    """Protects ``store clean``: what an interrupted run goes on from is used by it; what nobody resumes may go."""
    solve, factor = a_solve_and_its_factor(samples, root)
    stray = FactorStore.open_or_create(root, {"of": "b" * 24, "shift": 1.0}, 40, "float64", 16)
    journal = results.Journal(root, "small", results.new_run_id())
    journal.uses([str(solve)])
    journal.finish("failed", error="no space left")
    entries = {entry.path: entry for entry in inventory.inventory(root)}
    assert entries[solve].used_by == entries[factor.path].used_by == ("small",)
    assert entries[factor.path].holds == f"factor of 40 x 40, float64, of solve {solve.name}"
    free = inventory.unused(list(entries.values()))
    assert stray.path in {entry.path for entry in free}
    assert not {solve, factor.path} & {entry.path for entry in free}
    run = results.new_run_id()
    later = results.Journal(root, "small", run)
    later.finish("done")
    results.ResultStore(root, "small", "0" * 12).begin(run)
    results.ResultStore(root, "small", "0" * 12).commit(run, {})
    free = inventory.unused(inventory.inventory(root))
    assert {solve, factor.path} <= {entry.path for entry in free}
    inventory.remove(free)
    assert not solve.exists()
    assert not factor.path.exists()
    assert leases.living(solve) == []


@pytest.mark.parametrize(("status", "goes"), [("solved", True), ("not converged", False)])
def test_a_finished_run_holds_no_solve_but_one_that_more_iterations_go_on_from(
    samples: small.Samples, root: Path, status: str, goes: bool
) -> None:
    """Protects ``store clean``: where every run of a solve is finished, whatever their names, what it kept may go."""
    solve, factor = a_solve_and_its_factor(samples, root)
    unfinished = results.Journal(root, "small", results.new_run_id())
    unfinished.uses([str(solve)])
    unfinished.finish("failed", error="killed while another run finished the same solve")

    def finish(name: str, evaluation: dict[str, Any]) -> None:
        run = results.new_run_id()
        journal = results.Journal(root, name, run)
        journal.uses([str(solve)])
        store = results.ResultStore(root, name, "0" * 12)
        store.begin(run)
        store.commit(run, {"evaluation": evaluation})
        journal.finish("done")

    def users() -> set[tuple[str, ...]]:
        return {e.used_by for e in inventory.inventory(root) if e.path in (solve, factor.path)}

    finish("other", {"path": [{"status": "solved"}, {"status": status}]})
    assert users() == {("small",) if goes else ("other", "small")}
    finish("small", {"path": [{"status": "solved"}], "refit": {"status": status}})
    assert users() == {() if goes else ("other", "small")}
