"""Stores: a chunk is absent or right, whatever happens to its file, to the data, or to the process."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernels.base import KernelError, Prepared
from kernels.convolutional import Convolutional, Layer
from pipelines import leases, stores, tile_files
from pipelines.errors import ChunkLost, DiskFull, NumericalError, StoreError, may_pass
from pipelines.pools import axis_of
from pipelines.stores import FactorStore, FeatureStore, GramStore, PoolStore, open_store

SIDE = 4


def data(n: int, seed: int = 0) -> np.ndarray:
    """Samples (n, 3) whose first k are the same for every n."""
    return np.array([np.random.default_rng([seed, k]).random(3) for k in range(n)])


def gram_store(root: Path, n: int = 10, seed: int = 0, dtype: str = "float64") -> GramStore:
    return GramStore.open_or_create(root, {"kernel": "k"}, [axis_of(data(n, seed))], dtype, SIDE)


def tile_of(store: GramStore, tile: tuple[int, int]) -> np.ndarray:
    """What a tile holds in these tests: a number for each entry."""
    rows, columns = store.grid.extent(tile)
    i, j = np.mgrid[rows, columns]
    return (1.0 + i * 1000 + j).astype(store.dtype)


def fill(store: GramStore) -> None:
    rows, columns = store.grid.shape
    for i in range(rows):
        for j in range(columns):
            if store.grid.contains((i, j)):
                store.write_tile((i, j), tile_of(store, (i, j)))


# One tile.


@pytest.mark.parametrize("tile", [(0, 0), (1, 0), (2, 2)], ids=["diagonal", "off", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tile_comes_back_bit_by_bit(root: Path, tile: tuple[int, int], dtype: str) -> None:
    """Protects the numbers on their way through the disk, by another process's eyes as well."""
    store = gram_store(root, dtype=dtype)
    block = (np.random.default_rng(0).random(tile_of(store, tile).shape)).astype(dtype)
    assert store.write_tile(tile, block)
    again = GramStore(store.path).read_tile(*tile)
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, block)
    assert store.present() == {tile}


@pytest.mark.parametrize("tile", [(0, 0), (2, 2)], ids=["whole", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tile_s_file_is_zarr_s(root: Path, tile: tuple[int, int], dtype: str) -> None:
    """Protects the format: what is written and read without Zarr is byte by byte what Zarr writes and reads."""
    store = gram_store(root, dtype=dtype)
    block = np.random.default_rng(0).random(tile_of(store, tile).shape).astype(dtype)
    assert store.write_tile(tile, block)
    extent = store.grid.extent(tile)
    np.testing.assert_array_equal(store.array("gram")[extent], block)
    ours = store.chunk("gram", tile).read_bytes()
    store.chunk("gram", tile).unlink()
    store.array("gram")[extent] = block
    assert store.chunk("gram", tile).read_bytes() == ours
    np.testing.assert_array_equal(store.read_tile(*tile), block)


def test_a_block_of_another_shape_is_no_tile(root: Path) -> None:
    store = gram_store(root)
    with pytest.raises(StoreError, match=r"shape \(1, 1\) is not tile 0/0"):
        store.write_tile((0, 0), np.ones((1, 1)))
    assert not store.present()


def test_a_tile_that_another_reader_sets_aside_meanwhile_is_lost(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects two workers that meet one damaged tile: for both it is one to be computed again."""
    store = gram_store(root)
    store.write_tile((0, 0), tile_of(store, (0, 0)))
    values = GramStore._values

    def late(self: GramStore, name: str, index: Any, selection: Any) -> np.ndarray:
        self.chunk(name, index).unlink()
        return values(self, name, index, selection)

    monkeypatch.setattr(GramStore, "_values", late)
    with pytest.raises(ChunkLost, match="set aside by another process"):
        store.read_tile(0, 0)


def test_values_beyond_the_store_s_dtype_are_refused(root: Path) -> None:
    """Protects readers: what float32 makes infinite is not stored."""
    store = gram_store(root, dtype="float32")
    with pytest.raises(NumericalError, match="not finite"):
        store.write_tile((0, 0), np.full(tile_of(store, (0, 0)).shape, 1e39))
    assert not store.present()


def test_a_tile_is_written_once(root: Path) -> None:
    """Protects write-once: a second writer, as Dask may send one, changes nothing and is told so."""
    store = gram_store(root)
    block = tile_of(store, (0, 0))
    assert store.write_tile((0, 0), block)
    file = store.chunk("gram", (0, 0))
    before = (file.stat().st_ino, file.stat().st_mtime_ns)
    assert not store.write_tile((0, 0), block + 1)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    np.testing.assert_array_equal(store.read_tile(0, 0), block)


def test_zeros_are_stored(root: Path) -> None:
    """Protects tiles of zeros from passing for missing ones."""
    store = gram_store(root)
    store.write_tile((0, 0), np.zeros((SIDE, SIDE)))
    assert GramStore(store.path).has((0, 0))
    assert not store.read_tile(0, 0).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_samples(root: Path, value: float) -> None:
    """Protects the store from NaN, and names the pool's samples that made it."""
    store = gram_store(root)
    block = tile_of(store, (2, 1))
    block[1, 3] = value
    with pytest.raises(NumericalError, match=r"tile 2/1 has 1 values .* samples 9 and 7"):
        store.write_tile((2, 1), block)
    assert not store.has((2, 1))
    assert store.temporaries() == []


def test_a_missing_tile_is_named(root: Path) -> None:
    """Protects a solver from fill values: what is not there is an error that says what to do."""
    with pytest.raises(ChunkLost, match=r"chunk 1/0 is missing; run the experiment again"):
        gram_store(root).read_tile(1, 0)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "one byte": lambda b: b[:1],
    "a checksum alone": lambda b: bytes(4),
    "cut in half": lambda b: b[: len(b) // 2],
    "last byte gone": lambda b: b[:-1],
    "longer": lambda b: b + b"more",
    "first bit flipped": lambda b: bytes([b[0] ^ 1]) + b[1:],
    "middle bit flipped": lambda b: b[:60] + bytes([b[60] ^ 16]) + b[61:],
    "checksum flipped": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
    "zeros": lambda b: bytes(len(b)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tile_is_detected_and_set_aside(root: Path, damage: Callable[[bytes], bytes]) -> None:
    """Protects against wrong numbers from a bad disk: detected on read, named, and out of the way."""
    store = gram_store(root)
    fill(store)
    file = store.chunk("gram", (1, 0))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ChunkLost, match=rf"{store.path}: gram chunk 1/0 was damaged"):
        store.read_tile(1, 0)
    assert not store.has((1, 0))
    assert len(list((store.path / "damaged").iterdir())) == 1
    assert store.write_tile((1, 0), tile_of(store, (1, 0)))
    np.testing.assert_array_equal(store.read_tile(1, 0), tile_of(store, (1, 0)))


@pytest.mark.parametrize("at_once", [8, 24, 128, 1000])
def test_a_tile_is_checked_however_it_is_read(
    root: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the checksum of a tile that is read piece by piece: every byte of the file counts."""
    monkeypatch.setattr(tile_files, "READ_BYTES", at_once)
    store = gram_store(root)
    store.write_tile((0, 0), tile_of(store, (0, 0)))
    file = store.chunk("gram", (0, 0))
    np.testing.assert_array_equal(store.read_tile(0, 0), tile_of(store, (0, 0)))
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match="checksum do not match"):
            tile_files.read_tile_file(file, SIDE, np.dtype("float64"))


def test_a_file_that_is_read_in_driblets_is_read_whole() -> None:
    """Protects from file systems that give less than was asked for, and from files that end, or fail, meanwhile."""

    class Driblets(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(buffer[:3])

    class Bad(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, "input/output error")

    content = np.zeros(10, np.uint8)
    tile_files._read_all(Driblets(bytes(range(10))), content)
    assert content.tolist() == list(range(10))
    with pytest.raises(ValueError, match="ends too early"):
        tile_files._read_all(Driblets(bytes(9)), content)
    with pytest.raises(ValueError, match="cannot be read: input/output error"):
        tile_files._read_all(Bad(), content)


def test_a_tile_whose_server_is_lost_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects whole tiles from what a network does: they are read again, not set aside and computed again."""
    store = gram_store(root)
    store.write_tile((0, 0), tile_of(store, (0, 0)))
    file = store.chunk("gram", (0, 0))

    class Lost(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(Path, "open", lambda self, *mode, **options: Lost(str(self)))
    with pytest.raises(OSError, match=re.escape(f"stale file handle: '{file}'")) as raised:
        store.read_tile(0, 0)
    assert may_pass(raised.value)
    assert store.has((0, 0))


def test_a_tile_of_fill_values_is_set_aside(root: Path) -> None:
    """Protects against a chunk whose checksum is right but whose values are none."""
    store = gram_store(root)
    store.array("gram")[0:4, 0:4] = np.where(np.eye(4), np.nan, 1.0)
    with pytest.raises(ChunkLost, match=r"chunk 0/0 was damaged \(it holds values that are not finite\)"):
        store.read_tile(0, 0)
    assert not store.has((0, 0))


@pytest.mark.parametrize(
    "layout", [lambda v: v, lambda v: v.T, lambda v: v[:, ::2]], ids=["C", "F", "strided"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_only_finite_values_are_taken_for_finite(
    dtype: str, layout: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Protects tiles whose sum, or sum of squares, is beyond their dtype, and those with one value that is none."""
    largest = np.finfo(dtype).max
    for fill in (0.0, 1.0, largest, -largest):
        values = np.full((6, 8), fill, dtype)
        assert tile_files.all_finite(layout(values))
        for bad in (np.nan, np.inf, -np.inf):
            values[3, 4] = bad
            assert not tile_files.all_finite(layout(values))
            values[1, 2] = -np.inf
            assert not tile_files.all_finite(layout(values))
            values[[1, 3], [2, 4]] = fill


def test_two_readers_set_a_damaged_tile_aside_once(root: Path) -> None:
    """Protects the race of readers: each learns that the chunk is lost, one moves it."""
    store = gram_store(root)
    store.write_tile((0, 0), tile_of(store, (0, 0)))
    assert store.set_aside("gram", (0, 0))
    assert not store.set_aside("gram", (0, 0))


def test_a_chunk_set_aside_while_it_is_read_is_lost(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects pools of integers, which have no NaN: zeros read in place of a chunk that just went away."""
    X = np.arange(30, dtype=np.uint8).reshape(10, 3)
    pool = PoolStore.materialise(root, {"source": "x"}, axis_of(X), X)

    class Vanishing:
        def __getitem__(self, selection: object) -> np.ndarray:
            pool.set_aside("X", (0, 0))
            return np.zeros((10, 3), np.uint8)

        shape = (10, 3)

    monkeypatch.setattr(PoolStore, "array", lambda self, name: Vanishing())
    with pytest.raises(ChunkLost, match="set aside by another process"):
        pool.samples(0, 10)


def test_rectangular_stores_hold_every_tile(root: Path) -> None:
    """Protects blocks against a test set: tiles on both sides of the diagonal, two lengths."""
    axes = [axis_of(data(6, 1)), axis_of(data(10))]
    store = GramStore.open_or_create(root, {"kernel": "k"}, axes, "float32", SIDE)
    fill(store)
    assert not store.symmetric
    assert store.shape == (6, 10)
    assert store.present() == {(i, j) for i in range(2) for j in range(3)}
    np.testing.assert_array_equal(store.read_tile(1, 2), tile_of(store, (1, 2)))
    assert store.path != gram_store(root).path


# Pools and prepared blocks.


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("shape", [(2500, 3), (1, 2, 2, 1)])
def test_pools_come_back_in_any_dtype(root: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Protects raw data: any real dtype, vectors and images, ranges across chunks, chunks of zeros."""
    X = (np.random.default_rng(0).random(shape) * 2).astype(dtype)
    X[:1100] = 0
    PoolStore.materialise(root, {"source": dtype}, axis_of(X), X)
    pool = PoolStore.materialise(root, {"source": dtype}, axis_of(X), X)
    for start, stop in ((0, len(X)), (0, 1), (min(1000, len(X) - 1), min(1030, len(X)))):
        read = pool.samples(start, stop)
        assert read.dtype.newbyteorder("=") == X.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read, X[start:stop])


def test_a_damaged_pool_is_written_again(root: Path) -> None:
    """Protects raw samples: damage is found on read, and mended by whoever has the data."""
    X = data(2000)
    pool = PoolStore.materialise(root, {"source": "x"}, axis_of(X), X)
    file = pool.chunk("X", (1, 0))
    file.write_bytes(file.read_bytes()[:-9])
    assert len(pool.samples(0, 1024)) == 1024
    with pytest.raises(ChunkLost, match="X chunk 1/0 was damaged"):
        pool.samples(0, 2000)
    np.testing.assert_array_equal(
        PoolStore.materialise(root, {"source": "x"}, axis_of(X), X).samples(0, 2000), X
    )


def prepared(n: int, start: int = 0) -> Prepared:
    rows = np.arange(start, start + n)
    return Prepared({"unit": data(start + n)[start:], "0/norm": rows.astype("f4")}, rows)


def test_prepared_blocks_come_back_with_their_rows(root: Path) -> None:
    """Protects what kernels are given: every array, global row ids, and the pool they refer to."""
    store = FeatureStore.open_or_create(root, {"pool": {"source": "x"}}, axis_of(data(10)), prepared(1), SIDE)
    assert not store.has(2)
    store.write_block(2, prepared(2, 8))
    block = FeatureStore(store.path).read_block(2)
    assert set(block.arrays) == {"unit", "0/norm"}
    np.testing.assert_array_equal(block.rows, [8, 9])
    np.testing.assert_array_equal(block.arrays["unit"], data(10)[8:])
    assert block.pool == store.pool_name != ""
    assert block.arrays["0/norm"].dtype == np.float32


def test_stored_blocks_keep_which_kernel_they_are_for(root: Path) -> None:
    """Protects kernels from blocks of others, of equal shapes, through a store and on a worker too."""
    kernel = Convolutional((Layer(3, "relu"),), pooling_mode="same")
    made = kernel.prepare(np.ones((4, 8, 8, 1)))
    described = {"pool": {}, "prepared": kernel.prepared_description()}
    store = FeatureStore.open_or_create(root, described, axis_of(data(4)), made, SIDE)
    store.write_block(0, made)
    block = FeatureStore(store.path).read_block(0)
    assert block.preparation == made.preparation != ""
    kernel.pair(block, made)
    with pytest.raises(KernelError, match="prepare them with this kernel"):
        replace(kernel, layers=(Layer(5, "relu"),)).pair(block, block)


def test_a_block_is_there_when_all_its_arrays_are(root: Path) -> None:
    """Protects against a writer that died between two arrays of a block: the next one completes it."""
    store = FeatureStore.open_or_create(root, {"pool": {}}, axis_of(data(10)), prepared(1), SIDE)
    store.write_block(0, prepared(4))
    store.chunk("0~norm", (0,)).unlink()
    assert not store.has(0)
    with pytest.raises(ChunkLost):
        store.read_block(0)
    store.write_block(0, prepared(4))
    np.testing.assert_array_equal(store.read_block(0).arrays["0/norm"], [0, 1, 2, 3])


def test_blocks_that_are_not_finite_are_refused_with_the_sample(root: Path) -> None:
    """Protects kernels from samples that preprocessing broke, and names the first of them."""
    store = FeatureStore.open_or_create(root, {"pool": {}}, axis_of(data(10)), prepared(1), SIDE)
    block = prepared(4, 4)
    block.arrays["unit"][2:, 0] = np.nan
    with pytest.raises(NumericalError, match=r"sample 6 has a value in unit .*2 such samples"):
        store.write_block(1, block)
    assert not store.has(1)


# Data that grow or change.


def test_the_same_data_open_the_same_store(root: Path) -> None:
    """Protects reuse: opening again neither makes a store nor loses a tile."""
    fill(gram_store(root))
    assert len(gram_store(root).present()) == 6
    assert len(stores.store_paths(root)) == 1


def test_growing_keeps_whole_tiles_and_drops_ragged_ones(root: Path) -> None:
    """Protects growth: tiles that the old end cut short are computed again, no other one is."""
    fill(gram_store(root, 10))
    grown = gram_store(root, 13)
    assert grown.present() == {(0, 0), (1, 0), (1, 1)}
    assert grown.shape == (13, 13)
    np.testing.assert_array_equal(grown.read_tile(1, 0), tile_of(grown, (1, 0)))
    fill(grown)
    np.testing.assert_array_equal(grown.read_tile(3, 2), tile_of(grown, (3, 2)))
    assert gram_store(root, 13).path == grown.path == gram_store(root, 13).path


def test_growing_from_a_whole_number_of_tiles_drops_nothing(root: Path) -> None:
    """Protects growth: a pool that ends with a tile has no ragged ones."""
    fill(gram_store(root, 8))
    assert gram_store(root, 9).present() == {(0, 0), (1, 0), (1, 1)}


def test_growing_one_side_of_a_rectangular_store(root: Path) -> None:
    """Protects test sets that grow: columns keep their tiles, ragged rows go."""

    def opened(n: int, m: int) -> GramStore:
        return GramStore.open_or_create(
            root, {"k": 1}, [axis_of(data(n, 1)), axis_of(data(m))], "float64", SIDE
        )

    fill(opened(6, 8))
    assert opened(9, 8).present() == {(0, 0), (0, 1)}
    fill(opened(9, 8))
    assert opened(9, 10).present() == {(i, j) for i in range(3) for j in range(2)}


@pytest.mark.parametrize("moment", ["after dropping", "after resizing"])
def test_a_process_that_dies_while_growing_loses_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Protects growth that was cut off: opened with old data in between, it is completed by the next."""
    fill(gram_store(root, 10))

    class Died(Exception):
        pass

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        if moment == "after dropping":
            patch.setattr("zarr.Array.resize", die)
        else:
            patch.setattr(stores, "_write_json", die)
        with pytest.raises(Died):
            gram_store(root, 13)
    fill(gram_store(root, 10))
    grown = gram_store(root, 13)
    assert grown.present() == {(0, 0), (1, 0), (1, 1)}
    fill(grown)
    np.testing.assert_array_equal(grown.read_tile(2, 2), tile_of(grown, (2, 2)))
    np.testing.assert_array_equal(grown.read_tile(3, 3), tile_of(grown, (3, 3)))


def test_a_driver_that_looked_before_another_grew_the_store_takes_nothing_back(root: Path) -> None:
    """Protects growth by two drivers: who would make the store smaller again is refused, and no tile is lost."""
    fill(gram_store(root))
    early = gram_store(root)
    fill(gram_store(root, 20))
    with pytest.raises(StoreError, match="run again"):
        early.grow([axis_of(data(13))])
    late = gram_store(root, 20)
    assert late.shape == (20, 20)
    assert len(late.present()) == 15


def test_growth_is_one_process_at_a_time(root: Path) -> None:
    """Protects the shape: a lock of a living process is respected, one that was left behind is taken over."""
    store = gram_store(root)
    (store.path / "growing").mkdir()
    with pytest.raises(StoreError, match="another process takes in appended samples"):
        gram_store(root, 13)
    os.utime(store.path / "growing", (1.0, 1.0))
    assert gram_store(root, 13).shape == (13, 13)
    assert not (store.path / "growing").exists()


def test_a_half_removed_store_is_passed_by(root: Path) -> None:
    """Protects runs from what a killed clean left: a folder without metadata, which nothing can open."""
    store = gram_store(root)
    fill(store)
    (store.path / "zarr.json").unlink()
    beside = gram_store(root)
    assert beside.path != store.path
    assert beside.present() == set()
    assert gram_store(root).path == beside.path


def test_a_store_in_use_does_not_grow(root: Path) -> None:
    """Protects a living driver from a store whose ends move under it."""
    store = gram_store(root, 10)
    busy = pytest.raises(StoreError, match=rf"process {os.getpid()} .* works on this store")
    with leases.Lease(store.path), busy:
        gram_store(root, 13)
    assert gram_store(root, 13).shape == (13, 13)


def test_changed_data_get_another_store(root: Path) -> None:
    """Protects against tiles of other samples: the old store stays for the old data."""
    fill(gram_store(root, 10))
    changed = gram_store(root, 10, seed=1)
    assert changed.present() == set()
    assert len(gram_store(root, 10).present()) == 6
    assert changed.path == gram_store(root, 10, seed=1).path


def test_fewer_samples_get_another_store(root: Path) -> None:
    """Protects a store from shrinking: a prefix of its data is another pool, with another end."""
    fill(gram_store(root, 10))
    assert gram_store(root, 9).present() == set()
    assert len(gram_store(root, 10).present()) == 6
    assert len(stores.store_paths(root)) == 2


def test_a_removed_store_hides_no_later_one(root: Path) -> None:
    """Protects ``store clean``: removing the first of several stores of one address loses no other's tiles."""
    import shutil

    first = gram_store(root, 10)
    second = gram_store(root, 10, seed=1)
    fill(second)
    shutil.rmtree(first.path)
    assert len(gram_store(root, 10, seed=1).present()) == 6
    assert gram_store(root, 10).present() == set()
    assert len(stores.store_paths(root)) == 2


def test_one_sample_appended_changes_the_pool(root: Path) -> None:
    """Protects digests: a sample changed anywhere, or of another dtype, is other data."""
    X = data(10)
    before = gram_store(root).path
    for changed in (X.astype("f4"), np.where(np.arange(10)[:, None] == 9, 0, X), X[::-1]):
        assert (
            GramStore.open_or_create(root, {"kernel": "k"}, [axis_of(changed)], "float64", SIDE).path
            != before
        )


# Descriptions, formats, metadata.


def test_addresses_tell_descriptions_apart(root: Path) -> None:
    """Protects against two matrices in one place: description, dtype and side are all in the address."""
    axes = [axis_of(data(10))]
    made = {
        GramStore.open_or_create(root, description, axes, dtype, side).path
        for description in ({"a": 1}, {"a": 2}, {"b": 1})
        for dtype in ("float32", "float64")
        for side in (4, 8)
    }
    assert len(made) == 12


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"attributes": {}}', '{"attributes": {"megagram": "gram"}}']
)
def test_a_damaged_store_is_a_clear_error(root: Path, text: str) -> None:
    """Protects against tracebacks: whatever zarr.json holds, the error names the store."""
    store = gram_store(root)
    (store.path / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=str(store.path)):
        open_store(store.path)
    with pytest.raises(StoreError, match=str(store.path)):
        gram_store(root)


@pytest.mark.parametrize("text", [None, "", "{", "{}"])
def test_a_damaged_array_is_a_clear_error(root: Path, text: str | None) -> None:
    """Protects against tracebacks from Zarr: the metadata of the array inside a store are gone or rubbish."""
    store = gram_store(root)
    store.write_tile((0, 0), tile_of(store, (0, 0)))
    document = store.path / "gram" / "zarr.json"
    document.unlink() if text is None else document.write_text(text)
    with pytest.raises(StoreError, match=rf"{store.path}: its metadata are damaged"):
        GramStore(store.path).read_tile(0, 0)


def test_other_formats_and_kinds_are_refused(root: Path, tmp_path: Path) -> None:
    """Protects from reading what a later version, or another program, wrote."""
    store = gram_store(root)
    with pytest.raises(StoreError, match="not a megagram store of kind features"):
        FeatureStore(store.path)
    with pytest.raises(StoreError, match="no store here"):
        open_store(tmp_path)
    document = store.path / "zarr.json"
    document.write_text(document.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(StoreError, match="has format 99, this version reads format 1"):
        open_store(store.path)


def test_stores_being_made_are_not_stores(root: Path) -> None:
    """Protects lists and sweeps: a half-made folder of a killed process is no store, and is found as such."""
    made = gram_store(root)
    half = made.path.with_name(f".{made.path.name}.0123abcd")
    half.mkdir()
    (half / "zarr.json").write_text((made.path / "zarr.json").read_text())
    assert stores.store_paths(root) == [made.path]
    assert stores.unfinished_paths(root) == []  # it may be a living process's
    os.utime(half, (0, 0))
    assert stores.unfinished_paths(root) == [half]


# Records.


def test_records_survive_lines_cut_off_by_a_crash(root: Path) -> None:
    """Protects provenance: a line that a killed process left unfinished costs itself alone."""
    store = gram_store(root)
    store.record({"time": 1, "tiles": [[0, 0]]})
    store.record({"time": 2, "tiles": [[1, 0]]})
    (file,) = (store.path / "records").iterdir()
    file.write_text(file.read_text()[:-5])
    store.record({"time": 3, "tiles": [[1, 1]]})  # a process that got the same number
    (store.path / "records" / "other.jsonl").write_bytes(b'{"time": 0.5}\n\xff\xfe{"ti')
    assert [line["time"] for line in store.records()] == [0.5, 1, 3]


# Full and read-only disks.


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EROFS, StoreError),
        (errno.EACCES, StoreError),
    ],
)
def test_disk_errors_say_where_and_what_to_do(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """Protects a run on a full or read-only disk: one line, the right exit code, nothing half-written."""
    store = gram_store(root)
    store.write_tile((0, 0), tile_of(store, (0, 0)))

    def failing(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pipelines.stores.os.replace", failing)
    with pytest.raises(kind, match=rf"{store.path}.*--root") as caught:
        store.write_tile((1, 0), tile_of(store, (1, 0)))
    assert caught.value.exit_code == (8 if kind is DiskFull else 5)
    assert store.present() == {(0, 0)}
    assert not store.temporaries()


def test_a_root_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    """Protects ``--root`` against a path that is no folder."""
    (tmp_path / "root").write_text("")
    with pytest.raises(StoreError, match="choose another --root"):
        gram_store(tmp_path / "root")


# Several writers.


def test_many_threads_create_one_store(root: Path) -> None:
    """Protects creation: whoever comes second opens what the first one made, and no folder is left over."""
    paths: list[Path] = []
    barrier = threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        paths.append(gram_store(root).path)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == 1
    assert [p for p in (root / "gram").iterdir() if p != paths[0]] == []


CREATE = """
import sys
from pathlib import Path
import numpy as np
from pipelines.pools import axis_of
from pipelines.stores import GramStore
root, other = Path(sys.argv[1]), int(sys.argv[2])
sys.stdin.readline()
for round in range(6):
    X = np.full((10, 3), float(other * 100))
    store = GramStore.open_or_create(root, {"round": round}, [axis_of(X)], "float64", 4)
    for i in range(3):
        for j in range(i + 1):
            rows, columns = store.grid.extent((i, j))
            store.write_tile((i, j), np.full((rows.stop - rows.start, columns.stop - columns.start), 1.0 + other))
    print(store.path, flush=True)
"""


@pytest.mark.parametrize("other", [0, 1], ids=["same data", "other data"])
def test_two_processes_create_and_fill_at_once(root: Path, other: int) -> None:
    """Protects two drivers that start together: with the same data one store, with other data two, all whole."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, str(root), str(k * other)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    outputs = []
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        outputs.append(child.communicate(timeout=60)[0].split())
        assert child.returncode == 0
    for a, b in zip(*outputs, strict=True):
        assert (a == b) == (other == 0)
    for k, paths in enumerate(outputs):
        for path in paths:
            store = GramStore(Path(path))
            assert len(store.present()) == 6
            assert all((store.read_tile(i, j) == 1 + k * other).all() for i, j in store.present())
            assert store.temporaries() == []
    assert stores.unfinished_paths(root) == []
    assert not [p for p in (root / "gram").iterdir() if p.name.startswith(".")]


# Any sequence of operations, against a model in memory.


class AnyOrder(RuleBasedStateMachine):
    """A store under writes, damage, loss, growth and reopening, against a dictionary of tiles."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.model: dict[tuple[int, int], np.ndarray] = {}
        self.damaged: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(n=st.integers(1, 10))
    def create(self, n: int) -> None:
        self.n = n
        self.store = gram_store(self.root, n)

    def _tile(self, pick: float) -> tuple[int, int]:
        blocks = -(-self.n // SIDE)
        tiles = [(i, j) for i in range(blocks) for j in range(i + 1)]
        return tiles[int(pick * len(tiles))]

    picks = st.floats(0, 1, exclude_max=True)

    @rule(pick=picks, value=st.integers(-3, 3))
    def write(self, pick: float, value: int) -> None:
        tile = self._tile(pick)
        block = tile_of(self.store, tile) * value
        assert self.store.write_tile(tile, block) == (tile not in self.model)
        self.model.setdefault(tile, block)

    @rule(pick=picks)
    def read(self, pick: float) -> None:
        tile = self._tile(pick)
        if tile in self.model and tile not in self.damaged:
            np.testing.assert_array_equal(self.store.read_tile(*tile), self.model[tile])
            return
        with pytest.raises(ChunkLost):
            self.store.read_tile(*tile)
        self.model.pop(tile, None)
        self.damaged.discard(tile)

    @rule(pick=picks, how=st.sampled_from(sorted(DAMAGE)))
    def damage(self, pick: float, how: str) -> None:
        tile = self._tile(pick)
        if tile in self.model and tile not in self.damaged:
            file = self.store.chunk("gram", tile)
            file.write_bytes(DAMAGE[how](file.read_bytes()))
            self.damaged.add(tile)

    @rule(pick=picks)
    def lose(self, pick: float) -> None:
        tile = self._tile(pick)
        self.store.chunk("gram", tile).unlink(missing_ok=True)
        self.model.pop(tile, None)
        self.damaged.discard(tile)

    @rule(more=st.integers(0, 5))
    def reopen(self, more: int) -> None:
        n = min(self.n + more, 22)
        ragged = self.n // SIDE if n != self.n and self.n % SIDE else None
        self.n = n
        self.store = gram_store(self.root, self.n)
        self.model = {t: block for t, block in self.model.items() if ragged is None or t[0] != ragged}
        self.damaged &= set(self.model)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if hasattr(self, "store"):
            assert self.store.present() == set(self.model)
            assert len(stores.store_paths(self.root)) == 1


AnyOrder.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_attributes_are_plain_json(root: Path) -> None:
    """Protects readers without Zarr: what a store is can be told from one JSON file."""
    store = gram_store(root)
    attributes = json.loads((store.path / "zarr.json").read_text())["attributes"]
    assert attributes["megagram"] == "gram"
    assert attributes["axes"] == [axis_of(data(10)).json()]


def test_a_straggler_does_not_write_into_a_removed_store(tmp_path: Path) -> None:
    """Protects a root from folders that are no stores: what comes too late is refused, and nothing lies there."""
    store = FactorStore.open_or_create(tmp_path, {"of": "test"}, 20, "float64", 8)
    assert store.write_tile((0, 0), np.eye(8))
    stores.remove_store(store.path)
    with pytest.raises(StoreError, match="was removed"):
        store.write_tile((1, 0), np.ones((8, 8)))
    assert not list((tmp_path / "factors").iterdir())


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 20), side=st.integers(1, 9), written=st.integers(1, 800))
def test_tiles_written_in_pieces_are_what_zarr_reads(n: int, side: int, written: int) -> None:
    """Protects the format: whatever is written at once, whole and ragged tiles are chunks with their checksums."""
    values = np.random.default_rng(n).standard_normal((n, n))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_files, "WRITTEN_BYTES", written)
        store = FactorStore.open_or_create(Path(folder), {"of": "test"}, n, "float64", side)
        for tile in ((i, j) for i in range(store.grid.shape[0]) for j in range(i + 1)):
            extent = store.grid.extent(tile)
            store.write_tile(tile, values[extent])
            np.testing.assert_array_equal(store.array("factor")[extent], values[extent])
            np.testing.assert_array_equal(store.map_tile(*tile), values[extent])
