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

LARGEST_DEGREE = 1000
LARGEST_DEPTH = 1000
SMALLEST_SIGMA = 1e-18
"""Below it 1/sigma^2 comes near the largest float32."""

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


def share(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1:
        raise KernelError(f"{name} must be a number from 0 to 1, got {value!r}")
    return number


def bandwidth(name: str, value: Any) -> float:
    """A sigma, of which 1/sigma^2 is taken."""
    value = positive(name, value)
    if value < SMALLEST_SIGMA:
        raise KernelError(
            f"{name} must be at least {SMALLEST_SIGMA:g}, got {value!r}: 1/{name}^2 would overflow"
        )
    return value


def unit_exponent(name: str, value: Any) -> float:
    value = positive(name, value)
    if value > 1:
        raise KernelError(
            f"{name} must be at most 1, got {value!r}: beyond it the kernel is not positive definite"
        )
    return value


def whole(least: int, most: int | None = None) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise KernelError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if most is not None and int(value) > most:
            raise KernelError(f"{name} must be at most {most}, got {value!r}")
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
    # First what belongs elsewhere: it explains why another one is missing.
    for name, value in given.items():
        if name not in wanted and value is not None:
            owners = " and ".join(repr(other) for other in table if name in table[other])
            belongs = f", it belongs to {owners}" if owners else ""
            takes = f"takes {', '.join(wanted)}" if wanted else "takes no parameter"
            raise KernelError(f"{name} has no meaning for kernel {kernel!r}{belongs}: {kernel} {takes}")
    filled: dict[str, Any] = {}
    for name, value in given.items():
        if name not in wanted:
            filled[name] = None
            continue
        check, default = wanted[name]
        if value is None:
            if default is REQUIRED:
                raise KernelError(f"{name} is missing: kernel {kernel!r} needs it")
            value = default
        filled[name] = check(name, value)
    return filled
