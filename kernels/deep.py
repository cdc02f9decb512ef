"""Fully connected ReLU kernels of L layers: random features (RF) and neural tangent (NTK) (SPEC K8, K9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .arrays import Array
from .base import Kernel, KernelError
from .dot_product import HomogeneousKernel, angles
from .parameters import LARGEST_DEPTH, choice, flag, positive, whole


@dataclass(frozen=True)
class FullyConnected(HomogeneousKernel):
    """The kernel of a network of ``depth`` weight matrices, hence depth - 1 ReLU layers (K8).

    family: ``rf`` (value 1 at cosine 1), ``ntk`` (value ``depth``), or ``both``, whose ``pair`` returns
        the RF and the NTK matrix, (2, n, m), from one pass.
    normalized: divide the NTK by ``depth``. normalize_inputs: drop the factor |x| |y|.
    bias: the two-layer variants with an input bias (K9), for ``depth`` 2 alone; these are defined
        without ``normalized``.
    floor: norms below it normalise no further (K2).
    """

    family: str = "rf"
    depth: int = 2
    normalized: bool = False
    normalize_inputs: bool = False
    bias: bool = False

    kind: ClassVar[str] = "fully-connected"

    def __post_init__(self) -> None:
        choice(("rf", "ntk", "both"))("family", self.family)
        checked = {
            "depth": whole(1, LARGEST_DEPTH)("depth", self.depth),
            "normalized": flag("normalized", self.normalized),
            "normalize_inputs": flag("normalize_inputs", self.normalize_inputs),
            "bias": flag("bias", self.bias),
            "floor": positive("floor", self.floor),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.bias and self.depth != 2:
            raise KernelError(f"bias is defined for depth 2 alone, not for depth {self.depth}")
        if self.bias and self.normalized:
            raise KernelError("bias is defined without normalized: drop one of the two")
        if self.family == "rf" and self.normalized:
            # It changes nothing, and two descriptions of one kernel would have two fingerprints.
            object.__setattr__(self, "normalized", False)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "family": self.family,
            "depth": self.depth,
            "normalized": self.normalized,
            "normalize_inputs": self.normalize_inputs,
            "bias": self.bias,
            "floor": self.floor,
        }

    @property
    def outputs(self) -> tuple[Kernel, ...]:
        if self.family != "both":
            return (self,)
        return replace(self, family="rf", normalized=False), replace(self, family="ntk")

    def joint(self) -> Kernel:
        return replace(self, family="both") if self.family == "ntk" else self

    @property
    def kappa_prime_at_1(self) -> float:
        """kappa'(1) (K7): 1 for the RF kernels, 3 with bias, infinite for the NTK of two or more layers.

        Raises:
            KernelError: for family ``both``, which is two functions.
        """
        if self.family == "both":
            raise KernelError("family 'both' is two kernels: ask one of its outputs")
        if self.family == "ntk" and self.depth > 1:
            return math.inf
        return 3.0 if self.bias else 1.0

    @property
    def _uses_norms(self) -> bool:
        return not self.normalize_inputs

    def _apply(self, outputs: Sequence[Array], scratch: Sequence[Array]) -> None:
        theta = outputs[-1]
        angle, sine, spare = scratch
        if self.family == "rf":
            sigma = theta
        else:
            sigma = outputs[0] if self.family == "both" else spare
            sigma[...] = theta
        if self.bias:
            self._apply_bias(sigma, theta, angle, sine)
            return
        for _ in range(self.depth - 1):
            angles(sigma, angle, sine)
            sigma *= angle
            sigma += sine
            sigma *= 1 / math.pi
            if self.family != "rf":
                angle *= 1 / math.pi
                theta *= angle
                theta += sigma
        if self.normalized:
            theta *= 1 / self.depth

    def _apply_bias(self, sigma: Array, theta: Array, angle: Array, sine: Array) -> None:
        angles(sigma, angle, sine)
        sine *= 1 / math.pi
        angle *= 1 / math.pi
        if self.family == "rf":
            angle *= sigma
            angle += sine
            sigma += 1
            sigma *= angle
            return
        # sine becomes kappa_1; theta holds the cosines still, and may share no memory with sigma here.
        sigma *= angle
        sine += sigma
        theta += 1
        if self.family == "both":
            sigma[...] = sine
            sigma *= theta
        theta *= angle
        theta += sine
        theta *= 0.5

    def _work(self) -> tuple[float, float]:
        layers = self.depth - 1
        return 3 + layers * (8 if self.family == "rf" else 11), 2 * layers
