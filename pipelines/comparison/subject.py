"""What a comparison is asked for, and the few samples of an experiment on which it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kernels.base import Cost, Kernel, digest
from kernels.features.base import FeatureMap

from .. import gram, memory, pools
from ..errors import DoesNotFit
from ..experiment import Experiment
from ..experiment.schema import Data, RandomRows
from ..fit import REVISION, hash_array
from ..pools import Pools, Split, kernel_shape
from ..wording import bytes_text, count_text
from .sizes import Approximation, Size, is_drawn

SAMPLES = 1000
"""Training samples that are compared unless others are asked for; validation and test set are no larger."""

BLOCK = 128
"""Samples whose features are computed at a time."""

SHARE = 0.9
"""Of the free memory, what a comparison may take."""

COMPARISON = 1
"""Raised whenever a comparison gives other numbers, so that stored points are not used again."""

FINDINGS = 2
"""Raised whenever other things are said of the same points, so that a stored page is not taken for a new one's."""


@dataclass(frozen=True)
class Request:
    """What is asked for. samples: of training. repeat: seeds for each size. targets: an error by its measure."""

    sizes: tuple[Size, ...]
    samples: int = SAMPLES
    repeat: int = 1
    targets: tuple[tuple[str, float], ...] = ()


class Subject:
    """One experiment's features and exact kernel, and the samples on which they are compared."""

    def __init__(self, experiment: Experiment, request: Request) -> None:
        """Check what can be checked before any data are read.

        Raises:
            ExperimentError: the experiment has no features, or ones without a size.
            KernelError: a size that the map does not take.
        """
        self.experiment = experiment
        self.request = request
        self.approximation = Approximation.of(experiment)
        drawn = is_drawn(self.approximation.at(request.sizes[0]))
        self.repeats = request.repeat if drawn else 1
        self.wanted = [
            (size, self.approximation.at(size, repeat))
            for size in request.sizes
            for repeat in range(self.repeats)
        ]
        table = {**experiment.table(), "kernel": self.approximation.exact}
        table.pop("features", None)
        table["solve"] = {**table["solve"], "refit": False}
        self.exact = Experiment.model_validate({**table, "data": reduced(experiment.data, request.samples)})
        self._whole = Experiment.model_validate(table)

    @property
    def kernel(self) -> Kernel:
        return self.exact.kernel_object

    @property
    def dtype(self) -> str:
        return self.exact.gram.dtype

    @cached_property
    def pools(self) -> Pools:
        """The samples that are compared, preprocessed as all of the experiment's are."""
        few = pools.resolve(self.exact)
        few = replace(few, split=shortened(few.split, self.request.samples))
        return replace(few, preprocessing=self.whole.preprocessing) if few.preprocessing.fitted else few

    @cached_property
    def whole(self) -> Pools:
        """All of the experiment's samples: what maps and preprocessing learn from."""
        return pools.resolve(self._whole)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, as the kernel takes it."""
        shape = self.pools.preprocessing.output_shape(self.pools.raw_shape)
        return kernel_shape(self.kernel.inputs, shape)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Samples of each index set that there is."""
        return {name: len(rows) for name, rows in self.pools.sets.items() if rows is not None}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on beside the map."""
        few, solve = self.pools, self.exact.solve
        cross = few.split.test is not None and not few.split.test_in_pool
        learns = any(isinstance(made, FeatureMap) and made.learns for _, made in self.wanted)
        return {
            "matrix": gram.gram_description(few, self.kernel),
            "pool": few.pool_axis.json(),
            "test": [gram.gram_description(few, self.kernel, test=True), few.test_axis.json()]
            if cross
            else None,
            "dtype": self.dtype,
            "sets": {name: None if rows is None else hash_array(rows) for name, rows in few.sets.items()},
            "labels": [hash_array(self.truth(name)) for name in self.counts],
            "learned_from": self._learned_from() if learns else None,
            "solve": [solve.ridges, solve.select, solve.jitter, solve.absolute],
            "revisions": [REVISION, COMPARISON],
        }

    def truth(self, name: str) -> np.ndarray:
        """Labels or targets of an index set."""
        few = self.pools
        rows = few.sets[name]
        assert rows is not None
        return few.y(rows, test=name == "test" and not few.split.test_in_pool)

    def _learned_from(self) -> list[Any]:
        whole = self.whole
        return [whole.pool_description, whole.pool_axis.json(), hash_array(whole.split.train)]

    def check_memory(self) -> None:
        """Raise DoesNotFit where the matrices and features do not fit into the free memory."""
        needed, free = self.bytes, int(SHARE * memory.available_bytes())
        if needed > free:
            raise DoesNotFit(
                f"{self.experiment.name}: comparing {count_text(sum(self.counts.values()), 'sample')} takes"
                f" {bytes_text(needed)} of memory, and {bytes_text(free)} may be used: give fewer --samples, or smaller"
                " --features"
            )

    @property
    def bytes(self) -> int:
        """Memory at the peak: both matrices, an eigendecomposition of one, all samples and their features."""
        item = np.dtype(self.dtype).itemsize
        n, total = self.counts["train"], sum(self.counts.values())
        widest = max(sample_bytes(made, self.shape, self.dtype) for _, made in self.wanted)
        scratch = max(self._scratch(made) for _, made in self.wanted)
        samples = total * (widest + 2 * int(np.prod(self.shape)) * item)
        return 2 * total * n * item + 3 * 8 * n * n + samples + scratch

    def _scratch(self, made: Kernel) -> int:
        item = np.dtype(self.dtype).itemsize
        pairs = made.cost(BLOCK, BLOCK, self.shape, item).scratch_bytes
        if not isinstance(made, FeatureMap):
            return pairs
        trained = len(self.whole.split.train) if made.learns else 0
        learning = made.learning_cost(trained, self.shape, item) if made.learns else Cost(0, 0, 0)
        return max(pairs, learning.scratch_bytes, made.feature_cost(BLOCK, self.shape, item).scratch_bytes)


def sample_bytes(made: Kernel, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the features of one sample, or of what a random kernel prepares for it."""
    if isinstance(made, FeatureMap):
        return made.width(shape) * np.dtype(dtype).itemsize
    return made.prepare(np.ones((1, *shape), dtype)).nbytes


def reduced(data: Data, samples: int) -> dict[str, Any]:
    """A ``[data]`` table that trains on so many samples, the first ones; copies of an image count as samples."""
    table = data.model_dump(mode="json", exclude_none=True)
    wanted = max(1, samples // (1 + (data.shifts or 0)))
    if isinstance(data.validation, RandomRows):
        drawn = min(data.validation.random, samples)
        table["validation"] = {"random": drawn}
        wanted += drawn
    if isinstance(data.train, int):
        table["train"] = min(data.train, wanted)
    else:
        start, stop = data.train
        table["train"] = [start, min(stop, start + wanted)]
    return table


def shortened(split: Split, samples: int) -> Split:
    """A split whose validation and test set have at most so many samples, the first ones."""
    validation, test = (None if rows is None else rows[:samples] for rows in (split.validation, split.test))
    return replace(split, validation=validation, test=test)


def address(subjects: Sequence[Subject]) -> str:
    """Names a comparison by all that its page says."""
    asked = [subjects[0].request.samples, subjects[0].request.repeat, subjects[0].request.targets]
    maps_asked = [[made.describe(), made.revisions()] for subject in subjects for _, made in subject.wanted]
    exact = [subject.identity for subject in subjects]
    return digest({"exact": exact, "maps": maps_asked, "asked": asked, "findings": FINDINGS})
