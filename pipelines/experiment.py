"""The experiment file: a frozen, validated description of one run, or of a table of runs.

An experiment may extend another one (``extends``), and a study lists ``variants`` that are merged into
a common base. Everything is checked here, before any work starts; unknown keys are errors that name
the nearest valid one.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kernels.base import Kernel, KernelError
from kernels.registry import from_description

from . import precomputed
from .errors import ExperimentError
from .preprocessing import Preprocessing

SOURCES = ("digits", "mnist", "fashion-mnist", "cifar10", "arrays")
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
    """The matrix. ``joint``: an NTK's matrix brings the RF one of the same pass with it. ``tiles``: whether tiles are
    stored, or computed whenever a product needs them."""

    dtype: Literal["float32", "float64"] = "float32"
    joint: Flag = True
    tiles: Literal["auto", "stored", "recomputed"] = "auto"


class Solve(Table):
    """The solver and how the ridge is chosen.

    method: "cholesky" and "eigen" hold the matrix in memory, "tiled-cholesky" works out of core, "conjugate-gradient"
    and "nystrom" take products alone. dtype: of a factor; "mixed" is float32 refined to a float64 residual, and
    float64 for the ridges where that fails. tolerance, max_iterations: of the iterative methods, which have defaults.
    centres: of nystrom, that many training samples drawn under the experiment's seed.
    """

    method: Literal["auto", "cholesky", "tiled-cholesky", "eigen", "conjugate-gradient", "nystrom"] = "auto"
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
        iterative = self.method in ("conjugate-gradient", "nystrom")
        if self.dtype != "float64" and (iterative or self.method == "eigen"):
            raise ValueError(
                f'dtype = "{self.dtype}" has no meaning for method = "{self.method}", which works in float64 alone:'
                " leave it out, or use cholesky or tiled-cholesky"
            )
        for key in ("tolerance", "max_iterations"):
            if getattr(self, key) is not None and not (iterative or self.method == "auto"):
                raise ValueError(
                    f'{key} has no meaning for method = "{self.method}", which is direct: leave it out, or use'
                    " conjugate-gradient or nystrom"
                )
        if self.centres is not None and self.method != "nystrom":
            raise ValueError(f'centres goes with method = "nystrom" alone, not with "{self.method}"')
        if self.centres is None and self.method == "nystrom":
            raise ValueError('method = "nystrom" needs centres, a number of training samples such as 1000')
        if self.select == "loo" and (iterative or self.method == "tiled-cholesky"):
            raise ValueError(
                f'method = "{self.method}" has no leave-one-out, so select = "loo" cannot be: use select = "gcv"'
                " (generalised cross-validation), or method cholesky or eigen"
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


class Experiment(Table):
    """One run, validated: data, kernel, matrix, solve."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    description: str = ""
    label: str = ""
    task: Literal["classification", "regression"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    data: Data
    kernel: dict[str, Any]
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
        if self.gram.tiles == "recomputed":
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
        _check_leaves(self.kernel)
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
        return from_description(self.kernel)

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
    table = _resolved(path, ())
    for text in overrides:
        _override(table, text)
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
            _override(variant, text, only_present=True)
        experiments.append(_experiment(merged(table, variant), path))
    names = [e.name for e in experiments]
    if len(set(names)) != len(names):
        raise ExperimentError(f"{path}: two variants have the same label")
    return Study(str(table.get("name", "")), _text(table), tuple(experiments), True)


def shipped() -> dict[str, Path]:
    """Name and path of every shipped experiment."""
    # Found beside the package that ships them, without importing it: imports run the other way.
    folder = Path(__file__).resolve().parent.parent / "flows" / "experiments"
    return {path.stem: path for path in sorted(folder.glob("*.toml")) if not path.stem.startswith("_")}


def find(where: str | Path) -> Path:
    """The file of an experiment given by path or shipped name.

    Raises:
        ExperimentError: neither exists; the nearest shipped name is given.
    """
    path = Path(where)
    if _is_file(path):
        return path
    known = shipped()
    if str(where) in known:
        return known[str(where)]
    base = Path(__file__).resolve().parent.parent / "flows" / "experiments" / f"{where}.toml"
    if str(where).startswith("_") and base.is_file():
        return base
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise ExperimentError(f"{_short(where)}: no such file")
    raise ExperimentError(
        f'no shipped experiment is called "{_short(where)}"{nearest(str(where), known)}; see: megagram list'
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ExperimentError: unreadable or not TOML, with the file and the line.
    """
    try:
        # Editors of some systems write a mark in front of UTF-8, which TOML does not know.
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not valid TOML: {error}") from None


def read_kernel(path: Path) -> Kernel:
    """The kernel that a file holds: a kernel table alone, or an experiment's ``[kernel]``.

    Raises:
        ExperimentError: naming the file and the key.
        DataError: the matrices of a precomputed kernel cannot be used.
    """
    table = read_toml(path)
    table = table["kernel"] if isinstance(table.get("kernel"), dict) else table
    _absolute_kernel_paths(table, path.parent)
    try:
        _check_leaves(table)
        kernel = from_description(table)
    except KernelError as error:
        raise ExperimentError(f"{path}: {error}") from None
    precomputed.sizes(kernel)
    return _single(kernel, path)


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


def _check_leaves(kernel: Mapping[str, Any]) -> None:
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


def _is_file(path: Path) -> bool:
    """As Path.is_file, and False for what the system takes for no path at all."""
    try:
        return path.is_file()
    except OSError:
        return False


def _short(where: str | Path) -> str:
    text = str(where)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _single(kernel: Kernel, path: Path) -> Kernel:
    """Raise ExperimentError for a kernel of several outputs, which is how a run computes RF beside NTK."""
    if len(kernel.outputs) > 1:
        raise ExperimentError(
            f"{path}: kernel: a description with two outputs is for internal use; ask for rf or ntk"
            " (tangent = true), of which an NTK's run stores both unless gram.joint = false"
        )
    return kernel


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` merged into it table by table; arrays and values are replaced.

    A ``[kernel]`` of another ``kind`` replaces the base's whole.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        other_kind = key == "kernel" and isinstance(value, dict) and "kind" in value
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and not (other_kind and value["kind"] != old.get("kind"))
        ):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean "x"?`` for the nearest of ``known``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def _text(table: Mapping[str, Any]) -> str:
    return str(table.get("description", ""))


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "variant"


def _resolved(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The file's table with ``extends`` followed and relative paths made absolute."""
    path = path.resolve()
    if path in chain:
        raise ExperimentError(f"{path}: extends itself, by way of {', '.join(str(p) for p in chain)}")
    table = read_toml(path)
    _absolute_paths(table, path.parent)
    variants = table.get("variants")
    for variant in variants if isinstance(variants, list) else ():
        if isinstance(variant, dict):
            _absolute_paths(variant, path.parent)
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ExperimentError(f"{path}: extends must be a path or the name of a shipped experiment")
    beside = path.parent / base
    return merged(_resolved(beside if _is_file(beside) else find(base), (*chain, path)), table)


def _absolute_paths(table: dict[str, Any], folder: Path) -> None:
    data = table.get("data")
    if isinstance(data, dict):
        for key in ("folder", *ARRAY_KEYS):
            if isinstance(data.get(key), str):
                data[key] = str(folder / Path(data[key]).expanduser())
    if isinstance(table.get("kernel"), dict):
        _absolute_kernel_paths(table["kernel"], folder)


def _absolute_kernel_paths(kernel: dict[str, Any], folder: Path) -> None:
    for _, table in kernel_leaves(kernel):
        if isinstance(table, dict) and table.get("kind") == "precomputed":
            for key in ("gram", "cross"):
                if isinstance(table.get(key), str):
                    table[key] = str(folder / Path(table[key]).expanduser())


def _override(table: dict[str, Any], text: str, *, only_present: bool = False) -> None:
    """Apply ``key.path=value``; a variant takes it only where it sets that key itself."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ExperimentError(f'--set takes key.path=value, for example data.train=500; got "{text}"')
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    here: Any = table
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not (part.isdigit() and int(part) < len(here)):
                raise ExperimentError(f'--set {key}: "{part}" is not an index into {len(here)} entries')
            step: Any = int(part)
        elif isinstance(here, dict):
            step = part
            if part not in here:
                if only_present:
                    return
                if not last:
                    here[part] = {}
        else:
            raise ExperimentError(f"--set {key}: {'.'.join(parts[:depth])} is not a table")
        if last:
            here[step] = parsed
        else:
            here = here[step]


def _experiment(table: Mapping[str, Any], path: Path) -> Experiment:
    try:
        experiment = Experiment.model_validate(table)
        _single(experiment.kernel_object, path)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {explain(error, Experiment)}") from None
    except KernelError as error:
        text = str(error)
        raise ExperimentError(f"{path}: {text if text.startswith('kernel') else f'kernel: {text}'}") from None
    return experiment


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem of a table: its key path, what is wrong, the nearest valid key."""
    problems = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    first = problems[0]
    key, known = _place(first["loc"], model)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message.replace("Input should be", "must be").replace("valid tuple", "list")
    message = re.sub(r"valid dictionary( or instance of .*)?", "table", message)
    field = ".".join(re.split(r"[.\[]", key)[:2])
    if field in _SHAPES:
        key, message = field, _SHAPES[field]
    shown = f"{key}: {message}, got {json.dumps(first['input'], default=str)[:80]}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        shown += nearest(first["input"], re.findall(r"'([^']*)'", first["msg"]))
    return shown


# Where several shapes are allowed, what is wrong with each of them would only confuse.
_SHAPES = {
    "name": "must be 1 to 100 letters, digits, dots, underscores or hyphens, the first a letter or a digit",
    "data.order": 'must be "canonical" or { permutation = SEED }',
    "data.train": "must be a positive count or [start, stop]",
    "data.validation": "must be a positive count, [start, stop] or { random = COUNT }",
    "data.test": "must be a positive count or [start, stop]",
    "data.preprocess": "must be a list of step names, or tables with a name",
}


def _place(location: Sequence[int | str], model: type[BaseModel]) -> tuple[str, list[str]]:
    """The key path that a location names, and the keys that are valid beside its last one.

    Unions add the names of their members to a location; keys are what the file knows.
    """
    key = ""
    tables: dict[str, type[BaseModel]] = {"": model}
    known = list(model.model_fields)
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(part, int):
            key += f"[{part}]"
        elif part in tables:
            known = list(tables[part].model_fields)
        elif part in known or last:
            key += ("." if key else "") + part
            fields = [t.model_fields[part] for t in tables.values() if part in t.model_fields]
            tables = _tables(fields[0].annotation) if fields else {}
            if not last and len(tables) == 1:
                known = list(next(iter(tables.values())).model_fields)
    return key, known


def _tables(annotation: Any) -> dict[str, type[BaseModel]]:
    """The tables that an annotation allows, by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation.__name__: annotation}
    return {name: t for inner in get_args(annotation) for name, t in _tables(inner).items()}
