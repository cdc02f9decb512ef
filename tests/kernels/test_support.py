"""Which pairs of positions a kernel needs (C6, C9), and networks on a grid."""

from __future__ import annotations

import itertools

import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.network import network_on
from kernels.support import half


def needed(kernel: Convolutional, shape: tuple[int, int, int], norms: bool) -> list[set]:
    """Pairs of positions of every layer, position by position: what a pooled pair was pooled from, what a pair of
    patches is the sum of."""
    stages = kernel.network(shape).stages
    periodic = kernel.pooling_mode == "periodic"
    found: list[set] = []
    for number in reversed(range(len(stages))):
        stage = stages[number]
        outputs = list(np.ndindex(len(stage.rows), len(stage.columns)))
        if number == len(stages) - 1:
            pooled = set() if norms else {(u, u) for u in outputs}
        else:
            layer, grid = stages[number + 1].layer, stages[number + 1].grid
            after = found[0] | ({(u, u) for u in outputs} if norms else set())
            reach = layer.patch - 1 - (layer.patch - 1) // 2
            offsets = range(-reach, layer.patch - reach)
            pooled = set()
            for (u, v), d, e in itertools.product(after, offsets, offsets):
                pair = [(i + d, j + e) for i, j in (u, v)]
                if periodic:
                    pair = [(i % grid[0], j % grid[1]) for i, j in pair]
                if all(0 <= i < grid[0] and 0 <= j < grid[1] for i, j in pair):
                    pooled.add(tuple(pair))
        windows = {
            (i, j): list(
                itertools.product(*(np.flatnonzero(H[k]) for H, k in ((stage.rows, i), (stage.columns, j))))
            )
            for i, j in outputs
        }
        found.insert(
            0,
            {
                ((int(a), int(b)), (int(c), int(d)))
                for u, v in pooled
                for (a, b), (c, d) in itertools.product(windows[u], windows[v])
            },
        )
    return found


@st.composite
def kernels(draw):
    mode = draw(st.sampled_from(["reference", "same", "periodic"]))
    layers = []
    for number in range(count := draw(st.integers(1, 3))):
        pooling = draw(
            st.sampled_from(["gaussian", "average", "strided"] + ["global"] * (number == count - 1))
        )
        t = 1 if pooling == "global" else draw(st.integers(1, 2))
        p = t if pooling in ("global", "strided") else draw(st.integers(1, 2))
        layers.append(Layer(draw(st.integers(1, 4)), "relu", pooling=pooling, subsampling=t, poolfactor=p))
    return Convolutional(tuple(layers), pooling_mode=mode), (
        draw(st.integers(3, 5)),
        draw(st.integers(3, 5)),
        1,
    )


@settings(max_examples=40, deadline=None)
@given(kernels())
def test_supports_are_what_goes_into_the_result(drawn) -> None:
    """C9 and C6: exactly the pairs that loops over windows and offsets reach, as products of two axes."""
    kernel, shape = drawn
    if not models.admissible(kernel, shape):
        return
    network = kernel.network(shape)
    for supports, norms in ((network.support, False), (network.norm_support, True)):
        for support, expected in zip(supports, needed(kernel, shape, norms), strict=False):
            reached = {
                ((i, j), (k, m))
                for i, k in zip(*map(list, np.nonzero(support.rows)), strict=True)
                for j, m in zip(*map(list, np.nonzero(support.columns)), strict=True)
            }
            assert reached == expected
            assert support.entries == len(expected)


def test_supports_of_the_published_models() -> None:
    """C9's own example: 185 of 225 entries of an axis, 34,225 of 50,625 in all; 37 % and 22 % for pooling 2-2."""
    network = models.MODELS["exp/exp 2-5"].network((32, 32, 3))
    assert network.support[1].rows.sum() == 185
    assert network.support[1].entries == 34_225
    assert network.support[0].entries + network.support[1].entries == 902_849
    first, second = models.network([models.EXP] * 2, (2, 2)).network((32, 32, 3)).support
    assert first.entries / 1024**2 == pytest.approx(0.37, abs=0.01)
    assert second.entries / 225**2 == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("n", range(1, 8))
def test_half_has_one_of_each_pair_and_its_mirror_image(n: int, periodic: bool) -> None:
    """What is pooled onto the diagonal counts it twice; periodic, displacements up to half of the axis are enough."""
    rng = np.random.default_rng(n)
    mask = rng.random((n, n)) < 0.6
    mask = mask | mask.T
    found = half(mask, periodic)
    np.testing.assert_array_equal(found.astype(int) + found.T * ~np.eye(n, dtype=bool), mask)
    first, second = np.nonzero(found)
    assert ((second - first) % n <= n // 2 if periodic else second >= first).all()


def test_one_layer_needs_nothing_for_its_norms() -> None:
    assert models.network([models.EXP], (2,)).network((8, 8, 1)).norm_support == ()


def test_weights_of_the_trace_are_pooling_and_its_transpose() -> None:
    """C9: W = H^T H, on a grid that is not square."""
    network = models.MODELS["relu RF 2-5"].network((31, 22, 1))
    H, C = network.stages[-1].rows, network.stages[-1].columns
    rows, columns = network.trace_weights
    A = np.kron(H, C)
    np.testing.assert_allclose(np.kron(rows, columns), A.T @ A, rtol=1e-14)


def test_pooling_that_changes_nothing_is_known() -> None:
    """An average over one pixel; not a gaussian of the same size, and not half of a grid."""
    stages = network_on((Layer(3, "relu", pooling="average"),) * 2, "reference", (5, 6)).stages
    assert all(stage.passes_on for stage in stages)
    for pooling, t in (("gaussian", 1), ("average", 2), ("strided", 1)):
        layer = Layer(3, "relu", pooling=pooling, subsampling=t)
        assert not network_on((layer,), "reference", (5, 6)).stages[0].passes_on


def test_a_patch_larger_than_its_grid_is_refused() -> None:
    with pytest.raises(KernelError, match="patch of layer 2"):
        network_on((Layer(3, "relu", subsampling=2), Layer(5, "relu")), "reference", (8, 8))
