"""The environment that linear algebra reads when it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cluster.worker
from cluster.local import open_cluster
from cluster.profiles import KERNEL_PATH_VARIABLE, Profile
from cluster.worker import blas_environment, kernel_path_set, recommended_core_type

ROOT = Path(__file__).resolve().parents[2]
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2"}


@pytest.fixture
def amd(monkeypatch):
    info = {"vendor_id": "AuthenticAMD", "flags": " ".join(sorted(AVX512))}
    monkeypatch.setattr(cluster.worker, "_cpuinfo", lambda: info)


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", AVX512, "SkylakeX"),
        ("AuthenticAMD", AVX512 - {"avx512vl"}, None),
        ("AuthenticAMD", {"avx2"}, None),
        ("GenuineIntel", AVX512, None),
        ("", set(), None),
    ],
)
def test_core_type_follows_the_flags(vendor, flags, expected):
    """Forcing AVX-512 on a processor without it would crash; Intel's are recognised as what they are."""
    assert recommended_core_type(vendor, flags) == expected


@pytest.mark.usefixtures("amd")
def test_threads_and_core_type_are_set():
    variables = blas_environment(Profile(blas_threads=1), environ={})
    assert variables["OPENBLAS_CORETYPE"] == "SkylakeX"
    for library in ("OPENBLAS", "MKL", "OMP", "BLIS"):
        assert variables[f"{library}_NUM_THREADS"] == "1"


@pytest.mark.usefixtures("amd")
def test_the_users_core_type_wins():
    assert "OPENBLAS_CORETYPE" not in blas_environment(Profile(), environ={"OPENBLAS_CORETYPE": "Zen"})
    assert blas_environment(Profile(blas_coretype="Haswell"), environ={})["OPENBLAS_CORETYPE"] == "Haswell"
    assert "OPENBLAS_CORETYPE" not in blas_environment(Profile(blas_coretype="default"), environ={})
    mine = Profile(environment={"OPENBLAS_CORETYPE": "Zen", "OMP_NUM_THREADS": "2"})
    assert blas_environment(mine, environ={})["OPENBLAS_CORETYPE"] == "Zen"
    assert blas_environment(mine, environ={})["OMP_NUM_THREADS"] == "2"


def run(script: str, **environ: str) -> dict:
    inherited = {name: value for name, value in os.environ.items() if "CORETYPE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


SET_THEN_LOAD = """
import json, sys
from cluster.worker import set_blas_environment, describe_worker
from cluster.profiles import Profile
assert "numpy" not in sys.modules, "importing the profile must not load NumPy"
chosen = set_blas_environment(Profile(blas_coretype="Haswell"))
print(json.dumps({"chosen": chosen, "worker": describe_worker(), "again": set_blas_environment()}))
"""


def test_the_core_type_reaches_the_library_when_set_before_numpy():
    answer = run(SET_THEN_LOAD)
    assert answer["chosen"] == {"OPENBLAS_CORETYPE": "Haswell"}
    assert answer["again"] == {}, "too late once NumPy is loaded"
    worker = answer["worker"]
    assert worker["coretype_asked"] == "Haswell"
    for library in worker["blas"]:
        if library["name"] == "openblas":
            assert library["coretype"] == "Haswell"
    assert worker["cpu"]
    assert worker["memory_limit"] is None


# Kernel paths.


@pytest.mark.parametrize("before", [None, "general"])
def test_the_path_is_set_for_a_while(monkeypatch, before):
    """Kernels of this process, and of those it starts, read the variable; afterwards it is what it was."""
    if before is not None:
        monkeypatch.setenv(KERNEL_PATH_VARIABLE, before)
    with kernel_path_set(Profile(kernel_path="compiled")):
        assert os.environ[KERNEL_PATH_VARIABLE] == "compiled"
    assert os.environ.get(KERNEL_PATH_VARIABLE) == before
    with kernel_path_set(Profile(kernel_path="auto")):  # no wish: what a user has set stays
        assert os.environ.get(KERNEL_PATH_VARIABLE) == before


def test_workers_elsewhere_do_not_bind_this_process(monkeypatch):
    """A laptop without a GPU may drive workers that have some."""
    elsewhere = Profile(kind="address", address="tcp://there:8786", kernel_path="cuda")
    for before in (None, "cuda"):
        if before:
            monkeypatch.setenv(KERNEL_PATH_VARIABLE, before)
        with kernel_path_set(elsewhere):
            assert os.environ.get(KERNEL_PATH_VARIABLE, "auto") == "auto"
        assert os.environ.get(KERNEL_PATH_VARIABLE) == before


def test_the_path_reaches_workers_and_the_serial_process():
    """What a profile asks for is what every process computes by."""
    with open_cluster(Profile(workers=1, memory=2**29, kernel_path="general")) as client:
        assert client is not None
        assert list(client.run(os.getenv, KERNEL_PATH_VARIABLE).values()) == ["general"]
    with open_cluster(Profile(kind="serial", kernel_path="general")):
        assert os.getenv(KERNEL_PATH_VARIABLE) == "general"
    assert os.getenv(KERNEL_PATH_VARIABLE) is None
