"""A tile's file as Zarr reads and writes it, without the copies that Zarr makes on the way: half of the time.

It holds a (side, side) tile in C order, little-endian, and its crc32c.
"""

from __future__ import annotations

import errno
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np

WRITTEN_BYTES = 2**20
"""Of a tile that are written at once: Linux keeps larger pieces in larger pages, which cost it far more to find."""

READ_BYTES = 2**20
"""Of a tile that are read at once, and looked at while they are in the cache."""

SUM_BYTES = 4
"""The checksum's, at the end of a file."""

_MADV_POPULATE_READ = 22
"""Linux 5.14's number, for which Python has no name."""


def read_tile_file(path: Path, side: int, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """The (side, side) tile in a file, and whether all its values are finite.

    Raises:
        ValueError: the file is not of that size, its disk cannot read it, or its checksum is wrong.
        OSError: it cannot be opened or reached; the file is named.
    """
    import google_crc32c

    checksum, finite = 0, True
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        _check_size(size, side, dtype)
        content = np.empty(size, np.uint8)
        for start in range(0, size - SUM_BYTES, READ_BYTES):
            piece = content[start : min(start + READ_BYTES, size - SUM_BYTES)]
            _read_all(stream, piece)
            checksum = google_crc32c.extend(checksum, piece)
            finite = finite and all_finite(piece.view(dtype))
        _read_all(stream, content[-SUM_BYTES:])
    _check_sum(checksum, content)
    return _tile_in(content, side, dtype), finite


def all_finite(values: np.ndarray) -> bool:
    """Whether every value is finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is quicker than a look at every value, that of squares, by the linear algebra library, the quickest; and
        # only finite values have a finite one.
        if values.flags.c_contiguous:
            flat = values.reshape(-1)
            total = np.dot(flat, flat)
        else:
            total = values.sum()
        return bool(np.isfinite(total)) or bool(np.isfinite(values).all())


def map_tile_file(path: Path, side: int, dtype: np.dtype, verify: bool) -> np.ndarray:
    """The same, read-only, as a map of the file, whose pages the system reads once for all processes.

    Raises:
        ValueError: the file is not of that size or cannot be read, or, where that is to be verified, its checksum is
            wrong.
    """
    with path.open("rb") as stream:
        _check_size(os.fstat(stream.fileno()).st_size, side, dtype)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    _populate(mapped)
    content = np.frombuffer(mapped, np.uint8)
    if verify:
        import google_crc32c

        _check_sum(google_crc32c.value(content[:-SUM_BYTES]), content)
    return _tile_in(content, side, dtype)


def write_tile_file(path: Path, block: np.ndarray, side: int) -> None:
    """Write a block in C order as Zarr would, its chunk filled up with NaN: under a temporary name, then renamed.

    Raises:
        FileNotFoundError: the array's folder, three above the file, is not there.
    """
    import google_crc32c

    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    for folder in (path.parent.parent, path.parent):  # and none above: a store that was removed stays away
        folder.mkdir(exist_ok=True)
    checksum = 0
    try:
        with temporary.open("wb", buffering=0) as stream:
            for piece in _pieces(block, side):
                content = piece.astype(piece.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
                checksum = google_crc32c.extend(checksum, content)
                _write_all(stream, content.data)
            _write_all(stream, memoryview(checksum.to_bytes(SUM_BYTES, "little")))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _pieces(block: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Whole rows of the (side, side) chunk that a block begins, so many at a time as are written at once."""
    count = max(1, WRITTEN_BYTES // (side * block.itemsize))
    for start in range(0, side, count):
        rows = min(count, side - start)
        piece = block[start : start + rows]
        if piece.shape != (rows, side):
            whole = np.full((rows, side), np.nan, block.dtype)
            whole[: len(piece), : piece.shape[1]] = piece
            piece = whole
        yield piece


def _write_all(stream: FileIO, content: memoryview) -> None:
    while len(content):  # one call need not take all of it
        content = content[stream.write(content) :]


def _read_all(stream: FileIO, content: np.ndarray) -> None:
    """Fill an array of bytes.

    Raises:
        ValueError: the disk cannot read them, or the file ends before.
        OSError: anything else is in the way, of which the tile knows nothing: a lost server, say.
    """
    rest = content.data
    try:
        while len(rest):  # one call need not fill all of it
            count = stream.readinto(rest)
            if not count:
                raise ValueError("it ends too early")
            rest = rest[count:]
    except OSError as error:
        if error.errno != errno.EIO:
            raise OSError(error.errno, error.strerror, stream.name) from error
        raise ValueError(f"it cannot be read: {error.strerror}") from error


def _populate(mapped: mmap.mmap) -> None:
    """Have all pages of a map read and mapped at once.

    Raises:
        ValueError: the disk cannot read them. A look at such a page would end the process.
    """
    try:
        mapped.madvise(_MADV_POPULATE_READ)
    except (AttributeError, ValueError):  # another system
        return
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older Linux, which maps pages as they are looked at
            raise ValueError(f"it cannot be read: {error.strerror}") from error


def _check_size(found: int, side: int, dtype: np.dtype) -> None:
    expected = side * side * dtype.itemsize + SUM_BYTES
    if found != expected:
        raise ValueError(f"{found} bytes where a tile has {expected}")


def _check_sum(found: int, content: np.ndarray) -> None:
    if found != int.from_bytes(content[-SUM_BYTES:].tobytes(), "little"):
        raise ValueError("stored and computed checksum do not match")


def _tile_in(content: np.ndarray, side: int, dtype: np.dtype) -> np.ndarray:
    return content[:-SUM_BYTES].view(dtype.newbyteorder("<")).reshape(side, side)
