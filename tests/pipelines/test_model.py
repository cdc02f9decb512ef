"""Models as results keep them, and their predictions for new samples: those of the run, with any workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import small

from pipelines import gram, modelfiles, pools, predictions, products, tasks
from pipelines.errors import ChunkLost, DataError, StoreError
from pipelines.files import sealed, unsealed
from pipelines.site import Site

pytestmark = pytest.mark.usefixtures("tiles_of_16")


@dataclass
class Saved:
    """A fitted experiment, its model in ``folder``, and the raw samples and scores of its test set."""

    pools: pools.Pools
    root: Path
    folder: Path
    X: np.ndarray
    scores: np.ndarray


def save(experiment: Any, root: Path, folder: Path) -> Saved:
    evaluation = small.evaluate(experiment, root, folder)
    made = small.make(experiment, root)
    modelfiles.save(
        folder,
        pools=made.pools,
        kernel=experiment.kernel_object,
        dtype=experiment.gram.dtype,
        features_path=Path(made.features[0].store),
        ridge=evaluation["ridge"],
        checksums=evaluation["checksums"],
        root=root,
    )
    test = made.pools.train if made.pools.test is None else made.pools.test
    return Saved(made.pools, root, folder, test.X[made.pools.split.test], np.load(folder / "test_scores.npy"))


@contextmanager
def site(root: Path, workers: tasks.Open = tasks.Workers) -> Iterator[Site]:
    with Site(root / "solves" / "prediction", workers, 2**30) as opened:
        yield opened


def images(folder: Path, name: str, n: int, classes: np.ndarray) -> dict[str, str]:
    """n images (5, 5, 2) of bytes and their labels, as files of the user's own."""
    rng = np.random.default_rng(n)
    y = rng.integers(0, len(classes), n)
    X = np.clip(rng.normal(60 + 50 * y[:, None, None, None], 40, (n, 5, 5, 2)), 0, 255).astype(np.uint8)
    np.save(folder / f"X{name}.npy", X)
    np.save(folder / f"y{name}.npy", classes[y])
    return {f"{part}{name}": str(folder / f"{part}{name}.npy") for part in "Xy"}


CONVOLUTIONAL = {
    "kind": "convolutional",
    "layers": [{"patch": 3, "kernel": "exponential", "sigma": 0.6, "subsampling": 1}],
}
WAYS: dict[str, dict[str, Any]] = {
    "vectors": {"data": {"preprocess": [{"name": "scale", "by": 255}, "flatten", "standardise"]}},
    "whitened images": {
        "data": {"preprocess": [{"name": "scale", "by": 255}, {"name": "whiten-patches", "patch": 3}]},
        "kernel": CONVOLUTIONAL,
    },
    "both": {"data": {"preprocess": ["standardise", "whiten-patches"]}, "kernel": CONVOLUTIONAL},
    "copies": {"data": {"preprocess": ["flatten"], "shifts": 2}},
    "NTK": {
        "data": {"preprocess": ["flatten"]},
        "kernel": {"kind": "fully-connected", "family": "ntk", "depth": 2},
        "gram": {"dtype": "float32"},
    },
    "regression": {"data": {"preprocess": ["flatten"]}, "task": "regression"},
}


@pytest.fixture
def saved(request: pytest.FixtureRequest, samples: small.Samples, root: Path, tmp_path: Path) -> Saved:
    classes = np.array([0.5, 1.5, 4.0]) if request.param == "regression" else np.array(["cat", "dog", "emu"])
    files = images(samples.folder, "", 60, classes) | images(samples.folder, "_test", 40, classes)
    way = dict(WAYS[request.param])
    data = {**files, "train": 40, "validation": 15, "test": 37, **way.pop("data")}
    return save(samples.experiment(data=data, **way), root, tmp_path / "result")


@pytest.mark.parametrize("saved", list(WAYS), indirect=True)
def test_a_test_sets_own_samples_get_the_predictions_of_the_run(saved: Saved) -> None:
    """Protects ``predict``: preprocessing, its fitted state, scaling of bytes, the kernel, and labels by name."""
    # Nothing of the fitted state is read from where the run kept it.
    shutil.rmtree(saved.root / "preprocessing", ignore_errors=True)
    fitted = modelfiles.load(saved.folder)
    with site(saved.root) as working:
        scores = predictions.predict(fitted, saved.X, saved.root, working)
    scale = np.abs(saved.scores).max()
    # An NTK's tiles come from one pass with the RF kernel's in the run, and alone here: single precision.
    np.testing.assert_allclose(
        scores, saved.scores, atol=scale * (1e-5 if fitted.dtype == "float32" else 1e-12)
    )
    answers = fitted.answers(scores)
    if fitted.task == "regression":
        np.testing.assert_array_equal(answers, scores)
    else:
        np.testing.assert_array_equal(
            answers, np.array(["cat", "dog", "emu"])[np.argmax(saved.scores, axis=1)]
        )


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as opened:
        yield opened


@pytest.mark.parametrize("saved", ["whitened images"], indirect=True)
def test_workers_and_slabs_do_not_change_a_bit(
    saved: Saved, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects reproducible predictions: in this process or on workers, in few slabs or many, and nothing is left."""
    monkeypatch.setattr(products, "SQUARE", 32)
    monkeypatch.setattr(predictions, "SQUARE", 32)
    fitted = modelfiles.load(saved.folder)
    with site(saved.root) as working:
        alone = predictions.predict(fitted, saved.X, saved.root, working)
    monkeypatch.setattr(predictions, "SLAB_BYTES", 1)
    told: list[tuple[int, int]] = []
    for count in (1, 2):
        with site(saved.root, lambda count=count: tasks.Workers(client, count)) as working:
            found = list(
                predictions.slabs(fitted, saved.X, saved.root, working, lambda *done: told.append(done))
            )
            assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 32), (32, 37)]
            np.testing.assert_array_equal(np.concatenate([scores for _, scores in found]), alone)
            assert not list(working.folder.glob("scratch-*/samples*"))
    assert told[-1] == (37, 37)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([3, 10, 7]), np.array([3, 7, 10])),
        (np.array([3.0, 10.0, 7.0]), np.array([3, 7, 10])),
        (np.array(["3", "10", "7"]), np.array(["10", "3", "7"])),
        (np.array([True, False]), np.array([False, True])),
    ],
)
def test_labels_are_those_of_the_data(
    samples: small.Samples, root: Path, tmp_path: Path, labels: np.ndarray, expected: np.ndarray
) -> None:
    """Protects answers: numbers come back as numbers, text as text, also text of digits."""
    np.save(samples.folder / "y.npy", labels[np.arange(72) % len(labels)])
    data = {"train": 40, "validation": 12, "test": [40, 60]}
    one = samples.experiment(data=data, **({"task": "classification"} if labels.dtype.kind == "f" else {}))
    fitted = modelfiles.load(save(one, root, tmp_path / "result").folder)
    assert fitted.labels is not None
    assert fitted.labels.dtype == expected.dtype
    np.testing.assert_array_equal(fitted.labels, expected)
    np.testing.assert_array_equal(fitted.answers(np.eye(len(labels))), expected)


@pytest.mark.parametrize("saved", ["vectors"], indirect=True)
@pytest.mark.parametrize(
    ("X", "said"),
    [
        (np.zeros((3, 5, 4, 2), np.uint8), r"new has shape \(3, 5, 4, 2\) .* \(n, 5, 5, 2\) of uint8"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\)"),
        (np.zeros((), np.uint8), r"shape \(\)"),
        (np.zeros((0, 5, 5, 2), np.uint8), "holds no samples"),
        (np.zeros((3, 5, 5, 2)), "holds float64 values; .* uint8, not scaled yet"),
        (np.zeros((3, 5, 5, 2), bool), "holds bool values; .* uint8, not scaled yet"),
        (np.full((3, 5, 5, 2), 256), "holds the value 256 in samples 0 to 2; .* from 0 to 255"),
        (np.full((3, 5, 5, 2), -1), "holds the value -1"),
        (np.zeros((3, 5, 5, 2), complex), "dtype complex128"),
        (np.zeros((3, 5, 5, 2), str), "dtype <U1"),
    ],
)
def test_samples_that_the_model_does_not_take_are_refused(saved: Saved, X: np.ndarray, said: str) -> None:
    """Protects from silent nonsense: the message names the file and what is expected."""
    with pytest.raises(DataError, match=said):
        modelfiles.load(saved.folder).check(X, "new")


def test_numbers_that_are_not_finite_are_named(samples: small.Samples, root: Path, tmp_path: Path) -> None:
    """Protects predictions from NaN; and one channel's images may come without that axis."""
    np.save(samples.folder / "X.npy", np.random.default_rng(0).random((72, 4, 4)))
    one = samples.experiment(data={"test": [52, 60], "preprocess": ["flatten"]})
    fitted = modelfiles.load(save(one, root, tmp_path / "result").folder)
    X = np.ones((3, 4, 4))
    assert fitted.check(X, "new").shape == (3, 4, 4, 1)
    X[1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinite in X of new: .* row 1"):
        fitted.check(X, "new")


@pytest.mark.parametrize("saved", ["vectors"], indirect=True)
def test_what_the_model_needs_is_asked_for(saved: Saved) -> None:
    """Protects the way back: a damaged or lost part is named, and the experiment is to be run again."""
    fitted = modelfiles.load(saved.folder)
    store = saved.root / "features" / fitted.features
    with site(saved.root) as working:

        def predict() -> np.ndarray:
            gram.forget()  # this process may still have the blocks
            return predictions.predict(modelfiles.load(saved.folder), saved.X, saved.root, working)

        (chunk,) = {path for path in store.glob("*/c/1/*") if path.is_file()}
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
        with pytest.raises(ChunkLost, match="run the experiment again"):
            predict()
        with pytest.raises(
            StoreError, match="1 of 3 blocks of training samples are missing: run the experiment"
        ):
            predict()
        chunk.write_bytes(whole)
        document = json.loads((store / "zarr.json").read_text())
        kept = json.dumps(document)
        document["attributes"]["axes"][0]["digests"][0] = "0" * 64
        (store / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(StoreError, match="other samples than those"):
            predict()
        (store / "zarr.json").write_text(kept)
        predict()
        shutil.rmtree(store)
        with pytest.raises(StoreError, match=r"are not there .*: run the experiment again"):
            predict()


@pytest.mark.parametrize("saved", ["vectors"], indirect=True)
@pytest.mark.parametrize("name", ["alpha", "rows"])
def test_a_flipped_bit_in_a_model_is_found(saved: Saved, name: str) -> None:
    """Protects predictions: a bit of a number, which leaves a file that reads well, is an error that names the file."""
    path = saved.folder / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{name}\.npy is damaged: .*; run the experiment again"):
        modelfiles.load(saved.folder)


@pytest.mark.parametrize("saved", ["vectors"], indirect=True)
def test_a_changed_number_in_a_model_s_document_is_found(saved: Saved) -> None:
    """Protects predictions from another label, scale or kernel than the model was trained with."""
    path = saved.folder / "model.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "ridge": 2 * document["ridge"]}))
    with pytest.raises(StoreError, match=r"the model is damaged .*not as it was written.*run the experiment"):
        modelfiles.load(saved.folder)


@pytest.mark.parametrize("saved", ["vectors"], indirect=True)
def test_a_model_that_cannot_be_read_is_refused(saved: Saved) -> None:
    """Protects from other formats, other kernels, damage, and from files that could execute code."""
    path = saved.folder / "model.json"
    document = unsealed(json.loads(path.read_text()))

    def refused(said: str, **changed: Any) -> None:
        path.write_text(json.dumps(sealed({**document, **changed})))
        with pytest.raises(StoreError, match=said):
            _ = modelfiles.load(saved.folder).kernel

    for other in (1, 2, 5):  # 1 and 2 had no checksums
        said = f"has format {other}, this version reads formats 3 and 4: run the experiment again"
        refused(said, format=other)
    refused("describes no model", megagram="result")
    refused("the model is damaged", labels=["one"])
    refused("is no address of a store", features={**document["features"], "address": "../../elsewhere"})
    refused("other numbers in this version", kernel={**document["kernel"], "fingerprint": "0"})
    refused("the model is damaged", kernel=None)
    path.write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        modelfiles.load(saved.folder)
    path.write_text(json.dumps(sealed(document)))
    rows = saved.folder / "rows.npy"
    np.save(rows, np.array([{}], object), allow_pickle=True)
    checksums = {**document["checksums"], "rows": google_crc32c.value(rows.read_bytes())}
    refused("damaged .*allow_pickle", checksums=checksums)
    path.unlink()
    with pytest.raises(StoreError, match=r"holds no model.json: run the experiment again"):
        modelfiles.load(saved.folder)
