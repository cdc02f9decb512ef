"""Preprocessing: whitening equals its definition, fitted steps equal NumPy's, descriptions are complete."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError, ExperimentError
from pipelines.preprocessing import Preprocessing, centre_patches, whiten_patches


def whiten_by_loops(image, k, power):
    """SPEC R15 word by word, one image (h, w, c), one patch at a time."""
    h, w, c = image.shape
    corners = [(i, j) for i in range(h - k + 1) for j in range(w - k + 1)]

    def rebuild(patches):
        total, count = np.zeros((h, w, c)), np.zeros((h, w, 1))
        for (i, j), patch in zip(corners, patches, strict=True):
            total[i : i + k, j : j + k] += patch
            count[i : i + k, j : j + k] += 1
        return total / count

    patches = [image[i : i + k, j : j + k] for i, j in corners]
    centred = rebuild([patch - patch.mean(axis=(0, 1)) for patch in patches])
    rows = np.array([centred[i : i + k, j : j + k].ravel() for i, j in corners])
    eigenvalues, vectors = np.linalg.eigh(rows.T @ rows)
    roots = np.sqrt(np.maximum(eigenvalues, 0))
    weights = np.array([0.0 if s < 1e-8 * roots.max() else (s * s) ** -power for s in roots])
    return rebuild((rows @ vectors @ np.diag(weights) @ vectors.T).reshape(-1, k, k, c))


@pytest.fixture(scope="module")
def golden_image():
    i, j, q = np.meshgrid(range(8), range(8), range(3), indexing="ij")
    return (0.5 + 0.4 * np.sin(0.6 * i + 0.37 * i * j + 1.3 * q) * np.cos(0.9 * j - 0.4 * q))[np.newaxis]


def test_whitening_reaches_the_golden_values(golden_image):
    """SPEC G7, tolerance 1e-9, the centred image and the whitened one."""
    z = centre_patches(golden_image, 3)[0]
    assert z[0, 0, 0] == pytest.approx(-0.100746388957554, abs=1e-9)
    assert z[3, 4, 1] == pytest.approx(-0.376289328529812, abs=1e-9)
    assert np.linalg.norm(z) == pytest.approx(2.58840488671053, abs=1e-9)
    out = Preprocessing.from_spec(["whiten-patches"], scale=1.0).apply(golden_image, {}, np.float64)[0]
    assert out[0, 0, 0] == pytest.approx(0.0316647194204373, abs=1e-9)
    assert out[3, 4, 1] == pytest.approx(-0.253939561435216, abs=1e-9)
    assert out[7, 7, 2] == pytest.approx(0.0798301004719011, abs=1e-9)
    assert np.linalg.norm(out) == pytest.approx(1.9829888632016823, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    patch=st.integers(2, 4),
    margins=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    channels=st.integers(1, 3),
    power=st.sampled_from([0.25, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_whitening_equals_plain_loops(patch, margins, channels, power, seed):
    """Square or not, any channels, patch side and power.

    In the null space of a covariance there is only rounding noise, which weights e^-1/2 blow up by as
    much as 1e8: hence the wider tolerance of power 1/2.
    """
    h, w = patch + margins[0], patch + margins[1]
    images = np.random.default_rng(seed).random((2, h, w, channels))
    out = whiten_patches(images, patch, power)
    for image, whitened in zip(images, out, strict=True):
        expected = whiten_by_loops(image, patch, power)
        np.testing.assert_allclose(whitened, expected, atol=1e-9 if power == 0.25 else 1e-6)


def test_an_image_whitens_alike_in_every_batch():
    """What a tile holds must not depend on how rows were grouped into blocks (1e-12)."""
    images = np.random.default_rng(1).random((40, 32, 32, 3))
    together = whiten_patches(images)
    for rows in (slice(0, 1), slice(7, 12), slice(13, 40)):
        np.testing.assert_allclose(whiten_patches(images[rows]), together[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("value", [0.1, 0.3, 255.0])
def test_constant_images_and_channels_whiten_to_exact_zeros(power, value):
    """Rounding errors of a mean must not be blown up into noise, nor 0/0 into NaN."""
    images = np.random.default_rng(2).random((3, 9, 7, 3))
    images[0] = value
    images[1, :, :, 2] = value
    out = whiten_patches(images, 3, power)
    assert np.all(out[0] == 0)
    np.testing.assert_allclose(out[1, :, :, 2], 0, atol=1e-12)
    assert np.all(np.isfinite(out))
    assert np.abs(out[2]).max() > 0.01


def test_grey_images_as_colour_whiten_to_equal_finite_channels():
    """Three equal channels make a covariance of one third of its rank; its null space must stay silent."""
    grey = np.random.default_rng(3).random((2, 12, 12, 1))
    out = whiten_patches(np.repeat(grey, 3, axis=3))
    np.testing.assert_allclose(out[..., 0], out[..., 2], atol=1e-9)
    # Three copies triple the covariance of each direction and share it out: 3^(-1/4) of the grey result.
    np.testing.assert_allclose(out[..., 0], whiten_patches(grey)[..., 0] * 3**-0.25, atol=1e-9)


def test_scale_divides_by_the_nominal_maximum_or_by_the_given_number():
    X = np.array([[0, 51, 255]], np.uint8)
    nominal = Preprocessing.from_spec(["scale"], scale=255.0).apply(X, {}, np.float32)
    assert nominal.dtype == np.float32
    np.testing.assert_array_equal(nominal, np.array([[0, 0.2, 1]], np.float32))
    given_number = Preprocessing.from_spec([{"name": "scale", "by": 51}], scale=255.0).apply(
        X, {}, np.float64
    )
    np.testing.assert_array_equal(given_number, [[0, 1, 5]])
    np.testing.assert_array_equal(X, [[0, 51, 255]])


def read_from(X, calls=None):
    def read(start, stop):
        if calls is not None:
            calls.append(stop - start)
        return X[start:stop]

    return read


def test_standardise_equals_numpy_and_streams_in_bounded_blocks():
    """Vectors: per feature; offsets of 1e6 must cost no digits although blocks are merged."""
    X = np.random.default_rng(4).normal(1e6, [1e-2, 1, 100], (3000, 3))
    calls: list[int] = []
    preprocessing = Preprocessing.from_spec([{"name": "standardise", "fit_on": [100, 2900]}], scale=1.0)
    state = preprocessing.fit(read_from(X, calls))
    out = preprocessing.apply(X, state, np.float64)
    fitted = X[100:2900]
    np.testing.assert_allclose(out, (X - fitted.mean(axis=0)) / fitted.std(axis=0), atol=1e-6)
    assert max(calls) <= 1024
    assert sum(calls) == 2800


def test_standardise_works_per_channel_on_images():
    X = np.random.default_rng(5).integers(0, 256, (50, 4, 6, 3)).astype(np.uint8)
    preprocessing = Preprocessing.from_spec(["standardise"], scale=255.0).with_default_fit_range(0, 50)
    out = preprocessing.apply(X, preprocessing.fit(read_from(X)), np.float64)
    np.testing.assert_allclose(out.mean(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(out.std(axis=(0, 1, 2)), 1, atol=1e-12)


def test_constant_features_are_centred_to_exact_zeros_and_not_scaled():
    """The mean of 2,000 values 0.1 is not 0.1; dividing the difference by its own size gives nonsense."""
    X = np.random.default_rng(6).random((2000, 3))
    X[:, 1] = 0.1
    preprocessing = Preprocessing.from_spec([{"name": "standardise", "fit_on": [0, 2000]}], scale=1.0)
    state = preprocessing.fit(read_from(X))
    assert np.all(preprocessing.apply(X, state, np.float64)[:, 1] == 0)
    elsewhere = preprocessing.apply(np.full((1, 3), 0.6), state, np.float64)
    assert elsewhere[0, 1] == 0.5


def test_zca_whitens_the_covariance_and_keeps_the_shape():
    """With e the covariance's eigenvalues, the covariance after is U e/(e + ridge) U^T."""
    rng = np.random.default_rng(7)
    X = (rng.normal(size=(2500, 12)) @ rng.normal(size=(12, 12)) + 100).reshape(-1, 2, 2, 3)
    preprocessing = Preprocessing.from_spec([{"name": "zca", "fit_on": [0, 2500], "ridge": 0.5}], scale=1.0)
    out = preprocessing.apply(X, preprocessing.fit(read_from(X)), np.float64)
    assert out.shape == X.shape
    covariance = np.cov(X.reshape(-1, 12), rowvar=False, bias=True)
    e, U = np.linalg.eigh(covariance)
    after = np.cov(out.reshape(-1, 12), rowvar=False, bias=True)
    np.testing.assert_allclose(after, (U * (e / (e + 0.5))) @ U.T, atol=1e-10)
    np.testing.assert_allclose(out.reshape(-1, 12).mean(axis=0), 0, atol=1e-10)


def test_zca_of_fewer_samples_than_features_is_finite():
    X = np.random.default_rng(8).random((5, 20))
    preprocessing = Preprocessing.from_spec([{"name": "zca", "fit_on": [0, 5]}], scale=1.0)
    assert np.all(np.isfinite(preprocessing.apply(X, preprocessing.fit(read_from(X)), np.float64)))


def test_later_fitted_steps_see_what_earlier_steps_leave():
    X = np.random.default_rng(9).integers(0, 256, (60, 3, 3, 2)).astype(np.uint8)
    steps = ["scale", "standardise", "flatten", {"name": "zca", "fit_on": [10, 60]}, "standardise"]
    preprocessing = Preprocessing.from_spec(steps, scale=255.0).with_default_fit_range(0, 60)
    out = preprocessing.apply(X, preprocessing.fit(read_from(X)), np.float64)
    by_hand = X / 255.0
    by_hand = (by_hand - by_hand.mean(axis=(0, 1, 2))) / by_hand.std(axis=(0, 1, 2))
    by_hand = by_hand.reshape(60, -1)
    e, U = np.linalg.eigh(np.cov(by_hand[10:], rowvar=False, bias=True))
    by_hand = (by_hand - by_hand[10:].mean(axis=0)) @ (U / np.sqrt(e + 1e-4)) @ U.T
    by_hand = (by_hand - by_hand.mean(axis=0)) / by_hand.std(axis=0)
    np.testing.assert_allclose(out, by_hand, atol=1e-8)


def test_normalise_gives_unit_rows_and_leaves_zero_rows():
    X = np.array([[3.0, 4.0], [0.0, 0.0], [1e-200, 0.0], [1e200, 1e200]])
    out = Preprocessing.from_spec(["normalise"], scale=1.0).apply(X, {}, np.float64)
    np.testing.assert_allclose(out, [[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-15)


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(
        st.sampled_from(
            [
                "scale",
                {"name": "scale", "by": 7},
                {"name": "standardise", "fit_on": [0, 9]},
                "zca",
                "normalise",
                {"name": "whiten-patches", "patch": 2, "power": 0.5},
            ]
        ),
        max_size=4,
    ),
    flat=st.booleans(),
)
def test_descriptions_are_complete_and_rebuild_the_steps(steps, flat):
    """A store address made of the description must name all that makes the result; JSON round trip."""
    steps = [*steps, "flatten"] if flat else steps
    preprocessing = Preprocessing.from_spec(steps, scale=16.0).with_default_fit_range(0, 12)
    description = json.loads(json.dumps(preprocessing.describe()))
    assert Preprocessing.from_spec(description, scale=99.0) == preprocessing
    assert preprocessing.output_shape((4, 5, 2)) == ((40,) if flat else (4, 5, 2))
    X = np.random.default_rng(10).integers(0, 17, (12, 4, 5, 2)).astype(np.uint8)
    out = preprocessing.apply(X, preprocessing.fit(read_from(X)), np.float32)
    assert out.shape == (12, *preprocessing.output_shape((4, 5, 2)))


def test_default_fit_range_fills_only_what_is_absent():
    preprocessing = Preprocessing.from_spec(
        ["standardise", {"name": "zca", "fit_on": [5, 9]}], scale=1.0
    ).with_default_fit_range(0, 3)
    assert preprocessing.describe() == [
        {"name": "standardise", "fit_on": [0, 3]},
        {"name": "zca", "fit_on": [5, 9], "ridge": 1e-4},
    ]


def test_fitted_and_expensive_tell_what_to_store():
    def of(*steps):
        return Preprocessing.from_spec(steps, scale=1.0)

    assert not of("scale", "flatten", "normalise").fitted
    assert of("scale", "standardise").fitted
    assert not of("scale", "standardise").expensive
    assert of("whiten-patches").expensive
    assert not of("whiten-patches").fitted


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("scael", "did you mean 'scale'"),
        ("whiten", "did you mean 'whiten-patches'"),
        ({"name": "whiten-patches", "pach": 3}, "did you mean 'patch'"),
        ({"name": "flatten", "by": 3}, "it takes none"),
        ({"name": "scale", "by": 0}, "by must be a number above 0"),
        ({"name": "scale", "by": "255"}, "by must be a number above 0"),
        ({"name": "scale", "by": True}, "by must be a number above 0"),
        ({"name": "whiten-patches", "patch": 1}, "patch must be a whole number from 2"),
        ({"name": "whiten-patches", "power": float("nan")}, "power must be"),
        ({"name": "standardise", "fit_on": [5, 5]}, "fit_on must be"),
        ({"name": "standardise", "fit_on": 5}, "fit_on must be"),
        ({"name": "zca", "fit_on": [0, 1.5]}, "fit_on must be"),
        ({"name": "zca", "ridge": -1.0}, "ridge must be"),
        ({"patch": 3}, "a table with a name"),
        (3, "a table with a name"),
    ],
)
def test_invalid_steps_are_refused_with_what_to_do(step, words):
    with pytest.raises(ExperimentError, match=words.replace("(", r"\(")):
        Preprocessing.from_spec([step], scale=1.0)


def test_shapes_that_a_step_cannot_take_are_refused_before_any_work():
    whitening = Preprocessing.from_spec(["whiten-patches"], scale=1.0)
    with pytest.raises(ExperimentError, match="takes images"):
        whitening.output_shape((64,))
    with pytest.raises(ExperimentError, match="do not fit into images of 2 x 8"):
        whitening.output_shape((2, 8, 1))
    with pytest.raises(ExperimentError, match="takes images"):
        Preprocessing.from_spec(["flatten", "whiten-patches"], scale=1.0).output_shape((8, 8, 1))


def test_fit_and_apply_refuse_what_does_not_belong_together():
    """A missing range, a range past the pool, a missing state, a state of other samples."""
    X = np.random.default_rng(11).random((20, 4))
    open_range = Preprocessing.from_spec(["standardise"], scale=1.0)
    with pytest.raises(ExperimentError, match="needs fit_on"):
        open_range.fit(read_from(X))
    with pytest.raises(DataError, match=r"fit_on = \[0, 21\] reaches past the end of the pool at 20"):
        open_range.with_default_fit_range(0, 21).fit(read_from(X))
    preprocessing = open_range.with_default_fit_range(0, 20)
    with pytest.raises(DataError, match="not fitted"):
        preprocessing.apply(X, {}, np.float64)
    with pytest.raises(DataError, match="fitted on 4 features, these samples have 3"):
        preprocessing.apply(X[:, :3], preprocessing.fit(read_from(X)), np.float64)


def test_fitted_state_survives_an_npz_file(tmp_path):
    """The caller saves State with np.savez and reads it back without pickle."""
    X = np.random.default_rng(12).random((30, 5))
    preprocessing = Preprocessing.from_spec(["standardise", "zca"], scale=1.0).with_default_fit_range(0, 30)
    state = preprocessing.fit(read_from(X))
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as loaded:
        again = dict(loaded)
    np.testing.assert_array_equal(
        preprocessing.apply(X, again, np.float64), preprocessing.apply(X, state, np.float64)
    )
