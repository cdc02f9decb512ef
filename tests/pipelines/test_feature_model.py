"""Models on explicit features: their folder is all that they need, and they predict what was fitted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from tiny_map import LINEAR, tiny

from kernels.features.base import FeatureMap
from kernels.registry import feature_map, from_description
from pipelines import features, model, modelfiles, pools, predictions, results, tasks
from pipelines.errors import DataError, NumericalError, StoreError
from pipelines.experiment import Experiment
from pipelines.explicit import maps
from pipelines.explicit.featuresource import StoredFeatures
from pipelines.files import sealed, unsealed
from pipelines.site import Site

pytestmark = pytest.mark.usefixtures("tiles_of_16")

RIDGE = 1e-3


@dataclass
class Saved:
    """A model in ``folder``, and the raw samples and scores (n, t) of its pool."""

    folder: Path
    X: np.ndarray
    scores: np.ndarray


def save(
    experiment: Experiment, unlearned: FeatureMap, root: Path, folder: Path, *, keep_root: bool = False
) -> Saved:
    """Fit weights by dense normal equations (F7) and save the model; the root goes unless it is kept."""
    resolved = pools.resolve(experiment)
    dtype, rows = experiment.gram.dtype, resolved.split.train
    learned, where = maps.learned(resolved, unlearned, dtype, root, rows, tasks.Workers)
    everything = np.arange(len(resolved.train))
    report = features.materialise(resolved, learned, dtype, root, everything, tasks.Workers, learned=where)
    stored = StoredFeatures.of(Path(report.store))
    blocks = [stored.block(k) for k in range(-(-stored.shape[0] // stored.side))]
    phi = np.concatenate(blocks).astype(np.float64)
    y = resolved.y(everything)
    targets = np.eye(int(y.max()) + 1)[y] if resolved.task == "classification" else y.reshape(len(y), -1)
    A = phi[rows].T @ phi[rows] + len(rows) * RIDGE * np.eye(phi.shape[1])
    weights = np.linalg.solve(A, phi[rows].T @ targets[rows])
    folder.mkdir(parents=True)
    arrays = {"weights": weights, "rows": rows}
    modelfiles.save(
        folder,
        pools=resolved,
        kernel=learned,
        dtype=dtype,
        features_path=None,
        ridge=RIDGE,
        checksums={name: results.save_array(folder, name, values) for name, values in arrays.items()},
        root=root,
    )
    if not keep_root:
        shutil.rmtree(root)
    return Saved(folder, resolved.train.X, phi @ weights)


def put(folder: Path, weights: np.ndarray) -> None:
    """Give a model other weights, and their checksum."""
    path = folder / modelfiles.DOCUMENT
    document = unsealed(json.loads(path.read_text()))
    document["checksums"]["weights"] = results.save_array(folder, "weights", weights)
    path.write_text(json.dumps(sealed(document)))


@contextmanager
def site(folder: Path, workers: tasks.Open = tasks.Workers) -> Iterator[Site]:
    with Site(folder / "working", workers, 2**30) as opened:
        yield opened


def random_features(width: int) -> FeatureMap:
    kernel = from_description({"kind": "fully-connected", "family": "rf", "depth": 2})
    return feature_map({"kind": "random", "widths": [width]}, kernel, 0)


WAYS: dict[str, tuple[dict[str, Any], FeatureMap]] = {
    "learned": ({}, tiny(12)),
    "fitted steps": (
        {"data": {"preprocess": ["standardise", "zca"]}, "gram": {"dtype": "float32"}},
        tiny(12),
    ),
    "regression": ({"task": "regression"}, tiny(12)),
    "random": ({}, random_features(30)),
}


@pytest.fixture
def saved(request: pytest.FixtureRequest, samples: small.Samples, root: Path, tmp_path: Path) -> Saved:
    sections, unlearned = WAYS[request.param]
    return save(samples.experiment(**sections), unlearned, root, tmp_path / "result")


@pytest.mark.parametrize("saved", list(WAYS), indirect=True)
def test_a_model_predicts_what_was_fitted_without_its_root(saved: Saved, tmp_path: Path) -> None:
    """Protects ``predict``: map, preprocessing and labels come with the model; where it lies does not matter."""
    moved = saved.folder.rename(tmp_path / "elsewhere")
    found = modelfiles.load(moved)
    assert isinstance(found, model.LinearModel)
    assert (found.ridge, len(found.rows)) == (RIDGE, 40)
    with site(tmp_path) as working:
        scores = predictions.predict(found, saved.X, tmp_path / "no root", working)
    tolerance = 1e-5 if found.dtype == "float32" else 1e-10
    np.testing.assert_allclose(scores, saved.scores, atol=tolerance * np.abs(saved.scores).max())
    answers = found.answers(scores)
    if found.labels is None:
        np.testing.assert_array_equal(answers, scores)
    else:
        np.testing.assert_array_equal(answers, found.labels[np.argmax(saved.scores, axis=1)])
    assert (moved / "map" / "map.json").exists() == bool(found.feature_map.learned)
    assert predictions.seconds(found, 10, tmp_path / "no root") > 0


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=4, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


def test_workers_and_slabs_do_not_change_a_bit(
    samples: small.Samples, root: Path, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects reproducible predictions: any number of workers, any slabs, neither features nor samples are left."""
    one = samples.experiment(data={"preprocess": ["standardise"]}, gram={"dtype": "float32"})
    saved = save(one, tiny(12), root, tmp_path / "result")
    found = modelfiles.load(saved.folder)
    with site(tmp_path) as working:
        alone = predictions.predict(found, saved.X, root, working)
    monkeypatch.setattr(predictions, "SLAB_BYTES", 2 * 16 * saved.X[:1].nbytes)
    for count in (1, 2, 4):
        told: list[tuple[int, int]] = []

        def tell(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        with site(tmp_path, lambda count=count: tasks.Workers(client, count)) as working:
            ends, pieces = [], []
            for rows, scores in predictions.slabs(found, saved.X, root, working, tell):
                assert not list(working.folder.rglob("features"))
                ends.append((rows.start, rows.stop))
                pieces.append(scores)
            assert ends == [(0, 32), (32, 64), (64, 72)]
            np.testing.assert_array_equal(np.concatenate(pieces), alone)
            assert not list(working.folder.glob("scratch-*/samples*"))
            assert not list(working.folder.glob("scratch-*/scores*"))
        assert told[-1] == (72, 72)
        assert told == sorted(told)


def test_wide_features_are_multiplied_in_parts(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects workers' memory: float64 copies of a few samples' features at a time give the same scores."""
    saved = save(samples.experiment(), tiny(12), root, tmp_path / "result")
    monkeypatch.setattr(predictions, "PART_BYTES", 5 * 12 * 8)
    with site(tmp_path) as working:
        scores = predictions.predict(modelfiles.load(saved.folder), saved.X, root, working)
    np.testing.assert_allclose(scores, saved.scores, atol=1e-10 * np.abs(saved.scores).max())


def test_digits_are_told_apart(root: Path, tmp_path: Path) -> None:
    """Protects the whole way on real images: 300 random features tell 90 % of unseen digits right."""
    one = Experiment.model_validate(
        {
            "name": "digits",
            "data": {
                "source": "digits",
                "train": 500,
                "validation": [500, 600],
                "preprocess": ["scale"],
            },
            "kernel": LINEAR,
            "solve": {"ridges": [RIDGE]},
        }
    )
    saved = save(one, random_features(300), root, tmp_path / "result")
    found = modelfiles.load(saved.folder)
    unseen = slice(600, 900)
    with site(tmp_path) as working:
        scores = predictions.predict(found, saved.X[unseen], root, working)
    labels = pools.resolve(one).y(np.arange(600, 900))
    assert np.mean(found.answers(scores) == labels) > 0.9


@pytest.mark.parametrize("saved", ["learned"], indirect=True)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "map" / "anchors.npy").write_bytes(b""), "kernel is damaged .*anchors"),
        (lambda folder: shutil.rmtree(folder / "map"), "kernel is damaged .* missing"),
        (lambda folder: (folder / "weights.npy").unlink(), r"model is damaged .* No such file"),
        (lambda folder: (folder / "rows.npy").write_bytes(b"x"), "model is damaged"),
        (lambda folder: np.save(folder / "weights.npy", np.ones((12, 3))), r"weights\.npy is damaged"),
        (lambda folder: put(folder, np.ones((13, 3))), "13 weights for 12 features"),
        (lambda folder: put(folder, np.ones((12, 2))), "2 columns of coefficients"),
        (lambda folder: put(folder, np.full((12, 3), np.nan)), "do not fit"),
    ],
)
def test_a_damaged_model_is_refused(saved: Saved, spoil: Any, said: str) -> None:
    """Protects from predictions of nonsense: the folder is named, and nothing in it is moved."""
    spoil(saved.folder)
    before = sorted(saved.folder.rglob("*"))
    with pytest.raises(StoreError, match=rf"{saved.folder}: the .*{said}.*; run the experiment again"):
        _ = modelfiles.load(saved.folder).kernel
    assert sorted(saved.folder.rglob("*")) == before


@pytest.mark.parametrize("saved", ["learned"], indirect=True)
def test_a_map_of_another_model_is_refused(saved: Saved, samples: small.Samples, tmp_path: Path) -> None:
    """Protects weights from features that they were not fitted on."""
    other = save(samples.experiment(), tiny(12, seed=1), tmp_path / "b", tmp_path / "other")
    shutil.rmtree(saved.folder / "map")
    shutil.copytree(other.folder / "map", saved.folder / "map")
    with pytest.raises(StoreError, match="other numbers in this version"):
        _ = modelfiles.load(saved.folder).kernel


@pytest.mark.parametrize("saved", ["learned"], indirect=True)
def test_an_exact_kernel_has_no_weights(saved: Saved) -> None:
    """Protects from a document that was changed by hand: weights belong to a feature map."""
    path = saved.folder / "model.json"
    document = unsealed(json.loads(path.read_text()))
    document["kernel"]["description"] = from_description(LINEAR).describe()
    path.write_text(json.dumps(sealed(document)))
    with pytest.raises(StoreError, match="dot-product kernel has no explicit features"):
        _ = modelfiles.load(saved.folder).kernel


@pytest.mark.parametrize("saved", ["learned"], indirect=True)
def test_new_samples_are_checked(saved: Saved, tmp_path: Path) -> None:
    """Protects as for expansions: shapes are refused, and features that are not finite named by the sample."""
    found = modelfiles.load(saved.folder)
    with site(tmp_path) as working, np.errstate(over="ignore"):
        with pytest.raises(DataError, match=r"X has shape \(3, 4\)"):
            predictions.predict(found, np.ones((3, 4)), tmp_path, working)
        with pytest.raises(NumericalError, match="sample 1 has a feature"):
            predictions.predict(found, np.array([[1.0] * 5, [1e6] * 5]), tmp_path, working)
