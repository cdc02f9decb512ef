"""Conjugate gradients with the Gram store SOURCE, as a program to be killed (see ``solve_runs``)."""

from __future__ import annotations

import solve_runs

ROWS = 130
RIDGES = (1e-1, 1e-3, 1e-5)


def solve(source, site, told):
    import numpy as np

    from pipelines import products
    from pipelines.operators import GramOperator
    from pipelines.solvers.conjugate_gradient import ConjugateGradient
    from pipelines.solvers.preconditioner import preconditioner_bytes
    from pipelines.stores import GramStore

    products.SQUARE = 48
    operator = GramOperator(GramStore(source), np.arange(ROWS), site)
    solver = ConjugateGradient(rank_bytes=preconditioner_bytes(ROWS, 8, "float32"), checkpoint_seconds=0.0)
    Y = np.random.default_rng(0).standard_normal((ROWS, 3))
    return [one.alpha for one in solver.solve(solver.factor(operator, RIDGES), Y, told)]


if __name__ == "__main__":
    solve_runs.serve(solve, "iterations")
