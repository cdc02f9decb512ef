"""The experiment file: a frozen, validated description of one run, or of a table of runs.

An experiment may extend another one (``extends``), and a study lists ``variants`` that are merged into
a common base. Everything is checked here, before any work starts; unknown keys are errors that name
the nearest valid one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from kernels.base import Kernel, KernelError
from kernels.features.base import FeatureMap
from kernels.registry import feature_map, from_description

from ..errors import ExperimentError
from .explanations import explain
from .files import find, resolved, shipped
from .kernel_tables import check_leaves, kernel_leaves, read_kernel, single
from .schema import Data, Expected, Features, Gram, RandomRows, Solve, Table
from .toml import merged, override

__all__ = [
    "Data",
    "Expected",
    "Experiment",
    "Features",
    "Gram",
    "RandomRows",
    "Solve",
    "Study",
    "find",
    "kernel_leaves",
    "load",
    "merged",
    "read_kernel",
    "shipped",
]


FEATURE_METHODS = ("auto", "cholesky", "eigen", "conjugate-gradient", "falkon")
"""Of solving with explicit features."""


class Experiment(Table):
    """One run, validated: data, kernel, its matrix or the features that stand for it, solve."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    description: str = ""
    label: str = ""
    task: Literal["classification", "regression"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    data: Data
    kernel: dict[str, Any]
    features: Features | None = None
    gram: Gram = Gram()
    solve: Solve
    expected: Expected | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.solve.select == "validation" and self.data.validation is None:
            raise ValueError(
                'solve.select = "validation" needs data.validation (a count, or [start, stop]); or choose "loo"'
                ' or "gcv"'
            )
        if self.solve.select == "oracle" and self.data.test is None:
            raise ValueError('solve.select = "oracle" needs data.test')
        if self.solve.refit and self.solve.select == "oracle":
            raise ValueError('solve.refit and solve.select = "oracle" exclude each other')
        if self.solve.refit and self.data.validation is None:
            raise ValueError("solve.refit = true needs data.validation")
        if self.features is not None:
            self._check_features()
        elif self.solve.method == "falkon":
            raise ValueError(
                'solve.method = "falkon" works on [features], and there are none: give them, or use "nystrom" with'
                " solve.centres, which is Falkon on the kernel's own values"
            )
        elif self.gram.tiles == "recomputed":
            self._check_recomputed()
        if self.uses_precomputed:
            self._check_precomputed()
        elif self.data.source == "arrays" and self.data.X is None:
            raise ValueError('data.X is missing: source = "arrays" needs the paths X and y')
        elif (self.data.X_test is None) != (self.data.y_test is None):
            raise ValueError("data.X_test and data.y_test go together")
        if self.data.source == "arrays" and self.data.y is None:
            needed = "path y" if self.uses_precomputed else "paths X and y"
            raise ValueError(f'data.y is missing: source = "arrays" needs the {needed}')
        return self

    def _check_features(self) -> None:
        """Raise ValueError where an option is one of a matrix, which features do without."""
        if self.uses_precomputed:
            raise ValueError(
                "features: a precomputed kernel has no samples to compute features of; leave out [features], or give"
                " the samples in [data] and a kernel of them in [kernel]"
            )
        if self.gram.tiles != "auto":
            raise ValueError(
                "gram.tiles has no meaning with [features], where there is no matrix: leave it out, and say with"
                " features.blocks whether features are stored"
            )
        if not self.gram.joint:
            raise ValueError(
                "gram.joint has no meaning with [features], where there is no matrix: leave it out"
            )
        method = self.solve.method
        if method not in FEATURE_METHODS:
            raise ValueError(
                f'solve.method = "{method}" works on a matrix, and [features] do without: choose from'
                f" {', '.join(FEATURE_METHODS)}"
            )
        if method == "cholesky" and self.solve.select == "loo":
            raise ValueError(
                'solve.method = "cholesky" has no leave-one-out with [features], so select = "loo" cannot be: use'
                ' select = "gcv" (generalised cross-validation), or method eigen'
            )
        if self.solve.dtype != "float64":
            raise ValueError(
                f'solve.dtype = "{self.solve.dtype}" has no meaning with [features], whose systems are solved in'
                " float64 alone: leave it out"
            )

    def _check_recomputed(self) -> None:
        """Raise ValueError where tiles that nobody keeps are of no use."""
        if self.solve.method not in ("auto", "conjugate-gradient", "nystrom"):
            raise ValueError(
                f'gram.tiles = "recomputed" goes with solve.method conjugate-gradient or nystrom, which take products'
                f' alone, not with "{self.solve.method}": set gram.tiles = "stored"'
            )
        if self.solve.select == "loo":
            raise ValueError(
                'gram.tiles = "recomputed" excludes solve.select = "loo", which needs a factor: use "gcv"'
            )
        if self.solve.dtype != "float64":
            raise ValueError(
                f'gram.tiles = "recomputed" excludes solve.dtype = "{self.solve.dtype}": there is no factor to'
                " have it; leave it out"
            )
        if self.uses_precomputed:
            raise ValueError(
                'gram.tiles = "recomputed" has no meaning for a precomputed kernel: set gram.tiles = "stored"'
            )

    def _check_precomputed(self) -> None:
        """Raise ValueError where samples cannot be the indices of the kernel's matrices."""
        if self.data.source != "arrays":
            raise ValueError(
                f'data.source = "{self.data.source}" has no meaning for a precomputed kernel, whose samples are'
                ' the rows of its matrices: set source = "arrays" and give y'
            )
        for key in ("X", "X_test"):
            if getattr(self.data, key) is not None:
                raise ValueError(f"data.{key} has no meaning for a precomputed kernel: leave it out")
        for key in ("preprocess", "turn_test", "shifts"):
            if getattr(self.data, key):
                raise ValueError(f"data.{key} has no meaning for a precomputed kernel: leave it out")
        check_leaves(self.kernel)
        for path, table in kernel_leaves(self.kernel):
            if self.data.y_test is not None and table.get("cross") is None:
                raise ValueError(f"{path}.cross is missing: it goes together with data.y_test")
            if self.data.y_test is None and table.get("cross") is not None:
                raise ValueError(f"data.y_test is missing: it goes together with {path}.cross")

    @property
    def uses_precomputed(self) -> bool:
        """Whether the kernel, or a term of it, is read from files: then samples are indices."""
        return any(table.get("kind") == "precomputed" for _, table in kernel_leaves(self.kernel))

    @functools.cached_property
    def kernel_object(self) -> Kernel:
        """The exact kernel, also where features stand for it."""
        return from_description(self.kernel)

    @functools.cached_property
    def feature_map(self) -> FeatureMap | None:
        """The map whose features stand for the kernel, before it has learned; None where the kernel is taken itself.

        Raises:
            KernelError: an unknown kind or key, an invalid value, or a map that cannot stand for the kernel.
        """
        if self.features is None:
            return None
        return feature_map(self.features.parameters, self.kernel_object, self.seed, beside=["blocks"])

    def table(self) -> dict[str, Any]:
        """The experiment as plain JSON values."""
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Study:
    """What a file describes: one experiment, or a table of variants that share a base."""

    name: str
    description: str
    experiments: tuple[Experiment, ...]
    is_table: bool


def load(where: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read an experiment file, or a shipped experiment by its name.

    overrides: texts ``key.path=value``; the value is read as TOML, else as a string.

    Raises:
        ExperimentError: the file, a key or a value is invalid; the message names it.
    """
    path = find(where)
    table = resolved(path, ())
    for text in overrides:
        override(table, text)
    variants = table.pop("variants", None)
    if variants is None:
        return Study(str(table.get("name", "")), _text(table), (_experiment(table, path),), False)
    if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) for v in variants):
        raise ExperimentError(f"{path}: variants must be tables, each written as [[variants]]")
    experiments = []
    for number, variant in enumerate(variants):
        label = variant.get("label")
        if not isinstance(label, str) or not label:
            raise ExperimentError(f"{path}: variants[{number}] needs a label")
        variant = {"name": f"{table.get('name', '')}-{_slug(label)}", **variant}
        for text in overrides:
            override(variant, text, only_present=True)
        experiments.append(_experiment(merged(table, variant), path))
    names = [e.name for e in experiments]
    if len(set(names)) != len(names):
        raise ExperimentError(f"{path}: two variants have the same label")
    return Study(str(table.get("name", "")), _text(table), tuple(experiments), True)


def _text(table: Mapping[str, Any]) -> str:
    return str(table.get("description", ""))


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "variant"


def _experiment(table: Mapping[str, Any], path: Path) -> Experiment:
    try:
        experiment = Experiment.model_validate(table)
        single(experiment.kernel_object, path)
        experiment.feature_map  # noqa: B018  (raises where its table is wrong)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {explain(error, Experiment)}") from None
    except KernelError as error:
        text = str(error)
        raise ExperimentError(
            f"{path}: {text if text.startswith(('kernel', 'features')) else f'kernel: {text}'}"
        ) from None
    return experiment
