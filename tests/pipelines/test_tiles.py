"""The geometry of tiles against sets of entries."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.tiles import Grid, as_ranges, group_size, rectangles

grids = st.builds(
    lambda n, m, side, symmetric: Grid(n, n if symmetric else m, side, symmetric),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 12),
    st.booleans(),
)


def tiles_of(grid: Grid) -> set[tuple[int, int]]:
    rows, columns = grid.shape
    return {(i, j) for i in range(rows) for j in range(columns) if grid.contains((i, j))}


@settings(deadline=None, max_examples=80)
@given(grids)
def test_tiles_cover_every_entry_once(grid: Grid) -> None:
    """Protects the cut: whole tiles everywhere but at the end; a symmetric one has each pair once or mirrored."""
    covered = np.zeros((grid.n, grid.m), int)
    for tile in tiles_of(grid):
        rows, columns = grid.extent(tile)
        covered[rows, columns] += 1
        assert grid.entries(tile) == covered[rows, columns].size
        assert rows.stop == grid.n or rows.stop - rows.start == grid.side
        assert columns.stop == grid.m or columns.stop - columns.start == grid.side
    if not grid.symmetric:
        assert (covered == 1).all()
    else:
        assert (np.maximum(covered, covered.T) == 1).all()
        assert (np.tril(covered) == np.tri(grid.n)).all()


def test_no_tile_lies_outside() -> None:
    """Protects against tiles above the diagonal, beyond the end, or before the beginning."""
    symmetric, rectangular = Grid(10, 10, 4, True), Grid(10, 5, 4, False)
    assert not any(symmetric.contains(tile) for tile in ((0, 1), (3, 0), (-1, -1), (1, -1)))
    assert rectangular.contains((0, 1))
    assert not any(rectangular.contains(tile) for tile in ((0, 2), (3, 0)))


@settings(deadline=None, max_examples=80)
@given(grids, st.data())
def test_touched_tiles_are_those_with_an_entry(grid: Grid, data: st.DataObject) -> None:
    """Protects the count of needed tiles: exactly those that hold an entry of rows x columns."""
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, grid.n - 1), min_size=1))))
    columns = np.array(sorted(data.draw(st.sets(st.integers(0, grid.m - 1), min_size=1))))
    expected = set()
    for i in rows // grid.side:
        for j in columns // grid.side:
            expected.add((int(max(i, j)), int(min(i, j))) if grid.symmetric else (int(i), int(j)))
    touched = grid.touched(rows, columns)
    assert touched == expected
    assert all(grid.contains(tile) for tile in touched)


@settings(deadline=None, max_examples=80)
@given(st.sets(st.tuples(st.integers(0, 15), st.integers(0, 15))), st.integers(1, 6))
def test_rectangles_partition_the_tiles(tiles: set[tuple[int, int]], group: int) -> None:
    """Protects tasks: every tile in one task, each inside one square of the fixed grid."""
    made = rectangles(tiles, group)
    listed = [tile for rectangle in made for tile in rectangle.tiles]
    assert sorted(listed) == sorted(tiles)
    for rectangle in made:
        assert len({(i // group, j // group) for i, j in rectangle.tiles}) == 1
        rows, columns = rectangle.blocks
        assert len(rows) <= group
        assert len(columns) <= group
        assert rows == tuple(sorted({i for i, _ in rectangle.tiles}))


def test_a_resumed_run_cuts_tasks_on_the_same_grid() -> None:
    """Protects resumption beside another driver: what is missing lies in the squares it had before."""
    tiles = {(i, j) for i in range(8) for j in range(i + 1)}
    whole = {r.tiles for r in rectangles(tiles, 3)}
    for rectangle in rectangles({t for t in tiles if sum(t) % 3}, 3):
        assert any(set(rectangle.tiles) <= set(square) for square in whole)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, 1e4, allow_nan=False), st.integers(0, 64), st.integers(1, 50))
def test_group_size_is_bounded(tiles: int, seconds: float, workers: int, largest: int) -> None:
    """Protects memory and fairness: at least one tile, never beyond memory, at least four tasks a worker."""
    side = group_size(tiles, seconds, workers, largest)
    assert 1 <= side <= largest
    assert side == 1 or side * side * 4 * max(workers, 1) <= tiles


def test_slow_tiles_are_tasks_of_their_own() -> None:
    """Protects progress and little lost work: tiles of two seconds are not grouped, quick ones are."""
    assert group_size(10_000, 2.0, 2, 50) == 1
    assert group_size(10_000, 0.02, 2, 50) == 10


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 30)))
def test_ranges_say_the_same_rows(rows: set[int]) -> None:
    """Protects the journal's short form of tiles."""
    runs = list(as_ranges(sorted(rows)))
    assert [row for start, stop in runs for row in range(start, stop)] == sorted(rows)
    assert all(b[0] > a[1] for a, b in pairwise(runs))
