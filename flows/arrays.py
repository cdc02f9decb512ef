"""The Gram matrix of a user's own arrays: tiles in a folder beside the output, finally one dense file."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cluster.profiles import Profile
from cluster.watchdog import explain
from kernels.base import Kernel
from pipelines import datasets, features, gram, pools, speed
from pipelines.array_files import open_array
from pipelines.errors import DataError, DoesNotFit, ExperimentError
from pipelines.experiment import read_kernel
from pipelines.files import disk_errors
from pipelines.preprocessing import Preprocessing
from pipelines.stores import GramStore
from pipelines.wording import bytes_text

from .machines import Cluster
from .work import Display


def gram_of_arrays(
    kernel_file: Path, x: Path, y: Path | None, out: Path, dtype: str, profile: str, display: Display
) -> dict[str, Any]:
    """Compute K(X, Y), or K(X, X) where ``y`` is None, into ``out`` (.npy or .zarr), dense.

    Until it is done, tiles lie in ``<out>.parts``; run the same command again to go on after a crash.
    Returns path, shape, tiles computed and reused, tiles by the code that computed them, seconds.

    Raises:
        ExperimentError: an output that exists or has another ending, a bad dtype or kernel.
        DataError: arrays that the kernel cannot take, or values that are not finite.
        DoesNotFit: no room on the disk for tiles and the dense matrix.
    """
    started = time.perf_counter()
    if out.suffix not in (".npy", ".zarr"):
        raise ExperimentError(f"--out {out}: the matrix is written as .npy or .zarr")
    if not out.resolve().parent.is_dir():
        raise ExperimentError(f"--out {out}: there is no folder {out.resolve().parent}")
    if out.exists():
        raise ExperimentError(f"--out {out}: exists already; remove it or choose another name")
    if dtype not in ("float32", "float64"):
        raise ExperimentError(f"--dtype {dtype}: must be float32 or float64")
    kernel = read_kernel(kernel_file)
    samples = _pools(kernel, x, y)
    _check_disk(samples, kernel, dtype, out)
    root = out.with_name(out.name + ".parts")
    with Cluster(Profile.load(profile), root, display.line) as cluster:
        shape = pools.kernel_shape(kernel.inputs, samples.raw_shape)
        cluster.say_path(*cluster.ask(speed.path_of, kernel, shape, dtype))
        store, report = _assemble(kernel, samples, dtype, root, cluster, display)
        paths = Counter(line["path"] for line in gram.made_by(store, store.present()))
    display.stage(out.name, "dense matrix")
    _export(store, out, root, transposed=y is not None)
    shutil.rmtree(root)
    return {
        "out": str(out),
        "shape": [len(samples.train.X), len(samples.train.X if samples.test is None else samples.test.X)],
        "dtype": dtype,
        "tiles_computed": report.computed,
        "tiles_reused": report.reused + report.by_others,
        "paths": dict(paths),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _pools(kernel: Kernel, x: Path, y: Path | None) -> pools.Pools:
    """X as a pool and Y as the test set beside it, every row used."""
    train = _pool(kernel, x, "X")
    test = None if y is None else _pool(kernel, y, "Y")
    if test is not None and test.X.shape[1:] != train.X.shape[1:]:
        raise DataError(
            f"{y}: samples of shape {test.X.shape[1:]}, but those of {x} have {train.X.shape[1:]}"
        )
    identity = f"arrays-{datasets.block_digests(train.X[:1])[0][:16]}"
    dataset = datasets.Dataset("arrays", train, test, 1.0, (), identity)
    rows = np.arange(len(train.X))
    split = pools.Split(rows, None, None if test is None else np.arange(len(test.X)), test is None)
    nothing = Preprocessing.from_spec([], scale=1.0)
    return pools.Pools(dataset, train, test, None, split, nothing, "regression", ())


def _pool(kernel: Kernel, path: Path, name: str) -> datasets.Pool:
    X = np.asarray(open_array(path, [name]))
    if kernel.inputs == "images" and X.ndim == 3:
        X = X[..., None]
    if X.ndim not in (2, 4):
        raise DataError(f"{path}: vectors are (n, d), images (n, h, w, c) or (n, h, w); got shape {X.shape}")
    pool = datasets.Pool(str(path), X, None, None)
    datasets.validate(pool)
    kernel.check(pools.kernel_shape(kernel.inputs, tuple(X.shape[1:])))
    return pool


def _check_disk(samples: pools.Pools, kernel: Kernel, dtype: str, out: Path) -> None:
    n = len(samples.train.X)
    m = n if samples.test is None else len(samples.test.X)
    size = n * m * np.dtype(dtype).itemsize
    needed = int(size * (1.5 if samples.test is None else 2)) + samples.train.X.nbytes
    free = shutil.disk_usage(out.resolve().parent).free
    if needed > free:
        raise DoesNotFit(
            f"{out}: {bytes_text(needed)} are needed for the matrix and its tiles, {bytes_text(free)} are free;"
            " choose another disk, or --dtype float32"
        )


def _assemble(
    kernel: Kernel, samples: pools.Pools, dtype: str, root: Path, cluster: Cluster, display: Display
) -> tuple[GramStore, gram.GramReport]:
    test = samples.test is not None
    try:
        display.stage(root.stem, "features")
        left = features.materialise(
            samples, kernel, dtype, root, samples.split.train, cluster.workers, progress=display.progress
        )
        above = left
        if samples.split.test is not None:
            above = features.materialise(
                samples, kernel, dtype, root, samples.split.test, cluster.workers, test=True,
                progress=display.progress,
            )  # fmt: skip
        display.stage(root.stem, "gram")
        (store,) = gram.open_stores(samples, kernel, dtype, root, test=test)
        rows, columns = store.grid.shape
        tiles = {(i, j) for i in range(rows) for j in range(columns) if store.grid.contains((i, j))}
        shape = pools.kernel_shape(kernel.inputs, samples.raw_shape)
        rates = speed.calibrate(kernel, shape, dtype, seconds=0.1, ask=cluster.ask)
        (report,) = gram.assemble(
            kernel,
            [store],
            Path(above.store),
            Path(left.store),
            tiles,
            cluster.workers,
            tile_seconds=store.side**2 / rates.entries,
            memory_bytes=cluster.resources.memory,
            progress=display.progress,
        )
    except Exception as error:
        raise explain(error) or error from None
    return store, report


def _export(store: GramStore, out: Path, root: Path, *, transposed: bool) -> None:
    """Write the dense matrix beside its tiles under ``root`` and rename it; both triangles of a symmetric one.

    transposed: the store holds K(Y, X), the file gets K(X, Y).
    """
    n, m = store.shape
    temporary = root / f"dense-{uuid.uuid4().hex[:8]}{out.suffix}"
    shape = (m, n) if transposed else (n, m)
    with disk_errors(out.resolve().parent):
        dense = _dense(temporary, shape, store)
        rows, columns = store.grid.shape
        for i in range(rows):
            for j in range(columns):
                if not store.grid.contains((i, j)):
                    continue
                at_rows, at_columns = store.grid.extent((i, j))
                block = store.read_tile(i, j)
                if not transposed:
                    dense[at_rows, at_columns] = block
                if transposed or (store.symmetric and i != j):
                    dense[at_columns, at_rows] = block.T
        if hasattr(dense, "flush"):
            dense.flush()
        os.replace(temporary, out)


def _dense(path: Path, shape: tuple[int, int], store: GramStore) -> Any:
    if path.suffix == ".npy":
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(store.dtype), shape=shape)
        if hasattr(os, "posix_fallocate"):
            # Room first: where the disk is full, writing to a mapped file ends the process without a word.
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        return mapped
    import zarr

    chunks = (min(store.side, shape[0]), min(store.side, shape[1]))
    return zarr.create_array(
        str(path),
        shape=shape,
        chunks=chunks,
        dtype=store.dtype,
        fill_value=float("nan"),
        compressors=None,
        config={"write_empty_chunks": True},
    )
