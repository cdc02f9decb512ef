"""Tiles on a device: in order, one computed while another is written, nothing lost when something fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import fake_cupy
import numpy as np
import pytest
import small

from kernels.base import KernelError, Prepared
from pipelines import device, gram

NTK = {"kind": "fully-connected", "family": "ntk", "depth": 3}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A device that this process finds and uses."""
    fake = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def block(number: int, side: int = 3) -> Callable[[], np.ndarray]:
    return lambda: np.full((side, side), float(number))


def run(cupy: ModuleType, keep: Callable[[int], None], *blocks: Callable[[], np.ndarray]) -> None:
    with device.Streamed(cupy, lambda key, values, since: keep(key)) as queue:
        for number, compute in enumerate(blocks):
            queue.add(number, compute)


# One after the other.


def test_every_block_arrives_in_order_with_its_values(cupy: ModuleType) -> None:
    """Protects the numbers on their way: many more blocks than buffers, of growing sizes."""
    kept: list[tuple[int, np.ndarray]] = []
    with device.Streamed(cupy, lambda key, values, since: kept.append((key, values.copy()))) as queue:
        for number in range(20):
            queue.add(number, block(number, side=1 + number % 7))
    assert [key for key, _ in kept] == list(range(20))
    for number, values in kept:
        np.testing.assert_array_equal(values, block(number, side=1 + number % 7)())


def test_pinned_memory_is_two_blocks(cupy: ModuleType) -> None:
    """Protects the host's memory: buffers are used again, however many blocks there are."""
    with device.Streamed(cupy, lambda key, values, since: None) as queue:
        for number in range(20):
            queue.add(number, block(number))
    assert cupy.pinned == [72, 72]


def test_blocks_are_computed_on_the_one_stream_of_the_process(cupy: ModuleType) -> None:
    """Protects freed memory from lying idle in the pools of many streams."""
    seen = []

    def compute() -> np.ndarray:
        seen.append(fake_cupy.Stream.current)
        return np.zeros((1, 1))

    for _ in range(3):
        with device.Streamed(cupy, lambda key, values, since: None) as queue:
            queue.add(0, compute)
    assert isinstance(seen[0], fake_cupy.Stream)
    assert len(set(map(id, seen))) == 1


def test_the_next_block_is_computed_while_one_is_written(cupy: ModuleType) -> None:
    """Protects a busy device: the writer of block 0 sees block 1 begun before it is done itself."""
    begun = [threading.Event() for _ in range(4)]

    def keep(key: int, values: np.ndarray, since: float) -> None:
        if key + 1 < len(begun):
            assert begun[key + 1].wait(10)

    def compute(number: int) -> np.ndarray:
        begun[number].set()
        return np.zeros((1, 1))

    with device.Streamed(cupy, keep) as queue:
        for number in range(len(begun)):
            queue.add(number, lambda number=number: compute(number))


def test_a_slow_writer_holds_the_computing_back(cupy: ModuleType) -> None:
    """Protects memory where the disk is slower than the device: never more than two blocks that are not written."""
    kept: list[int] = []
    ahead: list[int] = []

    def keep(key: int, values: np.ndarray, since: float) -> None:
        threading.Event().wait(0.005)
        kept.append(key)

    def compute(number: int) -> np.ndarray:
        ahead.append(number - len(kept))
        return np.zeros((1, 1))

    with device.Streamed(cupy, keep) as queue:
        for number in range(12):
            queue.add(number, lambda number=number: compute(number))
    assert len(kept) == 12
    assert max(ahead) == device.BUFFERS - 1


def test_times_of_blocks_do_not_overlap(cupy: ModuleType) -> None:
    """Protects the report's time per tile: a block's time begins when the one before it is done with."""
    times: list[float] = []
    clock = iter(range(100, 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.time, "perf_counter", lambda: float(next(clock)))
        with device.Streamed(cupy, lambda key, values, since: times.append(since)) as queue:
            for number in range(5):
                queue.add(number, block(number))
    assert times == sorted(times)
    assert len(set(times)) == 5


# Failures.


def test_what_fails_in_computing_leaves_what_was_computed(cupy: ModuleType) -> None:
    """Protects finished work: blocks before the failing one are kept, and the error is that of computing."""
    kept = []

    def fail() -> np.ndarray:
        raise MemoryError("the device is full")

    with pytest.raises(MemoryError, match="the device is full"):
        run(cupy, kept.append, block(0), block(1), fail)
    assert kept == [0, 1]


def test_what_fails_in_writing_is_raised_and_the_rest_is_written(cupy: ModuleType) -> None:
    """Protects from a run that ends well although a tile was not written; the first error is the one raised."""
    kept = []

    def keep(key: int) -> None:
        if key in (1, 2):
            raise OSError(f"no room for {key}")
        kept.append(key)

    with pytest.raises(OSError, match="no room for 1"):
        run(cupy, keep, *map(block, range(2)))  # known only when all has been added
    assert kept == [0]
    with pytest.raises(OSError, match="no room for 1"):
        run(cupy, keep, *map(block, range(50)))
    assert 49 not in kept  # and known before all is computed


def test_what_fails_on_the_device_is_raised(cupy: ModuleType) -> None:
    """Protects from blocks of a device that has failed meanwhile: its error comes with the event."""
    kept = []

    def broken() -> np.ndarray:
        stream = fake_cupy.Stream.current
        assert stream is not None

        def fail() -> None:
            raise RuntimeError("an illegal memory access")

        stream.enqueue(fail)
        return np.zeros((1, 1))

    device._stream.cache_clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(cupy, kept.append, block(0), broken)
    device._stream.cache_clear()
    assert kept == [0]


def test_no_thread_is_left(cupy: ModuleType) -> None:
    """Protects a worker that lives for days."""
    with device.Streamed(cupy, lambda key, values, since: None) as queue:
        queue.add(0, block(0))
    assert not [thread for thread in threading.enumerate() if thread.name == "tiles"]


# Which side.


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", True), ("general", True), ("cuda", True), ("compiled", False)]
)
def test_the_device_is_used_unless_the_host_s_path_is_asked_for(
    cupy: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, used: bool
) -> None:
    """Protects ``none ignored``, and the choice of a person who compares paths on a machine with a device."""
    monkeypatch.setenv(device.VARIABLE, asked)
    monkeypatch.setattr(Prepared, "on_device", lambda self: "there")
    assert device.used() is used
    here = Prepared({}, np.arange(0))
    assert device.placed(here) == ("there" if used else here)


def test_without_a_device_its_path_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a run that silently computes elsewhere than it was told to."""
    monkeypatch.setattr(device, "why_no_device", lambda: "CuPy finds no GPU")
    here = Prepared({}, np.arange(0))
    assert device.placed(here) is here
    monkeypatch.setenv(device.VARIABLE, "cuda")
    with pytest.raises(KernelError, match=r"MEGAGRAM_KERNEL_PATH=cuda, but CuPy finds no GPU; choose"):
        device.placed(here)


# The whole stage.


@pytest.mark.usefixtures("tiles_of_16")
def test_tiles_of_a_device_are_those_of_the_host(
    samples: small.Samples, root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Protects both outputs of a pass, ragged tiles and records by way of the stream."""
    one = samples.experiment(kernel=NTK, data={"train": 60})
    host = small.make(one, root)
    request.getfixturevalue("cupy")
    there = small.make(one, tmp_path / "device")
    assert there.computed == host.computed
    for output in (0, 1):
        np.testing.assert_array_equal(there.dense(output=output), host.dense(output=output))
        lines = there.stores["train"][output].records()
        assert sorted(tuple(t) for line in lines for t in line["tiles"]) == sorted(there.store.present())
        assert all("cupy 14.0.0, a device" in line["made_with"] for line in lines)
    gram.forget()


@pytest.mark.usefixtures("tiles_of_16", "cupy")
def test_a_value_that_is_not_finite_is_refused_by_way_of_the_stream(
    samples: small.Samples, root: Path
) -> None:
    """Protects the check that every tile passes: the samples are named, the tile is not stored, others are."""
    store = small.refused_tile(samples, root)
    assert (0, 0) in store.present()
    assert any([1, 1] in line.get("failed", []) for line in store.records())
    gram.forget()


@pytest.mark.usefixtures("tiles_of_16", "cupy")
def test_prepared_blocks_go_to_the_device_once_and_within_its_memory(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the way to the device: a block is uploaded once for all tiles, and a small device is not overrun."""
    moved: list[int] = []
    monkeypatch.setattr(Prepared, "on_device", lambda self: moved.append(int(self.rows[0])) or self)
    path = small.make(samples.experiment(), root).features[0].store
    assert sorted(moved) == [0, 16, 32, 48, 64]
    gram.forget()
    cache = gram.BlockCache(2**40, on_device=True)
    assert cache._limit == 2**30 // gram.DEVICE_SHARE
    cache.block(path, 0, "")
    assert moved[-1] == 0
    assert len(moved) == 6
    gram.BlockCache(2**40, on_device=False).block(path, 0, "")
    assert len(moved) == 6
