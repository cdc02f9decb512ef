"""The rooms of the house and the direction of the arrows between them."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "pipelines", "flows", "cluster")
FORBIDDEN = {
    "kernels": {"pipelines", "flows", "cluster", "dask", "distributed", "zarr", "prefect"},
    "pipelines": {"flows", "cluster", "prefect"},
    "flows": set(),
    "cluster": {"kernels", "pipelines", "flows"},
}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


SOURCES = [path for package in PACKAGES for path in modules(package)]


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(function: ast.expr) -> str:
    return ast.unparse(function)


def wrong_imports(package: str, source: str) -> list[str]:
    """What a module of ``package`` imports though it must not, or in the wrong way."""
    wrong = []
    for level, name in imports(ast.parse(source)):
        top = name.partition(".")[0]
        if level == 0 and top in FORBIDDEN[package]:
            wrong.append(f"imports {name}")
        elif level == 0 and top == package:
            wrong.append(f"imports {name} absolutely: inside a package imports are relative")
        elif level == 0 and top == "tests":
            wrong.append(f"imports {name}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    """Protects kernels <- pipelines <- flows, cluster <- flows, and kernels without Dask, Zarr or Prefect."""
    depth = len(path.relative_to(ROOT).parts) - 1
    source = path.read_text()
    assert wrong_imports(package_of(path), source) == []
    # More dots than folders would leave the package.
    assert all(level <= depth for level, _ in imports(ast.parse(source)))


def test_wrong_imports_are_seen() -> None:
    """Protects the test above from seeing nothing: every wrong arrow, also inside functions."""
    assert wrong_imports("kernels", "def f():\n    import zarr.codecs\n")
    assert wrong_imports("kernels", "from pipelines.tiles import Grid\n")
    assert wrong_imports("pipelines", "if True:\n    from prefect import flow\n")
    assert wrong_imports("cluster", "from kernels.base import Kernel\n")
    assert wrong_imports("pipelines", "import pipelines.tiles\n")
    assert not wrong_imports("flows", "from pipelines import plan\nfrom .work import Work\n")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_read_can_execute_code(path: Path) -> None:
    """Protects against pickles, and against eval and exec, in whatever a file or store may hold."""
    tree = ast.parse(path.read_text())
    assert not {name.partition(".")[0] for _, name in imports(tree)} & UNSAFE
    assert not {name_of(call.func) for call in calls(tree)} & {"eval", "exec", "__import__"}
    for call in calls(tree):
        allowed = [k.value for k in call.keywords if k.arg == "allow_pickle"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints(path: Path) -> None:
    """Protects standard output, which scripts read: everything else reports through a display."""
    if path == ROOT / "flows" / "cli.py":
        return
    assert "print" not in {name_of(call.func) for call in calls(ast.parse(path.read_text()))}


def test_top_level_folders() -> None:
    """Protects the five rooms: what git knows lies in them, in .ci, or at the root as a plain file."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project cannot be told")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert folders == {"kernels", "pipelines", "flows", "cluster", "tests", ".ci"}


def test_tests_are_no_packages() -> None:
    """Protects the imports of tests: an __init__.py would make tests/kernels shadow the package kernels."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_packages_are_installed_whole() -> None:
    """Protects an installed copy: every folder with modules or files of ours is listed for installation."""
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in PACKAGES:
        folders = {path.parent for path in modules(package)}
        folders |= {path.parent for path in (ROOT / package).rglob("*.toml")}
        for folder in folders:
            assert ".".join(folder.relative_to(ROOT).parts) in setup["packages"]
