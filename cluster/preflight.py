"""The same code, the same libraries and the same files everywhere, or no start."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PreflightError

if TYPE_CHECKING:
    from distributed import Client

PACKAGES = ("kernels", "pipelines")
_LIBRARIES = ("numpy", "zarr", "distributed")


def preflight(client: Client | None, root: str | Path | None = None) -> None:
    """Refuse to run where workers would compute something else than this process asks for.

    Checks that the packages are this project's (their names are common ones), that every worker has the
    same code and the same Python, NumPy, Zarr and Dask, and that it reads and writes below ``root``.

    client: as ``open_cluster`` yields it, None when there are no workers; root: folder of the stores, made
    when it does not exist.

    Raises:
        PreflightError: naming the worker, what differs, and what to do.
    """
    own = inspect_process()
    home = str(Path(__file__).resolve().parents[1])
    for package, found in own["packages"].items():
        if found is None or found["folder"] != str(Path(home, package)):
            where = "is not found" if found is None else f"is taken from {found['folder']}"
            raise PreflightError(
                f"the package {package!r} {where}, not from {home}: another distribution uses its name; "
                "remove that one, or install megagram into an environment of its own"
            )
    token = None
    if root is not None:
        root = Path(root).resolve()
        token = _write_token(root)
    try:
        if client is not None:
            _compare(client, own, root, token)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)


def inspect_process() -> dict[str, Any]:
    """Versions of what this process would compute with, and where our packages are; nothing is imported."""
    return {
        "packages": {name: _package(name) for name in PACKAGES},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
    }


def _compare(client: Client, own: dict[str, Any], root: Path | None, token: Path | None) -> None:
    try:
        answers = client.run(_inspect_worker, str(root) if root else None, token.name if token else None)
    except (ImportError, AttributeError) as error:
        raise PreflightError(
            f"a worker cannot import the package 'cluster' of this project ({error}); install the same "
            "version of megagram where the workers run"
        ) from error
    for address, answer in answers.items():
        worker = f"worker {address} on {answer['host']}"
        for name, version in own["versions"].items():
            if answer["versions"][name] != version:
                raise PreflightError(
                    f"{worker} has {name} {answer['versions'][name]}, this process {version}; "
                    "install the same versions on both sides (constraints.txt lists a set that works)"
                )
        for package, here in own["packages"].items():
            there = answer["packages"][package]
            if there is None or there["digest"] != here["digest"]:
                where = "does not find it" if there is None else f"takes another one from {there['folder']}"
                raise PreflightError(
                    f"package {package!r}: this process takes it from {here['folder']}, {worker} {where}; "
                    "install the same megagram where the workers run, and nothing else of that name"
                )
        if answer["root"] is not None:
            raise PreflightError(
                f"{worker} cannot use {root}: {answer['root']}; choose a --root that every worker reads and "
                "writes, such as a shared disk"
            )


def _inspect_worker(root: str | None, token: str | None) -> dict[str, Any]:
    problem = None if root is None or token is None else _try_root(Path(root), token)
    return {**inspect_process(), "host": platform.node(), "root": problem}


def _try_root(root: Path, token: str) -> str | None:
    """None when ``root`` holds the driver's token and can be written to, else what is wrong."""
    if not (root / token).exists():
        return "it does not see what this process wrote there"
    mine = root / f"{token}-{os.getpid()}"
    try:
        mine.write_bytes(b"")
        mine.unlink()
    except OSError as error:
        return f"it cannot write there ({error.strerror})"
    return None


def _write_token(root: Path) -> Path:
    token = root / f".preflight-{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        token.write_bytes(b"")
    except OSError as error:
        raise PreflightError(
            f"{root}: cannot be written to ({error.strerror}); choose another --root"
        ) from error
    return token


def _package(name: str) -> dict[str, str] | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"folder": str(folder), "digest": digest.hexdigest()}


def _version(name: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "not installed"
