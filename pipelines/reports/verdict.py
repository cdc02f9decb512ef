"""What a result is worth beside the value that was expected of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .document import Tone

Result = Mapping[str, Any]
Status = Literal["pass", "not reached", "not comparable"]

TONES: dict[Status, Tone] = {"pass": "good", "not reached": "bad", "not comparable": "quiet"}


@dataclass(frozen=True)
class Comparison:
    """One obtained number beside the expected one; ``ridge`` is None where it is the run's final score."""

    ridge: float | None
    obtained: float | None
    expected: float
    tolerance: float

    @property
    def difference(self) -> float | None:
        return None if self.obtained is None else self.obtained - self.expected

    @property
    def within(self) -> bool:
        """Whether the difference is at most the tolerance, up to the rounding of decimal fractions."""
        return self.difference is not None and abs(self.difference) <= self.tolerance + 1e-9


@dataclass(frozen=True)
class Verdict:
    """What became of the expected value or values, and why."""

    status: Status
    reason: str
    metric: str
    comparisons: tuple[Comparison, ...]

    @property
    def largest(self) -> Comparison | None:
        """The comparison that is furthest off; None where nothing can be compared."""
        known = [c for c in self.comparisons if c.difference is not None and self.status != "not comparable"]
        return max(known, key=lambda c: abs(c.difference or 0.0), default=None)

    def at(self, ridge: float) -> Comparison | None:
        """The comparison at one ridge."""
        return next((c for c in self.comparisons if c.ridge is not None and _same(c.ridge, ridge)), None)

    def tone(self, comparison: Comparison) -> Tone:
        """The colour of one comparison."""
        if comparison.difference is None or self.status == "not comparable":
            return "quiet"
        return "good" if comparison.within else "bad"


def verdict(result: Result) -> Verdict | None:
    """How ``result`` stands to what was expected of it; None where nothing was.

    A run of another size than the expected value holds for is not comparable, however near it comes.
    """
    expected = result.get("expected")
    if not expected or ("value" not in expected and "path" not in expected):
        return None
    evaluation = result["evaluation"]
    metric = expected.get("metric") or evaluation["metric"]
    tolerance = float(expected.get("tolerance") or 0.0)
    comparisons: list[Comparison] = []
    if "value" in expected:
        comparisons.append(
            Comparison(None, metric_of(evaluation["test"], metric), float(expected["value"]), tolerance)
        )
    for ridge, value in expected.get("path", {}).items():
        entry = at_ridge(evaluation["path"], float(ridge))
        obtained = metric_of(entry.get("test"), metric) if entry else None
        comparisons.append(Comparison(float(ridge), obtained, float(value), tolerance))

    status, reason = _judge(result, expected, comparisons)
    return Verdict(status, reason, metric, tuple(comparisons))


def _judge(
    result: Result, expected: Mapping[str, Any], comparisons: Sequence[Comparison]
) -> tuple[Status, str]:
    wanted, trained = expected.get("train"), trained_on(result)
    if wanted is not None and wanted != trained:
        return "not comparable", f"trained on {trained:,} samples, the expected value is for {wanted:,}"
    missing = [c for c in comparisons if c.obtained is None]
    failed = [c for c in comparisons if c.obtained is not None and not c.within]
    if failed:
        return "not reached", f"{len(failed)} of {len(comparisons)} outside the tolerance"
    if missing and all(c.ridge is not None for c in missing) and result["evaluation"]["select"] != "oracle":
        return "not comparable", 'a test score at each ridge exists only with select = "oracle"'
    if missing:
        return "not comparable", f"{len(missing)} of {len(comparisons)} expected numbers were not computed"
    return "pass", f"{len(comparisons)} of {len(comparisons)} within the tolerance"


def trained_on(result: Result) -> int:
    """Number of samples that the final model was fitted on."""
    return int(final_fit(result)["n"])


def final_fit(result: Result) -> Mapping[str, Any]:
    """Training metrics of the final model: the refitted one where there was a refit."""
    evaluation = result["evaluation"]
    return (evaluation.get("refit") or evaluation)["train"]


def final_solve(result: Result) -> Mapping[str, Any]:
    """The entry of the final model's solve: that of the refit where there was one, else the chosen ridge's."""
    evaluation = result["evaluation"]
    entry = evaluation.get("refit") or at_ridge(evaluation["path"], evaluation["ridge"])
    assert entry is not None  # the chosen ridge is one of the path
    return entry


def at_ridge(path: Iterable[Mapping[str, Any]], ridge: float) -> Mapping[str, Any] | None:
    return next((entry for entry in path if _same(entry["ridge"], ridge)), None)


def _same(ridge: float, other: float) -> bool:
    return math.isclose(ridge, other, rel_tol=1e-9)


def metric_of(scores: Mapping[str, Any] | None, name: str) -> float | None:
    return None if scores is None or scores.get(name) is None else float(scores[name])


def is_oracle(result: Result) -> bool:
    return result["evaluation"]["select"] == "oracle"
