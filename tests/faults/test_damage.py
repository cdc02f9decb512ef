"""Stores damaged behind the back of the program: found, named, mended, by the commands a person would type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drivers import TILES, Driver, Undisturbed, tile_files

from pipelines.stores import GramStore


def spoil(root: Path) -> dict[str, Path]:
    """Flip, cut, empty and delete one tile each."""
    (store,) = [GramStore(path) for path in (root / "gram").iterdir()]
    files = {f"{i}/{j}": store.chunk("gram", (i, j)) for i, j in ((5, 2), (6, 6), (7, 0), (3, 1))}
    for file, change in zip(files.values(), (_flip, lambda b: b[:-10], lambda b: b"", None), strict=True):
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(file.read_bytes()))
    return files


def _flip(content: bytes) -> bytes:
    return content[:77] + bytes([content[77] ^ 2]) + content[78:]


def test_damage_is_named_by_verify_discarded_by_repair_and_mended_by_a_run(
    driver: Driver, finished: Path
) -> None:
    """Protects a store on a bad disk: every fault by tile, exit code 5, then exactly those tiles again."""
    root = finished
    before = tile_files(root)
    files = spoil(root)
    out, _ = driver.run("verify", str(root), "--json", code=5)
    (found,) = [one for one in json.loads(out.splitlines()[-1]) if one["kind"] == "gram"]
    assert [line.split(": ")[1] for line in found["bad"]] == ["tile 5/2", "tile 6/6", "tile 7/0"]
    assert [line.split(": ")[1] for line in found["missing"]] == ["tile 3/1"]
    driver.run("verify", str(root), "--repair")
    assert not any(file.exists() for file in files.values())
    again = driver.facts(root)
    assert (again["tiles_computed"], again["tiles_reused"]) == (4, TILES - 4)
    assert tile_files(root) == before


@pytest.mark.parametrize(
    "damage", [_flip, pytest.param(lambda b: b"", marks=pytest.mark.slow)], ids=["flipped", "emptied"]
)
def test_tiles_found_damaged_by_the_solve_are_computed_again(
    driver: Driver, finished: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Protects a run from damage that nobody looked for: it mends the store and says so."""
    root = finished
    before = tile_files(root)
    spoilt = sorted(before)[15:20]
    for name in spoilt:
        (root / name).write_bytes(damage(before[name]))
    out, err = driver.run(*driver.command(root, "--set", "solve.ridges=[0.25]"), "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["tiles_computed"], facts["tiles_reused"]) == (5, TILES - 5)
    assert "was damaged" in err
    assert "5 damaged or missing chunks are computed again" in err
    assert tile_files(root) == before


@pytest.mark.slow
def test_prepared_blocks_found_damaged_are_made_again(driver: Driver, finished: Path) -> None:
    """Protects the stages before: damage to what tiles are computed from does not end a run."""
    root = finished
    before = tile_files(root)
    for pattern in ("features/*/unit/c/4/0", "pools/*/X/c/0/0"):
        (file,) = root.glob(pattern)
        file.write_bytes(file.read_bytes()[:-3])
    for name in before:
        if name.endswith(("/8/3", "/4/4")):
            (root / name).unlink()
    assert driver.facts(root)["tiles_computed"] == 2
    assert tile_files(root) == before


def test_a_tile_of_another_matrix_is_refused(driver: Driver, finished: Path) -> None:
    """Protects from wrong values under a right checksum, such as a file copied to the wrong place."""
    root = finished
    for name in tile_files(root):
        if name.endswith("/0/0"):
            (root / name).write_bytes((root / name[:-3] / "1" / "1").read_bytes())
    _, err = driver.run(*driver.command(root), code=5)
    last = err.strip().splitlines()[-1]
    assert "tile 0/0 are not what the kernel computes now" in last
    assert "remove" in last


@pytest.mark.slow
def test_any_byte_of_any_file_may_be_flipped(
    driver: Driver, finished: Path, undisturbed: Undisturbed, rng: np.random.Generator
) -> None:
    """Protects readers: one flipped byte anywhere under a root ends in the right result or in one clear line."""
    root = finished
    whole = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and not p.is_symlink()}
    files = [p for p in sorted(whole) if p.parent.parent.parent.name != "results" and whole[p]]
    for _ in range(12):
        path = files[int(rng.integers(len(files)))]
        content = bytearray(whole[path])
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        process = driver.start(*driver.command(root, "--set", "solve.ridges=[0.01, 0.001]"), "--json")
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        if process.returncode == 0:
            facts = json.loads(out.splitlines()[-1])
            assert facts["validation_accuracy"] == undisturbed.facts["validation_accuracy"], path
        else:
            assert process.returncode in (2, 3, 5, 6), (path, err)
            assert "unexpected" not in err, (path, err)
        path.write_bytes(whole[path])
