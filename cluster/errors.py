"""Errors of the cluster, each with the exit code that the command line ends with."""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster cannot do the work; the message says what to change.

    transient: whether the same stage may well succeed when it is tried again.
    """

    exit_code = 7
    transient = False


class ProfileError(ClusterError):
    """A profile is invalid: a setting of the user, like an option of the command line."""

    exit_code = 2


class PreflightError(ClusterError):
    """The driver and the workers do not run the same code, or do not see the same files."""


class ClusterLost(ClusterError):
    """The scheduler, or every worker, is gone."""

    transient = True


class WorkersKilled(ClusterError):
    """A task killed every worker that tried it, most often for want of memory: it would again."""
