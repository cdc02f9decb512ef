"""How much memory there is, how much was used, and what a worker will need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kernels.registry import from_description
from pipelines import memory


def group(folder: Path, version: int, *, limit: str, used: int, cached: int) -> None:
    """The files of a control group."""
    folder = folder if version == 2 else folder / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nother 7\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Protects from plans for the whole machine inside a container; cached files give way and count as free."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    group(tmp_path, version, limit=str(2**27), used=2**26, cached=2**20)
    assert memory.available_bytes() == 2**26 + 2**20
    group(tmp_path, version, limit=str(2**27), used=2**28, cached=0)
    assert memory.available_bytes() == 0


def test_no_container_or_one_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects plain machines: what the system says is available."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    total = psutil.virtual_memory().total
    assert 0 < memory.available_bytes() <= total
    group(tmp_path, 2, limit="max", used=2**40, cached=0)
    assert 0 < memory.available_bytes() <= total


def test_the_peak_is_of_this_process_alone() -> None:
    """Protects figures of small workers started by a large driver: they do not inherit its peak."""
    big = bytearray(300 * 2**20)
    big[::4096] = b"x" * len(big[::4096])
    assert memory.peak_bytes() > len(big)
    code = "from pipelines import memory; print(memory.peak_bytes())"
    own = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(own.stdout) < len(big)


def needs(n: int = 10_000, blocks: int = 10, worker: int = 2**33, family: str = "rf") -> memory.TaskMemory:
    kernel = from_description({"kind": "fully-connected", "family": family, "depth": 3})
    return memory.task_memory(kernel, (784,), 785 * 4, n, "float32", blocks, worker)


def test_what_a_worker_needs_follows_the_work() -> None:
    """Protects the plan's peak: more blocks until its cache is full, two outputs, tiles of small pools."""
    block = 2048 * 785 * 4
    assert needs(blocks=3).blocks == 3 * block
    assert needs(blocks=10**6, worker=2**30).blocks == 2**29
    assert needs(blocks=10**6, worker=1).blocks == max(2**26, 2 * block)
    assert needs(family="both").tile - needs().tile == 2048**2 * 4
    assert needs(n=100).total < needs().total
    assert needs().total == needs().base + needs().blocks + needs().tile + needs().scratch


def test_a_triangle_takes_the_memory_of_a_triangle() -> None:
    """Protects the plan of a factor in memory: pages that are not written to are not taken."""
    n = 8000
    before = psutil.Process().memory_info().rss
    matrix = memory.by_the_page((n, n), "float64")
    assert matrix.flags.f_contiguous
    assert matrix.flags.writeable
    for column in range(n):
        matrix[column:, column] = 1
    taken = psutil.Process().memory_info().rss - before
    assert taken < 0.6 * matrix.nbytes
    assert not matrix[0, 1:].any()


def test_addresses_that_the_system_refuses_are_too_little_memory() -> None:
    with pytest.raises(MemoryError, match="refuses"):
        memory.by_the_page((2**24, 2**24), "float64")
