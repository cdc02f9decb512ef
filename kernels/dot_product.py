"""Dot-product kernels k(x, y) = |x| |y| kappa(cos(x, y)) of vectors (SPEC K1 to K7)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .arrays import Array, inner_products, namespace
from .base import Cost, Kernel, KernelError, Prepared, require_float, row_ids, same_rows
from .parameters import (
    LARGEST_DEGREE,
    REQUIRED,
    Table,
    bandwidth,
    binary_order,
    choice,
    function_parameters,
    positive,
    unit_exponent,
    whole,
)
from .workspace import Workspace, block_bytes

DEFAULT_FLOOR = 1e-6
"""Norms below it do not normalise a vector any further (K2)."""


def kappa_0(u: Array) -> Array:
    """Arc-cosine function of order 0, 1 - arccos(u)/pi, of an array of cosines (K3)."""
    xp = namespace(u)
    return 1 - xp.arccos(xp.clip(u, -1, 1)) / math.pi


def kappa_1(u: Array) -> Array:
    """Arc-cosine function of order 1, (u (pi - arccos u) + sqrt(1 - u^2))/pi, of an array of cosines (K3)."""
    u = u.copy()
    angle, sine = u.copy(), u.copy()
    angles(u, angle, sine)
    u *= angle
    u += sine
    return u / math.pi


def angles(u: Array, angle: Array, sine: Array) -> None:
    """Clip the cosines ``u`` in place; write pi - arccos(u) to ``angle`` and sqrt(1 - u^2) to ``sine``.

    1 - u^2 is formed as (1 - u)(1 + u): squaring first would round away what is left near u = 1.
    """
    xp = namespace(u, angle, sine)
    xp.clip(u, -1, 1, out=u)
    xp.subtract(1, u, out=sine)
    xp.add(1, u, out=angle)
    sine *= angle
    xp.sqrt(sine, out=sine)
    xp.arccos(u, out=angle)
    xp.subtract(math.pi, angle, out=angle)


def raise_to(u: Array, degree: int, scratch: Array) -> None:
    """``u`` to a whole power of at least 1 in place: squares, and products with ``u`` kept in ``scratch``."""
    while degree % 2 == 0:
        u *= u
        degree //= 2
    if degree == 1:
        return
    scratch[...] = u
    for bit in f"{degree:b}"[1:]:
        u *= u
        if bit == "1":
            u *= scratch


def raising_steps(degree: int) -> int:
    """How often ``raise_to`` goes over its array."""
    twos = (degree & -degree).bit_length() - 1
    odd = degree >> twos
    return twos + (0 if odd == 1 else odd.bit_length() + odd.bit_count() - 1)


def inverse_norms(norm: Array, floor: float) -> Array:
    """1/max(norm, floor) (K2)."""
    return 1 / namespace(norm).maximum(norm, norm.dtype.type(floor))


def mirror(K: Array) -> None:
    """Copy the lower triangles of K (..., n, n) to the upper ones, in pieces that stay in the cache."""
    xp = namespace(K)
    n = K.shape[-1]
    step = math.isqrt(block_bytes(xp) // K.dtype.itemsize)
    pieces = [slice(start, start + step) for start in range(0, n, step)]
    for k, rows in enumerate(pieces):
        lower = xp.tril(K[..., rows, rows])
        K[..., rows, rows] = lower + xp.tril(lower, -1).swapaxes(-1, -2)
        for columns in pieces[:k]:
            K[..., columns, rows] = K[..., rows, columns].swapaxes(-1, -2)


@dataclass(frozen=True)
class HomogeneousKernel(Kernel):
    """|x| |y| kappa(cos(x, y)); subclasses say what kappa is.

    All of them prepare the same: ``unit`` (n, d), rows divided by max(norm, floor), and ``norm`` (n,).
    """

    floor: float = field(default=DEFAULT_FLOOR, kw_only=True)

    revision: ClassVar[int] = 2
    _scratch_strips: ClassVar[int] = 3
    """Scratch arrays of ``_apply``; the first also takes the weights, so at least one."""

    @abstractmethod
    def _apply(self, outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
        """Replace each array of ``outputs`` by its values of kappa; the last one holds the cosines."""

    @abstractmethod
    def _work(self) -> tuple[float, float]:
        """Operations and transcendental calls for one entry."""

    @property
    @abstractmethod
    def kappa_prime_at_1(self) -> float:
        """kappa'(1), infinite where kappa is not differentiable there (K7)."""

    @property
    def is_nonexpansive(self) -> bool:
        """Whether the feature map never increases a distance: kappa'(1) <= 1 (K7)."""
        return self.kappa_prime_at_1 <= 1

    @property
    def _uses_norms(self) -> bool:
        return True

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        xp = namespace(X)
        dtype = require_float(X)
        self.check(X.shape[1:])
        rows = row_ids(X, rows)
        norm = xp.empty(len(X), dtype)
        unit = xp.empty(X.shape, dtype)
        step = max(1, block_bytes(xp) // (8 * max(1, X.shape[1])))
        for start in range(0, len(X), step):
            block = X[start : start + step].astype(np.float64)
            norms = xp.sqrt((block * block).sum(axis=1))
            norm[start : start + step] = norms
            unit[start : start + step] = block * inverse_norms(norms, self.floor)[:, None]
        return Prepared({"unit": unit, "norm": norm}, rows, pool)

    def prepared_description(self) -> dict[str, Any]:
        return {"prepare": "unit rows and norms", "floor": self.floor}

    def kappa(self, u: Array) -> Array:
        """Values of kappa at an array of cosines; with a leading axis of outputs if there are several."""
        count = len(self.outputs)
        xp = namespace(u)
        values = xp.empty((count, *u.shape), u.dtype)
        values[-1] = u
        self._apply(list(values), [xp.empty_like(u) for _ in range(self._scratch_strips)])
        return values if count > 1 else values[0]

    def pair(self, a: Prepared, b: Prepared) -> Array:
        unit_a, norm_a, norm_b = a.arrays["unit"], a.arrays["norm"], b.arrays["norm"]
        xp = namespace(unit_a, norm_b)
        n, m = len(a), len(b)
        result = xp.empty((len(self.outputs), n, m), unit_a.dtype)
        self.cosines(a, b, result[-1])
        weight_a, weight_b = self.weights(norm_a), self.weights(norm_b)
        # The map makes several passes: strip by strip they all run in the cache.
        workspace = Workspace(xp, unit_a.dtype)
        step = self._strip_rows(m, unit_a.dtype.itemsize, block_bytes(xp))
        for start in range(0, n, step):
            strips = result[:, start : start + step]
            shape = strips.shape[1:]
            scratch = [workspace.take(str(k), shape) for k in range(self._scratch_strips)]
            self._apply(list(strips), scratch)
            # Their product first: multiplied one after the other they would round otherwise for (i, j) than for (j, i).
            strips *= xp.multiply(weight_a[start : start + step, None], weight_b, out=scratch[0])
        if a.pool == b.pool and np.array_equal(a.rows, b.rows):
            # Neither products of matrices nor vectorised functions promise the same bits in both triangles, and
            # solvers that read one or the other would solve with two matrices.
            mirror(result)
        return result if len(self.outputs) > 1 else result[0]

    def cosines(self, a: Prepared, b: Prepared, out: Array) -> None:
        """Write the cosines (n, m) between two prepared blocks, 1 exactly where rows are equal (K13).

        Raises:
            KernelError: the blocks are of different numbers of features, or dtypes.
        """
        unit_a, norm_a, unit_b = a.arrays["unit"], a.arrays["norm"], b.arrays["unit"]
        xp = namespace(unit_a, unit_b)
        if unit_a.shape[1:] != unit_b.shape[1:] or unit_a.dtype != unit_b.dtype:
            raise KernelError(
                f"prepared blocks do not match: {unit_a.dtype} vectors of {unit_a.shape[1]} features "
                f"against {unit_b.dtype} vectors of {unit_b.shape[1]}"
            )
        inner_products(unit_a, unit_b, out)
        i, j = same_rows(a, b)
        if len(i):
            i, j = xp.asarray(i), xp.asarray(j)
            regular = norm_a[i] > self.floor
            out[i[regular], j[regular]] = 1

    def diag(self, a: Prepared) -> Array:
        norm = a.arrays["norm"]
        xp = namespace(norm)
        # Below the floor the rows are shorter than one, and so is the cosine.
        cosine = xp.minimum(1, norm * inverse_norms(norm, self.floor)) ** 2
        cosine[norm > self.floor] = 1
        return self.kappa(cosine) * self.weights(norm) ** 2

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        operations, transcendentals = self._work()
        strip = min(n, self._strip_rows(m, itemsize, block_bytes(np))) * m * itemsize
        return Cost(
            n * m * (2.0 * shape[0] + operations), n * m * transcendentals, self._scratch_strips * strip
        )

    @staticmethod
    def _strip_rows(m: int, itemsize: int, budget: int) -> int:
        return max(1, budget // max(1, m * itemsize))

    def weights(self, norm: Array) -> Array:
        """(n,) what multiplies values of kappa, for the samples of one side, from their norms."""
        return norm if self._uses_norms else (norm > 0).astype(norm.dtype)


@dataclass(frozen=True)
class DotProduct(HomogeneousKernel):
    """|x| |y| kappa(cos(x, y)) for a kappa in closed form (K1, K3, K5, K6, K9).

    kernel: what kappa is, with its parameters:
        ``exponential`` exp((u - 1)/sigma^2); ``polynomial`` u^degree; ``linear`` scale * u;
        ``arc-cosine`` of ``order`` 0 or 1; ``laplace`` exp(-c (1 - u)^gamma), 0 < gamma <= 1;
        ``square``, the one kernel that is not homogeneous: <x, y>^2.
    floor: norms below it normalise no further (K2).
    """

    kernel: str = "exponential"
    sigma: float | None = None
    degree: int | None = None
    scale: float | None = None
    order: int | None = None
    c: float | None = None
    gamma: float | None = None

    kind: ClassVar[str] = "dot-product"
    _parameters: ClassVar[Table] = {
        "exponential": {"sigma": (bandwidth, REQUIRED)},
        "polynomial": {"degree": (whole(1, LARGEST_DEGREE), REQUIRED)},
        "linear": {"scale": (positive, 1.0)},
        "arc-cosine": {"order": (binary_order, 1)},
        "laplace": {"c": (positive, 1.0), "gamma": (unit_exponent, 0.5)},
        "square": {},
    }
    _scratch_strips: ClassVar[int] = 2

    def __post_init__(self) -> None:
        choice(self._parameters)("kernel", self.kernel)
        names = ("sigma", "degree", "scale", "order", "c", "gamma")
        filled = function_parameters(self.kernel, {n: getattr(self, n) for n in names}, self._parameters)
        filled["floor"] = positive("floor", self.floor)
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def describe(self) -> dict[str, Any]:
        parameters = {name: getattr(self, name) for name in self._parameters[self.kernel]}
        return {"kind": self.kind, "kernel": self.kernel, **parameters, "floor": self.floor}

    @property
    def kappa_prime_at_1(self) -> float:
        """kappa'(1) (K7); for ``square`` that of its restriction to the sphere, 2."""
        match self.kernel:
            case "exponential":
                return _number(self.sigma) ** -2
            case "polynomial":
                return float(_number(self.degree))
            case "linear":
                return _number(self.scale)
            case "arc-cosine":
                return 1.0 if self.order == 1 else math.inf
            case "laplace":
                return _number(self.c) if self.gamma == 1 else math.inf
        return 2.0

    def weights(self, norm: Array) -> Array:
        if self.kernel != "square":
            return norm
        # <x, y>^2 = cos^2 (|x| |y|)^2, with the norms that the rows were divided by.
        return namespace(norm).maximum(norm, norm.dtype.type(self.floor)) ** 2

    def _apply(self, outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
        (u,) = outputs
        xp = namespace(u)
        match self.kernel:
            case "exponential":
                u -= 1
                u *= _number(self.sigma) ** -2
                xp.exp(u, out=u)
            case "polynomial":
                raise_to(u, int(_number(self.degree)), scratch[0])
            case "linear":
                u *= _number(self.scale)
            case "square":
                u *= u
            case "laplace":
                xp.subtract(1, u, out=u)
                xp.maximum(u, 0, out=u)
                if self.gamma == 0.5:
                    xp.sqrt(u, out=u)
                elif self.gamma != 1:
                    xp.power(u, _number(self.gamma), out=u)
                u *= -_number(self.c)
                xp.exp(u, out=u)
            case "arc-cosine":
                angle, sine = scratch[:2]
                angles(u, angle, sine)
                if self.order == 0:
                    u[...] = angle
                else:
                    u *= angle
                    u += sine
                u *= 1 / math.pi

    def _work(self) -> tuple[float, float]:
        return {
            "exponential": (4, 1),
            "polynomial": (2 + 2 * (self.degree or 0).bit_length(), 0),
            "linear": (3, 0),
            "square": (3, 0),
            "laplace": (5, 2),
            "arc-cosine": (9, 2),
        }[self.kernel]


def _number(value: float | None) -> float:
    assert value is not None
    return value
