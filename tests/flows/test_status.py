"""What ``megagram status`` tells of a run that goes on, from its journal alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flows import status
from pipelines.results import Journal


def test_a_solve_tells_its_rate_and_what_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects who looks in from outside during a long solve: from what a resumed one began with, anew for each thing
    that is counted, and no promise where the number of iterations is not known."""
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    journal = Journal(root, "small", "r1")
    journal.stage("solve")

    def told(done: int, total: int, message: str) -> str:
        journal.progress(done, total, message)
        journal.uses([])  # progress alone is not written every time
        (one,) = status.experiment_status("small", root)
        return dict(status.status_rows(one))["stage solve"]

    assert told(0, 9, "ridges solved") == "0 of 9 ridges solved"
    now += 10
    assert told(261, 325, "tiles of the factor") == "261 of 325 tiles of the factor"
    now += 10
    expected = "281 of 325 tiles of the factor, 2 a second, about 22 s to go"
    assert told(281, 325, "tiles of the factor") == expected
    now += 10
    expected = "325 of 325 tiles of the factor, 3.2 a second"
    assert told(325, 325, "tiles of the factor") == expected
    assert told(3, 9, "iterations, relative residual 1e-1") == "3 of 9 iterations, relative residual 1e-1"
    now += 4
    expected = "5 of 9 iterations, relative residual 1e-2, 0.5 a second, at most 8 s to go"
    assert told(5, 9, "iterations, relative residual 1e-2") == expected
    journal.finish("failed", error="no space left")
    (one,) = status.experiment_status("small", root)
    assert dict(status.status_rows(one))["stage solve"] == "5 of 9 iterations, relative residual 1e-2"
