"""Stores: Zarr groups at addresses made of fingerprints, written once, checked on every read.

A store belongs to a pool of samples, not to a split of it. Its address is a digest of what it holds;
digests of the pool's row blocks lie inside, so that a store is opened only for data that begin with the
rows it was made from: data that grow keep their tiles, changed data get another store.

A chunk is absent or right: chunks carry a crc32c, are renamed into place whole, and are never written
again. A damaged chunk is set aside by whoever reads it; missing then means "compute".
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kernels.base import Prepared, digest

from . import leases
from .errors import ChunkLost, NumericalError, StoreError
from .files import disk_errors, replacing
from .tile_files import all_finite, map_tile_file, read_tile_file, write_tile_file
from .tiles import Grid, Tile
from .wording import first_line

FORMAT = 1
KINDS = ("pools", "features", "gram", "factors")


@dataclass(frozen=True)
class Axis:
    """The samples along one axis of a store: how many, and digests of their row blocks.

    prefix: digests of the first k rows, for comparing with a store made when there were k.
    """

    rows: int
    digests: tuple[str, ...]
    prefix: Callable[[int], tuple[str, ...]]

    def json(self) -> dict[str, Any]:
        return {"rows": self.rows, "digests": list(self.digests)}

    def compare(self, old: Mapping[str, Any]) -> str:
        """``same``, ``grown`` (these rows begin with the old ones) or ``other``."""
        rows, digests = int(old["rows"]), tuple(old["digests"])
        if rows == self.rows:
            return "same" if digests == self.digests else "other"
        if rows < self.rows and self.prefix(rows) == digests:
            return "grown"
        return "other"


class Store:
    """A Zarr group whose attributes say what it holds: ``description``, ``axes`` and the format."""

    kind: str

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.attributes = _attributes(self.path)
        if self.attributes.get("megagram") != self.kind:
            raise StoreError(f"{path}: not a megagram store of kind {self.kind}")
        if self.attributes.get("format") != FORMAT:
            raise StoreError(
                f"{path}: has format {self.attributes.get('format')}, this version reads format {FORMAT}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # As an address: a worker opens the store once, and again when its samples are others.
        return _opened, (type(self), self.path, digest(self.axes))

    @property
    def description(self) -> dict[str, Any]:
        return self.attributes["description"]

    @property
    def axes(self) -> list[dict[str, Any]]:
        return self.attributes["axes"]

    def array(self, name: str) -> Any:
        """The Zarr array ``name`` of this store, opened once."""
        return self._arrays[name]

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        import zarr

        try:
            # Integer arrays have no NaN to mark what is missing: their chunks of zeros must be stored, which
            # Zarr does not keep with an array, so it is said at every opening.
            with zarr.config.set({"array.write_empty_chunks": True}):
                return {
                    name: zarr.open_array(str(self.path / name), mode="r+")
                    for name in self.attributes["arrays"]
                }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path}: its metadata are damaged ({first_line(error)}); remove this store, then run again"
            ) from error

    def chunk(self, name: str, index: Sequence[int]) -> Path:
        """The file of one chunk."""
        return self.path / name / "c" / "/".join(str(i) for i in index)

    def set_aside(self, name: str, index: Sequence[int]) -> bool:
        """Move a damaged chunk out of the way atomically; False when another process already did."""
        aside = self.path / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / f"{name}.{'.'.join(str(i) for i in index)}.{uuid.uuid4().hex[:8]}"
        try:
            os.rename(self.chunk(name, index), target)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, index: Sequence[int], selection: Any) -> np.ndarray:
        """One chunk, its checksum verified; a damaged one is set aside.

        Raises:
            ChunkLost: the chunk is missing or damaged.
        """
        return self._checked(name, index, lambda: self._values(name, index, selection))

    def _checked(self, name: str, index: Sequence[int], values_of: Callable[[], np.ndarray]) -> np.ndarray:
        """What ``values_of`` reads of a chunk; where it fails the chunk is set aside, and ChunkLost raised."""
        label = f"{self.path}: {name} chunk {'/'.join(str(i) for i in index)}"
        if not self.chunk(name, index).exists():
            raise ChunkLost(f"{label} is missing; run the experiment again to compute it")
        try:
            values = values_of()
        except FileNotFoundError:
            raise ChunkLost(f"{label} was set aside by another process; run the experiment again") from None
        except (ValueError, RuntimeError) as error:
            # As Zarr's codecs do on a wrong checksum, a truncated or an empty file.
            self.set_aside(name, index)
            raise ChunkLost(
                f"{label} was damaged ({first_line(error)}) and is set aside; run the experiment again"
            ) from error
        if not self.chunk(name, index).exists():
            # Set aside by another reader meanwhile: Zarr may have read fill values in its place.
            raise ChunkLost(f"{label} was set aside by another process; run the experiment again")
        return values

    def _values(self, name: str, index: Sequence[int], selection: Any) -> np.ndarray:
        return self.array(name)[selection]

    def write(self, name: str, index: Sequence[int], selection: Any, value: np.ndarray) -> None:
        """Write one whole chunk: under a temporary name, then renamed.

        Raises:
            DiskFull: no space is left; nothing under a final name is touched.
        """
        with disk_errors(self.path):
            self.array(name)[selection] = value

    def grow(self, axes: Sequence[Axis]) -> None:
        """Take in appended samples: ragged chunks of the old end are dropped, arrays are resized.

        Raises:
            StoreError: another living process works on this store, or has grown it otherwise.
        """
        with leases.exclusive(self.path):
            busy = leases.living(self.path)
            if busy:
                raise StoreError(
                    f"{self.path}: the data grew, but {busy[0].holder} works on this store; try later"
                )
            self.attributes = _attributes(self.path)
            relations = {axis.compare(old) for axis, old in zip(axes, self.axes, strict=True)}
            if "other" in relations:
                raise StoreError(f"{self.path}: another process took in other samples meanwhile; run again")
            if "grown" in relations:
                self._resize(axes)

    def _resize(self, axes: Sequence[Axis]) -> None:
        for name, spec in self.attributes["arrays"].items():
            array = self.array(name)
            shape = list(array.shape)
            for dimension, axis in enumerate(spec["axes"]):
                # What the store says, not the array: a process that died here may have resized it already.
                old = int(self.axes[axis]["rows"])
                shape[dimension] = axes[axis].rows
                if old != axes[axis].rows and old % array.chunks[dimension]:
                    self._drop(name, dimension, old // array.chunks[dimension])
            array.resize(tuple(shape))
        attributes = {**self.attributes, "axes": [axis.json() for axis in axes]}
        _write_json(
            self.path / "zarr.json", {**_read_json(self.path / "zarr.json"), "attributes": attributes}
        )
        self.attributes = attributes

    def _drop(self, name: str, dimension: int, index: int) -> None:
        pattern = "/".join(["*"] * dimension + [str(index)])
        for found in (self.path / name / "c").glob(pattern):
            shutil.rmtree(found) if found.is_dir() else found.unlink()

    def temporaries(self) -> list[Path]:
        """Files left by writers that died in the middle of a write."""
        patterns = ("**/*.partial", ".zarr.json.*", "leases/*.tmp")
        return sorted(found for pattern in patterns for found in self.path.glob(pattern))

    def size(self) -> int:
        """Bytes on disk."""
        return folder_bytes(self.path)


class PoolStore(Store):
    """Raw samples ``X`` (n, ...) in a stated order, so that workers need no data folder."""

    kind = "pools"
    chunk_rows = 1024

    @classmethod
    def materialise(cls, root: Path, description: dict[str, Any], axis: Axis, X: np.ndarray) -> PoolStore:
        """Open the store of these samples, writing what is missing of it.

        X: (n, ...) of any real dtype.
        """
        arrays = {"X": ((axis.rows, *X.shape[1:]), (cls.chunk_rows, *X.shape[1:]), X.dtype.str, [0])}
        store = cls(_open_or_create(root, cls.kind, description, [axis], arrays))
        chunks = range(-(-axis.rows // cls.chunk_rows))
        missing = [k for k in chunks if not store.chunk("X", store._index(k)).exists()]
        if missing:
            with leases.Lease(store.path):
                for k in missing:
                    rows = slice(k * cls.chunk_rows, min((k + 1) * cls.chunk_rows, axis.rows))
                    store.write("X", store._index(k), rows, np.ascontiguousarray(X[rows]))
        return store

    def _index(self, k: int) -> tuple[int, ...]:
        return (k, *([0] * (len(self.array("X").shape) - 1)))

    @property
    def digest(self) -> str:
        """Digest of all samples in their order."""
        return digest(self.axes[0])

    @property
    def rows(self) -> int:
        return int(self.axes[0]["rows"])

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Raw samples [start, stop), (stop - start, ...), every chunk's checksum verified."""
        parts = []
        for k in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            first = k * self.chunk_rows
            chunk = self.read("X", self._index(k), slice(first, min(first + self.chunk_rows, self.rows)))
            parts.append(chunk[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class FeatureStore(Store):
    """Prepared blocks: arrays with leading axis n, in chunks of ``side`` samples."""

    kind = "features"

    @classmethod
    def open_or_create(
        cls, root: Path, description: dict[str, Any], axis: Axis, like: Prepared, side: int
    ) -> FeatureStore:
        """The store for blocks of ``side`` samples whose arrays look like those of ``like``."""
        arrays = {
            _file_name(name): (
                (axis.rows, *a.shape[1:]),
                (side, *a.shape[1:]),
                np.dtype(a.dtype).str,
                [0],
            )
            for name, a in like.arrays.items()
        }
        return cls(_open_or_create(root, cls.kind, {**description, "side": side}, [axis], arrays))

    @property
    def side(self) -> int:
        return int(self.description["side"])

    @property
    def rows(self) -> int:
        return int(self.axes[0]["rows"])

    @property
    def pool_name(self) -> str:
        """What the row ids of prepared blocks refer to."""
        return address(self.description["pool"])

    @property
    def block_count(self) -> int:
        return -(-self.rows // self.side)

    @cached_property
    def _preparation(self) -> str:
        """That of the kernel whose blocks these are; empty where the store's description names none."""
        prepared = self.description.get("prepared")
        return "" if prepared is None else digest(prepared)

    def extent(self, block: int) -> slice:
        return slice(block * self.side, min((block + 1) * self.side, self.rows))

    def _index(self, name: str, block: int) -> tuple[int, ...]:
        return (block, *([0] * (len(self.array(name).shape) - 1)))

    def has(self, block: int) -> bool:
        return all(self.chunk(name, self._index(name, block)).exists() for name in self.attributes["arrays"])

    def read_block(self, block: int) -> Prepared:
        """The prepared block, with its samples' row ids.

        Raises:
            ChunkLost: missing or damaged (then set aside).
        """
        extent = self.extent(block)
        arrays = {
            _array_name(name): self.read(name, self._index(name, block), extent)
            for name in self.attributes["arrays"]
        }
        rows = np.arange(extent.start, extent.stop, dtype=np.int64)
        return Prepared(arrays, rows, self.pool_name, self._preparation)

    def write_block(self, block: int, prepared: Prepared) -> None:
        """Write a prepared block once; an array already there is left as it is.

        Raises:
            NumericalError: a value is not finite; the sample is named.
        """
        extent = self.extent(block)
        for name in self.attributes["arrays"]:
            values = prepared.arrays[_array_name(name)]
            finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
            if not finite.all():
                row = extent.start + int(np.argmin(finite))
                raise NumericalError(
                    f"{self.path}: sample {row} has a value in {_array_name(name)} that is not finite"
                    f" ({int((~finite).sum())} such samples in this block); check the data and preprocessing"
                )
            if not self.chunk(name, self._index(name, block)).exists():
                self.write(name, self._index(name, block), extent, values)


class TileStore(Store):
    """One matrix in square tiles, each a whole chunk."""

    matrix: str
    """Name of its array."""

    @property
    def side(self) -> int:
        return int(self.description["side"])

    @property
    def dtype(self) -> str:
        return str(self.description["dtype"])

    @property
    def symmetric(self) -> bool:
        """Whether only the lower triangle's tiles (i, j) with i >= j are kept."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        return Grid(*self.shape, self.side, self.symmetric)

    def has(self, tile: Tile) -> bool:
        return self.chunk(self.matrix, tile).exists()

    def present(self) -> set[Tile]:
        """The tiles that lie in the store, by their file names."""
        found: set[Tile] = set()
        try:
            rows = [entry for entry in os.scandir(self.path / self.matrix / "c") if entry.name.isdigit()]
        except FileNotFoundError:
            return found
        for row in rows:
            found.update((int(row.name), int(name)) for name in os.listdir(row.path) if name.isdigit())
        return found

    def read_tile(self, i: int, j: int) -> np.ndarray:
        """Tile (i, j), at most (side, side); ragged only at the matrix's end.

        Raises:
            ChunkLost: missing, or damaged or not finite (then set aside).
        """
        return self.read(self.matrix, (i, j), self.grid.extent((i, j)))

    def _values(self, name: str, index: Sequence[int], selection: Any) -> np.ndarray:
        # What Zarr would do, without the copies that it makes on the way: half of the time.
        self.array(name)  # whose metadata, damaged, would be found by Zarr alone
        rows, columns = selection
        tile, finite = read_tile_file(self.chunk(name, index), self.side, np.dtype(self.dtype))
        n, m = rows.stop - rows.start, columns.stop - columns.start
        block = tile if tile.shape == (n, m) else tile[:n, :m].copy()
        if not (finite or all_finite(block)):  # beyond the matrix's end a tile is filled up with NaN
            raise ValueError("it holds values that are not finite")
        return block

    def write_tile(self, tile: Tile, block: np.ndarray) -> bool:
        """Write a tile once; False when it was there already.

        Raises:
            NumericalError: a value is not finite; the samples are named, nothing is written.
            DiskFull: no space is left.
            StoreError: the store was removed meanwhile; nothing is left at its address.
        """
        rows, columns = self.grid.extent(tile)
        if block.shape != (rows.stop - rows.start, columns.stop - columns.start):
            raise StoreError(f"{self.path}: a block of shape {block.shape} is not tile {tile[0]}/{tile[1]}")
        with np.errstate(over="ignore"):  # beyond the store's dtype: refused as what it became
            block = np.ascontiguousarray(block, self.dtype)
        if not all_finite(block):
            ids = (np.arange(extent.start, extent.stop) for extent in (rows, columns))
            raise NumericalError(f"{self.path}: {not_finite(block, tile, *ids)}")
        if self.has(tile):
            return False
        self.array(self.matrix)  # whose metadata, damaged, would make the file unreadable
        try:
            with disk_errors(self.path):
                write_tile_file(self.chunk(self.matrix, tile), block, self.side)
        except FileNotFoundError:
            raise StoreError(f"{self.path} was removed while it was written to; run again") from None
        return True


class GramStore(TileStore):
    """Tiles of one kernel's matrix over a pool (symmetric), or between two pools (rectangular)."""

    kind = "gram"
    matrix = "gram"

    @classmethod
    def open_or_create(
        cls, root: Path, description: dict[str, Any], axes: Sequence[Axis], dtype: str, side: int
    ) -> GramStore:
        """axes: one axis for a symmetric store, (rows, columns) for a rectangular one."""
        n, m = axes[0].rows, axes[-1].rows
        arrays = {"gram": ((n, m), (side, side), np.dtype(dtype).str, [0, len(axes) - 1])}
        description = {**description, "dtype": np.dtype(dtype).name, "side": side}
        return cls(_open_or_create(root, cls.kind, description, axes, arrays))

    @property
    def symmetric(self) -> bool:
        return len(self.axes) == 1

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.axes[0]["rows"]), int(self.axes[-1]["rows"])

    # Records: one line a tile, appended by the worker that made it.

    def record(self, line: Mapping[str, Any]) -> None:
        """Append one line to this process's record file."""
        folder = self.path / "records"
        with disk_errors(self.path):
            folder.mkdir(exist_ok=True)
            with (folder / f"{leases.host()}-{os.getpid()}.jsonl").open("a") as stream:
                # The line break comes first: it ends a line that a process of the same number left cut off.
                stream.write("\n" + json.dumps(line))

    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first; a line cut off by a crash is passed over."""
        lines = []
        for path in sorted(self.path.glob("records/*.jsonl")):
            for text in path.read_text(errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
        return sorted(lines, key=lambda line: line.get("time", 0))


class FactorStore(TileStore):
    """Tiles of a lower triangular factor; what it is the factor of is its description.

    It is apart from the Gram store, and can be removed: whoever needs it computes it again.
    """

    kind = "factors"
    matrix = "factor"
    symmetric = True

    @classmethod
    def open_or_create(
        cls, root: Path, description: dict[str, Any], n: int, dtype: str, side: int
    ) -> FactorStore:
        """The store of an (n, n) factor in tiles of ``side``."""
        arrays: dict[str, Any] = {"factor": ((n, n), (side, side), np.dtype(dtype).str, [])}
        described = cls._described(description, n, dtype, side)
        return cls(_open_or_create(root, cls.kind, described, [], arrays))

    @classmethod
    def left(cls, root: Path, description: dict[str, Any], n: int, dtype: str, side: int) -> list[Path]:
        """The paths of what ``open_or_create`` would open, where it is there."""
        return list(generations(root, cls.kind, cls._described(description, n, dtype, side)))

    @staticmethod
    def _described(description: dict[str, Any], n: int, dtype: str, side: int) -> dict[str, Any]:
        return {**description, "n": n, "dtype": np.dtype(dtype).name, "side": side}

    @property
    def shape(self) -> tuple[int, int]:
        n = int(self.description["n"])
        return n, n

    def map_tile(self, i: int, j: int, verify: bool = True) -> np.ndarray:
        """Tile (i, j) where its file lies in memory: read-only, C order, nothing copied, shared between processes.

        verify: look at the checksum, which one look in the life of a process is enough for.

        Raises:
            ChunkLost: missing, or damaged (then set aside).
        """
        rows, columns = self.grid.extent((i, j))
        n, m = rows.stop - rows.start, columns.stop - columns.start

        def values() -> np.ndarray:
            self.array(self.matrix)
            tile = map_tile_file(self.chunk(self.matrix, (i, j)), self.side, np.dtype(self.dtype), verify)
            return tile[:n] if m == self.side else tile[:n, :m].copy()

        return self._checked(self.matrix, (i, j), values)


def open_store(path: str | Path) -> Store:
    """The store at ``path``, of whatever kind.

    Raises:
        StoreError: there is none.
    """
    path = Path(path)
    kind = _attributes(path).get("megagram")
    for cls in (PoolStore, FeatureStore, GramStore, FactorStore):
        if cls.kind == kind:
            return cls(path)
    raise StoreError(f"{path}: not a megagram store")


@lru_cache(maxsize=16)
def _opened(cls: type[Store], path: Path, axes: str) -> Store:
    return cls(path)


def not_finite(block: np.ndarray, tile: Tile, rows: np.ndarray, columns: np.ndarray) -> str:
    """What is wrong with a tile that is not finite, and what to do. rows, columns: the ids of its samples."""
    finite = np.isfinite(block)
    i, j = np.unravel_index(int(np.argmin(finite)), block.shape)
    return (
        f"tile {tile[0]}/{tile[1]} has {int((~finite).sum())} values that are not finite in {block.dtype}, the first"
        f" between samples {rows[i]} and {columns[j]}; {advice_on_range(block.dtype)}"
    )


def advice_on_range(dtype: np.dtype) -> str:
    """What to do about values beyond the range of a dtype."""
    advice = "scale the samples (data.preprocess)"
    return advice if dtype == np.float64 else f"{advice} or compute in float64"


def generations(root: Path, kind: str, description: Mapping[str, Any]) -> Iterator[Path]:
    """The existing stores at the address of ``description``, oldest first."""
    name = address(description)
    numbers = [0] if (root / kind / name / "zarr.json").exists() else []
    suffixes = [path.parent.name[len(name) + 1 :] for path in (root / kind).glob(f"{name}-*/zarr.json")]
    for number in sorted(numbers + [int(suffix) for suffix in suffixes if suffix.isdigit()]):
        yield _generation(root, kind, name, number)


def _generation(root: Path, kind: str, name: str, number: int) -> Path:
    return root / kind / (f"{name}-{number}" if number else name)


def existing(
    root: Path, kind: str, description: Mapping[str, Any], axes: Sequence[Axis]
) -> tuple[Path, str] | None:
    """The store made from these samples (``same``) or from a prefix of them (``grown``), if there is one."""
    for path in generations(root, kind, description):
        old = _attributes(path)["axes"]
        if len(old) == len(axes):
            relations = {axis.compare(before) for axis, before in zip(axes, old, strict=True)}
            if "other" not in relations:
                return path, "grown" if "grown" in relations else "same"
    return None


def address(description: Mapping[str, Any]) -> str:
    """Where a description's store lies under its kind's folder: 24 hexadecimal digits."""
    return digest(description)[:24]


def store_paths(root: Path) -> list[Path]:
    """The folders of all stores under a root, those being made left out."""
    return [
        document.parent
        for kind in KINDS
        for document in sorted(root.glob(f"{kind}/*/zarr.json"))
        if not document.parent.name.startswith(".")
    ]


def remove_store(path: Path) -> None:
    """Remove a store or a folder beside stores. Another process never finds half of it, nor writes into it again."""
    going = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed")
    with disk_errors(path), suppress(FileNotFoundError):  # another process removed it
        path.rename(going)
        shutil.rmtree(going)


def unfinished_paths(root: Path) -> list[Path]:
    """Stores, fitted states and maps under a root that were being made when their maker died, and damaged maps."""
    now = time.time()
    found = []
    for folder in (*KINDS, "preprocessing", "maps"):
        for path in sorted((root / folder).glob(".*")):
            # They have no lease yet; a living maker renames them within moments.
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime > leases.EXPIRY_SECONDS:
                    found.append(path)
    return found


def folder_bytes(path: Path) -> int:
    """Bytes of all files below ``path``; files that vanish meanwhile count nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _open_or_create(
    root: Path,
    kind: str,
    description: Mapping[str, Any],
    axes: Sequence[Axis],
    arrays: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], str, list[int]]],
) -> Path:
    """The store of ``description`` whose samples are these; grown, or created, where needed."""
    name = address(description)
    while True:
        # Chosen before it is looked what there is: whatever another process makes meanwhile is found, or lies here.
        # A folder without metadata, half removed perhaps, is no store, but takes its place all the same.
        path = next(p for k in count() if not (p := _generation(root, kind, name, k)).exists())
        found = existing(root, kind, description, axes)
        if found is not None:
            path, relation = found
            if relation == "grown":
                open_store(path).grow(axes)
            return path
        # Another process may have made the store meanwhile: then look again.
        with suppress(FileExistsError):
            _create(path, kind, description, axes, arrays)
            return path


def _create(
    path: Path,
    kind: str,
    description: Mapping[str, Any],
    axes: Sequence[Axis],
    arrays: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], str, list[int]]],
) -> None:
    """Make the group under a temporary name and rename it, so that no other process sees half of it."""
    import zarr
    from zarr.codecs import Crc32cCodec

    attributes = {
        "megagram": kind,
        "format": FORMAT,
        "description": description,
        "axes": [axis.json() for axis in axes],
        "arrays": {name: {"axes": spec[3]} for name, spec in arrays.items()},
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.create_group(str(temporary), attributes=attributes)
        for name, (shape, chunks, dtype, _) in arrays.items():
            group.create_array(
                name,
                shape=shape,
                chunks=chunks,
                dtype=dtype,
                # A missing chunk must never pass for zeros.
                fill_value=float("nan") if np.dtype(dtype).kind == "f" else 0,
                compressors=[Crc32cCodec()],
                filters=None,
            )
        try:
            os.rename(temporary, path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(path) from None
            raise


def _attributes(path: Path) -> dict[str, Any]:
    # Read as JSON, not through zarr: status must answer at once, without heavy imports.
    document = path / "zarr.json"
    if not document.exists():
        raise StoreError(f"{path}: no store here")
    attributes = _read_json(document).get("attributes")
    needed = {"megagram", "description", "axes", "arrays"}
    if not isinstance(attributes, dict) or not needed <= set(attributes):
        raise StoreError(f"{path}: not a megagram store")
    return attributes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path}: cannot be read ({first_line(error)}); remove {path.parent}, then run again"
        ) from None
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2))


def _file_name(name: str) -> str:
    return name.replace("/", "~")


def _array_name(file: str) -> str:
    return file.replace("~", "/")
