"""A fitted model as it lies in a result's folder.

``model.json``, sealed, says what the numbers beside it mean: ``rows.npy``, the pool rows it was trained on;
``preprocessing.npz``, what fitted steps learned; and either ``alpha.npy``, their coefficients, or ``weights.npy`` of
the features of a map, with ``map/``, what that learned; and checksums of what is not checked otherwise. Training
samples of an expansion stay where they were prepared, in a feature store under the root; a model on features needs its
folder alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Kernel
from kernels.features.base import FeatureMap

from . import datasets, samples
from .archives import load_arrays
from .errors import StoreError
from .explicit import mapfiles
from .files import disk_errors, sealed, unsealed
from .model import MAP, Expansion, LinearModel, Model
from .pools import Pools
from .preprocessing import Preprocessing
from .results import load_array
from .stores import FeatureStore

EXPANSION, LINEAR = 3, 4
"""Formats: which sort of model a document describes. 1 and 2 had no checksums of rows and coefficients."""
DOCUMENT = "model.json"
STATE = "preprocessing.npz"


def save(
    folder: Path,
    *,
    pools: Pools,
    kernel: Kernel,
    dtype: str,
    features_path: Path | None,
    ridge: float,
    checksums: Mapping[str, int],
    root: Path,
) -> None:
    """Write ``model.json`` and what the model needs beside the ``rows.npy`` and ``alpha.npy`` of ``folder``, or
    ``weights.npy`` where ``kernel`` is a feature map.

    kernel: the experiment's own, of one output; a feature map with what it learned. dtype: of its tiles or features.
    features_path: the pool's feature store, which a model on features does not need. checksums: of the evaluation.

    Raises:
        DiskFull: no space is left.
    """
    labels = pools.train.labels if pools.task == "classification" else None
    document = {
        "megagram": "model",
        "source": pools.dataset.source,
        "task": pools.task,
        "labels": None if labels is None else [_own(label, pools.dataset.label_type) for label in labels],
        "ridge": ridge,
        "checksums": dict(checksums),
        "kernel": {"description": kernel.describe(), "fingerprint": kernel.fingerprint},
        "dtype": dtype,
        "samples": {"shape": list(pools.raw_shape), "dtype": pools.train.X.dtype.str},
        "preprocessing": {"steps": pools.preprocessing.describe(), "scale": pools.dataset.scale},
    }
    if isinstance(kernel, FeatureMap):
        document["format"] = LINEAR
        if kernel.learned:
            mapfiles.write(folder / MAP, kernel)
    else:
        assert features_path is not None
        document["format"] = EXPANSION
        document["features"] = {"address": features_path.name, "axis": FeatureStore(features_path).axes[0]}
    state = samples.fitted_state(pools, root)
    with disk_errors(folder):
        if state is not None:
            shutil.copyfile(state, folder / STATE)
        (folder / DOCUMENT).write_text(json.dumps(sealed(document), indent=1))


def load(folder: Path) -> Model:
    """The model of a result's folder. Nothing that is read can execute code.

    Raises:
        StoreError: there is none, it is damaged, of another format, or of a kernel whose numbers have changed since;
            the message says what to do.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no {DOCUMENT}: run the experiment again") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}): run the experiment again") from None
    if not isinstance(document, dict) or document.get("megagram") != "model":
        raise StoreError(f"{path} describes no model: run the experiment again")
    if document.get("format") not in (EXPANSION, LINEAR):
        raise StoreError(
            f"{path} has format {document.get('format')}, this version reads formats {EXPANSION} and {LINEAR}:"
            " run the experiment again"
        )
    try:
        return _model(folder, unsealed(document))
    except (KeyError, TypeError, AttributeError, ValueError, OSError, EOFError) as error:
        raise StoreError(
            f"{folder}: the model is damaged ({type(error).__name__}: {error}); run the experiment again"
        ) from None


def _model(folder: Path, document: Mapping[str, Any]) -> Model:
    state: dict[str, np.ndarray] | None = {}
    steps, scale = document["preprocessing"]["steps"], float(document["preprocessing"]["scale"])
    preprocessing = Preprocessing.from_spec(steps, scale=scale)
    if preprocessing.fitted:
        state = load_arrays(folder / STATE)
        if state is None:
            raise ValueError(f"{STATE} is missing, or not as it was written")
    labels, checksums = document["labels"], document["checksums"]
    common: dict[str, Any] = {
        "folder": folder,
        "source": str(document["source"]),
        "task": str(document["task"]),
        "labels": None if labels is None else np.array(labels),
        "ridge": float(document["ridge"]),
        "kernel_description": dict(document["kernel"]["description"]),
        "fingerprint": str(document["kernel"]["fingerprint"]),
        "dtype": str(np.dtype(document["dtype"])),
        "shape": tuple(int(k) for k in document["samples"]["shape"]),
        "raw": np.dtype(document["samples"]["dtype"]),
        "preprocessing": preprocessing,
        "scale": scale,
        "state": state,
        "rows": load_array(folder, "rows", checksums["rows"]),
    }
    model: Model
    if document["format"] == LINEAR:
        model = LinearModel(**common, weights=load_array(folder, "weights", checksums["weights"]))
    else:
        address = str(document["features"]["address"])
        if Path(address).name != address or address in ("", ".", ".."):
            raise ValueError(f"{address!r} is no address of a store")
        model = Expansion(
            **common,
            features=address,
            axis=dict(document["features"]["axis"]),
            alpha=load_array(folder, "alpha", checksums["alpha"]),
        )
    _check_numbers(model)
    return model


def _check_numbers(model: Model) -> None:
    coefficients, rows = model.coefficients, model.rows
    fits = rows.dtype == np.int64 and rows.ndim == 1 and coefficients.ndim == 2
    if isinstance(model, Expansion):
        fits = fits and len(rows) == len(coefficients)
    if not fits or not np.isfinite(coefficients).all():
        raise ValueError(
            f"coefficients {coefficients.dtype} {coefficients.shape} do not fit rows {rows.dtype} {rows.shape}"
        )
    if model.labels is not None and model.labels.shape != coefficients.shape[1:]:
        raise ValueError(f"{coefficients.shape[1]} columns of coefficients for labels {model.labels.shape}")


def _own(label: str, kind: datasets.LabelType) -> str | int | bool:
    """A label as JSON keeps it and the data had it."""
    if kind == "boolean":
        return label == "True"
    return int(label) if kind == "integer" else label
