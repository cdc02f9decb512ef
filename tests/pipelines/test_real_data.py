"""The published image sets, where MEGAGRAM_DATA names a folder that has them."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines import datasets, evaluate
from pipelines.experiment import Experiment


@pytest.mark.parametrize(
    ("source", "shape", "train", "test", "first"),
    [
        ("mnist", (28, 28, 1), 60_000, 10_000, [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
        ("fashion-mnist", (28, 28, 1), 60_000, 10_000, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
        ("cifar10", (32, 32, 3), 50_000, 10_000, [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]),
    ],
)
def test_sizes_labels_and_order_are_the_published_ones(real_data, source, shape, train, test, first):
    data = datasets.load(source)
    assert data.test is not None
    assert data.train.X.shape == (train, *shape)
    assert data.test.X.shape == (test, *shape)
    assert data.train.y is not None
    assert data.train.y[:10].tolist() == first
    if source != "mnist":  # of MNIST the classes differ in size
        assert np.bincount(data.train.y).tolist() == [train // 10] * 10
    datasets.validate(data.train, "classification")


@pytest.mark.slow
def test_mnist_end_to_end_equals_scikit_learn(real_data, root):
    """1,000 training and 2,000 test images: the whole pipeline against another implementation."""
    import small
    from sklearn.kernel_ridge import KernelRidge

    ridge, n, m = 1e-3, 1000, 2000
    experiment = Experiment.model_validate(
        {
            "name": "mnist-small",
            "data": {"source": "mnist", "train": n, "test": m, "preprocess": ["scale", "normalise"]},
            "kernel": {"kind": "dot-product", "kernel": "exponential", "sigma": 0.8},
            "solve": {"ridges": [ridge], "select": "loo"},
        }
    )
    root.mkdir()
    ours = small.evaluate(experiment, root, root)
    data = datasets.load("mnist")
    assert data.test is not None
    X, Z = ((x.reshape(len(x), -1) / 255.0) for x in (data.train.X[:n], data.test.X[:m]))
    X, Z = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (X, Z))
    assert data.train.y is not None
    targets = evaluate.one_vs_all(data.train.y[:n], np.arange(10))
    # On unit vectors the exponential kernel is Gaussian with gamma = 1 / (2 sigma^2) (K5).
    theirs = KernelRidge(kernel="rbf", gamma=1 / (2 * 0.8**2), alpha=n * ridge).fit(X, targets)
    assert data.test.y is not None
    accuracy = 100 * np.mean(theirs.predict(Z).argmax(axis=1) == data.test.y[:m])
    assert ours["test"]["accuracy"] == pytest.approx(accuracy, abs=0.1)
