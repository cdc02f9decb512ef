"""Convolutional kernels: G4, loops as oracle, identities of C5 to C16."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import reference
from contracts import KernelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import costs, displacements, general, native, recursion
from kernels.base import KernelError
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.fused import VARIABLE
from kernels.patches import extract_patches

EXP = {"kernel": "exponential", "sigma": 0.6}
RELU = {"kernel": "relu"}
POLY2 = {"kernel": "polynomial", "degree": 2}
LINEAR = {"kernel": "linear"}


@pytest.fixture(autouse=True)
def general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others must equal this path, which is there on any machine."""
    monkeypatch.setenv(VARIABLE, "general")


def network(kernels, subsampling, pooling="gaussian", mode="reference", tangent=False, **options):
    """Layers with 3x3 patches, one for each pair of a kernel and a subsampling."""
    layers = (
        Layer(**{"patch": 3, **kernel, "pooling": pooling, "subsampling": t, **options})
        for kernel, t in zip(kernels, subsampling, strict=True)
    )
    return Convolutional(tuple(layers), tangent, mode)


class TestExponential(KernelContract):
    kernel = network([EXP, EXP], (2, 1))
    different = network([EXP, POLY2], (2, 1))
    shape = (8, 8, 1)


class TestRandomFeatures(KernelContract):
    kernel = network([RELU, RELU], (1, 2), mode="same")
    different = network([RELU, RELU], (1, 2), mode="periodic")
    shape = (4, 6, 3)


class TestTangent(KernelContract):
    kernel = network([RELU, RELU, RELU], (2, 1, 1), "average", tangent=True)
    different = network([RELU, RELU, RELU], (2, 1, 1), "average")
    shape = (8, 6, 2)


class TestBothInStrips(KernelContract):
    """A grid of which one pair exceeds a strip, pooled axis by axis."""

    kernel = network([RELU, RELU], (3, 2), tangent="both")
    different = network([RELU, RELU], (3, 1), tangent="both")
    shape = (18, 20, 2)

    @pytest.fixture(autouse=True)
    def small_strips(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recursion, "block_bytes", lambda xp: 1 << 16)


class TestGlobal(KernelContract):
    kernel = Convolutional((Layer(2, "polynomial", degree=3), Layer(3, "relu", pooling="global")))
    different = Convolutional((Layer(2, "polynomial", degree=3), Layer(3, "relu", pooling="average")))
    shape = (5, 7, 1)


class TestSquareAndLinear(KernelContract):
    kernel = Convolutional((Layer(2, "square", patch_norm=True), Layer(4, "linear", scale=0.5)))
    different = Convolutional((Layer(2, "square"), Layer(4, "linear", scale=0.5)))
    shape = (5, 6, 2)
    float32_error = 2e-6


# Golden values

_i, _j = np.mgrid[:8, :8]
A = np.sin(0.3 + 0.7 * _i + 1.1 * _j)
B = 0.5 + 0.5 * np.cos(0.2 + 0.5 * _i - 0.9 * _j)
IMAGES = np.stack([A, B])[..., None]

SETTINGS = {
    "gaussian": ("gaussian", "reference", (2, 1)),
    "average": ("average", "reference", (2, 2)),
    "strided": ("strided", "reference", (2, 1)),
    "same, gaussian": ("gaussian", "same", (2, 2)),
    "same, average": ("average", "same", (2, 2)),
    "same, strided": ("strided", "same", (2, 2)),
    "periodic, gaussian": ("gaussian", "periodic", (2, 2)),
    "periodic, average": ("average", "periodic", (2, 2)),
    "periodic, strided": ("strided", "periodic", (2, 2)),
    "none": ("average", "reference", (1, 1)),
}
MODELS = {
    "exp/exp": ([EXP, EXP], False),
    "RF": ([RELU, RELU], False),
    "NTK": ([RELU, RELU], True),
    "poly2/poly2": ([POLY2, POLY2], False),
    "exp/poly2": ([EXP, POLY2], False),
    "exp/linear": ([EXP, LINEAR], False),
}
# K(a,a), K(a,b), K(b,b)
GOLDEN = """
gaussian            | exp/exp     | 7.991696118206072 | 2.582363163992594 | 13.384627079269
gaussian            | RF          | 19.61704802292757 | 16.55431354404773 | 24.84360328751581
gaussian            | NTK         | 42.01874818081942 | 27.8881757199942  | 60.27284156893121
gaussian            | poly2/poly2 | 16.93582318314856 | 3.371229171716313 | 14.61641503645189
gaussian            | exp/poly2   | 8.354193864496914 | 1.512243050872842 | 13.9999587682682
gaussian            | exp/linear  | 10.86116056590918 | 5.199993853244273 | 17.55455658636082
average             | exp/exp     | 17.8118744671418  | 5.36684430693229  | 27.64381722792768
average             | RF          | 44.92029776884893 | 34.23291547876592 | 50.67629831100805
average             | NTK         | 92.61143139705535 | 52.94876279280382 | 123.156308317224
average             | poly2/poly2 | 27.62825484939278 | 5.737927293077346 | 29.73083498287557
average             | exp/poly2   | 16.30341561664186 | 1.901011714988839 | 28.29779510113094
average             | exp/linear  | 22.47601978873881 | 9.344999624802807 | 37.3218881321074
strided             | exp/exp     | 112.4630534538177 | 8.445921985853457 | 80.06206196657949
strided             | RF          | 112.4630534538177 | 49.33411521901808 | 80.06206196657949
strided             | NTK         | 337.3891603614532 | 76.76587688664023 | 240.1861858997385
strided             | poly2/poly2 | 112.4630534538177 | 4.446819455361815 | 80.06206196657949
strided             | exp/poly2   | 112.4630534538177 | 1.613091737532505 | 80.06206196657949
strided             | exp/linear  | 112.4630534538177 | 12.28822450905358 | 80.06206196657949
same, gaussian      | exp/exp     | 3.279871000289078 | 1.262000912128845 | 6.170025528052152
same, gaussian      | RF          | 9.365668237939388 | 8.283633301946995 | 12.96642520948157
same, gaussian      | NTK         | 19.13904676926212 | 13.43546525661343 | 30.17202784007304
same, gaussian      | poly2/poly2 | 7.631575340946031 | 1.754891803231594 | 6.745873836231287
same, strided       | NTK         | 297.3450734297816 | 76.04325939101891 | 250.1199550500321
same, average       | exp/exp     | 17.8118744671418  | 5.36684430693229  | 27.64381722792768
periodic, gaussian  | exp/exp     | 21.40851441904576 | 8.517933046652549 | 46.72054762539684
periodic, gaussian  | RF          | 62.81263856485636 | 53.16401978227545 | 83.33220466685162
periodic, gaussian  | NTK         | 132.3574761413249 | 93.08897775317209 | 212.5820500732231
periodic, gaussian  | poly2/poly2 | 50.74385108270094 | 17.08207073015804 | 53.82422944097834
periodic, average   | exp/exp     | 30.55232316605243 | 10.0178525502589  | 50.1404572310277
periodic, average   | NTK         | 173.5534777461874 | 102.2097527893512 | 230.4593532956161
periodic, strided   | NTK         | 484.3090997461832 | 117.4705569823377 | 357.3814196652444
none                | RF          | 1933.093081074763 | 883.165331349762  | 1442.83866370666
none                | NTK         | 5799.279243224289 | 1479.236347775451 | 4328.515991119979
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in GOLDEN.strip().splitlines()]


@pytest.mark.parametrize(("setting", "model", "aa", "ab", "bb"), ROWS)
def test_golden_values(setting: str, model: str, aa: str, ab: str, bb: str) -> None:
    """G4: every row, 1e-10 in float64 (1e-8 for the NTK of an image with itself), 1e-4 in float32."""
    pooling, mode, subsampling = SETTINGS[setting]
    kernels, tangent = MODELS[model]
    kernel = network(kernels, subsampling, pooling, mode, tangent)
    expected = np.array([[float(aa), float(ab)], [float(ab), float(bb)]])
    K = kernel.gram(IMAGES)
    np.testing.assert_allclose(K[0, 1], expected[0, 1], rtol=1e-10)
    np.testing.assert_allclose(np.diag(K), np.diag(expected), rtol=1e-8 if tangent else 1e-10)
    np.testing.assert_allclose(kernel.gram(IMAGES.astype(np.float32)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernels", "tangent", "expected"),
    [
        ([RELU, RELU], False, (15.31676549561103, 11.78032593708398, 13.98523888177282)),
        ([RELU, RELU], True, (26.03815948668982, 17.53400111885165, 30.53256439180502)),
        ([EXP, EXP], False, (4.226471959714603, 2.167154937915018, 5.447031725134999)),
    ],
)
def test_golden_values_of_global_pooling(kernels: list, tangent: bool, expected: tuple) -> None:
    """G4: no pooling, then the mean over all pairs of positions."""
    first, last = (Layer(3, **k, pooling=p) for k, p in zip(kernels, ("average", "global"), strict=True))
    K = Convolutional((first, last), tangent).gram(IMAGES)
    np.testing.assert_allclose([K[0, 0], K[0, 1], K[1, 1]], expected, rtol=1e-8 if tangent else 1e-10)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((Layer(3, **EXP, subsampling=2),), 3.660478172637486),
        ((Layer(2, **EXP, poolfactor=2), Layer(4, **EXP, poolfactor=3)), 12.35765479458275),
        ((Layer(3, **EXP, pooling="average"),) * 2, 180.1870984675971),
    ],
)
def test_other_golden_values(layers: tuple, expected: float) -> None:
    """G4: one layer; even patches without subsampling; no pooling."""
    assert Convolutional(layers).gram(IMAGES)[0, 1] == pytest.approx(expected, rel=1e-10)


# Loops as oracle

_kernels = st.sampled_from(
    [
        ("relu", None, {}),
        ("exponential", 0.6, {"sigma": 0.6}),
        ("exponential", 1.3, {"sigma": 1.3}),
        ("polynomial", 2, {"degree": 2}),
        ("polynomial", 3, {"degree": 3}),
        ("linear", 0.7, {"scale": 0.7}),
        ("square", None, {}),
    ]
)


@st.composite
def architectures(draw):
    """Layers as the kernel takes them and as the oracle takes them, on a small grid."""
    mode = draw(st.sampled_from(["reference", "same", "periodic"]))
    tangent = draw(st.booleans())
    count = draw(st.integers(1, 3))
    shape = (draw(st.integers(2, 5)), draw(st.integers(2, 5)), draw(st.sampled_from([1, 2, 3, 5])))
    layers, plain = [], []
    for number in range(count):
        kernel, parameter, parameters = ("relu", None, {}) if tangent else draw(_kernels)
        last = number == count - 1
        pooling = draw(st.sampled_from(["gaussian", "average", "strided"] + ["global"] * last))
        t = 1 if pooling == "global" or mode == "reference" else draw(st.integers(1, 2))
        p = t if pooling in ("global", "strided") else draw(st.integers(1, 3))
        common = {"patch": draw(st.integers(1, 4)), "kernel": kernel, "pooling": pooling, "subsampling": t}
        common |= {"poolfactor": p, "patch_norm": draw(st.booleans())}
        layers.append(Layer(**common, **parameters))
        plain.append(common | {"parameter": parameter})
    return Convolutional(tuple(layers), tangent, mode), plain, shape


@settings(max_examples=60, deadline=None)
@given(
    architecture=architectures(),
    strip=st.sampled_from([1 << 10, 1 << 13]),
    seed=st.integers(0, 100),
    by_displacement=st.booleans(),
)
def test_equals_loops(architecture, strip: int, seed: int, by_displacement: bool) -> None:
    """Random architectures in blocks of several pairs, in strips, by displacement, and cut raggedly, against plain
    loops."""
    kernel, plain, shape = architecture
    try:
        kernel.check(shape)
    except KernelError:
        return
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((2, *shape)), rng.standard_normal((1, *shape))
    expected = np.array(
        [
            [
                reference.convolutional(x, y, plain, kernel.tangent, kernel.pooling_mode, same=x is y)
                for y in (*X, *Y)
            ]
            for x in X
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recursion, "block_bytes", lambda xp: strip)
        patch.setattr(recursion, "_KRONECKER_POSITIONS", 0 if strip == 1 << 10 else 256)
        patch.setattr(recursion, "_GROUP_BYTES", 1 << 11)
        patch.setattr(recursion, "_EXPLICIT_GROUP_BYTES", 1 << 11)
        patch.setattr(displacements, "_LEAST_BLOCK_BYTES", strip)
        patch.setattr(general, "by_displacement", lambda *_: by_displacement)
        a = kernel.prepare(X, np.arange(2), "x")
        b = kernel.prepare(np.concatenate([X, Y]), np.arange(3), "x")
        K = kernel.pair(a, b)
    # Where a self-Gram is rounded, patches at a border can have cosines near 1 with one another.
    rtol = 1e-7 if kernel.tangent else 1e-11
    scale = np.abs(expected).max()
    np.testing.assert_allclose(K, expected, rtol=rtol, atol=rtol * scale)


# Identities

RNG_IMAGES = np.random.default_rng(5).standard_normal((4, 9, 7, 2))


@pytest.mark.parametrize("mode", ["reference", "same", "periodic"])
@pytest.mark.parametrize("pooling", ["gaussian", "average", "strided"])
def test_weights_equal_pooling_and_trace(mode: str, pooling: str) -> None:
    """C9 = C5: appending a layer that passes everything on makes the last pooling really executed."""
    identity = Layer(1, "linear", pooling="strided" if mode != "reference" else "average")
    kernel = network([EXP, EXP], (1, 2), pooling, mode)
    executed = Convolutional((*kernel.layers, identity), pooling_mode=mode)
    np.testing.assert_allclose(kernel.gram(RNG_IMAGES), executed.gram(RNG_IMAGES), rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tangent_of_strided_identical_images(depth: int) -> None:
    """C8: (layers + 1) times the RF value."""
    kernel = network([RELU] * depth, (1,) * depth, "strided", "same", "both")
    rf, ntk = kernel.diag(kernel.prepare(RNG_IMAGES))
    np.testing.assert_allclose(ntk, (depth + 1) * rf, rtol=1e-13)


@pytest.mark.parametrize("positions", [0, 256])
@pytest.mark.parametrize("bytes_", [1 << 10, 1 << 14, 1 << 22])
def test_block_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch, bytes_: int, positions: int) -> None:
    """Strips, blocks of pairs and both ways of pooling are one function (C11)."""
    kernel = network([RELU, RELU], (2, 1), tangent="both")
    others = np.random.default_rng(6).standard_normal((3, 9, 7, 2))
    expected = kernel.gram(RNG_IMAGES, others)
    monkeypatch.setattr(recursion, "block_bytes", lambda xp: bytes_)
    monkeypatch.setattr(recursion, "_KRONECKER_POSITIONS", positions)
    monkeypatch.setattr(recursion, "_GROUP_BYTES", bytes_)
    np.testing.assert_allclose(kernel.gram(RNG_IMAGES, others), expected, rtol=1e-12)


def test_patch_norms_are_those_of_the_self_gram() -> None:
    """C6, in float64 whatever the images' dtype."""
    kernel = network([EXP, RELU], (2, 1))
    prepared = kernel.prepare(RNG_IMAGES.astype(np.float32))
    x = RNG_IMAGES[1].astype(np.float32).astype(np.float64)
    gram = reference.patch_gram(np.einsum("ijc,kmc->ijkm", x, x), 3)
    norm_1 = np.sqrt(np.einsum("ijij->ij", gram))
    np.testing.assert_allclose(prepared.arrays["norm1"][1], norm_1.ravel(), rtol=1e-7)
    M = np.empty_like(gram)
    for i, j, k, m in np.ndindex(*gram.shape):
        scale = norm_1[i, j] * norm_1[k, m]
        M[i, j, k, m] = scale * math.exp((gram[i, j, k, m] / scale - 1) / 0.36)
    H, C = (reference.pooling_matrix(n, "gaussian", 2, 2, "reference") for n in (9, 7))
    pooled = reference.patch_gram(reference.pool_gram(M, H, C), 3)
    norm_2 = np.sqrt(np.einsum("ijij->ij", pooled)).ravel()
    np.testing.assert_allclose(prepared.arrays["norm2"][1], norm_2, rtol=1e-7)


def test_one_layer_without_pooling_is_a_sum_over_patches() -> None:
    """C12: sum over u of k(P x(u), P x'(u))."""
    patches = extract_patches(RNG_IMAGES, 3).reshape(4, 63, -1)
    local = DotProduct("exponential", sigma=0.6)
    expected = sum(local.gram(patches[:, u]) for u in range(63))
    kernel = Convolutional((Layer(3, **EXP, pooling="average"),))
    np.testing.assert_allclose(kernel.gram(RNG_IMAGES), expected, rtol=1e-12)


def test_one_layer_with_pooling_is_a_weighted_sum_over_patches() -> None:
    """C12: sum over u, v of (H^T H)[u, v] k(P x(u), P x'(v))."""
    x, y = (extract_patches(RNG_IMAGES[i : i + 1], 3).reshape(63, -1) for i in (0, 1))
    H = np.kron(*(reference.pooling_matrix(n, "gaussian", 2, 2, "reference") for n in (9, 7)))
    expected = (H.T @ H * DotProduct("arc-cosine").gram(x, y)).sum()
    kernel = network([RELU], (2,))
    assert kernel.gram(RNG_IMAGES[:1], RNG_IMAGES[1:2])[0, 0] == pytest.approx(expected, rel=1e-12)


def test_one_pixel_images_are_vectors() -> None:
    """On a 1x1 grid with 1x1 patches, D layers are the fully connected kernel of D + 1 weight matrices."""
    X = RNG_IMAGES[:, :2, 0].reshape(4, 1, 1, 4)
    for tangent, family in ((False, "rf"), (True, "ntk")):
        kernel = network([RELU] * 3, (1, 1, 1), "average", tangent=tangent, patch=1)
        expected = FullyConnected(family, 4).gram(X.reshape(4, 4))
        np.testing.assert_allclose(kernel.gram(X), expected, rtol=1e-9)


def test_patch_norm_scales_homogeneous_kernels() -> None:
    """C2: by the product of size^-2 over the layers."""
    kernel = Convolutional((Layer(3, **RELU), Layer(2, **RELU)), "both")
    scaled = Convolutional(tuple(replace(layer, patch_norm=True) for layer in kernel.layers), "both")
    np.testing.assert_allclose(scaled.gram(RNG_IMAGES), kernel.gram(RNG_IMAGES) / 36, rtol=1e-12)


def test_global_pooling_is_the_mean_over_pairs_of_positions() -> None:
    """C10: and a mean of all of B^M equals gaussian-free pooling of everything by an average."""
    kernel = Convolutional((Layer(3, **RELU, pooling="average"), Layer(3, **RELU, pooling="global")), "both")
    square = RNG_IMAGES[:, :7, :7]
    average = replace(kernel.layers[1], pooling="average", subsampling=7, poolfactor=7)
    pooled = replace(kernel, layers=(kernel.layers[0], average))
    np.testing.assert_allclose(kernel.gram(square), pooled.gram(square), rtol=1e-12)


@pytest.mark.parametrize("tangent", [False, True])
def test_translations(tangent: bool) -> None:
    """C15: periodic kernels do not change when both images are shifted; with GAP, when one is."""
    X, Z = np.random.default_rng(0).standard_normal((2, 3, 6, 8, 2))
    local = network([RELU, RELU], (1, 1), "gaussian", "periodic", tangent, poolfactor=2)
    expected = local.gram(X, Z)
    for shift in ((1, 0), (2, 3)):
        shifted = (np.roll(images, shift, axis=(1, 2)) for images in (X, Z))
        np.testing.assert_allclose(local.gram(*shifted), expected, rtol=1e-12)
    strided = network([RELU, RELU], (2, 1), "gaussian", "periodic", tangent)
    Y = np.roll(X, (2, 4), axis=(1, 2))
    np.testing.assert_allclose(strided.gram(Y[:1], Y[1:]), strided.gram(X[:1], X[1:]), rtol=1e-12)
    first = replace(local.layers[0], pooling="average", poolfactor=1)
    invariant = replace(local, layers=(first, Layer(3, **RELU, pooling="global")))
    np.testing.assert_allclose(
        invariant.gram(np.roll(X[:1], (3, 1), axis=(1, 2)), X[1:]), invariant.gram(X[:1], X[1:]), rtol=1e-12
    )


def test_more_pooling_is_more_invariant() -> None:
    """C15: the relative distance of an image to its shift decreases strictly with the last poolfactor."""
    x = np.random.default_rng(0).standard_normal((1, 10, 10, 1))
    pair = np.concatenate([x, np.roll(x, 1, axis=1)])
    distances = []
    for p in (1, 2, 3, 4):
        layers = (Layer(3, **EXP, poolfactor=1), Layer(3, **EXP, poolfactor=p))
        K = Convolutional(layers, pooling_mode="periodic").gram(pair)
        distances.append((K[0, 0] + K[1, 1] - 2 * K[0, 1]) / K[0, 0])
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))


def test_norms() -> None:
    """C16: at most (product of size^2) |x|^2 under non-overlapping averages; |x|^2 with nothing pooled."""
    energy = (RNG_IMAGES**2).sum(axis=(1, 2, 3))
    kernel = Convolutional(
        (Layer(3, **EXP, pooling="average", subsampling=2), Layer(2, **RELU, pooling="average"))
    )
    assert np.all(kernel.diag(kernel.prepare(RNG_IMAGES)) <= 36 * energy)
    identity = network([EXP, POLY2, RELU], (1, 1, 1), "strided", "same", patch=1)
    np.testing.assert_allclose(identity.diag(identity.prepare(RNG_IMAGES)), energy, rtol=1e-12)


def test_tangent_diagonal_in_single_precision() -> None:
    """K13: cosines of exactly 1 keep the NTK of an image with itself right to float32's own precision."""
    kernel = network([RELU, RELU], (2, 1), tangent=True)
    X = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    expected = kernel.diag(kernel.prepare(X.astype(np.float64)))
    np.testing.assert_allclose(np.diag(kernel.gram(X)), expected, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "tangent"), [(EXP, False), (RELU, "both")])
def test_single_precision_at_full_size(kernel: dict, tangent: bool | str) -> None:
    """Sums over 34,000 terms go in levels: 32x32 images are right to 1e-6 of the diagonal."""
    X = np.random.default_rng(0).random((3, 32, 32, 3)).astype(np.float32)
    model = network([kernel, kernel], (2, 5), tangent=tangent)
    single, double = model.gram(X[:1], X[1:]), model.gram(X[:1].astype(float), X[1:].astype(float))
    scale = model.diag(model.prepare(X[:1].astype(float)))
    assert (np.abs(single - double) / scale[..., None]).max() < 1e-6


def test_random_feature_and_tangent_kernels_share_prepared_blocks() -> None:
    """Norms do not depend on the last layer's function and pooling, nor on ``tangent``."""
    rf, ntk = (network([RELU, RELU], (2, 1), tangent=t) for t in (False, True))
    assert rf.prepared_description() == ntk.prepared_description()
    other_last = replace(rf, layers=(rf.layers[0], Layer(3, **EXP, pooling="global")))
    assert other_last.prepared_description() == rf.prepared_description()
    assert network([EXP, RELU], (2, 1)).prepared_description() != rf.prepared_description()


def test_vanishing_grid_is_refused_with_its_sizes() -> None:
    kernel = network([EXP, EXP], (2, 5))
    with pytest.raises(
        KernelError, match=r"8x8 -> 3x3 -> 0x0 at layer 2 \(gaussian pooling, subsampling 5\)"
    ):
        kernel.check((8, 8, 1))
    with pytest.raises(KernelError, match="8x8 -> 3x3 -> 0x0"):
        kernel.prepare(np.zeros((1, 8, 8, 1)))
    kernel.check((32, 32, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Convolutional(()), "layers is empty"),
        (lambda: network([RELU, EXP], (1, 1), tangent=True), r"layers\[1\] is exponential"),
        (lambda: network([RELU, RELU], (1, 1), "global"), r"layers\[0\] pools globally"),
        (lambda: network([RELU], (1,), mode="valid"), "pooling_mode = 'valid'"),
        (lambda: network([RELU], (1,), tangent="yes"), "tangent must be true or false"),
        (lambda: Layer(3, "relu", pooling="gausian"), "did you mean 'gaussian'"),
        (lambda: Layer(0, "relu"), "patch must be a whole number"),
        (lambda: Layer(3, "relu", subsampling=0), "subsampling must be a whole number"),
        (lambda: Layer(3, "relu", sigma=1.0), "sigma has no meaning"),
        (lambda: Layer(3, "exponential"), "sigma is missing"),
        (lambda: Layer(3, "relu", pooling="strided", poolfactor=3), "poolfactor has no meaning"),
        (lambda: Layer(3, "relu", pooling="global", subsampling=2), "no meaning for global"),
    ],
)
def test_invalid_architectures_are_refused(build, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        build()


def test_an_absent_poolfactor_is_the_subsampling() -> None:
    """However it is written, one kernel has one fingerprint."""
    implicit, explicit = Layer(3, **EXP, subsampling=2), Layer(3, **EXP, subsampling=2, poolfactor=2)
    assert Convolutional((implicit,)).fingerprint == Convolutional((explicit,)).fingerprint


@pytest.mark.parametrize(
    ("kernel", "n", "shape"),
    [
        (network([EXP, EXP], (2, 5)), 12, (32, 32, 3)),
        (network([RELU, RELU], (2, 5), tangent="both"), 12, (28, 28, 1)),
        (network([EXP, EXP], (2, 1)), 128, (8, 8, 1)),
        (network([RELU, RELU], (2, 1), tangent=True), 128, (8, 8, 1)),
        (network([EXP, EXP, EXP], (1, 2, 2)), 4, (24, 24, 1)),
        (network([POLY2, EXP], (2, 5)), 12, (32, 32, 3)),
        (network([RELU, RELU], (2, 2), "average", tangent="both"), 60, (16, 16, 3)),
        (network([EXP, EXP], (1, 1), "average"), 300, (24, 24, 2)),
    ],
)
def test_scratch_memory_is_as_stated(kernel: Convolutional, n: int, shape: tuple) -> None:
    """The plan trusts cost().scratch_bytes: within 20 % of what pair really allocates beside its result."""
    X = np.random.default_rng(0).random((n, *shape)).astype(np.float32)
    a, b = kernel.prepare(X), kernel.prepare(X)
    tracemalloc.start()
    K = kernel.pair(a[:2], b)
    peak = tracemalloc.get_traced_memory()[1] - K.nbytes
    tracemalloc.stop()
    assert kernel.cost(2, n, shape).scratch_bytes == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize(
    ("kernel", "n", "shape"),
    [
        (network([RELU, RELU], (2, 5), tangent=True), 12, (28, 28, 1)),
        pytest.param(network([RELU, RELU], (2, 1), tangent="both"), 64, (16, 16, 1), marks=pytest.mark.slow),
        (network([RELU, RELU], (2, 2), "strided", "same", "both"), 64, (24, 24, 3)),
    ],
)
def test_scratch_memory_of_parallel_patches_is_as_stated(kernel: Convolutional, n: int, shape: tuple) -> None:
    """What is computed in float64 beside a block, and finding out what to, counts as well."""
    X = np.random.default_rng(0).random((n, *shape)).astype(np.float32)
    X[: n // 2] = X[:1]
    a = kernel.prepare(X)
    tracemalloc.start()
    K = kernel.pair(a, a)
    peak = tracemalloc.get_traced_memory()[1] - K.nbytes
    tracemalloc.stop()
    assert kernel.cost(n, n, shape).scratch_bytes == pytest.approx(peak, rel=0.2)


def test_costs_know_what_is_left_out() -> None:
    """Protects plans: without pooling, or with small last windows, few pairs of positions count; poly2 goes by its
    explicit features; a tangent kernel costs more than the random-feature kernel."""
    shape = (32, 32, 3)

    def cost(kernels, subsampling, *options, tangent=False):
        return network(kernels, subsampling, *options, tangent=tangent).cost(1, 1, shape)

    full = cost([EXP, EXP], (2, 5))
    assert cost([EXP, EXP], (2, 1), "strided").operations < full.operations / 20
    assert cost([EXP, EXP], (1, 1), "average").transcendentals == 2 * 32 * 32
    assert cost([POLY2, EXP], (2, 5)).operations < full.operations / 1.5
    assert cost([POLY2, EXP], (2, 5)).transcendentals == 225**2
    # All of layer 2, and in layer 1 the strips of C9's support: 902,849 entries cannot be undercut.
    assert 902_849 < full.transcendentals < 1024**2 + 225**2
    both = [costs.seconds(cost([RELU, RELU], (2, 5), tangent=t), 4) for t in (False, True)]
    assert both[0] < both[1] < 2 * both[0]


@pytest.mark.parametrize(
    ("patches", "shape", "message"),
    [
        ((100_001,), (8, 8, 1), r"patch of layer 1 \(100001x100001\) .* acts on: 8x8;"),
        ((9,), (8, 8, 1), "layer 1 .* 8x8;"),
        ((3, 5), (8, 8, 1), "layer 2 .* 8x8 -> 3x3;"),
    ],
)
def test_patches_larger_than_their_grid_are_refused(patches: tuple, shape: tuple, message: str) -> None:
    """Protects from arrays of terabytes, and from patches of zeros; sizes are given layer by layer."""
    kernel = Convolutional(tuple(Layer(patch, "relu", subsampling=2) for patch in patches))
    with pytest.raises(KernelError, match=message):
        kernel.check(shape)
    Convolutional((Layer(8, "relu"),)).check((8, 8, 1))
    Convolutional((Layer(8, "relu"),), pooling_mode="same").check((1, 8, 1))


@pytest.mark.parametrize("path", ["general", "compiled"])
def test_blocks_of_another_network_are_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from norms read by another grid's sizes: wrong numbers, or memory that is not theirs."""
    if path == "compiled" and native_obstacle() is not None:
        pytest.skip("the compiled path is not here")
    monkeypatch.setenv(VARIABLE, path)
    layer = {"patch": 3, "kernel": "exponential", "sigma": 0.6}
    first, second, third = (
        Convolutional(tuple(Layer(**layer, subsampling=s) for s in steps))
        for steps in ((4, 1), (2, 5), (2, 2, 2))
    )
    X = np.random.default_rng(0).random((3, 32, 32, 3))
    other = replace(first.prepare(X), preparation="")  # by shapes alone
    for kernel in (second, third):
        own = kernel.prepare(X)
        for blocks in ((own, other), (other, own), (other, other)):
            with pytest.raises(KernelError, match="prepare them with this kernel"):
                kernel.pair(*blocks)
        with pytest.raises(KernelError, match="prepare them with this kernel"):
            kernel.diag(other)


def test_blocks_of_other_patches_on_the_same_grids_are_refused() -> None:
    """Protects from norms of other patches, of the shapes that this kernel's have: a matrix that looks like one."""
    X = np.random.default_rng(0).random((3, 10, 10, 1))
    kernel, other = (network([EXP, RELU], (2, 1), mode="same", patch=patch) for patch in (3, 5))
    a, wrong = kernel.prepare(X), other.prepare(X)
    assert [x.shape for x in a.arrays.values()] == [x.shape for x in wrong.arrays.values()]
    for blocks in ((a, wrong), (wrong, a), (wrong, wrong), (a[:2], wrong[:2])):
        with pytest.raises(KernelError, match="prepare them with this kernel"):
            kernel.pair(*blocks)
    with pytest.raises(KernelError, match="prepare them with this kernel"):
        kernel.diag(wrong)
    last = replace(kernel, layers=(kernel.layers[0], Layer(3, **EXP, pooling="global")))
    np.testing.assert_array_equal(last.pair(a, a), last.gram(X))


def native_obstacle() -> str | None:
    kernel = Convolutional((Layer(patch=3, kernel="exponential", sigma=0.6),))
    return native.obstacle(kernel.network((8, 8)), False, np.zeros((1, 8, 8, 1)))
