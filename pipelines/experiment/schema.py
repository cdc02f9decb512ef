"""The tables of an experiment file, each frozen and checked by itself; unknown keys are errors."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import ExperimentError
from ..preprocessing import Preprocessing

ARRAY_KEYS = ("X", "y", "X_test", "y_test")

# Strict: true is no number, and "5" no count.
Range = tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[int, Field(ge=1, strict=True)]]
Count = Annotated[int, Field(gt=0, strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Permutation(Table):
    """The order ``numpy.random.RandomState(permutation).permutation(n)`` of the pool (R10)."""

    permutation: Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class RandomRows(Table):
    """So many rows of the training range, drawn at random under the experiment's seed."""

    random: Count


class Data(Table):
    """Which samples, in which order, how they are split and preprocessed.

    shifts: so many copies of each training image, moved by whole pixels, are trained on as well; ``train``,
    ``validation`` and ``test`` count the images that are not moved.
    """

    source: Literal["digits", "mnist", "fashion-mnist", "cifar10", "arrays"]
    folder: str | None = None
    X: str | None = None
    y: str | None = None
    X_test: str | None = None
    y_test: str | None = None
    order: Literal["canonical"] | Permutation = "canonical"
    train: Count | Range
    validation: Count | Range | RandomRows | None = None
    test: Count | Range | None = None
    shifts: Count | None = None
    turn_test: Literal[90, 180, 270] | None = None
    preprocess: tuple[str | dict[str, Any], ...] = ()

    @field_validator("train", "validation", "test")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] >= value[1]:
            raise ValueError(f"[start, stop] needs start < stop, got {list(value)}")
        return value

    @field_validator("preprocess")
    @classmethod
    def _steps(cls, steps: Any) -> Any:
        try:
            Preprocessing.from_spec(steps, scale=1.0)
        except ExperimentError as error:
            raise ValueError(str(error)) from None
        return steps

    @model_validator(mode="after")
    def _paths(self) -> Data:
        given = [key for key in ARRAY_KEYS if getattr(self, key) is not None]
        if self.source != "arrays" and given:
            raise ValueError(f'{given[0]} goes with source = "arrays" only, not with "{self.source}"')
        if self.source == "arrays" and self.folder is not None:
            raise ValueError('folder goes with the named data sets; source = "arrays" takes X and y')
        if self.turn_test is not None and self.test is None:
            raise ValueError("turn_test turns the test samples: give test as well")
        return self

    @property
    def permutation(self) -> int | None:
        return self.order.permutation if isinstance(self.order, Permutation) else None


class Gram(Table):
    """The matrix.

    dtype: of tiles, or of features. joint: an NTK's matrix brings the RF one of the same pass with it. tiles: whether
    they are stored, or computed whenever a product needs them.
    """

    dtype: Literal["float32", "float64"] = "float32"
    joint: Flag = True
    tiles: Literal["auto", "stored", "recomputed"] = "auto"


class Features(Table):
    """Explicit features that stand for the kernel. ``kind`` and the map's own parameters are what the kind knows (see
    ``kernels.registry.feature_map``). ``blocks``: whether they are stored, or computed whenever they are read."""

    model_config = ConfigDict(frozen=True, extra="allow")

    blocks: Literal["auto", "stored", "streamed"] = "auto"

    @property
    def parameters(self) -> dict[str, Any]:
        """The map's table: its kind and parameters."""
        return dict(self.model_extra or {})


class Solve(Table):
    """The solver and how the ridge is chosen.

    method: "cholesky" and "eigen" hold the matrix in memory, "tiled-cholesky" works out of core, "conjugate-gradient"
    and "nystrom" take products alone; on explicit features "cholesky" and "eigen" take their covariance, and "falkon"
    is conjugate gradients whose preconditioner is that of a few samples, or of a Nystrom map's landmarks. dtype: of a
    factor; "mixed" is float32 refined to a float64 residual, and float64 for the ridges where that fails. tolerance,
    max_iterations: of the iterative methods, which have defaults.
    centres: of nystrom, that many training samples drawn under the experiment's seed.
    """

    method: Literal[
        "auto", "cholesky", "tiled-cholesky", "eigen", "conjugate-gradient", "nystrom", "falkon"
    ] = "auto"
    dtype: Literal["float32", "float64", "mixed"] = "float64"
    tolerance: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    max_iterations: Count | None = None
    centres: Count | None = None
    ridges: tuple[Number, ...]
    select: Literal["validation", "loo", "gcv", "oracle"] = "validation"
    refit: Flag = False
    absolute: Flag = False
    jitter: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = 0.0

    @field_validator("ridges")
    @classmethod
    def _positive(cls, ridges: tuple[float, ...]) -> tuple[float, ...]:
        if not ridges:
            raise ValueError("give at least one ridge, such as [1e-3]")
        for ridge in ridges:
            if not (math.isfinite(ridge) and ridge > 0):
                raise ValueError(f"every ridge must be a positive number, got {ridge}")
        if len(set(ridges)) != len(ridges):
            raise ValueError("a ridge is listed twice")
        return tuple(sorted(ridges, reverse=True))

    @model_validator(mode="after")
    def _fits_method(self) -> Solve:
        """Each option has a meaning for the method."""
        iterative = self.method in ("conjugate-gradient", "nystrom", "falkon")
        if self.dtype != "float64" and (iterative or self.method == "eigen"):
            raise ValueError(
                f'dtype = "{self.dtype}" has no meaning for method = "{self.method}", which works in float64 alone:'
                " leave it out, or use (without [features]) cholesky or tiled-cholesky"
            )
        for key in ("tolerance", "max_iterations"):
            if getattr(self, key) is not None and not (iterative or self.method == "auto"):
                raise ValueError(
                    f'{key} has no meaning for method = "{self.method}", which is direct: leave it out, or use'
                    " conjugate-gradient, nystrom or (with [features]) falkon"
                )
        if self.centres is not None and self.method != "nystrom":
            raise ValueError(f'centres goes with method = "nystrom" alone, not with "{self.method}"')
        if self.centres is None and self.method == "nystrom":
            raise ValueError('method = "nystrom" needs centres, a number of training samples such as 1000')
        if self.select == "loo" and iterative:
            raise ValueError(
                f'method = "{self.method}" has no leave-one-out, so select = "loo" cannot be: use select = "gcv"'
                " (generalised cross-validation), or method cholesky, eigen or tiled-cholesky, with [features] eigen"
            )
        return self


class Expected(Table):
    """A published value to compare with: one accuracy, or test accuracies by ridge."""

    source: str
    value: Number | None = None
    path: dict[str, Number] | None = None
    tolerance: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
    train: Count | None = None
    metric: str = "accuracy"
    note: str = ""

    @model_validator(mode="after")
    def _one(self) -> Expected:
        if (self.value is None) == (self.path is None):
            raise ValueError("give either value or path (a table from ridge to value)")
        for ridge in self.path or ():
            try:
                float(ridge)
            except ValueError:
                raise ValueError(f'"{ridge}" is not a ridge') from None
        return self
