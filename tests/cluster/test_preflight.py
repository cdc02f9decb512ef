"""Preflight: the driver and every worker run the same code on the same files, or nothing starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import PreflightError
from cluster.local import open_cluster
from cluster.preflight import inspect_process, preflight
from cluster.profiles import Profile

ROOT = Path(__file__).resolve().parents[2]


class Elsewhere:
    """A client of one worker that answers as this process does, after ``change`` has altered the answer."""

    def __init__(self, change) -> None:
        self._change = change

    def run(self, function, root, token):
        answer = function(root, token)
        self._change(answer)
        return {"tcp://there:1234": answer}


class ElsewhereOnDisk:
    """A client of one worker that sees another disk below the same path."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def run(self, function, root, token):
        return {"tcp://there:1234": function(str(self._root), token)}


def test_a_cluster_of_this_code_passes_and_the_root_stays_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.profiles.visible_gpus", lambda: ())
    with open_cluster(Profile(workers=2, memory=700 * 2**20)) as client:
        preflight(client, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []
    preflight(None, tmp_path / "root")
    preflight(None)


def test_inspecting_does_not_change_what_is_imported():
    """Asking where a package is must not import a stranger's code."""
    script = (
        "import sys; from cluster.preflight import inspect_process as i; i(); print('kernels' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_a_package_of_the_same_name_in_front_of_ours_is_refused(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("raise RuntimeError('a stranger ran')")
    script = """
import sys
from cluster.preflight import preflight
sys.path.insert(0, sys.argv[1])
preflight(None)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "PreflightError" in last
    assert f"the package 'kernels' is taken from {other}" in last
    assert "remove that one" in last


@pytest.mark.parametrize("package", ["kernels", "pipelines"])
def test_a_worker_with_other_code_is_refused(package):
    def other_code(answer):
        answer["packages"][package] = {"folder": "/opt/other", "digest": "0"}

    with pytest.raises(PreflightError, match=rf"{package}.*tcp://there:1234.*another one from /opt/other"):
        preflight(Elsewhere(other_code))


def test_a_worker_without_our_package_is_refused():
    def absent(answer):
        answer["packages"]["kernels"] = None

    with pytest.raises(PreflightError, match="does not find it; install the same megagram"):
        preflight(Elsewhere(absent))


@pytest.mark.parametrize("library", ["python", "numpy", "zarr", "distributed"])
def test_another_version_is_named(library):
    def older(answer):
        answer["versions"][library] = "0.1"

    here = inspect_process()["versions"][library]
    with pytest.raises(PreflightError, match=rf"has {library} 0\.1, this process {here}"):
        preflight(Elsewhere(older))


def test_a_worker_that_sees_another_disk_is_refused(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(
        PreflightError, match="it does not see what this process wrote there; choose a --root"
    ):
        preflight(ElsewhereOnDisk(other), tmp_path / "root")


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"file/root: cannot be written to .*; choose another --root"):
        preflight(None, tmp_path / "file" / "root")


def test_a_worker_that_cannot_import_the_project_is_explained():
    class Bare:
        def run(self, *_):
            raise ModuleNotFoundError("No module named 'cluster'")

    with pytest.raises(PreflightError, match="install the same version of megagram where the workers run"):
        preflight(Bare())
