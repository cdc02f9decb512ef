"""Copies of images moved by whole pixels: which, in which order, and on which side of a split they stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import pools, shifts
from pipelines.datasets import Pool
from pipelines.errors import ExperimentError


def moved(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """One image (h, w, c) moved pixel by pixel."""
    out = np.zeros_like(image)
    for i, j in np.ndindex(image.shape[:2]):
        if 0 <= i + dy < image.shape[0] and 0 <= j + dx < image.shape[1]:
            out[i + dy, j + dx] = image[i, j]
    return out


def test_displacements_are_fixed_and_the_nearest_come_first() -> None:
    """Protects addresses: copy 7 is moved the same way for ever."""
    assert shifts.DISPLACEMENTS[:8] == ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
    lengths = [dy**2 + dx**2 for dy, dx in shifts.DISPLACEMENTS]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert lengths[-1] == 100
    assert len(set(shifts.DISPLACEMENTS)) == len(lengths) == 316


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(3, 7), st.integers(3, 7), st.integers(1, 2), st.integers(0, 12))
def test_copies_are_the_images_moved_and_zeros_move_in(n: int, h: int, w: int, c: int, k: int) -> None:
    """Protects the pool's order: images, copy 1 of all, copy 2 of all; bytes stay bytes, labels follow."""
    X = np.random.default_rng(h * w + k).integers(1, 256, (n, h, w, c)).astype(np.uint8)
    made = shifts.with_copies(Pool("p", X, np.arange(n), None), k)
    expected = [X, *([moved(x, *d) for x in X] for d in shifts.DISPLACEMENTS[:k])]
    np.testing.assert_array_equal(made.X, np.concatenate(expected))
    assert made.X.dtype == np.uint8
    np.testing.assert_array_equal(made.y, np.tile(np.arange(n), k + 1))
    rows = np.flatnonzero(np.arange(n) % 2 == 0)
    np.testing.assert_array_equal(np.flatnonzero(np.isin(made.y, rows)), shifts.with_copies_of(rows, n, k))


def images(samples: small.Samples, n: int = 72) -> np.ndarray:
    """The files of ``samples`` with n images (n, 5, 5, 2) in place of the samples."""
    X = np.random.default_rng(n).standard_normal((n, 5, 5, 2))
    np.save(samples.folder / "X.npy", X)
    np.save(samples.folder / "y.npy", np.arange(n) % 3)
    return X


def resolved(samples: small.Samples, **data: Any) -> pools.Pools:
    return pools.resolve(samples.experiment(data=data))


@pytest.mark.parametrize("permutation", [None, 7])
@pytest.mark.parametrize("validation", [12, {"random": 9}])
def test_copies_of_one_image_stand_on_one_side(
    samples: small.Samples, tiles_of_16: int, permutation: int | None, validation: Any
) -> None:
    """Protects honest scores: a training image brings its copies; those of held images are in no set."""
    X = images(samples)
    order = np.arange(72) if permutation is None else np.random.RandomState(permutation).permutation(72)
    data = {"order": "canonical" if permutation is None else {"permutation": permutation}, "train": 40}
    plain = resolved(samples, **data, validation=validation, test=[60, 72] if validation != 12 else None)
    made = resolved(
        samples, **data, validation=validation, test=[60, 72] if validation != 12 else None, shifts=3
    )
    np.testing.assert_array_equal(made.train.X[:72], X[order])
    assert made.permutation == permutation
    assert len(made.train) == 4 * 72
    assert len(made.split.train) == 4 * len(plain.split.train)
    for name in ("validation", "test"):
        held = made.sets[name]
        if held is None:
            continue
        assert held.max() < 72
        assert not set(held) & set(made.split.train % 72)
    # The same images are trained on as without copies.
    origin = {x.tobytes() for x in plain.train.X[plain.split.train]}
    assert {x.tobytes() for x in made.train.X[made.split.train[made.split.train < 72]]} == origin
    assert set(made.split.train % 72) == set(made.split.train[made.split.train < 72])
    np.testing.assert_array_equal(made.y(made.split.train), order[made.split.train % 72] % 3)


def test_a_refit_trains_on_the_copies_of_validation_images(samples: small.Samples) -> None:
    """Protects ``refit``: training and validation images with all their copies, nothing of the test images."""
    images(samples)
    split = resolved(samples, train=40, validation=[40, 60], test=[60, 72], shifts=2).split
    wanted = [row for row in range(3 * 72) if row % 72 < 60]
    assert pools.fit_rows(split).tolist() == wanted
    assert split.pool_rows.tolist() == sorted([*wanted, *range(60, 72)])


def test_copies_name_the_pool_and_nothing_else(samples: small.Samples) -> None:
    """Protects stores: a pool with copies has its own, whose number counts; other test sets keep theirs."""
    images(samples)
    plain, one, two = (resolved(samples, **more) for more in ({}, {"shifts": 1}, {"shifts": 2}))
    assert one.pool_description == {**plain.pool_description, "shifts": 1}
    assert two.pool_description == {**plain.pool_description, "shifts": 2}
    turn = {"test": [60, 72], "turn_test": 90}
    upright, turned = (resolved(samples, **turn, **more) for more in ({}, {"shifts": 1}))
    assert turned.test_description == upright.test_description
    np.testing.assert_array_equal(turned.test.X, upright.test.X)


def test_fitted_steps_learn_from_images_that_are_not_moved(samples: small.Samples) -> None:
    """Protects ``standardise``: the same mean with copies and without, and no range beyond the images."""
    images(samples)
    step = ["standardise"]
    plain, made = (resolved(samples, preprocess=step, **more) for more in ({}, {"shifts": 2}))
    assert made.preprocessing_description == plain.preprocessing_description
    with pytest.raises(ExperimentError, match="outside the pool of 72"):
        resolved(samples, preprocess=[{"name": "standardise", "fit_on": [0, 73]}], shifts=2)


def test_a_test_sample_equal_to_a_copy_is_reported(samples: small.Samples) -> None:
    """Protects honest scores: a held sample that stands in the training set as a moved copy is a warning."""
    X = images(samples)
    X[65] = moved(X[3], 0, 1)
    np.save(samples.folder / "X.npy", X)
    assert resolved(samples).warnings == ()
    (warning,) = resolved(samples, shifts=1).warnings
    assert "1 of the 12 samples of the validation set also stands in the training set" in warning
    assert "sample 5 is training sample 43" in warning


@pytest.mark.parametrize(
    ("size", "count", "said"),
    [
        (None, 1, r"shifts = 1 moves images, but .*X.npy holds vectors of 5 numbers"),
        ((2, 9), 317, r"images of 2x9 pixels there are at most 10 moved copies"),
        ((28, 28), 317, "at most 316 moved copies"),
    ],
)
def test_copies_that_cannot_be_are_refused(
    samples: small.Samples, size: tuple[int, int] | None, count: int, said: str
) -> None:
    """Protects from vectors, from images moved out of sight, and from a list that ends."""
    if size is not None:
        np.save(samples.folder / "X.npy", np.ones((72, *size, 1), np.uint8))
    with pytest.raises(ExperimentError, match=said):
        resolved(samples, shifts=count)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_copies_is_a_positive_count(samples: small.Samples, count: Any) -> None:
    """Protects ``data.shifts`` from what is no count."""
    with pytest.raises(ValueError, match="shifts"):
        samples.experiment(data={"shifts": count})
