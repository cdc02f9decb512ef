"""Several arrays in one file, written whole, whose damage is noticed when it is read."""

from __future__ import annotations

import os
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .results import sync
from .stores import disk_errors


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], durable: bool = True) -> None:
    """Write arrays into one file, whole: under a temporary name, made durable, renamed.

    durable: whether it must outlive a loss of power; where it may not, that is noticed when it is read.

    Raises:
        DiskFull: no space is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What ``save_arrays`` wrote; None where there is none, or a checksum in it is wrong."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
