"""A device that is the host: CUDA programs compiled as C++, one fibre for each thread."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernels.cuda.programs import Program

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = (
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-march=native",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
)
# The order of threads is fixed here, and these two are what the compiler of a device knows and this one does not.
FLAGS += ("-Wno-unknown-pragmas", "-Wno-unused-parameter")

IN_PLACE = ("scalar_function", "weighted_cosines", "kernel_values")
"""Programs that work in place, on arrays and then a size."""


class HostDevice:
    """Stands for ``kernels.cuda.device``.

    folder: where compiled programs are kept. limit: bytes of shared memory of a block; memory: bytes that are free.
    backwards: warps run last to first between barriers, which shows where a barrier is missing.
    """

    def __init__(
        self, folder: Path, limit: int = 166_912, memory: int = 1 << 30, flags: Sequence[str] = ("-O1",)
    ) -> None:
        self.backwards = False
        self.launches: list[tuple[Program, int]] = []
        self._folder = folder
        self._limit = limit
        self._memory = memory
        self._flags = (*FLAGS, *flags)

    def shared_limit(self) -> int:
        return self._limit

    def free_bytes(self) -> int:
        return self._memory

    def launch(self, program: Program, count: int, arguments: Sequence[np.ndarray | np.int64]) -> None:
        assert all(argument.flags.c_contiguous for argument in arguments)
        dtypes = [argument.dtype for argument in arguments]
        if program.name in IN_PLACE:
            assert dtypes == [np.float32] * (len(dtypes) - 1) + [np.int64]
        else:
            assert dtypes == [np.float32] * 4 + [np.int32] * 3 + [np.float32] * 2
            for results in arguments[-2:]:
                results[...] = np.nan  # what the program forgets to write shows
        # Each is eight bytes: an address, or the size that ends the arguments of programs that work in place.
        words = (argument.ctypes.data if argument.ndim else int(argument) for argument in arguments)
        pointers = (ctypes.c_void_p * len(arguments))(*words)
        given = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(pointers) + n * ctypes.sizeof(ctypes.c_void_p) for n in range(len(arguments)))
        )
        message = self.compiled(program)(count, program.blocks, int(self.backwards), given, len(arguments))
        self.launches.append((program, count))
        assert message is None, message.decode()

    def compiled(self, program: Program):
        text = (
            f'#include "before.hpp"\n{program.source}\n#define KERNEL {program.name}\n#include "after.hpp"\n'
        )
        key = hashlib.sha256("\n".join([*self._flags, text]).encode()).hexdigest()[:24]
        library = self._folder / f"{key}.so"
        if not library.exists():
            source = library.with_suffix(".cpp")
            source.write_text(text)
            assert COMPILER is not None
            command = [COMPILER, *self._flags, f"-I{HERE}", "-o", str(library), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
        launch = ctypes.CDLL(str(library)).launch
        launch.restype = ctypes.c_char_p
        launch.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        return launch
