"""What a small sample says of a large matrix's eigenvalues, and of the iterations that they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small import Samples

from kernels.base import Kernel
from kernels.registry import from_description
from pipelines import pools
from pipelines.spectrum import LEAST, Spectrum, sampled

KERNELS = [
    {"kind": "dot-product", "kernel": "exponential", "sigma": 1.0},
    {"kind": "fully-connected", "family": "ntk", "depth": 2},
]


def matrix(kernel: Kernel, n: int) -> np.ndarray:
    return np.asarray(kernel.gram(np.random.default_rng(0).standard_normal((n, 20))))


@pytest.mark.parametrize("description", KERNELS, ids=["exponential", "ntk"])
def test_a_sample_tells_the_eigenvalues_of_more_samples(description: dict[str, object]) -> None:
    """Protects the choice of a solver: from a fifth of the samples, eigenvalues to a factor of three."""
    K = matrix(from_description(description), 2000)
    values = np.linalg.eigvalsh(K)[::-1]
    guess = Spectrum.of(K[:400, :400])
    for j in (1, 10, 100, 400, 1000):
        assert 0.5 < guess.eigenvalue(2000, j) / values[j - 1] < 3.5
    assert 0.2 < guess.smallest_eigenvalue(2000) / values[-1] < 5


def test_a_plan_samples_the_training_rows_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Protects time and honesty: few samples, none where entries are dear, and no look at the test set."""
    experiment = Samples(tmp_path_factory.mktemp("data")).write(900).experiment(data={"train": 600})
    resolved = pools.resolve(experiment)
    kernel = experiment.kernel_object
    found = sampled(resolved, kernel, "float64", 1e9)
    assert found is not None
    assert len(found.values) == 600
    X = resolved.train.X.copy()
    X[600:] = np.nan
    again = sampled(replace(resolved, train=replace(resolved.train, X=X)), kernel, "float64", 1e9)
    assert again is not None
    np.testing.assert_array_equal(again.values, found.values)
    assert sampled(resolved, kernel, "float64", LEAST**2 - 1.0) is None
    zeros = replace(resolved, train=replace(resolved.train, X=np.zeros_like(X)))
    assert (
        sampled(zeros, from_description({"kind": "dot-product", "kernel": "linear"}), "float64", 1e9) is None
    )
