"""A user's own Gram matrices: read instead of computed, checked, and never taken for another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from pydantic import ValidationError

from kernels.base import KernelError
from kernels.registry import from_description
from pipelines import experiment, pools, speed, stores
from pipelines.errors import DataError, ExperimentError
from pipelines.experiment import Experiment
from pipelines.precomputed import Precomputed

pytestmark = pytest.mark.usefixtures("tiles_of_16")


def toml(table: dict[str, Any]) -> str:
    """A table as TOML, inner tables inline."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{k} = {value(v)}" for k, v in item.items()) + " }"
        if isinstance(item, list):
            return "[" + ", ".join(value(v) for v in item) + "]"
        return json.dumps(item)

    return "".join(f"{key} = {value(item)}\n" for key, item in table.items())


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
    """Protects the solve: NaN in a user's matrix is named by its place before any work."""
    broken = matrices.K[:40, :40].copy()
    broken[20, 3] = np.nan
    matrices.save("gram", broken)
    with pytest.raises(DataError, match=r"gram\.npy: the entry at row 20, column 3 is NaN"):
        small.make(matrices.experiment(), root)
    matrices.save("gram", matrices.K[:40, :40])
    cross = matrices.K[40:, :40].copy()
    cross[1, 2] = np.inf
    matrices.save("cross", cross)
    with pytest.raises(DataError, match=r"cross\.npy: the entry at row 1, column 2"):
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


@pytest.mark.parametrize(
    ("table", "key", "said"),
    [
        ("kernel", "cross", r"kernel\.cross is missing"),
        ("data", "y_test", r"data\.y_test is missing: .* kernel\.cross"),
    ],
)
def test_a_test_set_needs_its_matrix_and_its_labels(
    matrices: Matrices, table: str, key: str, said: str
) -> None:
    """Protects from silence: a test set of which one file was forgotten, with the key to give."""
    changed = matrices.table()
    del changed[table][key]
    with pytest.raises(ValidationError, match=said):
        Experiment.model_validate(changed)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"source": "digits", "y": None, "y_test": None}, 'data.source = "digits" has no meaning'),
        ({"X": "X.npy"}, r"data\.X has no meaning"),
        ({"X_test": "X.npy"}, r"data\.X_test has no meaning"),
        ({"preprocess": ["scale"]}, r"data\.preprocess has no meaning for a precomputed kernel"),
        ({"test": [0, 2], "turn_test": 90}, r"data\.turn_test has no meaning for a precomputed kernel"),
        ({"y": None}, r"data\.y is missing"),
    ],
)
def test_samples_beside_the_matrices_are_refused(matrices: Matrices, data: dict[str, Any], said: str) -> None:
    """Protects from indices that are pixels: a precomputed kernel has no samples but the rows of its files."""
    table = matrices.table()
    table["data"].update(data)
    with pytest.raises(ValidationError, match=said):
        Experiment.model_validate(table)


def combined(matrices: Matrices, *terms: dict[str, Any]) -> dict[str, Any]:
    table = matrices.table()
    own = table["kernel"]
    nested = {"kind": "product", "terms": [{**own, **term} for term in terms]}
    table["kernel"] = {"kind": "sum", "terms": [own, nested]}
    return table


def test_terms_are_matrices_of_the_same_samples(matrices: Matrices, root: Path) -> None:
    """Protects sums and products of own matrices: entries are combined, other sizes are refused."""
    made = small.make(Experiment.model_validate(combined(matrices, {}, {})), root)
    K = matrices.K[:40, :28]
    np.testing.assert_allclose(made.dense()[:, :28], K + K * K, rtol=1e-14)
    for name, matrix in {"small": np.eye(39), "few": np.ones((19, 40))}.items():
        matrices.save(name, matrix)
    np.save(matrices.folder / "narrow.npy", np.ones((20, 39)))
    smaller = {"gram": matrices.path("small"), "cross": matrices.path("narrow")}
    for term in (smaller, {"cross": matrices.path("few")}):
        with pytest.raises(DataError, match="matrices of the same samples"):
            pools.resolve(Experiment.model_validate(combined(matrices, {}, term)))
        file = matrices.folder / "kernel.toml"
        file.write_text(toml(combined(matrices, {}, term)["kernel"]))
        with pytest.raises(DataError, match="matrices of the same samples"):
            experiment.read_kernel(file)


def test_terms_of_samples_are_refused(matrices: Matrices) -> None:
    """Protects from a kernel of vectors that is handed indices."""
    table = matrices.table()
    linear = {"kind": "dot-product", "kernel": "linear"}
    table["kernel"] = {
        "kind": "sum",
        "terms": [table["kernel"], {"kind": "scaled", "weight": 2.0, "term": linear}],
    }
    with pytest.raises(ValidationError, match=r"kernel\.terms\[1\]\.term: .* cannot be combined"):
        Experiment.model_validate(table)
    file = matrices.folder / "kernel.toml"
    file.write_text(toml(table["kernel"]))
    with pytest.raises(ExperimentError, match=r"kernel\.terms\[1\]\.term: .* cannot be combined"):
        experiment.read_kernel(file)


@pytest.mark.parametrize("values", [[0.5], [-1.0], [60.0], [np.nan]])
def test_samples_that_are_no_indices_are_refused(matrices: Matrices, values: list[float]) -> None:
    """Protects from rows of other samples: fractions, negative numbers, and more than there are."""
    kernel = matrices.experiment().kernel_object
    with pytest.raises(DataError, match="a whole number from 0 to 59"):
        kernel.prepare(np.array([values]))
    with pytest.raises(KernelError, match=r"an array \(n, 1\)"):
        kernel.prepare(np.ones((3, 2)))


@pytest.mark.parametrize("wrap", [False, True])
def test_a_matrix_smaller_than_the_calibrations_blocks(
    matrices: Matrices, monkeypatch: pytest.MonkeyPatch, wrap: bool
) -> None:
    """Protects the plan: no block is asked for beyond the matrix, and only entries that exist are counted."""
    table = combined(matrices, {}) if wrap else matrices.table()
    kernel = Experiment.model_validate(table).kernel_object
    monkeypatch.setattr(type(kernel), "tile_side", lambda self, dtype: 1024)
    asked = []
    original = Precomputed.pair

    def pair(self: Precomputed, a: Any, b: Any) -> Any:
        asked.append((len(a), len(b)))
        return original(self, a, b)

    monkeypatch.setattr(Precomputed, "pair", pair)
    # With this clock every call takes one second.
    ticks = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    rates = speed.calibrate(kernel, (1,), "float32", seconds=100.0)
    assert max(asked) == (40, 40)
    assert rates.entries == 40 * 40
    assert speed.sample(kernel, (1,), "float32", 4096).rows.tolist() == list(range(40))


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_an_experiment_on_a_permuted_subset(tmp_path: Path, root: Path, suffix: str) -> None:
    """Protects data.order: tiles of a permuted pool hold the user's entries in that order."""
    table = Matrices(tmp_path / "own", suffix).table()
    table["data"].update(train=10, validation=[10, 16], order={"permutation": 3})
    made = small.make(Experiment.model_validate(table), root)
    K = Matrices(tmp_path / "same").K
    order = np.random.RandomState(3).permutation(40)
    assert made.pools.permutation == 3
    np.testing.assert_array_equal(made.dense()[:16, :10], K[np.ix_(order[:16], order[:10])])
    np.testing.assert_array_equal(made.dense("test")[:, :10], K[40:, order[:10]])


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_a_permuted_pool_reads_scattered_entries(tmp_path: Path, suffix: str) -> None:
    """Protects orders other than the file's: rows and columns of a block come in any order."""
    matrices = Matrices(tmp_path / "own", suffix)
    kernel = matrices.experiment().kernel_object
    i, j = np.array([30, 2, 17]), np.array([9, 39, 4, 0])
    a, b = (kernel.prepare(rows[:, None].astype(float), rows) for rows in (i, j))
    np.testing.assert_array_equal(kernel.pair(a, b), matrices.K[np.ix_(i, j)])


def test_content_is_not_the_users_to_claim(matrices: Matrices, tmp_path: Path) -> None:
    """Protects from tiles of another matrix under a copied description, in experiment and kernel files."""
    table = combined(matrices, {"content": "0" * 64})
    file, kernel = tmp_path / "one.toml", tmp_path / "kernel.toml"
    file.write_text(toml(table))
    kernel.write_text(toml(table["kernel"]))
    for read in (experiment.load, experiment.read_kernel):
        path = kernel if read is experiment.read_kernel else file
        with pytest.raises(ExperimentError, match=r"kernel\.terms\[1\]\.terms\[0\]\.content is computed"):
            read(path)


def test_damaged_files_end_as_data_errors(matrices: Matrices, tmp_path: Path) -> None:
    """Protects the exit code: files that are missing or of a wrong form are data, with the plain message."""
    file = tmp_path / "one.toml"
    file.write_text(toml(matrices.table(gram="nowhere.npy")))
    with pytest.raises(DataError, match=r"^\S*nowhere\.npy: no such file$"):
        experiment.load(file)
    file.write_text(toml(matrices.table(gram="x" * 5000 + ".npy")))
    with pytest.raises(DataError, match="cannot be read"):
        experiment.load(file)


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
    with pytest.raises(DataError, match=said) as caught:
        from_description(matrices.table()["kernel"])
    assert matrices.path("gram") in str(caught.value)


def test_files_that_do_not_fit_together_are_refused(matrices: Matrices, tmp_path: Path) -> None:
    """Protects from mixed-up files: other widths, labels of another number, paths that lead nowhere."""
    matrices.save("cross", np.ones((5, 39)))
    with pytest.raises(DataError, match="columns"):
        from_description(matrices.table()["kernel"])
    with pytest.raises(DataError, match="no such file"):
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
    with pytest.raises(DataError, match=r"gram\.npy .* holds Python objects"):
        from_description(matrices.table()["kernel"])


def test_the_description_makes_the_kernel_again(matrices: Matrices) -> None:
    """Protects workers: the kernel they build from JSON has the same fingerprint, without reading the file."""
    kernel = matrices.experiment().kernel_object
    assert isinstance(kernel, Precomputed)
    again = from_description(kernel.describe())
    assert again.fingerprint == kernel.fingerprint
    assert again.size == 40
