"""A block of a matrix times a few columns, and its transpose times others: what products with a stored Gram matrix are
made of.

The compiled code goes over a block once, converting its entries to float64 in registers; NumPy, or CuPy where the block
is on a device, multiplies it in pieces by the linear algebra library. The compiled code runs on the host, in float64
and for up to ``FEW`` columns, where it was built and ``MEGAGRAM_KERNEL_PATH`` is not ``general``. Both agree to the
rounding of float64. The bits follow from shapes and values, and from which of the two it was: of the compiled code
from the instruction set too, of the other from the linear algebra library; not from where a block lies, nor from how
far its rows are apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .arrays import Array
from .fused import asked
from .native.library import Library, NotBuilt, load

FEW = 64
"""With more columns linear algebra libraries are as quick."""

BLOCK = 256
"""Rows and columns that NumPy converts and multiplies at a time: they stay in the cache, and a product of this size
with few columns is one that linear algebra libraries do without packing it first."""

NARROW = 32
"""So many columns are few for them."""


def add_product(block: Array, V: Array, out: Array) -> None:
    """Add block @ V to ``out``.

    block: (n, m) float32 or float64, any strides. V: (m, t), whose dtype is multiplied in. out: (n, t) float64.
    """
    code = _compiled(block, V, out)
    if code is None:
        for rows, columns in _pieces(block, V):
            out[rows] += block[rows, columns].astype(V.dtype, copy=False) @ V[columns]
    elif block.strides[0] == block.itemsize < block.strides[1]:
        code.add_products(block.T, None, V, None, out)
    else:
        code.add_products(block, V, None, out, None)


def add_both_products(
    block: Array, V_columns: Array, V_rows: Array, out_rows: Array, out_columns: Array
) -> None:
    """Add block @ V_columns to ``out_rows`` and block.T @ V_rows to ``out_columns``, converting each entry once.

    block: (n, m) float32 or float64, any strides. V_columns: (m, t) and V_rows: (n, t), of one dtype, which is
    multiplied in. out_rows: (n, t) and out_columns: (m, t), float64.
    """
    code = _compiled(block, V_columns, out_rows, out_columns)
    if code is None:
        for rows, columns in _pieces(block, V_columns):
            some = block[rows, columns].astype(V_columns.dtype, copy=False)
            out_rows[rows] += some @ V_columns[columns]
            out_columns[columns] += some.T @ V_rows[rows]
    else:
        code.add_products(block, V_columns, V_rows, out_rows, out_columns)


def _compiled(block: Array, V: Array, *out: Array) -> Library | None:
    """The compiled code, where it can add products of these to ``out``.

    Raises:
        KernelError: ``MEGAGRAM_KERNEL_PATH`` is misspelt, or ``MEGAGRAM_INSTRUCTION_SET`` is, or names what this
            processor lacks.
    """
    if asked() == "general" or not isinstance(block, np.ndarray):
        return None
    if block.dtype not in (np.float32, np.float64) or V.dtype != np.float64 or V.shape[1] > FEW:
        return None
    if not all(one.flags.c_contiguous for one in out):
        return None
    try:
        return load()
    except NotBuilt:
        return None


def _pieces(block: Array, V: Array) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges that cover a block."""
    n, m = block.shape
    whole = not isinstance(block, np.ndarray) or (block.dtype == V.dtype and V.shape[1] > NARROW)
    step = max(n, m, 1) if whole else BLOCK
    for i in range(0, n, step):
        for j in range(0, m, step):
            yield slice(i, min(i + step, n)), slice(j, min(j + step, m))
