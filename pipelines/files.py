"""Files that are written whole, under a temporary name that is then changed; documents that notice damage; what a disk
refuses, in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DiskFull, StoreError


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``; the file written there takes its place when the context ends without an error,
    and is gone otherwise.

    durable: whether it must outlive a loss of power.

    Raises:
        DiskFull: no space is left.
        StoreError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with disk_errors(path.parent):
            yield temporary
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document for JSON with a digest of itself, so that a change of a single number in it is noticed."""
    plain = json.loads(json.dumps(document))  # as it comes back: names are words then, and in another order
    return {**plain, "seal": _seal(plain)}


def unsealed(document: Any) -> dict[str, Any]:
    """What was ``sealed``, as it comes back from JSON.

    Raises:
        ValueError: it is no such document, or not as it was written.
    """
    if not isinstance(document, dict):
        raise ValueError("it holds no document")
    inner = {name: value for name, value in document.items() if name != "seal"}
    if document.get("seal") != _seal(inner):
        raise ValueError("it is not as it was written")
    return inner


def _seal(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Make a file or a folder durable: what is in it outlives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "read-only" into errors that say where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path).free if path.exists() else 0
            raise DiskFull(
                f"no space left for {path} ({free / 2**20:.0f} MiB free); what is stored is kept:"
                " make room (megagram store clean) or choose another --root, then run again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise StoreError(f"{path} cannot be written ({error.strerror}); choose another --root") from error
        raise
