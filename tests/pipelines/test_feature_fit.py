"""Solve and evaluate on explicit features: equal to dense algebra, and to the exact kernel where they are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from feature_systems import MemoryFeatures

from pipelines import fit, pools, solvers, tasks
from pipelines.explicit import covariance, feature_fit

pytestmark = pytest.mark.usefixtures("tiles_of_16")

RIDGES = [1e-1, 1e-2, 1e-3]


def phi_of(X: np.ndarray) -> np.ndarray:
    """Features whose inner product is <x, y> + <x, y>^2: exact, and enough to tell three classes apart."""
    squares = np.einsum("ni,nj->nij", X, X).reshape(len(X), -1)
    return np.concatenate((X, squares), axis=1)


def evaluated(
    samples: small.Samples,
    folder: Path,
    method: str = "eigen",
    place: fit.Place | None = None,
    other: np.ndarray | None = None,
    **sections: Any,
) -> tuple[dict[str, Any], pools.Pools]:
    """The evaluation of a fit on features of these samples."""
    one = samples.experiment(**sections)
    resolved = pools.resolve(one)
    folder.mkdir(parents=True)
    X, _ = samples.arrays(samples.n)
    cross = None if other is None else MemoryFeatures(phi_of(other), 16)
    choice = solvers.Choice(
        solvers.Estimate(method, "stored", 0.0, 0.0, 0, 0, 0, rank_bytes=2**20), "asked for"
    )
    found = feature_fit.fit(
        one, resolved, MemoryFeatures(phi_of(X), 16), cross, folder, choice=choice, place=place
    )
    return found, resolved


def weights(X: np.ndarray, y: np.ndarray, rows: np.ndarray, ridge: float) -> np.ndarray:
    F, Y = phi_of(X[rows]), (y[rows][:, None] == np.arange(3)) - 1 / 3
    return np.linalg.solve(F.T @ F + len(rows) * ridge * np.eye(F.shape[1]), F.T @ Y)


def accuracy(scores: np.ndarray, y: np.ndarray) -> float:
    return 100 * int(np.sum(np.argmax(scores, axis=1) == y)) / len(y)


@pytest.mark.parametrize("method", ["eigen", "conjugate-gradient", "falkon"])
@pytest.mark.parametrize("data", [{}, {"train": [20, 55], "validation": [3, 18]}, {"train": 24}])
def test_accuracies_equal_dense_algebra(
    samples: small.Samples, tmp_path: Path, method: str, data: dict[str, Any]
) -> None:
    """Protects the way from features to accuracies, on training and validation data; also in the dual (24 samples)."""
    found, resolved = evaluated(samples, tmp_path / "result", method, data=data, solve={"ridges": RIDGES})
    X, y = samples.arrays(72)
    train, validation = resolved.split.train, resolved.split.validation
    assert validation is not None
    expected = []
    for entry, ridge in zip(found["path"], RIDGES, strict=True):
        w = weights(X, y, train, ridge)
        expected.append(accuracy(phi_of(X[validation]) @ w, y[validation]))
        assert entry["validation"]["accuracy"] == expected[-1]
        assert entry["train"]["accuracy"] == accuracy(phi_of(X[train]) @ w, y[train])
        assert entry["status"] == "solved"
    best = max(range(3), key=lambda k: (expected[k], RIDGES[k]))
    assert found["ridge"] == RIDGES[best]
    saved = np.load(tmp_path / "result" / "weights.npy", allow_pickle=False)
    np.testing.assert_allclose(saved, weights(X, y, train, found["ridge"]), rtol=1e-4, atol=1e-5)
    rows = np.load(tmp_path / "result" / "rows.npy", allow_pickle=False)
    np.testing.assert_array_equal(rows, train)


@pytest.mark.parametrize("select", ["validation", "loo", "gcv"])
def test_features_of_a_kernel_give_what_the_kernel_gives(
    samples: small.Samples, root: Path, tmp_path: Path, select: str
) -> None:
    """Protects F7 through the whole evaluation: a linear kernel's own features choose and score as the kernel does."""
    linear = {"kind": "dot-product", "kernel": "linear"}
    solve = {"ridges": RIDGES, "select": select}
    one = samples.experiment(kernel=linear, solve=solve)
    exact = small.evaluate(one, root, tmp_path / "exact", "eigen")
    resolved = pools.resolve(one)
    X, _ = samples.arrays(72)
    (tmp_path / "result").mkdir()
    choice = solvers.Choice(solvers.Estimate("eigen", "stored", 0.0, 0.0, 0, 0, 0), "asked for")
    found = feature_fit.fit(one, resolved, MemoryFeatures(X, 16), None, tmp_path / "result", choice=choice)
    assert found["ridge"] == exact["ridge"]
    for entry, other in zip(found["path"], exact["path"], strict=True):
        for key in ("train", "validation", "loo", "gcv"):
            assert entry[key] == other[key]
        assert entry["effective_dimension"] == pytest.approx(other["effective_dimension"], rel=1e-8)


@pytest.mark.parametrize("method", ["eigen", "conjugate-gradient", "falkon"])
def test_a_refit_takes_validation_data_too_and_the_test_set_is_scored_once(
    samples: small.Samples, tmp_path: Path, method: str
) -> None:
    """Protects the final model: what is saved is what the test set was scored with."""
    other = small.Samples(samples.folder, seed=9).write(25, "_test")
    Z, z = other.arrays(25)
    paths = {"X_test": str(samples.folder / "X_test.npy"), "y_test": str(samples.folder / "y_test.npy")}
    found, resolved = evaluated(
        samples,
        tmp_path / "result",
        method,
        other=Z,
        data={**paths, "test": 25},
        solve={"ridges": RIDGES, "refit": True},
    )
    X, y = samples.arrays(72)
    rows = pools.fit_rows(resolved.split)
    np.testing.assert_array_equal(np.load(tmp_path / "result" / "rows.npy", allow_pickle=False), rows)
    saved = np.load(tmp_path / "result" / "weights.npy", allow_pickle=False)
    np.testing.assert_allclose(saved, weights(X, y, rows, found["ridge"]), rtol=1e-4, atol=1e-5)
    scores = np.load(tmp_path / "result" / "test_scores.npy", allow_pickle=False)
    np.testing.assert_allclose(scores, phi_of(Z) @ saved, rtol=1e-10, atol=1e-10)
    assert found["test"]["accuracy"] == accuracy(scores, z)
    assert all(entry["test"] is None for entry in found["path"])


def test_oracle_shows_the_test_set_at_every_ridge(samples: small.Samples, tmp_path: Path) -> None:
    """Protects comparison with published tables, with a test set that lies in the pool."""
    found, resolved = evaluated(
        samples,
        tmp_path / "result",
        data={"validation": None, "test": [52, 72]},
        solve={"ridges": RIDGES, "select": "oracle"},
    )
    X, y = samples.arrays(72)
    expected = [
        accuracy(phi_of(X[52:]) @ weights(X, y, resolved.split.train, ridge), y[52:]) for ridge in RIDGES
    ]
    assert [entry["test"]["accuracy"] for entry in found["path"]] == expected


def test_a_place_changes_no_bit_and_is_named_by_what_is_solved(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects what an interrupted fit goes on from: the same weights, in a folder of this solve alone."""
    monkeypatch.setattr(covariance, "STRIP", 16)
    monkeypatch.setattr(feature_fit, "SMALL", 1)
    monkeypatch.setattr(fit, "matrix_identity", lambda source: [float(source.phi.sum()), source.shape])
    used: list[Path] = []
    place = fit.Place(root, tasks.Workers, 2**30, used.append)
    evaluated(samples, tmp_path / "alone", solve={"ridges": RIDGES})
    evaluated(samples, tmp_path / "placed", place=place, solve={"ridges": RIDGES})
    evaluated(samples, tmp_path / "other", place=place, solve={"ridges": RIDGES, "jitter": 0.1})
    alone, placed = (np.load(tmp_path / name / "weights.npy") for name in ("alone", "placed"))
    np.testing.assert_array_equal(alone, placed)
    assert len(set(used)) == 2
    evaluated(samples, tmp_path / "edited", place=place, solve={"ridges": RIDGES[1:]})
    assert used[2] == used[0], "the sums depend on no ridge"
    assert all(path.parent == root / fit.SOLVES and list(path.glob("moments-*/sum-*.npz")) for path in used)
