"""Reading a store chunk by chunk: what is missing, damaged or not finite; and setting the bad ones aside."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import leases, results
from .errors import StoreError
from .explicit import mapfiles
from .inventory import half_removed
from .stores import (
    FeatureStore,
    GramStore,
    PoolStore,
    Store,
    TileStore,
    open_store,
    store_paths,
    unfinished_paths,
)
from .wording import first_line


@dataclass
class Verified:
    """What reading every chunk of a store found.

    bad: one line for each chunk that is damaged or not finite. missing: one for each tile that is gone
    though a finished run used it. absent: chunks not there that no finished run needed.
    """

    store: str
    kind: str
    chunks: int = 0
    absent: int = 0
    missing: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    temporaries: int = 0
    swept: int = 0
    remark: str = ""

    def json(self) -> dict[str, Any]:
        return dict(vars(self))


def verify(
    path: Path, *, repair: bool = False, progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[Verified]:
    """Read every chunk of a store, or of every store under a root, and what feature maps learned.

    repair: set bad chunks aside, so that the next run computes them again, and sweep what dead writers
    left. What a living process may be writing is not touched. progress: called with how many stores are
    read, of how many.

    Raises:
        StoreError: there is neither a store nor a root at ``path``.
    """
    path = path.resolve()
    if (path / "zarr.json").exists():
        return [_verify(open_store(path), repair)]
    if (path / mapfiles.DOCUMENT).exists():
        return [_verify_map(path, repair)]
    paths = store_paths(path)
    if not paths:
        raise StoreError(f"{path}: neither a store nor a root with stores in it")
    found = []
    for number, one in enumerate(paths):
        progress(number, len(paths), "stores")
        try:
            found.append(_verify(open_store(one), repair))
        except StoreError as error:
            found.append(Verified(str(one), one.parent.name, bad=[str(error)], remark="cannot be repaired"))
    found += [_verify_map(folder, repair) for folder in mapfiles.paths(path)]
    unfinished = [*unfinished_paths(path), *results.unfinished(path), *half_removed(path)]
    if unfinished:
        found.append(Verified(str(path), "root", temporaries=len(unfinished)))
        if repair:
            for one in unfinished:
                shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)
            found[-1].swept = len(unfinished)
    return found


def verify_rows(found: list[Verified]) -> list[list[object]]:
    """Rows for a table: store, chunks, missing, bad, not computed, temporaries, remark."""
    return [[v.store, v.chunks, len(v.missing), len(v.bad), v.absent, v.temporaries, v.remark] for v in found]


def _verify(store: Store, repair: bool) -> Verified:
    found = Verified(str(store.path), store.kind)
    used = _used(store)
    for name in store.attributes["arrays"]:
        array = store.array(name)
        counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
        for index in itertools.product(*(range(count) for count in counts)):
            if isinstance(store, TileStore) and not store.grid.contains((index[0], index[1])):
                continue
            if not store.chunk(name, index).exists():
                if (index if isinstance(store, TileStore) else index[0]) in used:
                    what = (
                        f"tile {index[0]}/{index[1]}" if isinstance(store, TileStore) else f"block {index[0]}"
                    )
                    found.missing.append(f"{store.path}: {what}: missing")
                else:
                    found.absent += 1
                continue
            found.chunks += 1
            problem = _problem(store, array, name, index)
            if problem:
                label = "tile" if isinstance(store, TileStore) else f"{name} chunk"
                found.bad.append(f"{store.path}: {label} {'/'.join(str(i) for i in index)}: {problem}")
                if repair:
                    store.set_aside(name, index)
    _temporaries(store, found, repair)
    if found.missing and not found.remark:
        found.remark = "run the experiment again to compute what is missing"
    return found


def _verify_map(folder: Path, repair: bool) -> Verified:
    """Read what a feature map learned, which is whole or damaged."""
    found = Verified(str(folder), mapfiles.KIND, chunks=len(list(folder.glob("*.npy"))))
    try:
        mapfiles.read(folder)
    except StoreError as error:
        found.bad.append(str(error))
        if repair:
            mapfiles.set_aside(folder)
    return found


def _used(store: Store) -> frozenset[Any]:
    """Tiles, or numbers of blocks, that finished runs rest on."""
    if isinstance(store, GramStore):
        return results.tiles_used(store.path)
    return results.blocks_used(store.path) if isinstance(store, FeatureStore) else frozenset()


def _problem(store: Store, array: Any, name: str, index: tuple[int, ...]) -> str:
    """What is wrong with a chunk, or nothing. Reads it without setting it aside."""
    selection = tuple(
        slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, array.chunks, array.shape, strict=True)
    )
    try:
        values = array[selection]
    except (ValueError, RuntimeError) as error:
        return f"damaged ({first_line(error)})"
    if values.dtype.kind == "f":
        bad = int(np.count_nonzero(~np.isfinite(values)))
        # A pool may hold what its owner put there; what was computed may not.
        if bad and not isinstance(store, PoolStore):
            return f"{bad} values are not finite"
    return ""


def _temporaries(store: Store, found: Verified, repair: bool) -> None:
    """Count what writers left behind; sweep it where no living process works on the store."""
    stray = store.temporaries()
    aside = sorted((store.path / "damaged").glob("*"))
    found.temporaries = len(stray)
    busy = leases.living(store.path)
    if not repair:
        return
    if busy:
        found.remark = f"in use by {busy[0].holder}: temporaries are left alone"
        return
    for path in (*stray, *aside):
        path.unlink(missing_ok=True)
    found.swept = len(stray) + leases.sweep(store.path)
