"""What feature maps do to products of rows entry by entry, in one pass on a device (SPEC F2, F3).

``fused.runs_entrywise`` says whether these passes run on an array.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, namespace
from ..deep import FullyConnected
from ..dot_product import DotProduct
from ..layers import Layer
from . import device, programs


def scalar_function(layer: Layer, B: Array, weights: Array | None) -> None:
    """In place of inner products B (n, m): what ``pointwise.apply`` makes of them, times weights (n,) of rows.

    B was multiplied by the factors before, those of the first side among them. weights: the first side's after;
    None stands for 1.
    layer: not linear, of which nothing is left to do. Asynchronous on the current stream.

    Raises:
        KernelError: a text is missing from the installation.
    """
    vectors = () if weights is None else (weights,)
    _launch(programs.scalar_function(layer, B.shape[1], bool(vectors)), B, *vectors)


def weighted_cosines(B: Array, weights: Array, phases: Array) -> None:
    """In place of B (n, m): weights (n,) times cos(B + phases), phases (m,); asynchronous, and raises, as well."""
    _launch(programs.weighted_cosines(B.shape[1]), B, weights, phases)


def kernel_values(kernel: DotProduct | FullyConnected, B: Array, weights: Array, others: Array) -> None:
    """In place of cosines B (n, m): kappa of them, times weights (n,) and others (m,).

    kernel: of one output; its ``weights`` are those of either side. Asynchronous, and raises, as ``scalar_function``.
    """
    _launch(programs.kernel_values(kernel, B.shape[1]), B, weights, others)


def _launch(program: programs.Program, B: Array, *vectors: Array) -> None:
    plain = (namespace(B).ascontiguousarray(vector, np.float32) for vector in vectors)
    device.launch(program, -(-B.size // programs.BLOCK_ENTRIES), (B, *plain, np.int64(B.size)))
