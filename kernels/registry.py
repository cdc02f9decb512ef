"""From a description (a table of JSON or TOML) to a kernel, and back by ``Kernel.describe``.

Kernels of other people come in by the entry point group ``megagram.kernels``: the name is the kind, the
object a callable from the table to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .base import Builder, Kernel, KernelError, Product, Scaled, Sum
from .convolutional import Convolutional, Layer
from .deep import FullyConnected
from .dot_product import DotProduct
from .features.base import FeatureMap
from .features.ckn import NystromCKN
from .features.convolutional_random import ConvolutionalRandom
from .features.monomials import Monomials
from .features.nystrom import NystromFeatures
from .features.random import RandomFeatures
from .features.tangent import ConvolutionalTangentRandom
from .groups import RotoTranslation
from .parameters import nearest

ENTRY_POINTS = "megagram.kernels"

_BuiltIn = Callable[[Mapping[str, Any], str, Sequence[str]], Kernel]
"""As ``from_description``: from a table, its path and the keys valid beside its own."""

_registered: dict[str, Builder] = {}


def register(kind: str, builder: Builder) -> None:
    """Make ``from_description`` hand tables of ``kind`` to ``builder``; the last registration counts.

    Raises:
        KernelError: when ``kind`` is one of the built-in kinds.
    """
    if kind in _BUILT_IN:
        raise KernelError(f"kind {kind!r} is built in and cannot be registered anew")
    _registered[kind] = builder


def kinds() -> tuple[str, ...]:
    """Every kind that ``from_description`` knows, sorted."""
    return tuple(sorted({*_BUILT_IN, *_registered, *_foreign()}))


def from_description(table: Mapping[str, Any], path: str = "kernel", *, beside: Sequence[str] = ()) -> Kernel:
    """The kernel that ``table`` describes.

    path: where the table stands, for error messages. beside: keys that are valid there as well and that the
    caller has read and taken out.

    Raises:
        KernelError: unknown kind or key (the nearest valid one is named), or an invalid value.
        Exception: of a registered kernel, what it raised with an ``exit_code`` of its own.
    """
    if not isinstance(table, Mapping):
        raise KernelError(f"{path} must be a table, got {type(table).__name__}")
    if "kind" not in table:
        raise KernelError(f"{path}.kind is missing: choose from {', '.join(kinds())}")
    kind = table["kind"]
    if not isinstance(kind, str) or kind not in kinds():
        raise KernelError(f"{path}.kind = {kind!r} is unknown: {nearest(str(kind), kinds())}")
    if kind in _BUILT_IN:
        return _BUILT_IN[kind](table, path, beside)
    return _build(kind, table, path)


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _build(kind: str, table: Mapping[str, Any], path: str) -> Kernel:
    """A kernel from outside this package: whatever its code raises becomes one clear line."""
    source = "registered in this process"
    try:
        if kind in _registered:
            builder = _registered[kind]
        else:
            point = _foreign()[kind]
            source = f"entry point {point.value}"
            builder = point.load()
        kernel = builder(table)
    except KernelError as error:
        raise KernelError(f"{path}: {error}") from error
    except Exception as error:
        if hasattr(error, "exit_code"):  # meant for the user as it is
            raise
        raise KernelError(
            f"{path}: kind {kind!r} ({source}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(kernel, Kernel):
        raise KernelError(f"{path}: kind {kind!r} ({source}) made a {type(kernel).__name__}, not a Kernel")
    return kernel


def _keys(
    table: Mapping[str, Any],
    allowed: Sequence[str],
    required: Sequence[str],
    path: str,
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """The table without ``kind``, its keys checked; ``beside`` as in ``from_description``."""
    for key in table:
        if key not in allowed and key != "kind":
            known = {*allowed, *beside, "kind"}
            raise KernelError(f"{path}.{key} is not a key here: {nearest(str(key), known)}")
    for key in required:
        if key not in table:
            raise KernelError(f"{path}.{key} is missing")
    return {key: value for key, value in table.items() if key != "kind"}


def _make(cls: Callable[..., Any], values: Mapping[str, Any], path: str) -> Any:
    """Construct; messages of the checks begin with the key, so the path goes in front."""
    try:
        return cls(**values)
    except KernelError as error:
        raise KernelError(f"{path}.{error}") from None


def _tables(value: Any, path: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise KernelError(f"{path} must be a list of tables with at least one entry")
    return list(value)


def _flat(cls: type[DotProduct] | type[FullyConnected], required: str) -> _BuiltIn:
    def build(table: Mapping[str, Any], path: str, beside: Sequence[str]) -> Kernel:
        values = _keys(table, [f.name for f in fields(cls)], [required], path, beside)
        return _make(cls, values, path)

    return build


def _layered(cls: type[Convolutional] | type[RotoTranslation], required: Sequence[str]) -> _BuiltIn:
    def build(table: Mapping[str, Any], path: str, beside: Sequence[str]) -> Kernel:
        values = _keys(table, [f.name for f in fields(cls)], required, path, beside)
        layers = []
        for number, entry in enumerate(_tables(values["layers"], f"{path}.layers")):
            here = f"{path}.layers[{number}]"
            if not isinstance(entry, Mapping):
                raise KernelError(f"{here} must be a table, got {type(entry).__name__}")
            names = [f.name for f in fields(Layer)]
            if "kind" in entry:
                raise KernelError(f"{here}.kind is not a key here: {nearest('kind', names)}")
            layers.append(_make(Layer, _keys(entry, names, ["patch", "kernel"], here), here))
        return _make(cls, {**values, "layers": tuple(layers)}, path)

    return build


def _composite(cls: type[Sum] | type[Product]) -> _BuiltIn:
    def build(table: Mapping[str, Any], path: str, beside: Sequence[str]) -> Kernel:
        terms = []
        values = _keys(table, ["terms"], ["terms"], path, beside)
        for number, entry in enumerate(_tables(values["terms"], f"{path}.terms")):
            here = f"{path}.terms[{number}]"
            if not isinstance(entry, Mapping):
                raise KernelError(f"{here} must be a table, got {type(entry).__name__}")
            if entry.get("kind") == "scaled":
                terms.append(from_description(entry, here))
                continue
            weight = _weight(entry.get("weight", 1.0), here)
            unweighted = {key: value for key, value in entry.items() if key != "weight"}
            term = from_description(unweighted, here, beside=["weight"])
            terms.append(term if weight == 1 else Scaled(term, weight))
        try:
            return cls(tuple(terms))
        except KernelError as error:
            raise KernelError(f"{path}: {error}") from None

    return build


def _map(cls: type[FeatureMap] | type[ConvolutionalTangentRandom]) -> _BuiltIn:
    def build(table: Mapping[str, Any], path: str, beside: Sequence[str]) -> Kernel:
        values = _keys(table, _map_keys(cls), _required(cls), path, beside)
        kernel = from_description(values["kernel"], f"{path}.kernel")
        return _make(cls, {**_tuples(values), "kernel": kernel}, path)

    return build


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _map_keys(cls: type[FeatureMap] | type[ConvolutionalTangentRandom]) -> list[str]:
    return [f.name for f in fields(cls) if f.name != "arrays"]


def _required(cls: type[FeatureMap] | type[ConvolutionalTangentRandom]) -> list[str]:
    return [f.name for f in fields(cls) if f.default is MISSING]


def feature_map(
    table: Mapping[str, Any], kernel: Kernel, seed: int, path: str = "features", *, beside: Sequence[str] = ()
) -> FeatureMap:
    """The map that stands for ``kernel`` as ``table`` says: its ``kind`` and parameters.

    seed: of what is drawn at random, unless the table has one of its own. path: where the table stands, for error
    messages. beside: as in ``from_description``.

    Raises:
        KernelError: unknown kind or key (the nearest valid one is named), an invalid value, or a map that cannot
            stand for the kernel.
    """
    kind = table.get("kind")
    if kind is None:
        raise KernelError(f"{path}.kind is missing: choose from {', '.join(sorted(_MAPS))}")
    if not isinstance(kind, str) or kind not in _MAPS:
        raise KernelError(f"{path}.kind = {kind!r} is unknown: {nearest(str(kind), sorted(_MAPS))}")
    cls = _MAPS[kind]
    keys = [key for key in _map_keys(cls) if key not in ("kernel", "learned")]
    values = _keys(table, keys, [key for key in _required(cls) if key != "kernel"], path, beside)
    if "seed" in keys:
        values = {"seed": seed, **values}
    made: FeatureMap = _make(cls, {**_tuples(values), "kernel": kernel}, path)
    return made


def _scaled(table: Mapping[str, Any], path: str, beside: Sequence[str]) -> Kernel:
    values = _keys(table, ["weight", "term"], ["weight", "term"], path, beside)
    weight = _weight(values["weight"], path)
    return Scaled(from_description(values["term"], f"{path}.term"), weight)


def _weight(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise KernelError(f"{path}.weight must be a finite number that is not negative, got {value!r}")
    return float(value)


_MAPS: dict[str, type[FeatureMap]] = {
    RandomFeatures.kind: RandomFeatures,
    Monomials.kind: Monomials,
    NystromFeatures.kind: NystromFeatures,
    ConvolutionalRandom.kind: ConvolutionalRandom,
    NystromCKN.kind: NystromCKN,
}
"""Feature maps by kind."""

_BUILT_IN: dict[str, _BuiltIn] = {
    DotProduct.kind: _flat(DotProduct, "kernel"),
    FullyConnected.kind: _flat(FullyConnected, "family"),
    Convolutional.kind: _layered(Convolutional, ["layers"]),
    RotoTranslation.kind: _layered(RotoTranslation, ["layers", "final"]),
    Sum.kind: _composite(Sum),
    Product.kind: _composite(Product),
    Scaled.kind: _scaled,
    ConvolutionalTangentRandom.kind: _map(ConvolutionalTangentRandom),
    **{kind: _map(cls) for kind, cls in _MAPS.items()},
}
