"""Solvers of (K + n*lambda*I) alpha = Y, and the choice between them (SPEC R1 to R9)."""

from __future__ import annotations

from .base import Solution, Solver, Status
from .cholesky import Cholesky
from .choose import Choice, build, choose
from .choose_primal import build_primal, choose_primal
from .costs import Estimate, Means, Problem, solve_bytes
from .eigen import Eigen

__all__ = [
    "Choice",
    "Cholesky",
    "Eigen",
    "Estimate",
    "Means",
    "Problem",
    "Solution",
    "Solver",
    "Status",
    "build",
    "build_primal",
    "choose",
    "choose_primal",
    "solve_bytes",
]
