"""Several arrays in one file: what was written, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.archives import load_arrays, save_arrays


def test_no_bit_of_the_table_of_contents_may_be_another_one(tmp_path: Path) -> None:
    """Protects a restart from damage in an iteration or a sum that was kept, where no checksum tells it: it is noticed,
    and no error. Arrays themselves have checksums."""
    path, written = tmp_path / "kept.npz", {"X": np.arange(3.0), "phase": np.arange(2)}
    save_arrays(path, written, durable=False)
    whole = path.read_bytes()
    table = range(8 * whole.index(b"PK\x01\x02"), 8 * len(whole))
    noticed = 0
    for bit in table:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = load_arrays(path, written)
        if found is None:
            noticed += 1
            continue
        for name, values in written.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)
    assert noticed > len(table) / 4, "others are in times and the like, which nobody reads"


def test_arrays_of_other_names_are_none(tmp_path: Path) -> None:
    save_arrays(tmp_path / "kept.npz", {"X": np.zeros(2)}, durable=False)
    assert load_arrays(tmp_path / "kept.npz", ["X", "R"]) is None
    assert load_arrays(tmp_path / "kept.npz") is not None
    assert load_arrays(tmp_path / "none.npz") is None
