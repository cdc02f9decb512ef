"""What comparisons leave under a root: points, one small file each, and a folder for each comparison."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import disk_errors, replacing, sync
from ..reports.document import Page, write

FOLDER = "comparisons"
POINTS = "points"
DOCUMENT = "comparison"


def read(path: Path) -> dict[str, Any] | None:
    """A point that was found before; None where there is none, or it is damaged."""
    try:
        value = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def keep(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a point, whole, and return it."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(value))
    return value


class ComparisonStore:
    """A comparison at its address: ``<root>/comparisons/<name>-<address>/``, written whole and once."""

    def __init__(self, root: Path, name: str, address: str) -> None:
        self.folder = root / FOLDER / f"{name}-{address[:12]}"

    def read(self) -> dict[str, Any] | None:
        """What was found before; None where nothing was, or it is damaged."""
        return read(self.folder / DOCUMENT)

    def write(self, comparison: Mapping[str, Any], page: Page) -> None:
        """Write ``comparison.json``, ``report.html`` and ``report.md``; a damaged folder gives way."""
        working = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            with disk_errors(self.folder.parent):
                write(page, working)
                keep(working / DOCUMENT, dict(comparison))
                for path in (*working.iterdir(), working):
                    sync(path)
                if self.read() is None:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    os.rename(working, self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or self.read() is None:
                raise
        finally:
            shutil.rmtree(working, ignore_errors=True)
