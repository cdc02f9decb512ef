"""Several arrays in one file, written whole, whose damage is noticed when it is read."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from .files import disk_errors, replacing


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], durable: bool = True) -> None:
    """Write arrays into one file, whole: under a temporary name, made durable, renamed.

    durable: whether it must outlive a loss of power; where it may not, that is noticed when it is read.

    Raises:
        DiskFull: no space is left.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def load_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray] | None:
    """What ``save_arrays`` wrote; None where there is none, or it is damaged: a checksum in it is wrong, or its table
    of contents, which has none.

    names: of the arrays, where they are known.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    # RuntimeError: a bit may say that a file is encrypted, or of another compression.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
    return arrays if names is None or arrays.keys() == set(names) else None
