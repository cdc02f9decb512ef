"""What a compiled library is made from: sources and flags. No imports of the package: its build runs this file too."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

FLAGS = (
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC's own intrinsics warn
)
INSTRUCTION_FLAGS: dict[str, tuple[str, ...]] = {"baseline": ()}
"""Of each instruction set that this architecture has a library for."""
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_FLAGS["avx2"] = ("-mavx2", "-mfma")
    INSTRUCTION_FLAGS["avx512"] = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma")


def made_from(folder: Path) -> list[Path]:
    """Everything that decides how the library is called and what it computes, this file with its flags included; empty
    where the C++ sources are not beside it (an installed wheel, whose libraries come with it)."""
    parts = sorted(path for pattern in ("*.cpp", "*.hpp") for path in folder.glob(pattern))
    return [*parts, folder / "library.py", folder / "sources.py"] if parts else []


def digest(folder: Path) -> str:
    """sha256 of what ``made_from`` names; empty where that is nothing."""
    paths = made_from(folder)
    if not paths:
        return ""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()
