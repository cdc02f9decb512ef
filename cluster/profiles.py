"""A profile says where the work runs: on this machine, in this process, or on a running scheduler."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .errors import ProfileError

SHIPPED = Path(__file__).with_name("profiles")
MEMORY_SHARE = 0.8
"""Of the memory that is free at the start; the rest is left to the driver and the page cache."""

KERNEL_PATHS = ("auto", "general", "compiled", "cuda")
KERNEL_PATH_VARIABLE = "MEGAGRAM_KERNEL_PATH"
"""The variable that kernels read. Set by the user, it wins over a profile's ``kernel_path``."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Resources:
    """What a profile comes to on this machine.

    workers: number of processes; memory: bytes that each may use; gpus: the devices, as
    CUDA_VISIBLE_DEVICES names them, of the first ``len(gpus)`` workers.
    """

    workers: int
    memory: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assume:
    """Machines that are not there, to plan for; every figure is an assumption. Rates are per second.

    workers: their number; memory, gpu_memory: bytes of each. float64, float32: operations of a matrix product in
    one worker; transcendentals: calls of exp, arccos or sqrt there. driver_memory: bytes; driver: operations of a
    float64 product in the driver. disk: bytes that are free; disk_read: bytes, all workers together.
    """

    workers: int
    memory: int
    gpu_memory: int
    float64: float
    float32: float
    transcendentals: float
    driver_memory: int
    driver: float
    disk: int
    disk_read: float


@dataclass(frozen=True)
class Profile:
    """Where and with how much the work runs.

    kind: "local" (processes of this machine), "serial" (this process alone) or "address" (a running
    scheduler). workers: a number, or "auto" for one per GPU, else one per core. memory: bytes per worker, or
    "auto" for an equal share of what is free. blas_threads: threads of the linear algebra library per
    worker. blas_coretype: OpenBLAS's core type; "auto" chooses by the processor, "default" leaves
    the choice to OpenBLAS. kernel_path: the code that computes convolutional kernels: "general", "compiled"
    (on the host, whatever GPUs there are), "cuda", or "auto" for the quickest that can.
    environment: further variables of the workers. scratch: folder for their
    temporary files. dashboard: False, or the port of Dask's pages. worker_timeout: seconds to wait for
    workers. assume: machines that are not there, for which ``plan`` is made and nothing can be run.
    """

    name: str = "local"
    kind: Literal["local", "serial", "address"] = "local"
    address: str = ""
    workers: int | Literal["auto"] = "auto"
    memory: int | Literal["auto"] = "auto"
    blas_threads: int = 1
    blas_coretype: str = "auto"
    kernel_path: str = "auto"
    environment: Mapping[str, str] = field(default_factory=dict)
    scratch: str = ""
    dashboard: int | Literal[False] = False
    worker_timeout: float = 60.0
    assume: Assume | None = None

    @classmethod
    def load(cls, name_or_path: str | Path) -> Profile:
        """Read a shipped profile by name, or a TOML file by path.

        A kernel path that the user's environment asks for takes the place of the profile's.

        Raises:
            ProfileError: no such profile, an unknown key (the nearest one is named), or a bad value.
        """
        path = _find(str(name_or_path))
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ProfileError(f"{path}: is not valid TOML ({error})") from error
        profile = cls.from_table(table, name=path.stem, where=str(path))
        asked = os.environ.get(KERNEL_PATH_VARIABLE)
        if asked is None:
            return profile
        try:
            return replace(profile, kernel_path=_CHECKS["kernel_path"](asked))
        except ValueError as error:
            raise ProfileError(f"the variable {KERNEL_PATH_VARIABLE} = {asked!r}: {error}") from None

    @classmethod
    def from_table(cls, table: Mapping[str, Any], name: str = "local", where: str = "profile") -> Profile:
        """Build a profile from the keys and values of its file; ``where`` begins every message.

        Raises:
            ProfileError: an unknown key, or a bad value.
        """
        for key in table:
            if key not in _CHECKS:
                raise ProfileError(f"{where}: unknown key {key!r}{_nearest(key, _CHECKS)}")
        values: dict[str, Any] = {}
        for key, value in table.items():
            try:
                values[key] = _CHECKS[key](value)
            except ValueError as error:
                raise ProfileError(f"{where}: {key} = {value!r}: {error}") from None
        profile = cls(name=name, **values)
        if profile.kind == "address" and not profile.address:
            raise ProfileError(f'{where}: kind = "address" needs address = "tcp://HOST:PORT" of a scheduler')
        if profile.address and profile.kind != "address":
            raise ProfileError(f'{where}: an address is only used by kind = "address", not {profile.kind!r}')
        return profile

    def resources(self) -> Resources:
        """Workers, memory per worker in bytes and GPUs that this profile comes to on this machine."""
        if self.assume is not None:
            return Resources(self.assume.workers, min(self.assume.memory, self.assume.gpu_memory))
        gpus = visible_gpus() if self.kind == "local" and self.kernel_path != "compiled" else ()
        if self.kind == "serial":
            workers = 1
        elif self.workers == "auto":
            workers = len(gpus) or core_count()
        else:
            workers = self.workers
        memory = int(MEMORY_SHARE * available_memory() / workers) if self.memory == "auto" else self.memory
        return Resources(workers, memory, gpus[:workers])

    def describe(self) -> dict[str, Any]:
        """JSON with every setting, for provenance."""
        return {**asdict(self), "environment": dict(self.environment)}


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def core_count() -> int:
    """Cores that this process may use: affinity and container quotas count."""
    from dask.system import CPU_COUNT

    return CPU_COUNT


def available_memory() -> int:
    """Bytes of memory that are free to this process: the machine's, or less where a container says so."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used, stat, inactive in _CGROUPS:
        try:
            room = int(limit.read_text()) - int(used.read_text())
            counters = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):  # no such container, or its limit is the word "max"
            continue
        free = min(free, room + int(counters.get(inactive, 0)))  # cached files give way to new pages
    return max(free, 0)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that CuPy finds, as CUDA_VISIBLE_DEVICES names them; empty without CuPy or a GPU."""
    if importlib.util.find_spec("cupy") is None:
        return ()
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return ()
    return gpu_names(count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_names(count: int, visible: str | None) -> tuple[str, ...]:
    """Names of ``count`` devices when CUDA_VISIBLE_DEVICES is ``visible`` (None: not set)."""
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")
    return tuple(name.strip() for name in names[:count])


_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat", "inactive_file"),
    (
        _CGROUP / "memory/memory.limit_in_bytes",
        _CGROUP / "memory/memory.usage_in_bytes",
        _CGROUP / "memory/memory.stat",
        "total_inactive_file",
    ),
)


def _find(name: str) -> Path:
    if name.endswith(".toml") or os.sep in name:
        return Path(name).expanduser()
    path = SHIPPED / f"{name}.toml"
    if not path.exists():
        known = shipped_profiles()
        raise ProfileError(
            f"no cluster profile is called {name!r}{_nearest(name, known)}; there are {', '.join(known)}, "
            "or give the path of a .toml file"
        )
    return path


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_memory(value: object) -> int:
    """Bytes of "2GiB", "500MB" or a plain number.

    Raises:
        ValueError: anything else, or nothing at all of it.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise ValueError(f'a size such as "2GiB" or "500MB" is needed; units are {", ".join(_UNITS)}')
        value = int(float(match[1]) * units[match[2].lower()])
    return _whole(value, at_least=1)


def _whole(value: object, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"a whole number, at least {at_least}, is needed")
    return value


def _auto_or(check: Callable[[object], int]) -> Callable[[object], int | str]:
    def either(value: object) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f'{error}, or "auto"') from None

    return either


def _one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{_nearest(str(value), choices)}")
        return str(value)

    return check


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text is needed")
    return value


def _environment(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or any(isinstance(item, dict | list) for item in value.values()):
        raise ValueError("a table of variables is needed, each with one value")
    if KERNEL_PATH_VARIABLE in value:
        raise ValueError(f"{KERNEL_PATH_VARIABLE} would reach the workers alone: use the key kernel_path")
    return {name: str(item) for name, item in value.items()}


def _port(value: object) -> int | bool:
    if isinstance(value, bool):
        return 8787 if value else False
    if not isinstance(value, int) or not 0 < value < 65536:
        raise ValueError("false, true (port 8787) or a port from 1 to 65535 is needed")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("a positive number of seconds is needed")
    return float(value)


def _rate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("a positive number is needed")
    return float(value)


_ASSUMED: dict[str, Callable[[object], Any]] = {
    "workers": lambda value: _whole(value, at_least=1),
    **dict.fromkeys(("memory", "gpu_memory", "driver_memory", "disk"), parse_memory),
    **dict.fromkeys(("float64", "float32", "transcendentals", "driver", "disk_read"), _rate),
}
assert set(_ASSUMED) == {f.name for f in fields(Assume)}


def _assumed(value: object) -> Assume:
    if not isinstance(value, dict):
        raise ValueError("a table is needed")
    values: dict[str, Any] = {}
    for key in value:
        if key not in _ASSUMED:
            raise ValueError(f"unknown key {key!r}{_nearest(key, _ASSUMED)}")
    for key, check in _ASSUMED.items():
        if key not in value:
            raise ValueError(f"{key} is missing")
        try:
            values[key] = check(value[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return Assume(**values)


_CHECKS: dict[str, Callable[[object], Any]] = {
    "kind": _one_of(("local", "serial", "address")),
    "address": _text,
    "workers": _auto_or(lambda value: _whole(value, at_least=1)),
    "memory": _auto_or(parse_memory),
    "blas_threads": lambda value: _whole(value, at_least=1),
    "blas_coretype": _text,
    "kernel_path": _one_of(KERNEL_PATHS),
    "environment": _environment,
    "scratch": _text,
    "dashboard": _port,
    "worker_timeout": _seconds,
    "assume": _assumed,
}
assert set(_CHECKS) == {f.name for f in fields(Profile)} - {"name"}
