"""Features as a tall matrix: stored or streamed, on a host or a device, the same numbers in blocks of whole rows."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
import small
from tiny_map import IMAGES, TinyMap, preprocessed, tiny

from kernels.base import Cost
from kernels.features.base import FeatureMap, InMemory
from kernels.registry import feature_map
from pipelines import device, features, pools, tasks
from pipelines.errors import ChunkLost, NumericalError
from pipelines.explicit import featuresource, maps
from pipelines.explicit.featuresource import FeatureSource, StoredFeatures, StreamedFeatures
from pipelines.stores import FeatureStore

pytestmark = pytest.mark.usefixtures("tiles_of_16")


def sources(
    samples: small.Samples,
    root: Path,
    unlearned: FeatureMap | None = None,
    *,
    test: bool = False,
    **sections: Any,
) -> tuple[StoredFeatures, StreamedFeatures]:
    """The features of an experiment's pool, stored and to be streamed."""
    one = samples.experiment(**sections)
    resolved = pools.resolve(one)
    dtype, split = one.gram.dtype, resolved.split
    learned, folder = maps.learned(resolved, unlearned or tiny(), dtype, root, split.train, tasks.Workers)
    rows = split.test if test and split.test is not None else np.arange(len(resolved.train))
    arguments = (resolved, learned, dtype, root, rows, tasks.Workers)
    report = features.materialise(*arguments, learned=folder, test=test)
    streamed = featuresource.stream(*arguments, learned=folder, test=test)
    return StoredFeatures.of(Path(report.store)), streamed


def whole(source: FeatureSource) -> np.ndarray:
    return np.concatenate([source.block(k) for k in range(-(-source.shape[0] // source.side))])


WAYS: dict[str, dict[str, Any]] = {
    "vectors": {},
    "float32": {"gram": {"dtype": "float32"}, "data": {"preprocess": ["normalise"]}},
    "fitted": {"data": {"preprocess": ["standardise"]}},
    "expensive": {"data": {"preprocess": ["zca"]}},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_streamed_features_are_the_stored_ones(samples: small.Samples, root: Path, way: str) -> None:
    """Protects the choice between disk and arithmetic: the same bits either way, of all samples, in the same blocks."""
    stored, streamed = sources(samples, root, **WAYS[way])
    assert (streamed.side, streamed.shape) == (stored.side, stored.shape) == (16, (72, 4))
    assert not streamed.symmetric
    assert streamed.block(4).shape == (8, 4)
    np.testing.assert_array_equal(whole(streamed), whole(stored))
    one = samples.experiment(**WAYS[way])
    X = preprocessed(one, tiny())
    expected = tiny().learn(InMemory(X[:40])).features(X)
    tolerance = 1e-6 if one.gram.dtype == "float32" else 1e-12
    np.testing.assert_allclose(whole(streamed), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["random", "monomials"])
def test_maps_that_learn_nothing_stream_too(samples: small.Samples, root: Path, kind: str) -> None:
    """Protects random features and monomials, whose arrays follow from a description."""
    kernel = samples.experiment(
        kernel={"kind": "dot-product", "kernel": "polynomial", "degree": 2}
    ).kernel_object
    if kind == "random":
        kernel = samples.experiment().kernel_object
    table = {"kind": kind, "widths": [10]} if kind == "random" else {"kind": kind}
    stored, streamed = sources(samples, root, feature_map(table, kernel, 3))
    assert streamed.learned is None
    np.testing.assert_array_equal(whole(streamed), whole(stored))


def test_landmarks_are_known_by_their_rows_in_the_pool(samples: small.Samples, root: Path) -> None:
    """Protects float32 tangent kernels (K13): the rows of a permuted pool reach the map, stored and streamed; those of
    a test set are others."""
    small.Samples(samples.folder, seed=5).write(72, "_test")
    paths = {name: str(samples.folder / f"{name}.npy") for name in ("X_test", "y_test")}
    sections: dict[str, Any] = {
        "kernel": {"kind": "fully-connected", "family": "ntk", "depth": 2},
        "gram": {"dtype": "float32"},
        "data": {**paths, "test": 72, "train": [20, 60]},
    }
    one = samples.experiment(**sections)
    unlearned = feature_map({"kind": "nystrom", "landmarks": 10, "epsilon": 0.1}, one.kernel_object, 0)
    stored, streamed = sources(samples, root, unlearned, **sections)
    np.testing.assert_array_equal(whole(streamed), whole(stored))
    resolved, phi = pools.resolve(one), whole(stored)
    made, _ = maps.learned(resolved, unlearned, "float32", root, resolved.split.train, tasks.Workers)
    assert made.arrays is not None
    rows, Z = made.arrays["rows"], made.arrays["landmarks"]
    X = preprocessed(one, made)
    np.testing.assert_array_equal(X[rows], Z)
    exact = made.features(Z.astype(np.float64), rows, bytes(made.arrays["pool"]).decode())
    assert (np.linalg.norm(phi[rows] - exact, axis=1) < 2e-5 * np.linalg.norm(exact, axis=1)).all()
    elsewhere = sources(samples, root, unlearned, test=True, **sections)
    expected = made.features(resolved.test.X.astype(np.float32)) if resolved.test is not None else None
    for source in elsewhere:
        np.testing.assert_allclose(whole(source), expected, rtol=1e-6, atol=1e-7)


def test_images_reach_a_map_as_it_takes_them(samples: small.Samples, root: Path) -> None:
    """Protects shapes: images stay images for a map of images, and are flattened for one of vectors."""
    np.save(samples.folder / "X.npy", np.random.default_rng(0).random((72, 3, 2, 2)))
    _, vectors = sources(samples, root)
    stored, images = sources(samples, root, tiny(kernel=IMAGES))
    np.testing.assert_array_equal(whole(images), whole(stored))
    np.testing.assert_allclose(whole(images), whole(vectors), rtol=1e-12)


def test_a_test_set_streams_by_what_training_samples_taught(samples: small.Samples, root: Path) -> None:
    """Protects test features: another pool, the same map and the same fitted steps."""
    small.Samples(samples.folder, seed=5).write(20, "_test")
    paths = {name: str(samples.folder / f"{name}.npy") for name in ("X_test", "y_test")}
    sections = {"data": {**paths, "test": 20, "preprocess": ["standardise"]}}
    stored, streamed = sources(samples, root, test=True, **sections)
    assert streamed.shape == (20, 4)
    np.testing.assert_array_equal(whole(streamed), whole(stored))
    pool, _ = sources(samples, root, **sections)
    assert pool.path != stored.path


def test_tiles_are_columns_of_blocks(samples: small.Samples, root: Path) -> None:
    """Protects products that go by tiles: 20 features are a whole tile and a narrow one."""
    for source in sources(samples, root, tiny(20)):
        for i, j in ((0, 0), (0, 1), (4, 1)):
            tile = source.read_tile(i, j)
            np.testing.assert_array_equal(tile, source.block(i)[:, 16 * j : 16 * j + 16])


def test_sources_are_small_and_name_what_they_hold(samples: small.Samples, root: Path) -> None:
    """Protects the scheduler from arrays, and solves that are resumed from features of others."""
    _, first = sources(samples, root, tiny(30))
    assert len(pickle.dumps(first)) < 2000
    assert pickle.loads(pickle.dumps(first)) == first
    _, other = sources(samples, root, tiny(30, seed=1))
    assert first.identity != other.identity
    _, again = sources(samples, root, tiny(30))
    assert again.identity == first.identity
    samples.write(80)
    assert sources(samples, root, tiny(30))[1].identity != first.identity


def test_streamed_features_are_never_stored(samples: small.Samples, root: Path) -> None:
    """Protects the disk: reading every block leaves what was there before."""
    _, streamed = sources(samples, root)
    before = sorted(root.rglob("*"))
    whole(streamed)
    assert sorted(root.rglob("*")) == before


def test_what_is_not_finite_is_refused_and_named(samples: small.Samples, root: Path) -> None:
    """Protects sums from infinities: the sample is named, streamed as well as stored."""
    X, _ = samples.arrays(72)
    X[50] *= 1e6
    np.save(samples.folder / "X.npy", X)
    one = samples.experiment()
    resolved = pools.resolve(one)
    arguments = ("float64", root, np.arange(72), tasks.Workers)
    learned, folder = maps.learned(resolved, tiny(), "float64", root, np.arange(40), tasks.Workers)
    streamed = featuresource.stream(resolved, learned, *arguments, learned=folder)
    with np.errstate(over="ignore"):
        assert np.isfinite(streamed.block(2)).all()
        with pytest.raises(NumericalError, match="sample 50 has a feature that is not finite"):
            streamed.block(3)
        with pytest.raises(NumericalError, match="sample 50 has a value in features"):
            features.materialise(resolved, learned, *arguments, learned=folder)


def test_a_damaged_block_is_made_again(samples: small.Samples, root: Path) -> None:
    """Protects stored features as tiles are: damage is found when a block is read, and mends by the next run."""
    stored, streamed = sources(samples, root)
    chunk = Path(stored.path) / "features" / "c" / "2" / "0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(ChunkLost, match=r"chunk 2/0 was damaged .* set aside; run the experiment again"):
        stored.block(2)
    assert not FeatureStore(Path(stored.path)).has(2)
    again, _ = sources(samples, root)
    np.testing.assert_array_equal(again.block(2), streamed.block(2))
    assert chunk.read_bytes() == content


def test_blocks_of_wide_features_are_short(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects workers' memory: a block of wide features has fewer samples, and these have the same features."""
    stored, _ = sources(samples, root, tiny(20))
    monkeypatch.setattr(features, "BLOCK_BYTES", 5 * 20 * 8)
    short, streamed = sources(samples, root, tiny(20))
    assert (short.side, streamed.side) == (4, 4)
    assert short.path != stored.path
    np.testing.assert_allclose(whole(short), whole(stored), rtol=1e-13)
    np.testing.assert_array_equal(whole(short), whole(streamed))
    monkeypatch.setattr(features, "BLOCK_BYTES", 1)
    assert features.block_side(tiny(20), (5,), "float64") == 1


def test_memory_beside_a_block_is_bounded(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects workers' memory: a map that needs much for each sample gets few of them at a time."""
    given: list[int] = []
    really = TinyMap.features

    def watched(self: TinyMap, X: np.ndarray, *known: Any) -> np.ndarray:
        given.append(len(X))
        return really(self, X, *known)

    monkeypatch.setattr(TinyMap, "features", watched)
    monkeypatch.setattr(TinyMap, "feature_cost", lambda self, n, shape, itemsize=4: Cost(0.0, 0.0, n * 1000))
    expected = whole(sources(samples, root / "a")[1])
    monkeypatch.setattr(features, "SCRATCH_BYTES", 5000)
    given.clear()
    np.testing.assert_allclose(whole(sources(samples, root / "b")[1]), expected, rtol=1e-13)
    assert set(given) == {1, 4}


def test_features_are_computed_on_a_device_where_there_is_one(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects GPU workers: samples go to the device, and features come back to be stored."""
    stored, streamed = sources(samples, root / "host")
    expected = whole(stored)
    moved: list[int] = []
    cupy = fake_cupy.module()
    vars(cupy)["asarray"] = lambda array: moved.append(len(array)) or np.asarray(array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert device.used()
    there, _ = sources(samples, root / "device")
    np.testing.assert_array_equal(whole(there), expected)
    assert moved == [16, 16, 16, 16, 8]
    moved.clear()
    np.testing.assert_array_equal(whole(streamed), expected)
    assert moved == [16, 16, 16, 16, 8]


def test_workers_with_a_device_alone_compute_features(samples: small.Samples, root: Path) -> None:
    """Protects mixed clusters: preprocessing runs on every worker, features where the devices are."""
    asked: list[dict[str, float] | None] = []

    class Client:
        def submit(self, function: Any, *arguments: Any, resources: Any, **options: Any) -> Any:
            from concurrent.futures import Future

            asked.append(resources)
            future: Any = Future()
            future.set_result(function(*arguments))
            future.status = "finished"
            return future

    one = samples.experiment(data={"preprocess": ["zca"]})
    resolved = pools.resolve(one)
    learned, folder = maps.learned(resolved, tiny(), "float64", root, np.arange(40), tasks.Workers)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("distributed.wait", lambda pending, **options: type("Done", (), {"done": set(pending)}))
    try:
        workers = tasks.Workers(Client(), 1, {"GPU": 1.0})
        features.materialise(
            resolved, learned, "float64", root, np.arange(72), lambda: workers, learned=folder
        )
        assert set(map(str, asked)) == {"{'GPU': 1.0}"}
        asked.clear()
        exact = one.kernel_object
        features.materialise(resolved, exact, "float64", root, np.arange(72), lambda: workers)
        assert set(asked) == {None}
    finally:
        monkey.undo()
