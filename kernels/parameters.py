"""Checks of kernel parameters: every message begins with the parameter's name, so that a caller can
put the path of the table in front of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from .base import KernelError

REQUIRED: Any = object()
"""Default of a parameter that has none."""

Check = Callable[[str, Any], Any]
Table = Mapping[str, Mapping[str, tuple[Check, Any]]]
"""For each function its parameters, each with its check and its default."""


def nearest(word: str, options: Iterable[str]) -> str:
    """The clause of an error message that names the option nearest to ``word``, or all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(options)}"


def choice(options: Iterable[str]) -> Check:
    valid = tuple(options)

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise KernelError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
        if value not in valid:
            raise KernelError(f"{name} = {value!r} is unknown: {nearest(value, valid)}")
        return value

    return check


def positive(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise KernelError(f"{name} must be a positive number, got {value!r}")
    return number


def unit_exponent(name: str, value: Any) -> float:
    value = positive(name, value)
    if value > 1:
        raise KernelError(
            f"{name} must be at most 1, got {value!r}: beyond it the kernel is not positive definite"
        )
    return value


def whole(least: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise KernelError(f"{name} must be a whole number of at least {least}, got {value!r}")
        return int(value)

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise KernelError(f"{name} must be true or false, got {value!r}")
    return value


def binary_order(name: str, value: Any) -> int:
    if isinstance(value, bool) or value not in (0, 1):
        raise KernelError(f"{name} must be 0 or 1, got {value!r}")
    return int(value)


def function_parameters(kernel: str, given: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """``given`` checked, with defaults filled in where None; parameters of other functions stay None.

    Raises:
        KernelError: a parameter is missing, invalid, or belongs to another function.
    """
    wanted = table[kernel]
    filled: dict[str, Any] = {}
    for name, value in given.items():
        if name not in wanted:
            if value is not None:
                takes = f"it takes {', '.join(wanted)}" if wanted else "it takes no parameter"
                raise KernelError(f"{name} has no meaning for kernel {kernel!r}: {takes}")
            filled[name] = None
            continue
        check, default = wanted[name]
        if value is None:
            if default is REQUIRED:
                raise KernelError(f"{name} is missing: kernel {kernel!r} needs it")
            value = default
        filled[name] = check(name, value)
    return filled
