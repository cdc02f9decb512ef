"""Targets, metrics, the choice of a ridge, and the evaluation that reports are made of (SPEC R2, R5, R8).

The test set is scored once, with a ridge chosen on validation data, by leave-one-out or by generalised
cross-validation (Golub, Heath, Wahba 1979). ``oracle`` chooses on the test set itself; it exists to compare with
published numbers that did so, and is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import DataError, ExperimentError, NumericalError
from .solvers.base import ACCURATE, UNSOLVED, Solution, Status

TASKS = ("classification", "regression")
SELECTIONS = ("validation", "loo", "gcv", "oracle")

LOST = 10.0
"""A sample's scores are lost in what they are the difference of where that is so many times its error or less."""

Metrics = dict[str, Any]
"""{"accuracy": percent, "n"} or {"rmse", "mse", "mae", "r2", "n"}; r2 is None where the truth is constant."""


@dataclass(frozen=True)
class Targets:
    """What a model is trained on.

    y: (n,) labels, or (n, t) float64 values for regression. classes: sorted labels, None for regression.
    matrix: (n, t) float64, what the solver takes.
    """

    y: np.ndarray
    classes: np.ndarray | None
    matrix: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return "regression" if self.classes is None else "classification"


@dataclass(frozen=True)
class Held:
    """Data that the model was not trained on.

    y: (m,) labels or (m, t) values. predict: alpha (n, t) or (r, n, t) -> scores (m, t) or (r, m, t),
    as ``operators.predict`` with its store and index sets bound.
    """

    y: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Refit:
    """A solution on training and validation data together, its targets and the test set bound to it.

    fitted: (n, t) predictions on its training samples; None where they follow from its coefficients.
    """

    solution: Solution
    targets: Targets
    test: Held | None
    fitted: np.ndarray | None = None


def one_vs_all(y: ArrayLike, classes: ArrayLike) -> np.ndarray:
    """(n, C) float64 one-hot columns minus 1/C for (n,) labels and C sorted classes (R2).

    Raises:
        DataError: a label that is no class.
    """
    labels, known = np.asarray(y), np.asarray(classes)
    hot = labels[:, None] == known
    strangers = np.flatnonzero(~hot.any(axis=1))
    if strangers.size:
        at = strangers[0]
        raise DataError(f"label {labels[at]} of sample {at} is none of the {len(known)} classes")
    return hot.astype(np.float64) - 1.0 / len(known)


def predict_labels(scores: np.ndarray) -> np.ndarray:
    """(..., m) int64 column of the largest of (..., m, C) scores, ties to the smallest index (R2)."""
    return np.argmax(scores, axis=-1)


def encode(y: ArrayLike, task: str, classes: ArrayLike | None = None) -> Targets:
    """Check training labels or values, and encode them for a solver (R1, R2).

    classes: all labels that can occur; those of y when absent.

    Raises:
        ExperimentError: an unknown task.
        DataError: no samples, wrong shape, missing or non-finite values, a single class, fewer samples
            than classes, or a label that is no class.
    """
    if task not in TASKS:
        raise ExperimentError(f"task must be classification or regression, not {task!r}")
    values = np.asarray(y)
    if not len(values):
        raise DataError("there are no training samples")
    if values.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if bad.size:
            raise DataError(f"the label of training sample {bad[0]} is not finite ({bad.size} such in all)")
    if task == "regression":
        if values.dtype.kind not in "fiub" or values.ndim not in (1, 2):
            raise DataError(f"regression needs (n,) or (n, t) numbers, got {values.dtype} {values.shape}")
        matrix = values.astype(np.float64).reshape(len(values), -1)
        return Targets(matrix, None, matrix)
    if values.ndim != 1:
        raise DataError(f"classification needs one label per sample, got an array of shape {values.shape}")
    present = np.unique(values)
    known = present if classes is None else np.unique(np.asarray(classes))
    if len(present) < 2:
        raise DataError(
            f"all {len(values)} training labels are {present[0]}; classification needs two classes"
        )
    if len(values) < len(known):
        raise DataError(f"{len(values)} training samples are fewer than {len(known)} classes; train on more")
    absent = np.setdiff1d(known, present)
    notes = (f"no training sample has class {_listed(absent)}",) if absent.size else ()
    return Targets(values, known, one_vs_all(values, known), notes)


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of equal labels in percent."""
    return 100.0 * int(np.count_nonzero(truth == predicted)) / len(truth)


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(C, C) int64 counts for sorted classes; rows are the truth, columns the prediction."""
    size = len(classes)
    cells = np.searchsorted(classes, truth) * size + np.searchsorted(classes, predicted)
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def metrics(truth: np.ndarray, scores: np.ndarray, classes: np.ndarray | None) -> Metrics:
    """The metrics of (m, t) scores against (m,) labels, or (m, t) values where ``classes`` is None."""
    if classes is not None:
        return {"accuracy": accuracy(truth, classes[predict_labels(scores)]), "n": len(truth)}
    errors = scores - truth
    mse = float(np.mean(errors**2))
    spread = float(np.sum((truth - truth.mean(axis=0)) ** 2))
    return {
        "rmse": float(np.sqrt(mse)),
        "mse": mse,
        "mae": float(np.mean(np.abs(errors))),
        "r2": 1.0 - float(np.sum(errors**2)) / spread if spread > 0 else None,
        "n": len(truth),
    }


def select(path: Sequence[dict[str, Any]], how: str) -> int:
    """Position in ``path`` of the best ridge (R8): highest accuracy, or lowest rmse where there is none; ties to those
    that are solved, then to the larger.

    path: entries with "ridge", "status" and "validation", "loo", "gcv" or "test" metrics, whichever ``how`` needs;
    those without (a ridge whose factor gives no leave-one-out) are passed over.

    Raises:
        ExperimentError: an unknown way of selecting, or no data for it.
        NumericalError: leave-one-out, or the effective dimension, exists for no ridge.
    """
    if how not in SELECTIONS:
        raise ExperimentError(f"solve.select must be one of {', '.join(SELECTIONS)}, not {how!r}")
    key = "test" if how == "oracle" else how
    usable = [k for k, entry in enumerate(path) if entry[key] is not None]
    if not usable:
        if how == "loo":
            raise NumericalError("no ridge of the path has leave-one-out predictions; take larger ridges")
        if how == "gcv" and all(entry["effective_dimension"] is None for entry in path):
            raise NumericalError(
                "generalised cross-validation needs an effective dimension, whose probes were solved for no ridge of"
                " the path: raise solve.max_iterations, or take larger ridges"
            )
        if how == "gcv":
            raise NumericalError(
                "generalised cross-validation needs an effective dimension below the number of samples, which no"
                " ridge of the path has; take larger ridges"
            )
        raise ExperimentError(f'solve.select = "{how}" needs {key} data; set data.{key}')

    def merit(k: int) -> tuple[float, bool, float]:
        scored, is_solved = path[k][key], path[k]["status"] not in UNSOLVED
        return scored["accuracy"] if "accuracy" in scored else -scored["rmse"], is_solved, path[k]["ridge"]

    return max(usable, key=merit)


def evaluate(
    solutions: Sequence[Solution],
    train: Targets,
    how: str,
    *,
    validation: Held | None = None,
    test: Held | None = None,
    refit: Callable[[float], Refit] | None = None,
    fitted: Sequence[np.ndarray | None] | None = None,
) -> dict[str, Any]:
    """Choose a ridge, score the test set once with it, and return the evaluation as a JSON value.

    refit: from the chosen ridge to the solution on training and validation data together, which is then what
    the test set is scored with. fitted: for each solution its (n, t) predictions on the training samples, None
    where they follow from its coefficients (see ``implied``).

    Keys: task, select, metric ("accuracy" or "rmse"), ridge, classes, train, validation, loo, gcv, test
    (metrics or None), confusion (rows are the truth; of the test set), notes, refit (an entry or None),
    and path: per ridge an entry of its status, residual, iterations, effective_dimension, seconds,
    peak_bytes, jitter, notes and metrics, with test metrics under "oracle" alone.

    Raises:
        ExperimentError: selection without the data it needs, or oracle together with refit.
        DataError: labels or values that do not fit the training targets.
        NumericalError: as ``select``.
    """
    if how == "oracle" and refit is not None:
        raise ExperimentError('solve.refit and solve.select = "oracle" exclude each other; drop one of them')
    validation = validation and _checked(validation, train, "validation")
    test = test and _checked(test, train, "test")
    oracle = test if how == "oracle" else None
    alphas = np.stack([solution.alpha for solution in solutions])
    on_validation = validation.predict(alphas) if validation else [None] * len(solutions)
    on_test = oracle.predict(alphas) if oracle else [None] * len(solutions)
    path = []
    on_train = fitted or [None] * len(solutions)
    for solution, train_scores, validation_scores, test_scores in zip(
        solutions, on_train, on_validation, on_test, strict=True
    ):
        entry = _entry(solution, train, train_scores)
        entry["validation"] = _scored(validation, validation_scores, train.classes)
        entry["test"] = _scored(oracle, test_scores, train.classes)
        path.append(entry)
    best = select(path, how)
    chosen, ridge = path[best], solutions[best].ridge

    notes = [*train.notes, *_unsolved(chosen, "ridge" if len(path) == 1 else "chosen ridge")]
    notes += _zeros(train, _fitted(solutions[best], train, on_train[best]))
    if len(path) > 1 and all(entry["status"] in UNSOLVED for entry in path):
        notes.append(f"none of the {len(path)} ridges is solved")
    refitted = None
    final_scores = on_test[best]
    classes = train.classes
    if refit is not None:
        again = refit(ridge)
        solution, targets = again.solution, again.targets
        test = again.test and _checked(again.test, targets, "test")
        refitted, classes = _entry(solution, targets, again.fitted), targets.classes
        notes += _unsolved(refitted, "final model at ridge")
        final_scores = test.predict(solution.alpha) if test else None
    elif test is not None and oracle is None:
        final_scores = test.predict(solutions[best].alpha)

    labels, table = classes, None
    if test is not None and final_scores is not None and classes is not None:
        labels = np.union1d(classes, test.y)
        strangers = np.setdiff1d(test.y, classes)
        if strangers.size:
            count = int(np.isin(test.y, strangers).sum())
            notes.append(
                f"class {_listed(strangers)} is not in the training data: "
                f"{count} test sample{'s' if count > 1 else ''} cannot be right"
            )
        table = confusion(test.y, classes[predict_labels(final_scores)], labels).tolist()
    return {
        "task": train.task,
        "select": how,
        "metric": "rmse" if train.classes is None else "accuracy",
        "ridge": ridge,
        "classes": None if labels is None else labels.tolist(),
        "train": chosen["train"],
        "validation": chosen["validation"],
        "loo": chosen["loo"],
        "gcv": chosen["gcv"],
        "test": _scored(test, final_scores, classes),
        "confusion": table,
        "notes": notes,
        "refit": refitted,
        "path": path,
    }


def entries(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all that an evaluation's run solved: its path, and the refit where there was one."""
    refit = evaluation.get("refit")
    return [*evaluation["path"], *([refit] if refit else [])]


def stopped_short(evaluation: Mapping[str, Any]) -> bool:
    """Whether an iterative solve ended above its tolerance: more iterations could go on from what it keeps."""
    return any(entry["status"] == Status.NOT_CONVERGED for entry in entries(evaluation))


def _checked(held: Held, train: Targets, name: str) -> Held:
    """``held`` with its truth in the shape of the training targets, or DataError."""
    truth = np.asarray(held.y)
    if not len(truth):
        raise DataError(f"the {name} set is empty; set data.{name} to at least one sample, or drop it")
    if train.classes is None:
        truth = truth.astype(np.float64).reshape(len(truth), -1)
        if truth.shape[1] != train.matrix.shape[1]:
            raise DataError(
                f"{name} targets have {truth.shape[1]} columns, training targets {train.matrix.shape[1]}"
            )
        if not np.isfinite(truth).all():
            raise DataError(f"a {name} target is not finite")
    elif truth.ndim != 1:
        raise DataError(f"{name} labels must have shape (m,), got {truth.shape}")
    return Held(truth, held.predict)


def _scored(held: Held | None, scores: np.ndarray | None, classes: np.ndarray | None) -> Metrics | None:
    return None if held is None or scores is None else metrics(held.y, scores, classes)


def generalised(
    values: np.ndarray, fitted: np.ndarray, effective_dimension: float | None
) -> np.ndarray | None:
    """(n, t) predictions of generalised cross-validation: leave-one-out with the mean of R_ii for each R_ii.

    values, fitted: (n, t). Since tr (I - K R) = n - d (R9), that is y - (y - f(x)) n / (n - d); the mean square
    of its errors is the score of Golub, Heath and Wahba (Technometrics 21, 1979). None where d is not known, or
    not below n.
    """
    n = len(values)
    if effective_dimension is None or not effective_dimension < n:
        return None
    return values - (values - fitted) * (n / (n - effective_dimension))


def implied(solution: Solution, targets: np.ndarray) -> np.ndarray:
    """(n, t) Y - shift * alpha, Y the targets: what K alpha is where the system is solved, but for ``lost`` rows."""
    return targets - solution.shift * solution.alpha


def lost(solution: Solution, targets: np.ndarray) -> np.ndarray:
    """Positions of the training samples whose row of K alpha is not that of Y - shift * alpha, Y the (n, t) targets.

    The two are equal up to the residual and rounding: nowhere where the system is hardly solved, and not where a
    sample's row of K alpha is so small that it is lost in the difference, as that of a sample which is zero.
    """
    if solution.residual > ACCURATE:
        return np.arange(len(targets))
    left, known = (np.linalg.norm(V, axis=1) for V in (implied(solution, targets), targets))
    error = max(solution.residual, float(np.finfo(np.float64).eps))
    return np.flatnonzero(left < LOST * error * known)


def _loo(solution: Solution, targets: Targets) -> Metrics | None:
    """Metrics of leaving one out; where that is estimated, the error of the targets alone.

    An estimate errs by a multiple of the sample's own target, which would count it as right half of the time.
    """
    if solution.loo is None:
        return None
    if targets.classes is None or not solution.loo_estimated:
        return metrics(targets.y, solution.loo, targets.classes)
    found = metrics(targets.matrix, solution.loo, None)
    return {key: found[key] for key in ("rmse", "n")}


def _entry(solution: Solution, targets: Targets, fitted: np.ndarray | None) -> dict[str, Any]:
    """A solution's line of the path; train metrics come free where K alpha = Y - shift * alpha."""
    fitted = _fitted(solution, targets, fitted)
    left_out = generalised(targets.matrix, fitted, solution.effective_dimension)
    return {
        "ridge": solution.ridge,
        "status": str(solution.status),
        "residual": solution.residual,
        "iterations": solution.iterations,
        "effective_dimension": solution.effective_dimension,
        "seconds": solution.seconds,
        "peak_bytes": solution.peak_bytes,
        "jitter": solution.jitter,
        "notes": list(solution.notes),
        "train": metrics(targets.y, fitted, targets.classes),
        "loo": _loo(solution, targets),
        "gcv": None if left_out is None else metrics(targets.y, left_out, targets.classes),
    }


def _fitted(solution: Solution, targets: Targets, fitted: np.ndarray | None) -> np.ndarray:
    """(n, t) predictions on the training samples: as given, as the solution has them, or as they follow from it."""
    if fitted is None:
        fitted = solution.fitted
    return implied(solution, targets.matrix) if fitted is None else fitted


def _zeros(train: Targets, fitted: np.ndarray) -> list[str]:
    """The note that goes with training samples most of which the kernel, or the map, takes for zero.

    Their scores are exactly zero whatever the coefficients, which others' are only where all targets are.
    """
    zero = int((train.matrix.any(axis=1) & ~fitted.any(axis=1)).sum())
    if 2 * zero <= len(fitted):
        return []
    return [
        f"{zero} of {len(fitted)} training samples are zero to the kernel, and so are their scores; look at the"
        " samples and at data.preprocess"
    ]


def _unsolved(entry: dict[str, Any], what: str) -> list[str]:
    """The note that goes with numbers of a system that is not solved."""
    if entry["status"] not in UNSOLVED:
        return []
    return [
        f"the {what} {entry['ridge']:g} is not solved: {entry['status']}, relative residual {entry['residual']:.1e};"
        " its scores are those of the coefficients as they are"
    ]


def _listed(labels: np.ndarray) -> str:
    return ", ".join(str(label) for label in labels.tolist())
