"""Solutions kept as they are found, so that a path of ridges that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..files import disk_errors, sealed, sync, unsealed
from ..results import load_array, save_array
from .base import Solution, Status

ARRAYS = ("alpha", "loo", "fitted")

EARLIER = "solved by an earlier start, whose time and memory these are"

DAMAGED = "what an earlier start kept of this ridge was damaged, and the ridge is solved again"


class Checkpoints:
    """One folder for each ridge that is solved, under ``folder``; none are kept where that is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._damaged: set[float] = set()

    def load(self, ridge: float) -> Solution | None:
        """The solution that was kept for a ridge; None where there is none, or it is damaged."""
        if self._folder is None:
            return None
        folder = self._path(ridge)
        if not folder.exists():
            return None
        try:
            facts = unsealed(json.loads((folder / "solution.json").read_text()))
            arrays: dict[str, Any] = {
                name: load_array(folder, name, checksum) for name, checksum in facts.pop("checksums").items()
            }
            facts |= {"status": Status(facts["status"]), "notes": (*facts["notes"], EARLIER)}
            return Solution(**facts, **arrays)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            self._damaged.add(ridge)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def told(self, solution: Solution) -> Solution:
        """A solution, with a note where ``load`` found damage in what was kept of its ridge."""
        if solution.ridge not in self._damaged:
            return solution
        return replace(solution, notes=(*solution.notes, DAMAGED))

    def drop(self, ridge: float) -> None:
        """Forget the solution of a ridge, which is to be solved further."""
        if self._folder is not None:
            shutil.rmtree(self._path(ridge), ignore_errors=True)

    def save(self, solution: Solution) -> None:
        """Keep a solution: written under a temporary name, made durable, renamed.

        Raises:
            DiskFull: no space is left.
        """
        if self._folder is None:
            return
        folder = self._path(solution.ridge)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        facts = {f.name: getattr(solution, f.name) for f in fields(Solution) if f.name not in ARRAYS}
        arrays = {name: values for name in ARRAYS if (values := getattr(solution, name)) is not None}
        with disk_errors(self._folder):
            temporary.mkdir(parents=True)
            facts["checksums"] = {name: save_array(temporary, name, arrays[name]) for name in arrays}
            (temporary / "solution.json").write_text(json.dumps(sealed(facts)))
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            with suppress(OSError):  # another process keeps the same solution
                os.rename(temporary, folder)
                sync(self._folder)
        shutil.rmtree(temporary, ignore_errors=True)

    def _path(self, ridge: float) -> Path:
        assert self._folder is not None
        return self._folder / f"ridge-{ridge!r}"
