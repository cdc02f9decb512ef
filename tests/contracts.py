"""What every kernel must keep, to be inherited by the test class of each kernel."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from kernels.base import Kernel, KernelError, Prepared
from kernels.registry import from_description


class KernelContract:
    """Subclasses give ``kernel``, ``different`` (another kernel of the kind) and the shape of a sample.

    float32_error: allowed difference from float64, relative to sqrt(k(x, x) k(y, y)).
    """

    kernel: Kernel
    different: Kernel
    shape: tuple[int, ...]
    float32_error = 1e-6

    def samples(self, n: int = 7, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((n, *self.shape)).astype(dtype)

    def blocks(self, K: np.ndarray) -> list[np.ndarray]:
        """The outputs of the kernel as a list of matrices (or diagonals)."""
        return list(K) if len(self.kernel.outputs) > 1 else [K]

    def test_description_round_trip(self) -> None:
        """A kernel rebuilt from JSON is the same value with the same fingerprint."""
        rebuilt = from_description(json.loads(json.dumps(self.kernel.describe())))
        assert rebuilt == self.kernel
        assert rebuilt.describe() == self.kernel.describe()
        assert rebuilt.fingerprint == self.kernel.fingerprint

    def test_fingerprint_tells_kernels_apart(self) -> None:
        """Other parameters give another fingerprint, so they never share a store."""
        assert self.kernel.fingerprint != self.different.fingerprint
        assert len(self.kernel.fingerprint) == 64

    def test_sub_blocks_equal_the_whole(self) -> None:
        """Where a matrix is cut changes its values by rounding at most (C11)."""
        a, b = (
            self.kernel.prepare(self.samples(7)),
            self.kernel.prepare(self.samples(6, seed=1), pool="other"),
        )
        whole = self.kernel.pair(a, b)
        scale = np.abs(whole).max()
        for rows, part_a in a.blocks(3):
            for columns, part_b in b.blocks(4):
                part = self.kernel.pair(part_a, part_b)
                assert np.abs(part - whole[..., rows, columns]).max() <= 1e-12 * scale

    def test_preparing_in_blocks_changes_nothing(self) -> None:
        """Prepared blocks do not depend on the samples beside them."""
        X = self.samples(7)
        whole, part = self.kernel.prepare(X), self.kernel.prepare(X[2:5], np.arange(2, 5))
        for name, array in part.arrays.items():
            np.testing.assert_allclose(array, whole.arrays[name][2:5], rtol=1e-12, atol=1e-14)

    def test_symmetric_and_positive_semidefinite(self) -> None:
        """C16: the smallest eigenvalue is at least -1e-10 times the largest."""
        for K in self.blocks(self.kernel.gram(self.samples(12))):
            assert np.abs(K - K.T).max() <= 1e-13 * np.abs(K).max()
            eigenvalues = np.linalg.eigvalsh(K)
            assert eigenvalues[0] >= -1e-10 * eigenvalues[-1]

    def test_diagonal(self) -> None:
        """diag is the diagonal of pair, by the same rule for cosines."""
        a = self.kernel.prepare(self.samples(7))
        for diagonal, K in zip(
            self.blocks(self.kernel.diag(a)), self.blocks(self.kernel.pair(a, a)), strict=True
        ):
            np.testing.assert_allclose(diagonal, np.diag(K), rtol=1e-12)

    def test_float32_agrees_with_float64(self) -> None:
        X, Y = self.samples(7), self.samples(6, seed=1)
        X, Y = X.astype(np.float32).astype(np.float64), Y.astype(np.float32).astype(np.float64)
        single = self.kernel.gram(X.astype(np.float32), Y.astype(np.float32))
        double = self.kernel.gram(X, Y)
        assert single.dtype == np.float32
        assert double.dtype == np.float64
        diagonals = [self.blocks(self.kernel.diag(self.kernel.prepare(Z))) for Z in (X, Y)]
        for K, reference, d, e in zip(self.blocks(single), self.blocks(double), *diagonals, strict=True):
            assert (np.abs(K - reference) / np.sqrt(np.outer(d, e))).max() <= self.float32_error

    def test_prepared_arrays_keep_the_dtype(self) -> None:
        for dtype in (np.float32, np.float64):
            prepared = self.kernel.prepare(self.samples(3, dtype=dtype))
            assert all(array.dtype == dtype and len(array) == 3 for array in prepared.arrays.values())
            assert self.kernel.diag(prepared).dtype == dtype

    def test_a_zero_sample_gives_zeros(self) -> None:
        """K2: never NaN."""
        X = self.samples(3)
        X[1] = 0
        for dtype in (np.float32, np.float64):
            K = self.kernel.gram(X.astype(dtype), self.samples(2, seed=1, dtype=dtype))
            assert np.all(K[..., 1, :] == 0)
            assert np.all(K[..., 0, :] != 0)
            assert np.all(self.kernel.diag(self.kernel.prepare(X.astype(dtype)))[..., 1] == 0)

    def test_same_sample_by_row_id(self) -> None:
        """K13: equal row ids of one pool give cosine 1, wherever they meet in a block."""
        X = self.samples(6)
        for dtype in (np.float32, np.float64):
            Z = X.astype(dtype)
            a = self.kernel.prepare(Z[:4], np.arange(4), "pool")
            b = self.kernel.prepare(Z[[5, 2, 0]], np.array([5, 2, 0]), "pool")
            K, diagonal = self.kernel.pair(a, b), self.kernel.diag(a)
            np.testing.assert_allclose(K[..., 2, 1], diagonal[..., 2], rtol=4 * np.finfo(dtype).eps)
            np.testing.assert_allclose(K[..., 0, 2], diagonal[..., 0], rtol=4 * np.finfo(dtype).eps)

    def test_one_sample(self) -> None:
        a, b = (
            self.kernel.prepare(self.samples(1)),
            self.kernel.prepare(self.samples(1, seed=1), pool="other"),
        )
        assert self.kernel.pair(a, b).shape[-2:] == (1, 1)

    def test_inputs_are_left_alone(self) -> None:
        """Neither prepare nor pair writes to what it was given."""
        X = self.samples(4)
        copy = X.copy()
        a = self.kernel.prepare(X)
        before = {name: array.copy() for name, array in a.arrays.items()}
        block = self.kernel.pair(a, a)
        block[...] = np.nan
        np.testing.assert_array_equal(X, copy)
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, before[name])

    def test_every_output_of_one_pass_equals_the_kernel_alone(self) -> None:
        """One pass over several outputs gives what each kernel gives alone, from the same prepared blocks."""
        joint = self.kernel.joint()
        a, b = joint.prepare(self.samples(5)), joint.prepare(self.samples(4, seed=1), pool="other")
        together = joint.pair(a, b)
        if len(joint.outputs) == 1:
            together = together[None]
        assert together.shape == (len(joint.outputs), 5, 4)
        for K, alone in zip(together, joint.outputs, strict=True):
            assert alone.prepared_description() == joint.prepared_description()
            np.testing.assert_allclose(K, alone.pair(a, b), rtol=1e-12)

    def test_wrong_input_is_refused(self) -> None:
        X = self.samples(3)
        with pytest.raises(KernelError, match="float32 or float64"):
            self.kernel.prepare((100 * X).astype(np.int64))
        with pytest.raises(KernelError, match="samples of shape"):
            self.kernel.prepare(X[..., None])
        with pytest.raises(KernelError, match="row ids"):
            self.kernel.prepare(X, np.arange(2))
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
            self.kernel.gram(X.tolist())

    def test_blocks_of_different_kinds_of_samples_are_refused(self) -> None:
        a = self.kernel.prepare(self.samples(2))
        with pytest.raises(KernelError, match="do not match"):
            self.kernel.pair(a, self.kernel.prepare(self.samples(2, dtype=np.float32)))

    def test_host_and_device_arrays_do_not_mix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = types.ModuleType("cupy")
        device.ndarray = type("ndarray", (), {"shape": (), "dtype": np.float64})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cupy", device)
        a = self.kernel.prepare(self.samples(2))
        b = Prepared({name: device.ndarray() for name in a.arrays}, a.rows, a.pool)
        with pytest.raises(TypeError, match="mixed"):
            self.kernel.pair(a, b)

    def test_cost_grows_with_the_block(self) -> None:
        small, large = (self.kernel.cost(n, n, self.shape) for n in (10, 20))
        assert large.operations == pytest.approx(4 * small.operations)
        assert large.transcendentals == pytest.approx(4 * small.transcendentals)
        assert min(small.scratch_bytes, large.scratch_bytes) >= 0

    def test_general_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The path that is there on any machine, asked for."""
        monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", "general")
        assert self.kernel.path(self.kernel.prepare(self.samples(2))) == "numpy"
