"""The compiled path: the general path's numbers for every model, size and instruction set; absence without fuss."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import anchor_products
import models
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import EXP, LINEAR, MODELS, POLY3, RELU, SQUARE

from kernels import fused, general, native
from kernels.base import KernelError, same_rows
from kernels.convolutional import Convolutional, Layer
from kernels.features.base import InMemory
from kernels.features.ckn import NystromCKN
from kernels.native import library, sources
from kernels.network import Network


def why_absent() -> str | None:
    try:
        library.load()
    except KernelError as error:
        return str(error)
    return None


needs_code = pytest.mark.skipif(why_absent() is not None, reason=f"needs the compiled code: {why_absent()}")

# Relative to sqrt(k(x, x) k(y, y)).
ERROR = {np.float32: 1e-6, np.float64: 1e-10}
# Patches of different samples, or positions, that are parallel: kappa_0 has an infinite slope there (K13).
TANGENT_ERROR = {np.float32: 1e-4, np.float64: 1e-8}


# Of one entry, relative to the value of a cosine of 1; most of it is 1/sigma^2 = 44.4 in single precision.
ENTRY_ERROR = {np.float32: 2e-6, np.float64: 2e-15}


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(library.VARIABLE, request.param)
    reason = why_absent()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def noise(n: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Images without parallel patches."""
    return np.random.default_rng(seed).standard_normal((n, *shape))


def network_of(kernel: Convolutional, X: np.ndarray):
    return kernel.network(X.shape[1:])


def prepare(kernel: Convolutional, X: np.ndarray):
    """Prepared by the general path, so that norms do not hide or add anything."""
    network = network_of(kernel, X)
    norms = general.patch_norms(network, X)
    arrays = {"image": X} | {f"norm{k}": norm for k, norm in enumerate(norms, 1)}
    return native.Prepared(arrays, np.arange(len(X)), "pool")


def block(path, kernel: Convolutional, a, b) -> np.ndarray:
    network = network_of(kernel, a.arrays["image"])
    return path.pair(network, kernel.tangent, a, b, same_rows(a, b))


def compare(kernel: Convolutional, X: np.ndarray, dtype: type, error: dict[type, float]) -> None:
    """Whole, in a ragged block whose rows are not its columns, the diagonal, and one beside it; against float64."""
    X = X.astype(dtype)
    network = network_of(kernel, X)
    assert native.obstacle(network, kernel.tangent, X) is None
    exact = prepare(kernel, X.astype(np.float64))
    expected = block(general, kernel, exact, exact)
    diagonal = np.diagonal(expected, axis1=1, axis2=2)
    root = np.sqrt(diagonal)
    scale = root[:, :, None] * root[:, None, :]
    a = prepare(kernel, X)
    got = block(native, kernel, a, a)
    assert got.dtype == dtype
    assert np.array_equal(got, got.swapaxes(1, 2))
    assert (np.abs(got - expected) <= error[dtype] * scale).all()
    part = block(native, kernel, a[1:], a[: len(X) - 1])
    assert (np.abs(part - expected[:, 1:, :-1]) <= error[dtype] * scale[:, 1:, :-1]).all()
    own = native.paired(network, kernel.tangent, a, a, True)
    np.testing.assert_allclose(own, np.diagonal(got, axis1=1, axis2=2), rtol=4 * np.finfo(dtype).eps)
    others = native.paired(network, kernel.tangent, a[1:], a[: len(X) - 1], False)
    expected, scale = (np.diagonal(array, -1, axis1=1, axis2=2) for array in (expected, scale))
    assert (np.abs(others - expected) <= error[dtype] * scale).all()


def admissible(kernel: Convolutional, sizes, channels) -> list[tuple[int, int, int]]:
    shapes = [(*size, c) for size, c in itertools.product(sizes, channels)]
    return [shape for shape in shapes if models.admissible(kernel, shape)]


def spread(name: str) -> tuple[int, int, int]:
    """One small shape for each model, another for the next."""
    shapes = admissible(MODELS[name], [(8, 8), (13, 13), (9, 12)], models.CHANNELS)
    shapes = shapes or admissible(MODELS[name], models.SIZES[2:], (3,))
    return shapes[list(MODELS).index(name) % len(shapes)]


# The same numbers as the general path


@needs_code
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, dtype: type) -> None:
    """Each model once, on a shape of its own, with images without parallel patches."""
    compare(MODELS[name], noise(4, spread(name)), dtype, ERROR)


@pytest.mark.parametrize("name", ["exp/exp, gaussian, same", "poly2/linear, average, periodic", "even patches",
                                  "relu both, strided, reference", "three layers, relu both", "GAP, relu both, 2",
                                  "high floor", "poly5/square", "wide pooling"])  # fmt: skip
def test_every_instruction_set(name: str, instruction_set: str) -> None:
    """What a processor without AVX-512, or AVX2, runs; the environment variable forces it."""
    for dtype in (np.float32, np.float64):
        compare(MODELS[name], noise(3, (13, 13, 3)), dtype, ERROR)
    assert native.name(noise(1, (8, 8, 1))) == f"compiled {instruction_set}"


@needs_code
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in models.PUBLISHED])
def test_images_that_trip_fast_code_up(name: str, dtype: type) -> None:
    """Zero patches, flat ground, an image that is nearly another."""
    error = TANGENT_ERROR if MODELS[name].tangent else ERROR
    compare(MODELS[name], models.images(5, spread(name)), dtype, error)


@pytest.mark.slow
@needs_code
@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_every_size(name: str) -> None:
    """All sizes and numbers of channels that the model takes."""
    for shape in admissible(MODELS[name], models.SIZES, models.CHANNELS):
        for dtype in (np.float32, np.float64):
            compare(MODELS[name], noise(3, shape), dtype, ERROR)


LARGE = (
    ("exp/exp 2-5", (32, 32, 3)),
    ("poly2/exp 2-5", (28, 28, 1)),
    ("exp/linear 2-5", (28, 28, 2)),
    ("relu NTK 2-5", (32, 32, 3)),
    ("exp 2-2-2", (28, 28, 5)),
    ("relu both, average, same", (28, 28, 1)),
    ("exp/poly2, strided, periodic", (31, 20, 3)),
    ("one layer, relu both, 5", (31, 20, 1)),
    ("four layers, relu NTK, same", (28, 28, 2)),
    ("no pooling, exp x 3", (32, 32, 3)),
    ("GAP, relu both, 2", (28, 28, 1)),
    ("patches 1 and 5", (31, 20, 2)),
    ("poly5/square", (28, 28, 1)),
)
"""Every scalar function, tangents, every pooling and mode, one layer to four, strides, on the sizes of real images."""


@needs_code
@pytest.mark.parametrize(("name", "shape"), LARGE, ids=str)
def test_a_sample_of_models_on_large_images(name: str, shape: tuple[int, int, int]) -> None:
    """Protects, in the quick tests, what small images have none of: grids wider than a vector, long pooling windows
    inside the border, pooled grids of many positions."""
    for dtype in (np.float32, np.float64):
        compare(MODELS[name], noise(3, shape), dtype, ERROR)


layers = st.builds(
    Layer,
    patch=st.integers(1, 5),
    pooling=st.sampled_from(["gaussian", "average"]),
    subsampling=st.integers(1, 3),
    poolfactor=st.integers(1, 4),
    floor=st.sampled_from([1e-6, 0.5]),
    patch_norm=st.booleans(),
    kernel=st.just("relu"),
)
functions = st.sampled_from([EXP, RELU, LINEAR, SQUARE, POLY3, {"kernel": "polynomial", "degree": 7}])


@st.composite
def kernels(draw: st.DrawFn) -> Convolutional:
    parts = draw(st.lists(layers, min_size=1, max_size=4))
    tangent = draw(st.sampled_from([False, False, True, "both"]))
    if not tangent:
        parts = [Layer(**part.describe() | draw(functions)) for part in parts]
    if draw(st.booleans()):
        last = {
            key: value
            for key, value in parts[-1].describe().items()
            if key not in ("subsampling", "poolfactor")
        }
        parts[-1] = Layer(**last | {"pooling": draw(st.sampled_from(["global", "strided"]))})
    return Convolutional(tuple(parts), tangent, draw(st.sampled_from(["reference", "same", "periodic"])))


@needs_code
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(kernels(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_any_network(kernel: Convolutional, h: int, w: int, channels: int, seed: int) -> None:
    """Whatever can be described has the general path's value."""
    assume(models.admissible(kernel, (h, w, channels)))
    compare(
        kernel, noise(3, (h, w, channels), seed), np.float64, {np.float64: 1e-7 if kernel.tangent else 1e-10}
    )


# Shapes of blocks


@needs_code
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ragged_blocks(dtype: type) -> None:
    """Blocks that do not fill the lanes, on either side, hold what the whole block holds."""
    kernel = models.network([RELU, EXP], (2, 1), "average")
    a = prepare(kernel, noise(33, (8, 8, 2)).astype(dtype))
    whole = block(native, kernel, a, a)[0]
    for n, m in itertools.product((1, 3, 17, 33), repeat=2):
        part = block(native, kernel, a[:n], a[33 - m :])[0]
        assert part.shape == (n, m)
        bound = {np.float32: 1e-6, np.float64: 1e-12}[dtype] * whole.max()
        assert np.abs(part - whole[:n, 33 - m :]).max() <= bound


@needs_code
def test_empty_blocks() -> None:
    kernel = models.network([RELU, RELU], (2, 1), tangent="both")
    a = prepare(kernel, noise(2, (8, 8, 1)))
    assert block(native, kernel, a[:0], a).shape == (2, 0, 2)
    assert block(native, kernel, a, a[:0]).shape == (2, 2, 0)
    network = network_of(kernel, a.arrays["image"])
    assert native.paired(network, "both", a[:0], a[:0], True).shape == (2, 0)


@needs_code
def test_slices_of_larger_arrays() -> None:
    """Arrays that are not contiguous are taken as what they hold."""
    kernel = models.network([EXP, EXP], (2, 1))
    a = prepare(kernel, noise(12, (8, 8, 2)))
    strided = native.Prepared({key: array[::3] for key, array in a.arrays.items()}, a.rows[::3], a.pool)
    whole = block(native, kernel, a, a)
    np.testing.assert_allclose(block(native, kernel, strided, strided), whole[:, ::3, ::3], rtol=1e-13)


@needs_code
def test_the_same_bits_again_and_from_many_threads() -> None:
    """Nothing is shared between calls, and the interpreter's lock is not held."""
    kernel = models.network([RELU, RELU], (2, 1), tangent="both")
    a = prepare(kernel, noise(20, (13, 13, 3)).astype(np.float32))
    expected = block(native, kernel, a, a)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: block(native, kernel, a, a), range(8)):
            assert np.array_equal(got, expected)


# One sample with itself, zeros, floors


def test_same_sample_has_cosine_1(instruction_set: str) -> None:
    """K13: the tangent kernel of a sample with itself is, with strided pooling, (layers + 1) times the random-feature
    kernel; a copy under another row id has errors of the square root of the rounding."""
    for depth, dtype in itertools.product((1, 2, 3), (np.float32, np.float64)):
        kernel = models.network([RELU] * depth, (1,) * depth, "strided", "same", "both")
        X = models.images(18, (8, 8, 1)).astype(dtype)
        a = prepare(kernel, X)
        rotated = np.roll(np.arange(18), 5)
        b = native.Prepared({key: array[rotated] for key, array in a.arrays.items()}, rotated, "pool")
        rf, ntk = block(native, kernel, a, b)
        at = (rotated, np.arange(18))
        np.testing.assert_allclose(ntk[at], (depth + 1) * rf[at], rtol=8 * np.finfo(dtype).eps)
        copies = native.Prepared(a.arrays, a.rows, "another pool")
        rf, ntk = block(native, kernel, a, copies)
        assert np.abs(np.diag(ntk) / np.diag(rf) - depth - 1).max() > 8 * np.finfo(dtype).eps


@pytest.mark.parametrize("function", [EXP, RELU, POLY3, LINEAR, SQUARE], ids=lambda f: f["kernel"])
def test_zero_images_give_exact_zeros(function: dict, instruction_set: str) -> None:
    """K2, on either side and on the diagonal."""
    for tangent in (False, "both") if function is RELU else (False,):
        kernel = models.network([function, function], (2, 1), tangent=tangent)
        X = noise(3, (8, 8, 2))
        X[1] = 0
        for dtype in (np.float32, np.float64):
            a = prepare(kernel, X.astype(dtype))
            K = block(native, kernel, a, a)
            assert np.all(K[:, 1] == 0)
            assert np.all(K[:, 0, 0] > 0)
            assert np.all(native.paired(network_of(kernel, X), tangent, a, a, True)[:, 1] == 0)


@needs_code
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_norms_of_all_sizes(scale: float) -> None:
    """Norms below the floor, where the kernel is no longer homogeneous, and large ones."""
    for kernel in (
        models.network([EXP, RELU], (2, 1)),
        models.network([RELU, RELU], (2, 1)),
        models.network([POLY3, EXP], (2, 1)),
    ):
        compare(kernel, scale * noise(3, (8, 8, 2)), np.float64, ERROR)


@needs_code
@pytest.mark.parametrize("depth", [1, 2])
def test_tangent_below_the_floor(depth: int) -> None:
    """There T still takes inner products, not cosines times norms (C8, K2); plain loops as oracle."""
    kernel = models.network([RELU] * depth, (1, 1)[:depth], "average", tangent="both", floor=3.0)
    a = prepare(kernel, noise(3, (6, 5, 2)))
    models.check_below_the_floor(kernel, a, block(native, kernel, a, a))


# Numbers that are none


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("function", [EXP, RELU, POLY3, LINEAR, SQUARE], ids=lambda f: f["kernel"])
def test_what_is_not_finite_never_looks_finite(function: dict, depth: int, instruction_set: str) -> None:
    """NaN where the general path gives no finite number: either side, whole blocks and the diagonal, whoever found the
    norms. Images beside it keep their values."""
    tangents = (False, "both") if function is RELU else (False,)
    poolings = (("gaussian", (2, 1, 1)), ("average", (1, 1, 1)))
    for tangent, (pooling, subsampling) in itertools.product(tangents, poolings):
        kernel = models.network([function, EXP, EXP][:depth], subsampling[:depth], pooling, "same", False)
        if tangent:
            kernel = models.network([RELU] * depth, subsampling[:depth], pooling, "same", tangent)
        for bad, dtype in itertools.product((np.nan, np.inf, -np.inf), (np.float32, np.float64)):
            X = noise(5, (6, 5, 2)).astype(dtype)
            network = network_of(kernel, X)
            clean = prepare(kernel, X.copy())
            X[3, 2, 1, 0] = bad
            with np.errstate(all="ignore"):
                a = prepare(kernel, X)
                expected = block(general, kernel, a, a)
            found = [a.arrays[f"norm{k}"] for k in range(1, depth + 1)]
            for norms in (native.patch_norms(network, X), found):
                arrays = {"image": X} | {f"norm{k}": norm for k, norm in enumerate(norms, 1)}
                a = native.Prepared(arrays, a.rows, a.pool)
                with np.errstate(all="ignore"):
                    whole = block(native, kernel, a, a)
                    part = block(native, kernel, a[2:], a[:4])
                    own = native.paired(network, tangent, a, a, True)
                assert not np.isfinite(expected[:, 3]).any()
                assert np.isnan(whole[:, 3]).all()
                assert np.isnan(whole[:, :, 3]).all()
                assert np.isnan(part[:, 1]).all()
                assert np.isnan(part[:, :, 3]).all()
                assert np.isnan(own[:, 3]).all()
                assert all(np.isnan(norm[3]).any() for norm in native.patch_norms(network, X))
                others = np.array([0, 1, 2, 4])
                kept = block(native, kernel, clean, clean)[:, others[:, None], others]
                error = {np.float32: 1e-6, np.float64: 1e-13}[dtype] * kept.max()
                assert np.abs(whole[:, others[:, None], others] - kept).max() <= error


@pytest.mark.parametrize("function", [EXP, RELU, POLY3], ids=lambda f: f["kernel"])
def test_inner_products_that_overflow(function: dict, instruction_set: str) -> None:
    """Pixels and norms are finite, their products are not: an exponential of minus infinity must not come out as 0."""
    kernel = models.network([function, EXP], (2, 1))
    a = prepare(kernel, (1e20 * noise(3, (8, 8, 3))).astype(np.float32))
    assert all(np.isfinite(array).all() for array in a.arrays.values())
    with np.errstate(all="ignore"):
        assert np.isnan(block(native, kernel, a, a)).all()


# Explicit features, norms


@needs_code
@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("function", [POLY3, LINEAR, SQUARE], ids=lambda f: f["kernel"])
def test_explicit_features_or_not(function: dict, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a first layer's features are written out changes nothing."""
    monkeypatch.setattr(native, "_POINTWISE", math.inf if pays else -math.inf)
    kernel = models.network([function, EXP], (2, 1))
    for dtype in (np.float32, np.float64):
        compare(kernel, noise(3, (8, 8, 1)), dtype, ERROR)


@needs_code
@pytest.mark.parametrize("name", MODELS)
def test_patch_norms(name: str) -> None:
    """C6: those of the general path, whatever stands in the other lanes; float32 ones are rounded from float64."""
    X = models.images(11, spread(name))
    network = network_of(MODELS[name], X)
    expected = general.patch_norms(network, X)
    got = native.patch_norms(network, X)
    single = native.patch_norms(network, X.astype(np.float32))
    alone = native.patch_norms(network, X[3:4])
    for number, norms in enumerate(expected):
        np.testing.assert_allclose(got[number], norms, rtol=1e-12, atol=1e-12 * norms.max())
        assert np.array_equal(alone[number][0], got[number][3])
        assert single[number].dtype == np.float32
        np.testing.assert_allclose(single[number], norms, rtol=1e-5, atol=1e-6 * norms.max())


# Absence, and what the environment asks for


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library._library_or_why_not.cache_clear()
    yield
    library._library_or_why_not.cache_clear()


@pytest.mark.usefixtures("nothing_built")
def test_absent_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was built the general path runs, and asking for compiled code says what to do."""
    kernel = MODELS["exp/exp, gaussian, same"]
    X = noise(2, (8, 8, 1))
    reason = native.obstacle(network_of(kernel, X), False, X)
    assert reason is not None
    assert "C++ compiler" in reason
    assert "\n" not in reason
    a = kernel.prepare(X)
    assert kernel.path(a) == "numpy"
    monkeypatch.setenv(fused.VARIABLE, "compiled")
    with pytest.raises(KernelError, match="was not built"):
        kernel.pair(a, a)


@needs_code
def test_a_library_that_is_damaged_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A file that cannot be loaded is an obstacle, not a crash."""
    path = library.path("baseline")
    monkeypatch.setattr(library, "path", lambda name: tmp_path / path.name)
    (tmp_path / path.name).write_bytes(b"not a library")
    library._library_or_why_not.cache_clear()
    try:
        assert path.name in (why_absent() or "")
    finally:
        library._library_or_why_not.cache_clear()


@needs_code
@pytest.mark.parametrize("kind", ["without our functions", "of other sources"])
def test_a_library_built_from_other_sources_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older checkout left behind might be called in another way: it is as good as absent."""
    if kind == "of other sources":
        monkeypatch.setattr(library, "digest", lambda folder: "0" * 64)
    else:
        other = importlib.util.find_spec("_ctypes")
        assert other is not None
        monkeypatch.setattr(library, "path", lambda name: Path(str(other.origin)))
    library._library_or_why_not.cache_clear()
    try:
        assert "other sources: install megagram again" in (why_absent() or "")
        with pytest.raises(library.NotBuilt):
            library.Library("baseline")
    finally:
        library._library_or_why_not.cache_clear()


@pytest.mark.parametrize("name", ["sources.py", "library.py", "pairs.hpp", "avx2.cpp"])
def test_a_change_of_flags_or_of_any_source_makes_libraries_stale(name: str, tmp_path: Path) -> None:
    """Protects from a library that other flags made: they are in ``sources.py``, and part of what it is made from."""
    folder = shutil.copytree(Path(library.__file__).parent, tmp_path / "native")
    before = sources.digest(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert sources.digest(folder) != before


@needs_code
def test_a_failure_inside_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of the compiled code that is not about memory reaches the caller as a KernelError."""
    kernel = models.network([EXP], (1,))
    a = prepare(kernel, noise(2, (8, 8, 1)))
    network = network_of(kernel, a.arrays["image"])
    stage = network.stages[0]
    layer = replace(stage.layer)
    object.__setattr__(layer, "patch", -8)
    broken = Network((stage._replace(layer=layer),), False)
    library_ = library.load()
    monkeypatch.setattr(native, "_plan", lambda *_: library.Plan(
        library_, broken, network.support, False, 1, np.dtype(np.float64)
    ))  # fmt: skip
    with pytest.raises(KernelError, match=r"^the compiled path failed .*MEGAGRAM_KERNEL_PATH=general"):
        block(native, kernel, a, a)


@needs_code
@pytest.mark.parametrize(
    "error", [MemoryError("no memory for the plan of a network"), KernelError("it failed")]
)
def test_a_plan_that_cannot_be_made_is_an_obstacle(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(native, "_plan", fail)
    kernel = MODELS["exp/exp, gaussian, same"]
    X = noise(1, (8, 8, 1))
    assert native.obstacle(network_of(kernel, X), False, X) == str(error)
    assert native.scratch_bytes(network_of(kernel, X), False, 4, 4, 1, np.float64) == 0


@needs_code
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("avx3", "MEGAGRAM_INSTRUCTION_SET=avx3 is unknown: choose from baseline, avx2, avx512"),
        ("avx2", "MEGAGRAM_INSTRUCTION_SET=avx2, but this processor .*: choose from baseline$"),
    ],
)
def test_an_instruction_set_that_cannot_run_is_refused(
    wanted: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from hours on the general path for a typing error: only asking for that path does without."""
    kernel = MODELS["GAP, exp, 2"]
    X = noise(1, (8, 8, 1))
    a = kernel.prepare(X)
    monkeypatch.setattr(library._library("baseline").code, "processor", lambda: 0)
    monkeypatch.setenv(library.VARIABLE, wanted)
    for call in (kernel.prepare, lambda X: kernel.pair(a, a), lambda X: kernel.cost(1, 1, X.shape[1:])):
        with pytest.raises(KernelError, match=message):
            call(X)
    monkeypatch.setenv(fused.VARIABLE, "general")
    kernel.pair(a, a)


def test_a_misspelt_path_is_refused_wherever_a_path_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects plans too: they take scratch memory by the path that is asked for."""
    kernel = MODELS["GAP, exp, 2"]
    X = noise(1, (8, 8, 1))
    a = kernel.prepare(X)
    monkeypatch.setenv(fused.VARIABLE, "numpy")
    for call in (kernel.prepare, lambda X: kernel.pair(a, a), lambda X: kernel.cost(1, 1, X.shape[1:])):
        with pytest.raises(
            KernelError, match="MEGAGRAM_KERNEL_PATH=numpy is unknown: choose from auto, general"
        ):
            call(X)


@needs_code
def test_why_a_library_cannot_be_used_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the choice of a path, made for every block, from reading all sources again."""
    read = []
    monkeypatch.setattr(library, "digest", lambda folder: read.append(folder) or "0" * 64)
    library._library_or_why_not.cache_clear()
    try:
        reasons = {why_absent() for _ in range(3)}
    finally:
        library._library_or_why_not.cache_clear()
    assert len(read) == 1
    assert "other sources" in (reasons.pop() or "")
    assert not reasons


@needs_code
def test_scratch_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose pooled arrays would fill the memory goes to the general path, by the true size."""
    kernel = models.network([EXP, EXP], (1, 1), "gaussian", "same")
    X = noise(1, (66, 66, 1)).astype(np.float32)
    reason = native.obstacle(network_of(kernel, X), False, X)
    lanes = library.load().lanes(np.dtype(np.float32))
    assert reason is not None
    needed = float(reason.split(" GiB")[0].split()[-1])
    assert needed == pytest.approx(66**4 * 4 * lanes / 2**30, rel=0.05)
    assert native.obstacle(network_of(kernel, X[:, :8, :8]), False, X) is None
    assert native.scratch_bytes(network_of(kernel, X), False, 128, 128, 1, np.float32) == 0


# Model, side of the images, how many on each side.
MEASURED = {
    "large pooled arrays": (models.network([EXP, EXP], (1, 1), "gaussian", "same"), 26, 4, 16),
    "by displacement, both": (models.network([RELU] * 3, (1, 2, 1), "average", "same", "both"), 32, 2, 16),
    "features": (models.network([models.POLY2, EXP], (2, 5)), 28, 400, 24),
}
MEASURE = """
import sys
from pathlib import Path
import models
import numpy as np
from kernels import native
from test_native import MEASURED, block, network_of, prepare

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

kernel, side, n, m = MEASURED[sys.argv[1]]
native._GROUP_BYTES = 1 << 24
X = np.random.default_rng(0).standard_normal((max(n, m), side, side, 1)).astype(np.float32)
a = prepare(kernel, X)
small = models.network([models.POLY2, models.EXP], (2, 1))
prepared = prepare(small, X[:1, :16, :16].copy())
block(native, small, prepared, prepared)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
K = block(native, kernel, a[:n], a[:m])
taken = resident("VmHWM") - before - K.nbytes
print(taken, native.scratch_bytes(network_of(kernel, X), kernel.tangent, n, m, 1, X.dtype))
"""


@needs_code
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory")
@pytest.mark.parametrize("name", MEASURED)
def test_scratch_bytes_bound_what_is_taken(name: str) -> None:
    """The peak of a process that does nothing else: never more than a little above the bound, nor far below it."""
    # Whatever other tests left in the environment stays out, and memory that is freed goes back at once: kept for
    # later it would be taken again unseen.
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    settings = {
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, name],
        env=kept | settings | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, bound = map(int, found.stdout.split())
    assert bound > 8e6
    assert 0.4 * bound < taken < bound + 2e6


@needs_code
def test_features_are_made_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """More images do not take more memory, nor have other values."""
    kernel = models.network([models.POLY2, EXP], (2, 1))
    X = noise(70, (8, 8, 1))
    a, b = prepare(kernel, X), prepare(kernel, X[:20])
    network = network_of(kernel, X)
    sizes = []
    values = []
    for size in (1 << 26, 1):
        monkeypatch.setattr(native, "_GROUP_BYTES", size)
        sizes.append([native.scratch_bytes(network, False, n, n, 1, X.dtype) for n in (40, 400)])
        same = same_rows(a, b)
        values.append([native.pair(network, False, *sides, same) for sides in ((a, a), (a, b))])
        values[-1].append(native.paired(network, False, a, a, True))
    for large, small in zip(*values, strict=True):
        np.testing.assert_array_equal(large, small)
    assert sizes[0][1] > 2 * sizes[0][0]
    assert sizes[1][1] - sizes[1][0] == 32 * 360


@needs_code
def test_the_kernel_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself where nothing is asked for, and in preparing too; inadmissible sizes are refused as ever."""
    kernel = MODELS["three layers, relu both"]
    X = noise(3, (13, 13, 1))
    a = kernel.prepare(X)
    assert kernel.path(a) == native.name(X)
    expected = kernel.pair(a, a)
    monkeypatch.setenv(fused.VARIABLE, "general")
    b = kernel.prepare(X)
    np.testing.assert_allclose(kernel.pair(b, b), expected, rtol=1e-10)
    monkeypatch.setenv(fused.VARIABLE, "compiled")
    with pytest.raises(KernelError, match="the grid vanishes"):
        kernel.prepare(noise(1, (3, 3, 1)))


# What feature maps do to products, in place


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", anchor_products.SHAPES, ids=str)
@pytest.mark.parametrize("function", anchor_products.FUNCTIONS, ids=anchor_products.name)
def test_values_of_anchors_are_the_general_ones(function, shape, dtype, instruction_set):
    """Relative to the value of a cosine of 1; nothing beside the products is written, also of ragged rows."""
    layer, products, after, wanted, largest = anchor_products.case(function, shape, dtype)
    memory = np.full(products.size + 128, np.nan, dtype)
    B = memory[64:-64].reshape(shape)
    B[...] = products
    library.load().map_entries(layer, B, after)
    assert (np.abs(B - wanted) <= ENTRY_ERROR[dtype] * largest).all()
    assert np.isnan(memory[:64]).all()
    assert np.isnan(memory[-64:]).all()


@pytest.mark.parametrize("function", [EXP, RELU, POLY3], ids=anchor_products.name)
def test_a_patch_that_is_not_a_number_has_no_values(function, instruction_set):
    B = np.full((2, 37), 0.5, np.float32)
    B[1, ::3] = np.nan
    library.load().map_entries(Layer(3, **function), B, None)
    np.testing.assert_array_equal(np.isnan(B), [[False] * 37, [k % 3 == 0 for k in range(37)]])


@needs_code
def test_maps_of_anchors_take_compiled_code_unless_told_otherwise(monkeypatch):
    """Features by it and by NumPy are the same but for rounding, and not to the last bit: both ran."""
    phi = NystromCKN(models.network([EXP, RELU], (2, 1)), (12, 10), patches=500)
    X = noise(5, (8, 7, 2)).astype(np.float32)
    phi = phi.learn(InMemory(X))
    found = {}
    for path in ("auto", "compiled", "cuda", "general"):
        monkeypatch.setenv(fused.VARIABLE, path)
        found[path] = phi.features(X)
    np.testing.assert_array_equal(found["auto"], found["compiled"])
    np.testing.assert_array_equal(found["cuda"], found["general"])
    assert not np.array_equal(found["auto"], found["general"])
    error = np.abs(found["auto"] - found["general"])
    assert error.max() <= 2e-5 * np.linalg.norm(found["general"], axis=1).max()
