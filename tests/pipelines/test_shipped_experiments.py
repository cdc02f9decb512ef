"""The shipped experiments: all valid, all named as their files, and the tables complete."""

from __future__ import annotations

import math

import pytest

from pipelines import experiment

SIZES = {"": 50_000, "-10k": 10_000, "-1k": 1_000}
ARCHITECTURES = ("relu-rf", "relu-ntk", "exp-exp", "exp-222")
SECOND_LAYERS = ("exp-exp", "exp-poly3", "exp-poly2", "poly2-exp", "poly2-poly2", "exp-linear", "exp-poly4")
DEPTHS = tuple(f"{family}-{depth}" for family in ("rf", "ntk") for depth in (2, 3, 4, 5))
MODELS = {
    "cifar10-architectures": tuple(f"cifar10-{name}" for name in ARCHITECTURES),
    "cifar10-second-layer": tuple(f"cifar10-{name}" for name in SECOND_LAYERS),
    "mnist-depth": tuple(f"mnist-{name}" for name in DEPTHS),
    "fashion-depth": tuple(f"fashion-{name}" for name in DEPTHS),
}


@pytest.mark.parametrize("name", sorted(experiment.shipped()))
def test_every_shipped_experiment_is_valid(name):
    """Protects ``megagram run NAME``: the file loads, says what it is, and bears its name."""
    study = experiment.load(name)
    assert study.name == name
    assert study.description
    for one in study.experiments:
        one.kernel_object  # noqa: B018  (raises where the table is wrong)
        one.feature_map  # noqa: B018


def test_all_promised_names_are_shipped():
    """Protects the list of names that the documentation gives."""
    wanted = {"quickstart", "digits-depth", "digits-convolutional", "digits-turned", "mnist-shifted-100k"}
    wanted |= {"random-features-convergence", "convolutional-features-convergence"}
    wanted |= {"digits-nystrom-ckn", "digits-random-features", "mnist-nystrom-ckn"}
    wanted |= {"cifar10-nystrom", "cifar10-nystrom-small", "cifar10-nystrom-width"}
    for study, models in MODELS.items():
        sizes = SIZES if study.startswith("cifar10") else ("", "-10k")
        wanted |= {f"{name}{size}" for name in (study, *models) for size in sizes}
    assert set(experiment.shipped()) == wanted


@pytest.mark.parametrize("study", sorted(MODELS))
def test_studies_are_their_single_experiments(study):
    """Protects against a table and its single runs drifting apart: same data, kernel, ridges, expected value."""
    for size in SIZES if study.startswith("cifar10") else ("", "-10k"):
        variants = experiment.load(study + size).experiments
        singles = [experiment.load(name + size).experiments[0] for name in MODELS[study]]
        for variant, single in zip(variants, singles, strict=True):
            assert (variant.data, variant.gram, variant.solve) == (single.data, single.gram, single.solve)
            assert variant.kernel_object.fingerprint == single.kernel_object.fingerprint
            assert _expected(variant, SIZES[size]) == _expected(single, SIZES[size])


def _expected(one: experiment.Experiment, size: int) -> tuple[float | None, float] | None:
    """The value published for this size, and its tolerance."""
    known = one.expected is not None and one.expected.train == size
    return (one.expected.value, one.expected.tolerance) if known else None


@pytest.mark.parametrize(("name", "variants"), [("digits-depth", 8), ("digits-convolutional", 9)])
def test_digits_tables_are_complete(name, variants):
    """Protects tables G8 and G9: every kernel, an expected accuracy at each of its six ridges, one size."""
    experiments = experiment.load(name).experiments
    assert len(experiments) == variants
    assert len({one.kernel_object.fingerprint for one in experiments}) == variants
    for one in experiments:
        assert one.solve.select == "oracle"
        assert sorted(map(float, one.expected.path)) == sorted(one.solve.ridges)
        start, stop = one.data.train
        assert one.expected.train == stop - start


def test_digits_are_turned_for_the_test_alone():
    """Protects X30: one split and ridge for all, the plain kernel once upright, all four compared at this size."""
    upright, *turned = experiment.load("digits-turned").experiments
    assert [one.data.turn_test for one in (upright, *turned)] == [None, 90, 90, 90]
    assert [one.expected.value for one in (upright, *turned)] == [95.0, 11.5, 94.0, 92.0]
    assert upright.kernel_object == turned[0].kernel_object
    for one in (upright, *turned):
        assert (one.data.train, one.data.test, one.solve.ridges) == ((0, 200), (1000, 1200), (1e-4,))
        assert one.expected.train == 200


@pytest.mark.parametrize("size", SIZES)
def test_expected_values_hold_for_the_size_they_are_compared_at(size):
    """Protects the comparison at full size and at 10,000: the final model sees what the published one saw."""
    for name in MODELS["cifar10-second-layer"]:
        (one,) = experiment.load(name + size).experiments
        fitted = one.data.train + (one.data.validation if one.solve.refit else 0)
        assert fitted == SIZES[size]
        published_here = one.expected is not None and one.expected.train == fitted
        assert published_here == ((size == "-10k" and "poly4" not in name) or (size == "" and _full(name)))


def _full(name: str) -> bool:
    return name.removeprefix("cifar10-") in ("exp-exp", "exp-poly3", "exp-poly2")


def test_mnist_protocol_is_the_published_one():
    """Protects R10: the seeded order, 50,000 for training, 10,000 for validation, nine ridges, no refit."""
    (one,) = experiment.load("mnist-ntk-3").experiments
    assert (one.data.permutation, one.data.train, one.data.validation, one.data.test) == (
        42,
        50_000,
        10_000,
        10_000,
    )
    assert not one.solve.refit
    assert [round(math.log10(ridge)) for ridge in one.solve.ridges] == list(range(0, -9, -1))


def test_shifted_digits_are_solved_without_a_stored_matrix():
    """Protects the run of 100,000: the digits of mnist-rf-2 twice, one ridge, held digits that are not moved."""
    (one,) = experiment.load("mnist-shifted-100k").experiments
    (plain,) = experiment.load("mnist-rf-2").experiments
    assert one.kernel_object == plain.kernel_object
    assert one.data == plain.data.model_copy(update={"shifts": 1})
    assert (one.gram.tiles, one.solve.method, one.solve.tolerance) == (
        "recomputed",
        "conjugate-gradient",
        1e-4,
    )
    assert one.solve.ridges == (1e-7,)
    assert experiment.load("mnist-shifted-100k", ["data.shifts=99"]).experiments[0].data.shifts == 99


def test_digits_anchors_stand_beside_the_exact_kernel():
    """Protects F6: the data of G9, the kernel itself first, then its features by three numbers of anchors."""
    (reference, *_) = experiment.load("digits-convolutional").experiments
    exact, *approximate = experiment.load("digits-nystrom-ckn").experiments
    assert exact.features is None
    assert [one.feature_map.anchors for one in approximate] == [(16, 16), (64, 64), (256, 256)]
    assert [one.feature_map.patches for one in approximate] == [6000] * 3
    assert [one.expected.value for one in approximate] == [94.0, 97.75, 99.25]
    for one in (exact, *approximate):
        assert one.data == reference.data
        assert one.kernel_object == reference.kernel_object


@pytest.mark.parametrize("name", ["cifar10-nystrom", "cifar10-nystrom-small"])
def test_the_nystrom_column_is_of_the_models_of_the_exact_table(name):
    """Protects R14: the kernels, data and ridges of the exact column, so that the two differ by the features alone."""
    exact = {one.label: one for one in experiment.load("cifar10-second-layer").experiments}
    models = experiment.load(name).experiments
    assert len(models) == 6
    for one in models:
        assert one.kernel_object == exact[one.label].kernel_object
        assert (one.data, one.solve) == (exact[one.label].data, exact[one.label].solve)
        linear = one.label == "exp / linear"
        assert (one.feature_map.anchors[1] == 0) == linear
    if name == "cifar10-nystrom":
        assert {one.feature_map.anchors for one in models} == {(256, 4096), (256, 0)}
        assert [one.expected.value for one in models] == [84.1, 84.1, 83.4, 81.5, 81.2, 76.3]


def test_the_widths_are_of_one_model_of_the_exact_table():
    """Protects the curve: the data, kernel and ridges of exp / exp, so that widths differ by their anchors alone."""
    (exact,) = (
        one for one in experiment.load("cifar10-second-layer").experiments if one.label == "exp / exp"
    )
    models = experiment.load("cifar10-nystrom-width").experiments
    for one in models:
        assert (one.kernel_object, one.data, one.solve) == (exact.kernel_object, exact.data, exact.solve)
    assert [one.feature_map.anchors for one in models] == [(128, 256 << k) for k in range(5)]
