"""The compiled part of the package: optional, one library for each instruction set. All else is in pyproject.toml."""

import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("kernels/native")
SOURCES = runpy.run_path(str(NATIVE / "sources.py"))["digest"](NATIVE)
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [
    "-fvisibility=hidden",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # GCC's own intrinsics warn
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]

setup(
    ext_modules=[
        Extension(
            f"kernels.native._{name}",
            [str(NATIVE / f"{name}.cpp")],
            # The libraries say what they were made from, so a change of any source is a change of them.
            depends=[str(path) for path in (*sorted(NATIVE.glob("*.hpp")), NATIVE / "library.py")],
            define_macros=[("SOURCES", f'"{SOURCES}"')],
            extra_compile_args=FLAGS + flags,
            language="c++",
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]
)
