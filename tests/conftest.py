"""What all tests share: an environment of their own, a root of their own, and small synthetic pools."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import small

# A server, a data folder or a root of the person who runs the tests must not change what is tested.
for name in list(os.environ):
    if name.startswith(("MEGAGRAM_", "PREFECT_")):
        del os.environ[name]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for stores and results; it does not exist yet."""
    return tmp_path / "root"


@pytest.fixture
def samples(tmp_path: Path) -> small.Samples:
    """72 samples of 5 values in three classes, as files of the user's own."""
    return small.Samples(tmp_path / "data").write(72)


@pytest.fixture
def tiles_of_16(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 16 samples in place of thousands, so that a matrix of a few dozen samples has several."""
    small.use_tile_side(16, monkeypatch.setattr)
    return 16


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
