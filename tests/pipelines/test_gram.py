"""The second stage: tiles computed once, shared between runs, refused when they are not what they should be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import small

from kernels import general
from kernels.base import Prepared
from kernels.dot_product import DotProduct
from pipelines import gram, leases, matrices, memory, pools, provenance, tasks
from pipelines.errors import ChunkLost, NumericalError, StoreError
from pipelines.recomputed import RecomputedTiles
from pipelines.tiles import Rectangle

pytestmark = pytest.mark.usefixtures("tiles_of_16")

NTK = {"kind": "fully-connected", "family": "ntk", "depth": 3}
RF = {"kind": "fully-connected", "family": "rf", "depth": 3}


def exponential(sigma: float) -> Any:
    return lambda u: reference.scalar("exponential", u, sigma)


def layers(family: str) -> Any:
    return lambda u: reference.fully_connected(family, 3, u)


# Right numbers.


@pytest.mark.parametrize(
    ("kernel", "function", "dtype", "tolerance"),
    [
        ({"kind": "dot-product", "kernel": "exponential", "sigma": 0.7}, exponential(0.7), "float64", 1e-12),
        ({"kind": "dot-product", "kernel": "exponential", "sigma": 0.7}, exponential(0.7), "float32", 2e-5),
        (RF, layers("rf"), "float64", 1e-12),
        (NTK, layers("ntk"), "float64", 1e-7),
    ],
)
def test_tiles_equal_a_dense_oracle(
    samples: small.Samples, root: Path, kernel: dict, function: Any, dtype: str, tolerance: float
) -> None:
    """Protects every entry on its way from samples to store: against the definition, entry by entry."""
    X, _ = samples.arrays(72)
    made = small.make(samples.experiment(kernel=kernel, gram={"dtype": dtype}, data={"train": 60}), root)
    expected = reference.homogeneous(function, X, X)
    assert made.computed == {"train": 14}  # all but the last diagonal tile, which no training sample is in
    np.testing.assert_allclose(
        made.dense()[:, :60], expected[:, :60], rtol=0, atol=tolerance * np.abs(expected).max()
    )


def test_blocks_against_a_test_set_equal_a_dense_oracle(samples: small.Samples, root: Path) -> None:
    """Protects rectangular stores: test rows by pool columns, ragged at both ends, only what training reads."""
    other = small.Samples(samples.folder, seed=9)
    other.write(25, "_test")
    paths = {"X_test": str(samples.folder / "X_test.npy"), "y_test": str(samples.folder / "y_test.npy")}
    made = small.make(samples.experiment(data={**paths, "test": 25}), root)
    expected = reference.homogeneous(exponential(1.0), other.arrays(25)[0], samples.arrays(72)[0])
    K = made.dense("test")
    assert np.isfinite(K[:, :40]).all()
    assert np.isnan(K[:, 48:]).all()
    np.testing.assert_allclose(K[:, :48], expected[:, :48], rtol=1e-12)


def test_sums_and_products_of_kernels(samples: small.Samples, root: Path) -> None:
    """Protects K14 through the store: terms that prepare differently, weights, and their order."""
    linear = {"kind": "dot-product", "kernel": "linear"}
    kernel = {"kind": "sum", "terms": [{**linear, "weight": 0.5}, {"kind": "product", "terms": [RF, linear]}]}
    X, _ = samples.arrays(72)
    K = small.make(samples.experiment(kernel=kernel, data={"train": 60}), root).dense()
    inner = X @ X.T
    expected = 0.5 * inner + inner * reference.homogeneous(layers("rf"), X, X)
    np.testing.assert_allclose(K[:, :60], expected[:, :60], rtol=1e-11, atol=1e-11)


# Shared tiles.


def test_small_and_large_runs_share_tiles(samples: small.Samples, root: Path) -> None:
    """Protects ``a 2,000-sample run and a 10,000-sample run share tiles``: only new ones are computed."""

    def run(train: int, validation: int) -> tuple[int, int]:
        one = samples.experiment(data={"train": train, "validation": validation})
        report = small.make(one, root).reports["train"][0]
        return report.computed, report.reused

    assert run(16, 8) == (2, 0)  # (0, 0) and the pool's last rows against them
    assert run(16, 8) == (0, 2)
    assert run(48, 8) == (7, 2)
    assert run(20, 8) == (0, 5)
    assert run(64, 8) == (5, 9)


def test_another_seeds_validation_split_computes_none(samples: small.Samples, root: Path) -> None:
    """Protects seeds, folds and ridges: they are index sets over one matrix."""
    for seed, expected in ((0, 10), (1, 0), (2, 0)):
        data = {"train": 64, "validation": {"random": 16}}
        made = small.make(samples.experiment(seed=seed, data=data, solve={"ridges": [10.0**-seed]}), root)
        assert made.computed == {"train": expected}


def test_another_permutation_of_the_whole_pool_computes_none(samples: small.Samples, root: Path) -> None:
    """Protects R10's five seeds: one canonical matrix serves every order of (nearly) all samples."""
    for seed in range(3):
        data = {"order": {"permutation": seed}, "train": 60, "validation": 12}
        made = small.make(samples.experiment(data=data), root)
        assert made.computed == {"train": 15 if seed == 0 else 0}
    assert len(list((root / "gram").iterdir())) == 1


def test_growing_data_compute_only_new_and_ragged_tiles(samples: small.Samples, root: Path) -> None:
    """Protects data that grow, also for a process that has worked on the smaller store before."""
    data = {"train": 60, "validation": 8}
    assert small.make(samples.experiment(data=data), root).computed == {"train": 14}
    samples.write(90)
    grown = small.make(samples.experiment(data={"train": 80, "validation": 8}), root)
    assert grown.computed == {"train": 20 - 10}
    X, _ = samples.arrays(90)
    expected = reference.homogeneous(exponential(1.0), X, X)
    np.testing.assert_allclose(grown.dense()[:, :80], expected[:, :80], rtol=1e-12)


def test_a_new_root_at_an_old_path_shares_nothing(samples: small.Samples, root: Path) -> None:
    """Protects workers that outlive a run: blocks kept of a store are not taken for another's at its path."""
    import shutil

    small.make(samples.experiment(), root)
    shutil.rmtree(root)
    X, _ = samples.arrays(72)
    X[1:] *= -1.5  # the first sample names own arrays
    np.save(samples.folder / "X.npy", X)
    K = small.make(samples.experiment(), root).dense()
    np.testing.assert_allclose(K[:, :40], reference.homogeneous(exponential(1.0), X, X)[:, :40], rtol=1e-12)


def test_ntk_brings_rf_in_the_same_pass(samples: small.Samples, root: Path) -> None:
    """Protects joint computation: two stores filled at once, and the RF experiment then computes nothing."""
    ntk = small.make(samples.experiment(kernel=NTK), root)
    assert [report.computed for report in ntk.reports["train"]] == [12, 12]
    rf = small.make(samples.experiment(kernel=RF), root)
    assert rf.computed == {"train": 0}
    assert rf.features[0].computed == 0
    np.testing.assert_array_equal(rf.dense(), ntk.dense(output=0))
    X, _ = samples.arrays(72)
    np.testing.assert_allclose(
        rf.dense()[:, :48], reference.homogeneous(layers("rf"), X, X)[:, :48], rtol=1e-12
    )


def test_ntk_after_rf_keeps_the_tiles_of_rf(samples: small.Samples, root: Path) -> None:
    """Protects write-once between outputs: tiles that one of two stores has are not written again."""
    rf = small.make(samples.experiment(kernel=RF), root)
    files = {t: rf.store.chunk("gram", t).stat().st_mtime_ns for t in rf.store.present()}
    assert small.make(samples.experiment(kernel=NTK), root).computed == {"train": 12}
    assert {t: rf.store.chunk("gram", t).stat().st_mtime_ns for t in rf.store.present()} == files


def test_joint_can_be_switched_off(samples: small.Samples, root: Path) -> None:
    """Protects ``gram.joint = false``: one store."""
    made = small.make(samples.experiment(kernel=NTK, gram={"joint": False}), root)
    assert len(made.stores["train"]) == 1


# Stored tiles that are not what they should be.


def test_lost_and_damaged_tiles_are_computed_again(samples: small.Samples, root: Path) -> None:
    """Protects resumption: exactly the tiles that are gone, with the bits they had."""
    first = small.make(samples.experiment(), root)
    before = first.dense()
    first.store.chunk("gram", (1, 0)).unlink()
    file = first.store.chunk("gram", (2, 1))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ChunkLost, match="2/1 was damaged"):
        first.store.read_tile(2, 1)
    again = small.make(samples.experiment(), root)
    assert again.computed == {"train": 2}
    np.testing.assert_array_equal(again.dense(), before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "tamper",
    [
        lambda tile: tile * 1.001,
        lambda tile: tile + 1e-3 * tile.max(),
        lambda tile: tile[::-1].copy(),
        np.zeros_like,
    ],
    ids=["scaled", "shifted", "turned", "zeros"],
)
@pytest.mark.parametrize("kernel", [NTK, {"kind": "dot-product", "kernel": "exponential", "sigma": 1.0}])
def test_wrong_values_under_a_right_checksum_are_refused(
    samples: small.Samples, root: Path, kernel: dict, tamper: Any, dtype: str
) -> None:
    """Protects a resumed run from another program's, or a defective machine's, tiles."""
    one = samples.experiment(kernel=kernel, gram={"dtype": dtype})
    store = small.make(one, root).store
    rows, columns = store.grid.extent((0, 0))
    store.array("gram")[rows, columns] = tamper(store.read_tile(0, 0))
    with pytest.raises(
        StoreError, match=rf"{store.path}: stored entries of tile 0/0 .*relative difference"
    ) as e:
        small.make(one, root)
    assert not isinstance(e.value, ChunkLost)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_copies_of_a_sample_do_not_look_like_a_wrong_store(
    samples: small.Samples, root: Path, dtype: str, rng: np.random.Generator
) -> None:
    """Protects data with duplicates: an NTK near cosine 1 is known to the root of rounding alone (K13)."""
    X = rng.random((72, 300))
    for copy in (1, 15, 16, 17, 31, 32, 47, 48, 63, 64, 71):
        X[copy] = X[0] * (1 if copy % 2 else 3.7)
    np.save(samples.folder / "X.npy", X)
    for depth in (2, 3, 5):
        one = samples.experiment(kernel={**NTK, "depth": depth}, gram={"dtype": dtype})
        small.make(one, root)
        assert small.make(one, root).computed == {"train": 0}


def precisely(network: Any, tangent: Any, a: Prepared, b: Prepared, same: Any) -> np.ndarray:
    """A path of its own: as the general one, from float64 arrays and rounded."""

    def wide(block: Prepared) -> Prepared:
        return replace(
            block, arrays={name: values.astype(np.float64) for name, values in block.arrays.items()}
        )

    dtype = a.arrays["image"].dtype
    return GENERAL_PAIR(network, tangent, wide(a), wide(b), same).astype(dtype)


GENERAL_PAIR = general.pair


def save_images(samples: small.Samples, rng: np.random.Generator, *, copies: bool) -> None:
    X = rng.random((72, 8, 8, 1))
    if copies:
        for copy in (1, 15, 16, 17, 31, 47, 48, 71):
            X[copy] = X[0] * (1 if copy % 2 else 3.7)
    np.save(samples.folder / "X.npy", X)


def convolutional(kernel: str, **options: Any) -> dict[str, Any]:
    layer = {"patch": 3, "kernel": kernel, **({"sigma": 0.6} if kernel == "exponential" else {})}
    return {"kind": "convolutional", "layers": [{**layer, "subsampling": 2}, layer], **options}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kernel", [convolutional("exponential"), convolutional("relu", tangent=True)])
def test_tiles_of_one_path_are_taken_by_another(
    samples: small.Samples, root: Path, rng: np.random.Generator, kernel: dict, copies: bool
) -> None:
    """Protects resuming on another machine: float32 tiles differ between paths by rounding, and by the root of
    rounding where an NTK meets copies of a sample under other row ids (K13)."""
    save_images(samples, rng, copies=copies)
    one = samples.experiment(kernel=kernel, gram={"dtype": "float32"})
    made = small.make(one, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "pair", precisely)
        patch.setenv("MEGAGRAM_KERNEL_PATH", "general")
        again = small.make(one, root)
    assert again.computed == {"train": 0}
    assert made.computed == {"train": 12}


COMPILED = provenance.paths()["compiled"]


@pytest.mark.skipif(COMPILED.startswith("absent"), reason=COMPILED)
@pytest.mark.parametrize(
    ("kernel", "copies", "dtype"),
    [
        (convolutional("exponential"), False, "float32"),
        (convolutional("relu", tangent=True), True, "float32"),
        (convolutional("relu", tangent=True), True, "float64"),
    ],
)
def test_general_and_compiled_tiles_are_taken_by_each_other(
    samples: small.Samples,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    kernel: dict,
    copies: bool,
    dtype: str,
) -> None:
    """Protects resuming by another path, either way; and the record of which path made each tile."""
    save_images(samples, rng, copies=copies)
    few = samples.experiment(kernel=kernel, gram={"dtype": dtype}, data={"train": 16})
    all_of_them = samples.experiment(kernel=kernel, gram={"dtype": dtype})
    for first, then in (("general", "compiled"), ("compiled", "general")):
        monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", first)
        small.make(few, tmp_path / first)
        monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", then)
        store = small.make(all_of_them, tmp_path / first).store
        names = {"general": "numpy", "compiled": COMPILED}
        old = gram.made_by(store, {(0, 0), (3, 0), (4, 0)})
        new = gram.made_by(store, {(1, 0), (2, 1)})
        assert {line["path"] for line in old} == {names[first]}
        assert {line["path"] for line in new} == {names[then]}


@pytest.mark.parametrize(("dtype", "moved"), [("float32", 1e-4), ("float64", 1e-7)])
@pytest.mark.parametrize("kernel", [convolutional("exponential"), convolutional("relu", tangent=True)])
def test_more_than_paths_may_differ_by_is_refused(
    samples: small.Samples, root: Path, rng: np.random.Generator, kernel: dict, dtype: str, moved: float
) -> None:
    """Protects the check from being too generous: a hundred times what two paths may differ by is another kernel's."""
    save_images(samples, rng, copies=False)
    one = samples.experiment(kernel=kernel, gram={"dtype": dtype})
    store = small.make(one, root).store
    tile = store.read_tile(1, 0)
    rows, columns = store.grid.extent((1, 0))
    store.array("gram")[rows, columns] = tile * (1 + moved)
    for other in store.present() - {(1, 0)}:
        store.set_aside("gram", other)
    with pytest.raises(StoreError, match="stored entries of tile 1/0"):
        small.make(one, root)


def test_a_bumped_revision_gets_another_store(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against tiles of an older version of a kernel: its revision is part of the address."""
    old = small.make(samples.experiment(), root)
    monkeypatch.setattr(DotProduct, "revision", DotProduct.revision + 1)
    new = small.make(samples.experiment(), root)
    assert new.store.path != old.store.path
    assert new.computed == {"train": 12}
    assert new.features[0].store != old.features[0].store


def test_values_that_overflow_are_refused_with_samples_and_recorded(
    samples: small.Samples, root: Path
) -> None:
    """Protects the store from infinities, and names the samples; ``status`` finds the failed tile."""
    store = small.refused_tile(samples, root)
    failed = [line for line in store.records() if "failed" in line]
    assert [1, 1] in failed[0]["failed"]
    assert "not finite" in failed[0]["error"]
    assert leases.holders(store.path) == []


# Records.


def test_records_say_what_made_each_tile(samples: small.Samples, root: Path) -> None:
    """Protects provenance: path, versions, seconds and memory for every tile, exactly once."""
    store = small.make(samples.experiment(), root).store
    lines = store.records()
    tiles = [tuple(tile) for line in lines for tile in line["tiles"]]
    assert sorted(tiles) == sorted(store.present())
    for line in lines:
        assert line["path"] == "numpy"
        assert f"numpy {np.__version__}" in line["made_with"]
        assert len(line["seconds"]) == len(line["tiles"])
        assert line["peak_bytes"] > 0


# Sharing out between drivers.


class Stub:
    """A stand-in for a store: which tiles it has."""

    def __init__(self, path: Path) -> None:
        self.path, self.tiles = path, set[tuple[int, int]]()

    def has(self, tile: tuple[int, int]) -> bool:
        return tile in self.tiles


def other_driver(store: Path, tiles: list[tuple[int, int]]) -> leases.Lease:
    lease = leases.Lease(store)
    lease.add(tiles)
    return lease


def test_what_another_driver_holds_comes_last(tmp_path: Path) -> None:
    """Protects two drivers from doing the same work: theirs is waited for, passed over once it is there."""
    store = Stub(tmp_path)
    work = [Rectangle(((k, 0),)) for k in range(3)]
    with leases.Lease(tmp_path) as own, other_driver(tmp_path, [(0, 0)]):
        source = gram.SharedOut(store, work, [own])  # type: ignore[arg-type]
        assert {source.next(), source.next()} == {work[1], work[2]}
        assert isinstance(source.next(), tasks.Wait)
        store.tiles.add((0, 0))
        source._looked = 0.0
        assert source.next() is None
        assert leases.living(tmp_path, besides=own.path)[0].tiles == {(0, 0)}
        assert {t for h in leases.holders(tmp_path) for t in h.tiles} == {(0, 0), (1, 0), (2, 0)}


def test_drivers_that_take_one_task_at_once_give_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects two drivers that begin together: a lease is looked at once more after others can see it."""
    store = Stub(tmp_path)
    with leases.Lease(tmp_path) as own, leases.Lease(tmp_path) as theirs:
        source = gram.SharedOut(store, [Rectangle(((0, 0),))], [own])  # type: ignore[arg-type]
        add = leases.Lease.add

        def both(self: leases.Lease, tiles: Any) -> None:
            add(self, tiles)
            add(theirs, tiles)

        monkeypatch.setattr(leases.Lease, "add", both)
        assert isinstance(source.next(), tasks.Wait)
        (mine,) = [holder for holder in leases.living(tmp_path) if holder.path == own.path]
        assert mine.tiles == set()


def test_what_a_dead_driver_held_is_taken_over(tmp_path: Path) -> None:
    """Protects from waiting for ever for a driver that was killed."""
    store = Stub(tmp_path)
    with leases.Lease(tmp_path) as own:
        theirs = other_driver(tmp_path, [(0, 0)])
        source = gram.SharedOut(store, [Rectangle(((0, 0),))], [own])  # type: ignore[arg-type]
        assert isinstance(source.next(), tasks.Wait)
        theirs.close()
        source._looked = 0.0
        assert source.next() == Rectangle(((0, 0),))


def test_only_what_is_missing_of_a_task_is_handed_out(tmp_path: Path) -> None:
    """Protects resumption inside a task of many tiles."""
    store = Stub(tmp_path)
    store.tiles.add((0, 0))
    with leases.Lease(tmp_path) as own:
        source = gram.SharedOut(store, [Rectangle(((0, 0), (1, 0)))], [own])  # type: ignore[arg-type]
        assert source.next() == Rectangle(((1, 0),))
        source.done(Rectangle(((1, 0),)))
        assert source.next() is None


# What travels, and what a worker keeps.


def test_jobs_and_reports_are_small(samples: small.Samples, root: Path) -> None:
    """Protects the scheduler: nothing large in a task or its result, whatever the size of the matrix."""
    made = small.make(samples.experiment(kernel=NTK), root)
    rows = Path(made.features[0].store)
    job = gram.job_of(made.kernel, made.stores["train"], rows, rows, small.MEMORY)
    assert len(json.dumps(vars(job))) < 2000
    report = gram.compute_tiles(Rectangle(((0, 0), (1, 0))), job)
    assert report.computed == ()
    assert len(repr(report)) < 1000


def test_blocks_are_kept_within_their_budget(samples: small.Samples, root: Path) -> None:
    """Protects a worker's memory: least recently used blocks go first, never more than the limit but one."""
    made = small.make(samples.experiment(data={"train": 60}), root)
    path = made.features[0].store
    size = gram.block_bytes(gram.FeatureStore(Path(path)))
    cache = gram.BlockCache(2 * size)
    kept = [cache.block(path, k, "") for k in (0, 1)]
    assert cache.block(path, 0, "") is kept[0]
    cache.block(path, 2, "")
    assert cache.block(path, 0, "") is kept[0]
    assert cache.block(path, 1, "") is not kept[1]
    assert gram.BlockCache(1).block(path, 0, "").nbytes == size


def test_tasks_are_grouped_by_what_a_worker_may_hold(samples: small.Samples, root: Path) -> None:
    """Protects a worker's memory: the rows and columns of a task's square fit its cache, and no larger do."""
    store = gram.FeatureStore(Path(small.make(samples.experiment(), root).features[0].store))
    block = gram.block_bytes(store)
    assert block == 16 * (5 + 1) * 8
    cache = memory.cache_bytes(small.MEMORY)
    group = gram.largest_group(store, small.MEMORY)
    assert 2 * group * block <= cache < 2 * (group + 1) * block


def test_no_workers_are_opened_when_everything_is_stored(samples: small.Samples, root: Path) -> None:
    """Protects a resumed run from the seconds that a cluster takes to start."""
    small.make(samples.experiment(), root)

    def refuse() -> tasks.Workers:
        raise AssertionError("workers were opened")

    small.make(samples.experiment(), root, refuse)


def test_progress_runs_from_what_is_stored_to_all(samples: small.Samples, root: Path) -> None:
    """Protects the bar and the journal: what is stored counts, every step goes up, the end is reached."""
    small.make(samples.experiment(data={"train": 16}), root)
    seen: list[tuple[int, int]] = []
    small.make(samples.experiment(), root, progress=lambda done, total, message: seen.append((done, total)))
    assert seen[0] == (3, 12)
    assert seen[-1] == (12, 12)
    assert seen == sorted(seen)


def test_blocks_of_the_pool_are_kept_once_for_both_matrices(samples: small.Samples, root: Path) -> None:
    """Protects the memory that the plan promised: the test set's matrix reads the pool's blocks again."""
    samples.write(20, "_test")
    test = {"X_test": str(samples.folder / "X_test.npy"), "y_test": str(samples.folder / "y_test.npy")}
    made = small.make(samples.experiment(data={**test, "test": 20}), root)
    train, cross = made.stores["train"][-1], made.stores["test"][-1]
    rows, columns = (Path(report.store) for report in (made.features[-1], made.features[0]))
    jobs = [
        gram.job_of(made.kernel, [train], columns, columns, small.MEMORY),
        gram.job_of(made.kernel, [cross], rows, columns, small.MEMORY),
    ]
    cache = gram.BlockCache(small.MEMORY)
    blocks = [cache.block(job.columns, 0, job.samples[1]) for job in jobs]
    assert blocks[0] is blocks[1]


def test_nothing_is_computed_for_the_sake_of_the_other_output(samples: small.Samples, root: Path) -> None:
    """Protects a matrix that was made alone: asked for jointly, its tiles are there, in plan and run."""
    alone = samples.experiment(kernel=NTK, gram={"joint": False})
    jointly = samples.experiment(kernel=NTK)
    small.make(alone, root)
    resolved = pools.resolve(jointly)
    kernel = matrices.run_kernel(jointly)
    assert len(kernel.outputs) == 2
    assert all(not matrix.missing for matrix in matrices.matrix_plans(jointly, resolved, kernel, root))
    assert small.make(jointly, root).computed == {"train": 0}


@pytest.mark.parametrize(
    ("dtype", "size", "advice"), [("float32", 1e10, " or compute in float64"), ("float64", 1e80, "")]
)
def test_entries_beyond_the_range_of_the_dtype_are_one_clear_error(
    samples: small.Samples, root: Path, dtype: str, size: float, advice: str
) -> None:
    """Protects from raw warnings (errors here) and a message without advice, of stored and of recomputed tiles."""
    X, _ = samples.arrays(72)
    X[20] *= size
    np.save(samples.folder / "X.npy", X)
    one = samples.experiment(kernel={"kind": "dot-product", "kernel": "square"}, gram={"dtype": dtype})
    said = (
        f"tile 1/1 has 1 values that are not finite in {dtype}, the first between samples 20 and 20;"
        rf" scale the samples \(data.preprocess\){advice}$"
    )
    with pytest.raises(NumericalError, match=said):
        small.make(one, root)
    (store,) = (root / "features").iterdir()
    with pytest.raises(NumericalError, match=said):
        RecomputedTiles.of(one.kernel_object, store, store, dtype, small.MEMORY).read_tile(1, 1)
