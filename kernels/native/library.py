"""Finding and calling the compiled code: one library for each instruction set, the best one is taken."""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..base import KernelError
from ..layers import Layer
from ..network import Network, Support, Tangent
from ..support import through_patches
from .sources import digest

VARIABLE = "MEGAGRAM_INSTRUCTION_SET"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
"""Each has wider vectors than the one before, and the last one that the processor knows is taken. The baseline is what
every processor of the architecture has."""

_FUNCTIONS = {"exponential": 0, "relu": 1, "polynomial": 2, "linear": 2, "square": 2}
_TANGENTS: dict[Tangent, int] = {False: 0, True: 1, "both": 2}


class NotBuilt(KernelError):
    """There is no compiled code for what was asked."""


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("function", "degree", "homogeneous", "patch")),
        *((name, c_int32) for name in ("height", "width", "pooled_height", "pooled_width")),
        *((name, c_int32) for name in ("passes_on", "halved")),
        *((name, c_double) for name in ("number", "floor", "patch_weight")),
        *((name, POINTER(c_double)) for name in ("rows", "columns")),
        *((name, POINTER(c_uint8)) for name in ("support_rows", "support_columns")),
        *((name, POINTER(c_uint8)) for name in ("pooled_rows", "pooled_columns")),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "channels", "periodic", "tangent")),
        ("layer", POINTER(_Layer)),
        *((name, POINTER(c_double)) for name in ("row_weights", "column_weights")),
    )


def path(instruction_set: str) -> Path:
    """Where the library for an instruction set is, if it was built."""
    return Path(__file__).with_name(f"_{instruction_set}{sysconfig.get_config_var('EXT_SUFFIX')}")


class Library:
    """The compiled code for one instruction set."""

    def __init__(self, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        file = path(instruction_set)
        if not file.exists():
            raise NotBuilt(
                "the compiled path was not built: install megagram again where there is a C++ compiler"
            )
        try:
            self.code = ctypes.CDLL(str(file))
        except OSError as error:
            raise NotBuilt(f"{file} cannot be loaded ({error}): install megagram again") from None
        images = (c_int64, c_void_p, POINTER(c_void_p))
        plan = (c_void_p, c_int)
        try:
            for name, result, arguments in (
                ("sources", c_char_p, ()),
                ("lanes", c_int, (c_int,)),
                ("make_plan", c_int, (POINTER(_Network), c_int, POINTER(c_void_p))),
                ("free_plan", None, plan),
                ("scratch_bytes", c_int, (*plan, POINTER(c_size_t))),
                ("pairs", c_int, (*plan, *images, *images, c_void_p, c_void_p, c_int64, c_int64)),
                ("paired", c_int, (*plan, *images, *images, c_int, c_void_p)),
                ("patch_norms", c_int, (*plan, *images)),
                ("map_entries", None, (*(c_int,) * 3, c_double, c_int64, c_int64, c_void_p, c_void_p)),
                ("add_products", c_int, (c_void_p, c_int, *(c_int64,) * 4, *(c_void_p,) * 4)),
            ):
                function = getattr(self.code, name)
                function.restype, function.argtypes = result, arguments
            built_from = self.code.sources().decode()
        except AttributeError:
            built_from = None
        # In a checkout sources move on while libraries stay; calling one of another shape would crash.
        if built_from is None or built_from != (digest(Path(__file__).parent) or built_from):
            raise NotBuilt(f"{file} was built from other sources: install megagram again")

    def map_entries(self, layer: Layer, B: np.ndarray, weights: np.ndarray | None) -> None:
        """In place of inner products B (n, m), C-contiguous: what ``pointwise.apply`` makes of them, times weights
        (n,) of rows in the dtype of B; None stands for 1. layer: not linear."""
        if weights is not None:
            weights = np.ascontiguousarray(weights, B.dtype)
        shift = layer.number() if layer.kernel == "exponential" else 0.0
        self.code.map_entries(
            B.itemsize,
            *_function(layer),
            shift,
            *B.shape,
            None if weights is None else weights.ctypes.data,
            B.ctypes.data,
        )

    def lanes(self, dtype: np.dtype) -> int:
        """How many second images go together."""
        return self.code.lanes(dtype.itemsize)

    def add_products(
        self,
        block: np.ndarray,
        V_columns: np.ndarray | None,
        V_rows: np.ndarray | None,
        out_rows: np.ndarray | None,
        out_columns: np.ndarray | None,
    ) -> None:
        """Add block @ V_columns to ``out_rows`` and block.T @ V_rows to ``out_columns``, or one of the two where the
        arrays of the other are None; the interpreter's lock is released.

        block: (n, m) float32 or float64. V_columns, out_columns: (m, t), V_rows, out_rows: (n, t), float64, the
        results in C order.
        """
        n, m = block.shape
        if block.strides[1] != block.itemsize or not block.flags.aligned:
            block = np.array(block, order="C")
        V = [None if one is None else np.ascontiguousarray(one) for one in (V_columns, V_rows)]
        t = next(one.shape[1] for one in V if one is not None)
        if 0 in (n, m, t):
            return
        pointers = (None if one is None else one.ctypes.data for one in (*V, out_rows, out_columns))
        arguments = (block.ctypes.data, block.itemsize, block.strides[0], n, m, t)
        _check(self.code.add_products(*arguments, *pointers), "products with a few columns")


class Plan:
    """A network as the compiled code knows it, for images with so many channels of one dtype.

    supports: for each layer the pairs of positions at which its function is needed. halved: layers that are asked for
    one of a pair of rows and its mirror image, which counts for both (``support.half``).
    """

    def __init__(
        self,
        library: Library,
        network: Network,
        supports: Sequence[Support],
        tangent: Tangent,
        channels: int,
        dtype: np.dtype,
        halved: Sequence[int] = (),
    ) -> None:
        self._code = library.code
        self._itemsize = dtype.itemsize
        keep = []

        def pointer(values: np.ndarray, kind: Any) -> Any:
            keep.append(np.ascontiguousarray(values, kind))
            return keep[-1].ctypes.data_as(POINTER(kind))

        layers = (_Layer * len(network.stages))()
        for number, (entry, stage, support) in enumerate(zip(layers, network.stages, supports, strict=True)):
            layer = stage.layer
            entry.function, entry.degree = _function(layer)
            entry.homogeneous = layer.kernel != "square"
            entry.patch = layer.patch
            entry.height, entry.width = stage.grid
            entry.pooled_height, entry.pooled_width = len(stage.rows), len(stage.columns)
            entry.number = layer.number() if layer.kernel in ("exponential", "linear") else 1.0
            entry.floor = layer.floor
            entry.patch_weight = 1 / layer.patch**2 if layer.patch_norm else 1.0
            entry.rows, entry.columns = pointer(stage.rows, c_double), pointer(stage.columns, c_double)
            entry.support_rows, entry.support_columns = (pointer(mask, c_uint8) for mask in support)
            entry.passes_on = stage.passes_on and number + 1 < len(layers)
            entry.halved = number in halved
            if number + 1 < len(layers):
                patch = network.stages[number + 1].layer.patch
                entry.pooled_rows, entry.pooled_columns = (
                    pointer(through_patches(mask, patch, network.periodic), c_uint8)
                    for mask in supports[number + 1]
                )
        weights = (pointer(weight, c_double) for weight in network.trace_weights)
        first = ctypes.cast(layers, POINTER(_Layer))
        description = _Network(len(layers), channels, network.periodic, _TANGENTS[tangent], first, *weights)
        self._plan = c_void_p()
        _check(self._code.make_plan(description, self._itemsize, self._plan), "the plan of a network")
        counted = c_size_t()
        _check(self._code.scratch_bytes(self._plan, self._itemsize, counted), "the plan of a network")
        self.scratch_bytes: int = counted.value
        """Memory that a call takes on each thread, the plan included; a bound."""

    def __del__(self) -> None:
        if getattr(self, "_plan", None):
            self._code.free_plan(self._plan, self._itemsize)

    def pairs(
        self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], same: np.ndarray, out: np.ndarray
    ) -> None:
        """Fill ``out`` (outputs, n, m) for n first and m second images, at most as many as there are lanes.

        first, second: images and then their patch norms in each layer, C-contiguous; same: (n,) int64, which
        second image each first one is, -1 for none.
        """
        strides = (stride // out.itemsize for stride in out.strides[:2])
        self._call("pairs", *_images(first), *_images(second), same.ctypes.data, out.ctypes.data, *strides)

    def paired(
        self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], same: bool, out: np.ndarray
    ) -> None:
        """Fill ``out`` (outputs, n), C-contiguous, for first images (with patch norms), each with the second one of
        its number; same: they are the same samples."""
        self._call("paired", *_images(first), *_images(second), same, out.ctypes.data)

    def patch_norms(self, images: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Fill ``out``, for each layer (n, positions), C-contiguous, in the dtype of the images."""
        self._call("patch_norms", *_images((images, *out)), itemsize=images.itemsize)

    def _call(self, name: str, *arguments: Any, itemsize: int | None = None) -> None:
        code = getattr(self._code, name)(self._plan, itemsize or self._itemsize, *arguments)
        _check(code, f"{self.scratch_bytes} bytes of scratch arrays")


def _function(layer: Layer) -> tuple[int, int]:
    """The scalar function of a layer as the compiled code names it, and its degree."""
    degree = {"polynomial": int(layer.number()), "square": 2}.get(layer.kernel, 1)
    return _FUNCTIONS[layer.kernel], degree


def _check(code: int, wanted: str) -> None:
    """Raise what a return code of the compiled code stands for."""
    if code == 1:
        raise MemoryError(f"no memory for {wanted}")
    if code:
        raise KernelError(
            f"the compiled path failed with {wanted}: set MEGAGRAM_KERNEL_PATH=general to do without"
        )


def _images(arrays: Sequence[np.ndarray]) -> tuple[int, int, Any]:
    """What the compiled code takes for images with an array for each layer."""
    image, *layers = arrays
    return len(image), image.ctypes.data, (c_void_p * len(layers))(*(array.ctypes.data for array in layers))


def load() -> Library:
    """The library of the best instruction set, or of the one that the environment asks for.

    Raises:
        NotBuilt: there is none, or not the one asked for.
        KernelError: the environment asks for an instruction set that is unknown, or not this processor's.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *INSTRUCTION_SETS):
        raise KernelError(f"{VARIABLE}={wanted} is unknown: choose from {', '.join(INSTRUCTION_SETS)}")
    available = INSTRUCTION_SETS[: 1 + _library("baseline").code.processor()]
    if wanted and wanted not in available:
        raise KernelError(
            f"{VARIABLE}={wanted}, but this processor has no such instructions: "
            f"choose from {', '.join(available)}"
        )
    for instruction_set in reversed(available):
        if wanted in ("", instruction_set):
            try:
                return _library(instruction_set)
            except NotBuilt:
                if wanted or instruction_set == "baseline":
                    raise
    raise AssertionError("the baseline was tried")


def _library(instruction_set: str) -> Library:
    found = _library_or_why_not(instruction_set)
    if isinstance(found, str):
        raise NotBuilt(found)
    return found


@cache
def _library_or_why_not(instruction_set: str) -> Library | str:
    """Also the reason is found once: a path is chosen for every block, and telling a library's sources reads them."""
    try:
        return Library(instruction_set)
    except NotBuilt as error:
        return str(error)
