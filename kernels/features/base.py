"""What every explicit feature map shares: Phi with <Phi(x), Phi(y)> close to k(x, y), or equal to it (SPEC F).

A feature map is a kernel itself, the inner product of its features, and knows the kernel that it stands for. Some
maps follow from their parameters alone (random weights from a seed, monomials); others learn arrays, such as
anchors, from samples, once. What was learned is named by a digest in the description and travels as arrays.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from ..arrays import Array, inner_products, namespace
from ..base import Cost, Kernel, KernelError, Prepared, require_float, row_ids

FEATURES = "features"
"""Name of the prepared array (n, width)."""

Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and of what."""


def unwatched(done: int, total: int, message: str) -> None:
    """The progress of learning that nobody watches."""


class Samples(Protocol):
    """Preprocessed samples to learn from, in a stated order, read as they are asked for."""

    @property
    def count(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (d,) or (h, w, c)."""
        ...

    @property
    def rows(self) -> np.ndarray | None:
        """(count,) int64 row ids in a pool; None where they are not known."""
        ...

    @property
    def pool(self) -> str:
        """What the row ids refer to."""
        ...

    def take(self, positions: np.ndarray) -> Array:
        """(k, ...) samples at k increasing positions, float32 or float64."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Samples (n, ...) that are in memory; rows, pool: as of ``Samples``."""

    X: Array
    rows: np.ndarray | None = None
    pool: str = ""

    @property
    def count(self) -> int:
        return len(self.X)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.X.shape[1:])

    def take(self, positions: np.ndarray) -> Array:
        return self.X[positions]


@dataclass(frozen=True)
class FeatureMap(Kernel):
    """An explicit map Phi as a kernel, <Phi(x), Phi(y)>.

    kernel: what it stands for. learned: digest of what was learned from samples; empty for maps that learn nothing,
    and before. arrays: what was learned, by name; not part of the map's identity, which ``learned`` is.
    """

    kernel: Kernel
    learned: str = field(default="", kw_only=True)
    arrays: Mapping[str, np.ndarray] | None = field(default=None, kw_only=True, compare=False, repr=False)

    tile_sides: ClassVar[Mapping[str, int]] = {"float32": 1024, "float64": 512}
    learns: ClassVar[bool] = False
    """Whether ``learn`` has something to do."""

    @property
    def inputs(self) -> Literal["vectors", "images"]:  # type: ignore[override]
        return self.kernel.inputs

    @abstractmethod
    def width(self, shape: tuple[int, ...]) -> int:
        """Number of features of a sample of ``shape`` ((d,) or (h, w, c))."""

    @abstractmethod
    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        """(n, width) features of (n, ...) samples, in their dtype and on their device.

        rows: (n,) int64 row ids in a ``pool``, by which samples that the map learned from are known again (K13);
        without a pool's name none are.

        Raises:
            KernelError: X has a wrong shape or dtype, or the map has not learned yet.
        """

    @abstractmethod
    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """Cost of ``features`` for n samples of ``shape``."""

    def learn(self, samples: Samples, progress: Progress = unwatched) -> Self:
        """The map with what it learns from samples, the same for the same samples and seed; itself where there is
        nothing to learn. It runs in this process, in memory that does not grow with the number of samples.

        Raises:
            KernelError: the samples are too few, or nothing can be learned from them; the message says what to do.
        """
        return self

    def learning_cost(self, count: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """Cost of ``learn`` from ``count`` samples of ``shape``; nothing for maps that learn nothing."""
        return Cost(0.0, 0.0, 0)

    def check_count(self, count: int, shape: tuple[int, ...]) -> None:
        """Raise KernelError where so few samples of ``shape`` cannot be learned from."""

    def knowing(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """The map with learned arrays, named by their digest.

        Raises:
            KernelError: the map's description names other arrays than these.
        """
        found = _digest(arrays)
        if self.learned and self.learned != found:
            raise KernelError(
                f"the learned arrays of a {self.kind} map are not those that its description names"
                f" ({found[:12]} instead of {self.learned[:12]})"
            )
        return replace(self, learned=found, arrays=dict(arrays))

    def check(self, shape: tuple[int, ...]) -> None:
        self.kernel.check(shape)

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        require_float(X)
        self.check(tuple(X.shape[1:]))
        rows = row_ids(X, rows)
        return Prepared({FEATURES: self.features(X, rows, pool)}, rows, pool)

    def pair(self, a: Prepared, b: Prepared) -> Array:
        phi, psi = a.arrays[FEATURES], b.arrays[FEATURES]
        namespace(phi, psi)  # both on one side
        if phi.shape[1:] != psi.shape[1:] or phi.dtype != psi.dtype:
            raise KernelError(
                f"prepared blocks do not match: {phi.shape[1]} {phi.dtype} features against {psi.shape[1]} "
                f"{psi.dtype} ones"
            )
        return inner_products(phi, psi)

    def diag(self, a: Prepared) -> Array:
        phi = a.arrays[FEATURES]
        return namespace(phi).einsum("ij,ij->i", phi, phi)

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        return Cost(2.0 * n * m * self.width(shape), 0.0, n * m * itemsize)

    def describe(self) -> dict[str, Any]:
        table: dict[str, Any] = {"kind": self.kind, "kernel": self.kernel.describe()}
        for one in fields(self):
            if one.name not in ("kernel", "learned", "arrays"):
                value = getattr(self, one.name)
                table[one.name] = list(value) if isinstance(value, tuple) else value
        return {**table, "learned": self.learned} if self.learned else table

    def revisions(self) -> Any:
        return [self.revision, self.kernel.revisions()]

    def array(self, name: str, like: Array) -> Array:
        """A learned array in the dtype and on the device of ``like``, kept for the next call.

        Raises:
            KernelError: the map has not learned yet.
        """
        if self.arrays is None:
            raise KernelError(
                f"a {self.kind} map has nothing learned: call learn, or knowing with its arrays"
            )
        xp = namespace(like)
        key = (name, xp.__name__, np.dtype(like.dtype).name)
        if key not in self._placed:
            self._placed[key] = xp.asarray(self.arrays[name], dtype=like.dtype)
        return self._placed[key]

    @cached_property
    def _placed(self) -> dict[tuple[str, str, str], Array]:
        return {}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, dtypes, shapes and entries."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {values.dtype.str} {values.shape} ".encode())
        sha.update(values.data)
    return sha.hexdigest()
