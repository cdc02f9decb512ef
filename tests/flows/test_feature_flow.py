"""Runs with ``[features]``, from an experiment to its report: beside the exact kernel, again, damaged, streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from flows import status
from flows.run import Outcome, facts, rebuild_reports, run_study
from pipelines import inventory, modelfiles, results, solvers
from pipelines.errors import NumericalError
from pipelines.experiment import load
from pipelines.explicit import covariance, feature_fit
from pipelines.solvers import choose_primal
from pipelines.stores import FeatureStore
from pipelines.verify import verify

EXPERIMENT = """
name = "small"
[data]
source = "digits"
train = 300
validation = [300, 400]
test = [400, 700]
preprocess = ["scale"]
[kernel]
kind = "convolutional"
layers = [{ patch = 3, kernel = "exponential", sigma = 0.6, subsampling = 2 }]
[features]
kind = "nystrom-ckn"
anchors = [24]
patches = 2000
blocks = "stored"
[solve]
ridges = [1e-2, 1e-4, 1e-6]
"""
EXACT = EXPERIMENT[: EXPERIMENT.index("[features]")] + EXPERIMENT[EXPERIMENT.index("[solve]") :]


class Silent:
    """A display of nothing but lines, which it keeps."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, experiment: str, name: str) -> None:
        pass

    def progress(self, done: int, total: int, message: str) -> None:
        pass

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def ran(folder: Path, *overrides: str, text: str = EXPERIMENT, cluster: str = "serial") -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.toml"
    path.write_text(text)
    return run_study(load(path, overrides), folder / "root", cluster, Silent(), command="megagram run small")


def of(outcome: Outcome) -> dict[str, Any]:
    (result,) = outcome.results
    return result


def test_features_come_near_the_exact_kernel(tmp_path: Path) -> None:
    """Protects the purpose: the same data and ridges, one table more, and nearly the same accuracy; the result names
    the map, what it learned, the exact kernel and the stores."""
    found, exact = of(ran(tmp_path)), of(ran(tmp_path, text=EXACT))
    assert abs(found["evaluation"]["test"]["accuracy"] - exact["evaluation"]["test"]["accuracy"]) < 3
    assert found["kernel"] == exact["kernel"]
    made = found["features"]
    assert found["gram"] is None
    assert made["map"]["description"]["kind"] == "nystrom-ckn"
    assert made["map"]["description"]["learned"] == made["learned"]["digest"]
    assert made["learned"]["samples"] == 300
    assert made["width"] == 24 * 9
    assert (made["blocks"], made["blocks_computed"], made["blocks_reused"]) == ("stored", 1, 0)
    (store,) = made["stores"]
    assert FeatureStore(Path(store["path"])).array("features").shape == (1797, made["width"])
    assert [stage["name"] for stage in found["stages"]] == ["data", "plan", "features", "solve", "report"]
    assert {"planned", "method", "reason"} <= set(found["solver"])


def test_running_again_computes_nothing_and_gives_the_same_numbers(tmp_path: Path) -> None:
    """Protects resuming: map, features and solution are found; a new ridge needs the solution alone."""
    first, second = of(ran(tmp_path)), of(ran(tmp_path))
    assert second["evaluation"] == first["evaluation"]
    assert second["solver"]["reason"] == f"solved by run {first['run']}"
    assert (second["features"]["blocks_computed"], second["features"]["blocks_reused"]) == (0, 1)
    other = of(ran(tmp_path, "solve.ridges=[1e-3]"))
    assert other["features"]["blocks_computed"] == 0
    assert other["features"]["learned"]["digest"] == first["features"]["learned"]["digest"]
    assert other["evaluation"]["solved_by"]["run"] == other["run"]


def test_streamed_features_give_the_numbers_of_stored_ones(tmp_path: Path) -> None:
    """Protects ``blocks``, which decides on time and disk alone: same bits, same address of the result."""
    stored = of(ran(tmp_path / "stored"))
    streamed = of(ran(tmp_path / "streamed", "features.blocks=streamed"))
    assert streamed["features"]["stores"] == []
    assert not list((tmp_path / "streamed" / "root" / "features").glob("*"))
    for part in ("test", "validation", "train", "confusion", "ridge"):
        assert streamed["evaluation"][part] == stored["evaluation"][part]
    again = of(ran(tmp_path / "stored", "features.blocks=streamed"))
    assert again["solver"]["reason"] == f"solved by run {stored['run']}"


@pytest.mark.parametrize("what", ["features", "map"])
def test_damage_is_mended_in_the_same_run(tmp_path: Path, what: str) -> None:
    """Protects a run from a flipped byte, in a block or in what the map learned: found when it is read, made again."""
    first = of(ran(tmp_path))
    made = first["features"]
    if what == "map":
        path = next(Path(made["learned"]["path"]).glob("anchors*.npy"))
    else:
        path = FeatureStore(Path(made["stores"][0]["path"])).chunk("features", (0, 0))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    (bad,) = [one for one in verify(tmp_path / "root") if one.bad]
    assert bad.kind == ("maps" if what == "map" else "features")
    mended = of(ran(tmp_path, "solve.ridges=[1e-2, 1e-4, 1e-6, 1e-7]"))
    assert mended["features"]["blocks_computed"] == (1 if what == "features" else 0)
    assert mended["features"]["learned"]["digest"] == made["learned"]["digest"]
    assert mended["evaluation"]["path"][1]["test"] == first["evaluation"]["path"][1]["test"]
    assert not [one for one in verify(tmp_path / "root") if one.bad or one.missing]


def test_status_inventory_and_verify_know_features(tmp_path: Path) -> None:
    """Protects the commands that read the root alone: blocks needed and stored, a block that is gone."""
    result = of(ran(tmp_path))
    root = tmp_path / "root"
    (one,) = status.experiment_status("small", root)
    assert ("train features", "1 of 1 blocks stored") in status.status_rows(one)
    used = {entry.kind: entry.used_by for entry in inventory.inventory(root)}
    assert used == {"pools": ("small",), "features": ("small",), "maps": ("small",)}
    FeatureStore(Path(result["features"]["stores"][0]["path"])).chunk("features", (0, 0)).unlink()
    (gone,) = [one for one in verify(root) if one.missing]
    assert "block 0: missing" in gone.missing[0]
    (one,) = status.experiment_status("small", root)
    assert ("train features", "0 of 1 blocks stored") in status.status_rows(one)


def test_the_report_speaks_of_features_and_can_be_built_again(tmp_path: Path) -> None:
    """Protects the page: what stands for the kernel, how wide, what was learned; and ``newest``, which tells an
    experiment with features from the same one without."""
    result = of(ran(tmp_path))
    study = load(tmp_path / "small.toml")
    (page,) = rebuild_reports(study, tmp_path / "root")
    text = page.with_suffix(".md").read_text()
    for words in (
        "216 features of a nystrom-ckn map, which stand for a convolutional kernel",
        result["features"]["learned"]["digest"],
        "Time and features",
        "ΦᵀΦ",
    ):
        assert words in text
    assert "Tiles" not in text
    said = facts(result)
    assert (said["map"], said["features"], said["blocks_computed"]) == ("nystrom-ckn", 216, 1)
    json.dumps(said)
    (tmp_path / "small.toml").write_text(EXACT)
    with pytest.raises(results.StoreError, match="run it first"):
        rebuild_reports(load(tmp_path / "small.toml"), tmp_path / "root")


def test_the_saved_model_scores_as_the_run_did(tmp_path: Path) -> None:
    """Protects prediction: weights and map in the result's folder give the test scores of the run."""
    outcome = ran(tmp_path)
    folder = outcome.report.parent
    saved = modelfiles.load(folder)
    X = (load_digits_images()[400:700] / 16).astype(np.float32)
    scores = saved.kernel.features(X) @ saved.weights
    np.testing.assert_allclose(scores, np.load(folder / "test_scores.npy"), rtol=1e-4, atol=1e-5)


def load_digits_images() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images[..., None]


@pytest.mark.slow
def test_two_workers_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Protects results from the number of workers: digest, weights and scores, by each kind of method."""
    (tmp_path / "two.toml").write_text('kind = "local"\nworkers = 2\nmemory = "1 GiB"\n')
    for method in ("eigen", "conjugate-gradient", "falkon"):
        alone = ran(tmp_path / f"one-{method}", f"solve.method={method}")
        shared = ran(tmp_path / f"two-{method}", f"solve.method={method}", cluster=str(tmp_path / "two.toml"))
        assert of(shared)["cluster"]["workers"] == 2
        assert of(shared)["features"]["learned"]["digest"] == of(alone)["features"]["learned"]["digest"]
        weights = [np.load(one.report.parent / "weights.npy") for one in (alone, shared)]
        np.testing.assert_allclose(weights[1], weights[0], rtol=1e-6, atol=1e-9)
        assert of(shared)["evaluation"]["test"] == of(alone)["evaluation"]["test"]


class Interrupting(Silent):
    """Interrupts the run when some strips of the covariance are summed."""

    def progress(self, done: int, total: int, message: str) -> None:
        if message == "strips of the covariance" and 0 < done < total:
            raise KeyboardInterrupt


def test_a_run_interrupted_in_its_sums_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects hours of summing from a choice that falls otherwise when the run is started again."""
    monkeypatch.setattr(feature_fit, "SMALL", 0)
    small.use_tile_side(64, monkeypatch.setattr)
    monkeypatch.setattr(covariance, "STRIP", 64)
    monkeypatch.setattr(covariance, "UNSAVED", 1)
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT)
    root = tmp_path / "root"

    def run(display: Silent) -> Outcome:
        return run_study(load(path), root, "serial", display, command="megagram run small")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "choose_primal", lambda method, *rest: choose_primal("eigen", *rest))
        with pytest.raises(KeyboardInterrupt):
            run(Interrupting())
    display = Silent()
    again = of(run(display))
    assert again["solver"]["method"] == "eigen"
    assert again["solver"]["reason"] == "eigen: an earlier start began with it"
    assert not list((root / "solves").glob("*")), "what a finished run kept is removed"
    undisturbed = of(ran(tmp_path / "undisturbed"))
    assert undisturbed["solver"]["method"] == "cholesky", "which alone it would have taken"
    for key in ("ridge", "test"):
        assert again["evaluation"][key] == undisturbed["evaluation"][key]


def test_a_run_that_failed_by_its_numbers_binds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the next start, which may choose a method that does not fail."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise NumericalError("no factor")

    monkeypatch.setattr(feature_fit, "fit", fails)
    with pytest.raises(NumericalError, match="no factor"):
        ran(tmp_path)
    (journal,) = results.journals(tmp_path / "root", "small")
    assert journal["state"] == "failed"
    assert set(journal["way"]) == {"experiment"}
