"""A solve to be killed: ``python iterating.py STORE FOLDER OUT WORKERS DELAY``.

Solves with the Gram store STORE by conjugate gradients in the site FOLDER and writes the coefficients of all ridges to
OUT. WORKERS: processes, or 0 for this one alone. DELAY: seconds between iterations. Prints each iteration's number.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

ROWS = 130
RIDGES = (1e-1, 1e-3, 1e-5)


def main() -> None:
    store, folder, out = (Path(word) for word in sys.argv[1:4])
    count, delay = int(sys.argv[4]), float(sys.argv[5])
    from cluster.worker import set_blas_environment

    set_blas_environment()
    import numpy as np

    from cluster.local import open_cluster
    from cluster.profiles import Profile
    from pipelines import products, tasks
    from pipelines.operators import GramOperator
    from pipelines.site import Site
    from pipelines.solvers.conjugate_gradient import ConjugateGradient
    from pipelines.solvers.preconditioner import preconditioner_bytes
    from pipelines.stores import GramStore

    products.SQUARE = 48

    def told(done: int, total: int, message: str) -> None:
        print(done, flush=True)
        time.sleep(delay)

    with contextlib.ExitStack() as stack:
        workers = tasks.Workers()
        if count:
            client = stack.enter_context(open_cluster(Profile(workers=count)))
            workers = tasks.Workers(client, count)
            print("workers", *client.run(_pid).values(), flush=True)
        site = stack.enter_context(Site(folder, lambda: workers, 2**30))
        rows = np.arange(ROWS)
        operator = GramOperator(GramStore(store), rows, site)
        memory = preconditioner_bytes(ROWS, 8, "float32")
        solver = ConjugateGradient(rank_bytes=memory, checkpoint_seconds=0.0)
        Y = np.random.default_rng(0).standard_normal((ROWS, 3))
        solutions = solver.solve(solver.factor(operator, RIDGES), Y, told)
        np.save(out, np.stack([one.alpha for one in solutions]))


def _pid() -> int:
    import os

    return os.getpid()


if __name__ == "__main__":
    main()
