"""Targets, metrics, honest selection and the evaluation a report is made of (SPEC R1, R2, R5, R8)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pipelines.errors import DataError, ExperimentError, NumericalError
from pipelines.evaluate import (
    Held,
    Refit,
    Targets,
    accuracy,
    confusion,
    encode,
    evaluate,
    generalised,
    metrics,
    one_vs_all,
    predict_labels,
    select,
)
from pipelines.solvers.base import Solution, Status

RIDGES = (1.0, 1e-1, 1e-2, 1e-3)


def solved(K: np.ndarray, targets: Targets, ridge: float) -> Solution:
    """A solution with leave-one-out by dense linear algebra."""
    n = len(K)
    R = np.linalg.inv(K + n * ridge * np.eye(n))
    alpha = R @ targets.matrix
    loo = targets.matrix - alpha / np.diag(R)[:, None]
    dimension = float(np.trace(K @ R))
    return Solution(alpha, ridge, n * ridge, Status.SOLVED, 0.0, 0, dimension, 0.0, 0, loo)


class Problem:
    """Noisy points in two dimensions with held-out parts, whose predictions are counted."""

    def __init__(self, task: str, n: int = 60) -> None:
        rng = np.random.default_rng(0)
        X = rng.standard_normal((n + 80, 2))
        value = np.sin(2 * X[:, 0]) + 0.3 * rng.standard_normal(len(X))
        y = value if task == "regression" else np.digitize(value, [-0.4, 0.4]) * 10
        kernel = np.exp(-((X[:, None] - X) ** 2).sum(-1))
        self.y = y[:n]
        self.train = encode(self.y, task)
        self.K = kernel[:n, :n]
        self.solutions = [solved(self.K, self.train, ridge) for ridge in RIDGES]
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.cross = {"validation": kernel[n : n + 40, :n], "test": kernel[n + 40 :, :n]}
        self.validation = self.held("validation", y[n : n + 40])
        self.test = self.held("test", y[n + 40 :])

    def held(self, name: str, y: np.ndarray) -> Held:
        def predict(alpha: np.ndarray) -> np.ndarray:
            self.calls.append((name, alpha.shape))
            return self.cross[name] @ alpha

        return Held(y, predict)

    def score(self, name: str, k: int) -> dict:
        held = getattr(self, name)
        truth = held.y if self.train.classes is not None else held.y[:, None]
        return metrics(truth, self.cross[name] @ self.solutions[k].alpha, self.train.classes)


# --- targets


def test_one_vs_all_is_one_hot_minus_the_share_of_a_class() -> None:
    """R2: 0.9 and -0.1 for ten classes."""
    targets = one_vs_all([3, 0], np.arange(10))
    expected = np.full((2, 10), -0.1)
    expected[0, 3] = expected[1, 0] = 0.9
    np.testing.assert_allclose(targets, expected, atol=1e-16)
    np.testing.assert_allclose(
        one_vs_all(np.array(["b", "a"]), np.array(["a", "b"])), [[-0.5, 0.5], [0.5, -0.5]]
    )


def test_labels_of_no_class_are_refused() -> None:
    with pytest.raises(DataError, match="label 7 of sample 1"):
        one_vs_all([0, 7], [0, 1])


def test_ties_go_to_the_smallest_index() -> None:
    np.testing.assert_array_equal(predict_labels(np.array([[1.0, 2, 2], [0, 0, 0], [3, 1, 3]])), [1, 0, 0])


def test_classes_without_training_samples_are_noted() -> None:
    targets = encode([0, 1, 1, 0], "classification", classes=[0, 1, 2])
    assert targets.matrix.shape == (4, 3)
    assert targets.notes == ("no training sample has class 2",)


def test_regression_targets_are_taken_as_they_are() -> None:
    """R1: no intercept, no centring."""
    targets = encode(np.array([1, 2, 4]), "regression")
    np.testing.assert_array_equal(targets.matrix, [[1.0], [2.0], [4.0]])
    assert targets.task == "regression"


@pytest.mark.parametrize(
    ("y", "task", "classes", "message"),
    [
        ([], "classification", None, "no training samples"),
        ([1, 1, 1], "classification", None, "two classes"),
        ([0, 1], "classification", [0, 1, 2], "fewer than 3 classes"),
        ([[0, 1]], "classification", None, "one label per sample"),
        ([0, 1, 5], "classification", [0, 1], "label 5"),
        ([0.0, np.nan], "classification", None, "sample 1 is not finite"),
        ([0.0, np.inf], "regression", None, "sample 1 is not finite"),
        (["a", "b"], "regression", None, "regression needs"),
    ],
)
def test_bad_training_targets_are_refused(y: list, task: str, classes: list | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(np.array(y), task, classes)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ExperimentError, match="classification or regression"):
        encode([0, 1], "ranking")


# --- metrics


def test_accuracy_and_confusion_count_by_hand() -> None:
    truth, predicted = np.array([2, 2, 5, 9]), np.array([2, 5, 5, 2])
    assert accuracy(truth, predicted) == 50.0
    table = confusion(truth, predicted, np.array([2, 5, 9]))
    np.testing.assert_array_equal(table, [[1, 1, 0], [0, 1, 0], [1, 0, 0]])


def test_regression_metrics_by_hand() -> None:
    scores = metrics(np.array([[0.0], [2.0], [4.0]]), np.array([[0.0], [3.0], [2.0]]), None)
    assert scores["mse"] == pytest.approx(5 / 3)
    assert scores["rmse"] == pytest.approx(np.sqrt(5 / 3))
    assert scores["mae"] == pytest.approx(1.0)
    assert scores["r2"] == pytest.approx(1 - 5 / 8)
    assert scores["n"] == 3


def test_r2_of_a_constant_truth_is_undefined() -> None:
    assert metrics(np.ones((3, 1)), np.zeros((3, 1)), None)["r2"] is None


# --- selection


def entry(ridge: float, status: str = "solved", **scores: float | None) -> dict:
    keys = ("validation", "loo", "gcv", "test")
    return {"ridge": ridge, "status": status} | {
        k: None if scores.get(k) is None else {"accuracy": scores[k]} for k in keys
    }


def test_generalised_cross_validation_without_dimensions_names_the_iterations() -> None:
    """Protects from advice that does not help: probes that were not solved want more iterations."""
    unknown = [{**entry(ridge), "effective_dimension": None} for ridge in (1.0, 1e-3)]
    with pytest.raises(NumericalError, match=r"raise solve\.max_iterations"):
        select(unknown, "gcv")
    with pytest.raises(NumericalError, match="take larger ridges"):
        select([*unknown, {**entry(1e-5), "effective_dimension": 60.0}], "gcv")


def test_ties_keep_the_larger_ridge() -> None:
    """R8, whatever the order of the grid."""
    path = [entry(1e-3, validation=90.0), entry(1e-1, validation=90.0), entry(1.0, validation=80.0)]
    assert path[select(path, "validation")]["ridge"] == 1e-1
    assert path[::-1][select(path[::-1], "validation")]["ridge"] == 1e-1


@pytest.mark.parametrize("status", ["inaccurate", "not converged"])
def test_ties_go_to_the_ridges_that_are_solved(status: str) -> None:
    """Protects the model: a larger ridge whose system was not solved does not win by its size alone."""
    path = [entry(1.0, status, loo=90.0), entry(1e-1, "indefinite", loo=90.0), entry(1e-2, loo=90.0)]
    assert path[select(path, "loo")]["ridge"] == 1e-1
    assert select([*path, entry(1e-3, status, loo=91.0)], "loo") == 3


@pytest.mark.parametrize("status", list(Status))
def test_a_chosen_ridge_that_is_not_solved_is_noted(status: Status) -> None:
    problem = Problem("classification")
    chosen = replace(problem.solutions[1], status=status, residual=0.5)
    again = replace(chosen, status=Status.SOLVED)
    said = [
        evaluate(
            [one], problem.train, "loo", refit=lambda ridge, final=final: Refit(final, problem.train, None)
        )
        for one, final in ((chosen, again), (again, chosen))
    ]
    is_noted = [any(f"{status}, relative residual 5.0e-01" in note for note in one["notes"]) for one in said]
    assert is_noted == [status in ("inaccurate", "not converged")] * 2
    every = [replace(one, status=status) for one in problem.solutions]
    notes = evaluate(every, problem.train, "loo")["notes"]
    assert ("none of the 4 ridges is solved" in notes) == is_noted[0]


def test_regression_selects_the_smallest_error() -> None:
    path = [
        {"ridge": r, "status": "solved", "loo": {"rmse": e}} for r, e in ((1.0, 0.5), (0.1, 0.2), (0.01, 0.3))
    ]
    assert select(path, "loo") == 1


def test_ridges_without_leave_one_out_are_passed_over() -> None:
    path = [entry(1.0, loo=50.0), entry(0.1, loo=None)]
    assert select(path, "loo") == 0
    with pytest.raises(NumericalError, match="leave-one-out"):
        select(path[1:], "loo")


@pytest.mark.parametrize(("how", "key"), [("validation", r"data\.validation"), ("oracle", r"data\.test")])
def test_selection_without_its_data_is_refused(how: str, key: str) -> None:
    with pytest.raises(ExperimentError, match=key):
        select([entry(1.0, loo=90.0)], how)


def test_unknown_selection_is_refused() -> None:
    with pytest.raises(ExperimentError, match="validation, loo, gcv, oracle"):
        select([entry(1.0)], "best")


# --- the whole evaluation


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("how", ["validation", "loo", "gcv"])
def test_test_set_is_scored_once_with_the_chosen_ridge(task: str, how: str) -> None:
    problem = Problem(task)
    result = evaluate(problem.solutions, problem.train, how, validation=problem.validation, test=problem.test)
    shape = problem.solutions[0].alpha.shape
    assert [call for call in problem.calls if call[0] == "test"] == [("test", shape)]
    assert all(line["test"] is None for line in result["path"])
    key = "accuracy" if task == "classification" else "rmse"
    best = max if task == "classification" else min
    assert result[how][key] == best(line[how][key] for line in result["path"])
    chosen = RIDGES.index(result["ridge"])
    assert result["test"] == problem.score("test", chosen)
    assert result["validation"] == problem.score("validation", chosen)
    assert result["metric"] == key
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_validation_path_is_predicted_in_one_pass() -> None:
    problem = Problem("classification")
    evaluate(problem.solutions, problem.train, "validation", validation=problem.validation)
    assert problem.calls == [("validation", (len(RIDGES), *problem.solutions[0].alpha.shape))]


def test_oracle_scores_every_ridge_and_is_marked() -> None:
    problem = Problem("classification")
    result = evaluate(problem.solutions, problem.train, "oracle", test=problem.test)
    assert result["select"] == "oracle"
    every = [problem.score("test", k) for k in range(len(RIDGES))]
    assert [line["test"] for line in result["path"]] == every
    assert result["test"]["accuracy"] == max(score["accuracy"] for score in every)
    assert len(problem.calls) == 1


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_train_metrics_are_those_of_the_fitted_values(task: str) -> None:
    """K alpha = Y - n lambda alpha, so no tile is read for them."""
    problem = Problem(task)
    result = evaluate(problem.solutions, problem.train, "loo")
    for line, solution in zip(result["path"], problem.solutions, strict=True):
        expected = metrics(problem.train.y, problem.K @ solution.alpha, problem.train.classes)
        assert line["train"] == pytest.approx(expected, rel=1e-9)
    assert result["test"] is None
    assert result["confusion"] is None


def test_generalised_cross_validation_is_golubs_score() -> None:
    """The mean square of its errors is |(I - A) y|^2 / n over (tr (I - A) / n)^2 with A = K R, and selects by it."""
    problem = Problem("regression")
    result = evaluate(problem.solutions, problem.train, "gcv")
    n, y = len(problem.K), problem.train.matrix[:, 0]
    expected = []
    for ridge in RIDGES:
        rest = np.eye(n) - problem.K @ np.linalg.inv(problem.K + n * ridge * np.eye(n))
        expected.append(np.mean((rest @ y) ** 2) / (np.trace(rest) / n) ** 2)
    np.testing.assert_allclose([line["gcv"]["mse"] for line in result["path"]], expected, rtol=1e-9)
    assert result["ridge"] == RIDGES[int(np.argmin(expected))]
    assert result["gcv"] == result["path"][RIDGES.index(result["ridge"])]["gcv"]


def test_with_equal_weights_generalised_cross_validation_is_leave_one_out() -> None:
    """Where every R_ii is the same, its mean is each of them: classes scored alike as well."""
    circle = np.exp(2j * np.pi * np.arange(30) / 30)
    K = np.exp(-np.abs(circle[:, None] - circle))
    targets = encode(np.random.default_rng(1).integers(3, size=30), "classification")
    line = evaluate([solved(K, targets, 1e-2)], targets, "gcv")["path"][0]
    assert line["gcv"] == line["loo"]


def test_ridges_without_an_effective_dimension_below_n_are_passed_over() -> None:
    """An estimate may come out above n; nothing is divided by what is then negative."""
    values = np.ones((4, 1))
    assert generalised(values, values, None) is None
    assert generalised(values, values, 4.0) is None
    path = [entry(1.0, gcv=50.0), entry(0.1, gcv=None)]
    assert select(path, "gcv") == 0
    with pytest.raises(NumericalError, match="effective dimension"):
        select([{**path[1], "effective_dimension": 4.0}], "gcv")


def test_train_metrics_of_coefficients_elsewhere_are_those_of_given_predictions() -> None:
    """Coefficients on centres say nothing of the training samples' residuals."""
    problem = Problem("regression")
    fitted = [problem.K @ solution.alpha + 1.0 for solution in problem.solutions]
    result = evaluate(problem.solutions, problem.train, "gcv", fitted=fitted)
    for line, values in zip(result["path"], fitted, strict=True):
        assert line["train"] == metrics(problem.train.y, values, None)


def test_confusion_rows_are_the_truth() -> None:
    problem = Problem("classification")
    result = evaluate(
        problem.solutions, problem.train, "validation", validation=problem.validation, test=problem.test
    )
    table = np.array(result["confusion"])
    assert result["classes"] == [0, 10, 20]
    np.testing.assert_array_equal(table.sum(axis=1), [(problem.test.y == c).sum() for c in (0, 10, 20)])
    assert 100 * np.trace(table) / table.sum() == pytest.approx(result["test"]["accuracy"])


def test_class_seen_only_in_the_test_set_counts_as_errors_and_is_noted() -> None:
    problem = Problem("classification")
    stranger = Held(np.where(np.arange(40) < 2, 7, problem.test.y), problem.test.predict)
    result = evaluate(problem.solutions, problem.train, "loo", test=stranger)
    assert result["classes"] == [0, 7, 10, 20]
    assert np.array(result["confusion"])[:, 1].sum() == 0
    assert sum(result["confusion"][1]) == 2
    assert result["notes"] == ["class 7 is not in the training data: 2 test samples cannot be right"]


def test_refit_scores_the_test_set_with_the_refitted_solution_only() -> None:
    problem = Problem("classification")
    asked: list[float] = []

    def refit(ridge: float) -> Refit:
        asked.append(ridge)
        return Refit(solved(problem.K, problem.train, 10.0), problem.train, problem.test)

    result = evaluate(problem.solutions, problem.train, "loo", test=problem.test, refit=refit)
    assert asked == [result["ridge"]]
    assert [name for name, _ in problem.calls] == ["test"]
    alpha = solved(problem.K, problem.train, 10.0).alpha
    expected = metrics(problem.test.y, problem.cross["test"] @ alpha, problem.train.classes)
    assert result["test"] == expected
    assert result["refit"]["ridge"] == 10.0


def test_oracle_and_refit_exclude_each_other() -> None:
    problem = Problem("classification")
    with pytest.raises(ExperimentError, match="exclude each other"):
        evaluate(problem.solutions, problem.train, "oracle", test=problem.test, refit=lambda ridge: None)


@pytest.mark.parametrize("how", ["validation", "loo"])
def test_empty_and_misshapen_sets_are_refused_before_predicting(how: str) -> None:
    problem = Problem("regression")
    for y, message in (
        (np.empty(0), "test set is empty"),
        (np.ones((40, 2)), "2 columns"),
        (np.full(40, np.nan), "not finite"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(problem.solutions, problem.train, how, test=Held(y, problem.test.predict))
    assert not problem.calls
