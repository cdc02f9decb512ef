"""A regression on features to be killed: ``python summing.py STORE FOLDER OUT WORKERS DELAY``.

Solves with the feature store STORE by one eigendecomposition in the site FOLDER and writes the weights of all ridges
to OUT. WORKERS: processes, or 0 for this one alone. DELAY: seconds between strips of the covariance. Prints how many
strips are summed, of how many.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

RIDGES = (1e-1, 1e-3, 1e-5)


def main() -> None:
    store, folder, out = (Path(word) for word in sys.argv[1:4])
    count, delay = int(sys.argv[4]), float(sys.argv[5])
    from cluster.worker import set_blas_environment

    set_blas_environment()
    import numpy as np

    from cluster.local import open_cluster
    from cluster.profiles import Profile
    from pipelines import tasks
    from pipelines.explicit import covariance
    from pipelines.explicit.featuresource import StoredFeatures
    from pipelines.site import Site
    from pipelines.solvers.primal import FeatureOperator, PrimalEigen

    covariance.STRIP, covariance.UNSAVED = 16, 2

    def told(done: int, total: int, message: str) -> None:
        if "covariance" in message:
            print(done, total, flush=True)
            time.sleep(delay)

    with contextlib.ExitStack() as stack:
        workers = tasks.Workers()
        if count:
            client = stack.enter_context(open_cluster(Profile(workers=count)))
            workers = tasks.Workers(client, count)
            print("workers", *client.run(_pid).values(), flush=True)
        site = stack.enter_context(Site(folder, lambda: workers, 2**30, told))
        source = StoredFeatures.of(store)
        operator = FeatureOperator(source, np.arange(source.shape[0]), site)
        Y = np.random.default_rng(0).standard_normal((operator.n, 3))
        solutions = PrimalEigen(loo=True).solve(operator, RIDGES, Y)
        np.save(out, np.stack([one.alpha for one in solutions]))


def _pid() -> int:
    import os

    return os.getpid()


if __name__ == "__main__":
    main()
