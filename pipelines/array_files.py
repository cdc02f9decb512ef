"""A user's own arrays: .npy, .npz and .zarr files, opened without reading them whole where that is possible.

Nothing in a file can execute code: pickled arrays, and Zarr codecs that are not known to only move
bytes, are refused.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from .errors import DataError

# numcodecs has a codec that unpickles what it decodes, and plug-ins may add others.
_ZARR_CODECS = frozenset(
    {
        *("bytes", "transpose", "sharding_indexed", "vlen-utf8", "shuffle", "delta"),
        *("crc32c", "crc32", "adler32", "fletcher32"),
        *("gzip", "zlib", "zstd", "blosc", "lz4", "bz2", "lzma"),
    }
)

_UNREADABLE = (
    *(ValueError, TypeError, AttributeError, OSError, EOFError, KeyError, RuntimeError),
    zipfile.BadZipFile,
)


def open_array(path: str | Path, names: Sequence[str], *, sole: bool = True) -> Any:
    """A ``numpy.ndarray`` (memory-mapped from .npy, read from .npz) or a ``zarr.Array`` (lazy).

    path: .npy, .npz, .zarr, or the folder of an array in a Zarr group.
    names: in an .npz file, the first of these that it holds; where it holds none and ``sole``, its only
    array.

    Raises:
        DataError: no such file, another ending, no such array, a damaged file, or one that holds Python
            objects or needs a codec that could execute code.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise DataError(f"{path}, the path of {names[0]}, does not exist")
        if path.suffix == ".npz":
            return _read_npz(path, names, sole)
        if path.suffix == ".npy":
            return _open_npy(path)
        if path.suffix == ".zarr" or _described(path):
            return _open_zarr(path)
    except _UNREADABLE as error:
        text = " ".join(str(error).split())
        # NumPy advises to unpickle, which would execute what the file holds.
        if any(words in text for words in ("pickle", "Python objects", "Object arrays")):
            text = "it holds Python objects; save numbers or strings"
        raise DataError(f"{path} cannot be read as {names[0]}: {text}") from None
    raise DataError(
        f"{path}, the path of {names[0]}, must end with .npy, .npz or .zarr, or be an array in a Zarr group"
    )


def _open_npy(path: Path) -> np.ndarray:
    with path.open("rb") as stream:
        if stream.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
            raise DataError(f"{path} is not a .npy file: write it with numpy.save")
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    # A plain view of the same memory: np.memmap's own methods cost time and turn scalars into arrays.
    return cast(np.ndarray, mapped).view(np.ndarray)


def _read_npz(path: Path, names: Sequence[str], sole: bool) -> np.ndarray:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not a .npz file: write it with numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        held = [name for name in names if name in archive.files]
        if not held and sole and len(archive.files) == 1:
            held = archive.files
        if not held:
            raise DataError(f"{path} has no array {names[0]!r}; it has {', '.join(archive.files) or 'none'}")
        array = archive[held[0]]
    if not isinstance(array, np.ndarray):  # NumPy returns the bytes of members that are no arrays
        raise DataError(f"{path}: its member {held[0]!r} is not an array")
    return array


def _described(path: Path) -> list[Path]:
    """The files that describe a Zarr array or group at ``path``; none where there is none."""
    return [path / name for name in ("zarr.json", ".zarray") if (path / name).is_file()]


def _open_zarr(path: Path) -> Any:
    described = _described(path)
    if not described:
        raise DataError(f"{path} is not a Zarr array; give the path of an array")
    for codec in _codecs(json.loads(described[0].read_text())):
        if codec not in _ZARR_CODECS:
            raise DataError(f"{path} uses the codec {codec!r}, which is not read: it might execute code")
    import zarr

    array = zarr.open(store=path, mode="r", zarr_format=3 if described[0].name == "zarr.json" else 2)
    if not isinstance(array, zarr.Array):
        raise DataError(f"{path} is a Zarr group; give the path of an array in it")
    return array


def _codecs(metadata: Any) -> list[str]:
    """Names of all codecs in the metadata of a Zarr array of format 2 or 3, nested ones included.

    Raises ValueError or KeyError where the metadata are damaged.
    """
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are damaged")
    if metadata.get("zarr_format") == 2:
        entries = [metadata.get("compressor"), *(metadata.get("filters") or [])]
        return [str(entry["id"]) for entry in entries if entry]
    names = []
    pending = list(metadata.get("codecs", []))
    while pending:
        codec = pending.pop()
        if not isinstance(codec, dict):
            codec = {"name": codec}
        names.append(str(codec["name"]))
        configuration = codec.get("configuration") or {}
        pending += configuration.get("codecs", []) + configuration.get("index_codecs", [])
    return names
