"""Features beside the exact kernel: the numbers of a comparison, what it leaves stored, and what it goes on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import MEMORY, Samples

from kernels.features.base import FeatureMap, InMemory
from kernels.features.nystrom import NystromFeatures
from kernels.registry import from_description
from pipelines import pools, tasks
from pipelines.comparison import compare, measures
from pipelines.comparison.findings import findings
from pipelines.comparison.page import compare_page, sentences, sizes_table
from pipelines.comparison.sizes import Approximation, Size, at_position, positions, read_sizes, read_target
from pipelines.comparison.store import ComparisonStore
from pipelines.comparison.subject import Request, Subject, address, reduced
from pipelines.errors import DoesNotFit, ExperimentError
from pipelines.experiment import Experiment
from pipelines.fit import Place
from pipelines.reports.document import to_html, to_markdown

RANDOM = {"kind": "random", "widths": 8}


def compared(
    experiment: Experiment, root: Path, sizes: str = "4,16,64", counted: list[str] | None = None, **asked: Any
) -> dict[str, Any]:
    """What is found of an experiment; ``counted`` gets every message of progress."""
    subject = Subject(experiment, Request(read_sizes(sizes), **asked))

    def progress(done: int, total: int, message: str) -> None:
        if counted is not None:
            counted.append(message)

    found = compare.compare(subject, root, Place(root, tasks.Workers, MEMORY), progress)
    return findings(subject, found)


def features_of(samples: Samples, table: dict[str, Any] = RANDOM, **sections: Any) -> Experiment:
    return samples.experiment(features=table, **sections)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("64", [(64,)]), ("16, 64", [(16,), (64,)]), ("4x8,8x8,8x16", [(4, 8), (8, 8), (8, 16)]),
     ("8x0,16x0", [(8, 0), (16, 0)])],
)  # fmt: skip
def test_sizes_are_read(text: str, numbers: list[tuple[int, ...]]) -> None:
    assert [size.numbers for size in read_sizes(text)] == numbers


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is no size"), ("8,x", "is no size"), ("8,-16", "is no size"), ("0", "is no size"), ("8.5", "is no size"),
     ("16,16", "must increase"), ("16,8", "must increase"), ("8x16,16x8", "must increase"),
     ("8x0,16x4", "must increase"), ("8,8x16", "different numbers of layers")],
)  # fmt: skip
def test_what_is_no_list_of_growing_sizes_is_refused(text: str, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        read_sizes(text)


@pytest.mark.parametrize("text", ["relF", "relF=", "relF=0", "relF=-1", "relF=nan", "error=0.1", "relF=inf"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ExperimentError, match="a number above zero"):
        read_target(text)
    assert read_target("relMax=0.1") == ("relMax", 0.1)


def test_sizes_stand_where_their_varying_numbers_do() -> None:
    """Protects the axis that slopes are of: layers that stay the same do not count, and an extrapolation keeps them."""
    assert positions(read_sizes("16,64")) == pytest.approx([16, 64])
    assert positions(read_sizes("256x16,256x64")) == pytest.approx([16, 64])
    assert positions(read_sizes("4x16,16x64")) == pytest.approx([8, 32])
    assert at_position(read_sizes("256x16,256x64"), 100) == Size((256, 100))
    assert at_position(read_sizes("4x16,16x64"), 64) == Size((32, 128))


def test_one_number_counts_for_all_layers_that_the_experiment_does_not_leave_out() -> None:
    """Protects ``anchors``, which lists a number for each layer and 0 for linear ones."""
    (size, each) = read_sizes("8")[0], read_sizes("8x0")[0]
    assert size.value([256, 0]) == [8, 0]
    assert size.value(256) == 8
    assert size.value(None) == 8
    assert each.value([256, 0]) == [8, 0]


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ({"train": 500, "validation": 90, "test": [600, 900]}, {"train": 50, "validation": 90, "test": [600, 900]}),
        ({"train": [100, 500]}, {"train": [100, 150]}),
        ({"train": 500, "validation": {"random": 200}}, {"train": 100, "validation": {"random": 50}}),
        ({"train": 500, "validation": {"random": 20}}, {"train": 70, "validation": {"random": 20}}),
        ({"train": 30}, {"train": 30}),
        ({"train": 500, "shifts": 4}, {"train": 10, "shifts": 4}),
    ],
)  # fmt: skip
def test_as_many_samples_are_trained_on_as_were_asked_for(data: dict[str, Any], kept: dict[str, Any]) -> None:
    given = Experiment.model_validate(
        {"name": "x", "data": {"source": "digits", **data}, "kernel": {"kind": "dot-product", "kernel": "linear"},
         "solve": {"ridges": [1.0], "select": "loo"}}
    ).data  # fmt: skip
    table = reduced(given, 50)
    assert {key: table[key] for key in kept} == kept


def test_samples_that_are_compared_are_of_the_experiments_own_sets(samples: Samples) -> None:
    """Protects against validation samples that the whole experiment would test on; no set is larger than asked."""
    one = features_of(samples, data={"train": 30, "validation": 12, "test": [52, 72]})
    whole, few = pools.resolve(one).split, Subject(one, Request(read_sizes("4"), samples=6)).pools.split
    for name in ("train", "validation", "test"):
        assert set(getattr(few, name)) <= set(getattr(whole, name))
        assert len(getattr(few, name)) == 6


def test_every_number_is_that_of_dense_arithmetic(samples: Samples, root: Path) -> None:
    """Protects errors, scores, the choice of the ridge and gaps: by plain NumPy from the map's own features."""
    one = features_of(samples, data={"train": 30, "validation": 12, "test": [52, 72]})
    found = compared(one, root, "4,16", samples=25, repeat=2)
    X, y = samples.arrays(72)
    rows = {"train": np.arange(25), "validation": np.arange(40, 52), "test": np.arange(52, 72)}
    targets = (y[rows["train"]][:, None] == np.arange(3)) - 1 / 3

    def scored(kernel: Any) -> tuple[float, float]:
        """Test accuracy at the ridge that is best on validation, the larger of equals; and that ridge."""
        best = (-1.0, 0.0, 0.0)
        for ridge in (1e-2, 1e-3):
            alpha = np.linalg.solve(
                kernel(X[rows["train"]], X[rows["train"]]) + 25 * ridge * np.eye(25), targets
            )
            right = {
                name: 100
                * np.mean((kernel(X[rows[name]], X[rows["train"]]) @ alpha).argmax(1) == y[rows[name]])
                for name in ("validation", "test")
            }
            best = max(best, (right["validation"], ridge, right["test"]))
        return best[2], best[1]

    exact = one.kernel_object.gram
    assert (found["exact"]["score"], found["exact"]["ridge"]) == pytest.approx(scored(exact))
    assert found["counts"] == {"train": 25, "validation": 12, "test": 20}
    assert [(p["size"], p["seed"]) for p in found["points"]] == [([4], 0), ([4], 1), ([16], 0), ([16], 1)]
    for point in found["points"]:
        drawn = from_description(
            {"kind": "random", "kernel": one.kernel, "widths": point["size"], "seed": point["seed"]}
        )
        assert isinstance(drawn, FeatureMap)

        def approximate(A: np.ndarray, B: np.ndarray, phi: FeatureMap = drawn) -> np.ndarray:
            return phi.features(A) @ phi.features(B).T

        K, K_hat = exact(X[:25]), approximate(X[:25], X[:25])
        assert point["errors"] == pytest.approx(measures.errors(K, K_hat), rel=1e-9)
        assert (point["score"], point["ridge"]) == pytest.approx(scored(approximate))
        assert point["gap"] == pytest.approx(found["exact"]["score"] - point["score"])
        assert point["bytes_per_sample"] == 8 * point["size"][0]


def test_a_map_learns_from_all_training_samples(samples: Samples, root: Path) -> None:
    """Protects against a pilot whose map is not the one that a run of the whole experiment would learn."""
    one = features_of(samples, {"kind": "nystrom", "landmarks": 5})
    found = compared(one, root, "5,10", samples=12)
    X, _ = samples.arrays(72)
    for point in found["points"]:
        unlearned = Approximation.of(one).at(Size(tuple(point["size"])))
        assert isinstance(unlearned, FeatureMap)
        phi = unlearned.learn(InMemory(X[:40])).features(X[:12])
        wanted = measures.errors(one.kernel_object.gram(X[:12]), phi @ phi.T)
        assert point["errors"] == pytest.approx(wanted, rel=1e-6)


def test_landmarks_are_known_by_their_rows_in_the_pool(
    samples: Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects float32 tangent kernels (K13): a map gets the pool's rows, not positions, and those of a test set, which
    is another pool, are nobody's."""
    Samples(samples.folder, seed=5).write(10, "_test")
    paths = {name: str(samples.folder / f"{name}.npy") for name in ("X_test", "y_test")}
    data = {**paths, "test": 10, "train": [20, 60], "validation": [60, 66]}
    seen: list[tuple[np.ndarray, str, NystromFeatures]] = []
    features = NystromFeatures.features

    def watched(self: NystromFeatures, X: np.ndarray, rows: np.ndarray, pool: str) -> np.ndarray:
        seen.append((rows, pool, self))
        return features(self, X, rows, pool)

    monkeypatch.setattr(NystromFeatures, "features", watched)
    compared(features_of(samples, {"kind": "nystrom", "landmarks": 30}, data=data), root, "30")
    rows = np.concatenate([rows for rows, _, _ in seen])
    np.testing.assert_array_equal(rows, [*range(20, 66), *range(-1, -11, -1)])
    for _, pool, made in seen:
        assert made.arrays is not None
        assert bytes(made.arrays["pool"]).decode() == pool
        assert np.isin(made.arrays["rows"], np.arange(20, 60)).all()


def test_preprocessing_is_fitted_on_all_training_samples(samples: Samples, root: Path) -> None:
    one = features_of(samples, data={"preprocess": ["standardise"]})
    found = compared(one, root, "4", samples=12)
    X, _ = samples.arrays(72)
    Z = (X - X[:40].mean(0)) / X[:40].std(0)
    K_hat = Approximation.of(one).at(Size((4,))).gram(Z[:12])
    assert found["points"][0]["errors"] == pytest.approx(
        measures.errors(one.kernel_object.gram(Z[:12]), K_hat), rel=1e-9
    )


def test_a_random_kernel_without_features_of_its_own_is_compared(tmp_path: Path, root: Path) -> None:
    """Protects kernels that are known by their products alone: the convolutional tangent kernel (X28)."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((14, 6, 6, 1)), np.arange(14) % 2
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", y)
    exact = {
        "kind": "convolutional",
        "tangent": True,
        "layers": [{"patch": 3, "kernel": "relu", "subsampling": 2}],
    }
    table = {
        "name": "tangent",
        "seed": 3,
        "data": {"source": "arrays", "X": str(tmp_path / "X.npy"), "y": str(tmp_path / "y.npy"), "train": 10},
        "kernel": {"kind": "convolutional-tangent-random", "widths": 8, "kernel": exact},
        "gram": {"dtype": "float64"},
        "solve": {"ridges": [1e-2], "select": "loo"},
    }
    found = compared(Experiment.model_validate(table), root, "8,32", repeat=2)
    K = from_description(exact).gram(X[:10])
    assert [point["seed"] for point in found["points"]] == [3, 4, 3, 4]
    assert found["points"][0]["part"] == "loo"
    for point in found["points"]:
        other = from_description({**table["kernel"], "widths": point["size"], "seed": point["seed"]}).gram(
            X[:10]
        )
        assert point["errors"] == pytest.approx(measures.errors(K, other), rel=1e-6)


def test_what_is_found_is_not_computed_again(
    samples: Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects going on after a kill: points outlive it, another size adds one, and a damaged file is replaced."""
    one = features_of(samples)
    made: list[str] = []
    approximate = compare.approximate

    def spied(phi: Any, X: np.ndarray, n: int, *known: Any) -> Any:
        made.append(f"{phi.widths[0]}/{phi.seed}")
        if made == ["4/0", "4/1", "16/0"]:
            raise KeyboardInterrupt
        return approximate(phi, X, n, *known)

    monkeypatch.setattr(compare, "approximate", spied)
    with pytest.raises(KeyboardInterrupt):
        compared(one, root, "4,16", repeat=2)
    made.append("started again")
    first = compared(one, root, "4,16", repeat=2)
    assert made == ["4/0", "4/1", "16/0", "started again", "16/0", "16/1"]
    assert compared(one, root, "4,16", repeat=2) == first
    assert len(made) == 6
    larger = compared(one, root, "4,16,32", repeat=2)
    assert made[6:] == ["32/0", "32/1"]
    assert larger["points"][:4] == first["points"]
    (points,) = root.glob("comparisons/points")
    for path in points.iterdir():
        path.write_text(path.read_text()[:20])
    again = compared(one, root, "4,16", repeat=2)
    assert [p["errors"] for p in again["points"]] == [p["errors"] for p in first["points"]]


def test_one_map_may_be_asked_for_by_two_sizes(samples: Samples, root: Path) -> None:
    """Protects a comparison that finds the points of another one: 4 and 4x4 are one map of two layers."""
    one = samples.experiment(
        features={"kind": "random", "widths": 4},
        kernel={"kind": "fully-connected", "family": "rf", "depth": 3},
    )
    assert [row["text"] for row in compared(one, root, "4")["sizes"]] == ["4"]
    found = compared(one, root, "4x4,4x8")
    assert [row["text"] for row in found["sizes"]] == ["4x4", "4x8"]
    assert [point["size"] for point in found["points"]] == [[4, 4], [4, 8]]


def test_other_data_or_another_ridge_are_other_points(samples: Samples, root: Path) -> None:
    """Protects against a stored number that belongs to another comparison."""
    first = compared(features_of(samples), root, "4")["points"][0]
    other = compared(features_of(samples, solve={"ridges": [10.0]}), root, "4")["points"][0]
    assert other["ridge"] == 10.0 != first["ridge"]
    y = np.load(samples.folder / "y.npy")
    np.save(samples.folder / "y.npy", 2 - y[::-1])
    assert compared(features_of(samples), root, "4")["points"][0]["score"] != first["score"]


@pytest.mark.parametrize(
    "changed", [{"ridges": [1e-2]}, {"select": "gcv"}, {"jitter": 1e-3}, {"absolute": True}]
)
def test_all_that_scores_depend_on_is_of_the_identity(samples: Samples, changed: dict[str, Any]) -> None:
    """Protects against a score by another rule, or of another system, that passes for this one's."""
    solve = {"ridges": [1e-2, 1e-3], "select": "loo", "jitter": 0.0, "absolute": False}
    request = Request(read_sizes("4"), samples=6)
    first, other = (
        Subject(features_of(samples, solve=table), request).identity
        for table in (solve, {**solve, **changed})
    )
    assert first["solve"] != other["solve"]
    assert {**first, "solve": None} == {**other, "solve": None}


@pytest.mark.parametrize(("table", "learns"), [({"kind": "nystrom", "landmarks": 4}, True), (RANDOM, False)])
def test_what_a_map_learned_from_is_of_the_identity(
    samples: Samples, table: dict[str, Any], learns: bool
) -> None:
    """Protects against points of a map that learned from other samples, the same ones being compared; maps that learn
    nothing keep theirs."""
    identities = [
        Subject(
            features_of(samples, table, data={"train": train, "validation": [40, 52]}),
            Request(read_sizes("4"), samples=6),
        ).identity
        for train in (20, 40)
    ]
    first, other = ({**identity, "learned_from": None} for identity in identities)
    assert first == other
    assert (identities[0] != identities[1]) == learns


def test_stored_tiles_are_read(samples: Samples, root: Path) -> None:
    """Protects the exact matrix against being computed where it lies already."""
    one, counted = features_of(samples), []
    compared(one, root, "4")
    compared(one, root, "4,8", counted)
    assert "tiles of the Gram matrix" not in counted


def test_what_does_not_fit_is_refused_before_anything_is_made(
    samples: Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.comparison.subject.memory.available_bytes", lambda: 10_000)
    with pytest.raises(DoesNotFit, match="fewer --samples"):
        compared(features_of(samples), root)
    assert not (root / "gram").exists()


def test_more_features_need_more_memory(samples: Samples) -> None:
    one = features_of(samples)
    small, large = (Subject(one, Request(read_sizes(sizes))).bytes for sizes in ("4,8", "4,1008"))
    assert large - small >= 8 * 52 * 1000


def test_an_experiment_without_features_of_some_size_is_refused(samples: Samples) -> None:
    with pytest.raises(ExperimentError, match=r"small has no \[features\]"):
        Subject(samples.experiment(), Request(read_sizes("4")))
    polynomial = {"kind": "dot-product", "kernel": "polynomial", "degree": 2}
    with pytest.raises(ExperimentError, match='kind "monomials" have no size'):
        Subject(features_of(samples, {"kind": "monomials"}, kernel=polynomial), Request(read_sizes("4")))


def test_targets_are_reached_extrapolated_or_refused(samples: Samples, root: Path) -> None:
    """Protects what is said of the number of features that an error needs."""
    one = features_of(samples)
    found = compared(one, root, "16,64,256,1024", repeat=4, targets=(("relF", 0.9), ("relF", 0.005)))
    reached, needed = found["targets"]
    assert reached["reached"] == [16]
    assert "is reached by widths = 16" in reached["text"]
    (low,), (size,), (high,) = needed["low"], needed["size"], needed["high"]
    fit, last = found["fits"]["relF"], found["sizes"][-1]["errors"]["relF"]
    assert 1024 < low < size < high
    assert size == pytest.approx(1024 * (measures.mean_error(last) / 0.005) ** (-1 / fit["slope"]), rel=0.3)
    assert needed["bytes_per_sample"] == 8 * size
    assert "95 % confidence" in needed["text"]
    assert found["slope"]["status"] == "pass"
    few = compared(one, root, "16,64", targets=(("relF", 1e-3),))
    assert few["targets"][0]["refused"]
    assert "three sizes or more" in few["targets"][0]["text"]
    assert few["slope"] is None


def test_a_target_of_errors_that_do_not_fall_is_refused(samples: Samples) -> None:
    one = features_of(samples)
    subject = Subject(one, Request(read_sizes("4,8,16"), targets=(("relF", 0.01),)))
    found = invented(subject, [[0.1]] * 3)
    assert found["targets"][0]["refused"]
    assert "does not clearly fall" in found["targets"][0]["text"]
    assert found["slope"]["status"] == "not reached"


def invented(subject: Subject, errors: list[list[float]]) -> dict[str, Any]:
    """What is found of points with these errors, by size and seed."""
    point = {
        "score": 1.0,
        "gap": 0.0,
        "learning_seconds": 0.0,
        "seconds_per_sample": 0.0,
        "bytes_per_sample": 8,
    }
    points = [
        {**point, "size": list(size.numbers), "errors": dict.fromkeys(measures.MEASURES, error)}
        for size, own in zip(subject.request.sizes, errors, strict=True)
        for error in own
    ]
    return findings(subject, {"kind": subject.approximation.kind, "points": points})


def test_one_seed_gives_a_size_and_asks_for_more_seeds(samples: Samples) -> None:
    """Protects against a confidence that one seed cannot give; the size is said all the same."""
    subject = Subject(features_of(samples), Request(read_sizes("4,8,16"), targets=(("relF", 0.1),)))
    found = {**invented(subject, [[0.8], [0.4], [0.2]]), "key": "widths", "repeats": 1, "asked_repeats": 1}
    assert found["targets"][0]["size"] == [32]
    assert "low" not in found["targets"][0]
    said = " ".join(sentences(found))
    assert "needs about widths = 32 (how sure that is takes several seeds: --repeat 5)" in said
    assert "to the power -1.00 (one seed, so no interval: give --repeat 5)" in said
    assert "95 %" not in said


@pytest.mark.parametrize(("error", "far"), [(0.0201, False), (0.0199, True)])
def test_beyond_ten_times_what_was_compared_a_size_is_an_order_of_magnitude(
    samples: Samples, error: float, far: bool
) -> None:
    """Protects against trust in a line far from its points."""
    subject = Subject(features_of(samples), Request(read_sizes("4,8,16"), targets=(("relF", error),)))
    (found,) = invented(subject, [[0.8], [0.4], [0.2]])["targets"]
    assert found["factor"] == pytest.approx(0.2 / error)
    assert ("So far beyond what was compared" in found["text"]) == far


@pytest.mark.parametrize(
    ("table", "high", "said"),
    [
        (RANDOM, 15_990.0, "widths = 32 (95 % confidence: 20 to 16,000)"),
        (RANDOM, 16_000.0, "widths = 32 (95 % confidence: 20 or more)"),
        ({"kind": "nystrom", "landmarks": 5}, 40.0, "landmarks = 32 (95 % confidence: 20 to 40)"),
        ({"kind": "nystrom", "landmarks": 5}, 41.0, "landmarks = 32 (95 % confidence: 20 or more)"),
    ],
)
def test_an_interval_without_an_end_is_not_given_one(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], high: float, said: str
) -> None:
    """Protects against a bound that is none: a thousand times what was compared, or a size that no map can have."""
    monkeypatch.setattr(measures.PowerLaw, "size_for", lambda fit, error: (32.0, (20.0, high)))
    subject = Subject(features_of(samples, table), Request(read_sizes("4,8,16"), targets=(("relF", 0.1),)))
    (found,) = invented(subject, [[0.8, 0.81], [0.4, 0.401], [0.2, 0.201]])["targets"]
    assert said in found["text"]


def test_more_landmarks_than_samples_are_not_promised(samples: Samples) -> None:
    """Protects against a size that no run could have: there are 40 training samples to choose landmarks among."""
    one = features_of(samples, {"kind": "nystrom", "landmarks": 5})
    subject = Subject(one, Request(read_sizes("4,8,16"), targets=(("relF", 0.1), ("relF", 1e-3))))
    within, beyond = invented(subject, [[0.8, 0.81], [0.4, 0.401], [0.2, 0.201]])["targets"]
    assert within["size"] == [32]
    assert "or more" in within["text"] or within["high"][0] <= 40
    assert "size" not in beyond
    assert beyond["refused"]
    assert "asks for about landmarks = 3,2" in beyond["text"]
    assert "only 40 training samples" in beyond["text"]


def test_sizes_that_a_map_refuses_are_not_promised(samples: Samples) -> None:
    """Protects against a size above another parameter's, such as patches; said in the map's own words."""
    one = features_of(samples, {"kind": "nystrom", "landmarks": 5, "selection": "k-means", "candidates": 20})
    subject = Subject(one, Request(read_sizes("4,8,16"), targets=(("relF", 0.1),)))
    found = invented(subject, [[0.8, 0.81], [0.4, 0.401], [0.2, 0.201]])
    assert found["targets"][0]["refused"]
    assert "the map does not take that (features.candidates must be at least" in found["targets"][0]["text"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "nystrom", "landmarks": 5}, True),
        ({"kind": "nystrom", "landmarks": 5, "selection": "k-means"}, False),
        (RANDOM, False),
    ],
)
def test_samples_that_may_be_landmarks_are_spoken_of(
    samples: Samples, root: Path, table: dict[str, Any], said: bool
) -> None:
    found = compared(features_of(samples, table), root, "5,10", samples=12)
    assert any("may be landmarks themselves" in text for text in sentences(found)) == said


def test_the_page_and_the_table_say_what_was_found(samples: Samples, root: Path) -> None:
    """Protects page, table and words: every size with its errors, and the fit, for one kernel or several."""
    one = replace_label(features_of(samples), "expo<nential>")
    found = compared(one, root, "4,16,64", repeat=2, targets=(("relMax", 1e-3),))
    header, rows = sizes_table(found)
    assert [row[0] for row in rows] == ["exact kernel", "4", "16", "64"]
    assert header[:4] == ["widths", "relF", "relOp", "relMax"]
    assert float(rows[1][1]) == pytest.approx(
        measures.mean_error(found["sizes"][0]["errors"]["relF"]), rel=0.01
    )
    for entries in ([found], [found, found]):
        page = compare_page(
            {
                "title": "a pilot",
                "created": "now",
                "megagram": "0",
                "command": "megagram compare",
                "entries": entries,
            }
        )
        for text in (to_html(page), to_markdown(page)):
            for sentence in sentences(found):
                assert sentence.split(" (95")[0].split(" = ")[0].replace("_", "") in text.replace("\\", "")
            assert "64" in text
            assert "expo<nential>" not in text.replace("\\", "") or text.startswith("#")
        assert to_html(page).count("<svg") == (4 if len(entries) == 1 else 3)


def test_the_page_says_where_sizes_of_several_numbers_stand(samples: Samples, root: Path) -> None:
    """Protects axes whose ticks are no size that was asked for; and their being silent where they are."""
    kernel = {"kind": "fully-connected", "family": "rf", "depth": 3}
    one = features_of(samples, kernel=kernel)
    said = "A size stands at the number that varies, or at the geometric mean of those that do: 8x32 at 16."
    for sizes, times in (("4x16,8x32", 4), ("4,8", 0)):
        entry = compared(one, root, sizes)
        comparison = {"title": "t", "created": "now", "megagram": "0", "command": "c", "entries": [entry]}
        assert to_html(compare_page(comparison)).count(said) == times


def replace_label(one: Experiment, label: str) -> Experiment:
    return one.model_copy(update={"label": label})


def test_one_seed_tells_all_where_nothing_is_drawn(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against repeats of the same numbers that would pass for a band."""
    monkeypatch.setattr("pipelines.comparison.subject.is_drawn", lambda made: False)
    subject = Subject(features_of(samples), Request(read_sizes("4,8"), repeat=3))
    assert subject.repeats == 1
    assert len(subject.wanted) == 2


def test_a_comparison_is_written_once(samples: Samples, root: Path) -> None:
    """Protects the folder: what is there stays, what is damaged is replaced, other targets make another."""
    one = features_of(samples)
    found = {
        "title": "t",
        "created": "now",
        "megagram": "0",
        "command": "c",
        "entries": [compared(one, root, "4,8")],
    }
    request = Request(read_sizes("4,8"))
    named = address([Subject(one, request)])
    assert named != address([Subject(one, replace(request, targets=(("relF", 0.1),)))])
    store, page = ComparisonStore(root, "small", named), compare_page(found)
    assert store.read() is None
    store.write(found, page)
    store.write({**found, "created": "later"}, page)
    assert store.read()["created"] == "now"  # type: ignore[index]
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "comparison.json",
        "report.html",
        "report.md",
    ]
    (store.folder / "comparison.json").write_text("{")
    store.write({**found, "created": "later"}, page)
    assert store.read()["created"] == "later"  # type: ignore[index]
    assert [path.name for path in store.folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_nystrom_networks_on_digits_are_as_near_as_the_reference_run(root: Path) -> None:
    """Protects X10, F6: relF .033, .011, .0023 within 40 % at 16, 64, 256 anchors; below .005 and one point at 256."""
    layer = {"patch": 3, "kernel": "exponential", "sigma": 0.6}
    one = Experiment.model_validate(
        {
            "name": "digits",
            "data": {"source": "digits", "train": [0, 400], "test": [1000, 1400], "preprocess": ["scale"]},
            "kernel": {"kind": "convolutional", "layers": [{**layer, "subsampling": 2}, {**layer, "subsampling": 1}]},
            "features": {"kind": "nystrom-ckn", "anchors": [16, 16], "patches": 6000},
            "solve": {"ridges": [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6], "select": "oracle"},
        }
    )  # fmt: skip
    found = compared(one, root, "16,64,256")
    for point, wanted in zip(found["points"], (0.033, 0.011, 0.0023), strict=True):
        assert point["errors"]["relF"] == pytest.approx(wanted, rel=0.4)
    assert found["points"][2]["errors"]["relF"] < 0.005
    assert found["points"][2]["gap"] < 1.0
