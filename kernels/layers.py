"""Layers of a convolutional kernel (SPEC C2 to C4)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .base import KernelError
from .dot_product import DEFAULT_FLOOR
from .parameters import (
    LARGEST_DEGREE,
    REQUIRED,
    Table,
    bandwidth,
    choice,
    flag,
    function_parameters,
    positive,
    whole,
)
from .pooling import KINDS


@dataclass(frozen=True)
class Layer:
    """One layer: patches of patch x patch pixels, a pointwise kernel of patches, pooling.

    kernel: ``relu``, ``exponential`` (sigma), ``polynomial`` (degree), ``linear`` (scale, 1 when absent)
        or ``square``.
    pooling: ``gaussian``, ``average``, ``strided`` or ``global`` (the last layer alone); subsampling and
        poolfactor as in C4, poolfactor equal to subsampling when absent.
    floor: patch norms below it normalise no further (K2).
    patch_norm: divide patches by their side, so that P preserves norms (C2).
    """

    patch: int
    kernel: str
    sigma: float | None = None
    degree: int | None = None
    scale: float | None = None
    pooling: str = "gaussian"
    subsampling: int = 1
    poolfactor: int | None = None
    floor: float = DEFAULT_FLOOR
    patch_norm: bool = False

    _parameters: ClassVar[Table] = {
        "relu": {},
        "exponential": {"sigma": (bandwidth, REQUIRED)},
        "polynomial": {"degree": (whole(1, LARGEST_DEGREE), REQUIRED)},
        "linear": {"scale": (positive, 1.0)},
        "square": {},
    }

    def __post_init__(self) -> None:
        choice(self._parameters)("kernel", self.kernel)
        choice(KINDS)("pooling", self.pooling)
        names = ("sigma", "degree", "scale")
        checked = function_parameters(self.kernel, {n: getattr(self, n) for n in names}, self._parameters)
        checked["patch"] = whole(1)("patch", self.patch)
        checked["subsampling"] = whole(1)("subsampling", self.subsampling)
        poolfactor = self.subsampling if self.poolfactor is None else self.poolfactor
        checked["poolfactor"] = whole(1)("poolfactor", poolfactor)
        checked["floor"] = positive("floor", self.floor)
        checked["patch_norm"] = flag("patch_norm", self.patch_norm)
        if self.pooling in ("strided", "global") and checked["poolfactor"] != checked["subsampling"]:
            raise KernelError(f"poolfactor has no meaning for {self.pooling} pooling: leave it out")
        if self.pooling == "global" and checked["subsampling"] != 1:
            raise KernelError("subsampling has no meaning for global pooling: leave it out")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def describe(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def number(self) -> float:
        """The parameter of the layer's kernel: 1/sigma^2, the degree, or the scale; 1 where there is none."""
        if self.sigma is not None:
            return self.sigma**-2
        if self.degree is not None:
            return self.degree
        return 1.0 if self.scale is None else self.scale
