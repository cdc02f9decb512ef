"""Answers about this machine and about experiments, before anything is run."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.profiles import Profile
from cluster.worker import kernel_path_set
from kernels import costs
from kernels.base import Kernel
from kernels.fused import VARIABLE
from pipelines import experiment, matrices, memory, plan, pools, provenance, solvers, speed
from pipelines.plan import Plan
from pipelines.wording import bytes_text, seconds_text

from .engine import open_engine


def plans(study: experiment.Study, root: Path, profile: str) -> list[Plan]:
    """A plan for each experiment of a study, with the workers and memory that the profile comes to here, or
    assumes."""
    chosen = Profile.load(profile)
    resources = chosen.resources()
    with kernel_path_set(chosen):
        return [
            plan.make(
                one,
                pools.resolve(one),
                root.resolve(),
                workers=resources.workers,
                worker_bytes=resources.memory,
                on_devices=bool(resources.gpus) or chosen.assume is not None,
                assumed=_assumed(chosen),
            )
            for one in study.experiments
        ]


def _assumed(profile: Profile) -> plan.Assumed | None:
    assume = profile.assume
    if assume is None:
        return None
    return plan.Assumed(
        profile.name,
        assume.float64,
        assume.float32,
        assume.transcendentals,
        assume.driver,
        assume.driver_memory,
        assume.disk,
        assume.disk_read,
    )


def plan_rows(made: Plan) -> list[tuple[str, str, str]]:
    """Rows for a table: what, how much, remark."""
    rows = []
    for m in made.matrices:
        n, k = m.grid.n, m.grid.m
        what = f"{n} x {k} entries, tiles of {m.grid.side}, {len(m.stores)} stored per pass"
        present = m.needed_count - m.missing_count
        rows.append((f"tiles ({m.role})", f"{m.missing_count} missing, {present} present", what))
    cost, solve = made.cost, made.choice.estimate
    if made.recomputed:
        rows.append(("tiles", "none stored", f"computed at each of about {solve.passes} passes"))
    if made.assumed:
        rows.append(
            ("machines", f"{made.workers} assumed workers", f"profile {made.assumed}: nothing measured")
        )
    rows += [
        ("computed by", made.path, made.path_remark),
        (
            "operations",
            f"{cost.operations:.3g}",
            f"and {cost.transcendentals:.3g} calls of exp, arccos or sqrt",
        ),
        ("solved by", solve.name, made.reason),
        (
            "disk",
            bytes_text(made.disk_bytes),
            f"{bytes_text(made.solve_disk_bytes)} of it for the solve, and then free again;"
            f" {bytes_text(made.disk_free)} free under {made.root}",
        ),
        (
            "memory of a worker",
            bytes_text(max(made.worker.total, made.solve_worker_bytes)),
            f"tiles {bytes_text(made.worker.total)}, solve {bytes_text(made.solve_worker_bytes)};"
            f" each of {made.workers} may use {bytes_text(made.worker_limit)}",
        ),
        ("memory of the driver", bytes_text(made.solve_bytes), f"{bytes_text(made.driver_limit)} free"),
        (
            "expected time",
            seconds_text(made.seconds),
            f"tiles {seconds_text(made.gram_seconds)}, solve {seconds_text(made.solve_seconds)},"
            f" of which the driver hands out tasks for {seconds_text(solve.task_seconds)}"
            f" ({'by assumed rates' if made.assumed else 'calibrated just now'})",
        ),
    ]
    problems = made.problems()
    rows += [("does not fit", "", problem) for problem in problems]
    return rows


def shipped_rows() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Shipped experiments: name, kind, samples, expected time on this machine, description."""
    header: tuple[str, ...] = ("name", "kind", "training samples", "expected time", "description")
    speeds: dict[str, tuple[speed.Speed, float]] = {}
    workers = memory.cores()
    rows: list[tuple[str, ...]] = []
    for name, path in experiment.shipped().items():
        study = experiment.load(path)
        seconds = sum(_estimate(one, speeds, workers) for one in study.experiments)
        sizes = sorted({_size(one) for one in study.experiments})
        kind = f"table of {len(study.experiments)}" if study.is_table else "experiment"
        rows.append((name, kind, ", ".join(str(s) for s in sizes), seconds_text(seconds), study.description))
    return header, rows


def doctor_facts(root: Path) -> dict[str, str]:
    """Versions, BLAS, threads, GPU or why not, root reachable, which engine runs flows."""
    facts = dict(provenance.versions())
    blas = provenance.blas()
    facts["python"] = provenance.machine()["python"]
    facts["processor"] = f"{provenance.cpu_name()}, {memory.cores()} cores"
    facts["memory free"] = bytes_text(memory.available_bytes())
    facts["BLAS"] = f"{blas.get('library')} {blas.get('version')}, core type {blas.get('core_type')}"
    facts["BLAS threads"] = f"{blas.get('threads')} in this process, 1 in each worker"
    facts["GPU"] = provenance.gpu()
    facts |= {f"{path} path": state for path, state in provenance.paths().items()}
    facts["kernel path asked for"] = os.environ.get(VARIABLE, "auto")
    facts["root"] = _reachable(root)
    facts["plots"] = "matplotlib" if "matplotlib" in facts else "none: pip install 'megagram[plot]'"
    facts["flows"] = open_engine().name
    return facts


def _reachable(root: Path) -> str:
    """Whether a file can be written under a root, or under the folder that would hold it."""
    folder = root.resolve()
    while not folder.exists():
        folder = folder.parent
    probe = folder / f".megagram-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return f"{root.resolve()}: cannot be written ({error.strerror})"
    state = "exists" if root.exists() else "will be made"
    return f"{root.resolve()}: writable, {state}"


# Samples of the named data sets: list must not read them.
CLASSES = 10
"""Of the shipped experiments' targets."""

_SHAPES: dict[str, tuple[int, ...]] = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion-mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
}


def _size(one: experiment.Experiment) -> int:
    train = one.data.train
    unmoved = train if isinstance(train, int) else train[1] - train[0]
    return unmoved * (1 + (one.data.shifts or 0))


def _estimate(
    one: experiment.Experiment, speeds: dict[str, tuple[speed.Speed, float]], workers: int
) -> float:
    """Seconds on this machine from the number of entries alone; data are not read.

    One kernel of each kind is timed; the others of its kind follow by what they say they cost.
    """
    kernel = matrices.run_kernel(one)
    shape = pools.kernel_shape(kernel.inputs, _SHAPES[one.data.source])
    work = _work(kernel, shape)
    if kernel.kind not in speeds:
        speeds[kernel.kind] = speed.calibrate(kernel, shape, one.gram.dtype), work
    rates, timed = speeds[kernel.kind]
    n = _size(one)
    held = sum(_count(part) for part in (one.data.validation, one.data.test))
    entries = n * (n + 1) // 2 + n * held
    itemsize = np.dtype(one.gram.dtype).itemsize
    solve = one.solve
    problem = solvers.Problem(
        n=n,
        columns=CLASSES,
        ridges=len(solve.ridges),
        tiles=one.gram.tiles,
        loo=solve.select == "loo",
        refit=solve.refit,
        dtype=solve.dtype,
        itemsize=itemsize,
        side=kernel.tile_side(one.gram.dtype),
        missing_entries=entries,
        missing_bytes=entries * itemsize,
        predicted=n * held,
        centres=solve.centres or 0,
        max_iterations=solve.max_iterations or 0,
    )
    available = memory.available_bytes()
    scaled = replace(rates, entries=rates.entries * timed / work)
    means = solvers.Means(workers, available, available // max(workers, 1), sys.maxsize, scaled)
    return solvers.choose(solve.method, problem, means).estimate.total_seconds


def _work(kernel: Kernel, shape: tuple[int, ...]) -> float:
    """How long one entry takes, in a unit of the kernel's kind."""
    cost = kernel.cost(1, 1, shape)
    if cost.products:
        return costs.seconds(cost, 4)
    # A call of exp or arccos takes about as long as twenty operations of a product.
    return cost.operations + 20 * cost.transcendentals


def _count(part: Any) -> int:
    if part is None:
        return 0
    if isinstance(part, int):
        return part
    return part[1] - part[0] if isinstance(part, tuple) else part.random
