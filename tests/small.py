"""Small synthetic experiments, and their stages run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.base import Kernel
from kernels.convolutional import Convolutional
from kernels.features.base import FeatureMap
from pipelines import features, fit, gram, matrices, pools, solvers, tasks
from pipelines.errors import NumericalError
from pipelines.experiment import Experiment
from pipelines.stores import GramStore

MEMORY = 2**30


def use_tile_side(side: int, set_attribute: Callable[..., None]) -> None:
    """Give every kernel tiles of ``side`` samples; workers learn the side from the stores."""
    for kernel in (Kernel, Convolutional, FeatureMap):
        set_attribute(kernel, "tile_sides", {"float32": side, "float64": side})


@dataclass
class Samples:
    """Samples of three classes, written to .npy files; growing them keeps the first ones as they are."""

    folder: Path
    seed: int = 0
    d: int = 5
    n: int = field(default=0, init=False)

    def arrays(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n samples (n, d) float64 and their labels (n,) int64."""
        rng = np.random.default_rng(self.seed)
        rows = [(rng.integers(3), rng.standard_normal(self.d)) for _ in range(n)]
        y = np.array([label for label, _ in rows])
        return np.array([noise for _, noise in rows]) + 2.0 * y[:, None], y

    def write(self, n: int, part: str = "") -> Samples:
        self.folder.mkdir(parents=True, exist_ok=True)
        X, y = self.arrays(n)
        np.save(self.folder / f"X{part}.npy", X)
        np.save(self.folder / f"y{part}.npy", y)
        self.n = n
        return self

    def table(self, **sections: dict[str, Any]) -> dict[str, Any]:
        """An experiment's table over these samples; keys of ``sections`` are merged into its tables."""
        table: dict[str, Any] = {
            "name": "small",
            "data": {
                "source": "arrays",
                "X": str(self.folder / "X.npy"),
                "y": str(self.folder / "y.npy"),
                "train": 40,
                "validation": 12,
            },
            "kernel": {"kind": "dot-product", "kernel": "exponential", "sigma": 1.0},
            "gram": {"dtype": "float64"},
            "solve": {"ridges": [1e-2, 1e-3]},
        }
        for key, values in sections.items():
            replaced = key == "kernel" or not isinstance(values, dict)
            table[key] = values if replaced else {**table.get(key, {}), **values}
        return table

    def experiment(self, **sections: Any) -> Experiment:
        return Experiment.model_validate(self.table(**sections))


@dataclass
class Made:
    """Stores of a run in this process by role (``train``, ``test``), one for each output, and their reports."""

    pools: pools.Pools
    kernel: Kernel
    stores: dict[str, list[GramStore]]
    reports: dict[str, list[gram.GramReport]]
    features: list[features.FeatureReport]

    @property
    def store(self) -> GramStore:
        """The pool's matrix of the last output, which is the experiment's own."""
        return self.stores["train"][-1]

    @property
    def computed(self) -> dict[str, int]:
        return {role: reports[-1].computed for role, reports in self.reports.items()}

    def dense(self, role: str = "train", output: int = -1) -> np.ndarray:
        """All tiles of a store; NaN where there is none."""
        store = self.stores[role][output]
        K = np.full(store.shape, np.nan)
        for i, j in store.present():
            rows, columns = store.grid.extent((i, j))
            K[rows, columns] = store.read_tile(i, j)
            if store.symmetric:
                K[columns, rows] = K[rows, columns].T
        return K


def make(
    experiment: Experiment,
    root: Path,
    workers: tasks.Open = tasks.Workers,
    progress: features.Progress = features.silent,
) -> Made:
    """Run the stages ``features`` and ``gram`` of an experiment."""
    resolved = pools.resolve(experiment)
    kernel, dtype = matrices.run_kernel(experiment), experiment.gram.dtype
    left = features.materialise(resolved, kernel, dtype, root, resolved.split.pool_rows, workers)
    made = Made(resolved, kernel, {}, {}, [left])
    for matrix in matrices.matrix_plans(experiment, resolved, kernel, root):
        above = left
        if matrix.role == "test":
            assert resolved.split.test is not None
            above = features.materialise(
                resolved, kernel, dtype, root, resolved.split.test, workers, test=True
            )
            made.features.append(above)
        stores = gram.open_stores(resolved, kernel, dtype, root, test=matrix.role == "test")
        made.stores[matrix.role] = stores
        made.reports[matrix.role] = gram.assemble(
            kernel,
            stores,
            Path(above.store),
            Path(left.store),
            matrix.needed,
            workers,
            tile_seconds=1.0,
            memory_bytes=MEMORY,
            progress=progress,
        )
    return made


def chosen(method: str = "cholesky", tiles: str = "stored") -> solvers.Choice:
    """A choice that nobody estimated."""
    return solvers.Choice(solvers.Estimate(method, tiles, 0.0, 0.0, 0, 0, 0, rank_bytes=2**20), "asked for")


def evaluate(experiment: Experiment, root: Path, folder: Path, method: str = "cholesky") -> dict[str, Any]:
    """Run the stages up to the solve; the evaluation. ``folder`` gets the model's arrays."""
    made = make(experiment, root)
    folder.mkdir(parents=True, exist_ok=True)
    cross = made.stores["test"][-1] if "test" in made.stores else None
    place = fit.Place(root, tasks.Workers, MEMORY)
    return fit.fit(experiment, made.pools, made.store, cross, folder, choice=chosen(method), place=place)


def refused_tile(samples: Samples, root: Path) -> GramStore:
    """The store of a run that refuses tile 1/1, of 16 samples a side: the value of sample 20 with itself overflows."""
    X, _ = samples.arrays(samples.n)
    X[20] *= 1e5
    np.save(samples.folder / "X.npy", X)
    one = samples.experiment(kernel={"kind": "dot-product", "kernel": "linear", "scale": 1e299})
    with pytest.raises(NumericalError, match=r"tile 1/1 .* samples 20 and 20"):
        make(one, root)
    (path,) = (root / "gram").iterdir()
    store = GramStore(path)
    assert (1, 1) not in store.present()
    return store
