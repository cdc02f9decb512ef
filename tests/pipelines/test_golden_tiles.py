"""Each kernel's and feature map's ``revision`` beside a fingerprint of its numbers: who changes them must raise it.

A store is addressed by revisions, so tiles and features of an older version are then computed again, and what maps
learned is learned again, instead of mixed in. (``convolutional-tangent-random`` is a kernel, and among these.)
To accept a change of numbers: raise the ``revision`` of the class, run
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
from kernels.features.base import FeatureMap, InMemory
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
    "convolutional-tangent-random": {
        "kind": "convolutional-tangent-random",
        "kernel": {"kind": "convolutional", "tangent": True, "layers": LAYERS},
        "widths": [6, 5],
    },
}  # fmt: skip

CONVOLUTIONAL = {"kind": "convolutional", "layers": LAYERS}
SMOOTH = {
    "kind": "convolutional",
    "layers": [{**LAYERS[0], "kernel": "exponential", "sigma": 0.6}, {"patch": 2, "kernel": "linear"}],
}
# Epsilon is large, so that no rounding is amplified.
MAPS: dict[str, dict[str, Any]] = {
    "random, relu": {"kind": "random", "kernel": RF, "widths": [6, 5]},
    "random, tangent": {"kind": "random", "kernel": {**RF, "family": "ntk", "depth": 2}, "widths": [4]},
    "random, fourier": {"kind": "random", "kernel": EXPONENTIAL, "widths": [6], "orthogonal": True},
    "random, step": {"kind": "random", "kernel": KERNELS["arc-cosine-0"], "widths": [6]},
    "monomials": {"kind": "monomials", "kernel": KERNELS["polynomial"]},
    "nystrom": {"kind": "nystrom", "kernel": EXPONENTIAL, "landmarks": 5, "epsilon": 0.1},
    "nystrom, k-means": {
        "kind": "nystrom", "kernel": RF, "landmarks": 3, "selection": "k-means", "epsilon": 0.1,
    },
    "nystrom, leverage-scores": {
        "kind": "nystrom", "kernel": EXPONENTIAL, "landmarks": 4, "selection": "leverage-scores", "epsilon": 0.1,
    },
    "nystrom, pivoted-cholesky": {
        "kind": "nystrom", "kernel": CONVOLUTIONAL, "landmarks": 4, "selection": "pivoted-cholesky", "epsilon": 0.1,
    },
    "nystrom-ckn": {
        "kind": "nystrom-ckn", "kernel": CONVOLUTIONAL, "anchors": [6, 5], "patches": 100, "epsilon": 0.1,
    },
    "nystrom-ckn, exact last layer": {
        "kind": "nystrom-ckn", "kernel": SMOOTH, "anchors": [4, 0], "patches": 60, "epsilon": 0.1,
    },
    "convolutional-random": {"kind": "convolutional-random", "kernel": CONVOLUTIONAL, "widths": [6, 5]},
    "convolutional-random, fourier": {"kind": "convolutional-random", "kernel": SMOOTH, "widths": [6, 5]},
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
    return {"revision": kernel.revisions(), **rounded(K[np.tril_indices(len(K), -1)], np.abs(K).max())}


def golden_map(table: dict[str, Any]) -> dict[str, Any]:
    """The same of a map's features, and of each array that it learned, signs aside: those of eigenvectors are free."""
    unlearned = from_description(table)
    assert isinstance(unlearned, FeatureMap)
    X = samples(unlearned)
    made = unlearned.learn(InMemory(X))
    arrays = {"features": made.features(X), **(made.arrays or {})}
    return {
        "revision": made.revisions(),
        **{name: rounded(np.abs(values), np.abs(values).max()) for name, values in sorted(arrays.items())},
    }


def rounded(values: np.ndarray, size: float) -> dict[str, Any]:
    # To a multiple of 10^-7 of the matrix's size: digits of small values are lost to cancellation.
    steps = np.rint(values / (size * 10.0**-DIGITS)).astype(np.int64)
    return {
        "sha256": hashlib.sha256(steps.astype("<i8").tobytes()).hexdigest(),
        "first": [float(f"{value:.9g}") for value in values.flat[:3]],
    }


@pytest.mark.parametrize("name", KERNELS)
def test_numbers_change_only_with_their_revision(name: str) -> None:
    """Protects stores from a mix of old and new tiles: raise ``revision`` when a kernel's numbers change."""
    expected, found = json.loads(GOLDEN.read_text())[name], golden(KERNELS[name])
    assert found == expected, (
        "see the top of this file: raise the kernel's revision, then write the file anew"
    )


@pytest.mark.parametrize("name", MAPS)
def test_features_change_only_with_their_revision(name: str) -> None:
    """Protects stores from a mix of old and new features, and models from maps that learned otherwise."""
    expected, found = json.loads(GOLDEN.read_text())[f"map: {name}"], golden_map(MAPS[name])
    assert found == expected, "see the top of this file: raise the map's revision, then write the file anew"


def test_a_changed_number_is_seen() -> None:
    """Protects the test above from a rounding so coarse that it sees nothing."""
    changed = golden({**EXPONENTIAL, "sigma": 0.600001})
    assert changed["sha256"] != golden(EXPONENTIAL)["sha256"]
    table = MAPS["nystrom-ckn"]
    changed = golden_map({**table, "epsilon": 0.100001})
    assert changed["features"]["sha256"] != golden_map(table)["features"]["sha256"]


if __name__ == "__main__":
    os.environ[VARIABLE] = "general"
    found = {name: golden(table) for name, table in KERNELS.items()}
    found |= {f"map: {name}": golden_map(table) for name, table in MAPS.items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
