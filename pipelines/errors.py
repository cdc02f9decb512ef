"""Errors that a user can act on. Each carries the exit code that the command line ends with."""

from __future__ import annotations

import errno

_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG),
}
"""Failures of the system that stay until somebody does something."""


def may_pass(error: BaseException) -> bool:
    """Whether the same work may well succeed when it is tried again.

    Errors that say so by an attribute ``transient`` are believed, ones that carry an ``exit_code`` are meant
    for the user; of the rest, only passing failures of the system are worth another try.
    """
    if hasattr(error, "transient"):
        return bool(error.transient)
    return not hasattr(error, "exit_code") and isinstance(error, OSError) and error.errno not in _LASTING


class MegagramError(Exception):
    """Something the user can mend; the message names the file, key, row or tile and says what to do."""

    exit_code = 1


class ExperimentError(MegagramError):
    """The experiment file, or an option, is invalid."""

    exit_code = 2


class RootError(MegagramError):
    """The folder given as root cannot be written."""

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
