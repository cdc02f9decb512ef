"""Kernel tables as a user writes them: the leaves of a combination, paths in them, a file of one alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.base import Kernel, KernelError, Scaled
from kernels.features.base import FeatureMap
from kernels.registry import from_description

from .. import precomputed
from ..errors import ExperimentError
from .toml import read_toml


def read_kernel(path: Path) -> Kernel:
    """The kernel that a file holds: a kernel table alone, or an experiment's ``[kernel]``.

    Raises:
        ExperimentError: naming the file and the key.
        DataError: the matrices of a precomputed kernel cannot be used.
    """
    table = read_toml(path)
    table = table["kernel"] if isinstance(table.get("kernel"), dict) else table
    absolute_kernel_paths(table, path.parent)
    try:
        check_leaves(table)
        kernel = from_description(table)
    except KernelError as error:
        raise ExperimentError(f"{path}: {error}") from None
    precomputed.sizes(kernel)
    return single(kernel, path)


def kernel_leaves(kernel: Mapping[str, Any], path: str = "kernel") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tables of the kernels that a kernel's table combines, or itself, each with its key path."""
    terms = kernel.get("terms")
    inner = [(f"{path}.terms[{i}]", term) for i, term in enumerate(terms if isinstance(terms, list) else ())]
    inner.append((f"{path}.term", kernel.get("term")))
    tables = [(place, term) for place, term in inner if isinstance(term, dict)]
    if not tables:
        yield path, kernel
    for place, term in tables:
        yield from kernel_leaves(term, place)


def check_leaves(kernel: Mapping[str, Any]) -> None:
    """Raise KernelError where a user's table of precomputed matrices combines them with kernels of samples,
    or claims what they hold, which descriptions of stores alone may."""
    leaves = list(kernel_leaves(kernel))
    if all(table.get("kind") != "precomputed" for _, table in leaves):
        return
    for path, table in leaves:
        if table.get("kind") != "precomputed":
            raise KernelError(
                f"{path}: a precomputed kernel cannot be combined with a kernel of samples; compute the"
                " matrix of that one as well (megagram gram) and give it as a precomputed term"
            )
        if "content" in table:
            raise KernelError(f"{path}.content is computed from the matrices: leave it out")


def single(kernel: Kernel, path: Path) -> Kernel:
    """Raise ExperimentError for a kernel of several outputs, which is how a run computes RF beside NTK, and for a
    feature map that has to learn first."""
    for term in _terms(kernel):
        if isinstance(term, FeatureMap) and term.learns:
            raise ExperimentError(
                f'{path}: kernel.kind = "{term.kind}" is a feature map that learns: give its table as [features], and'
                " the kernel that it stands for as [kernel]"
            )
    if len(kernel.outputs) > 1:
        raise ExperimentError(
            f"{path}: kernel: a description with two outputs is for internal use; ask for rf or ntk"
            " (tangent = true), of which an NTK's run stores both unless gram.joint = false"
        )
    return kernel


def _terms(kernel: Kernel) -> Iterator[Kernel]:
    """The kernels that ``kernel`` combines, or itself."""
    inner = getattr(kernel, "terms", ())
    if isinstance(kernel, Scaled):
        inner = (kernel.term,)
    if not inner:
        yield kernel
    for term in inner:
        yield from _terms(term)


def absolute_kernel_paths(kernel: dict[str, Any], folder: Path) -> None:
    """Make the paths of precomputed matrices, which are relative to a file's folder, absolute in place."""
    for _, table in kernel_leaves(kernel):
        if isinstance(table, dict) and table.get("kind") == "precomputed":
            for key in ("gram", "cross"):
                if isinstance(table.get(key), str):
                    table[key] = str(folder / Path(table[key]).expanduser())
