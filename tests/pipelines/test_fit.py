"""Solve and evaluate from stores: equal to dense algebra, whatever the split and the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import small

from pipelines.errors import ChunkLost, DataError

pytestmark = pytest.mark.usefixtures("tiles_of_16")

RIDGES = [1e-1, 1e-2, 1e-3]


def kernel_matrix(X: np.ndarray, Z: np.ndarray) -> np.ndarray:
    return reference.homogeneous(lambda u: reference.scalar("exponential", u, 1.0), X, Z)


def dense_accuracies(
    X: np.ndarray, y: np.ndarray, train: np.ndarray, held: tuple[np.ndarray, np.ndarray]
) -> list[float]:
    """Accuracy in percent on held-out (X, y) at each ridge, by R1 and R2 directly."""
    K = kernel_matrix(X[train], X[train])
    Y = (y[train][:, None] == np.arange(3)) - 1 / 3
    cross = kernel_matrix(held[0], X[train])
    found = []
    for ridge in RIDGES:
        alpha = np.linalg.solve(K + len(train) * ridge * np.eye(len(train)), Y)
        found.append(100 * int(np.sum(np.argmax(cross @ alpha, axis=1) == held[1])) / len(held[1]))
    return found


@pytest.mark.parametrize("method", ["cholesky", "eigen"])
@pytest.mark.parametrize(
    "data", [{}, {"validation": {"random": 12}}, {"train": [20, 55], "validation": [3, 18]}]
)
def test_validation_accuracies_equal_dense_algebra(
    samples: small.Samples, root: Path, tmp_path: Path, method: str, data: dict[str, Any]
) -> None:
    """Protects the way from tiles to accuracies: index sets over the store against plain arrays."""
    one = samples.experiment(data=data, solve={"ridges": RIDGES})
    found = small.evaluate(one, root, tmp_path / "result", method)
    X, y = samples.arrays(72)
    split = small.make(one, root).pools.split
    expected = dense_accuracies(X, y, split.train, (X[split.validation], y[split.validation]))
    assert [entry["validation"]["accuracy"] for entry in found["path"]] == expected
    best = max(range(3), key=lambda k: (expected[k], RIDGES[k]))
    assert found["ridge"] == RIDGES[best]
    assert found["validation"]["accuracy"] == expected[best]


def test_a_test_set_is_scored_once_with_the_chosen_ridge(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects honest scores: test rows are predicted once, for one ridge, and saved as they were scored."""
    from pipelines import operators

    asked: list[tuple[bool, tuple[int, ...]]] = []
    predict = operators.predict

    def watched(
        source: Any, rows: np.ndarray, columns: np.ndarray, alpha: np.ndarray, site: Any
    ) -> np.ndarray:
        asked.append((source.symmetric, alpha.shape))
        return predict(source, rows, columns, alpha, site)

    monkeypatch.setattr(operators, "predict", watched)
    other = small.Samples(samples.folder, seed=9)
    other.write(25, "_test")
    paths = {"X_test": str(samples.folder / "X_test.npy"), "y_test": str(samples.folder / "y_test.npy")}
    one = samples.experiment(data={**paths, "test": 25}, solve={"ridges": RIDGES})
    found = small.evaluate(one, root, tmp_path / "result")
    on_test = [shape for symmetric, shape in asked if not symmetric]
    assert on_test == [(40, 3)]
    X, y = samples.arrays(72)
    expected = dense_accuracies(X, y, np.arange(40), other.arrays(25))
    assert found["test"]["accuracy"] == expected[RIDGES.index(found["ridge"])]
    assert all(entry["test"] is None for entry in found["path"])
    scores = np.load(tmp_path / "result" / "test_scores.npy", allow_pickle=False)
    right = np.sum(np.argmax(scores, axis=1) == other.arrays(25)[1])
    assert 100 * right / 25 == found["test"]["accuracy"]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("test", [None, [60, 72]])
@pytest.mark.parametrize("select", ["validation", "loo"])
def test_the_saved_model_is_the_one_that_was_chosen(
    samples: small.Samples, root: Path, tmp_path: Path, refit: bool, test: list[int] | None, select: str
) -> None:
    """Protects alpha.npy and rows.npy: coefficients and pool rows of the final model, with or without a test set."""
    data: dict[str, Any] = {"train": 40, "validation": 12 if test is None else [40, 52], "test": test}
    one = samples.experiment(data=data, solve={"ridges": RIDGES, "refit": refit, "select": select})
    found = small.evaluate(one, root, tmp_path / "result")
    alpha = np.load(tmp_path / "result" / "alpha.npy", allow_pickle=False)
    rows = np.load(tmp_path / "result" / "rows.npy", allow_pickle=False)
    held = list(range(60, 72)) if test is None else list(range(40, 52))
    assert rows.tolist() == (sorted([*range(40), *held]) if refit else list(range(40)))
    X, y = samples.arrays(72)
    K = kernel_matrix(X[rows], X[rows])
    Y = (y[rows][:, None] == np.arange(3)) - 1 / 3
    expected = np.linalg.solve(K + len(rows) * found["ridge"] * np.eye(len(rows)), Y)
    np.testing.assert_allclose(alpha, expected, rtol=1e-7, atol=1e-9)
    assert (tmp_path / "result" / "test_scores.npy").exists() == (test is not None)


@pytest.mark.parametrize("tolerance", [1e-9, 0.5])
@pytest.mark.parametrize("refit", [False, True])
def test_training_scores_are_those_of_the_model_where_it_is_not_solved(
    samples: small.Samples, root: Path, tmp_path: Path, refit: bool, tolerance: float
) -> None:
    """Protects training scores: after one iteration K alpha is not what the ridge and the targets would have it."""
    solve = {"ridges": [1e-1, 1e-7], "refit": refit, "tolerance": tolerance, "max_iterations": 1}
    one = samples.experiment(solve={**solve, "method": "conjugate-gradient"})
    found = small.evaluate(one, root, tmp_path / "result", "conjugate-gradient")
    final = found["refit"] or found["path"][[1e-1, 1e-7].index(found["ridge"])]
    assert final["residual"] > 1e-3
    rows, alpha = (np.load(tmp_path / "result" / f"{name}.npy") for name in ("rows", "alpha"))
    X, y = samples.arrays(72)
    right = np.argmax(kernel_matrix(X[rows], X[rows]) @ alpha, axis=1) == y[rows]
    assert final["train"]["accuracy"] == 100 * np.sum(right) / len(rows)


@pytest.mark.parametrize("method", ["cholesky", "conjugate-gradient"])
@pytest.mark.parametrize(("zeros", "noted"), [(20, False), (21, True)])
def test_the_training_scores_of_zero_samples_are_zero_and_not_what_rounding_leaves(
    samples: small.Samples, root: Path, tmp_path: Path, method: str, zeros: int, noted: bool
) -> None:
    """Protects training scores where Y - shift * alpha is rounding alone, which takes the side of the target; many
    such samples are noted."""
    X, y = samples.arrays(72)
    X[40 - zeros : 40] = 0
    np.save(samples.folder / "X.npy", X)
    one = samples.experiment(solve={"ridges": RIDGES, "method": method})
    found = small.evaluate(one, root, tmp_path / "result", method)
    K, Y = kernel_matrix(X[:40], X[:40]), (y[:40][:, None] == np.arange(3)) - 1 / 3
    K[:, 40 - zeros :] = K[40 - zeros :] = 0
    for entry in found["path"]:
        alpha = np.linalg.solve(K + 40 * entry["ridge"] * np.eye(40), Y)
        right = np.argmax((K @ alpha).round(9), axis=1) == y[:40]
        assert entry["train"]["accuracy"] == 100 * np.sum(right) / 40
    said = f"{zeros} of 40 training samples are zero to the kernel, and so are their scores; look at"
    assert any(note.startswith(said) for note in found["notes"]) == noted


def test_training_scores_lost_in_a_difference_are_predicted_and_no_others(
    samples: small.Samples, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from a pass over the whole matrix, computed again perhaps, for a few samples that are zero."""
    from pipelines import operators

    X, _ = samples.arrays(72)
    X[[3, 30]] = 0
    np.save(samples.folder / "X.npy", X)
    asked: list[list[int]] = []
    predict = operators.predict

    def watched(source: Any, rows: np.ndarray, columns: np.ndarray, *others: Any) -> np.ndarray:
        if not np.array_equal(rows, columns):  # else it is a residual
            asked.append(rows.tolist())
        return predict(source, rows, columns, *others)

    monkeypatch.setattr(operators, "predict", watched)
    one = samples.experiment(data={"validation": None}, solve={"ridges": RIDGES, "select": "loo"})
    small.evaluate(one, root, tmp_path / "result")
    assert [rows for rows in asked if max(rows) < 40] == [[3, 30]]


@pytest.mark.parametrize("method", ["cholesky", "eigen", "tiled-cholesky", "conjugate-gradient", "nystrom"])
def test_samples_that_are_all_zero_are_refused_before_the_solve(
    samples: small.Samples, root: Path, tmp_path: Path, method: str
) -> None:
    """Protects from scores of a model of nothing, by every solver."""
    np.save(samples.folder / "X.npy", np.zeros((72, 5)))
    centres = {"centres": 10} if method == "nystrom" else {}
    one = samples.experiment(solve={"ridges": RIDGES, "method": method, **centres})
    with pytest.raises(DataError, match=r"each of the 40 training samples is zero .* data\.preprocess"):
        small.evaluate(one, root, tmp_path / "result", method)


def test_leave_one_out_equals_refits(samples: small.Samples, root: Path, tmp_path: Path) -> None:
    """Protects selection without validation data: each sample predicted by a model that never saw it."""
    data = {"train": 24, "validation": None}
    one = samples.experiment(data=data, solve={"ridges": RIDGES, "select": "loo"})
    found = small.evaluate(one, root, tmp_path / "result")
    X, y = samples.arrays(24)
    Y = (y[:, None] == np.arange(3)) - 1 / 3
    K = kernel_matrix(X, X)
    for entry, ridge in zip(found["path"], RIDGES, strict=True):
        right = 0
        for i in range(24):
            rest = np.delete(np.arange(24), i)
            system = K[np.ix_(rest, rest)] + 24 * ridge * np.eye(23)
            right += np.argmax(K[i, rest] @ np.linalg.solve(system, Y[rest])) == y[i]
        assert entry["loo"]["accuracy"] == pytest.approx(100 * right / 24)


def test_oracle_shows_the_test_set_at_every_ridge(samples: small.Samples, root: Path, tmp_path: Path) -> None:
    """Protects comparison with published tables: marked as such, and only there test scores by ridge."""
    one = samples.experiment(
        data={"validation": None, "test": [52, 72]}, solve={"ridges": RIDGES, "select": "oracle"}
    )
    found = small.evaluate(one, root, tmp_path / "result")
    X, y = samples.arrays(72)
    expected = dense_accuracies(X, y, np.arange(40), (X[52:], y[52:]))
    assert [entry["test"]["accuracy"] for entry in found["path"]] == expected
    assert found["select"] == "oracle"


def test_regression_targets_of_several_columns(samples: small.Samples, root: Path, tmp_path: Path) -> None:
    """Protects regression: errors in the targets' own units, against dense algebra."""
    X, _ = samples.arrays(72)
    Y = np.stack([X.sum(axis=1), X[:, 0] ** 2], axis=1)
    np.save(samples.folder / "y.npy", Y)
    one = samples.experiment(task="regression", solve={"ridges": RIDGES})
    found = small.evaluate(one, root, tmp_path / "result")
    K, cross = kernel_matrix(X[:40], X[:40]), kernel_matrix(X[60:], X[:40])
    for entry, ridge in zip(found["path"], RIDGES, strict=True):
        error = cross @ np.linalg.solve(K + 40 * ridge * np.eye(40), Y[:40]) - Y[60:]
        assert entry["validation"]["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-8)
    assert found["metric"] == "rmse"


def test_the_order_of_a_pool_does_not_matter(samples: small.Samples, root: Path, tmp_path: Path) -> None:
    """Protects mapped splits: the same samples in another order give the same figures."""
    one = samples.experiment(solve={"ridges": RIDGES})
    base = small.evaluate(one, root, tmp_path / "a")
    X, y = samples.arrays(72)
    order = np.r_[np.random.default_rng(1).permutation(40), 40:72]
    np.save(samples.folder / "X.npy", X[order])
    np.save(samples.folder / "y.npy", y[order])
    again = small.evaluate(one, root, tmp_path / "b")
    for a, b in zip(base["path"], again["path"], strict=True):
        assert a["validation"] == b["validation"]
        assert a["effective_dimension"] == pytest.approx(b["effective_dimension"], rel=1e-6)


def test_a_tile_lost_before_the_solve_is_named(samples: small.Samples, root: Path, tmp_path: Path) -> None:
    """Protects the flow's repair: the error is one that computing again mends."""
    from pipelines import fit

    one = samples.experiment()
    made = small.make(one, root)
    file = made.store.chunk("gram", (2, 1))
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "result").mkdir()
    with pytest.raises(ChunkLost, match="2/1 was damaged"):
        fit.fit(one, made.pools, made.store, None, tmp_path / "result", choice=small.chosen())
    assert small.make(one, root).computed == {"train": 1}
    fit.fit(one, made.pools, made.store, None, tmp_path / "result", choice=small.chosen())
