"""From ``[data]`` to pools and index sets: which samples are used for what, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import pools
from pipelines.datasets import Dataset, Pool
from pipelines.errors import DataError, ExperimentError
from pipelines.experiment import Data, RandomRows
from pipelines.tiles import Grid


def split(data: dict[str, Any], n: int = 100, n_test: int | None = None, seed: int = 0) -> pools.Split:
    """The split of ``[data]`` over a source of n samples, with a test set of its own where n_test is given."""

    def pool(size: int) -> Pool:
        return Pool("x", np.zeros((size, 1)), np.zeros(size, np.int64), ("a", "b"))

    dataset = Dataset("digits", pool(n), None if n_test is None else pool(n_test), 1.0, (), "x")
    return pools._split(Data.model_validate({"source": "digits", **data}), dataset, seed)


def rows(*limits: int) -> list[int]:
    return list(range(*limits))


@pytest.mark.parametrize(
    ("data", "train", "validation", "test"),
    [
        ({"train": 60, "validation": 20}, rows(60), rows(80, 100), None),
        ({"train": [10, 60], "validation": [60, 70]}, rows(10, 60), rows(60, 70), None),
        ({"train": 50, "validation": 20, "test": [80, 100]}, rows(50), rows(60, 80), rows(80, 100)),
        ({"train": [50, 90], "validation": 10, "test": [0, 20]}, rows(50, 90), rows(90, 100), rows(20)),
        ({"train": 100}, rows(100), None, None),
    ],
)
def test_counts_and_ranges(
    data: dict[str, Any], train: list[int], validation: list[int] | None, test: list[int] | None
) -> None:
    """Protects the split: train counts from the start, validation from the end of what training may use."""
    made = split(data)
    assert made.train.tolist() == train
    assert (None if made.validation is None else made.validation.tolist()) == validation
    assert (None if made.test is None else made.test.tolist()) == test


def test_a_test_set_of_its_own_is_counted_by_itself() -> None:
    """Protects sources with a test set: its rows are no rows of the pool, and validation ends with the pool."""
    made = split({"train": 60, "validation": 20, "test": 30}, n_test=40)
    assert (made.test.tolist(), made.test_in_pool) == (rows(30), False)
    assert made.validation.tolist() == rows(80, 100)
    assert made.pool_rows.tolist() == rows(60) + rows(80, 100)
    assert split({"train": 60, "validation": 20, "test": [35, 40]}, n_test=40).test.tolist() == rows(35, 40)


@pytest.mark.parametrize(
    ("data", "n_test", "said"),
    [
        ({"train": 101}, None, r"data.train = 101, but there are only 100"),
        ({"train": [90, 101]}, None, r"data.train = \[90, 101\]"),
        ({"train": 10, "validation": 101}, None, "data.validation = 101"),
        ({"train": 10, "validation": [95, 105]}, None, "data.validation"),
        ({"train": 10, "validation": 85, "test": [80, 100]}, None, "data.validation = 85, .* only 80"),
        ({"train": 10, "test": 41}, 40, "data.test = 41, but there are only 40"),
        ({"train": 10, "test": 20}, None, r"no test set of its own; .* \[80, 100\]"),
        ({"train": 60, "validation": 41}, None, "data.train and data.validation overlap in 1 rows"),
        ({"train": 60, "test": [59, 70]}, None, r"data.train and data.test overlap in 1 rows \(59 to 59"),
        (
            {"train": 10, "validation": [85, 95], "test": [80, 100]},
            None,
            "validation and data.test overlap in 10",
        ),
        ({"train": 10, "validation": {"random": 10}}, None, "none would be left"),
    ],
)
def test_splits_that_do_not_fit_are_refused(data: dict[str, Any], n_test: int | None, said: str) -> None:
    """Protects ``overlap is an error``, and counts beyond the data; the message says which key and how many."""
    with pytest.raises(ExperimentError, match=said):
        split(data, n_test=n_test)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 90), st.data(), st.integers(0, 5))
def test_random_validation_partitions_the_training_range(n: int, data: st.DataObject, seed: int) -> None:
    """Protects ``{ random = COUNT }``: drawn from the training rows alone, the same for the same seed."""
    count = data.draw(st.integers(1, n - 1))
    made = split({"train": [5, 5 + n], "validation": {"random": count}}, seed=seed)
    assert len(made.validation) == count
    assert sorted([*made.train, *made.validation]) == rows(5, 5 + n)
    assert (np.diff(made.validation) > 0).all()
    again = split({"train": [5, 5 + n], "validation": {"random": count}}, seed=seed)
    assert again.validation.tolist() == made.validation.tolist()


def test_another_seed_draws_another_validation_set() -> None:
    """Protects seeds from having no effect."""
    drawn = {tuple(split({"train": 90, "validation": {"random": 9}}, seed=s).validation) for s in range(5)}
    assert len(drawn) == 5


# Orders.


def resolved(samples: small.Samples, **data: Any) -> pools.Pools:
    return pools.resolve(samples.experiment(data=data))


def test_a_permuted_order_is_the_published_one(samples: small.Samples, tiles_of_16: int) -> None:
    """Protects R10: row k of the order is row RandomState(seed).permutation(n)[k] of the canonical one."""
    order = np.random.RandomState(7).permutation(72)
    made = resolved(samples, order={"permutation": 7}, train=10, validation=[10, 16])
    X, y = samples.arrays(72)
    assert made.permutation == 7
    np.testing.assert_array_equal(made.train.X[made.split.train], X[order[:10]])
    np.testing.assert_array_equal(made.y(made.split.train), y[order[:10]])


def test_a_whole_pool_is_not_permuted_but_its_split_is(samples: small.Samples, tiles_of_16: int) -> None:
    """Protects sharing: over nearly all samples one canonical matrix serves every permutation."""
    order = np.random.RandomState(7).permutation(72)
    made = resolved(samples, order={"permutation": 7}, train=60, validation=12)
    assert made.permutation is None
    assert made.split.train.tolist() == sorted(order[:60])
    assert made.split.validation.tolist() == sorted(order[60:])


def test_both_layouts_hold_the_same_samples_and_numbers(
    samples: small.Samples, root: Path, tmp_path: Path, tiles_of_16: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the layout rule: kernel values and accuracies do not depend on which way was chosen."""
    one = samples.experiment(data={"order": {"permutation": 3}, "train": 50, "validation": 20})
    mapped = small.make(one, root)
    by_map = small.evaluate(one, root, tmp_path / "a")
    monkeypatch.setattr(pools, "_layout", lambda permutation, n, split, side: (permutation, split))
    own = small.make(one, root)
    in_order = small.evaluate(one, root, tmp_path / "b")
    assert (mapped.pools.permutation, own.pools.permutation) == (None, 3)
    order = np.random.RandomState(3).permutation(72)
    read = np.s_[:, :50]
    np.testing.assert_allclose(mapped.dense()[np.ix_(order, order)][read], own.dense()[read], rtol=1e-12)
    assert by_map["validation"] == in_order["validation"]
    for a, b in zip(by_map["path"], in_order["path"], strict=True):
        assert a["validation"] == b["validation"]


def test_fitted_steps_keep_the_order_that_was_asked_for(samples: small.Samples, tiles_of_16: int) -> None:
    """Protects ``fit_on``: it counts rows of the stated order, whatever layout would be cheapest."""
    made = resolved(samples, order={"permutation": 7}, train=60, validation=12, preprocess=["standardise"])
    assert made.permutation == 7
    assert made.preprocessing.describe()[0]["fit_on"] in ([0, 60], (0, 60))
    X, _ = samples.arrays(72)
    order = np.random.RandomState(7).permutation(72)
    state = made.preprocessing.fit(lambda start, stop: made.train.X[start:stop])
    (mean,) = [value for name, value in state.items() if name.endswith("mean")]
    np.testing.assert_allclose(mean, X[order[:60]].mean(axis=0))


def test_a_fitted_step_over_scattered_rows_must_say_where(samples: small.Samples) -> None:
    """Protects against a fit on rows that the file does not name, or that are not there."""
    with pytest.raises(ExperimentError, match="fit_on = \\[start, stop\\]"):
        resolved(samples, validation={"random": 5}, preprocess=["standardise"])
    with pytest.raises(ExperimentError, match="outside the pool of 72"):
        resolved(samples, preprocess=[{"name": "standardise", "fit_on": [0, 73]}])


# What names a pool.


def test_descriptions_follow_what_numbers_depend_on(samples: small.Samples, tiles_of_16: int) -> None:
    """Protects addresses: splits, seeds and growth leave them; order, scaling, fitted rows change them."""
    base = resolved(samples, preprocess=["standardise"])
    assert base.pool_description == resolved(samples, train=30, validation=[50, 60]).pool_description
    other = resolved(samples, train=30, preprocess=["standardise"])
    assert other.preprocessing_description != base.preprocessing_description
    named = resolved(samples, train=30, preprocess=[{"name": "standardise", "fit_on": [0, 40]}])
    assert named.preprocessing_description == base.preprocessing_description
    permuted = resolved(samples, order={"permutation": 7}, train=10, validation=[10, 16])
    assert permuted.pool_description != base.pool_description
    samples.write(80)
    grown = resolved(samples, preprocess=["standardise"])
    assert grown.pool_description == base.pool_description
    assert grown.preprocessing_description == base.preprocessing_description
    assert grown.pool_axis.compare(base.pool_axis.json()) == "grown"


def test_the_content_of_fitted_rows_names_the_preprocessing(samples: small.Samples) -> None:
    """Protects from a mean of other data: samples changed inside ``fit_on`` change the address."""
    base = resolved(samples, preprocess=["standardise"]).preprocessing_description
    X, _ = samples.arrays(72)
    for row, same in ((71, True), (39, False)):
        changed = X.copy()
        changed[row] += 1
        np.save(samples.folder / "X.npy", changed)
        assert (resolved(samples, preprocess=["standardise"]).preprocessing_description == base) == same


def test_bad_data_are_refused_before_any_work(samples: small.Samples) -> None:
    """Protects ``before work starts``: no labels for a part, one class, samples the kernel cannot take."""
    np.save(samples.folder / "y.npy", np.zeros(72, np.int64))
    with pytest.raises(DataError, match="one class"):
        resolved(samples)
    samples.write(72)
    X, _ = samples.arrays(72)
    X[17, 2] = np.nan
    np.save(samples.folder / "X.npy", X)
    with pytest.raises(DataError, match="row 17, column 2"):
        resolved(samples)


def test_samples_that_stand_in_two_sets_are_reported(samples: small.Samples) -> None:
    """Protects honest scores: a validation sample that was trained on is a warning of the pools."""
    X, _ = samples.arrays(72)
    X[65] = X[3]
    np.save(samples.folder / "X.npy", X)
    (warning,) = resolved(samples).warnings
    assert "1 of the 12 samples of the validation set also stands in the training set" in warning


def test_needed_tiles_are_those_that_are_read(samples: small.Samples, tiles_of_16: int) -> None:
    """Protects the plan: training against itself and evaluation against training, nothing else."""
    made = resolved(samples, train=[0, 16], validation=[40, 48], test=[64, 72])
    grid = Grid(72, 72, 16, symmetric=True)

    def needed(refit: bool) -> set[tuple[int, int]]:
        return set(zip(*np.nonzero(pools.needed_tiles(grid, made.split, refit=refit)), strict=True))

    assert needed(refit=False) == {(0, 0), (2, 0), (4, 0)}
    # A refit trains on training and validation rows together.
    assert needed(refit=True) == {(0, 0), (2, 0), (4, 0), (2, 2), (4, 2)}


def test_random_rows_are_a_table_of_their_own() -> None:
    """Protects the model of ``[data]``: what is read is what ``_split`` asks for."""
    data = Data.model_validate({"source": "digits", "train": 5, "validation": {"random": 2}})
    assert isinstance(data.validation, RandomRows)


@pytest.mark.parametrize("preprocess", [[], ["scale"]])
def test_samples_that_count_as_zero_are_reported(samples: small.Samples, preprocess: list[str]) -> None:
    """Protects from data in tiny units; what preprocessing makes of them is not known yet."""
    path = Path(samples.experiment().data.X or "")
    X = np.load(path)
    X[3] = 0
    X[5:8] *= 1e-9
    np.save(path, X)
    said = " ".join(resolved(samples, preprocess=preprocess).warnings)
    assert (f"1 of {len(X)} samples is all zero" in said) == (not preprocess)
    assert (f"3 of {len(X)} samples have a norm below 1e-06" in said) == (not preprocess)


# Turned test sets.


def images(samples: small.Samples, n: int, part: str = "", size: tuple[int, int] = (5, 5)) -> np.ndarray:
    """The files of ``samples`` with n images (n, h, w, 2) in place of the samples."""
    X = np.random.default_rng(n).standard_normal((n, *size, 2))
    np.save(samples.folder / f"X{part}.npy", X)
    np.save(samples.folder / f"y{part}.npy", np.arange(n) % 3)
    return X


@pytest.mark.parametrize("permutation", [None, 7])
def test_a_turned_test_set_of_the_pool(
    samples: small.Samples, root: Path, tiles_of_16: int, permutation: int | None
) -> None:
    """Protects ``turn_test``: test rows of the pool, in its order, turned as numpy turns; training stays upright."""
    X = images(samples, 72)
    order = np.arange(72) if permutation is None else np.random.RandomState(permutation).permutation(72)
    ordered = "canonical" if permutation is None else {"permutation": permutation}
    data = {"order": ordered, "train": 20, "validation": [20, 30], "test": [60, 72], "turn_test": 90}
    made = small.make(samples.experiment(data=data), root)
    train, test = made.pools.split.train, made.pools.split.test
    expected = made.kernel.gram(
        np.rot90(X[order[60:]], 1, (1, 2)).reshape(12, -1), X[order[:20]].reshape(20, -1)
    )
    np.testing.assert_allclose(made.dense("test")[np.ix_(test, train)], expected, rtol=1e-12)
    np.testing.assert_array_equal(made.pools.y(test, test=True), order[60:] % 3)
    np.testing.assert_array_equal(made.pools.train.X, X[order])
    assert made.pools.test_description == {**made.pools.pool_description, "turned": 90}
    assert made.pools.test_of == "pool, turned by 90 degrees"


@pytest.mark.parametrize(("degrees", "quarters"), [(90, 1), (180, 2), (270, 3)])
def test_a_turned_test_set_of_its_own(samples: small.Samples, degrees: int, quarters: int) -> None:
    """Protects ``turn_test`` where the source has a test set: that one is turned, and named apart from itself."""
    images(samples, 72)
    Z = images(samples, 10, "_test")
    own = {key: str(samples.folder / f"{key}.npy") for key in ("X_test", "y_test")}
    made, upright = (resolved(samples, test=8, **own, **turn) for turn in ({"turn_test": degrees}, {}))
    np.testing.assert_array_equal(made.test.X, np.rot90(Z, quarters, (1, 2)))
    np.testing.assert_array_equal(made.split.test, np.arange(8))
    assert made.test_description == {**upright.test_description, "turned": degrees}
    assert (made.test_of, upright.test_of) == (f"test set, turned by {degrees} degrees", "test set")
    assert made.test_axis.digests != upright.test_axis.digests
    assert made.pool_description == upright.pool_description


def test_turned_training_samples_are_no_test_samples(samples: small.Samples) -> None:
    """Protects honest scores: turning does not make a test sample of a training sample."""
    images(samples, 72)
    with pytest.raises(ExperimentError, match=r"data\.train and data\.test overlap in 5 rows"):
        resolved(samples, train=20, test=[15, 30], turn_test=90)


def test_what_cannot_be_turned_is_refused(samples: small.Samples) -> None:
    """Protects ``turn_test`` from vectors and from images whose shape a turn changes."""
    with pytest.raises(ExperimentError, match=r"turn_test = 90 .*X.npy holds vectors of 5 numbers"):
        resolved(samples, test=[52, 60], turn_test=90)
    images(samples, 72, size=(4, 6))
    with pytest.raises(ExperimentError, match=r"turn_test = 180 .*X.npy holds images of 4x6 pixels"):
        resolved(samples, test=[52, 60], turn_test=180)
