"""Experiments over random samples, and the stages of a run without its engine, for the benchmarks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from kernels.base import Kernel
from pipelines import features, gram, plan, pools, tasks
from pipelines.experiment import Experiment
from pipelines.stores import GramStore
from pipelines.tiles import Grid, Tile

EXPONENTIAL = {"kind": "dot-product", "kernel": "exponential", "sigma": 0.6}


def layers(*table: tuple[str, int], patch: int = 3) -> list[dict[str, Any]]:
    """Layers of (kernel, subsampling) with gaussian pooling; exponential ones have sigma 0.6."""
    sigma = {"exponential": {"sigma": 0.6}}
    return [
        {"patch": patch, "kernel": kernel, "subsampling": t, **sigma.get(kernel, {})} for kernel, t in table
    ]


def convolutional(*table: tuple[str, int], tangent: bool = False) -> dict[str, Any]:
    return {"kind": "convolutional", "tangent": tangent, "layers": layers(*table)}


@contextmanager
def folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk of temporary files unless told otherwise."""
    path = Path(mkdtemp(prefix="megagram-benchmark-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def save_samples(root: Path, n: int, shape: tuple[int, ...]) -> None:
    """n random samples of ``shape`` in [0, 1), and ten classes, as files."""
    rng = np.random.default_rng(0)
    np.save(root / "X.npy", rng.random((n, *shape), dtype=np.float32))
    np.save(root / "y.npy", rng.integers(0, 10, n))


@dataclass
class Matrix:
    """The matrix of a kernel over a pool of samples, ready to be computed: stage by stage, into any folder."""

    pools: pools.Pools
    kernel: Kernel
    dtype: str

    @classmethod
    def of(cls, experiment: Experiment) -> Matrix:
        return cls(pools.resolve(experiment), plan.run_kernel(experiment), experiment.gram.dtype)

    @property
    def grid(self) -> Grid:
        n = self.pools.pool_axis.rows
        return Grid(n, n, self.kernel.tile_side(self.dtype), symmetric=True)

    @property
    def tiles(self) -> set[Tile]:
        rows = np.arange(self.grid.n)
        return self.grid.touched(rows, rows)

    @property
    def entries(self) -> int:
        """Entries that are computed: those of the lower triangle's tiles."""
        return sum(self.grid.entries(tile) for tile in self.tiles)

    def features(self, root: Path, workers: tasks.Open) -> Path:
        rows = np.arange(self.grid.n)
        return Path(features.materialise(self.pools, self.kernel, self.dtype, root, rows, workers).store)

    def stores(self, root: Path) -> list[GramStore]:
        return gram.open_stores(self.pools, self.kernel, self.dtype, root)

    def assemble(
        self,
        root: Path,
        prepared: Path,
        workers: tasks.Open,
        tiles: set[Tile] | None = None,
        *,
        tile_seconds: float,
        memory_bytes: int,
    ) -> list[gram.GramReport]:
        return gram.assemble(
            self.kernel,
            self.stores(root),
            prepared,
            prepared,
            self.tiles if tiles is None else tiles,
            workers,
            tile_seconds=tile_seconds,
            memory_bytes=memory_bytes,
        )


def experiment(root: Path, n: int, kernel: dict[str, Any], dtype: str = "float32") -> Experiment:
    """An experiment over the samples that ``save_samples`` left in ``root``."""
    data = {"source": "arrays", "X": str(root / "X.npy"), "y": str(root / "y.npy"), "train": n}
    return Experiment.model_validate(
        {
            "name": "benchmark",
            "data": data,
            "kernel": kernel,
            "gram": {"dtype": dtype},
            "solve": {"ridges": [1e-3], "select": "loo"},
        }
    )


def here() -> tasks.Workers:
    """No cluster: tasks run in this process."""
    return tasks.Workers()
