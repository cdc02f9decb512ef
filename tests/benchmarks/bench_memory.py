"""A worker's measured peak memory against what the plan said.

One worker of a real local cluster prepares the samples and computes the whole matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import common

# All else is imported by functions: workers import this file, and should import no more than a run's do.
if TYPE_CHECKING:
    from pipelines.memory import TaskMemory

WORKER = 4 * 2**30
ALLOWED = 0.2


def main() -> None:
    from workload import EXPONENTIAL, convolutional

    options = common.options(__doc__)
    report = common.Report("memory", "A worker's peak memory against its plan", options)
    n = 8_000 if options.quick else 20_000
    ntk = {"kind": "fully-connected", "family": "ntk", "depth": 3}
    relu = convolutional(("relu", 2), ("relu", 5), tangent=True)
    cases: list[tuple[str, dict[str, Any], int, tuple[int, ...], str]] = [
        (f"exponential, n = {n:,}, d = 784, float32", EXPONENTIAL, n, (784,), "float32"),
        (f"exponential, n = {n // 2:,}, d = 784, float64", EXPONENTIAL, n // 2, (784,), "float64"),
        (f"RF and NTK, 3 layers, n = {n:,}, d = 784, float32", ntk, n, (784,), "float32"),
        (
            "model (a), n = 64, 32x32x3, float32",
            convolutional(("exponential", 2), ("exponential", 5)),
            64,
            (32, 32, 3),
            "float32",
        ),
        ("ReLU RF and NTK 2-5, n = 64, 32x32x3, float32", relu, 64, (32, 32, 3), "float32"),
    ]
    for what, kernel, samples, shape, dtype in cases:
        planned, measured = peaks(kernel, samples, shape, dtype)
        report.add(
            what,
            f"{common.megabytes(measured)}, planned {common.megabytes(planned.total)}",
            target="within 20 %",
            ratio=f"{measured / planned.total:.2f}",
            met=abs(measured / planned.total - 1) <= ALLOWED,
        )
        report.note(
            f"{what}: planned base {common.megabytes(planned.base)}, blocks"
            f" {common.megabytes(planned.blocks)}, tile {common.megabytes(planned.tile)}, scratch"
            f" {common.megabytes(planned.scratch)}"
        )
    report.finish()


def peaks(kernel: dict[str, Any], n: int, shape: tuple[int, ...], dtype: str) -> tuple[TaskMemory, int]:
    """What the plan says of a worker, and the peak that a fresh worker reports after the work."""
    from workload import Matrix, experiment, folder, save_samples

    from cluster.local import open_cluster
    from cluster.profiles import Profile
    from pipelines import memory, plan, tasks

    with folder(common.RAM_DISK) as root:
        save_samples(root, n, shape)
        described = experiment(root, n, kernel, dtype)
        matrix = Matrix.of(described)
        planned = plan.make(described, matrix.pools, root, workers=1, worker_bytes=WORKER).worker
        with open_cluster(Profile(workers=1, memory=WORKER, scratch=str(common.RAM_DISK))) as client:
            assert client is not None
            workers = tasks.Workers(client, 1)
            prepared = matrix.features(root, lambda: workers)
            matrix.assemble(root, prepared, lambda: workers, tile_seconds=0.5, memory_bytes=WORKER)
            (measured,) = client.run(memory.peak_bytes).values()
    return planned, measured


if __name__ == "__main__":
    main()
