"""Each kernel's ``revision`` beside a fingerprint of its numbers: who changes the numbers must raise it.

A store is addressed by revisions, so tiles of an older version are then computed again instead of mixed in.
To accept a change of numbers: raise the ``revision`` of the kernel's class, run
``python tests/pipelines/test_golden_tiles.py``, and commit the new ``golden_tiles.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.base import Kernel
from kernels.fused import VARIABLE
from kernels.registry import from_description

GOLDEN = Path(__file__).with_name("golden_tiles.json")
DIGITS = 7
"""Significant digits that are compared: rounding differs between machines, formulas do not."""

LAYERS = [{"patch": 3, "kernel": "relu", "subsampling": 2}, {"patch": 2, "kernel": "relu", "subsampling": 1}]
TURNED_LAYERS = [{"patch": 3, "kernel": "relu", "poolfactor": 2}, {"patch": 3, "kernel": "relu"}]
EXPONENTIAL = {"kind": "dot-product", "kernel": "exponential", "sigma": 0.6}
RF = {"kind": "fully-connected", "family": "rf", "depth": 3}
KERNELS: dict[str, dict[str, Any]] = {
    "exponential": EXPONENTIAL,
    "polynomial": {"kind": "dot-product", "kernel": "polynomial", "degree": 3},
    "linear": {"kind": "dot-product", "kernel": "linear"},
    "arc-cosine-0": {"kind": "dot-product", "kernel": "arc-cosine", "order": 0},
    "arc-cosine-1": {"kind": "dot-product", "kernel": "arc-cosine", "order": 1},
    "rf": RF,
    "ntk": {**RF, "family": "ntk"},
    "ntk, normalized": {**RF, "family": "ntk", "normalized": True},
    "rf, bias": {**RF, "depth": 2, "bias": True},
    "sum": {"kind": "sum", "terms": [{**EXPONENTIAL, "weight": 0.5}, RF]},
    "product": {"kind": "product", "terms": [EXPONENTIAL, RF]},
    "scaled": {"kind": "scaled", "weight": 2.0, "term": RF},
    "convolutional": {"kind": "convolutional", "layers": LAYERS},
    "convolutional, tangent": {"kind": "convolutional", "tangent": True, "layers": LAYERS},
    "convolutional, exponential": {
        "kind": "convolutional",
        "layers": [{"patch": 3, "kernel": "exponential", "sigma": 0.6, "pooling": "average", "subsampling": 2}],
    },
    "convolutional, periodic": {
        "kind": "convolutional",
        "pooling_mode": "periodic",
        "layers": [{"patch": 3, "kernel": "polynomial", "degree": 2, "pooling": "gaussian", "subsampling": 2}],
    },
    "convolutional, global": {
        "kind": "convolutional",
        "pooling_mode": "same",
        "layers": [{"patch": 3, "kernel": "relu", "pooling": "global"}],
    },
    "roto-translation, rot": {"kind": "roto-translation", "final": "rot", "layers": TURNED_LAYERS},
    "roto-translation, rot+gap of 8": {
        "kind": "roto-translation",
        "final": "rot+gap",
        "rotations": 8,
        "layers": [*TURNED_LAYERS[:-1], {"patch": 3, "kernel": "relu", "pooling": "global"}],
    },
    "roto-translation, orbit": {"kind": "roto-translation", "final": "orbit", "layers": TURNED_LAYERS},
}  # fmt: skip


@pytest.fixture(autouse=True)
def general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds the numbers of the code that runs everywhere."""
    monkeypatch.setenv(VARIABLE, "general")


def samples(kernel: Kernel) -> np.ndarray:
    """12 samples that no generator of random numbers has a part in."""
    n, size = 12, 7 if kernel.inputs == "vectors" else 8 * 8
    grid = np.arange(n * size).reshape(n, size)
    X = np.sin(0.37 * grid) + 0.5 * np.cos(0.11 * grid + 0.2 * np.arange(n)[:, None] ** 2)
    return X if kernel.inputs == "vectors" else X.reshape(n, 8, 8, 1)


def golden(table: dict[str, Any]) -> dict[str, Any]:
    """Revision, a hash of the rounded lower triangle, and a few values for whoever has to find a difference."""
    kernel = from_description(table)
    K = kernel.gram(samples(kernel))
    values = K[np.tril_indices(len(K), -1)]
    # To a multiple of 10^-7 of the matrix's size: digits of small values are lost to cancellation.
    steps = np.rint(values / (np.abs(K).max() * 10.0**-DIGITS)).astype(np.int64)
    return {
        "revision": kernel.revisions(),
        "sha256": hashlib.sha256(steps.astype("<i8").tobytes()).hexdigest(),
        "first": [float(f"{value:.9g}") for value in values[:3]],
    }


@pytest.mark.parametrize("name", KERNELS)
def test_numbers_change_only_with_their_revision(name: str) -> None:
    """Protects stores from a mix of old and new tiles: raise ``revision`` when a kernel's numbers change."""
    expected, found = json.loads(GOLDEN.read_text())[name], golden(KERNELS[name])
    assert found == expected, (
        "see the top of this file: raise the kernel's revision, then write the file anew"
    )


def test_a_changed_number_is_seen() -> None:
    """Protects the test above from a rounding so coarse that it sees nothing."""
    changed = golden({**EXPONENTIAL, "sigma": 0.600001})
    assert changed["sha256"] != golden(EXPONENTIAL)["sha256"]


if __name__ == "__main__":
    os.environ[VARIABLE] = "general"
    GOLDEN.write_text(json.dumps({name: golden(table) for name, table in KERNELS.items()}, indent=1) + "\n")
