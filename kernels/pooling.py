"""Pooling A: separable, one matrix per axis (SPEC C4, C10). Host arrays: the matrices are small."""

from __future__ import annotations

import numpy as np

KINDS = ("gaussian", "average", "strided", "global")
MODES = ("reference", "same", "periodic")


def output_size(n: int, kind: str, subsampling: int, mode: str) -> int:
    """Grid size after pooling an axis of length n; below 1 where the grid vanishes."""
    if kind == "global":
        return 1
    if mode != "reference":
        return -(-n // subsampling)
    return n // subsampling - (0 if kind == "average" else 1)


def pooling_matrix(n: int, kind: str, subsampling: int, poolfactor: int, mode: str) -> np.ndarray:
    """The matrix H (output size, n), float64, that pools one axis of length n.

    kind: ``gaussian`` with taps proportional to exp(-k^2/poolfactor^2), |k| <= poolfactor; ``average`` of
    poolfactor inputs; ``strided``, one input without blur; ``global``, the mean of all inputs.
    mode: where windows begin and what lies beyond the border (C4). Borders are never renormalised.
    """
    if kind == "global":
        return np.full((1, n), 1 / n)
    if kind == "gaussian":
        offsets = np.arange(-poolfactor, poolfactor + 1)
        taps = np.exp(-((offsets / poolfactor) ** 2))
        taps /= taps.sum()
        if mode == "reference":
            offsets = offsets + poolfactor
    elif kind == "average":
        offsets = np.arange(poolfactor)
        taps = np.full(poolfactor, 1 / poolfactor)
    else:
        offsets = np.array([subsampling if mode == "reference" else 0])
        taps = np.ones(1)
    H = np.zeros((output_size(n, kind, subsampling, mode), n))
    for i, row in enumerate(H):
        inputs = subsampling * i + offsets
        if mode == "periodic":
            np.add.at(row, inputs % n, taps)
        else:
            inside = (inputs >= 0) & (inputs < n)
            row[inputs[inside]] = taps[inside]
    return H
