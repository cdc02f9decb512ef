"""Products of a block with a few columns: compiled code on every instruction set and NumPy give the plain product."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import columns, fused
from kernels.base import KernelError
from kernels.native import library

PATHS = ("general", *library.INSTRUCTION_SETS)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "general":
        monkeypatch.setenv(fused.VARIABLE, "general")
        return request.param
    monkeypatch.setenv(library.VARIABLE, request.param)
    try:
        library.load()
    except KernelError as error:
        pytest.skip(str(error))
    return request.param


def compiled() -> None:
    try:
        library.load()
    except KernelError as error:
        pytest.skip(str(error))


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda block: block,
    "F": np.asfortranarray,
    "wide rows": lambda block: np.pad(block, ((2, 1), (3, 5)))[2:-1, 3:-5],
    "every third": lambda block: np.repeat(np.repeat(block, 3, axis=0), 3, axis=1)[::3, ::3],
    "backwards": lambda block: np.ascontiguousarray(block[::-1, ::-1])[::-1, ::-1],
    "gathered": lambda block: np.pad(block, ((0, 0), (0, 9)))[:, np.arange(block.shape[1])],
    "unaligned": lambda block: unaligned(block),
}
"""The same values, laid out as parts of tiles are, and in other ways."""


def unaligned(block: np.ndarray) -> np.ndarray:
    content = np.empty(block.nbytes + 1, np.uint8)
    found = content[1:].view(block.dtype).reshape(block.shape)
    found[...] = block
    return found


def compare(block: np.ndarray, t: int, seed: int) -> None:
    """Both products and each alone, added to what is there, against NumPy in float64."""
    n, m = block.shape
    rng = np.random.default_rng(seed)
    V_columns, V_rows = rng.standard_normal((m, t)), rng.standard_normal((n, t))
    before_rows, before_columns = rng.standard_normal((n, t)), rng.standard_normal((m, t))
    wide = block.astype(np.float64)
    expected = before_rows + wide @ V_columns, before_columns + wide.T @ V_rows
    both = before_rows.copy(), before_columns.copy()
    columns.add_both_products(block, V_columns, V_rows, *both)
    alone = before_rows.copy(), before_columns.copy()
    columns.add_product(block, V_columns, alone[0])
    columns.add_product(block.T, V_rows, alone[1])
    bounds = 1 + np.abs(wide) @ np.abs(V_columns), 1 + np.abs(wide).T @ np.abs(V_rows)
    for found in (both, alone):
        for got, right, bound in zip(found, expected, bounds, strict=True):
            assert (np.abs(got - right) <= 1e-14 * bound).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    m=st.integers(0, 40) | st.integers(1000, 1100),
    t=st.integers(1, 40) | st.integers(60, 70),
    dtype=st.sampled_from([np.float32, np.float64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_any_block(path: str, n: int, m: int, t: int, dtype: type, layout: str, seed: int) -> None:
    """Ragged strips, panels and groups of columns; every layout; nothing beyond the block is read into a sum."""
    block = np.random.default_rng(seed).standard_normal((n, m)).astype(dtype)
    compare(LAYOUTS[layout](block), t, seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_of_several_pieces(path: str, dtype: type) -> None:
    """Larger than what is multiplied at a time, in both directions."""
    block = np.random.default_rng(0).standard_normal((2 * columns.BLOCK + 3, 3301)).astype(dtype)
    compare(block, 10, 0)


def test_what_lies_beside_a_block_does_not_matter(path: str) -> None:
    """Protects parts of tiles from their neighbours: NaN around a block reaches no sum."""
    tile = np.full((30, 50), np.nan, np.float32)
    tile[5:18, 7:40] = 1
    out_rows, out_columns = np.zeros((13, 3)), np.zeros((33, 3))
    columns.add_both_products(tile[5:18, 7:40], np.ones((33, 3)), np.ones((13, 3)), out_rows, out_columns)
    assert (out_rows == 33).all()
    assert (out_columns == 13).all()


def test_values_that_are_not_finite_stay_where_they_belong(path: str) -> None:
    """A diverging column, or a row, spoils its own sums and no others, and never looks finite."""
    block = np.ones((13, 21), np.float32)
    V_columns, V_rows = np.ones((21, 3)), np.ones((13, 3))
    V_columns[20, 1] = V_rows[12, 2] = np.inf
    out_rows, out_columns = np.zeros((13, 3)), np.zeros((21, 3))
    with np.errstate(invalid="ignore"):
        columns.add_both_products(block, V_columns, V_rows, out_rows, out_columns)
    assert np.array_equal(np.isfinite(out_rows).all(axis=0), [True, False, True])
    assert np.array_equal(np.isfinite(out_columns).all(axis=0), [True, True, False])
    assert (out_rows[:, 0] == 21).all()
    assert (out_columns[:, 0] == 13).all()


def test_the_same_bits_again_wherever_a_block_lies_and_from_many_threads(path: str) -> None:
    """Protects sums that must not depend on a tile's place in memory, nor on how many threads multiply."""
    block = np.random.default_rng(0).standard_normal((203, 517)).astype(np.float32)
    V_columns, V_rows = (np.random.default_rng(1).standard_normal((k, 10)) for k in (517, 203))

    def run(layout: str) -> tuple[np.ndarray, np.ndarray]:
        found = np.zeros((203, 10)), np.zeros((517, 10))
        columns.add_both_products(LAYOUTS[layout](block), V_columns, V_rows, *found)
        return found

    expected = run("C")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, ["C", "wide rows", "unaligned", "every third"] * 2):
            for got, right in zip(found, expected, strict=True):
                np.testing.assert_array_equal(got, right)


def test_small_numbers_beside_large_ones_are_summed_in_float64(path: str) -> None:
    """Protects the solver's accuracy: float32 entries, whose sum float32 could not hold."""
    block = np.array([[2.0**25, 1.0, -(2.0**25)]], np.float32)
    out = np.zeros((1, 1))
    columns.add_product(block, np.ones((3, 1)), out)
    assert out[0, 0] == 1


def test_the_compiled_code_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a fast path that is never taken: float64 products of a few columns, unless it is asked to do
    without, or what is given is another thing."""
    compiled()
    asked = []
    monkeypatch.setattr(columns, "load", lambda: asked.append(1) or library.load())

    def runs(block: np.ndarray, V: np.ndarray) -> bool:
        asked.clear()
        columns.add_product(block, V, np.zeros((len(block), V.shape[1])))
        return bool(asked)

    block, V = np.ones((3, 5), np.float32), np.ones((5, 2))
    assert runs(block, V)
    assert runs(block.astype(np.float64), V)
    assert not runs(block, V.astype(np.float32))
    assert not runs(block.astype(np.float16), V)
    assert not runs(block, np.ones((5, columns.FEW + 1)))
    monkeypatch.setenv(fused.VARIABLE, "general")
    assert not runs(block, V)


def test_where_nothing_was_built_numpy_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise library.NotBuilt("not built")

    monkeypatch.setattr(columns, "load", fail)
    compare(np.random.default_rng(0).standard_normal((7, 9)).astype(np.float32), 3, 0)
