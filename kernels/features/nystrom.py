"""Nystrom features of any kernel: its values at landmarks, whitened by the landmarks' own matrix (SPEC F3, R7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from .. import fused
from ..arrays import Array, inner_products, namespace, to_host
from ..base import Cost, KernelError, Prepared, SamplesError, require_float
from ..cuda import entrywise
from ..deep import FullyConnected
from ..dot_product import DotProduct
from ..parameters import choice, share, whole
from .base import FeatureMap, Progress, Samples, unwatched
from .landmarks import (
    BLOCK_BYTES,
    EIGENVECTORS,
    SELECTIONS,
    choose,
    choosing_cost,
    require_enough,
    require_finite_kernel,
)

LANDMARKS, WHITENING = "landmarks", "whitening"
"""Names of the learned arrays: (landmarks, ...) samples, and (landmarks, landmarks) float64."""
ROWS, POOL = "rows", "pool"
"""Names of two more where landmarks are samples of a pool: their row ids, (landmarks,) int64, and its name, uint8."""


@dataclass(frozen=True)
class NystromFeatures(FeatureMap):
    """psi(x) = V^T (K_MM + epsilon d I)^(-1/2) K_M(x) for M landmarks, d the mean of K_MM's diagonal.

    It is the projection of the kernel's own features on those of the landmarks: where epsilon is 0, K - K_hat is
    positive semidefinite, zero at the landmarks, and ridge regression on psi is R7's on the same centres. epsilon
    counts in units of d, so that it is F3's for patches of norm 1, and the same however a kernel is scaled; it bounds
    how much the rounding of K_M(x) is amplified, by epsilon^(-1/2).

    V are the eigenvectors of K_MM, of the largest eigenvalue first: a rotation of F3's features, which changes no
    inner product and is better in float32. Where eigenvalues are small, rounding is amplified; here it stays in the
    features of these eigenvalues, which are small too, and behind the symmetric root it would be in all.

    Directions in which K_MM + epsilon d I is nothing but rounding, as where landmarks repeat, are left out (the
    pseudo-inverse, F3), their features zero: below M roundings of the largest eigenvalue in float64, or below sqrt(M)
    roundings of d in the dtype of the samples learned from, where the values K_M(x) have only noise to tell.

    A landmark that comes among the samples is known by its row id, where the pool that it was learned from is named:
    in float32, tangent kernels know any other copy of it to about 1e-3 of its own value alone (K13).

    kernel: any kernel with one output. landmarks: M, the number of features. selection: how landmarks are found,
    as ``landmarks.choose`` says; ``k-means`` is for vectors. candidates: how many samples, drawn at random, all but
    uniform ones are chosen among; the pivoted Cholesky factorisation and leverage scores take as many values of the
    kernel for each landmark, which is dear for images.
    """

    landmarks: int = 1000
    selection: str = "uniform"
    epsilon: float = 1e-6
    candidates: int = 20_000
    seed: int = 0

    kind: ClassVar[str] = "nystrom"
    revision: ClassVar[int] = 2
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked = {
            "landmarks": whole(1)("landmarks", self.landmarks),
            "selection": choice(SELECTIONS)("selection", self.selection),
            "epsilon": share("epsilon", self.epsilon),
            "candidates": whole(1)("candidates", self.candidates),
            "seed": whole(0)("seed", self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if len(self.kernel.outputs) > 1:
            raise KernelError(
                f"kernel must have one output to be approximated, and this {self.kernel.kind} kernel has "
                f"{len(self.kernel.outputs)}"
            )
        if self.selection == "k-means" and self.kernel.inputs != "vectors":
            others = ", ".join(name for name in SELECTIONS if name != "k-means")
            raise KernelError(
                f"selection must be one of {others} for a kernel of images: k-means takes means of vectors"
            )
        if self.selection != "uniform" and self.candidates < self.landmarks:
            raise KernelError(
                f"candidates must be at least landmarks = {self.landmarks}, which are chosen among them, "
                f"got {self.candidates}"
            )

    def width(self, shape: tuple[int, ...]) -> int:
        return self.landmarks

    def learn(self, samples: Samples, progress: Progress = unwatched) -> Self:
        """Choose the landmarks and decompose their matrix.

        Raises:
            KernelError: fewer samples than landmarks.
            SamplesError: a value is not finite, or the kernel maps all landmarks to zero.
        """
        self.check(samples.shape)
        Z, chosen = choose(
            self.kernel, samples, self.landmarks, self.selection, self.candidates, self.seed, progress
        )
        K = self.kernel.gram(Z.astype(np.float64))
        W = whitening(K, self.epsilon, float(np.finfo(Z.dtype).eps))
        arrays = {LANDMARKS: to_host(Z), WHITENING: to_host(W)}
        if chosen is not None and samples.rows is not None and samples.pool:
            arrays[ROWS] = samples.rows[chosen].astype(np.int64)
            arrays[POOL] = np.frombuffer(samples.pool.encode(), np.uint8)
        return self.knowing(arrays)

    def check_count(self, count: int, shape: tuple[int, ...]) -> None:
        require_enough(count, self.landmarks)

    def features(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Array:
        xp = namespace(X)
        require_float(X)
        self.check(tuple(X.shape[1:]))
        W, centres = self.array(WHITENING, X), self._centres(X)
        out = xp.empty((len(X), self.landmarks), X.dtype)
        step = self._rows(X.dtype.itemsize)
        if rows is None or not pool:
            rows, pool = None, "samples"
        for start in range(0, len(X), step):
            part = slice(start, start + step)
            samples = self.kernel.prepare(X[part], None if rows is None else rows[part], pool)
            xp.matmul(self._values(samples, centres), W, out=out[part])
        return out

    def feature_cost(self, n: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        M, rows = self.landmarks, min(n, self._rows(itemsize))
        values = self.kernel.cost(n, M, shape, itemsize) + Cost(2.0 * n * M * M, 0.0, 0)
        block = self.kernel.cost(rows, M, shape, itemsize).scratch_bytes + rows * M * itemsize
        return replace(values, scratch_bytes=block)

    def learning_cost(self, count: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        landmarks = self.kernel.cost(self.landmarks, self.landmarks, shape, 8)
        decomposed = Cost(EIGENVECTORS * self.landmarks**3, 0.0, 4 * 8 * self.landmarks**2)
        return (
            landmarks
            + decomposed
            + choosing_cost(
                self.kernel, count, shape, self.landmarks, self.selection, self.candidates, itemsize
            )
        )

    def _values(self, samples: Prepared, centres: Prepared) -> Array:
        """(n, landmarks) values of the kernel; of vectors on a device by one pass over their cosines."""
        kernel = self.kernel
        if not (
            isinstance(kernel, DotProduct | FullyConnected) and fused.runs_entrywise(samples.arrays["unit"])
        ):
            return kernel.pair(samples, centres)
        unit = samples.arrays["unit"]
        B = namespace(unit).empty((len(samples), len(centres)), unit.dtype)
        kernel.cosines(samples, centres, B)
        entrywise.kernel_values(kernel, B, *(kernel.weights(x.arrays["norm"]) for x in (samples, centres)))
        return B

    def _rows(self, itemsize: int) -> int:
        return max(1, BLOCK_BYTES // (self.landmarks * itemsize))

    def _centres(self, like: Array) -> Prepared:
        """The landmarks prepared in the dtype and on the device of ``like``."""
        key = (namespace(like).__name__, np.dtype(like.dtype).name)
        if key not in self._prepared:
            Z, arrays = self.array(LANDMARKS, like), self.arrays or {}
            pool = bytes(arrays[POOL]).decode() if POOL in arrays else LANDMARKS
            self._prepared[key] = self.kernel.prepare(Z, arrays.get(ROWS), pool)
        return self._prepared[key]

    @cached_property
    def _prepared(self) -> dict[tuple[str, str], Prepared]:
        return {}


def whitening(K: Array, epsilon: float, rounding: float) -> Array:
    """W (M, M) with W W^T = (K + epsilon d I)^-1 of K (M, M) float64, d the mean of its diagonal: eigenvectors over
    the square roots of their eigenvalues, the largest first.

    rounding: relative error of the values that W will be applied to. Of directions of rounding, as
    ``NystromFeatures`` says, the columns are zero.

    Raises:
        SamplesError: K is zero, or not finite.
    """
    s, V = _directions(K, epsilon, rounding)
    W = namespace(K).zeros_like(K)
    W[:, : len(s)] = (V * s**-0.5)[:, ::-1]
    return W


def inverse_root(K: Array, epsilon: float, rounding: float) -> Array:
    """Symmetric (K + epsilon d I)^(-1/2) of K (M, M) float64; parameters and errors are those of ``whitening``."""
    s, V = _directions(K, epsilon, rounding)
    V = V * s**-0.25
    return inner_products(V, V)


def _directions(K: Array, epsilon: float, rounding: float) -> tuple[Array, Array]:
    """Eigenvalues (r,), increasing, and eigenvectors (M, r) of K + epsilon d I that are more than rounding."""
    xp, M = namespace(K), len(K)
    require_finite_kernel(K)
    scale = float(K.trace()) / M
    if scale == 0:
        raise SamplesError(
            "nothing can be learned: the kernel is 0 at every landmark, as it is where samples are zero"
        )
    s, V = xp.linalg.eigh(K)
    least = max(M * np.finfo(np.float64).eps * float(s[-1]), M**0.5 * rounding * scale)
    s += epsilon * scale
    kept = s > least
    return s[kept], V[:, kept]
