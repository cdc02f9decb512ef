"""A tiled Cholesky on two workers of one thread beside LAPACK, Dask and scikit-learn on the same two cores.

The matrix lies in a store in float32, as a kernel's would; the factor is made from there and written to the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import common
import numpy as np
from common import Options, Report, cpu_seconds, in_child, megabytes, system_seconds, timed

from cluster.local import open_cluster
from cluster.profiles import Profile
from pipelines import tasks
from pipelines.memory import peak_bytes
from pipelines.operators import GramOperator
from pipelines.site import Site
from pipelines.solvers import tiled_cholesky
from pipelines.solvers.cholesky import Cholesky
from pipelines.solvers.tiled_cholesky import TiledCholesky
from pipelines.solvers.tiled_factor import FactorJob, complete
from pipelines.stores import Axis, FactorStore, GramStore

WORKERS = 2
TARGETS = 10
SHIFT = 10.0
FACTOR_BY_DASK = "dask.array.linalg.cholesky"
SOLVED_BY_DASK = "dask.array.linalg, the whole solve"
SCIKIT = "KernelRidge"


@dataclass(frozen=True)
class Size:
    """rounds: that are measured; what takes longer varies less."""

    n: int
    side: int
    rounds: int = 1


def sizes(options: Options) -> tuple[Size, ...]:
    return (Size(3000, 512),) if options.quick else (Size(10_000, 2048, 3), Size(20_000, 2048))


def samples(n: int) -> np.ndarray:
    """(n, 64) float32; their inner products are the matrix."""
    return np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)


def dense(n: int, dtype: str) -> np.ndarray:
    """The shifted matrix, (n, n) in Fortran order."""
    X = samples(n)
    out = np.empty((n, n), dtype, order="F")
    for start in range(0, n, 2048):
        out[:, start : start + 2048] = X @ X[start : start + 2048].T
    np.einsum("ii->i", out)[:] += out.dtype.type(SHIFT)
    return out


def stored(root: Path, size: Size) -> GramStore:
    X = samples(size.n)
    axis = Axis(size.n, ("X",), lambda k: ("X",))
    store = GramStore.open_or_create(root, {"benchmark": size.n}, [axis], "float32", size.side)
    for tile in ((i, j) for i in range(store.grid.shape[0]) for j in range(i + 1)):
        rows, columns = store.grid.extent(tile)
        store.write_tile(tile, X[rows] @ X[columns].T)
    return store


def lapack(n: int, dtype: str) -> float:
    """CPU seconds of potrf with one thread; runs in a process of its own."""
    from scipy.linalg import get_lapack_funcs
    from threadpoolctl import threadpool_limits

    matrix = dense(n, dtype)
    (potrf,) = get_lapack_funcs(("potrf",), (matrix,))
    with threadpool_limits(1):
        run = timed(lambda: potrf(matrix, lower=1, overwrite_a=1, clean=0))
    assert run.value[1] == 0
    return run.cpu


def scikit(n: int, dtype: str) -> float:
    """Wall seconds of KernelRidge's solve with a thread for each core; runs in a process of its own."""
    from sklearn.kernel_ridge import KernelRidge
    from threadpoolctl import threadpool_limits

    matrix = dense(n, dtype).T  # symmetric: its transpose is it, in C order
    Y = targets(n).astype(dtype)
    with threadpool_limits(WORKERS):
        return timed(lambda: KernelRidge(alpha=1e-9, kernel="precomputed").fit(matrix, Y)).wall


def in_memory(root: Path, n: int, dtype: str) -> float:
    """Wall seconds of our solve in memory from the stored matrix, with a thread for each core; runs in a process of its
    own."""
    from threadpoolctl import threadpool_limits

    (path,) = (root / GramStore.kind).iterdir()
    K = GramOperator(GramStore(path), np.arange(n))
    solver = Cholesky(dtype, absolute=True)
    with threadpool_limits(WORKERS):
        return timed(lambda: solver.solve(solver.factor(K, [SHIFT]), targets(n))).wall


def targets(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, TARGETS))


@dataclass(frozen=True)
class Ours:
    """factor, solve: wall seconds of the factor alone, and of a solve from the stored matrix to a measured
    residual. cpu: of the factor, driver and workers; system: what of it the system took, to write and to map tiles.
    peak: of the largest worker. planned: for it."""

    factor: float
    solve: float
    cpu: float
    system: float
    peak: int
    planned: int


def ours(root: Path, size: Size, dtype: str) -> Ours:
    source = stored(root, size)
    rows = np.arange(size.n)
    np.save(root / "rows.npy", rows)
    (root / "warm").mkdir()
    _warm(root / "warm")
    itemsize = np.dtype(dtype).itemsize
    with open_cluster(Profile(workers=WORKERS)) as client:
        workers = tasks.Workers(client, WORKERS)
        pids = client.run(_warm, root / "warm").values()
        memory = min(info["memory_limit"] for info in client.scheduler_info()["workers"].values())
        cache = tiled_cholesky.cache_bytes(size.n, size.side, itemsize, memory)
        store = FactorStore.open_or_create(root, {"of": "benchmark"}, size.n, dtype, size.side)
        job = FactorJob(source, root / "rows.npy", store, SHIFT / size.n, SHIFT, size.n, cache)
        everyone = [os.getpid(), *pids]
        before, before_system = cpu_seconds(everyone), system_seconds(everyone)
        run = timed(lambda: complete(job, lambda: workers))
        cpu = cpu_seconds(everyone) - before
        system = system_seconds(everyone) - before_system
        peak = max(client.run(peak_bytes).values())
        planned = tiled_cholesky.worker_bytes(size.n, size.side, itemsize, cache, size.side**2 * 4)
        with Site(root / "solves" / "benchmark", lambda: workers, memory) as site:
            solver = TiledCholesky(dtype, absolute=True)
            K = GramOperator(source, rows, site)
            solve = timed(lambda: solver.solve(solver.factor(K, [SHIFT]), targets(size.n)))
        print(f"    residual {solve.value[0].residual:.1e} after {solve.value[0].iterations} refinements")
    return Ours(run.wall, solve.wall, cpu, system, peak, planned)


def _warm(root: Path) -> int:
    """Make a small factor, so that all is imported; runs on a worker. Returns its process id."""
    source = stored(root, Size(20, 8))
    np.save(root / "rows.npy", np.arange(20))
    store = FactorStore.open_or_create(root, {"of": "warmth"}, 20, "float64", 8)
    complete(FactorJob(source, root / "rows.npy", store, 0.5, SHIFT, 20, 0), tasks.Workers)
    return os.getpid()


def dask_array(size: Size, dtype: str) -> tuple[float, float]:
    """Wall seconds of dask.array.linalg.cholesky on workers like ours, the matrix in their memory; and of a whole
    solve, the factor and two triangular ones."""
    import dask.array as da
    from distributed import wait

    with open_cluster(Profile(workers=WORKERS)) as client:
        chunk = size.n // -(-size.n // size.side)  # it takes equal chunks alone
        X = da.from_array(samples(size.n), chunks=(chunk, 64))
        matrix = (X @ X.T).astype(dtype) + da.eye(size.n, chunks=chunk, dtype=dtype) * np.dtype(dtype).type(
            SHIFT
        )
        matrix = client.persist(matrix)
        wait(matrix)
        started = time.perf_counter()
        factor = client.persist(da.linalg.cholesky(matrix, lower=True))
        wait(factor)
        factored = time.perf_counter() - started
        Y = da.from_array(targets(size.n).astype(dtype), chunks=(chunk, TARGETS))
        forward = da.linalg.solve_triangular(factor, Y, lower=True)
        da.linalg.solve_triangular(factor.T, forward, lower=False).compute()
        return factored, time.perf_counter() - started


@dataclass(frozen=True)
class Walls:
    """Wall seconds of our whole solve, out of core and in memory, and of the peers; None of one that failed."""

    ours: float
    in_memory: float
    peers: dict[str, float | None]


@dataclass(frozen=True)
class Round:
    """One measurement of everything, one after the other. potrf: CPU seconds before and after ours. failed: errors."""

    potrf: tuple[float, float]
    ours: Ours
    in_memory: float
    peers: dict[str, float]
    failed: dict[str, str]


def one_round(size: Size, dtype: str) -> Round:
    before = in_child(lapack, size.n, dtype)
    with tempfile.TemporaryDirectory() as folder:
        run = ours(Path(folder), size, dtype)
        inside = in_child(in_memory, Path(folder), size.n, dtype)
    after = in_child(lapack, size.n, dtype)
    peers: dict[str, float] = {}
    failed: dict[str, str] = {}
    # A peer that can't is a row of the table too.
    try:
        peers[FACTOR_BY_DASK], peers[SOLVED_BY_DASK] = dask_array(size, dtype)
    except Exception as error:
        failed[FACTOR_BY_DASK] = failed[SOLVED_BY_DASK] = type(error).__name__
    try:
        peers[SCIKIT] = in_child(scikit, size.n, dtype)
    except Exception as error:
        failed[SCIKIT] = type(error).__name__
    return Round((before, after), run, inside, peers, failed)


def measure(report: Report, size: Size, dtype: str) -> Walls:
    """Every figure is the median of the rounds."""
    name = f"n = {size.n:,}, {dtype}"
    rounds = [one_round(size, dtype) for _ in range(size.rounds)]

    def of_ours(figure: str) -> float:
        return median(getattr(each.ours, figure) for each in rounds)

    potrf = median(sum(each.potrf) / 2 for each in rounds)
    single = [seconds for each in rounds for seconds in each.potrf]
    rate = size.n**3 / 3 / 1e9
    report.add(f"{name}: potrf, one thread", f"{potrf:.1f} CPU s ({min(single):.1f} to {max(single):.1f})")
    cpu, factor, solve = of_ours("cpu"), of_ours("factor"), of_ours("solve")
    _share(
        report,
        f"{name}: CPU time of the factor",
        f"{cpu:.1f} s, {of_ours('system'):.1f} of them the system's, {rate / cpu:.0f} GFLOP/s",
        potrf / cpu,
        0.85,
    )
    _share(report, f"{name}: wall time of the factor", f"{factor:.1f} s", potrf / WORKERS / factor, 0.70)
    peak, planned = max(each.ours.peak for each in rounds), rounds[0].ours.planned
    ratio = peak / planned
    report.add(
        f"{name}: peak memory of a worker",
        f"{megabytes(peak)}, planned {megabytes(planned)}",
        target="within 20 % of the plan",
        ratio=f"{ratio:.2f}",
        met=0.8 <= ratio <= 1.2,
    )
    peers: dict[str, float | None] = {}
    for peer in (FACTOR_BY_DASK, SOLVED_BY_DASK, SCIKIT):
        walls = [each.peers[peer] for each in rounds if peer in each.peers]
        peers[peer] = median(walls) if walls else None
        if not walls:
            report.add(f"{name}: {peer}", f"failed: {rounds[0].failed[peer]}")
        elif peer == FACTOR_BY_DASK:
            _beside(report, f"{name}: {peer}", median(walls), factor, "our factor")
        else:
            _beside(report, f"{name}: {peer}", median(walls), solve, "our whole solve")
    del peers[FACTOR_BY_DASK]
    return Walls(solve, median(each.in_memory for each in rounds), peers)


def mixed(report: Report, size: Size, double: Walls, single: Walls) -> None:
    """A float64 residual from a float32 factor, beside the peers' float64."""
    for peer, wall in double.peers.items():
        if wall is None:
            continue
        for where, seconds in (("out of core", single.ours), ("in memory", single.in_memory)):
            what = f"n = {size.n:,}, solved to a float64 residual {where}: {peer} in float64"
            _beside(report, what, wall, seconds, "our whole solve by a refined float32 factor")


def _share(report: Report, what: str, figure: str, share: float, target: float) -> None:
    report.add(what, figure, target=f">= {target:.0%} of potrf's", ratio=f"{share:.0%}", met=share >= target)


def _beside(report: Report, what: str, wall: float, seconds: float, mine: str) -> None:
    ratio = wall / seconds
    report.add(
        what,
        f"{wall:.1f} s, {mine} {seconds:.1f} s",
        target=">= 2x slower",
        ratio=f"{ratio:.1f}x",
        met=ratio >= 2,
    )


def main() -> None:
    options = common.options(__doc__ or "")
    report = Report("cholesky", "Tiled Cholesky out of core", options)
    for size in sizes(options):
        mixed(report, size, measure(report, size, "float64"), measure(report, size, "float32"))
    report.note(
        f"{WORKERS} workers with one BLAS thread each, for us and for dask.array; KernelRidge (kernel = precomputed) "
        f"with {WORKERS} BLAS threads in one process. Ours reads float32 tiles from a store and writes its factor."
    )
    rounds = " and ".join(f"{size.rounds} at n = {size.n:,}" for size in sizes(options))
    report.note(
        f"Everything is measured in rounds, one after the other, of which medians are given: {rounds}."
    )
    report.note(
        f"A whole solve is the factor, {TARGETS} targets and 32 probes forward, the targets backward, and the residual "
        "in float64 on the stored matrix; dask.array's is the factor and two triangular solves. The ideal wall time is "
        "potrf's CPU time over the number of workers."
    )
    report.note(
        "Where KernelRidge failed its process died: OpenBLAS' potrf on several threads writes beyond its buffers where "
        "n exceeds some 16,000 in float64. Ours factors large matrices in memory by halves."
    )
    report.finish()


if __name__ == "__main__":
    main()
