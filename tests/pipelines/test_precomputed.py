"""A user's own Gram matrices: read instead of computed, checked, and never taken for another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from kernels.base import KernelError
from kernels.registry import from_description
from pipelines import pools, stores
from pipelines.errors import DataError, MegagramError
from pipelines.experiment import Experiment
from pipelines.precomputed import Precomputed

pytestmark = pytest.mark.usefixtures("tiles_of_16")


class Matrices:
    """Linear Gram matrices of 40 pool samples and 20 test samples, as a user's files."""

    def __init__(self, folder: Path, suffix: str = ".npy") -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.suffix = folder, suffix
        X, self.y = small.Samples(folder).arrays(60)
        self.K = X @ X.T
        self.save("gram", self.K[:40, :40])
        self.save("cross", self.K[40:, :40])
        np.save(folder / "y.npy", self.y[:40])
        np.save(folder / "y_test.npy", self.y[40:])

    def path(self, name: str) -> str:
        return str(self.folder / (name + self.suffix))

    def save(self, name: str, matrix: np.ndarray) -> None:
        if self.suffix == ".zarr":
            import zarr

            zarr.create_array(self.path(name), data=np.ascontiguousarray(matrix), overwrite=True)
        elif self.suffix == ".npz":
            np.savez(self.path(name), K=matrix)
        else:
            np.save(self.path(name), matrix)

    def table(self, **kernel: Any) -> dict[str, Any]:
        return {
            "name": "own",
            "data": {
                "source": "arrays",
                "y": str(self.folder / "y.npy"),
                "y_test": str(self.folder / "y_test.npy"),
                "train": 28,
                "validation": 10,
                "test": 20,
            },
            "kernel": {
                "kind": "precomputed",
                "gram": self.path("gram"),
                "cross": self.path("cross"),
                **kernel,
            },
            "gram": {"dtype": "float64"},
            "solve": {"ridges": [1e-1, 1e-2]},
        }

    def experiment(self, **kernel: Any) -> Experiment:
        return Experiment.model_validate(self.table(**kernel))


@pytest.fixture
def matrices(tmp_path: Path) -> Matrices:
    return Matrices(tmp_path / "own")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".zarr"])
def test_tiles_hold_the_users_entries(tmp_path: Path, root: Path, suffix: str) -> None:
    """Protects own matrices of any format: every entry that training and evaluation read, bit by bit."""
    matrices = Matrices(tmp_path / "own", suffix)
    made = small.make(matrices.experiment(), root)
    K = matrices.K
    np.testing.assert_array_equal(made.dense()[:, :28], K[:40, :28])
    np.testing.assert_array_equal(made.dense("test")[:, :28], K[40:, :28])


def test_accuracies_are_those_of_the_kernel_that_made_them(
    matrices: Matrices, root: Path, tmp_path: Path
) -> None:
    """Protects the whole way: validation and test accuracies equal dense algebra on the user's matrices."""
    found = small.evaluate(matrices.experiment(), root, tmp_path / "result")
    K, y = matrices.K, matrices.y
    Y = (y[:28, None] == np.arange(3)) - 1 / 3
    alpha = np.linalg.solve(K[:28, :28] + 28 * found["ridge"] * np.eye(28), Y)
    for part, rows in (("validation", slice(30, 40)), ("test", slice(40, 60))):
        right = np.sum(np.argmax(K[rows, :28] @ alpha, axis=1) == y[rows])
        assert found[part]["accuracy"] == 100 * right / len(y[rows])


def test_a_second_run_reuses_and_checks(matrices: Matrices, root: Path) -> None:
    """Protects resumption: entries of a test matrix, whose own diagonal is in no file, are checked as well."""
    small.make(matrices.experiment(), root)
    assert small.make(matrices.experiment(), root).computed == {"train": 0, "test": 0}


def test_a_changed_matrix_gets_another_store(matrices: Matrices, root: Path) -> None:
    """Protects from tiles of a matrix that the user has replaced: one entry anywhere is enough."""
    first = small.make(matrices.experiment(), root).store.path
    changed = matrices.K[:40, :40].copy()
    changed[39, 0] = changed[0, 39] = 7.0
    matrices.save("gram", changed)
    made = small.make(matrices.experiment(), root)
    assert made.store.path != first
    np.testing.assert_array_equal(made.dense()[:, :28], changed[:, :28])
    assert len(stores.store_paths(root)) > 2


def test_values_that_are_not_finite_are_refused(matrices: Matrices, root: Path) -> None:
    """Protects the solve: NaN in a user's matrix is named by its samples."""
    broken = matrices.K[:40, :40].copy()
    broken[20, 3] = np.nan
    matrices.save("gram", broken)
    with pytest.raises(MegagramError, match="samples 20 and 3"):
        small.make(matrices.experiment(), root)


def test_blocks_of_scattered_rows(matrices: Matrices) -> None:
    """Protects blocks of any increasing rows, both ways round between pool and test samples."""
    kernel = matrices.experiment().kernel_object

    def block(*rows: int) -> Any:
        return kernel.prepare(np.array(rows, float)[:, None], np.array(rows))

    np.testing.assert_array_equal(
        kernel.pair(block(1, 5, 39), block(0, 2)), matrices.K[np.ix_([1, 5, 39], [0, 2])]
    )
    np.testing.assert_array_equal(
        kernel.pair(block(41, 59), block(3, 4)), matrices.K[np.ix_([41, 59], [3, 4])]
    )
    np.testing.assert_array_equal(
        kernel.pair(block(3, 4), block(41, 59)), matrices.K[np.ix_([3, 4], [41, 59])]
    )
    np.testing.assert_array_equal(kernel.diag(block(0, 7)), matrices.K[[0, 7], [0, 7]])
    with pytest.raises(DataError, match="no entries between two test samples"):
        kernel.pair(block(41), block(42))
    with pytest.raises(DataError, match="mixes"):
        kernel.pair(block(39, 41), block(0))


def test_a_test_set_needs_its_own_matrix(matrices: Matrices) -> None:
    """Protects from silence: test samples without ``cross`` are refused, with what to give."""
    table = matrices.table()
    del table["kernel"]["cross"]
    with pytest.raises(MegagramError, match=r"test|cross"):
        pools.resolve(Experiment.model_validate(table))


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (np.ones((4, 3)), "square"),
        (np.ones(4), r"\(n, n\)"),
        (np.ones((4, 4), int), "float32 or float64"),
        (np.ones((4, 4), complex), "float32 or float64"),
        (np.tri(300), "entries 0, 1 and 1, 0 are 0 and 1"),
        (np.eye(300) + 0.01 * (np.arange(90000) == 299).reshape(300, 300), "entries 299, 0 and 0, 299"),
    ],
)
def test_matrices_of_a_wrong_form_are_refused(matrices: Matrices, matrix: np.ndarray, said: str) -> None:
    """Protects from matrices that are none: the file is named."""
    matrices.save("gram", matrix)
    with pytest.raises(KernelError, match=said) as caught:
        from_description(matrices.table()["kernel"])
    assert matrices.path("gram") in str(caught.value)


def test_files_that_do_not_fit_together_are_refused(matrices: Matrices, tmp_path: Path) -> None:
    """Protects from mixed-up files: other widths, labels of another number, paths that lead nowhere."""
    matrices.save("cross", np.ones((5, 39)))
    with pytest.raises(KernelError, match="columns"):
        from_description(matrices.table()["kernel"])
    with pytest.raises(KernelError, match="no such file"):
        from_description(matrices.table(gram=str(tmp_path / "nowhere.npy"))["kernel"])
    with pytest.raises(KernelError, match="cros"):
        from_description(matrices.table(cros="x")["kernel"])
    matrices.save("cross", matrices.K[40:, :40])
    np.save(matrices.folder / "y.npy", matrices.y[:39])
    with pytest.raises(DataError, match="39"):
        pools.resolve(matrices.experiment())


def test_pickled_matrices_are_not_read(matrices: Matrices) -> None:
    """Protects from files that would execute code."""
    np.save(matrices.path("gram"), np.array([[object()]], dtype=object), allow_pickle=True)
    with pytest.raises(KernelError, match=r"gram\.npy"):
        from_description(matrices.table()["kernel"])


def test_the_description_makes_the_kernel_again(matrices: Matrices) -> None:
    """Protects workers: the kernel they build from JSON has the same fingerprint, without reading the file."""
    kernel = matrices.experiment().kernel_object
    assert isinstance(kernel, Precomputed)
    again = from_description(kernel.describe())
    assert again.fingerprint == kernel.fingerprint
    assert again.size == 40
