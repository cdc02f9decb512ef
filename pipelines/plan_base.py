"""What the plans of all runs share: what is refused, and the machines that a plan may assume."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from kernels.base import Cost, Kernel
from kernels.features.base import FeatureMap

from . import memory, solvers
from .errors import DoesNotFit
from .experiment import Experiment
from .fit import train_targets
from .pools import Pools, fit_rows
from .solvers.choose import COMFORT, IN_MEMORY
from .solvers.conjugate_gradient import ConjugateGradient
from .speed import Speed, features_at, nearest_folder
from .wording import bytes_text


@dataclass(frozen=True)
class Assumed:
    """Machines that are not there, to plan for; rates per second.

    name: of the profile that describes them. float64, float32: operations of a product in one worker;
    transcendentals: calls of exp, arccos or sqrt there. driver: operations of a float64 product in the driver.
    driver_bytes: its memory. disk_free: bytes; read: bytes of the disk, all workers together.
    """

    name: str
    float64: float
    float32: float
    transcendentals: float
    driver: float
    driver_bytes: int
    disk_free: int
    read: float

    def speed(self, kernel: Kernel, shape: tuple[int, ...], dtype: str) -> Speed:
        """Rates for a kernel, from what it says that an entry costs."""
        side = kernel.tile_side(dtype)
        one = kernel.cost(side, side, shape, np.dtype(dtype).itemsize)
        rate = self.float32 if dtype == "float32" else self.float64
        seconds = one.operations / rate + one.transcendentals / self.transcendentals
        return Speed(side**2 / seconds, self.driver, self.float64, self.float32, self.read)

    def map_speed(self, feature_map: FeatureMap, shape: tuple[int, ...], dtype: str) -> Speed:
        """Rates for a feature map, from what it says that its features cost; entries are single features."""
        rate = self.float32 if dtype == "float32" else self.float64
        features = features_at(feature_map, shape, dtype, rate, self.transcendentals)
        return Speed(features, self.driver, self.float64, self.float32, self.read)


@dataclass(frozen=True, kw_only=True)
class PlanBase(ABC):
    """What the plans of all runs say. All sizes in bytes, all times in seconds.

    path: name of the code that computes tiles or features; path_remark: why none quicker does, where it usually
    would. cost: of all that is computed before the solve, or in passes during it. samples_bytes: of what is kept on
    the disk of each sample before the matrix, or the features. worker: a worker's peak while it computes;
    worker_limit: what it may use. driver_limit: memory that is free. choice: of the solver, and what it takes.
    select: how the ridge is chosen, as in ``[solve]``. assumed: the profile of machines that are not there, or nothing.
    """

    experiment: str
    path: str
    path_remark: str
    cost: Cost
    samples_bytes: int
    disk_free: int
    workers: int
    worker: memory.TaskMemory
    worker_limit: int
    train: int
    driver_limit: int
    choice: solvers.Choice
    select: str
    root: Path
    assumed: str = ""

    @property
    def method(self) -> str:
        return self.choice.method

    @property
    def reason(self) -> str:
        return self.choice.reason

    @property
    def solve_bytes(self) -> int:
        """The driver's peak."""
        return self.choice.estimate.driver_bytes

    @property
    def solve_seconds(self) -> float:
        return self.choice.estimate.seconds

    @property
    @abstractmethod
    def solve_worker_bytes(self) -> int:
        """A worker's peak during the solve; 0 where none takes part."""

    @property
    @abstractmethod
    def worker_bytes(self) -> int:
        """A worker's peak, by what it has to compute."""

    @property
    def disk_bytes(self) -> int:
        return self.samples_bytes + self.choice.estimate.disk_bytes

    @property
    @abstractmethod
    def seconds(self) -> float:
        """Of the whole run."""

    @property
    @abstractmethod
    def way(self) -> dict[str, str]:
        """What was chosen where the experiment leaves it open, by the keys of its tables."""

    @property
    def comfortable(self) -> bool:
        """Whether it leaves of the driver's memory what a choice of our own leaves."""
        return self.method not in IN_MEMORY or self.solve_bytes <= COMFORT * self.driver_limit

    def going_on(self) -> Self:
        """The same, of a run that goes on in the way that an earlier one began with."""
        reason = f"{self.choice.estimate.name}: an earlier start began with it"
        return replace(self, choice=replace(self.choice, reason=reason))

    def worker_advice(self) -> str:
        """What would make a worker's peak fit."""
        fewer = int(self.workers * self.worker_limit / self.worker_bytes)
        return f"set {f'workers = {fewer} or more memory' if fewer else 'more memory'} in the cluster profile"

    def problems(self) -> list[str]:
        """Each thing that does not fit, with what would."""
        found = []
        if self.worker_bytes > self.worker_limit:
            found.append(
                f"a worker needs {bytes_text(self.worker_bytes)} at its peak and may use"
                f" {bytes_text(self.worker_limit)}; {self.worker_advice()}"
            )
        if self.choice.problem:
            found.append(self.choice.problem)
        if self.disk_bytes > self.disk_free:
            found.append(
                f"the stores need {bytes_text(self.disk_bytes)} more under {self.root} and"
                f" {bytes_text(self.disk_free)} are free; choose another --root, or make room (megagram store clean)"
            )
        return found

    def check(self) -> None:
        """Raise DoesNotFit when the run cannot fit this machine; the message says what would."""
        problems = self.problems()
        if problems:
            raise DoesNotFit("; ".join(problems))

    def json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "experiment": self.experiment,
            "select": self.select,
            "path": self.path,
            "operations": self.cost.operations,
            "transcendentals": self.cost.transcendentals,
            "disk_bytes": self.disk_bytes,
            "disk_free": self.disk_free,
            "workers": self.workers,
            "worker_peak_bytes": self.worker.total,
            "worker_limit_bytes": self.worker_limit,
            "solve_bytes": self.solve_bytes,
            "driver_limit_bytes": self.driver_limit,
            "solve_worker_bytes": self.solve_worker_bytes,
            "method": self.method,
            "passes": self.choice.estimate.passes,
            "reason": self.reason,
            "solve_seconds": self.solve_seconds,
            "task_seconds": self.choice.estimate.task_seconds,
            "seconds": self.seconds,
            "assumed": self.assumed or None,
            "fits": not self.problems(),
            "problems": self.problems(),
        }


def largest_solve(experiment: Experiment, pools: Pools, **of_matrix: Any) -> solvers.Problem:
    """The largest solve of a run. of_matrix: what is to be said of its matrix or features."""
    solve, split = experiment.solve, pools.split
    n = len(fit_rows(split)) if solve.refit else len(split.train)
    return solvers.Problem(
        n=n,
        columns=train_targets(pools, split.train).matrix.shape[1],
        ridges=len(solve.ridges),
        loo=solve.select == "loo",
        refit=solve.refit,
        max_iterations=solve.max_iterations or ConjugateGradient.max_iterations,
        shifts=tuple(ridge * (1 if solve.absolute else n) for ridge in solve.ridges),
        tolerance=solve.tolerance or ConjugateGradient.tolerance,
        **of_matrix,
    )


def rows_held(pools: Pools) -> int:
    """How many samples are predicted that no model is trained on."""
    return sum(0 if rows is None else len(rows) for rows in (pools.split.validation, pools.split.test))


def disk_free(root: Path) -> int:
    """Bytes that are free where a root is, or would be."""
    return shutil.disk_usage(nearest_folder(root)).free
