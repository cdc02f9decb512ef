"""Fused CUDA code without a GPU: it compiles for devices, and the same text run on the host gives the general
path's numbers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import anchor_products
import numpy as np
import pytest
from cuda_on_host.launcher import COMPILER, HERE, HostDevice
from models import (
    CHANNELS,
    EXP,
    LINEAR,
    MODELS,
    POLY3,
    POOLED,
    PUBLISHED,
    RELU,
    SIZES,
    SQUARE,
    admissible,
    busy_images,
    images,
    network,
)
from test_norms import from_self_gram

from kernels import cuda, fused
from kernels.base import KernelError, same_rows
from kernels.convolutional import Convolutional, Layer
from kernels.cuda import device as real_device
from kernels.cuda import entrywise
from kernels.cuda import programs as real_programs
from kernels.cuda.axes import pooled, unpooled
from kernels.cuda.programs import Program, plan
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.features.base import FeatureMap, InMemory
from kernels.features.ckn import NystromCKN
from kernels.features.convolutional_random import ConvolutionalRandom
from kernels.features.nystrom import NystromFeatures
from kernels.features.random import RandomFeatures
from kernels.network import network_on
from kernels.pooling import KINDS, MODES, output_size, pooling_matrix

TOLERANCE = 2e-6
LIMITS = {"sm_80": 166_912, "sm_90": 232_448}
"""Bytes of shared memory that a block may have."""

SAMPLE = (
    ("exp/exp, gaussian, reference", (8, 8, 3)),
    ("relu both, gaussian, periodic", (8, 8, 1)),
    ("four layers, average", (8, 8, 2)),
    ("GAP, relu both, 2", (8, 8, 5)),
    ("GAP, relu both, patches 2 and 1, periodic", (8, 8, 2)),
    ("even patches", (13, 13, 1)),
)


def cases(sizes=SIZES, models=MODELS):
    """Models on images of these sizes; channels take turns, so that every model meets several."""
    listed = []
    for turn, (name, kernel) in enumerate(models.items()):
        for number, size in enumerate(sizes):
            shape = (*size, CHANNELS[(turn + number) % len(CHANNELS)])
            if admissible(kernel, shape):
                listed.append(pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}"))
    return listed


def in_turns(sizes):
    """Models on images of one of these sizes each; sizes and channels take turns."""
    listed = cases(sizes)
    by_name = {name: [case for case in listed if case.values[0] == name] for name in MODELS}
    return [admitted[turn % len(admitted)] for turn, admitted in enumerate(by_name.values()) if admitted]


def network_of(kernel: Convolutional, shape: tuple[int, ...]):
    return network_on(kernel.layers, kernel.pooling_mode, (shape[0], shape[1]))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cuda_on_host")


def install(host: HostDevice, monkeypatch) -> HostDevice:
    if COMPILER is None:
        pytest.skip("needs g++ or clang++")
    for name in ("launch", "shared_limit", "free_bytes"):
        monkeypatch.setattr(real_device, name, getattr(host, name))
    monkeypatch.setenv(fused.VARIABLE, "general")  # what the kernels themselves run, to compare with
    return host


@pytest.fixture
def host(folder, monkeypatch) -> HostDevice:
    return install(HostDevice(folder), monkeypatch)


def cuda_pair(kernel: Convolutional, a, b) -> np.ndarray:
    """(outputs, n, m), by the CUDA path."""
    shape = a.arrays["image"].shape[1:]
    return cuda.pair(network_of(kernel, shape), kernel.tangent, a, b, same_rows(a, b))


def largest_error(found: np.ndarray, wanted: np.ndarray, scale_a: np.ndarray, scale_b: np.ndarray) -> float:
    """Relative to sqrt(K_ii K_jj), whose roots the scales (outputs, n) are."""
    assert np.isfinite(found).all()
    return float((np.abs(found - wanted) / (scale_a[:, :, None] * scale_b[:, None, :])).max())


def check(kernel: Convolutional, X: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """A symmetric block, a block with some equal rows, and diagonals, against float64 on the general path."""
    n, outputs = len(X), len(kernel.outputs)
    small = X.astype(np.float32)
    exact = kernel.prepare(X, pool="pool")
    whole = kernel.prepare(small, pool="pool")
    part = kernel.prepare(small[1:], np.arange(1, n), pool="pool")
    wanted = kernel.pair(exact, exact).reshape(outputs, n, n)
    diagonal = kernel.diag(exact).reshape(outputs, n)
    scale = np.sqrt(diagonal)
    found = cuda_pair(kernel, whole, whole)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))
    assert largest_error(found, wanted, scale, scale) <= tolerance
    rectangle = cuda_pair(kernel, whole, part)
    assert largest_error(rectangle, wanted[:, :, 1:], scale, scale[:, 1:]) <= tolerance
    alone = cuda.paired(network_of(kernel, X.shape[1:]), kernel.tangent, whole, whole, True)
    np.testing.assert_allclose(alone, diagonal, rtol=tolerance)
    others = cuda.paired(network_of(kernel, X.shape[1:]), kernel.tangent, whole[1:], whole[: n - 1], False)
    np.testing.assert_allclose(others, np.diagonal(found, -1, axis1=1, axis2=2), rtol=tolerance)


@pytest.mark.parametrize(("name", "shape"), SAMPLE, ids=str)
def test_a_model_of_each_kind_gives_the_general_path_s_numbers(name, shape, host):
    check(MODELS[name], busy_images(2, shape))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), cases(sizes=SIZES[:2]))
def test_every_model_gives_the_general_path_s_numbers(name, shape, host):
    check(MODELS[name], busy_images(3, shape))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), in_turns(SIZES[2:]))
def test_every_model_gives_the_general_path_s_numbers_on_large_images(name, shape, host):
    """Each model on one of the large sizes, which take turns over the models, as channels do."""
    check(MODELS[name], busy_images(2, shape))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), cases(sizes=SIZES[:2]))
def test_awkward_images(name, shape, host):
    """Flat ground, zeros, one image nearly another: tangent kernels are right to 1e-4 there, the others as ever."""
    check(MODELS[name], images(3, shape), 1e-4 if MODELS[name].tangent else TOLERANCE)


def test_equal_rows_of_another_pool_are_other_samples(host):
    """K13 is for one sample of one pool: rows that happen to have equal numbers are not it."""
    kernel = network([RELU, RELU], (2, 1), tangent=True)
    X = busy_images(2, (8, 8, 1)).astype(np.float32)
    a, b = kernel.prepare(X, pool="one"), kernel.prepare(X, pool="other")
    same, other = cuda_pair(kernel, a, a)[0], cuda_pair(kernel, a, b)[0]
    assert same[0, 1] == other[0, 1]
    assert (same.diagonal() >= other.diagonal()).all()
    assert same[0, 0] != other[0, 0]


@pytest.mark.parametrize("name", ["relu both, gaussian, reference", "GAP, relu both, 2"])
def test_the_order_of_threads_does_not_matter(name, host):
    """Warps run first to last, then last to first: a missing barrier would show."""
    kernel = MODELS[name]
    a = kernel.prepare(busy_images(2, (13, 13, 2)).astype(np.float32))
    forwards = cuda_pair(kernel, a, a)
    host.backwards = True
    np.testing.assert_array_equal(cuda_pair(kernel, a, a), forwards)


def test_small_memory_cuts_pairs_into_batches_and_changes_nothing(folder, monkeypatch):
    kernel = MODELS["relu both, gaussian, reference"]
    X = busy_images(3, (13, 13, 2)).astype(np.float32)
    a, b = kernel.prepare(X), kernel.prepare(X[:2], pool="other")
    host = install(HostDevice(folder), monkeypatch)
    whole = cuda_pair(kernel, a, b)
    assert [pairs for _, pairs in host.launches] == [6, 6]
    small = install(HostDevice(folder, memory=4 * 4 * 2 * 5**4 * 4), monkeypatch)
    np.testing.assert_array_equal(cuda_pair(kernel, a, b), whole)
    assert [pairs for _, pairs in small.launches] == [4, 4, 2, 2]


def test_no_pairs_launch_nothing(host):
    kernel = MODELS["exp/exp, gaussian, reference"]
    a = kernel.prepare(busy_images(2, (8, 8, 1)).astype(np.float32))
    assert cuda_pair(kernel, a, a[:0]).shape == (1, 2, 0)
    assert not host.launches


def test_pairs_are_listed_some_rows_at_a_time_and_that_changes_nothing(host, monkeypatch):
    """However many pairs a block has, lists of them stay short."""
    kernel = MODELS["one layer, relu both, strided"]
    X = busy_images(5, (8, 8, 1)).astype(np.float32)
    a, b = kernel.prepare(X), kernel.prepare(X[:3], pool="other")
    square, oblong = cuda_pair(kernel, a, a), cuda_pair(kernel, a, b)
    assert [pairs for _, pairs in host.launches] == [15, 15]
    host.launches.clear()
    monkeypatch.setattr(cuda, "_MOST_PAIRS", 10)
    np.testing.assert_array_equal(cuda_pair(kernel, a, a), square)
    np.testing.assert_array_equal(cuda_pair(kernel, a, b), oblong)
    assert [pairs for _, pairs in host.launches] == [10, 5, 9, 6]


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6, 11])
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_every_pair_is_listed_once(n, most, monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_PAIRS", most)
    for m, wanted in ((n, np.ones((n, n)) - np.tri(n, k=-1)), (3, np.ones((n, 3))), (0, np.ones((n, 0)))):
        counted = np.zeros((n, m))
        for first, second in cuda._listed(n, m, m == n, np):
            assert first.dtype == second.dtype == np.int32
            assert len(first) <= max(most, m + 1)
            np.add.at(counted, (first, second), 1)
        np.testing.assert_array_equal(counted, wanted)


def test_a_block_of_more_pairs_than_an_int32_counts_is_listed_too():
    n = 70_001
    for symmetric in (True, False):
        first, second = next(cuda._listed(n, n, symmetric, np))
        assert (first[0], second[0]) == (0, 0)
        assert len(first) <= cuda._MOST_PAIRS
        assert min(first.min(), second.min()) == 0
        assert max(first.max(), second.max()) == n - 1


@pytest.mark.parametrize("name", ["relu both, gaussian, reference", "GAP, relu both, 2"])
def test_arrays_of_any_layout_give_the_same_numbers(name, host):
    """Every other row of a block, and images whose axes lie otherwise in memory."""
    kernel = MODELS[name]
    a = kernel.prepare(busy_images(4, (8, 8, 3)).astype(np.float32))
    strided = replace(a[::2], arrays={**a[::2].arrays, "image": np.asfortranarray(a[::2].arrays["image"])})
    plain = replace(strided, arrays={key: array.copy("C") for key, array in strided.arrays.items()})
    assert not any(array.flags.c_contiguous for array in strided.arrays.values())
    np.testing.assert_array_equal(cuda_pair(kernel, strided, a), cuda_pair(kernel, plain, a))
    np.testing.assert_array_equal(cuda_pair(kernel, a, strided), cuda_pair(kernel, a, plain))


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("relu both, gaussian, same", 8_000),
        ("exp/exp, gaussian, reference", 3_000),  # whose threads could hold more pooled rows than they may
        pytest.param("exp/exp, gaussian, periodic", 8_000, marks=pytest.mark.slow),
    ],
)
def test_little_shared_memory_cuts_a_pair_into_blocks(name, limit, folder, monkeypatch):
    """Each block then computes some rows of the pooled array, and rows beyond them that its windows reach."""
    host = install(HostDevice(folder, limit=limit), monkeypatch)
    check(MODELS[name], busy_images(2, (13, 13, 1)))
    assert all(program.shared_bytes <= limit for program, _ in host.launches)
    assert max(program.blocks for program, _ in host.launches) > 1


def handmade(body: str) -> Program:
    source = (
        "#define SHARED_BYTES 128\n#define THREADS 64\n"
        'extern "C" __global__ void handmade(const float*, const float*, const float*, const float*, const int*,\n'
        "    const int*, const int*, float* values, float*) {\n"
        "    extern __shared__ float4 shared[];\n"
        f"    {body}\n}}\n"
    )
    return Program("handmade", source, 64, 128, 1, ())


def launch(host: HostDevice, program: Program) -> np.ndarray:
    values = np.zeros(64, np.float32)
    unused = [np.zeros(1, np.float32)] * 4 + [np.zeros(1, np.int32)] * 3
    host.launch(program, 1, (*unused, values, np.zeros(1, np.float32)))
    return values


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x >= 40) { __syncthreads(); } values[0] = shared[0].x;", "wait at a barrier"),
        ("if (threadIdx.x % 2) values[0] = __shfl_sync(~0u, shared[0].x, 0, 32);", "wait at a shuffle"),
    ],
)
def test_the_host_notices_threads_that_others_wait_for_in_vain(body, message, host):
    with pytest.raises(AssertionError, match=message):
        launch(host, handmade(body))


def test_the_host_shuffles_and_meets_as_a_device_does(host):
    """Within segments, between warps through shared memory, and in both orders of warps alike."""
    program = handmade(
        "float* words = (float*)shared;\n"
        "const int lane = threadIdx.x % 32;\n"
        "const float near = __shfl_sync(~0u, (float)threadIdx.x, lane + 1, 8);\n"
        "if (lane < 16) words[threadIdx.x / 32 * 16 + lane] = near;\n"
        "__syncthreads();\n"
        "values[threadIdx.x] = lane < 16 ? words[(1 - threadIdx.x / 32) * 16 + lane] : near;"
    )
    thread = np.arange(64)
    near = thread // 8 * 8 + (thread + 1) % 8
    wanted = np.where(thread % 32 < 16, near[(thread + 32) % 64], near)
    for host.backwards in (False, True):
        np.testing.assert_array_equal(launch(host, program), wanted)


BOUNDS = """
import sys
from pathlib import Path

import test_cuda
from cuda_on_host.launcher import HostDevice

flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
host = HostDevice(Path(sys.argv[1]), flags=flags)
for name in ("launch", "shared_limit", "free_bytes"):
    setattr(test_cuda.real_device, name, getattr(host, name))
if sys.argv[2] == "handmade":
    test_cuda.launch(host, test_cuda.handmade(sys.argv[3]))
else:
    shape = tuple(map(int, sys.argv[3].split(",")))
    test_cuda.check(test_cuda.MODELS[sys.argv[2]], test_cuda.busy_images(2, shape))
assert host.launches
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "clean"),
    [
        ("relu both, gaussian, same", "13,13,3", True),
        ("exp/exp, gaussian, periodic", "8,8,1", True),
        ("four layers, average", "8,8,2", True),
        ("GAP, relu both, 2", "8,8,1", True),
        ("handmade", "shared[8 - (values[0] < 1)].x = 1; values[0] = shared[0].x;", False),
    ],
)
def test_nothing_is_read_or_written_out_of_bounds(name, what, clean, tmp_path):
    """Address and undefined-behaviour sanitizers, in a process of their own; they do see what they should."""
    if COMPILER is None:
        pytest.skip("needs g++ or clang++")
    asked = [COMPILER, "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{COMPILER} has no address sanitizer")
    root = HERE.parents[2]
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests", root / "tests/kernels"))),
        fused.VARIABLE: "general",
    }
    command = [sys.executable, "-c", BOUNDS, str(tmp_path), name, what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ("clean" in done.stdout) == clean, done.stderr[-4000:]
    assert clean or "insufficient space" in done.stderr or "overflow" in done.stderr, done.stderr[-4000:]


# What feature maps do to products, in place.


def guarded(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix in the middle of memory that must stay NaN, and all of that memory."""
    memory = np.full(shape[0] * shape[1] + 4096, np.nan, np.float32)
    return memory[2048:-2048].reshape(shape), memory


def nothing_beside(memory: np.ndarray) -> bool:
    return bool(np.isnan(memory[:2048]).all() and np.isnan(memory[-2048:]).all())


@pytest.mark.parametrize("shape", anchor_products.SHAPES, ids=str)
@pytest.mark.parametrize("function", anchor_products.FUNCTIONS, ids=anchor_products.name)
def test_values_of_anchors_are_the_general_ones(function, shape, host):
    """Also of sizes that no block divides; relative to the value of a cosine of 1."""
    layer, products, after, wanted, largest = anchor_products.case(function, shape, np.float32)
    B, memory = guarded(shape)
    B[...] = products
    entrywise.scalar_function(layer, B, after)
    assert np.isfinite(B).all()
    assert (np.abs(B - wanted) <= TOLERANCE * largest).all()
    assert nothing_beside(memory)
    ((program, blocks),) = host.launches
    assert f"#define WEIGHTED {int(after is not None)}\n" in program.source
    assert blocks == -(-B.size // (4 * program.threads))


def test_a_patch_that_is_not_a_number_has_no_values(host):
    """As on the general path, though a device's least and largest of two numbers pass over it."""
    B, weights = np.full((2, 5), 0.5, np.float32), np.array([1, np.nan], np.float32)
    B[1] = np.nan
    entrywise.scalar_function(Layer(3, **RELU), B, weights)
    np.testing.assert_array_equal(np.isnan(B), [[False] * 5, [True] * 5])


@pytest.mark.parametrize("shape", [(1, 1), (700, 3), (41, 100), (2, 1500)], ids=str)
def test_weighted_cosines_are_those_of_float64(shape, host):
    rng = np.random.default_rng(0)
    B, memory = guarded(shape)
    B[...] = 20 * rng.standard_normal(shape)
    weights, phases = (rng.uniform(0, 6, count).astype(np.float32) for count in shape)
    weights[::3] = 0
    wanted = weights[:, None] * np.cos((B + phases).astype(np.float64))
    entrywise.weighted_cosines(B, weights, phases)
    assert (np.abs(B - wanted) <= TOLERANCE * weights[:, None]).all()
    assert nothing_beside(memory)


OF_VECTORS = {
    "exponential": DotProduct("exponential", sigma=0.6),
    "cube": DotProduct("polynomial", degree=3),
    "seventh power": DotProduct("polynomial", degree=7),
    "linear": DotProduct("linear", scale=0.7),
    "square": DotProduct("square", floor=0.05),
    "step": DotProduct("arc-cosine", order=0),
    "arc-cosine": DotProduct("arc-cosine", floor=0.05),
    "laplace": DotProduct("laplace", c=2.0),
    "laplace, 1": DotProduct("laplace", gamma=1.0),
    "laplace, 0.7": DotProduct("laplace", c=0.5, gamma=0.7),
    "rf 1": FullyConnected(depth=1),
    "rf 4": FullyConnected(depth=4),
    "ntk 2": FullyConnected("ntk"),
    "ntk 5, normalized": FullyConnected("ntk", depth=5, normalized=True, normalize_inputs=True),
    "rf, bias": FullyConnected(bias=True),
    "ntk, bias": FullyConnected("ntk", bias=True),
}
COMPILED = ("exponential", "step", "laplace, 0.7", "rf 4", "ntk 5, normalized", "rf, bias", "ntk, bias")
"""One of each kind that the source knows."""


@pytest.mark.parametrize("shape", [(1, 1), (700, 3), (41, 100), (2, 1500)], ids=str)
@pytest.mark.parametrize("name", OF_VECTORS)
def test_values_of_vectors_are_the_general_ones(name, shape, host):
    """Every kernel of vectors, at cosines of -1 and 1, zero rows, and sizes that no block divides."""
    rng, kernel = np.random.default_rng(0), OF_VECTORS[name]
    B, memory = guarded(shape)
    B[...] = rng.uniform(-1, 1, shape)
    B[::3, 0], B[1::3, -1] = 1, -1
    weights, others = (rng.uniform(0, 3, count).astype(np.float32) for count in shape)
    weights[::4] = 0
    most = np.abs(kernel.kappa(np.ones(1))[0])
    wanted = kernel.kappa(B.astype(np.float64)) * np.outer(weights, others)
    entrywise.kernel_values(kernel, B, weights, others)
    assert (np.abs(B - wanted) <= TOLERANCE * most * np.outer(weights, others)).all()
    assert nothing_beside(memory)


MAPS: dict[str, tuple[FeatureMap, int]] = {
    **{
        f"anchors, {first['kernel']}, {second['kernel']}": (
            NystromCKN(network([first, second], (2, 1)), (12, 10), patches=500),
            (first is not LINEAR) + (second is not LINEAR),
        )
        for first, second in ((EXP, RELU), (POLY3, LINEAR), (LINEAR, SQUARE))
    },
    "random filters": (ConvolutionalRandom(network([EXP, RELU], (2, 1)), (20, 30)), 1),
    "random Fourier": (RandomFeatures(DotProduct("exponential", sigma=0.6), 50), 1),
    "landmarks": (NystromFeatures(DotProduct("exponential", sigma=0.6), 3, epsilon=1e-2), 1),
    "landmarks, ntk": (NystromFeatures(FullyConnected("ntk", depth=3), 2, epsilon=1e-2), 1),
}
"""Feature maps, and how many fused passes each takes for few samples."""


@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_with_fused_passes_are_the_same(name, host, monkeypatch):
    """Every place of a map that has products to pass over hands on the vectors of its rows and columns."""
    phi, passes = MAPS[name]
    X = busy_images(3, (8, 7, 2)).astype(np.float32)
    if phi.inputs == "vectors":
        X = X.reshape(3, -1)
    phi = phi.learn(InMemory(X))
    wanted = phi.features(X)
    assert not host.launches
    monkeypatch.setattr(fused, "runs_entrywise", lambda B: True)
    found = phi.features(X)
    assert len(host.launches) == passes
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.linalg.norm(wanted, axis=1).max())


def test_fused_passes_are_for_float32_on_a_device(monkeypatch):
    class OnDevice(np.ndarray):
        pass

    cupy = ModuleType("cupy")
    cupy.ndarray = OnDevice
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delenv(fused.VARIABLE, raising=False)
    B = np.zeros((4, 6), np.float32)
    assert fused.runs_entrywise(B.view(OnDevice))
    assert not fused.runs_entrywise(B)
    assert not fused.runs_entrywise(B.astype(np.float64).view(OnDevice))
    assert not fused.runs_entrywise(B[:, :3].view(OnDevice))
    monkeypatch.setenv(fused.VARIABLE, "general")
    assert not fused.runs_entrywise(B.view(OnDevice))


@pytest.mark.parametrize("name", ["anchors, exponential, relu", "random Fourier"])
def test_a_misspelt_path_is_refused_by_feature_maps(name, monkeypatch):
    """On the host too, where no pass is fused: the same setting is right or wrong on every machine."""
    phi, _ = MAPS[name]
    X = busy_images(3, (8, 7, 2)).astype(np.float32)
    if phi.inputs == "vectors":
        X = X.reshape(3, -1)
    phi = phi.learn(InMemory(X))
    monkeypatch.setenv(fused.VARIABLE, "numpy")
    with pytest.raises(KernelError, match="MEGAGRAM_KERNEL_PATH=numpy is unknown: choose from auto, general"):
        phi.features(X)


# What is specialised, and that devices' compilers take it.


def programs(kernel: Convolutional, shape: tuple[int, int, int], limit: int) -> tuple[Program, ...]:
    chosen = plan(network_of(kernel, shape), bool(kernel.tangent), shape[2], limit)
    assert chosen.obstacle is None
    return chosen.programs


def compile_for(architecture: str, program: Program, tmp_path: Path) -> None:
    """Compile to machine code with the options of a launch; warnings are errors."""
    options = [*real_device.OPTIONS, "-ftz=true"]  # the last is what CuPy adds
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        source = tmp_path / "program.cu"
        source.write_text(program.source)
        command = [nvcc, "--cubin", f"-arch={architecture}", "-Werror", "all-warnings", *options]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "program.cubin"), str(source)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return
    nvrtc = pytest.importorskip("cupy.cuda.nvrtc", reason="needs nvcc, or CuPy with NVRTC")
    try:
        handle = nvrtc.createProgram(program.source, "program.cu", [], [])
    except Exception as error:
        pytest.skip(f"needs nvcc, or CuPy with NVRTC: {error}")
    try:
        nvrtc.compileProgram(handle, [f"--gpu-architecture={architecture}", *options])
    finally:
        log = nvrtc.getProgramLog(handle)
    assert not log.strip("\x00\n "), log


@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("exp/exp, strided, periodic", (13, 13, 1)),
        ("GAP, relu NTK, 5", (8, 8, 1)),
        ("GAP, relu both, patches 2 and 1, periodic", (8, 8, 1)),
    ],
)
def test_specialised_programs_compile_for_devices(name, shape, architecture, tmp_path):
    for program in programs(MODELS[name], shape, LIMITS[architecture]):
        compile_for(architecture, program, tmp_path)


@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize(
    "program",
    [
        real_programs.weighted_cosines(100),
        *(
            real_programs.scalar_function(Layer(3, **f), 100, f in (EXP, RELU))
            for f in (EXP, RELU, POLY3, SQUARE)
        ),
        *(real_programs.kernel_values(OF_VECTORS[name], 100) for name in COMPILED),
    ],
    ids=[
        "weighted cosines",
        "exponential",
        "relu",
        "polynomial",
        "square",
        *(f"of vectors, {name}" for name in COMPILED),
    ],
)
def test_passes_over_products_compile_for_devices(program, architecture, tmp_path):
    compile_for(architecture, program, tmp_path)


@pytest.fixture(scope="module")
def compiled() -> set[tuple[str, str]]:
    """Architectures and sources that compiled: models have programs in common."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize(("name", "shape"), cases())
def test_every_specialised_program_compiles_for_devices(name, shape, architecture, compiled, tmp_path):
    """Every model on images of every size that it takes; numbers of channels take turns."""
    for program in programs(MODELS[name], shape, LIMITS[architecture]):
        if (architecture, program.source) not in compiled:
            compile_for(architecture, program, tmp_path)
            compiled.add((architecture, program.source))


@pytest.mark.parametrize("limit", [49_152, *LIMITS.values()])
def test_programs_keep_within_what_a_block_may_have(limit):
    """Shared memory, threads, and lanes enough for every row; on small devices too."""
    for name, kernel in MODELS.items():
        for shape in ((8, 8, 1), (31, 20, 5), (32, 32, 3)):
            if admissible(kernel, shape):
                for program in programs(kernel, shape, limit):
                    assert program.shared_bytes <= limit, name
                    assert program.threads % 32 == 0, name
                    assert program.threads <= 512, name


@pytest.mark.parametrize("limit", [3_000, 8_000, 16_000, 30_000, 49_152, 101_376])
def test_blocks_hold_every_row_that_their_pooled_rows_need(limit):
    """With whatever memory a pair is cut: no block leaves out rows that its windows reach."""
    cut = 0
    for name, kernel in MODELS.items():
        for shape in ((13, 13, 1), (31, 20, 5), (32, 32, 3)):
            if not admissible(kernel, shape):
                continue
            for program in plan(network_of(kernel, shape), bool(kernel.tangent), shape[2], limit).programs:
                given = dict(re.findall(r"#define (\w+) (\d+)$", program.source, re.MULTILINE))
                if program.blocks == 1:
                    continue
                cut += 1
                held = int(given["ROWS"]) * (program.threads // int(given["SEGMENT"]))
                stride, last = int(given["ROW_STRIDE"]), int(given["POOLED_HEIGHT"]) - 1
                window = stride * last + int(given["ROW_TAP_COUNT"])  # of all pooled rows
                most = window if int(given["PERIODIC"]) else min(int(given["HEIGHT"]), window)
                assert held >= min(most, int(given["WINDOW_ROWS"])), (name, shape)
    assert cut > 0


def test_networks_without_pooling_before_the_end_take_one_program():
    """All layers of one displacement at a time; with a trace at the end, displacement zero alone."""
    (gap,) = programs(MODELS["GAP, relu NTK, 5"], (32, 32, 3), LIMITS["sm_90"])
    (trace,) = programs(MODELS["no pooling, relu both"], (32, 32, 3), LIMITS["sm_90"])
    assert gap.name == trace.name == "displacement"
    assert "#define DOWN_COUNT 32\n" in gap.source
    assert "#define DOWN_COUNT 1\n" in trace.source
    assert gap.threads > trace.threads == 32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [5, 8, 13, 32])
@pytest.mark.parametrize(("stride", "poolfactor"), [(1, 1), (2, 2), (3, 3), (1, 3), (2, 5), (5, 1), (3, 2)])
def test_an_axis_is_its_pooling_matrix(kind, mode, n, stride, poolfactor):
    if kind == "strided":
        poolfactor = stride
    if output_size(n, kind, stride, mode) < 1:
        pytest.skip("the grid vanishes")
    H = pooling_matrix(n, kind, stride, poolfactor, mode)
    axis = pooled(H, stride, mode == "periodic")
    rebuilt = np.zeros_like(H)
    for output in range(axis.outputs):
        for tap, value in enumerate(axis.taps):
            place = stride * output + axis.first + tap
            if mode == "periodic" or 0 <= place < n:
                assert axis.begin <= place < axis.end
                rebuilt[output, place % n] += value
    np.testing.assert_array_equal(rebuilt, H)


def test_an_axis_that_is_not_pooled_is_the_identity():
    assert pooled(np.eye(7), 1, False) == unpooled(7)


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype", "message"),
    [
        (PUBLISHED["exp/exp 2-5"], (32, 32, 3), np.float64, "float32"),
        (PUBLISHED["exp/exp 2-5"], (32, 40, 3), np.float32, "32x40"),
        (Convolutional((Layer(9, **EXP),)), (16, 16, 1), np.float32, "9x9"),
        (PUBLISHED["exp/exp 2-5"], (32, 32, 30), np.float32, "30 channels"),
        (network([EXP, EXP], (1, 1), poolfactor=9), (32, 32, 1), np.float32, "layer 1"),
        (MODELS["one layer, exp"], (160, 32, 3), np.float32, "1,280 threads"),
        (MODELS["one layer, exp"], (48, 32, 20), np.float32, "1,536 threads"),
        (MODELS["one layer, exp"], (700, 32, 1), np.float32, "bytes of shared memory"),
    ],
)
def test_what_has_no_fused_code_is_named(kernel, shape, dtype, message, host):
    reason = cuda.obstacle(network_of(kernel, shape), kernel.tangent, np.zeros((1, *shape), dtype))
    assert reason is not None
    assert message in reason
    assert "\n" not in reason


SOURCES = sorted(path.name for path in real_programs._FOLDER.glob("*.cu"))


def install_without(missing: str, folder: Path, monkeypatch) -> None:
    for source in SOURCES:
        if source != missing:
            (folder / source).touch()
    monkeypatch.setattr(real_programs, "_FOLDER", folder)


@pytest.mark.parametrize("missing", SOURCES)
def test_an_installation_without_a_source_has_an_obstacle(missing, tmp_path, monkeypatch):
    install_without(missing, tmp_path, monkeypatch)
    # Past the cache, which holds what other tests planned.
    chosen = plan.__wrapped__(network_of(PUBLISHED["exp/exp 2-5"], (32, 32, 3)), False, 3, LIMITS["sm_90"])
    assert chosen.obstacle is not None
    assert missing in chosen.obstacle
    assert "\n" not in chosen.obstacle


@pytest.mark.parametrize("missing", SOURCES)
def test_an_installation_without_a_source_refuses_entrywise_passes(missing, tmp_path, monkeypatch):
    """Not by the error of reading a file: what to do is to install again."""
    install_without(missing, tmp_path, monkeypatch)
    # Past the caches, which hold what other tests made.
    for make in (
        lambda: real_programs.weighted_cosines.__wrapped__(100),
        lambda: real_programs.kernel_values.__wrapped__(DotProduct("square"), 100),
        lambda: real_programs.scalar_function.__wrapped__(Layer(3, **RELU), 100, True),
    ):
        with pytest.raises(KernelError, match=rf"{re.escape(missing)}: install megagram again$"):
            make()


def test_every_source_is_packaged():
    """CUDA sources are read where the package is installed; all sources are in a source distribution."""
    root = HERE.parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    manifest = [line.split() for line in (root / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    sources = [path for path in (root / "kernels").rglob("*") if path.suffix in (".cu", ".cpp", ".hpp")]
    assert {path.suffix for path in sources} == {".cu", ".cpp", ".hpp"}
    for path in sources:
        folder = path.parent.relative_to(root)
        assert ".".join(folder.parts) in settings["packages"]
        assert any(
            folder.is_relative_to(under) and any(fnmatch(path.name, pattern) for pattern in patterns)
            for command, under, *patterns in manifest
            if command == "recursive-include"
        ), f"{path} is in no source distribution: add it to MANIFEST.in"
        if path.suffix == ".cu":
            patterns = settings["package-data"].get(".".join(folder.parts), [])
            assert any(fnmatch(path.name, pattern) for pattern in patterns), f"{path} is not installed"


def test_what_has_fused_code_meets_no_obstacle(host):
    """Every model of the list, on images of every size that it takes; and its name, for reports."""
    image = np.zeros((1, 31, 20, 3), np.float32)
    for name, kernel in MODELS.items():
        for size in SIZES:
            X = np.zeros((1, *size, 3), np.float32)
            if admissible(kernel, X.shape[1:]):
                assert cuda.obstacle(network_of(kernel, X.shape[1:]), kernel.tangent, X) is None, name
    assert cuda.name(image) == "cuda"


def test_norms_are_those_of_the_whole_self_gram_arrays():
    """What blocks that are prepared on a device hold (C6), in the dtype of the images."""
    kernel = POOLED["relu both, gaussian, reference"]
    X = busy_images(2, (8, 8, 1)).astype(np.float32)
    norms = cuda.patch_norms(network_of(kernel, X.shape[1:]), X)
    assert [norm.dtype for norm in norms] == [np.float32, np.float32]
    for i, x in enumerate(X.astype(np.float64)):
        for norm, wanted in zip(norms, from_self_gram(kernel, x), strict=True):
            np.testing.assert_allclose(norm[i], wanted, rtol=1e-6, atol=1e-6 * wanted.max())
