"""Damage found in the middle of a solve, by whatever method: mended, and the same numbers as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drivers import TILES, Driver, Undisturbed, tile_files

METHODS = {
    "tiled-cholesky": (),
    "conjugate-gradient": ("--set", "gram.tiles=stored"),
    "nystrom": ("--set", "gram.tiles=stored", "--set", "solve.centres=50"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_damaged_tiles_are_mended_whatever_the_method(driver: Driver, finished: Path, method: str) -> None:
    """Protects every solver's way out: a lost tile goes to who can compute it, and the solve is repeated."""
    root = finished
    before = tile_files(root)
    for name in sorted(before)[15:20]:
        (root / name).write_bytes(before[name][:-5])
    options = ("--set", f"solve.method={method}", *METHODS[method])
    out, err = driver.run(*driver.command(root, *options), "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["tiles_computed"], facts["tiles_reused"]) == (5, TILES - 5)
    assert "5 damaged or missing chunks are computed again" in err
    assert tile_files(root) == before
    assert not list((root / "solves").glob("*"))


@pytest.mark.slow
def test_prepared_blocks_are_mended_where_tiles_are_recomputed(
    driver: Driver, finished: Path, undisturbed: Undisturbed
) -> None:
    """Protects a run without a stored matrix: its blocks are all it has."""
    root = finished
    (block,) = root.glob("features/*/unit/c/4/0")
    block.write_bytes(block.read_bytes()[:-3])
    options = ("--set", "solve.method=conjugate-gradient", "--set", "gram.tiles=recomputed")
    facts = driver.facts(root, *options)
    assert facts["validation_accuracy"] == undisturbed.facts["validation_accuracy"]
    assert facts["tiles_computed"] == 0
