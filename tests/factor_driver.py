"""One solve by a tiled Cholesky: ``python factor_driver.py ROOT WORKERS DELAY``; its coefficients go to ROOT/alpha.npy.

WORKERS: processes beside this one, or 0 for none. DELAY: seconds that each tile of the factor takes longer, so that
there is a middle to be killed in. Every tile that is made adds a line to ROOT/made: its place, and who made it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DELAY, MADE = "TEST_FACTOR_DELAY", "TEST_FACTOR_MADE"
N, SIDE = 200, 24
TILES = 45
RIDGES = (1e-1, 1e-3)


def slow_down() -> None:
    """Make tiles of this process take longer, and leave a trace, where the environment says so."""
    if DELAY not in os.environ:
        return
    from pipelines.stores import FactorStore

    write = FactorStore.write_tile

    def slowly(self, tile, block):
        time.sleep(float(os.environ[DELAY]))
        made = write(self, tile, block)
        with open(os.environ[MADE], "a") as stream:
            stream.write(f"{self.path.name} {tile[0]} {tile[1]} {os.getpid()}\n")
        return made

    setattr(FactorStore, "write_tile", slowly)  # noqa: B010


def main() -> None:
    root, workers = Path(sys.argv[1]), int(sys.argv[2])
    os.environ[DELAY], os.environ[MADE] = sys.argv[3], str(root / "made")
    slow_down()
    import numpy as np

    from cluster.local import open_cluster
    from cluster.profiles import Profile
    from cluster.watchdog import Watchdog
    from pipelines import tasks
    from pipelines.errors import MegagramError
    from pipelines.operators import GramOperator
    from pipelines.site import Site
    from pipelines.solvers.tiled_cholesky import TiledCholesky
    from pipelines.stores import Axis, GramStore

    x = np.linspace(0, N / 3, N)
    matrix = np.exp(-np.abs(x[:, None] - x))
    axis = Axis(N, ("x",), lambda k: ("x",))
    source = GramStore.open_or_create(root, {"test": "factor"}, [axis], "float64", 32)
    for tile in ((i, j) for i in range(source.grid.shape[0]) for j in range(i + 1)):
        source.write_tile(tile, np.ascontiguousarray(matrix[source.grid.extent(tile)]))
    setattr(TiledCholesky, "side", SIDE)  # noqa: B010
    profile = Profile(kind="local", workers=workers) if workers else Profile(kind="serial")
    try:
        with open_cluster(profile) as client:
            check = Watchdog(client, workers).check if client is not None else lambda: None
            opened = tasks.Workers(client, workers, None, check) if client is not None else tasks.Workers()
            with Site(root / "solves" / "one", lambda: opened, 2**30) as site:
                solver = TiledCholesky()
                Y = np.random.default_rng(0).standard_normal((N, 3))
                solutions = solver.solve(solver.factor(GramOperator(source, np.arange(N), site), RIDGES), Y)
    except MegagramError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    np.save(root / "alpha.npy", np.stack([solution.alpha for solution in solutions]))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    slow_down()
