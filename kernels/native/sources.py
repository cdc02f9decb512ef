"""Which sources a compiled library was made from. No imports of the package: its build runs this file too."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """sha256 of everything that decides how the library is called and what it computes; empty where the C++
    sources are not beside it (an installed wheel, whose libraries come with it)."""
    parts = sorted(path for pattern in ("*.cpp", "*.hpp") for path in folder.glob(pattern))
    if not parts:
        return ""
    sha = hashlib.sha256()
    for path in (*parts, folder / "library.py"):
        sha.update(path.read_bytes())
    return sha.hexdigest()
