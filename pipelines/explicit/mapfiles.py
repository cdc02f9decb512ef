"""What a feature map learned, as a folder: ``map.json``, its description, and a ``.npy`` for each array.

The description names the arrays by their digest, so that a damaged file is found whenever they are read. A folder
is written whole under a temporary name, made durable and renamed; nothing in it is changed afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import KernelError
from kernels.features.base import FeatureMap
from kernels.registry import from_description

from ..errors import StoreError
from ..files import disk_errors, sync
from ..results import save_array

KIND = "maps"
DOCUMENT = "map.json"
FORMAT = 1


def write(folder: Path, feature_map: FeatureMap, facts: Mapping[str, Any] | None = None) -> None:
    """Write what ``feature_map`` learned; where it lies there already, that stays.

    facts: JSON that says what it was learned from.

    Raises:
        DiskFull: no space is left; nothing is there under the folder's name.
    """
    arrays = feature_map.arrays or {}
    document = {
        "megagram": "map",
        "format": FORMAT,
        "description": feature_map.describe(),
        "arrays": sorted(arrays),
        "facts": dict(facts or {}),
    }
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        with disk_errors(folder.parent):
            temporary.mkdir(parents=True)
            for name, values in arrays.items():
                save_array(temporary, name, values)
            (temporary / DOCUMENT).write_text(json.dumps(document, indent=1))
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            _rename(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path) -> FeatureMap:
    """The map with what it learned. Nothing that is read can execute code.

    Raises:
        StoreError: it is missing, damaged, or of another format.
    """
    document = describe(folder)
    try:
        arrays = {name: _array(folder / f"{name}.npy") for name in document["arrays"]}
        feature_map = from_description(document["description"])
        if not isinstance(feature_map, FeatureMap) or not feature_map.learned:
            raise ValueError(f"{DOCUMENT} describes no map that has learned")
        return feature_map.knowing(arrays)
    except (KernelError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder}: what a feature map learned is damaged ({error})") from None


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def describe(folder: Path) -> dict[str, Any]:
    """What ``map.json`` says: ``description``, names of ``arrays``, ``facts``.

    Raises:
        StoreError: as ``read``.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{folder}: what a feature map learned is missing") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: what a feature map learned is damaged ({error})") from None
    if not isinstance(document, dict) or document.get("megagram") != "map":
        raise StoreError(f"{path}: what a feature map learned is damaged (no map is described)")
    if document.get("format") != FORMAT:
        raise StoreError(f"{path}: has format {document.get('format')}, this version reads format {FORMAT}")
    return document


def set_aside(folder: Path) -> bool:
    """Move a damaged folder out of the way atomically; False when it is gone already."""
    try:
        os.rename(folder, folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.damaged"))
    except FileNotFoundError:
        return False
    return True


def paths(root: Path) -> list[Path]:
    """The folders of what maps learned under a root."""
    found = sorted(root.glob(f"{KIND}/*/{DOCUMENT}"))
    return [path.parent for path in found if not path.parent.name.startswith(".")]


def _rename(temporary: Path, folder: Path) -> None:
    while True:
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (folder / DOCUMENT).exists():
            return
        # Of one that was set aside, leases that are renewed may be left: they will be renewed here.
        set_aside(folder)
