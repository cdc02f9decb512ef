"""Sizes of a feature map: how a person writes them, and the maps of these sizes in the place of an experiment's own."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernels.base import Kernel
from kernels.registry import feature_map, from_description

from ..errors import ExperimentError
from ..experiment import Experiment
from .measures import MEASURES

SIZE_KEYS = {
    "random": "widths",
    "convolutional-random": "widths",
    "convolutional-tangent-random": "widths",
    "nystrom": "landmarks",
    "nystrom-ckn": "anchors",
}
"""By kind of map, the parameter that says how many features there are; maps of other kinds have no size."""

_SIZE = re.compile(r"[0-9]+(x[0-9]+)*")


@dataclass(frozen=True)
class Size:
    """One number for all layers of a map, or one for each; 0 for a layer that is left out."""

    numbers: tuple[int, ...]

    def value(self, own: Any) -> int | list[int]:
        """As it stands in an experiment's table, in the place of ``own``: where that lists layers, a single number
        counts for all of them but those that it leaves out with a zero."""
        if len(self.numbers) > 1:
            return list(self.numbers)
        (number,) = self.numbers
        return [number if count else 0 for count in own] if isinstance(own, list | tuple) else number

    @property
    def text(self) -> str:
        return "x".join(map(str, self.numbers))


def read_sizes(text: str) -> tuple[Size, ...]:
    """Sizes from ``64,256,1024``, or with a number for each layer ``64x256,64x1024``.

    Raises:
        ExperimentError: not numbers from 1 on, numbers of different layers, or sizes that do not grow: each must be
            larger than the one before in some layer and smaller in none. Layers of 0 stay so.
    """
    sizes = []
    for part in text.split(","):
        part = part.strip()
        if not _SIZE.fullmatch(part) or not any(int(number) for number in part.split("x")):
            raise ExperimentError(
                f'--features {text}: "{part}" is no size; give whole numbers such as 64,256,1024, or one for each'
                " layer such as 64x256,64x1024"
            )
        sizes.append(Size(tuple(int(number) for number in part.split("x"))))
    for before, after in itertools.pairwise(sizes):
        if len(before.numbers) != len(after.numbers):
            raise ExperimentError(
                f"--features {text}: {before.text} and {after.text} have different numbers of layers"
            )
        grows = all(a >= b and (b or not a) for a, b in zip(after.numbers, before.numbers, strict=True))
        if not grows or after == before:
            raise ExperimentError(
                f"--features {text}: sizes must increase, and {after.text} is not larger than {before.text}"
            )
    return tuple(sizes)


def read_target(text: str) -> tuple[str, float]:
    """A measure and the error that it is to reach, from ``relF=0.01``.

    Raises:
        ExperimentError: another measure, or no number above zero.
    """
    measure, _, value = text.partition("=")
    try:
        error = float(value)
    except ValueError:
        error = math.nan
    if measure.strip() not in MEASURES or not 0 < error < math.inf:
        raise ExperimentError(
            f"--target {text}: give {', '.join(MEASURES[:-1])} or {MEASURES[-1]} and a number above zero, such as"
            " relF=0.01"
        )
    return measure.strip(), error


def has_features(experiment: Experiment) -> bool:
    """Whether an experiment has ``[features]``, or its kernel is random and knows the exact one."""
    return experiment.features is not None or isinstance(experiment.kernel.get("kernel"), dict)


@dataclass(frozen=True)
class Approximation:
    """What an experiment compares: the exact kernel's table, and the map's or random kernel's, whose size is ``key``.

    as_features: the map stands in ``[features]``, else it is the experiment's ``[kernel]``, around the exact one.
    """

    exact: dict[str, Any]
    table: dict[str, Any]
    key: str
    seed: int
    as_features: bool

    @classmethod
    def of(cls, experiment: Experiment) -> Approximation:
        """Of an experiment with ``[features]``, or whose kernel is random and knows the exact one.

        Raises:
            ExperimentError: the experiment has neither, or what it has is of no size.
        """
        if experiment.features is not None:
            exact, table = experiment.kernel, experiment.features.parameters
        elif has_features(experiment):
            exact, table = experiment.kernel["kernel"], experiment.kernel
        else:
            raise ExperimentError(
                f"{experiment.name} has no [features] to compare with its kernel; add a table such as"
                ' [features] kind = "random", widths = 1024'
            )
        kind = table.get("kind")
        if kind not in SIZE_KEYS:
            raise ExperimentError(
                f'{experiment.name}: features of kind "{kind}" have no size to vary; compare takes'
                f" {', '.join(SIZE_KEYS)}"
            )
        key = SIZE_KEYS[kind]
        return cls(dict(exact), dict(table), key, experiment.seed, experiment.features is not None)

    @property
    def kind(self) -> str:
        return str(self.table["kind"])

    def at(self, size: Size, repeat: int = 0) -> Kernel:
        """The map of a size, or the random kernel, drawn under its seed plus ``repeat``; it has not learned yet.

        Raises:
            KernelError: it takes no such size, or cannot stand for the kernel.
        """
        table = {**self.table, self.key: size.value(self.table.get(self.key))}
        made = self._made(table)
        return self._made({**table, "seed": seed_of(made) + repeat}) if repeat else made

    def _made(self, table: dict[str, Any]) -> Kernel:
        if self.as_features:
            return feature_map(table, from_description(self.exact), self.seed)
        return from_description({"seed": self.seed, **table})


def is_drawn(kernel: Kernel) -> bool:
    """Whether anything of a map or kernel is drawn at random, so that repeats differ."""
    return hasattr(kernel, "seed")


def seed_of(kernel: Kernel) -> int:
    return int(getattr(kernel, "seed", 0))


def positions(sizes: Sequence[Size]) -> list[float]:
    """Where sizes stand on an axis: the number that varies, the geometric mean of those that do where several do."""
    varying = _varying(sizes)
    return [
        math.exp(sum(math.log(size.numbers[k]) for k in varying) / len(varying)) if varying else 1.0
        for size in sizes
    ]


def at_position(sizes: Sequence[Size], position: float) -> Size:
    """The size at a position of the axis: the largest of ``sizes`` with the numbers that vary scaled."""
    varying, last = _varying(sizes), sizes[-1]
    factor = position / positions(sizes)[-1]
    return Size(
        tuple(math.ceil(n * factor - 1e-9) if k in varying else n for k, n in enumerate(last.numbers))
    )


def _varying(sizes: Sequence[Size]) -> list[int]:
    if len(sizes) == 1:
        return list(range(len(sizes[0].numbers)))
    layers = zip(*(size.numbers for size in sizes), strict=True)
    return [k for k, numbers in enumerate(layers) if len(set(numbers)) > 1]
