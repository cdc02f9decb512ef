"""What the points of a comparison come to: means over repeats, how errors fall with size, and what a target needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kernels.base import KernelError
from kernels.features.base import FeatureMap
from kernels.features.nystrom import NystromFeatures

from ..wording import bytes_text, number_text
from .measures import MEASURES, PowerLaw, mean_error, power_law
from .sizes import Size, at_position, positions
from .subject import Subject, sample_bytes

MONTE_CARLO = {"value": -0.5, "tolerance": 0.15}
"""Slope of relF of random features against their number (SPEC F6, X8, X28)."""

RANDOM_KINDS = ("random", "convolutional-random", "convolutional-tangent-random")

SEVERAL = "--repeat 5"
"""What to give for an interval: it is the jackknife's over seeds, and Student's t of few is wide."""

FAR = 10.0
"""Beyond so many times the largest size compared, what is said is an order of magnitude."""

UNBOUNDED = 1000.0
"""An interval that ends beyond so many times the largest size compared tells no end."""


def findings(subject: Subject, compared: Mapping[str, Any]) -> dict[str, Any]:
    """What ``compare.compare`` found, with its ``sizes``, ``fits``, ``slope`` and ``targets``, and
    ``landmarks``, whether samples that are compared may be some; a JSON value."""
    sizes = subject.request.sizes
    places = positions(sizes)
    rows = [_row(size, place, compared["points"]) for size, place in zip(sizes, places, strict=True)]
    fits = {m: power_law(places, [row["errors"][m] for row in rows]) for m in MEASURES}
    return {
        **compared,
        "sizes": rows,
        "fits": {measure: _fit(fit, places) for measure, fit in fits.items()},
        "slope": _slope(compared["kind"], fits["relF"]),
        "targets": [_target(subject, rows, m, error, fits[m]) for m, error in subject.request.targets],
        "landmarks": _are_landmarks(subject),
    }


def _row(size: Size, place: float, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One size over its repeats."""
    own = [point for point in points if point["size"] == list(size.numbers)]
    return {
        "size": list(size.numbers),
        "text": size.text,
        "position": place,
        "errors": {measure: [point["errors"][measure] for point in own] for measure in MEASURES},
        **{key: [point[key] for point in own] for key in ("score", "gap")},
        **{
            key: float(np.mean([point[key] for point in own]))
            for key in ("learning_seconds", "seconds_per_sample")
        },
        "bytes_per_sample": own[0]["bytes_per_sample"],
    }


def _fit(fit: PowerLaw | None, places: Sequence[float]) -> dict[str, Any] | None:
    if fit is None:
        return None
    line = [[place, fit.error(place)] for place in (places[0], places[-1])]
    low, high = fit.interval or (None, None)
    return {"slope": fit.slope, "low": low, "high": high, "line": line}


def _slope(kind: str, fit: PowerLaw | None) -> dict[str, Any] | None:
    """The slope of random features beside the one that they must have; not clear where it may as well be zero."""
    if fit is None or kind not in RANDOM_KINDS:
        return None
    within = abs(fit.slope - MONTE_CARLO["value"]) <= MONTE_CARLO["tolerance"]
    status = "not reached" if not within else "pass" if fit.falls else "not clear"
    return {**MONTE_CARLO, "obtained": fit.slope, "status": status}


def _target(
    subject: Subject, rows: Sequence[Mapping[str, Any]], measure: str, error: float, fit: PowerLaw | None
) -> dict[str, Any]:
    """How many features an error needs, as numbers and in words."""
    key = subject.approximation.key
    found: dict[str, Any] = {"measure": measure, "error": error}
    for row in rows:
        mean = mean_error(row["errors"][measure])
        if mean <= error:
            text = (
                f"{measure} = {error:g} is reached by {key} = {row['text']}, where it is {number_text(mean)}."
            )
            return {**found, "reached": row["size"], "text": text}
    if fit is None or not fit.falls:
        return {**found, "refused": True, "text": f"{measure} = {error:g}: {_refusal(fit, len(rows))}."}
    place, ends = fit.size_for(error)
    size = at_position(subject.request.sizes, place)
    refused = _refused(subject, size)
    if refused is not None:
        text = (
            f"{measure} = {error:g}: the line through the errors asks for about {key} = {_about(size)}, and"
            f" {refused}."
        )
        return {**found, "refused": True, "text": text}
    factor = place / rows[-1]["position"]
    needed = sample_bytes(subject.approximation.at(size), subject.shape, subject.dtype)
    numbers: dict[str, list[int]] = {"size": list(size.numbers)}
    interval = f"how sure that is takes several seeds: {SEVERAL}"
    if ends is not None:
        low, high = (at_position(subject.request.sizes, end) for end in ends)
        numbers |= {"low": list(low.numbers), "high": list(high.numbers)}
        unbounded = ends[1] >= UNBOUNDED * rows[-1]["position"] or _refused(subject, high) is not None
        end = f"{_about(low)} or more" if unbounded else f"{_about(low)} to {_about(high)}"
        interval = f"95 % confidence: {end}"
    text = (
        f"{measure} = {error:g} needs about {key} = {_about(size)} ({interval}), {factor:.2g} times the largest size"
        f" compared; then the features of a sample take {bytes_text(needed)}."
    )
    text += " So far beyond what was compared, take it for an order of magnitude." if factor > FAR else ""
    return {**found, **numbers, "factor": factor, "bytes_per_sample": needed, "text": text}


def _refusal(fit: PowerLaw | None, sizes: int) -> str:
    if sizes < 3:
        return "none of the sizes compared reaches it, and how many features would takes three sizes or more to tell"
    if fit is None:
        return "an error is zero or infinite, and nothing can be told of others from it"
    slope = f"slope {fit.slope:.2f}"
    if fit.interval is not None:
        low, high = fit.interval
        slope += f", 95 % confidence {low:.2f} to {high:.2f}"
    return (
        "none of the sizes compared reaches it, and the error does not clearly fall with size"
        f" ({slope}): compare more or larger sizes, or more seeds ({SEVERAL})"
    )


def _about(size: Size) -> str:
    """A size whose numbers are known to two digits at best."""
    return " x ".join(f"{int(float(f'{number:.2g}')):,}" for number in size.numbers)


def _refused(subject: Subject, size: Size) -> str | None:
    """Why no map of this size could be made in a run of the experiment, in words; None where one could."""
    try:
        made = subject.approximation.at(size)
    except KernelError as error:
        return f"the map does not take that ({error})"
    if isinstance(made, FeatureMap):
        samples = len(subject.whole.split.train) if made.learns else 0
        try:
            made.check_count(samples, subject.shape)
        except KernelError as error:
            if not _are_landmarks(subject):
                return f"the map does not take that ({error})"
            return (
                f"there are only {samples:,} training samples: the error ends at 0 with all of them, so that no such"
                " line holds there"
            )
    return None


def _are_landmarks(subject: Subject) -> bool:
    """Whether samples that are compared may be landmarks of the map, at which its error is 0."""
    made = subject.approximation.at(subject.request.sizes[0])
    return isinstance(made, NystromFeatures) and made.selection != "k-means"
