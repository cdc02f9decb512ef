"""Which code computes convolutional kernels: chosen by profile or variable, refused in time, said and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.profiles import Profile
from cluster.worker import kernel_path_set
from flows.machines import told_path
from kernels.arrays import why_no_device
from pipelines import provenance

EXPERIMENT = """
name = "small"
[data]
source = "digits"
train = 200
validation = 50
preprocess = ["scale"]
[kernel]
kind = "convolutional"
[[kernel.layers]]
patch = 3
kernel = "exponential"
sigma = 0.6
subsampling = 2
[solve]
ridges = [0.1, 0.001]
"""
VARIABLE = "MEGAGRAM_KERNEL_PATH"
COMPILED = provenance.paths()["compiled"]
needs_compiled = pytest.mark.skipif(COMPILED.startswith("absent"), reason=COMPILED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an experiment, and a profile for each path."""
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    for path in ("general", "compiled", "cuda"):
        (tmp_path / f"{path}.toml").write_text(f'kind = "serial"\nkernel_path = "{path}"\n')
    return tmp_path


def megagram(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_doctor_names_every_path_or_why_it_is_absent(folder: Path) -> None:
    """Protects the first thing to look at when a machine is slower than it should be."""
    facts = last_json(megagram(folder, "doctor", "--json", **{VARIABLE: "general"}))
    assert facts["compiled path"] == COMPILED
    assert facts["cuda path"] == provenance.paths()["cuda"]
    assert facts["kernel path asked for"] == "general"
    for state in (COMPILED, facts["cuda path"]):
        assert state.startswith(("compiled ", "cuda", "absent: "))


def test_the_doctor_complains_of_variables_that_mean_nothing(folder: Path) -> None:
    """Protects whoever asks it why every command fails: it says the variable, the value and what there is."""
    bad = {VARIABLE: "numpy", "MEGAGRAM_INSTRUCTION_SET": "avx3"}
    facts = last_json(megagram(folder, "doctor", "--json", **bad))
    assert facts["kernel path asked for"] == (
        f"{VARIABLE}=numpy is unknown: choose from auto, general, compiled, cuda"
    )
    assert facts["compiled path"] == (
        "absent: MEGAGRAM_INSTRUCTION_SET=avx3 is unknown: choose from baseline, avx2, avx512"
    )


def test_a_profile_s_path_computes_and_is_recorded(folder: Path) -> None:
    """Protects ``kernel_path`` from the profile to the tile, and back to result, report and terminal."""
    done = megagram(folder, "run", "small.toml", "--cluster", "general.toml", "--json")
    facts = last_json(done)
    assert facts["paths"] == {"numpy": facts["tiles_computed"]}
    assert done.stderr.count("tiles are computed by numpy") == 1
    page = Path(facts["report"])
    result = json.loads((page.parent / "result.json").read_text())
    assert result["cluster"]["kernel_path"] == "general"
    assert result["provenance"]["paths"] == provenance.paths()
    for text in (page.with_suffix(".md").read_text(), done.stdout):
        assert f"numpy: {facts['tiles_computed']}" in text


def test_the_variable_wins_over_the_profile(folder: Path) -> None:
    """Protects a quick comparison: what stands before the command counts."""
    done = megagram(folder, "plan", "small.toml", "--cluster", "cuda.toml", "--json", **{VARIABLE: "general"})
    assert last_json(done)["path"] == "numpy"
    assert "computed by" in done.stdout


@pytest.mark.skipif(why_no_device() is None, reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_impossible_path_is_refused_before_work_starts(folder: Path, command: str) -> None:
    """Protects from hours on the wrong path: one line, exit code 2, nothing stored."""
    for arguments, environment in (
        (("--cluster", "cuda.toml"), {}),
        (("--cluster", "serial"), {VARIABLE: "cuda"}),
    ):
        done = megagram(folder, command, "small.toml", *arguments, **environment)
        assert done.returncode == 2, done.stderr
        (line,) = (text for text in done.stderr.splitlines() if text.startswith("megagram: error:"))
        assert f"{VARIABLE}=cuda, but CuPy" in line
        assert not list(folder.glob("megagram-root/gram/*"))


@pytest.mark.parametrize(
    ("key", "variable", "told"),
    [
        ("auto", None, ""),
        ("general", None, "general"),
        ("cuda", "general", "general"),
        ("general", "auto", "auto"),
        ("auto", "auto", "auto"),
    ],
)
def test_workers_keep_their_own_path_unless_one_is_asked_for(
    key: str, variable: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the environment in which a running cluster's workers were started."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    path = tmp_path / "there.toml"
    path.write_text(f'kind = "address"\naddress = "tcp://there:8786"\nkernel_path = "{key}"\n')
    profile = Profile.load(path)
    with kernel_path_set(profile):
        assert told_path(profile) == told


def test_an_unknown_path_is_answered_with_the_known_ones(folder: Path) -> None:
    """Protects from a misspelt variable that would be passed over."""
    done = megagram(folder, "run", "small.toml", **{VARIABLE: "numpy"})
    assert done.returncode == 2
    assert "must be one of auto, general, compiled, cuda" in done.stderr


@pytest.mark.skipif(why_no_device() is None, reason="needs a machine without a GPU")
def test_a_study_says_its_path_once(folder: Path) -> None:
    """Protects from noise, and from a slow path that nobody notices: what is missing is said, and said once."""
    variants = '[[variants]]\nlabel = "one"\n[[variants]]\nlabel = "two"\nsolve.ridges = [0.2]\n'
    (folder / "study.toml").write_text(
        EXPERIMENT.replace("ridges = [0.1, 0.001]", "ridges = [0.1]") + variants
    )
    done = megagram(folder, "run", "study.toml", "--cluster", "serial")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tiles are computed by ") == 1
    if COMPILED.startswith("absent: "):
        assert done.stderr.count(COMPILED.removeprefix("absent: ")) == 1
    else:
        assert f"tiles are computed by {COMPILED}" in done.stderr


@pytest.mark.slow
@needs_compiled
def test_a_run_that_is_resumed_by_another_path_reports_both(folder: Path) -> None:
    """Protects resuming: tiles of the general path are taken by the compiled one, and the report shows the mix."""
    arguments = ("run", "small.toml", "--json", "--cluster")
    first = last_json(megagram(folder, *arguments, "general.toml", "--set", "data.train=100"))
    both = last_json(megagram(folder, *arguments, "compiled.toml", "--set", "data.train=400"))
    assert both["tiles_reused"] == first["tiles_computed"]
    assert both["paths"] == {"numpy": both["tiles_reused"], COMPILED: both["tiles_computed"]}
    text = Path(both["report"]).with_suffix(".md").read_text()
    assert f"{COMPILED}: {both['tiles_computed']}" in text
    assert f"numpy: {both['tiles_reused']}" in text
