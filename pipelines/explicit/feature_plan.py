"""The plan of a run with explicit features: what learning, computing and solving with them would take.

Features are stored, or streamed (computed whenever a block is read): by cost, unless the experiment says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from kernels.base import Cost
from kernels.features.base import FeatureMap
from kernels.features.nystrom import NystromFeatures

from .. import features, memory, solvers
from ..errors import StoreError
from ..experiment import Experiment
from ..features import prepared_description, preprocessed_description
from ..inventory import resumable_bytes
from ..plan_base import Assumed, PlanBase, disk_free, largest_solve, rows_held
from ..pools import Pools, kernel_shape
from ..speed import Ask, Speed, calibrate_map, here, map_path, read_rate
from ..stores import FeatureStore, existing
from ..wording import bytes_text, seconds_text
from . import mapfiles, maps

WORTH = 1.5
"""So many times quicker must streaming be to be preferred: features that are stored serve later runs as well."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of features of one axis, the pool's or the test set's: how many are needed, how many of them stored."""

    role: str
    needed: int
    present: int

    @property
    def missing(self) -> int:
        return self.needed - self.present


@dataclass(frozen=True, kw_only=True)
class FeaturePlan(PlanBase):
    """What a run of one experiment with features would do. All sizes in bytes, all times in seconds.

    map: its kind. width: features of one sample. side: samples in a block. blocks: by axis. streamed: whether
    features are computed whenever they are read, and why: ``blocks_reason``. learning: cost of what the map learns,
    nothing where it is stored; learning_seconds: its time. cost: of all features that are computed before the solve,
    or in all passes over them. worker: a worker's peak while it computes a block.
    """

    map: str
    width: int
    side: int
    dtype: str
    blocks: tuple[Blocks, ...]
    streamed: bool
    blocks_reason: str
    learning: Cost
    learning_seconds: float

    @property
    def blocks_missing(self) -> int:
        return 0 if self.streamed else sum(one.missing for one in self.blocks)

    @property
    def feature_seconds(self) -> float:
        """To compute what is stored first."""
        return self.choice.estimate.matrix_seconds

    @property
    def solve_bytes(self) -> int:
        """The driver's peak: in learning, or in the solve."""
        return max(self.choice.estimate.driver_bytes, self.learning.scratch_bytes)

    @property
    def solve_worker_bytes(self) -> int:
        """A worker's peak during the solve, where blocks that are streamed are computed as well; 0 without workers."""
        solving = self.choice.estimate.worker_bytes
        return (
            solving + self.worker.total - memory.WORKER_BASE_BYTES if self.streamed and solving else solving
        )

    @property
    def seconds(self) -> float:
        return self.learning_seconds + self.feature_seconds + self.solve_seconds

    @property
    def worker_bytes(self) -> int:
        computes = self.streamed or self.blocks_missing > 0
        return max(self.worker.total if computes else 0, self.solve_worker_bytes)

    @property
    def way(self) -> dict[str, str]:
        return {"method": self.method, "blocks": "streamed" if self.streamed else "stored"}

    def going_on(self) -> Self:
        return replace(super().going_on(), blocks_reason="as an earlier start began")

    def worker_advice(self) -> str:
        return f"{super().worker_advice()}, or fewer features than {self.width}"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.learning.scratch_bytes > self.driver_limit:
            found.append(
                f"learning the {self.map} map needs {bytes_text(self.learning.scratch_bytes)} of memory and"
                f" {bytes_text(self.driver_limit)} are free; take fewer features than {self.width}"
            )
        return found

    def json(self) -> dict[str, Any]:
        return {
            **super().json(),
            "map": self.map,
            "width": self.width,
            "blocks": {
                one.role: {
                    "needed": one.needed,
                    "present": one.present,
                    "missing": one.missing,
                    "side": self.side,
                }
                for one in self.blocks
            },
            "blocks_missing": self.blocks_missing,
            "streamed": self.streamed,
            "blocks_reason": self.blocks_reason,
            "learning_operations": self.learning.operations,
            "learning_seconds": self.learning_seconds,
            "feature_seconds": self.feature_seconds,
        }


def make(
    experiment: Experiment,
    pools: Pools,
    root: Path,
    *,
    workers: int,
    worker_bytes: int,
    on_devices: bool = False,
    speed: Speed | None = None,
    ask: Ask = here,
    assumed: Assumed | None = None,
) -> FeaturePlan:
    """The plan of an experiment with ``[features]`` over resolved pools; arguments as of ``plan.make``.

    speed: its entries are features, single numbers, per second of one worker.

    Raises:
        KernelError: the map cannot take the samples.
        ExperimentError: an option of ``[solve]`` does not fit the samples.
    """
    feature_map = experiment.feature_map
    assert feature_map is not None
    dtype = experiment.gram.dtype
    shape = kernel_shape(feature_map.inputs, pools.preprocessing.output_shape(pools.raw_shape))
    feature_map.check(shape)
    feature_map.check_count(len(pools.split.train), shape)
    known, learned = _known(feature_map, pools, dtype, root)
    learning = Cost(0.0, 0.0, 0)
    if feature_map.learns and learned is None:
        learning = feature_map.learning_cost(len(pools.split.train), shape, np.dtype(dtype).itemsize)
    task = _Task(experiment, pools, root, known, shape)
    if assumed is None:
        path = ask(map_path)
        remark = ""
        speed = speed or replace(
            calibrate_map(known, learned, shape, dtype, ask=ask), read=read_rate(root, task.stored_bytes)
        )
        driver_bytes = memory.available_bytes()
        free = disk_free(root) + resumable_bytes(root, experiment.name)
    else:
        path, remark = "assumed machines", f"rates of profile {assumed.name}, none of them measured"
        speed = assumed.map_speed(feature_map, shape, dtype)
        driver_bytes, free = assumed.driver_bytes, assumed.disk_free
    means = solvers.Means(workers, driver_bytes, worker_bytes, max(free - task.preparing_bytes, 0), speed)
    choice, streamed, reason = task.choose(means)
    passes = choice.estimate.passes if streamed else 0
    streaming = passes * len(pools.split.train) * task.whole_blocks + rows_held(pools)
    rows = streaming if streamed else task.missing_rows
    one = feature_map.feature_cost(task.side, shape, task.itemsize)
    share = rows / task.side
    return FeaturePlan(
        experiment=experiment.name,
        path=path,
        path_remark=remark,
        cost=Cost(share * one.operations, share * one.transcendentals, one.scratch_bytes),
        samples_bytes=task.preparing_bytes,
        disk_free=free,
        workers=workers,
        worker=task.worker_memory(one.scratch_bytes),
        worker_limit=worker_bytes,
        train=task.problem.n,
        driver_limit=driver_bytes,
        choice=choice,
        select=experiment.solve.select,
        root=root,
        assumed=assumed.name if assumed else "",
        map=feature_map.kind,
        width=task.width,
        side=task.side,
        dtype=dtype,
        blocks=task.blocks,
        streamed=streamed,
        blocks_reason=reason,
        learning=learning,
        # In this process, on one thread, as a worker computes.
        learning_seconds=learning.operations / _rate(speed, dtype),
    )


def _rate(speed: Speed, dtype: str) -> float:
    """Of a product in one worker."""
    return speed.worker_single if dtype == "float32" else speed.worker


def _known(feature_map: FeatureMap, pools: Pools, dtype: str, root: Path) -> tuple[FeatureMap, Path | None]:
    """The map with what it learned, and the folder of that, where it is stored."""
    if not feature_map.learns:
        return feature_map, None
    folder = maps.place(pools, feature_map, dtype, root, pools.split.train)
    try:
        return mapfiles.read(folder), folder
    except StoreError:  # not there yet, or damaged: it will be learned
        return feature_map, None


class _Task:
    """What there is to compute: rows, blocks and bytes of features, and the largest solve with them.

    map: with what it learned, where that is known.
    """

    def __init__(
        self,
        experiment: Experiment,
        pools: Pools,
        root: Path,
        feature_map: FeatureMap,
        shape: tuple[int, ...],
    ) -> None:
        self.experiment, self.pools, self.root, self.map = experiment, pools, root, feature_map
        dtype = experiment.gram.dtype
        self.itemsize = np.dtype(dtype).itemsize
        self.width = feature_map.width(shape)
        self.side = features.block_side(feature_map, shape, dtype)
        self.sample_bytes = int(np.prod(shape)) * self.itemsize
        split = pools.split
        counted = [self._counted("train", split.pool_rows)]
        if split.test is not None and not split.test_in_pool:
            counted.append(self._counted("test", split.test))
        self.blocks = tuple(blocks for blocks, _ in counted)
        self.missing_rows = sum(rows for _, rows in counted)

    def _counted(self, role: str, rows: np.ndarray) -> tuple[Blocks, int]:
        """Blocks of an axis that the run needs, and the rows of those that are not stored: blocks are whole."""
        pools, test = self.pools, role == "test"
        axis = pools.test_axis if test else pools.pool_axis
        needed = np.unique(rows // self.side).tolist()
        present: set[int] = set()
        if self.map.learned or not self.map.learns:
            described = prepared_description(pools, self.map, self.experiment.gram.dtype, test=test)
            found = existing(self.root, FeatureStore.kind, {**described, "side": self.side}, [axis])
            if found:
                store = FeatureStore(found[0])
                present = {k for k in needed if k < store.block_count and store.has(k)}
        missing = [k for k in needed if k not in present]
        return Blocks(role, len(needed), len(present)), sum(
            min((k + 1) * self.side, axis.rows) - k * self.side for k in missing
        )

    @property
    def whole_blocks(self) -> float:
        """How many rows are computed for each training row that is asked for: blocks are whole."""
        rows, axis = self.pools.split.train, self.pools.pool_axis.rows
        touched = np.unique(rows // self.side)
        return float(np.minimum((touched + 1) * self.side, axis).sum() - touched.sum() * self.side) / len(
            rows
        )

    @property
    def stored_bytes(self) -> int:
        """Of all features that the run needs, where they are stored."""
        return sum(one.needed for one in self.blocks) * self.block_bytes

    @property
    def block_bytes(self) -> int:
        return self.side * self.width * self.itemsize

    @property
    def preparing_bytes(self) -> int:
        """Raw samples, and preprocessed ones where those are stored too, that may not be stored yet."""
        pools = self.pools
        raw = pools.train.X.nbytes + (pools.test.X.nbytes if pools.test is not None else 0)
        described = preprocessed_description(pools, self.experiment.gram.dtype)
        there = existing(self.root, "pools", pools.pool_description, [pools.pool_axis])
        if not pools.preprocessing.expensive:
            return 0 if there else raw
        described = {**described, "side": features.PREPROCESSED_SIDE}
        if existing(self.root, FeatureStore.kind, described, [pools.pool_axis]):
            return 0
        rows = len(pools.split.pool_rows)
        if pools.split.test is not None and not pools.split.test_in_pool:
            rows += len(pools.split.test)
        return rows * self.sample_bytes + (0 if there else raw)

    @property
    def problem(self) -> solvers.Problem:
        """The largest solve, of features that are stored first."""
        return largest_solve(
            self.experiment,
            self.pools,
            itemsize=self.itemsize,
            side=self.side,
            missing_entries=self.missing_rows * self.width,
            missing_bytes=sum(one.missing for one in self.blocks) * self.block_bytes,
            predicted=rows_held(self.pools) * self.width,
            whitened=isinstance(self.map, NystromFeatures),
        )

    def choose(self, means: solvers.Means) -> tuple[solvers.Choice, bool, str]:
        """The solver; whether features are streamed; and why."""
        wanted = "auto" if self.experiment.features is None else self.experiment.features.blocks
        method, problem, speed = self.experiment.solve.method, self.problem, means.speed
        stored = solvers.choose_primal(method, problem, self.width, means)
        # A block that is computed when it is read comes at the rate at which all workers compute.
        pace = means.workers * speed.entries * self.itemsize / self.whole_blocks
        computing = replace(speed, read=pace)
        none_missing = replace(problem, missing_entries=0, missing_bytes=0)
        streamed = solvers.choose_primal(method, none_missing, self.width, replace(means, speed=computing))
        if wanted != "auto":
            return (streamed, True, "asked for") if wanted == "streamed" else (stored, False, "asked for")
        if not problem.missing_entries:
            return stored, False, "they are stored already"
        if stored.estimate.disk_bytes > means.disk_free:
            lacking = f"storing them needs {bytes_text(stored.estimate.disk_bytes)}"
            return streamed, True, f"{lacking} and {bytes_text(means.disk_free)} of disk are free"
        writing = problem.missing_bytes / speed.read
        times = [stored.estimate.total_seconds + writing, streamed.estimate.total_seconds]
        said = [f"{verb} takes about {seconds_text(t)}" for verb, t in zip(_VERBS, times, strict=True)]
        if WORTH * times[1] < times[0]:
            return streamed, True, f"{said[1]} in all, {said[0]}"
        return stored, False, f"{said[0]} in all, {said[1]}"

    def worker_memory(self, scratch_bytes: int) -> memory.TaskMemory:
        """Of a worker that computes one block: samples, features, and the copies of the codec that writes them."""
        arrays = self.map.arrays or {}
        learned = sum(values.nbytes for values in arrays.values())
        scratch = min(scratch_bytes, max(features.SCRATCH_BYTES, math.ceil(scratch_bytes / self.side)))
        return memory.TaskMemory(
            memory.WORKER_BASE_BYTES,
            2 * self.side * self.sample_bytes + 2 * learned,
            (1 + memory.WRITTEN_CHUNKS) * self.block_bytes,
            scratch,
        )


_VERBS = ("storing them", "computing them at every pass")
