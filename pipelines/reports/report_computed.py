"""What a report says of time, and of what was computed before the solve: tiles of a matrix, or explicit features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..wording import bytes_text, count_text, kernel_phrase, paths_text, plain_text, seconds_text
from . import plots
from .document import Block, Cell, Figure, Table, Text
from .verdict import Result


def model_phrase(result: Result) -> str:
    """The kernel in a few words, or the features that stand for it."""
    kernel, features = kernel_phrase(result["kernel"]["description"]), result.get("features")
    if not features:
        return kernel
    return f"{count_text(features['width'], 'feature')} of a {_kind(features)} map, which stand for {kernel}"


def counted(result: Result) -> tuple[str, str]:
    """In a line, what was computed and what was found; and by which code."""
    gram, features = result["gram"], result.get("features")
    if not features:
        tiles = f"{gram['tiles_computed']:,} tiles computed, {gram['tiles_reused']:,} reused"
        return tiles, paths_text(gram["paths"])
    if features["blocks"] == "streamed":
        return "features streamed", features["path"]
    blocks = (
        f"{features['blocks_computed']:,} blocks of features computed, {features['blocks_reused']:,} reused"
    )
    return blocks, features["path"]


def computed_rows(result: Result) -> list[list[str]]:
    """Rows (what, value, remark) for a terminal."""
    gram, features = result["gram"], result.get("features")
    if features:
        width = f"{features['width']:,} of each sample"
        blocks = (
            f"{features['blocks_computed']:,} blocks computed, {features['blocks_reused']:,} already stored"
        )
        if features["blocks"] == "streamed":
            blocks = "computed whenever they were read, none stored"
        return [["Features", width, f"by a {_kind(features)} map; {blocks}"]]
    rows = [
        ["Tiles", f"{gram['tiles_computed']:,} computed", f"{gram['tiles_reused']:,} were already stored"]
    ]
    return [*rows, ["Tiles made by", gram.get("recomputed") or paths_text(gram["paths"]), ""]]


def map_rows(result: Result) -> list[tuple[str, str]]:
    """Rows (what, value) on what stands for the kernel: stored or recomputed tiles, or the features of a map."""
    features = result.get("features")
    if not features:
        return [("Tiles", "recomputed" if result["gram"].get("recomputed") else "stored")]
    learned = features["learned"]
    own = {k: v for k, v in features["map"]["description"].items() if k not in ("kind", "kernel", "learned")}
    rows = [
        ("In place of its matrix", f"explicit features: a {_kind(features)} map"),
        ("Parameters of the map", plain_text(own)),
        ("Features", f"{features['width']:,} of each sample, {features['dtype']}"),
        ("Fingerprint of the map", features["map"]["fingerprint"]),
    ]
    if learned is None:
        return [*rows, ("Learned", "nothing: the map follows from its parameters")]
    source = (
        f"from {learned['samples']:,} samples of {learned['source']}, in {seconds_text(learned['seconds'])}"
    )
    return [*rows, ("Learned", source), ("Digest of what was learned", learned["digest"])]


def time_blocks(result: Result, drawing: bool) -> Iterator[Block]:
    """Where the time went, and what was computed in it."""
    stages = result["stages"]
    longest = max((stage["seconds"] for stage in stages), default=0) or 1
    rows: list[Sequence[str | Cell]] = [
        [
            stage["name"],
            seconds_text(stage["seconds"]),
            Cell("", bar=stage["seconds"] / longest),
            stage.get("note") or "",
        ]
        for stage in stages
    ]
    rows.append(["whole run", seconds_text(result["seconds"]), "", result["engine"]])
    yield Table.of(("stage", "time", "", "note"), rows)
    if result.get("features"):
        yield from _features(result["features"])
    else:
        yield from _tiles(result["gram"], drawing)


def stores_tables(result: Result) -> Iterator[Block]:
    """The stores that were filled or found."""
    features = result.get("features")
    header: tuple[str, ...]
    if features:
        header = ("Feature store", "computed", "reused", "address", "path")
        rows = [
            [s["role"], f"{s['computed']:,}", f"{s['reused']:,}", s["address"], s["path"]]
            for s in features["stores"]
        ]
    else:
        header = ("Gram store", "tiles needed", "computed", "reused", "address", "path")
        rows = [
            [
                s["role"],
                f"{s['tiles_needed']:,}",
                f"{s['tiles_computed']:,}",
                f"{s['tiles_reused']:,}",
                s["address"],
                s["path"],
            ]
            for s in result["gram"]["stores"]
        ]
    if rows:
        yield Table.of(header, rows)


def _features(features: Mapping[str, Any]) -> Iterator[Block]:
    planned, learned = features["planned"], features["learned"]
    facts = [("Features", f"{features['width']:,} of each sample, {features['dtype']}")]
    if learned is not None:
        facts.append(
            ("Map learned", f"in {seconds_text(learned['seconds'])}, once for all runs that share it")
        )
    if features["blocks"] == "streamed":
        facts.append(("Blocks", f"{features['block_rows']:,} samples each, none stored"))
    else:
        facts += [
            ("Blocks computed", f"{features['blocks_computed']:,}"),
            ("Blocks reused", f"{features['blocks_reused']:,}"),
            ("Block", f"{features['block_rows']:,} samples"),
            ("Stored", bytes_text(features["bytes"])),
        ]
    facts.append(("Computed by", features["path"]))
    facts.append((f"Blocks are {features['blocks']}", features["blocks_reason"]))
    facts.append(("Whole run as planned", seconds_text(planned["seconds"])))
    yield Table.of((), facts)
    if features["blocks"] == "stored" and not features["blocks_computed"]:
        yield Text("Every block of features was already stored; none was computed.")


def _tiles(gram: Mapping[str, Any], drawing: bool) -> Iterator[Block]:
    seconds = sorted(gram["tile_seconds"])
    facts = [
        ("Tiles computed", f"{gram['tiles_computed']:,}"),
        ("Tiles reused", f"{gram['tiles_reused']:,}"),
        ("Tiles made by", gram.get("recomputed") or paths_text(gram["paths"])),
        ("Tile", f"{gram['tile_side']} × {gram['tile_side']} entries, {gram['dtype']}"),
        ("Stored", bytes_text(gram["bytes"])),
    ]
    if seconds:
        shown = " · ".join(f"{name} {seconds_text(_quantile(seconds, q))}" for name, q in _QUANTILES)
        facts.append(("Time per tile", shown))
    yield Table.of((), facts)
    if gram.get("recomputed"):
        yield Text(
            f"No tile was stored: each was computed whenever a product needed it, by {gram['recomputed']}."
        )
    elif not gram["tiles_computed"]:
        yield Text("Every tile was already stored; none was computed.")
    elif drawing and len(seconds) > 1:
        yield Figure(
            plots.tile_seconds(seconds), f"Time per tile, of {count_text(len(seconds), 'tile')} sampled."
        )


_QUANTILES = (("least", 0.0), ("median", 0.5), ("90 % below", 0.9), ("most", 1.0))


def _quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of ascending values."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def _kind(features: Mapping[str, Any]) -> str:
    return str(features["map"]["description"]["kind"])
