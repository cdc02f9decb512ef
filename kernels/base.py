"""Kernels are immutable values: parameters in, blocks of a Gram matrix out.

A kernel splits its work in two. ``prepare`` does what is needed once per sample (normalised rows,
norms of patches per layer); ``pair`` turns two prepared blocks into a block of the matrix. Kernels
compose by ``+``, ``*`` and scaling (SPEC K14), describe themselves as JSON and are rebuilt from it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from .arrays import Array, namespace, to_device


class KernelError(ValueError):
    """A kernel description that is invalid, or data that the kernel cannot take."""

    exit_code = 2


class SamplesError(KernelError):
    """Samples that nothing can be learned from."""

    exit_code = 3


@dataclass(frozen=True)
class Cost:
    """What one block of the matrix costs.

    operations: multiplications and additions.
    transcendentals: calls of exp, arccos or sqrt.
    scratch_bytes: memory needed beside the prepared blocks and the result.
    products, passes, calls: only of the general path of convolutional kernels, whose time ``costs.seconds`` tells
        from them: operations in products of matrices; operations entry by entry in the cache, or what takes as
        long; calls of the array library.
    """

    operations: float
    transcendentals: float
    scratch_bytes: int
    products: float = 0.0
    passes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operations + other.operations,
            self.transcendentals + other.transcendentals,
            max(self.scratch_bytes, other.scratch_bytes),
            self.products + other.products,
            self.passes + other.passes,
            self.calls + other.calls,
        )

    def __mul__(self, times: float) -> Cost:
        """What so many times take, one after the other."""
        return Cost(
            self.operations * times,
            self.transcendentals * times,
            self.scratch_bytes,
            self.products * times,
            self.passes * times,
            self.calls * times,
        )


@dataclass(frozen=True)
class Prepared:
    """What a kernel computed once for each of n samples.

    arrays: named arrays, each with leading axis n.
    rows: (n,) int64, the samples' global row ids in their pool.
    pool: digest or name of that pool; rows of different pools are never the same sample.
    preparation: ``Kernel.preparation`` of the kernel that it was made for; empty where nobody said.
    """

    arrays: Mapping[str, Array]
    rows: np.ndarray
    pool: str = ""
    preparation: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> Prepared:
        arrays = {name: a[index] for name, a in self.arrays.items()}
        return replace(self, arrays=arrays, rows=self.rows[index])

    def take(self, index: np.ndarray) -> Prepared:
        """The samples at these positions (int64, on the host), which may repeat."""
        arrays = {name: a[namespace(a).asarray(index)] for name, a in self.arrays.items()}
        return replace(self, arrays=arrays, rows=self.rows[index])

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays.values())

    def blocks(self, size: int) -> Iterator[tuple[slice, Prepared]]:
        """Yield consecutive blocks of at most ``size`` samples with their slices."""
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield part, self[part]

    def on_device(self) -> Prepared:
        """The same block with its arrays on the current GPU."""
        return replace(self, arrays={name: to_device(a) for name, a in self.arrays.items()})

    def part(self, prefix: str) -> Prepared:
        """The arrays whose names begin with ``prefix/``, without it (used by sums and products)."""
        head = prefix + "/"
        arrays = {k[len(head) :]: a for k, a in self.arrays.items() if k.startswith(head)}
        return replace(self, arrays=arrays, preparation="")


def same_rows(a: Prepared, b: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Positions (i, j), two int64 arrays, at which ``a`` and ``b`` hold the same sample of one pool (K13)."""
    if a.pool != b.pool:
        none = np.empty(0, np.int64)
        return none, none
    _, i, j = np.intersect1d(a.rows, b.rows, assume_unique=True, return_indices=True)
    return i, j


@dataclass(frozen=True)
class Kernel(ABC):
    """A positive definite function of two samples.

    Subclasses are frozen dataclasses whose fields are JSON values; ``kind`` names the class in a
    description, ``revision`` is raised whenever the numbers it produces change.
    """

    kind: ClassVar[str]
    revision: ClassVar[int] = 1
    inputs: ClassVar[Literal["vectors", "images"]] = "vectors"
    tile_sides: ClassVar[Mapping[str, int]] = {"float32": 2048, "float64": 1024}

    @abstractmethod
    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        """Compute what is needed once per sample.

        X: (n, d) vectors or (n, h, w, c) images, float32 or float64; rows: (n,) int64 row ids,
        0..n-1 when absent; pool: what the row ids refer to.

        Raises:
            KernelError: wrong number of axes, dtype, or a shape that the kernel cannot take.
        """

    @abstractmethod
    def pair(self, a: Prepared, b: Prepared) -> Array:
        """The block of the matrix between two prepared blocks.

        Returns (n, m), or (len(outputs), n, m) for a kernel with several outputs: a new array, which the
        caller may change. Pairs of the same sample (equal row ids of one pool) have cosines of exactly 1
        (SPEC K13).
        """

    @abstractmethod
    def diag(self, a: Prepared) -> Array:
        """(n,) values k(x, x), by the same rule; (len(outputs), n) for several outputs."""

    @abstractmethod
    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        """Cost of ``pair`` for n x m samples of ``shape`` ((d,) or (h, w, c))."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise KernelError when samples of ``shape`` ((d,) or (h, w, c)) cannot be taken."""
        axes = 1 if self.inputs == "vectors" else 3
        if len(shape) != axes:
            wanted = "vectors (n, d)" if axes == 1 else "images (n, h, w, c)"
            raise KernelError(f"a {self.kind} kernel takes {wanted}, not samples of shape {tuple(shape)}")

    @property
    def outputs(self) -> tuple[Kernel, ...]:
        """The kernels whose matrices ``pair`` returns; itself alone unless several come from one pass."""
        return (self,)

    def joint(self) -> Kernel:
        """The kernel that computes this one and, in the same pass, what comes nearly free (RF beside NTK)."""
        return self

    def prepared_description(self) -> dict[str, Any]:
        """JSON that names what ``prepare`` computes; kernels with equal ones share prepared blocks."""
        return self.describe()

    @cached_property
    def preparation(self) -> str:
        """sha256 of ``prepared_description``, which prepared blocks carry."""
        return digest(self.prepared_description())

    def _check_preparation(self, a: Prepared) -> None:
        """Raise KernelError where ``a`` says that it was made for a kernel that prepares something else."""
        if a.preparation not in ("", self.preparation):
            raise KernelError(
                f"blocks were prepared for another kernel than this {self.kind} one, with other layers or terms: "
                f"prepare them with this kernel"
            )

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON value with ``kind`` and every parameter; ``from_description`` is its inverse."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the description and the revision, 64 hexadecimal digits."""
        return digest({"kernel": self.describe(), "revision": self.revisions()})

    def revisions(self) -> Any:
        """The revisions of this kernel and of all its terms."""
        return self.revision

    def path(self, a: Prepared) -> str:
        """Name of the code that ``pair`` runs on blocks like ``a``: ``numpy`` or ``cupy``, the general path."""
        return namespace(*a.arrays.values()).__name__

    def remark(self, a: Prepared) -> str:
        """Why ``pair`` runs no quicker code on blocks like ``a``, where it usually would; else nothing."""
        return ""

    def tile_side(self, dtype: str) -> int:
        """Side of this kernel's tiles: a constant of its class and dtype."""
        return self.tile_sides[np.dtype(dtype).name]

    def gram(self, X: Array, Y: Array | None = None) -> Array:
        """The matrix of (n, ...) samples X with themselves or with (m, ...) samples Y, for small use."""
        a = self.prepare(X, pool="x")
        b = a if Y is None or Y is X else self.prepare(Y, pool="y")
        return self.pair(a, b)

    def __add__(self, other: Kernel) -> Kernel:
        return Sum(_terms(self, Sum) + _terms(other, Sum)) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Kernel | float) -> Kernel:
        if isinstance(other, Kernel):
            return Product(_terms(self, Product) + _terms(other, Product))
        return Scaled(self, float(other)) if isinstance(other, int | float) else NotImplemented

    def __rmul__(self, other: float) -> Kernel:
        return self.__mul__(other)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``, 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def row_ids(X: Array, rows: np.ndarray | None) -> np.ndarray:
    """``rows`` checked against X, or 0..n-1; (n,) int64.

    Raises:
        KernelError: when there is not one row id per sample, or ids repeat.
    """
    if rows is None:
        return np.arange(len(X), dtype=np.int64)
    rows = np.asarray(rows, dtype=np.int64)
    if rows.shape != (len(X),):
        raise KernelError(f"{len(X)} samples need {len(X)} row ids, got an array of shape {rows.shape}")
    if len(np.unique(rows)) != len(rows):
        raise KernelError("row ids repeat within one block")
    return rows


def require_float(X: Array) -> np.dtype:
    """The dtype of X, float32 or float64.

    Raises:
        KernelError: any other dtype; kernels never convert silently.
        TypeError: X is no NumPy or CuPy array.
    """
    namespace(X)
    if X.dtype not in (np.float32, np.float64):
        raise KernelError(
            f"kernels take float32 or float64 arrays, not {X.dtype}; convert with X.astype(...)"
        )
    return np.dtype(X.dtype)


def _terms(kernel: Kernel, kind: type[Sum] | type[Product]) -> tuple[Kernel, ...]:
    return kernel.terms if type(kernel) is kind else (kernel,)


@dataclass(frozen=True)
class _Composite(Kernel):
    """Several kernels over the same samples; prepared arrays carry the term's number as prefix."""

    terms: tuple[Kernel, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise KernelError(f"a {self.kind} kernel needs at least one term")
        if len({term.inputs for term in self.terms}) > 1:
            raise KernelError(f"a {self.kind} kernel cannot mix kernels of vectors and kernels of images")
        if any(len(term.outputs) > 1 for term in self.terms):
            raise KernelError(f"the terms of a {self.kind} kernel must have one output each")

    @property
    def inputs(self) -> Literal["vectors", "images"]:  # type: ignore[override]
        return self.terms[0].inputs

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        rows = row_ids(X, rows)
        distinct: dict[str, Prepared] = {}
        for term in self.terms:
            if term.preparation not in distinct:
                distinct[term.preparation] = term.prepare(X, rows, pool)
        arrays = {
            f"{slot}/{name}": a for slot, p in enumerate(distinct.values()) for name, a in p.arrays.items()
        }
        return Prepared(arrays, rows, pool, self.preparation)

    @cached_property
    def _slots(self) -> tuple[int, ...]:
        """For each term the number of its prepared block; terms that prepare the same share one."""
        keys = [term.preparation for term in self.terms]
        order = list(dict.fromkeys(keys))
        return tuple(order.index(key) for key in keys)

    def _parts(self, a: Prepared) -> Iterator[tuple[Kernel, Prepared]]:
        self._check_preparation(a)
        for slot, term in zip(self._slots, self.terms, strict=True):
            yield term, a.part(str(slot))

    def _pairs(self, a: Prepared, b: Prepared) -> Iterator[Array]:
        """The blocks of all terms; of a block with itself, terms may compute one triangle alone."""
        first = list(self._parts(a))
        second = first if b is a else self._parts(b)
        for (term, part_a), (_, part_b) in zip(first, second, strict=True):
            yield term.pair(part_a, part_b)

    def path(self, a: Prepared) -> str:
        return ", ".join(dict.fromkeys(term.path(part) for term, part in self._parts(a)))

    def remark(self, a: Prepared) -> str:
        remarks = dict.fromkeys(term.remark(part) for term, part in self._parts(a))
        return "; ".join(filter(None, remarks))

    def prepared_description(self) -> dict[str, Any]:
        distinct = {term.preparation: term.prepared_description() for term in self.terms}
        return {"parts": list(distinct.values())}

    def check(self, shape: tuple[int, ...]) -> None:
        for term in self.terms:
            term.check(shape)

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        total = Cost(n * m * (len(self.terms) - 1), 0, n * m * itemsize)
        for term in self.terms:
            total = total + term.cost(n, m, shape, itemsize)
        return replace(total, scratch_bytes=total.scratch_bytes + n * m * itemsize)

    def tile_side(self, dtype: str) -> int:
        return min(term.tile_side(dtype) for term in self.terms)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "terms": [term.describe() for term in self.terms]}

    def revisions(self) -> Any:
        return [self.revision, *(term.revisions() for term in self.terms)]

    def _combine(self, blocks: Iterator[Array], operation: str) -> Array:
        total = next(blocks)
        combine = getattr(namespace(total), operation)
        for block in blocks:
            combine(total, block, out=total)
        return total


@dataclass(frozen=True)
class Sum(_Composite):
    """The sum of kernels (K14)."""

    kind: ClassVar[str] = "sum"

    def pair(self, a: Prepared, b: Prepared) -> Array:
        return self._combine(self._pairs(a, b), "add")

    def diag(self, a: Prepared) -> Array:
        return self._combine((term.diag(part) for term, part in self._parts(a)), "add")


@dataclass(frozen=True)
class Product(_Composite):
    """The pointwise product of kernels (K14)."""

    kind: ClassVar[str] = "product"

    def pair(self, a: Prepared, b: Prepared) -> Array:
        return self._combine(self._pairs(a, b), "multiply")

    def diag(self, a: Prepared) -> Array:
        return self._combine((term.diag(part) for term, part in self._parts(a)), "multiply")


@dataclass(frozen=True)
class Scaled(Kernel):
    """A kernel times a non-negative number (K14)."""

    term: Kernel
    weight: float

    kind: ClassVar[str] = "scaled"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", float(self.weight))
        if not (self.weight >= 0 and np.isfinite(self.weight)):
            raise KernelError(f"the weight of a kernel must be finite and not negative, got {self.weight}")
        if len(self.term.outputs) > 1:
            raise KernelError("a scaled kernel must have one output")

    @property
    def inputs(self) -> Literal["vectors", "images"]:  # type: ignore[override]
        return self.term.inputs

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        return self.term.prepare(X, rows, pool)

    def path(self, a: Prepared) -> str:
        return self.term.path(a)

    def remark(self, a: Prepared) -> str:
        return self.term.remark(a)

    def pair(self, a: Prepared, b: Prepared) -> Array:
        block = self.term.pair(a, b)
        block *= block.dtype.type(self.weight)
        return block

    def diag(self, a: Prepared) -> Array:
        values = self.term.diag(a)
        return values * values.dtype.type(self.weight)

    def check(self, shape: tuple[int, ...]) -> None:
        self.term.check(shape)

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        return self.term.cost(n, m, shape, itemsize) + Cost(n * m, 0, 0)

    def tile_side(self, dtype: str) -> int:
        return self.term.tile_side(dtype)

    def prepared_description(self) -> dict[str, Any]:
        return self.term.prepared_description()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "weight": self.weight, "term": self.term.describe()}

    def revisions(self) -> Any:
        return [self.revision, self.term.revisions()]


Builder = Callable[[Mapping[str, Any]], Kernel]
"""From a description (a table with ``kind``) to a kernel; raises KernelError on bad or unknown keys."""
