"""A driver for each test, ended with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from drivers import Driver


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path)
    made.write()
    yield made
    for process in made.started:
        if process.poll() is None:
            made.kill(process)
