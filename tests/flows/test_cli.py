"""The command line as a person meets it: one-line errors, exit codes, resume, JSON, reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from kernels.convolutional import Convolutional, Layer

EXPERIMENT = """
name = "small"
[data]
source = "digits"
train = 200
validation = [200, 300]
test = [300, 500]
preprocess = ["scale"]
[kernel]
kind = "fully-connected"
family = "ntk"
depth = 2
[solve]
ridges = [0.1, 0.001]
"""

RELU_TOML = 'kind = "convolutional"\n[[layers]]\npatch = 3\nkernel = "relu"\nsubsampling = 2\n'
RELU = Convolutional((Layer(patch=3, kernel="relu", subsampling=2),))


def megagram(*arguments: str, cwd: Path, timeout: float = 120, **environment: str):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a small experiment that was run once, and what the run printed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.toml").write_text(EXPERIMENT)
    done = megagram("run", "small.toml", "--cluster", "serial", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done


def again(folder: Path, *arguments: str):
    done = megagram("run", "small.toml", "--cluster", "serial", "--json", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_last_line_of_a_run_is_its_facts_as_json(ran):
    _, facts, done = ran
    wanted = (
        "experiment test_accuracy validation_accuracy ridge tiles_computed tiles_reused seconds store report"
    )
    assert set(wanted.split()) <= set(facts)
    assert facts["experiment"] == "small"
    assert 80 < facts["test_accuracy"] <= 100
    assert facts["ridge"] in (0.1, 0.001)
    assert (facts["tiles_computed"], facts["tiles_reused"]) == (1, 0)
    assert Path(facts["store"], "zarr.json").exists()
    assert "<html" in Path(facts["report"]).read_text()
    assert "Test accuracy" in done.stdout
    assert "small: gram" in done.stderr, "a run shows its stages"


def test_running_again_computes_nothing_and_gives_the_same_numbers(ran):
    folder, facts, _ = ran
    second = again(folder)
    assert (second["tiles_computed"], second["tiles_reused"]) == (0, 1)
    for key in ("test_accuracy", "validation_accuracy", "ridge", "store"):
        assert second[key] == facts[key]
    assert second["run"] != facts["run"]


def test_another_split_of_the_same_pool_reuses_the_tiles(ran):
    folder, facts, _ = ran
    other = again(folder, "--set", "data.train=150", "--set", "data.validation=[150, 250]")
    assert other["tiles_computed"] == 0
    assert other["store"] == facts["store"]


def test_an_rf_experiment_after_its_ntk_computes_nothing(ran):
    folder, _, _ = ran
    assert again(folder, "--set", "kernel.family=rf")["tiles_computed"] == 0


def test_a_flipped_byte_is_found_named_and_mended(ran):
    folder, facts, _ = ran
    tile = Path(facts["store"], "gram", "c", "0", "0")
    damaged = bytearray(tile.read_bytes())
    damaged[1000] ^= 1
    tile.write_bytes(damaged)
    found = megagram("verify", facts["store"], cwd=folder)
    assert found.returncode == 5
    assert "tile 0/0" in found.stdout
    assert megagram("verify", facts["store"], "--repair", cwd=folder).returncode == 0
    mended = again(folder)
    assert mended["tiles_computed"] == 1
    assert mended["test_accuracy"] == facts["test_accuracy"]
    assert megagram("verify", facts["store"], cwd=folder).returncode == 0


def test_a_run_mends_damage_that_nobody_looked_for(ran):
    """The tile is found damaged while the run reads it, and computed again in the same run."""
    folder, facts, _ = ran
    tile = Path(facts["store"], "gram", "c", "0", "0")
    tile.write_bytes(tile.read_bytes()[:-7])
    mended = again(folder, "--set", "solve.ridges=[0.1, 0.01]")
    assert mended["tiles_computed"] == 1


def test_status_and_report_and_store_list_speak_of_the_run(ran):
    folder, facts, _ = ran
    status = megagram("status", "small", cwd=folder)
    assert status.returncode == 0
    assert "1 of 1 stored" in status.stdout
    assert megagram("status", facts["store"], cwd=folder).returncode == 0
    report = megagram("report", "small.toml", "--show", cwd=folder)
    assert report.returncode == 0, report.stderr
    assert "Accuracy against ridge" in report.stdout
    listed = megagram("store", "list", "--json", cwd=folder)
    stores = json.loads(listed.stdout.splitlines()[-1])
    assert {s["kind"] for s in stores} == {"pools", "features", "gram"}
    assert all("small" in s["used_by"] for s in stores)


def test_store_clean_removes_what_no_result_uses_and_nothing_else(ran, tmp_path):
    folder, facts, _ = ran
    assert "nothing to remove" in megagram("store", "clean", "--yes", cwd=folder).stdout
    orphan = folder / "megagram-root" / "gram" / "orphan"
    shutil.copytree(facts["store"], orphan)
    refused = subprocess.run(
        [sys.executable, "-m", "flows.cli", "store", "clean"],
        cwd=folder,
        input="n\n",
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert refused.returncode == 0
    assert orphan.exists(), "it asks, and no means no"
    assert "removed 1 store" in megagram("store", "clean", "--yes", cwd=folder).stdout
    assert not orphan.exists()
    assert Path(facts["store"]).exists()


def test_plan_counts_before_anything_is_computed(ran):
    folder, _, _ = ran
    done = megagram("plan", "small.toml", "--root", "elsewhere", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert plan["tiles_missing"] == 1
    assert plan["fits"]
    assert not (folder / "elsewhere").exists(), "a plan writes nothing"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("run smal.toml", 2, "no such file"),
        ("run quikstart", 2, 'did you mean "quickstart"'),
        ("run small.toml --set data.trian=3", 2, 'unknown key data.trian; did you mean "train"'),
        ("run small.toml --set solve.ridges=[0.0]", 2, "every ridge must be a positive number"),
        ("run small.toml --set data.train=9999", 2, "only 1797 samples"),
        ("run small.toml --set data.train=250", 2, "overlap in 50 rows"),
        ("run small.toml --set kernel.kind=convolutonal", 2, "convolutional"),
        ("run small.toml --cluster nowhere", 2, "no cluster profile"),
        ("status never-run", 2, "no shipped experiment"),
        ("verify .", 5, "neither a store nor a root"),
        ("gram small.toml --x absent.npy --out K.npy", 3, "absent.npy"),
        ("frobnicate", 2, "No such command"),
        ("run small.toml --nonsense", 2, "nonsense"),
    ],
)
def test_errors_are_one_line_with_a_documented_exit_code(ran, arguments, code, says):
    folder, _, _ = ran
    done = megagram(*arguments.split(" "), cwd=folder)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("megagram: error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["K.npy", pytest.param("K.zarr", marks=pytest.mark.slow)])
def test_gram_of_own_arrays_is_dense_and_symmetric(tmp_path, name):
    """Several tiles, ragged at the end: mirrored entries are those of the kernel, readable by anyone."""
    X = np.random.default_rng(0).normal(size=(300, 7, 5, 2))
    np.save(tmp_path / "X.npy", X)
    (tmp_path / "k.toml").write_text(RELU_TOML)
    arguments = ["gram", "k.toml", "--x", "X.npy", "--out", name, "--cluster", "serial"]
    done = megagram(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    K = (
        np.load(tmp_path / name)
        if name.endswith(".npy")
        else zarr.open_array(str(tmp_path / name), mode="r")[:]
    )
    np.testing.assert_allclose(K, RELU.gram(X), rtol=1e-12)
    np.testing.assert_array_equal(K, K.T)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["X.npy", "k.toml", name])
    again = megagram(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_gram_of_two_arrays_goes_on_after_a_kill(tmp_path):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(300, 11, 11, 1)), rng.normal(size=(140, 11, 11, 1))
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "Y.npy", Y)
    (tmp_path / "k.toml").write_text(RELU_TOML)
    arguments = [
        "gram",
        "k.toml",
        "--x",
        "X.npy",
        "--y",
        "Y.npy",
        "--out",
        "KY.npy",
        "--cluster",
        "serial",
        "--json",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("KY.npy.parts/gram/*/gram/c/*/*")):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "KY.npy").exists()
    done = megagram(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["tiles_reused"] >= 1
    assert facts["tiles_computed"] + facts["tiles_reused"] == 6
    np.testing.assert_allclose(np.load(tmp_path / "KY.npy"), RELU.gram(X, Y), rtol=1e-10)


def test_help_needs_no_heavy_import(tmp_path):
    """What makes ``--help`` and ``status`` answer at once: NumPy, Dask, Zarr, Prefect stay unimported."""
    program = (
        "import sys\nfrom flows.cli import app\n"
        "try:\n    app(['--help'], standalone_mode=False)\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'scipy', 'dask', 'distributed', 'zarr', 'prefect', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_help_with_an_example(tmp_path):
    commands = "run plan status verify gram report list doctor server"
    for command in [*([name] for name in commands.split()), ["store", "list"], ["store", "clean"]]:
        done = megagram(*command, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert "Example: megagram" in done.stdout, command


@pytest.mark.slow
def test_regression_and_own_arrays_from_file_to_report(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 6))
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", np.sin(X[:, 0]) + 0.01 * rng.normal(size=400))
    (tmp_path / "own.toml").write_text(
        'name = "own"\n[data]\nsource = "arrays"\nX = "X.npy"\ny = "y.npy"\ntrain = 250\n'
        "validation = [250, 300]\ntest = [300, 400]\n[kernel]\n"
        'kind = "dot-product"\nkernel = "exponential"\nsigma = 1.0\n'
        '[gram]\ndtype = "float64"\n[solve]\nridges = [1e-2, 1e-4, 1e-6]\nselect = "loo"\nrefit = true\n'
    )
    done = megagram("run", "own.toml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["test_accuracy"]["rmse"] < 0.5
    assert facts["select"] == "loo"


@pytest.mark.slow
@pytest.mark.parametrize("table", ["digits-depth", "digits-convolutional", "digits-turned"])
def test_the_digits_tables_are_reproduced_to_their_tolerance(tmp_path, table):
    """G8, G9 and X30 complete, by one command; it would end with exit code 9 if a figure were out of tolerance."""
    done = megagram("run", table, "--json", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["passed"]
    assert len(facts["variants"]) == {"digits-depth": 8, "digits-convolutional": 9, "digits-turned": 4}[table]


TABLE = """
name = "two"
data = { source = "digits", train = 200, test = [300, 500], preprocess = ["scale"] }
kernel = { kind = "fully-connected", depth = 2 }
expected = { source = "an invented table", tolerance = 0.1, train = 200 }
solve = { ridges = [0.1], select = "oracle" }
variants = [
  { label = "rf", kernel.family = "rf", expected.path = { 1e-1 = 10.0 } },
  { label = "ntk", kernel.family = "ntk" , expected.path = { 1e-1 = 10.0 } },
]
"""


def test_a_missed_figure_of_a_table_is_told_by_the_exit_code(tmp_path):
    (tmp_path / "two.toml").write_text(TABLE)
    done = megagram("run", "two.toml", "--cluster", "serial", "--json", cwd=tmp_path)
    assert done.returncode == 9, done.stderr
    assert "not reached" in done.stdout
    assert not json.loads(done.stdout.splitlines()[-1])["passed"]
