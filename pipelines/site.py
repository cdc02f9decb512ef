"""Where a solve works: its folder under the root, the workers that help, and what each may hold.

What a solve keeps for its next start lies under the folder; arrays on their way to workers lie in a scratch
folder in it, which goes when the solve ends or, after a death, when the next one begins.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

from . import leases, tasks
from .files import disk_errors


class Site:
    """A context manager for the time of one solve.

    folder: of this solve, made when it is entered. workers: opens the workers when they are needed.
    memory_bytes: what one worker may hold. progress: hears of long work that nobody else reports.
    """

    def __init__(
        self,
        folder: Path,
        workers: tasks.Open,
        memory_bytes: int,
        progress: Callable[[int, int, str], None] = lambda done, total, message: None,
    ) -> None:
        self.folder = folder
        self.workers = workers
        self.memory_bytes = memory_bytes
        self.progress = progress
        self._scratch = folder / f"scratch-{leases.host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Site:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lease = self._stack.enter_context(leases.Lease(self.folder))
        # Listed first: whoever begins meanwhile makes its scratch folder after its lease.
        left = list(self.folder.glob("scratch-*"))
        if not leases.living(self.folder, besides=lease.path):
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
        with disk_errors(self.folder):
            self._scratch.mkdir()
        self._stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def alone(self) -> bool:
        """Whether no other living process works in this folder."""
        own = f"{leases.host()}-{os.getpid()}-"
        return all(one.path.name.startswith(own) for one in leases.living(self.folder))

    def path(self, name: str) -> Path:
        """A new path in the scratch folder that begins with ``name``."""
        return self._scratch / f"{name}-{next(self._numbers)}"

    def save(self, name: str, values: np.ndarray) -> Path:
        """Write an array where workers can map it into their memory; returns its ``.npy`` path.

        Raises:
            DiskFull: no space is left.
        """
        path = self.path(name).with_suffix(".npy")
        with disk_errors(self._scratch), path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(
                stream, np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(values))
            )
            stream.write(np.ascontiguousarray(values).data)
        return path
