"""Errors that a user can act on. Each carries the exit code that the command line ends with."""

from __future__ import annotations


class MegagramError(Exception):
    """Something the user can mend; the message names the file, key, row or tile and says what to do."""

    exit_code = 1


class ExperimentError(MegagramError):
    """The experiment file, or an option, is invalid."""

    exit_code = 2


class DataError(MegagramError):
    """Data are missing, damaged, or not of the right shape, dtype or values."""

    exit_code = 3


class DoesNotFit(MegagramError):
    """The plan needs more memory or disk than there is."""

    exit_code = 4


class StoreError(MegagramError):
    """A store is damaged, or does not hold what was asked of it."""

    exit_code = 5


class ChunkLost(StoreError):
    """A tile or block was missing or damaged (then set aside); computing it again mends the store."""


class NumericalError(MegagramError):
    """A computation broke down: a non-finite value, a matrix that is not positive definite."""

    exit_code = 6


class DiskFull(MegagramError):
    """The disk that holds the root is full."""

    exit_code = 8
