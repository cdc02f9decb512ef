"""Roto-translations: all turns carried along as oracle (C14), the identities of C14 and C15, the table of S20."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import scipy.ndimage
from contracts import KernelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import turned
from kernels.base import Kernel, KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.cuda import device
from kernels.fused import VARIABLE
from kernels.groups import FINALS, RotoTranslation
from kernels.network import Network, Stage
from kernels.registry import from_description
from kernels.turned import Angles, TurnedRecursion

EXP = {"kernel": "exponential", "sigma": 0.6}
RELU = {"kernel": "relu"}
POLY3 = {"kernel": "polynomial", "degree": 3}


def group(final, rotations=4, kernels=(EXP, EXP), tangent=False, mode="same", poolfactor=2):
    """3x3 patches and gaussian pooling; ``rot+gap`` pools globally in the end."""
    layers = [Layer(3, **kernel, poolfactor=poolfactor) for kernel in kernels]
    if final == "rot+gap":
        layers[-1] = Layer(3, **kernels[-1], pooling="global")
    return RotoTranslation(tuple(layers), final, rotations, tangent, mode)


class TestRotation(KernelContract):
    kernel = group("rot")
    different = group("rot", 8)
    shape = (6, 6, 2)


class TestRotationBoth(KernelContract):
    kernel = group("rot", kernels=(RELU, RELU), tangent="both", mode="periodic")
    different = group("rot", kernels=(RELU, RELU), mode="periodic")
    shape = (5, 5, 1)


class TestGlobalTangent(KernelContract):
    kernel = group("rot+gap", kernels=(RELU, RELU), tangent=True)
    different = group("orbit", kernels=(RELU, RELU), tangent=True)
    shape = (6, 6, 1)


class TestOrbit(KernelContract):
    kernel = group("orbit", kernels=(EXP, POLY3))
    different = group("orbit", kernels=(EXP, POLY3), mode="periodic")
    shape = (7, 7, 3)


class TestGlobalOf8(KernelContract):
    kernel = group("rot+gap", 8, (RELU, RELU), "both")
    different = group("rot+gap", 8, (RELU, RELU), "both", "periodic")
    shape = (5, 5, 2)


class TestOrbitOf8(KernelContract):
    kernel = group("orbit", 8, (RELU, RELU), True)
    different = group("orbit", 4, (RELU, RELU), True)
    shape = (6, 6, 1)


# All turns carried along, as oracle

_kernels = st.sampled_from(
    [
        ("relu", None, {}),
        ("exponential", 0.6, {"sigma": 0.6}),
        ("polynomial", 2, {"degree": 2}),
        ("linear", 0.7, {"scale": 0.7}),
    ]
)


@st.composite
def architectures(draw):
    """Layers as the kernel takes them and as the oracle takes them, on a small grid."""
    final = draw(st.sampled_from(["rot", "rot+gap"]))
    rotations, tangent = draw(st.sampled_from([4, 8])), draw(st.booleans())
    mode = draw(st.sampled_from(["same", "periodic"]))
    count = draw(st.integers(1, 3 if rotations == 4 else 2))
    shape = (draw(st.integers(3, 4)),) * 2 + (draw(st.sampled_from([1, 2])),)
    layers, plain = [], []
    for number in range(count):
        kernel, parameter, parameters = ("relu", None, {}) if tangent else draw(_kernels)
        pooling = draw(st.sampled_from(["gaussian", "strided", "average"]))
        p = draw(st.integers(1, 2)) if pooling == "gaussian" else 1
        if final == "rot+gap" and number == count - 1:
            pooling, p = "global", 1
        common = {"patch": draw(st.sampled_from([1, 3])), "kernel": kernel, "pooling": pooling}
        common |= {"poolfactor": p, "patch_norm": draw(st.booleans())}
        layers.append(Layer(**common, **parameters))
        plain.append(common | {"parameter": parameter})
    return RotoTranslation(tuple(layers), final, rotations, tangent, mode), plain, shape


@settings(max_examples=15, deadline=None)
@given(architecture=architectures(), seed=st.integers(0, 100))
def test_equals_all_turns_carried_along(architecture, seed: int) -> None:
    """C14 word by word: B[(u, r), (v, s)] of all positions and turns, one sample's cosines included (K13)."""
    kernel, plain, shape = architecture
    x, y = np.random.default_rng(seed).standard_normal((2, *shape))
    options = (plain, kernel.final, kernel.rotations, kernel.tangent, kernel.pooling_mode)
    expected = [reference.roto_translation(x, z, *options, same=z is x) for z in (x, y)]
    a, b = kernel.prepare(np.stack([x]), pool="x"), kernel.prepare(np.stack([x, y]), pool="x")
    # Patches that are alike at two turns have cosines near 1, where kappa_0 amplifies rounding (K13).
    rtol = 1e-7 if kernel.tangent else 1e-11
    np.testing.assert_allclose(kernel.pair(a, b)[0], expected, rtol=rtol, atol=rtol * abs(expected[0]))
    np.testing.assert_allclose(kernel.diag(a), expected[:1], rtol=rtol)


def test_orbit_is_the_mean_over_turned_images() -> None:
    """C14 (c), with the plain kernel and numpy's turns."""
    kernel = group("orbit", kernels=(RELU, RELU), tangent=True)
    plain = Convolutional(kernel.layers, True, "same")
    X, Y = np.random.default_rng(0).standard_normal((2, 3, 6, 6, 2))
    terms = [plain.gram(np.rot90(X, r, axes=(1, 2)).copy(), Y) for r in range(4)]
    np.testing.assert_allclose(kernel.gram(X, Y), np.mean(terms, axis=0), rtol=1e-12)


def test_orbit_of_8_turns_both_images() -> None:
    """Turned by an interpolation that scipy knows too, about the centre and with zeros around the image."""
    kernel = group("orbit", 8)
    plain = Convolutional(kernel.layers, False, "same")
    X, Y = np.random.default_rng(0).standard_normal((2, 3, 6, 6, 2))

    def turns(Z):
        at_45 = scipy.ndimage.rotate(Z, 45, (1, 2), reshape=False, order=1, mode="grid-constant")
        return [np.rot90(z, r, axes=(1, 2)).copy() for z in (Z, at_45) for r in range(4)]

    terms = [plain.gram(x, y) for x in turns(X) for y in turns(Y)]
    np.testing.assert_allclose(kernel.gram(X, Y), np.mean(terms, axis=0), rtol=1e-12)


@pytest.mark.parametrize("tangent", [False, "both"])
def test_one_position_is_no_roto_translation(tangent: bool | str) -> None:
    """1x1 patches, pooled over all positions, see the same at every angle: the plain kernel for 4 and for 8."""
    layers = (Layer(1, **RELU, pooling="strided"), Layer(1, **RELU, pooling="global"))
    X, Y = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2))
    expected = Convolutional(layers, tangent, "same").gram(X, Y)
    for rotations in (4, 8):
        kernel = RotoTranslation(layers, "rot+gap", rotations, tangent)
        np.testing.assert_allclose(kernel.gram(X, Y), expected, rtol=1e-12)


# Identities

X, Y = np.random.default_rng(5).standard_normal((2, 2, 6, 6, 2))


def turn(images: np.ndarray, quarters: int) -> np.ndarray:
    return np.rot90(images, quarters, axes=(1, 2)).copy()


CASES = [
    (final, rotations, kernels, tangent, mode)
    for final in FINALS
    for rotations in (4, 8)
    for kernels, tangent, mode in (((EXP, EXP), False, "same"), ((RELU, RELU), "both", "periodic"))
]


@pytest.mark.parametrize(("final", "rotations", "kernels", "tangent", "mode"), CASES)
def test_turns_by_90_degrees(final, rotations, kernels, tangent, mode) -> None:
    """C14: nothing changes when both images are turned; nor when one is, unless positions are kept apart."""
    kernel = group(final, rotations, kernels, tangent, mode)
    expected = kernel.gram(X, Y)
    for quarters in (1, 2, 3):
        np.testing.assert_allclose(kernel.gram(turn(X, quarters), turn(Y, quarters)), expected, rtol=1e-12)
        one = np.abs(kernel.gram(X, turn(Y, quarters)) / expected - 1)
        if final == "rot":
            assert one.min() > 1e-6
            assert one.max() > 1e-3
        else:
            assert one.max() < 1e-12


@pytest.mark.parametrize("rotations", [4, 8])
@pytest.mark.parametrize("tangent", [False, True])
def test_translations(rotations: int, tangent: bool) -> None:
    """C15: periodic kernels do not change when both images are shifted; with means over positions, when one is."""
    kernels = (RELU, RELU)
    local = group("rot", rotations, kernels, tangent, "periodic")
    invariant = group("rot+gap", rotations, kernels, tangent, "periodic")
    both = local.gram(X, Y), invariant.gram(X, Y)
    for shift in ((1, 0), (2, 3)):
        shifted = [np.roll(images, shift, axis=(1, 2)) for images in (X, Y)]
        np.testing.assert_allclose(local.gram(*shifted), both[0], rtol=1e-12)
        np.testing.assert_allclose(invariant.gram(shifted[0], Y), both[1], rtol=1e-12)


def smooth_image() -> np.ndarray:
    """(1, 15, 15, 1): three blobs that no turn maps to themselves, away from the border."""
    i, j = np.mgrid[:15, :15] - 7.0
    blobs = ((-2, 1, 1.6, 1.0), (2.2, -1.5, 1.3, 0.7), (1, 3, 1.2, 0.5))
    image = sum(h * np.exp(-((i - a) ** 2 + (j - b) ** 2) / (2 * s * s)) for a, b, s, h in blobs)
    return np.asarray(image)[None, ..., None]


def test_table_of_invariance() -> None:
    """S20: K(L_g x, x)/K(x, x) - 1 for shifts of 1 to 4 pixels and turns by 15 to 90 degrees. Zero where C14 and
    C15 say so, growing with g elsewhere; in between multiples of 90 degrees, invariant kernels change little."""
    x = smooth_image()
    shifts = [np.roll(x, s, axis=1) for s in range(1, 5)]
    turns = [
        scipy.ndimage.rotate(x, g, (1, 2), reshape=False, mode="grid-constant") for g in range(15, 90, 15)
    ]
    moved = np.concatenate([x, *shifts, *turns, turn(x, 1)])
    layers = group("rot", mode="periodic").layers
    global_layers = group("rot+gap", mode="periodic").layers
    kernels: dict[str, Kernel] = {
        "plain": Convolutional(layers, pooling_mode="periodic"),
        "GAP": Convolutional(global_layers, pooling_mode="periodic"),
    }
    for rotations in (4, 8):
        for final in FINALS:
            kernels[f"{final} {rotations}"] = group(final, rotations, mode="periodic")

    def grows(change: np.ndarray) -> bool:
        return change[0] > 1e-4 and bool(np.all(np.diff(change) > 0))

    for name, kernel in kernels.items():
        K = kernel.gram(moved, x)[:, 0]
        change = np.abs(K[1:] / K[0] - 1)
        shifted, turned_ = change[:4], change[4:]
        if name in ("GAP", "rot+gap 4", "rot+gap 8"):
            assert shifted.max() < 1e-12, name
        else:
            assert grows(shifted), name
        if name in ("plain", "GAP", "rot 4", "rot 8"):
            assert grows(turned_), name
        else:
            assert turned_[-1] < 1e-12, name
            assert turned_.max() < (0.015 if name == "orbit 4" else 0.002), name


def test_8_turns_are_nearly_invariant_at_45_degrees() -> None:
    """C14: exact for multiples of 90 degrees only, and nearer at 45 than with 4 turns."""
    x = smooth_image()
    at_45 = scipy.ndimage.rotate(x, 45, (1, 2), reshape=False, mode="grid-constant")
    for final in ("rot+gap", "orbit"):
        changes = []
        for rotations in (4, 8):
            K = group(final, rotations, mode="periodic").gram(np.concatenate([x, at_45]), x)[:, 0]
            changes.append(abs(K[1] / K[0] - 1))
        assert 1e-12 < changes[1] < min(1e-3, changes[0])


# How it is computed

ALL = [group(final, rotations, (RELU, RELU), "both") for final in FINALS for rotations in (4, 8)]


def identify(kernel: RotoTranslation) -> str:
    return f"{kernel.final} {kernel.rotations}"


@pytest.mark.parametrize("kernel", ALL, ids=identify)
def test_block_sizes_change_nothing(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However pairs are cut into blocks, and of a block with itself, whose half is computed (C11)."""
    Z, others = np.random.default_rng(6).standard_normal((2, 5, 6, 6, 1))
    a, b = kernel.prepare(Z), kernel.prepare(others, pool="others")
    expected = kernel.pair(a, b)
    same = kernel.pair(a, kernel.prepare(Z))
    monkeypatch.setattr(turned, "block_bytes", lambda xp: 1 << 10)
    monkeypatch.setattr(turned, "_LEAST_RUN", 2)
    np.testing.assert_allclose(kernel.pair(a, b), expected, rtol=1e-12)
    # In an image with itself kappa_0 amplifies the rounding of cosines near 1 (K13).
    np.testing.assert_allclose(kernel.pair(a, kernel.prepare(Z)), same, rtol=1e-10)
    K = kernel.pair(a, a)
    np.testing.assert_array_equal(K, K.swapaxes(1, 2))
    np.testing.assert_allclose(K, same, rtol=1e-10)


@pytest.mark.parametrize("kernel", ALL, ids=identify)
def test_tangent_diagonal_in_single_precision(kernel) -> None:
    """K13: cosines of exactly 1 where position and turn coincide."""
    Z = np.random.default_rng(0).random((4, 8, 8, 1)).astype(np.float32)
    expected = kernel.diag(kernel.prepare(Z.astype(np.float64)))
    K = kernel.gram(Z)
    np.testing.assert_allclose(np.diagonal(K, axis1=1, axis2=2), expected, rtol=1e-5)


@pytest.mark.parametrize("final", FINALS)
def test_4_rotations_share_prepared_blocks_with_the_plain_kernel(final: str) -> None:
    kernel = group(final)
    plain = Convolutional(kernel.layers, pooling_mode=kernel.pooling_mode)
    assert kernel.prepared_description() == plain.prepared_description()
    shared = kernel.pair(plain.prepare(X), plain.prepare(Y, pool="y"))
    np.testing.assert_array_equal(shared, kernel.gram(X, Y))
    descriptions = [group(final, 8).prepared_description() for final in ("rot", "orbit")]
    assert len({str(d) for d in (*descriptions, plain.prepared_description())}) == 3


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("rotations", [4, 8])
def test_blocks_of_other_patches_are_refused(final: str, rotations: int) -> None:
    """Protects from norms of other patches, which have the same shapes."""
    kernel = group(final, rotations)
    other = replace(kernel, layers=tuple(replace(layer, patch=layer.patch + 2) for layer in kernel.layers))
    wrong = other.prepare(X)
    for refused in (lambda: kernel.pair(kernel.prepare(X), wrong), lambda: kernel.diag(wrong)):
        with pytest.raises(KernelError, match="prepare them with this kernel"):
            refused()


@pytest.mark.parametrize("kernel", ALL, ids=identify)
def test_scratch_memory_is_as_stated(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan trusts cost().scratch_bytes: within 20 % of what pair really allocates beside its result."""
    monkeypatch.setenv(VARIABLE, "general")
    Z = np.random.default_rng(0).random((12, 9, 9, 1)).astype(np.float32)
    a, b = kernel.prepare(Z), kernel.prepare(Z, pool="b")
    tracemalloc.start()
    K = kernel.pair(a, b)
    peak = tracemalloc.get_traced_memory()[1] - K.nbytes
    tracemalloc.stop()
    assert kernel.cost(12, 12, (9, 9, 1)).scratch_bytes == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("final", FINALS)
def test_a_path_that_cannot_run_is_refused(final: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned patches and positions have the general path alone; where the plain kernel does the work, it says."""
    kernel = group(final, 8)
    a = kernel.prepare(X)
    monkeypatch.setenv(VARIABLE, "cuda")
    for call in (kernel.diag, lambda a: kernel.pair(a, a)):
        with pytest.raises(KernelError, match=f"{VARIABLE}=cuda, but"):
            call(a)
    monkeypatch.setenv(VARIABLE, "general")
    assert kernel.path(a) == "numpy"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final": "gap"}, "final = 'gap' is unknown"),
        ({"rotations": 6}, "rotations must be 4 or 8, got 6"),
        ({"rotations": True}, "rotations must be 4 or 8"),
        ({"pooling_mode": "reference"}, "pooling_mode = 'reference' shifts the grid"),
        ({"tangent": True}, r"tangent needs relu in every layer; layers\[0\] is exponential"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (Layer(2, **EXP),)}, r"layers\[0\].patch must be odd, got 2"),
        ({"layers": (Layer(3, **EXP), Layer(3, **EXP, subsampling=2))}, r"layers\[1\].subsampling must be 1"),
        (
            {"layers": (Layer(3, **EXP, pooling="average", poolfactor=2),)},
            r"layers\[0\].pooling = 'average' has windows",
        ),
        ({"final": "rot+gap"}, "final = 'rot\\+gap' is the mean over positions"),
        ({"layers": (Layer(3, **EXP, pooling="global"),)}, "final = 'rot' keeps positions apart"),
    ],
)
def test_invalid_architectures_are_refused(values: dict, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        RotoTranslation(**{"layers": (Layer(3, **EXP),), "final": "rot"} | values)


def test_images_that_are_not_square_are_refused() -> None:
    kernel = group("rot")
    kernel.check((6, 6, 1))
    with pytest.raises(KernelError, match="6x8 pixels are not square"):
        kernel.check((6, 8, 1))
    with pytest.raises(KernelError, match="6x8 pixels are not square"):
        kernel.prepare(np.zeros((1, 6, 8, 1)))


def test_a_table_of_an_experiment_file() -> None:
    table = {"kind": "roto-translation", "final": "orbit", "layers": [{"patch": 3, **EXP, "poolfactor": 2}]}
    assert from_description(table) == RotoTranslation((Layer(3, **EXP, poolfactor=2),), "orbit")
    with pytest.raises(KernelError, match=r"kernel.final is missing"):
        from_description({key: value for key, value in table.items() if key != "final"})
    with pytest.raises(KernelError, match=r"kernel.layers\[0\].patch must be odd"):
        from_description({**table, "layers": [{"patch": 2, **EXP}]})


# Digits


def accuracy(kernel: Kernel, train: np.ndarray, test: np.ndarray, y: np.ndarray, y_test: np.ndarray) -> float:
    """Percent right of ridge regression on one-hot targets less 1/10, ridge 1e-4 (R1, R2)."""
    n = len(train)
    K = kernel.gram(train).astype(np.float64) + n * 1e-4 * np.eye(n)
    alpha = np.linalg.solve(K, np.eye(10)[y] - 0.1)
    return 100 * float(np.mean((kernel.gram(test, train) @ alpha).argmax(axis=1) == y_test))


@pytest.mark.slow
def test_turned_digits() -> None:
    """X30: 200 digits to learn from; what was learnt upright fails on turned digits, unless the kernel is invariant."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, y = (digits.images[..., None] / 16).astype(np.float32), digits.target
    train, test = slice(0, 200), slice(1000, 1200)
    layers = (Layer(3, **EXP, subsampling=2), Layer(3, **EXP))
    sets = (images[train], images[test], y[train], y[test])
    turned_sets = (images[train], turn(images[test], 1), y[train], y[test])
    plain = Convolutional(layers)
    assert accuracy(plain, *sets) == pytest.approx(95.0, abs=0.5)
    assert accuracy(plain, *turned_sets) == pytest.approx(11.5, abs=0.5)
    for kernel, expected in ((group("orbit"), 94.0), (group("rot+gap", poolfactor=1), 92.0)):
        upright = accuracy(kernel, *sets)
        assert upright == pytest.approx(expected, abs=0.5)
        assert accuracy(kernel, *turned_sets) == upright


@pytest.mark.parametrize("quarters", range(4))
def test_weights_of_positions_that_meet_turned(quarters: int) -> None:
    """The trace over u of H B H' turned back, word by word, with pooling that no turn maps to itself."""
    rng = np.random.default_rng(quarters)
    stage = Stage(Layer(3, "exponential", sigma=0.6), (5, 5), *rng.random((2, 4, 5)))
    network = Network((stage,), False)
    engine = TurnedRecursion(network, False, Angles(0, 0), quarters, np, np.dtype(np.float64), 1)
    H = np.kron(stage.rows, stage.columns)
    turned_back = np.rot90(np.arange(16).reshape(4, 4), -quarters).ravel()
    np.testing.assert_allclose(engine._weights, H.T @ H[turned_back], rtol=1e-13)


@pytest.mark.parametrize("free", [1 << 40, 1 << 30])
@pytest.mark.parametrize("tangent", [False, "both"])
@pytest.mark.parametrize("final", FINALS)
def test_scratch_memory_on_a_device_has_a_limit(
    final: str, tangent: Any, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are as large as a gigabyte of scratch memory allows, and half of what is free."""
    monkeypatch.setattr(device, "free_bytes", lambda: free)
    xp: Any = SimpleNamespace(asarray=np.asarray)
    network = group(final, kernels=(RELU,) * 3).network((32, 32))
    for turns in (Angles(0, 0), Angles(1, 0)):
        engine = TurnedRecursion(network, tangent, turns, 1, xp, np.dtype(np.float32), 3)
        for sides in ((128, 128), (4096, 1), (1, 4096)):
            assert 1 << 28 < engine.cost(*sides).scratch_bytes <= min(1 << 30, free // 2)
