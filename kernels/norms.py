"""Patch norms of every layer, from the band of each image's own Gram arrays that they need (SPEC C6)."""

from __future__ import annotations

import math

import numpy as np

from .arrays import Array, namespace
from .displacements import Displacements
from .network import Network


def patch_norms(network: Network, images: Array) -> list[Array]:
    """Patch norms of every layer of images (n, h, w, c): (n, positions) each, in the dtype of the images.

    Computed in float64, images by the block. The last layer's norms are a diagonal, and each pooling asks for as
    many neighbouring displacements as its windows reach.
    """
    xp = namespace(images)
    band = Displacements(network, False, xp, np.dtype(np.float64), images.shape[3], norms=True)
    norms = [xp.empty((len(images), math.prod(stage.grid)), images.dtype) for stage in network.stages]
    for start in range(0, len(images), band.pairs_per_block):
        part = slice(start, start + band.pairs_per_block)
        for norm, values in zip(norms, band.norms(images[part].astype(np.float64)), strict=True):
            norm[part] = values
    return norms
