"""Kernels of networks on roto-translations: every patch is seen at each of 4 or 8 angles (SPEC C13, C14).

A feature map x(u, r) lives on positions u and turns r. Its slice at r is the feature map of a plain network whose
patches are turned; where r is a multiple of 90 degrees, that is the plain feature map of the turned image, turned
back. With patches and pooling that a turn by 90 degrees maps to themselves, the inner products of two slices
depend on the turn between them alone. So sums over pairs of turns become sums over the second image's turns by
0, 90, 180 and 270 degrees and, for 8 angles, over the parities of the two turns in units of 45 degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import parallel
from .arrays import Array, namespace
from .base import Cost, KernelError, Prepared, require_float, row_ids, same_rows
from .convolutional import Convolutional, NetworkKernel
from .fused import VARIABLE, asked
from .layers import Layer
from .network import Tangent
from .parameters import choice
from .turned import Angles, TurnedRecursion, turn_by_45

FINALS = ("rot", "rot+gap", "orbit")
_QUARTERS = 4
_TURNED = "turned"


class _Term(NamedTuple):
    """Slices that meet: their turns are 45 * first and 90 * quarters + 45 * second degrees."""

    first: int
    second: int
    quarters: int

    @property
    def transposed(self) -> _Term:
        """The term whose value at (x, y) is this one's at (y, x)."""
        return _Term(self.second, self.first, -self.quarters % _QUARTERS)


@dataclass(frozen=True)
class RotoTranslation(NetworkKernel):
    """The kernel of a network of ``layers`` on translations and ``rotations`` turns (C14); square images (n, h, h, c).

    final: what becomes of the turns at the end.
        ``rot``: the mean over all pairs of turns of the trace over positions. It does not change when both
        images are turned.
        ``rot+gap``: the mean over all pairs of turns and of positions; the last layer pools globally. It does
        not change when one image is turned.
        ``orbit``: the mean of the plain kernel of ``layers`` over all turns of the images; does not change
        when one image is turned either.
    rotations: 4, or 8. Turns by 45 degrees interpolate: with 8 what is said above is exact for multiples of 90
        degrees. For ``orbit`` both images are then turned, so that the kernel stays symmetric.
    tangent: as for ``Convolutional``.
    pooling_mode: ``same`` or ``periodic`` (C4).

    Patches are odd, nothing is subsampled and pooling windows are centred, since a turn must map each of them to
    itself.
    """

    layers: tuple[Layer, ...]
    final: str
    rotations: int = 4
    tangent: Tangent = False
    pooling_mode: str = "same"

    kind: ClassVar[str] = "roto-translation"

    def __post_init__(self) -> None:
        choice(FINALS)("final", self.final)
        if isinstance(self.rotations, bool) or self.rotations not in (4, 8):
            raise KernelError(f"rotations must be 4 or 8, got {self.rotations!r}")
        object.__setattr__(self, "rotations", int(self.rotations))
        object.__setattr__(self, "layers", self._plain.layers)
        if self.pooling_mode == "reference":
            raise KernelError(
                "pooling_mode = 'reference' shifts the grid at every layer, which turns do not keep: "
                "choose from periodic, same"
            )
        for number, layer in enumerate(self.layers):
            reason = _lopsided(layer)
            if reason:
                raise KernelError(f"layers[{number}]{reason}")
        pools_globally = self.layers[-1].pooling == "global"
        if pools_globally and self.final == "rot":
            raise KernelError(
                "final = 'rot' keeps positions apart: a last layer that pools globally is 'rot+gap'"
            )
        if not pools_globally and self.final == "rot+gap":
            raise KernelError(
                "final = 'rot+gap' is the mean over positions: give the last layer pooling = 'global'"
            )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "final": self.final,
            "rotations": self.rotations,
            "tangent": self.tangent,
            "pooling_mode": self.pooling_mode,
            "layers": [layer.describe() for layer in self.layers],
        }

    def prepared_description(self) -> dict[str, Any]:
        """With 4 rotations what is prepared is the plain kernel's."""
        plain = self._plain.prepared_description()
        if self.rotations == 4:
            return plain
        return {**plain, "turned by 45 degrees": "images" if self.final == "orbit" else "patches"}

    def revisions(self) -> Any:
        return [self.revision, self._plain.revisions()]

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        self._plain.check(shape)
        if shape[0] != shape[1]:
            raise KernelError(
                f"a {self.kind} kernel turns images by 90 degrees: {shape[0]}x{shape[1]} pixels are not square"
            )

    def prepare(self, X: Array, rows: np.ndarray | None = None, pool: str = "") -> Prepared:
        """The arrays of ``Convolutional.prepare``; with 8 rotations also ``turned/norm1``, ... of the turned
        patches or, for ``orbit``, ``turned/image`` and its norms.
        """
        require_float(X)
        self.check(X.shape[1:])
        rows = row_ids(X, rows)
        upright = self._plain.prepare(X, rows, pool)
        if self.rotations == 4:
            return upright
        if self.final == "orbit":
            turned: dict[str, Array] = dict(self._plain.prepare(turn_by_45(X)).arrays)
        else:
            turned = {f"norm{k}": norm for k, norm in enumerate(self._turned_patch_norms(X), 1)}
        arrays = {**upright.arrays, **{f"{_TURNED}/{name}": array for name, array in turned.items()}}
        return replace(upright, arrays=arrays, preparation=self.preparation)

    def block(self, a: Prepared, b: Prepared) -> Array:
        image, _ = self._images(a, b)
        xp = namespace(image)
        symmetric = a is b
        first = self._slices(a)
        second = first if symmetric else self._slices(b)
        total = xp.zeros((len(self.outputs), len(a), len(b)), np.float64)
        for term in self._terms:
            if symmetric and term.transposed < term:
                continue
            right = _turned_by(second[term.second], term.quarters)
            values = self._block(term, first[term.first], right)
            total += values
            if symmetric and term.transposed != term:
                total += values.swapaxes(1, 2)
        if symmetric:
            # Of a term that is its own transpose both triangles are there, rounded differently.
            total += total.swapaxes(1, 2).copy()
            total /= 2
        total /= len(self._terms)
        return total.astype(image.dtype)

    def paired(self, a: Prepared, b: Prepared, same: bool) -> Array:
        image, _ = self._images(a, b)
        xp = namespace(image)
        first = self._slices(a)
        second = first if a is b else self._slices(b)
        total = xp.zeros((len(self.outputs), len(a)), np.float64)
        for term in self._terms:
            if same and term.transposed < term:
                continue
            right = _turned_by(second[term.second], term.quarters)
            values = self._paired(term, first[term.first], right, same)
            total += (1 + (same and term.transposed != term)) * values
        total /= len(self._terms)
        return total.astype(image.dtype)

    def too_parallel(self, a: Prepared, b: Prepared) -> Array:
        """Of the plain kernel at any turn of either image."""
        first, second = self._slices(a)[0], self._slices(b)[0]
        result = self._plain.too_parallel(first, second)
        for quarters in range(1, _QUARTERS):
            result |= self._plain.too_parallel(first, _turned_by(second, quarters))
            result |= self._plain.too_parallel(_turned_by(first, quarters), second)
        return result

    def path(self, a: Prepared) -> str:
        """That of the plain kernel where it does the work; else the general one."""
        return self._plain.path(a) if self._by_plain_kernel else super().path(a)

    def remark(self, a: Prepared) -> str:
        return self._plain.remark(a) if self._by_plain_kernel else ""

    def cost(self, n: int, m: int, shape: tuple[int, ...], itemsize: int = 4) -> Cost:
        self.check(shape)
        dtype = np.dtype(np.float32 if itemsize == 4 else np.float64)
        # The sum in float64, a term's block, and what one or the other is copied to.
        total = Cost(2.0 * n * m * len(self._terms), 0, 3 * len(self.outputs) * n * m * 8)
        scratch = total.scratch_bytes + 2 * m * (self.rotations // 4) * self._slice_bytes(shape, itemsize)
        for term in self._terms:
            if self._by_plain_kernel:
                cost = self._plain.block_cost(n, m, shape, itemsize)
            else:
                cost = self._recursion(term, shape, np, dtype).cost(n, m)
            total = total + cost
        total = replace(total, scratch_bytes=total.scratch_bytes + scratch)
        if self.tangent and dtype == np.float32:
            looks = 2 * _QUARTERS - 1
            total = total + parallel.cost(self.network(shape), n, m, shape[2]) * looks
            total = total + self._correction_cost(n, m, shape)
        return total

    # Terms

    @cached_property
    def _plain(self) -> Convolutional:
        return Convolutional(self.layers, self.tangent, self.pooling_mode)

    @cached_property
    def _terms(self) -> tuple[_Term, ...]:
        """The pairs of slices whose mean is the kernel."""
        parities = range(self.rotations // 4)
        return tuple(_Term(e, f, q) for e in parities for f in parities for q in range(_QUARTERS))

    @property
    def _by_plain_kernel(self) -> bool:
        """Whether every term is the plain kernel of turned images: ``orbit`` is; of two slices all positions
        meet in ``rot+gap`` as in the plain kernel, while in ``rot`` they meet turned."""
        return self.final == "orbit" or (self.final == "rot+gap" and self.rotations == 4)

    def _slices(self, a: Prepared) -> tuple[Prepared, ...]:
        """The slices at 0 and, with 8 rotations, 45 degrees: images with the patch norms of the slice."""
        self._check_preparation(a)
        plain = {name: x for name, x in a.arrays.items() if "/" not in name}
        upright = replace(a, arrays=plain, preparation="")
        if self.rotations == 4:
            return (upright,)
        turned = a.part(_TURNED)
        arrays = {"image": a.arrays["image"], **turned.arrays}
        return upright, replace(turned, arrays=arrays, pool=f"{a.pool} at 45 degrees")

    def _block(self, term: _Term, a: Prepared, b: Prepared) -> Array:
        """One term, (outputs, n, m)."""
        if self._by_plain_kernel:
            return self._plain.block(a, b)
        _require_general_path(self)
        image = a.arrays["image"]
        xp = namespace(image)
        recursion = self._recursion(term, image.shape[1:], xp, image.dtype)
        result = xp.empty((len(self.outputs), len(a), len(b)), image.dtype)
        p, q = recursion.block_shape(len(b))
        for columns, part_b in b.blocks(q):
            for rows, part_a in a.blocks(p):
                i, j = same_rows(part_a, part_b)
                equal = (xp.asarray(i), xp.asarray(j)) if len(i) else None
                values = recursion.crossed(part_a, part_b, equal)
                for k, value in enumerate(values[-len(result) :]):
                    result[k, rows, columns] = value
        return result

    def _paired(self, term: _Term, a: Prepared, b: Prepared, same: bool) -> Array:
        """One term of images and those of their numbers, (outputs, n); same: they are the same samples."""
        image = a.arrays["image"]
        xp = namespace(image)
        result = xp.empty((len(self.outputs), len(a)), image.dtype)
        upright = same and term.first == term.second and term.quarters == 0
        if self._by_plain_kernel:
            return self._plain.paired(a, b, upright)
        _require_general_path(self)
        recursion = self._recursion(term, image.shape[1:], xp, image.dtype)
        _, step = recursion.block_shape(len(a))
        for (part, part_a), (_, part_b) in zip(a.blocks(step), b.blocks(step), strict=True):
            values = recursion.paired(part_a, part_b, upright)
            for k, value in enumerate(values[-len(result) :]):
                result[k, part] = value
        return result

    def _recursion(self, term: _Term, shape: Sequence[int], xp: Any, dtype: np.dtype) -> TurnedRecursion:
        turns = Angles(term.first, term.second)
        return TurnedRecursion(
            self.network(shape), self.tangent, turns, term.quarters, xp, np.dtype(dtype), int(shape[2])
        )

    def _turned_patch_norms(self, X: Array) -> list[Array]:
        """Patch norms at 45 degrees, layer by layer, (n, positions), computed in float64."""
        xp = namespace(X)
        recursion = self._recursion(_Term(1, 1, 0), X.shape[1:], xp, np.dtype(np.float64))
        _, step = recursion.block_shape(len(X))
        blocks = [
            recursion.patch_norms(X[start : start + step].astype(np.float64), 1)
            for start in range(0, len(X), step)
        ]
        return [xp.concatenate(layer).astype(X.dtype) for layer in zip(*blocks, strict=True)]

    def _slice_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        h, w, c = shape
        return h * w * (c + len(self.layers)) * itemsize


def _lopsided(layer: Layer) -> str | None:
    """What in a layer a turn by 90 degrees does not map to itself: the end of an error message, or None."""
    if layer.patch % 2 == 0:
        return f".patch must be odd, got {layer.patch}: turns need a pixel in the middle"
    if layer.subsampling != 1:
        return f".subsampling must be 1, got {layer.subsampling}: turns move the positions that it keeps"
    if layer.pooling == "average" and layer.poolfactor != 1:
        return ".pooling = 'average' has windows that begin at their position: turns need gaussian, centred on it"
    return None


def _require_general_path(kernel: RotoTranslation) -> None:
    wanted = asked()
    if wanted not in ("auto", "general"):
        raise KernelError(
            f"{VARIABLE}={wanted}, but final = {kernel.final!r} with {kernel.rotations} rotations has the general "
            f"path alone: use {VARIABLE}=auto or general"
        )


def _turned_by(part: Prepared, quarters: int) -> Prepared:
    """The block of the images turned by 90 * quarters degrees: their patch norms are the turned ones."""
    if quarters == 0:
        return part
    image = part.arrays["image"]
    xp = namespace(image)
    arrays = {}
    for name, array in part.arrays.items():
        grid = array if name == "image" else array.reshape(image.shape[:3])
        turned = xp.ascontiguousarray(xp.rot90(grid, quarters, axes=(1, 2)))
        arrays[name] = turned.reshape(array.shape)
    return Prepared(arrays, part.rows, f"{part.pool} turned by {90 * quarters} degrees")
