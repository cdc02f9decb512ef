"""The compiled part of the package: optional, one library for each instruction set. All else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("kernels/native")
SOURCES = runpy.run_path(str(NATIVE / "sources.py"))

setup(
    options={"build_ext": {"parallel": True}},
    ext_modules=[
        Extension(
            f"kernels.native._{name}",
            [str(NATIVE / f"{name}.cpp")],
            # The libraries say what they were made from, so a change of any source is a change of them.
            depends=[str(path) for path in SOURCES["made_from"](NATIVE)],
            define_macros=[("SOURCES", f'"{SOURCES["digest"](NATIVE)}"')],
            extra_compile_args=[*SOURCES["FLAGS"], *flags],
            language="c++",
            optional=True,
        )
        for name, flags in SOURCES["INSTRUCTION_FLAGS"].items()
    ],
)
