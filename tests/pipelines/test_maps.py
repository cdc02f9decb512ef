"""What maps learn: from training samples alone, once, the same wherever it is learned, and never half of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from tiny_map import LINEAR, TinyMap, preprocessed, tiny

from kernels.base import KernelError
from kernels.dot_product import DotProduct
from kernels.features.base import FeatureMap, InMemory
from kernels.registry import feature_map, from_description
from pipelines import features, leases, pools, results, stores, tasks
from pipelines.errors import ChunkLost, DiskFull, StoreError
from pipelines.explicit import mapfiles, maps
from pipelines.inventory import inventory, remove, unused
from pipelines.samples import Preprocessed
from pipelines.stores import FeatureStore, PoolStore
from pipelines.verify import verify

SMOOTH = {"kind": "dot-product", "kernel": "exponential", "sigma": 1.5}

pytestmark = pytest.mark.usefixtures("tiles_of_16")


def learn(
    samples: small.Samples,
    root: Path,
    unlearned: FeatureMap | None = None,
    workers: tasks.Open = tasks.Workers,
    use: Any = lambda path: None,
    **sections: Any,
) -> tuple[FeatureMap, Path]:
    """The map learned from an experiment's training rows, and its folder."""
    one = samples.experiment(**sections)
    resolved = pools.resolve(one)
    made, folder = maps.learned(
        resolved, unlearned or tiny(), one.gram.dtype, root, resolved.split.train, workers, use=use
    )
    assert folder is not None
    return made, folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every time that a map learns."""
    times: list[int] = []
    really = TinyMap.learn

    def learn(self: TinyMap, *arguments: Any) -> TinyMap:
        times.append(1)
        return really(self, *arguments)

    monkeypatch.setattr(TinyMap, "learn", learn)
    return times


@pytest.mark.parametrize("preprocess", [[], ["standardise"], ["zca"]])
def test_a_map_learns_from_preprocessed_training_samples(
    samples: small.Samples, root: Path, preprocess: list[str]
) -> None:
    """Protects what is learned: the same as from the training samples in memory, those of a permuted pool too."""
    sections = {"data": {"preprocess": preprocess, "train": [5, 45]}}
    made, folder = learn(samples, root, **sections)
    X = preprocessed(samples.experiment(**sections), made)
    expected = tiny().learn(InMemory(X[5:45]))
    assert made.arrays is not None
    assert expected.arrays is not None
    np.testing.assert_allclose(made.arrays["anchors"], expected.arrays["anchors"], rtol=1e-12)
    assert made == replace(expected, learned=made.learned)
    assert sorted(path.name for path in folder.iterdir()) == ["anchors.npy", "map.json", "norms.npy"]
    assert [path.name for path in (root / "maps").iterdir()] == [folder.name]


def test_a_map_is_learned_once(samples: small.Samples, root: Path, counted: list[int]) -> None:
    """Protects hours of k-means: the next experiment, or the next start, finds what was learned."""
    used: list[Path] = []
    first, folder = learn(samples, root, use=used.append)
    again, there = learn(samples, root, use=used.append, solve={"ridges": [1.0]})
    assert len(counted) == 1
    assert (again, there) == (first, folder)
    assert used.count(folder) == 2
    assert features._json(again) == features._json(first)


def test_what_is_learned_has_an_address_of_all_that_it_depends_on(
    samples: small.Samples, root: Path, counted: list[int]
) -> None:
    """Protects from anchors of other samples, and lets a pool grow."""
    _, folder = learn(samples, root)
    others = [
        learn(samples, root, tiny(5))[1],
        learn(samples, root, tiny(seed=1))[1],
        learn(samples, root, data={"train": 39})[1],
        learn(samples, root, data={"preprocess": ["normalise"]})[1],
        learn(samples, root, gram={"dtype": "float32"})[1],
        learn(samples, root, tiny(kernel={**LINEAR, "scale": 2.0}))[1],
    ]
    assert len({folder, *others}) == 7
    samples.write(100)
    assert learn(samples, root)[1] == folder
    assert len(counted) == 7
    X, _ = samples.arrays(100)
    X[3] += 1
    np.save(samples.folder / "X.npy", X)
    assert learn(samples, root)[1] != folder


def test_rows_and_revisions_are_part_of_the_address(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from what other rows up to the same last one taught, and from what older code learned."""
    folders = [learn(samples, root)[1], learn(samples, root, data={"train": [5, 40]})[1]]
    for kind in (TinyMap, DotProduct):
        monkeypatch.setattr(kind, "revision", kind.revision + 1)
        folders.append(learn(samples, root)[1])
    assert len(set(folders)) == 4


def test_other_samples_than_training_ones_are_not_looked_at(samples: small.Samples, root: Path) -> None:
    """Protects the test set: with other validation and test samples the same is learned."""
    made, _ = learn(samples, root)
    X, _ = samples.arrays(72)
    X[40:] = 1e6
    np.save(samples.folder / "X.npy", X)
    assert learn(samples, root)[0].learned == made.learned


@pytest.mark.parametrize("kind", ["nystrom", "nystrom-ckn"])
def test_threads_do_not_change_what_is_learned(
    samples: small.Samples, tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    """Protects stored features: eigenvectors are rounded otherwise by two threads of BLAS, and a map is named by a
    digest of what it learned."""
    samples.write(120)
    np.save(samples.folder / "X.npy", rng.standard_normal((120, 16, 16, 1)))
    layer = {"patch": 5, "kernel": "exponential", "sigma": 0.6}
    tables = {
        "nystrom": {"kind": "nystrom", "kernel": SMOOTH, "landmarks": 100},
        "nystrom-ckn": {
            "kind": "nystrom-ckn", "kernel": {"kind": "convolutional", "layers": [layer]}, "anchors": [100],
            "patches": 2000, "iterations": 1,
        },
    }  # fmt: skip
    seen = set()
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            made, _ = learn(
                samples, tmp_path / str(threads), from_description(tables[kind]), data={"train": 100}
            )
        seen.add(made.learned)
    assert len(seen) == 1


def test_a_map_that_learns_nothing_needs_no_file(samples: small.Samples, root: Path) -> None:
    """Protects random features: they follow from their parameters."""
    one = samples.experiment()
    resolved = pools.resolve(one)
    random = feature_map({"kind": "random", "widths": [8]}, one.kernel_object, 0)
    made = maps.learned(resolved, random, "float64", root, resolved.split.train, tasks.Workers)
    assert made == (random, None)
    assert not root.exists()


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


def made_features(
    samples: small.Samples, root: Path, workers: tasks.Open = tasks.Workers, **sections: Any
) -> tuple[features.FeatureReport, np.ndarray]:
    """The stage's report and all stored features, in an experiment that uses every sample."""
    one = samples.experiment(data={"train": 52, "validation": 20, **sections.pop("data", {})}, **sections)
    resolved = pools.resolve(one)
    dtype, split = one.gram.dtype, resolved.split
    learned, folder = maps.learned(resolved, tiny(), dtype, root, split.train, workers)
    report = features.materialise(resolved, learned, dtype, root, split.pool_rows, workers, learned=folder)
    store = FeatureStore(Path(report.store))
    blocks = [store.read_block(block).arrays["features"] for block in range(store.block_count)]
    return report, np.concatenate(blocks)


def test_workers_do_not_change_a_bit(samples: small.Samples, tmp_path: Path, client: Any) -> None:
    """Protects reproducible maps and features: in this process, and on one, two and four workers."""
    sections = {"data": {"preprocess": ["zca"]}, "gram": {"dtype": "float32"}}
    report, alone = made_features(samples, tmp_path / "0", **sections)
    # The block of preprocessed samples was made for learning.
    assert (report.computed, report.reused) == (5, 1)
    for count in (1, 2, 4):
        workers = tasks.Workers(client, count)
        _, found = made_features(samples, tmp_path / str(count), lambda workers=workers: workers, **sections)
        np.testing.assert_array_equal(found, alone)


def test_features_are_those_of_all_samples_at_once_and_shared(samples: small.Samples, root: Path) -> None:
    """Protects the stage's result, and the second experiment with the same map: it computes nothing."""
    report, found = made_features(samples, root, data={"preprocess": ["normalise"]})
    X = preprocessed(samples.experiment(data={"preprocess": ["normalise"]}), tiny())
    np.testing.assert_allclose(found, tiny().learn(InMemory(X[:52])).features(X), rtol=1e-12)
    again, _ = made_features(
        samples, root, data={"preprocess": ["normalise"]}, name="other", solve={"ridges": [1.0]}
    )
    assert (again.store, again.computed, again.reused) == (report.store, 0, 5)
    assert made_features(samples, root)[0].store != report.store


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_features_of_other_code_are_refused(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Protects a resumed run from a map whose code changed: old features are not mixed with new ones."""
    sections = {"gram": {"dtype": dtype}}
    report, _ = made_features(samples, root, **sections)
    assert made_features(samples, root, **sections)[0].reused == 5
    really = TinyMap.features
    monkeypatch.setattr(TinyMap, "features", lambda self, X, *rest: really(self, X) * X.dtype.type(1 + 1e-3))
    refused = (
        rf"{report.store}: stored features of block 0 .*relative difference 1\.0e-03\); use another --root"
    )
    with pytest.raises(StoreError, match=refused) as e:
        made_features(samples, root, **sections)
    assert not isinstance(e.value, ChunkLost)
    FeatureStore(Path(report.store)).set_aside("features", (0, 0))
    with pytest.raises(StoreError, match="stored features of block 1"):  # also where some are to be made
        made_features(samples, root, **sections)


@pytest.mark.parametrize("kind", ["nystrom", "random"])
def test_features_of_another_machine_are_taken(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, kind: str
) -> None:
    """Protects resuming elsewhere: rounding, which whitening amplifies, is no other code."""
    np.save(samples.folder / "X.npy", rng.standard_normal((72, 3)))
    one = samples.experiment(kernel=SMOOTH, gram={"dtype": "float32"})
    table = {"landmarks": 30, "epsilon": 0.0} if kind == "nystrom" else {"widths": [50]}
    resolved = pools.resolve(one)
    unlearned = feature_map({"kind": kind, **table}, one.kernel_object, 0)
    rows = resolved.split.pool_rows
    made, folder = maps.learned(resolved, unlearned, "float32", root, resolved.split.train, tasks.Workers)

    def materialise() -> features.FeatureReport:
        return features.materialise(resolved, made, "float32", root, rows, tasks.Workers, learned=folder)

    computed = materialise().computed
    really = type(made).features

    def otherwise(self: FeatureMap, X: np.ndarray, *rest: Any) -> np.ndarray:
        """Sums taken in another order are off by a rounding, as those of a sample a few roundings away."""
        moved = np.random.default_rng(1).integers(-4, 5, X.shape).astype(X.dtype)
        return really(self, X * (1 + moved * np.finfo(X.dtype).eps), *rest)

    monkeypatch.setattr(type(made), "features", otherwise)
    assert materialise().reused == computed


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "json", "empty", "other", "pickled"])
def test_a_damaged_map_is_named_set_aside_and_learned_again(
    samples: small.Samples, root: Path, counted: list[int], how: str
) -> None:
    """Protects features from damaged anchors: found when they are read, the next try learns the same again."""
    made, folder = learn(samples, root)
    file, document = folder / "anchors.npy", folder / "map.json"
    whole = file.read_bytes()
    if how == "json":
        document.write_text(document.read_text()[:-3])
    elif how == "empty":
        document.write_text("{}")
    elif how == "gone":
        file.unlink()
    elif how == "other":
        document.write_text(document.read_text().replace(made.learned, "0" * 64))
    elif how == "pickled":
        np.save(file, np.array([{}], object), allow_pickle=True)
    else:
        file.write_bytes(whole[:-4] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ChunkLost, match=rf"{folder}.* damaged .* set aside; run the experiment again"):
        learn(samples, root)
    assert not folder.exists()
    again, there = learn(samples, root)
    assert (again, there) == (made, folder)
    assert file.read_bytes() == whole
    assert len(counted) == 2


def test_a_worker_that_finds_damage_says_so(samples: small.Samples, root: Path) -> None:
    """Protects a running stage: what was learned is damaged meanwhile, or another took its place."""
    one = samples.experiment()
    resolved = pools.resolve(one)
    made, folder = learn(samples, root)

    def materialise() -> None:
        features._learned.cache_clear()
        features.materialise(
            resolved, made, "float64", root, resolved.split.pool_rows, tasks.Workers, learned=folder
        )

    (folder / "norms.npy").unlink()
    with pytest.raises(ChunkLost, match=str(folder)):
        materialise()
    with pytest.raises(ChunkLost, match=rf"{folder}: .* missing; run the experiment again"):
        materialise()
    mapfiles.write(folder, tiny(5).learn(InMemory(samples.arrays(72)[0])))
    with pytest.raises(ChunkLost, match="another map was learned meanwhile"):
        materialise()


def test_of_two_drivers_that_learn_at_once_the_first_counts(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects write-once: both drivers go on with one map, and nothing is left of the other's."""
    other = tiny().learn(InMemory(np.ones((9, 5))))
    really = TinyMap.learn

    def slowly(self: TinyMap, *arguments: Any) -> TinyMap:
        made = really(self, *arguments)
        one = samples.experiment()
        place = maps.place(pools.resolve(one), self, "float64", root, np.arange(40))
        mapfiles.write(place, other, {"source": "another driver", "samples": 9})
        return made

    monkeypatch.setattr(TinyMap, "learn", slowly)
    made, folder = learn(samples, root)
    assert made.learned == other.learned
    assert list((root / "maps").iterdir()) == [folder]


def test_leases_without_a_map_are_no_map(samples: small.Samples, root: Path) -> None:
    """Protects learning again: a lease on what was set aside is renewed in a folder that holds nothing else."""
    made, folder = learn(samples, root)
    shutil.rmtree(folder)
    with leases.Lease(folder):
        assert learn(samples, root) == (made, folder)
    assert verify(root)[-1].bad == []


def test_a_full_disk_leaves_no_half_of_a_map(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the folder's name: nothing is there unless all of it is."""

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapfiles, "sync", full)
    with pytest.raises(DiskFull):
        learn(samples, root)
    assert list((root / "maps").iterdir()) == []


def test_what_was_learned_is_listed_kept_and_cleaned(samples: small.Samples, root: Path) -> None:
    """Protects ``store list`` and ``store clean``: a map stays while a result or a living process needs it."""
    _, folder = learn(samples, root)
    (entry,) = (one for one in inventory(root) if one.kind == "maps")
    assert entry.holds == "what a tiny map learned from 40 samples of arrays"
    assert entry.bytes == stores.folder_bytes(folder)
    run = results.new_run_id()
    journal = results.Journal(root, "small", run)
    journal.uses([str(folder)])
    assert folder not in {one.path for one in unused(inventory(root))}
    journal.finish("failed")
    shutil.rmtree(root / "runs")
    with leases.Lease(folder):
        assert folder not in {one.path for one in unused(inventory(root))}
    remove([one for one in unused(inventory(root)) if one.path == folder])
    assert not folder.exists()
    assert mapfiles.paths(root) == []


def test_verify_reads_what_was_learned(samples: small.Samples, root: Path) -> None:
    """Protects ``verify --repair``: damage is found, set aside, and swept when it is old."""
    _, folder = learn(samples, root)
    found = {one.store: one for one in verify(root)}
    assert (found[str(folder)].chunks, found[str(folder)].bad) == (2, [])
    (folder / "anchors.npy").write_bytes(b"")
    assert verify(folder)[0].bad
    assert folder.exists()
    verify(root, repair=True)
    assert mapfiles.paths(root) == []
    (aside,) = (root / "maps").iterdir()
    assert aside not in stores.unfinished_paths(root)
    os.utime(aside, (0, 0))
    assert stores.unfinished_paths(root) == [aside]


def test_a_map_of_another_format_is_refused(samples: small.Samples, root: Path) -> None:
    """Protects later versions' files from being read as this one's."""
    _, folder = learn(samples, root)
    document = json.loads((folder / "map.json").read_text())
    (folder / "map.json").write_text(json.dumps({**document, "format": 2}))
    with pytest.raises(StoreError, match="has format 2, this version reads format 1"):
        mapfiles.read(folder)


def test_too_few_samples_are_the_maps_own_error(samples: small.Samples, root: Path) -> None:
    """Protects the message: what a map cannot learn is said by the map, and nothing is stored."""

    class Demanding(TinyMap):
        def learn(self, *arguments: Any) -> TinyMap:
            raise KernelError("anchors must be at most 40")

    with pytest.raises(KernelError, match="anchors must be at most 40"):
        learn(samples, root, Demanding(tiny().kernel))
    assert not list((root / "maps").glob("*"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[Preprocessed]]:
    """2,500 samples, and where they are read: raw, and in blocks of a feature store."""
    root = tmp_path_factory.mktemp("stored")
    X = np.random.default_rng(0).standard_normal((2500, 3))
    axis = pools.axis_of(X)
    raw = PoolStore.materialise(root, {"source": "test"}, axis, X)
    like = features.Prepared({"X": X[:1]}, np.zeros(1, np.int64))
    store = FeatureStore.open_or_create(root, {"pool": {"source": "test"}}, axis, like, 128)
    for block in range(store.block_count):
        store.write_block(
            block, features.Prepared({"X": X[store.extent(block)]}, np.arange(2500)[store.extent(block)])
        )
    return X, [Preprocessed(str(raw.path), "float64"), Preprocessed(str(store.path), "float64")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_samples_are_taken_from_the_chunks_that_hold_them(
    stored: tuple[np.ndarray, list[Preprocessed]], data: st.DataObject
) -> None:
    """Protects learning in bounded memory: any positions, every chunk touched once, no other one."""
    X, places = stored
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, 2499), min_size=1, max_size=40))))
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, len(rows) - 1)))), np.int64)
    for place in places:
        read: list[int] = []

        class Watched(Preprocessed):
            def read(self, start: int, stop: int) -> np.ndarray:
                read.append(start // self.side)  # noqa: B023
                return super().read(start, stop)

        watched = Watched(place.source, place.dtype)
        training = maps.TrainingSamples(watched, rows, len(X), "vectors")
        assert (training.count, training.shape) == (len(rows), (3,))
        read.clear()
        first = int(rows[0]) // place.side  # kept since its shape was asked for
        np.testing.assert_array_equal(training.take(positions), X[rows[positions]])
        touched = np.unique(rows[positions] // place.side).tolist()
        assert read == [number for number in touched if number != first]
