"""What a person sees where there is no terminal to draw a bar on."""

from __future__ import annotations

import time

import pytest

from flows.display import Terminal


def test_what_was_found_is_not_counted_as_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the rate of a resumed run: from what it began with, anew for each thing that is counted."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Terminal() as display:
        display.progress(0, 9, "ridges solved")
        now += 10
        display.progress(261, 325, "tiles of the factor")
        now += 10
        display.progress(281, 325, "tiles of the factor")
        now += 10
        display.progress(3, 9, "iterations, residual 1e-3")
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "ridges solved: 0 of 9",
        "tiles of the factor: 261 of 325",
        "tiles of the factor: 281 of 325, 2 a second",
        "iterations, residual 1e-3: 3 of 9",
    ]
