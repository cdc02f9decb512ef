"""Answers about this machine and about experiments, before anything is run."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.profiles import Profile
from cluster.worker import kernel_path_set
from kernels import costs
from kernels.base import Kernel, KernelError
from kernels.fused import asked
from pipelines import begun, experiment, matrices, memory, plan, pools, provenance, solvers, speed
from pipelines.explicit import feature_plan
from pipelines.explicit.feature_plan import FeaturePlan
from pipelines.plan import Plan
from pipelines.wording import bytes_text, seconds_text

from .engine import open_engine


def plans(study: experiment.Study, root: Path, profile: str) -> list[Plan | FeaturePlan]:
    """A plan for each experiment of a study, with the workers and memory that the profile comes to here, or
    assumes."""
    chosen = Profile.load(profile)
    resources = chosen.resources()
    made: list[Plan | FeaturePlan] = []
    with kernel_path_set(chosen):
        for one in study.experiments:
            make: Callable[..., Plan | FeaturePlan] = plan.make if one.features is None else feature_plan.make
            made.append(
                begun.planned(
                    make,
                    one,
                    pools.resolve(one),
                    root.resolve(),
                    workers=resources.workers,
                    worker_bytes=resources.memory,
                    on_devices=bool(resources.gpus) or chosen.assume is not None,
                    assumed=_assumed(chosen),
                )
            )
    return made


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
    facts["kernel path asked for"] = _path_asked_for()
    facts["root"] = _reachable(root)
    facts["plots"] = "matplotlib" if "matplotlib" in facts else "none: pip install 'megagram[plot]'"
    facts["flows"] = open_engine().name
    return facts


def _path_asked_for() -> str:
    """The kernel path of the environment, or what is wrong with it."""
    try:
        return asked()
    except KernelError as error:
        return str(error)


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
    if one.features is not None:
        return _feature_estimate(one, speeds, workers)
    kernel = matrices.run_kernel(one)
    shape = pools.kernel_shape(kernel.inputs, _SHAPES[one.data.source])
    work = _work(kernel, shape)
    if kernel.kind not in speeds:
        speeds[kernel.kind] = speed.calibrate(kernel, shape, one.gram.dtype), work
    rates, timed = speeds[kernel.kind]
    n = _size(one)
    held = _held(one)
    problem = replace(
        _problem(one),
        tiles=one.gram.tiles,
        dtype=one.solve.dtype,
        side=kernel.tile_side(one.gram.dtype),
        missing_entries=n * (n + 1) // 2 + n * held,
        predicted=n * held,
        centres=one.solve.centres or 0,
    )
    available = memory.available_bytes()
    scaled = replace(rates, entries=rates.entries * timed / work)
    means = solvers.Means(workers, available, available // max(workers, 1), sys.maxsize, scaled)
    return solvers.choose(one.solve.method, problem, means).estimate.total_seconds


def _feature_estimate(
    one: experiment.Experiment, speeds: dict[str, tuple[speed.Speed, float]], workers: int
) -> float:
    """As ``_estimate``, for an experiment with features: from what the map says that they cost."""
    feature_map, dtype = one.feature_map, one.gram.dtype
    assert feature_map is not None
    shape = pools.kernel_shape(feature_map.inputs, _SHAPES[one.data.source])
    if "features" not in speeds:
        speeds["features"] = speed.calibrate_map(feature_map, None, shape, dtype), 1.0
    rates, _ = speeds["features"]
    n, held, width = _size(one), _held(one), feature_map.width(shape)
    single = rates.worker_single if dtype == "float32" else rates.worker
    call = costs.RATES[np.dtype(dtype).itemsize].transcendental
    pace = speed.features_at(feature_map, shape, dtype, speed.MAP_EFFICIENCY * single, 1 / call)
    problem = replace(
        _problem(one),
        side=feature_map.tile_side(dtype),
        missing_entries=(n + held) * width,
        predicted=held * width,
    )
    available = memory.available_bytes()
    means = solvers.Means(
        workers, available, available // max(workers, 1), sys.maxsize, replace(rates, entries=pace)
    )
    solving = solvers.choose_primal(one.solve.method, problem, width, means).estimate.total_seconds
    return feature_map.learning_cost(n, shape).operations / single + solving


def _problem(one: experiment.Experiment) -> solvers.Problem:
    """What the solves of both sorts have in common, by the experiment's table alone."""
    solve = one.solve
    return solvers.Problem(
        n=_size(one),
        columns=CLASSES,
        ridges=len(solve.ridges),
        loo=solve.select == "loo",
        refit=solve.refit,
        itemsize=np.dtype(one.gram.dtype).itemsize,
        max_iterations=solve.max_iterations or 0,
    )


def _held(one: experiment.Experiment) -> int:
    """Validation and test samples."""
    return sum(_count(part) for part in (one.data.validation, one.data.test))


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
