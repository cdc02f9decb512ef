"""From raw samples to a kernel's input: a fixed list of steps, described in full in store addresses.

Steps that work on each sample alone nest freely. A fitted step names the rows of the pool it is fitted
on, ``fit_on``, so that its result does not depend on a split. Everything is computed in float64 and
converted once, at the end.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from kernels.parameters import nearest

from .errors import DataError, ExperimentError

State = dict[str, np.ndarray]
"""What fitted steps learned, by step number and name; small enough to be saved as one .npz."""

BLOCK_ROWS = 1024
# Images whose patches lie in a core's cache together; larger batches wait for memory.
_PATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Step(ABC):
    """One step; its fields are its parameters.

    fitted: learns from the rows ``fit_on``. expensive: its result is worth storing once.
    """

    name: ClassVar[str]
    fitted: ClassVar[bool] = False
    expensive: ClassVar[bool] = False

    @abstractmethod
    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        """Transform float64 (n, d) vectors or (n, h, w, c) images; X may be overwritten."""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a sample after the step; raises ExperimentError where the step cannot take it."""
        return shape

    def fit(self, blocks: Iterator[np.ndarray]) -> State:
        """Learn from the float64 rows that the step is fitted on, block by block."""
        return {}


@dataclass(frozen=True)
class Scale(Step):
    """Divide by the nominal maximum of the data set, or by ``by``."""

    by: float

    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        _require_positive(self, "by")

    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        X /= self.by
        return X


@dataclass(frozen=True)
class Flatten(Step):
    """Images (h, w, c) to vectors (h*w*c,) in row, column, channel order; vectors stay."""

    name: ClassVar[str] = "flatten"

    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        return X.reshape(len(X), -1)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)


@dataclass(frozen=True)
class Normalise(Step):
    """Divide each sample by its Euclidean norm; a sample of zeros stays zero."""

    name: ClassVar[str] = "normalise"

    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = X.reshape(len(X), -1)
        # By the largest entry first: squares of very large or small values would leave float64's range.
        largest = np.abs(rows).max(axis=1, keepdims=True)
        rows /= np.where(largest > 0, largest, 1.0)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(norms > 0, norms, 1.0)
        return rows.reshape(X.shape)


@dataclass(frozen=True)
class WhitenPatches(Step):
    """Per-image whitening by patches of ``patch`` x ``patch`` pixels, eigenvalues to the -``power`` (R15).

    ``power`` 0.25 is the published one, 0.5 whitens fully. A constant channel becomes zeros.
    """

    patch: int = 3
    power: float = 0.25

    name: ClassVar[str] = "whiten-patches"
    expensive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_positive(self, "power")
        if not _is_integer(self.patch) or self.patch < 2:
            raise ExperimentError(f"{self.name}: patch must be a whole number from 2, not {self.patch!r}")

    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        return whiten_patches(X, self.patch, self.power)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3:
            raise ExperimentError(f"{self.name} takes images (h, w, c), not samples of shape {shape}")
        if min(shape[:2]) < self.patch:
            raise ExperimentError(
                f"{self.name}: patches of {self.patch} x {self.patch} pixels "
                f"do not fit into images of {shape[0]} x {shape[1]}"
            )
        return shape


@dataclass(frozen=True)
class _Fitted(Step):
    """fit_on: (start, stop), rows of the pool; None until a default is given."""

    fit_on: tuple[int, int] | None = None

    fitted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.fit_on is None:
            return
        ends = tuple(self.fit_on) if isinstance(self.fit_on, Sequence) else ()
        if len(ends) != 2 or not all(map(_is_integer, ends)) or not 0 <= ends[0] < ends[1]:
            raise ExperimentError(
                f"{self.name}: fit_on must be [start, stop] with 0 <= start < stop, not {self.fit_on!r}"
            )
        object.__setattr__(self, "fit_on", ends)


@dataclass(frozen=True)
class Standardise(_Fitted):
    """Mean 0 and variance 1, per feature of vectors, per channel of images (R16).

    The variance is the population's. Features that are constant over ``fit_on`` are centred, not scaled.
    """

    name: ClassVar[str] = "standardise"

    def fit(self, blocks: Iterator[np.ndarray]) -> State:
        count, mean, squares = 0, np.zeros(()), np.zeros(())
        low, high = np.asarray(np.inf), np.asarray(-np.inf)
        for block in blocks:
            rows = block.reshape(-1, block.shape[-1])
            # Two blocks' means and squared deviations are merged, which loses no digits to large means.
            block_mean = rows.mean(axis=0)
            shift, total = block_mean - mean, count + len(rows)
            between = shift**2 * (count * len(rows) / total)
            squares = squares + ((rows - block_mean) ** 2).sum(axis=0) + between
            mean, count = mean + shift * (len(rows) / total), total
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        # The rounded mean of equal numbers may differ from them, and their variance from zero.
        constant = low == high
        deviation = np.sqrt(squares / count)
        return {"mean": np.where(constant, low, mean), "deviation": np.where(constant, 1.0, deviation)}

    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        X -= learned["mean"]
        X /= learned["deviation"]
        return X


@dataclass(frozen=True)
class Zca(_Fitted):
    """Global ZCA whitening of flattened samples: U (e + ridge)^-1/2 U^T of their covariance (R16)."""

    ridge: float = 1e-4

    name: ClassVar[str] = "zca"
    expensive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "ridge")

    def fit(self, blocks: Iterator[np.ndarray]) -> State:
        count, total, products, origin = 0, np.zeros(()), np.zeros(()), np.zeros(())
        for block in blocks:
            rows = block.reshape(len(block), -1)
            if count == 0:  # near the mean, so that the products lose no digits to it
                origin = rows.mean(axis=0)
            rows = rows - origin
            count, total, products = count + len(rows), total + rows.sum(axis=0), products + rows.T @ rows
        shift = total / count
        eigenvalues, vectors = np.linalg.eigh(products / count - np.outer(shift, shift))
        weights = 1.0 / np.sqrt(np.maximum(eigenvalues, 0.0) + self.ridge)
        return {"mean": origin + shift, "whitening": (vectors * weights) @ vectors.T}

    def apply(self, X: np.ndarray, learned: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = X.reshape(len(X), -1) - learned["mean"]
        return (rows @ learned["whitening"]).reshape(X.shape)


_STEPS: dict[str, type[Step]] = {
    step.name: step for step in (Scale, Standardise, WhitenPatches, Zca, Flatten, Normalise)
}


@dataclass(frozen=True)
class Preprocessing:
    """A list of steps, applied in order."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def from_spec(cls, steps: Sequence[str | Mapping[str, Any]], *, scale: float) -> Preprocessing:
        """From the experiment file's list: each entry a step's name, or a table of ``name`` and parameters.

        scale: the data set's nominal maximum, what ``scale`` divides by unless it says ``by``.

        Raises:
            ExperimentError: an unknown step or parameter (the message names the nearest valid one), or a
                parameter's value that cannot be used.
        """
        return cls(tuple(_step(entry, scale) for entry in steps))

    def describe(self) -> list[dict[str, Any]]:
        """JSON with every parameter, a valid argument of ``from_spec``; it goes into store addresses."""
        return [
            {"name": step.name}
            | {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(step).items()}
            for step in self.steps
        ]

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` must be called, and its state passed to ``apply``."""
        return any(step.fitted for step in self.steps)

    @property
    def expensive(self) -> bool:
        """Whether the result is worth storing once rather than computing for every block."""
        return any(step.expensive for step in self.steps)

    def with_default_fit_range(self, start: int, stop: int) -> Preprocessing:
        """The same steps, those that are fitted and do not say on which rows on [start, stop)."""
        return Preprocessing(
            tuple(
                dataclasses.replace(step, fit_on=(start, stop))
                if isinstance(step, _Fitted) and step.fit_on is None
                else step
                for step in self.steps
            )
        )

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a sample, (d,) or (h, w, c), after all steps.

        Raises:
            ExperimentError: a step cannot take samples of the shape that reaches it.
        """
        for step in self.steps:
            shape = step.output_shape(shape)
        return shape

    def fit(self, read: Callable[[int, int], np.ndarray]) -> State:
        """Fit the fitted steps in order, each on its rows as the steps before it leave them.

        read: (start, stop) to the raw pool rows; called for blocks of at most 1024 rows, so that memory
        is bounded (zca: by its d x d covariance besides).

        Raises:
            ExperimentError: a fitted step has no ``fit_on``.
            DataError: the pool ends before ``fit_on`` does.
        """
        state: State = {}
        for index, step in enumerate(self.steps):
            if not isinstance(step, _Fitted):
                continue
            if step.fit_on is None:
                raise ExperimentError(f"{step.name} needs fit_on = [start, stop], the rows it is fitted on")
            before = Preprocessing(self.steps[:index])
            learned = step.fit(before._blocks(read, *step.fit_on, state))
            state |= {f"{_slot(index, step)}{key}": value for key, value in learned.items()}
        return state

    def apply(self, X_raw: np.ndarray, state: Mapping[str, np.ndarray], dtype: DTypeLike) -> np.ndarray:
        """Raw rows (n, ...) of any pool of the data set to a kernel's input.

        Computed in float64, block by block, and converted to ``dtype`` at the end; a sample's result does
        not depend on the others, up to the rounding of float64. ``X_raw`` is not changed.

        Raises:
            ExperimentError: a step cannot take samples of this shape.
            DataError: ``state`` is not from ``fit``, or was fitted on samples of another shape.
        """
        out = np.empty((len(X_raw), *self.output_shape(X_raw.shape[1:])), dtype)
        for start in range(0, len(X_raw), BLOCK_ROWS):
            # What is beyond the dtype becomes infinite, and is found and named by whoever takes it.
            with np.errstate(over="ignore"):
                out[start : start + BLOCK_ROWS] = self._transform(X_raw[start : start + BLOCK_ROWS], state)
        return out

    def _blocks(
        self, read: Callable[[int, int], np.ndarray], start: int, stop: int, state: State
    ) -> Iterator[np.ndarray]:
        for first in range(start, stop, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, stop)
            rows = read(first, last)
            if len(rows) != last - first:
                raise DataError(
                    f"fit_on = [{start}, {stop}] reaches past the end of the pool at {first + len(rows)}"
                )
            yield self._transform(rows, state)

    def _transform(self, raw: np.ndarray, state: Mapping[str, np.ndarray]) -> np.ndarray:
        X = np.array(raw, dtype=np.float64, order="C")  # a copy, which the steps may overwrite
        for index, step in enumerate(self.steps):
            slot = _slot(index, step)
            learned = {key.removeprefix(slot): value for key, value in state.items() if key.startswith(slot)}
            if step.fitted:
                _check_learned(step, learned, X)
            X = step.apply(X, learned)
        return X


def centre_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Subtract from each patch its mean per channel, and rebuild by averaging overlaps (R15, steps 1 and 2).

    images: (n, h, w, c) float64; returns the same shape. A constant channel becomes exact zeros.
    """
    planes = _planes(images)
    return np.ascontiguousarray(_centred(planes, patch).transpose(0, 2, 3, 1))


def whiten_patches(images: np.ndarray, patch: int = 3, power: float = 0.25) -> np.ndarray:
    """Whiten each image by the covariance of its own patches, exactly as R15.

    images: (n, h, w, c) float64, h and w at least ``patch``; returns (n, h, w, c) float64. Each image's
    result is the same in whatever batch it comes.
    """
    n, h, w, c = images.shape
    positions = (h - patch + 1) * (w - patch + 1)
    batch = max(1, _PATCH_BYTES // (8 * positions * patch * patch * c))
    out = np.empty((n, h, w, c))
    for start in range(0, n, batch):
        planes = _centred(_planes(images[start : start + batch]), patch)
        out[start : start + batch] = _whitened(planes, patch, power).transpose(0, 2, 3, 1)
    return out


def _planes(images: np.ndarray) -> np.ndarray:
    """(n, c, h, w): with channels first, rows of patches are read and added in long runs."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _centred(planes: np.ndarray, patch: int) -> np.ndarray:
    # Centring ignores a shift of a channel; taking its first pixel away makes constant channels exact zeros,
    # which rounding errors would not be, and whitening would blow those up.
    planes = planes - planes[:, :, :1, :1]
    h, w = planes.shape[2:]
    means = _sums(_sums(planes, patch, 2), patch, 3) / patch**2
    padded = np.pad(means, ((0, 0), (0, 0), (patch - 1, patch - 1), (patch - 1, patch - 1)))
    return planes - _sums(_sums(padded, patch, 2), patch, 3) / _coverage(h, w, patch)


def _sums(planes: np.ndarray, patch: int, axis: int) -> np.ndarray:
    """Sums of ``patch`` neighbours along an axis, which gets shorter by patch - 1."""
    side = planes.shape[axis] - patch + 1
    lead = (slice(None),) * axis
    total = planes[(*lead, slice(0, side))].copy()
    for offset in range(1, patch):
        total += planes[(*lead, slice(offset, offset + side))]
    return total


def _coverage(h: int, w: int, patch: int) -> np.ndarray:
    """(h, w), the number of patches that cover each pixel."""
    rows, columns = (np.convolve(np.ones(side - patch + 1), np.ones(patch)) for side in (h, w))
    return np.outer(rows, columns)


def _whitened(planes: np.ndarray, patch: int, power: float) -> np.ndarray:
    """Steps 3 to 5 of R15 on centred (n, c, h, w) planes."""
    n, c, h, w = planes.shape
    rows, columns = h - patch + 1, w - patch + 1
    offsets = [(slice(i, i + rows), slice(j, j + columns)) for i in range(patch) for j in range(patch)]
    # Components go by offset, then channel; each component's values at all positions lie in one run.
    patches = np.stack([planes[:, :, i, j] for i, j in offsets], axis=1).reshape(n, -1, rows * columns)
    eigenvalues, vectors = np.linalg.eigh(patches @ patches.transpose(0, 2, 1))
    roots = np.sqrt(np.maximum(eigenvalues, 0.0))
    kept = roots > 1e-8 * roots.max(axis=1, keepdims=True)
    weights = np.where(kept, np.where(kept, eigenvalues, 1.0) ** -power, 0.0)
    whitening = (vectors * weights[:, np.newaxis, :]) @ vectors.transpose(0, 2, 1)
    components = (whitening @ patches).reshape(n, len(offsets), c, rows, columns)
    out = np.zeros_like(planes)
    for number, (i, j) in enumerate(offsets):
        out[:, :, i, j] += components[:, number]
    out /= _coverage(h, w, patch)
    return out


def _step(entry: str | Mapping[str, Any], scale: float) -> Step:
    table = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise ExperimentError(f"a preprocessing step is a name or a table with a name, not {entry!r}")
    name = table["name"]
    if name not in _STEPS:
        raise ExperimentError(f"unknown preprocessing step {name!r}; {nearest(name, _STEPS)}")
    kind = _STEPS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    parameters = {key: value for key, value in table.items() if key != "name"}
    for key in parameters:
        if key not in known:
            hint = nearest(key, known) if known else "it takes none"
            raise ExperimentError(f"{name} has no parameter {key!r}; {hint}")
    if kind is Scale:
        parameters.setdefault("by", scale)
    return kind(**parameters)


def _slot(index: int, step: Step) -> str:
    return f"{index}.{step.name}."


def _check_learned(step: Step, learned: Mapping[str, np.ndarray], X: np.ndarray) -> None:
    if "mean" not in learned:
        raise DataError(f"{step.name} is not fitted: the state passed to apply has nothing of it")
    features = X.shape[-1] if isinstance(step, Standardise) else math.prod(X.shape[1:])
    if learned["mean"].shape != (features,):
        raise DataError(
            f"{step.name} was fitted on {learned['mean'].size} features, these samples have {features}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_positive(step: Step, field: str) -> None:
    """Check that a parameter is a finite number above 0; kept as float, so that 255 is the same as 255.0."""
    value = getattr(step, field)
    if not (_is_integer(value) or isinstance(value, float)) or not (0 < value < math.inf):
        raise ExperimentError(f"{step.name}: {field} must be a number above 0, not {value!r}")
    object.__setattr__(step, field, float(value))
