"""Which ridges need a float64 factor: learnt as they are solved, remembered by whoever goes on with the solve."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..files import replacing

SINGLE = "a float32 factor, refined to a float64 residual, was enough at this ridge"
DOUBLE = "a float64 factor was used: a float32 one is not enough at this ridge"
DOUBLE_LOO = "a float64 factor was used: leave-one-out takes the digits of the factor itself"

FILE = "float64-from"


class Precision:
    """The largest ridge at which a float32 factor is known not to be enough: rounding hurts smaller ones more.

    folder: of the solve, where it is kept; it is not where that is None.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE
        self._largest = 0.0
        if self._path is not None:
            # Nothing is known, or it is damaged: then it is learnt once more.
            with suppress(OSError, ValueError):
                self._largest = float(self._path.read_text())

    def needs_double(self, ridge: float) -> bool:
        return ridge <= self._largest

    def single_failed(self, ridge: float) -> None:
        """Learn that a float32 factor is not enough at a ridge.

        Raises:
            DiskFull: no space is left.
        """
        self._largest = max(self._largest, ridge)
        if self._path is not None:
            with replacing(self._path) as temporary:
                temporary.write_text(repr(self._largest))
