"""``megagram predict`` as a person meets it: files in, files out, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flows import predict as command
from flows.display import Terminal
from flows.run import run_study
from pipelines import experiment, features, leases, modelfiles, pools
from pipelines.errors import ExperimentError
from pipelines.matrices import run_kernel

TOML = """
name = "small"
[data]
source = "digits"
train = 200
validation = [200, 300]
test = [300, 500]
preprocess = ["scale", "standardise"]
[kernel]
kind = "fully-connected"
family = "rf"
depth = 2
[solve]
ridges = [0.1, 0.001]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with an experiment that was run once under ``root``, its test images, and the result's folder."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "small.toml").write_text(TOML)
    study = experiment.load(folder / "small.toml")
    (one,) = study.experiments
    with Terminal() as display:
        outcome = run_study(study, folder / "root", "serial", display)
    result = Path(outcome.results[0]["folder"])
    found = pools.resolve(one)
    np.save(folder / "X.npy", found.train.X[300:500])
    made = features.prepared_description(found, run_kernel(one), "float32")
    (store,) = (
        path.parent
        for path in (folder / "root" / "features").glob("*/zarr.json")
        if json.loads(path.read_text())["attributes"]["description"].get("prepared") == made["prepared"]
    )
    modelfiles.save(
        result,
        pools=found,
        kernel=one.kernel_object,
        dtype="float32",
        features_path=store,
        ridge=outcome.results[0]["evaluation"]["ridge"],
        checksums=outcome.results[0]["evaluation"]["checksums"],
        root=folder / "root",
    )
    return folder, result


def megagram(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, "--root", "root"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_runs_own_test_images_get_its_predictions(ran: tuple[Path, Path]) -> None:
    """Protects ``predict``: labels and scores as the run found them, facts as the last line, no traces."""
    folder, result = ran
    done = megagram(
        *("predict", "small.toml", "--x", "X.npy", "--out", "y.npy", "--scores", "S.npy", "--json"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["samples"], facts["trained_on"], facts["run"]) == (200, 200, result.name)
    scores = np.load(result / "test_scores.npy")
    np.testing.assert_allclose(np.load(folder / "S.npy"), scores, atol=1e-5 * np.abs(scores).max())
    y = np.load(folder / "y.npy")
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y, np.argmax(scores, axis=1))
    assert not list((folder / "root" / "solves").glob("*"))
    assert not list(folder.glob(".*.npy.*"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_on_features_needs_its_result_alone(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects ``predict`` with a saved map: stores may be cleaned away, and workers predict what the run did."""
    table = TOML.replace("[solve]", '[features]\nkind = "nystrom"\nlandmarks = 60\n[solve]')
    (tmp_path / "mapped.toml").write_text(table)
    study, root = experiment.load(tmp_path / "mapped.toml"), tmp_path / "root"
    profile = "serial"
    with Terminal() as display:
        outcome = run_study(study, root, profile, display)
        np.save(tmp_path / "X.npy", pools.resolve(study.experiments[0]).train.X[300:500])
        for folder in ("features", "maps", "pools", "preprocessing"):
            shutil.rmtree(root / folder)
        if workers:
            profile = str(tmp_path / "profile.toml")
            Path(profile).write_text(f'kind = "local"\nworkers = {workers}\n')
            monkeypatch.setattr(command, "ALONE_SECONDS", 0.0)
        y, scores = tmp_path / "y.npy", tmp_path / "S.npy"
        facts = command.predict_arrays(study, tmp_path / "X.npy", y, scores, root, profile, display)
    assert (facts["samples"], facts["trained_on"]) == (200, 200)
    expected = np.load(Path(outcome.results[0]["folder"]) / "test_scores.npy")
    np.testing.assert_allclose(np.load(scores), expected, atol=1e-5 * np.abs(expected).max())
    assert not list((root / "solves").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_bits_of_one_process(
    ran: tuple[Path, Path], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects large predictions: those of the workers are those of this process."""
    folder, _ = ran
    study = experiment.load(folder / "small.toml")
    (tmp_path / "profile.toml").write_text(f'kind = "local"\nworkers = {workers}\n')
    with Terminal() as display:

        def scores(name: str, profile: str) -> np.ndarray:
            out = tmp_path / f"S-{name}.npy"
            y = tmp_path / f"y-{name}.npy"
            command.predict_arrays(study, folder / "X.npy", y, out, folder / "root", profile, display)
            return np.load(out)

        alone = scores("alone", "serial")
        monkeypatch.setattr(command, "ALONE_SECONDS", 0.0)
        np.testing.assert_array_equal(scores("shared", str(tmp_path / "profile.toml")), alone)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ("small.toml", "--x", "small.toml", "--out", "z.npy"),
            3,
            "--x small.toml: samples are read from a .npy",
        ),
        (("small.toml", "--x", "gone.npy", "--out", "z.npy"), 3, "gone.npy"),
        (
            ("small.toml", "--x", "flat.npy", "--out", "z.npy"),
            3,
            "flat.npy has shape (5, 64) and dtype uint8",
        ),
        (("small.toml", "--x", "X.npy", "--out", "X.npy"), 2, "--out X.npy: exists already"),
        (("small.toml", "--x", "X.npy", "--out", "z.txt"), 2, "predictions are written as .npy"),
        (("small.toml", "--x", "X.npy", "--out", "no/z.npy"), 2, "there is no folder"),
        (("small.toml", "--x", "X.npy", "--out", "z.npy", "--scores", "z.npy"), 2, "is the file of --out"),
        (
            ("small.toml", "--x", "X.npy", "--out", "z.npy", "--set", "data.train=150"),
            5,
            "holds no result of small as it is now; run it first",
        ),
        (("digits-depth", "--x", "X.npy", "--out", "z.npy"), 2, "digits-depth is a table of 8 experiments"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    ran: tuple[Path, Path], arguments: tuple[str, ...], code: int, said: str
) -> None:
    """Protects exit codes and messages; no file is left, none is overwritten."""
    folder, _ = ran
    np.save(folder / "flat.npy", np.zeros((5, 64), np.uint8))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    done = megagram("predict", *arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("megagram: error: "))
    assert said in line
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == before


def test_outputs_appear_when_they_are_whole(tmp_path: Path) -> None:
    """Protects atomic output: an error in the middle leaves nothing."""
    path = tmp_path / "y.npy"
    rows = np.arange(6.0).reshape(3, 2)

    def interrupted() -> None:
        with command._Rows(path, 3, rows[:1]) as out:
            out.append(rows[:2])
            raise ExperimentError("in the middle")

    with pytest.raises(ExperimentError):
        interrupted()
    assert not list(tmp_path.iterdir())
    with command._Rows(path, 3, rows[:1]) as out:
        out.append(rows[:2])
        out.append(rows[2:])
        assert not path.exists()
    np.testing.assert_array_equal(np.load(path), rows)


def test_what_a_killed_prediction_left_goes_with_the_next_to_the_same_output(tmp_path: Path) -> None:
    """Protects the user's folder from large hidden leftovers, and every file that may be in use or another's."""
    path, rows = tmp_path / "y.npy", np.arange(6.0).reshape(3, 2)
    start = "import sys; from pathlib import Path; import numpy as np; from flows.predict import _Rows\n"
    begin = "path = Path(sys.argv[1]); out = _Rows(path, 3, np.zeros((1, 2))).__enter__(); print(flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def begun(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", start + begin, str(tmp_path / name)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    for killed in (begun("y.npy"), begun("xy.npy")):
        killed.kill()
        killed.wait()
    working = begun("y.npy")
    elsewhere = tmp_path / f".y.npy.not-{leases.host()}-1-01234567"
    elsewhere.touch()
    assert len(list(tmp_path.glob(".y.npy.*"))) == 2, "the third prediction has removed what the first left"
    with command._Rows(path, 3, rows[:1]) as out:
        out.append(rows)
    left = {file.name for file in tmp_path.iterdir() if file.name.startswith(".y.npy.")}
    assert left == {elsewhere.name, *(name for name in left if f"-{working.pid}-" in name)}
    assert len(left) == 2
    assert list(tmp_path.glob(".xy.npy.*"))
    working.kill()
    working.wait()
