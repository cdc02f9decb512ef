"""Compiled code for convolutional kernels on the host: optional, absent where it was not built."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..arrays import Array
from ..base import Prepared
from ..network import Network


def name(image: Array) -> str:
    """``compiled`` and the instruction set."""
    raise NotImplementedError


def obstacle(network: Network, tangent: bool | Literal["both"], image: Array) -> str | None:
    """Why this path cannot take the network; None if it can."""
    return "the compiled path was not built"


def pair(
    network: Network,
    tangent: bool | Literal["both"],
    a: Prepared,
    b: Prepared,
    same: tuple[np.ndarray, np.ndarray],
) -> Array:
    """As ``fused.Path.pair``."""
    raise NotImplementedError


def diag(network: Network, tangent: bool | Literal["both"], a: Prepared) -> Array:
    """As ``fused.Path.diag``."""
    raise NotImplementedError


def patch_norms(network: Network, images: Array) -> list[Array]:
    """As ``fused.Path.patch_norms``."""
    raise NotImplementedError
