"""Descriptions: strict keys, clear errors, one fingerprint for one kernel, other people's kernels."""

from __future__ import annotations

import sys
import tomllib
import types
from importlib.metadata import EntryPoint

import pytest

from kernels import registry
from kernels.base import Kernel, KernelError, Scaled, Sum
from kernels.convolutional import Convolutional, Layer
from kernels.deep import FullyConnected
from kernels.dot_product import DotProduct
from kernels.registry import from_description, kinds, register


@pytest.fixture(autouse=True)
def _own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def parse(text: str) -> Kernel:
    return from_description(tomllib.loads(text))


def test_tables_of_an_experiment_file() -> None:
    assert parse('kind = "fully-connected"\nfamily = "ntk"\ndepth = 3') == FullyConnected("ntk", 3)
    assert parse('kind = "dot-product"\nkernel = "exponential"\nsigma = 1') == DotProduct(
        "exponential", sigma=1.0
    )
    kernel = parse(
        """
        kind = "convolutional"
        tangent = false
        pooling_mode = "reference"
        [[layers]]
        patch = 3
        kernel = "exponential"
        sigma = 0.6
        pooling = "gaussian"
        subsampling = 2
        [[layers]]
        patch = 3
        kernel = "polynomial"
        degree = 2
        pooling = "global"
        """
    )
    layers = (
        Layer(3, "exponential", sigma=0.6, subsampling=2),
        Layer(3, "polynomial", degree=2, pooling="global"),
    )
    assert kernel == Convolutional(layers)
    assert kernel.fingerprint == Convolutional(layers).fingerprint


def test_weighted_terms() -> None:
    kernel = parse(
        """
        kind = "sum"
        [[terms]]
        kind = "dot-product"
        kernel = "linear"
        [[terms]]
        kind = "fully-connected"
        family = "rf"
        weight = 2
        """
    )
    assert kernel == Sum((DotProduct("linear"), Scaled(FullyConnected("rf"), 2.0)))
    assert from_description(kernel.describe()) == kernel


def test_one_kernel_has_one_fingerprint() -> None:
    """Defaults left out or written, integers or floats."""
    texts = [
        'kind="convolutional"\nlayers=[{patch=3, kernel="linear", subsampling=2}]',
        'kind="convolutional"\ntangent=false\nlayers=[{patch=3, kernel="linear", scale=1, subsampling=2,'
        " poolfactor=2, floor=1e-6, patch_norm=false}]",
    ]
    assert len({parse(text).fingerprint for text in texts}) == 1


LAYER = 'kind = "convolutional"\nlayers = [{patch = 3, kernel = "relu"}, {patch = 3, kernel = "relu", %s}]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 3", "kernel.kind is missing"),
        (
            'kind = "fully-conected"',
            "kernel.kind = 'fully-conected' is unknown: did you mean 'fully-connected'",
        ),
        (
            'kind = "fully-connected"\nfamily = "rf"\ndeph = 3',
            "kernel.deph is not a key here: did you mean 'depth'",
        ),
        ('kind = "fully-connected"', "kernel.family is missing"),
        ('kind = "fully-connected"\nfamily = "rf"\ndepth = 2.5', "kernel.depth must be a whole number"),
        (
            'kind = "dot-product"\nkernel = "exponential"\nsigma = "x"',
            "kernel.sigma must be a positive number",
        ),
        ('kind = "convolutional"', "kernel.layers is missing"),
        ('kind = "convolutional"\nlayers = []', "kernel.layers must be a list of tables"),
        ('kind = "convolutional"\nlayers = [3]', r"kernel.layers\[0\] must be a table"),
        (LAYER % "sigma = 1", r"kernel.layers\[1\].sigma has no meaning"),
        (LAYER % "poling = 1", r"kernel.layers\[1\].poling is not a key here: did you mean 'pooling'"),
        (LAYER % 'pooling = "mean"', r"kernel.layers\[1\].pooling = 'mean' is unknown"),
        (LAYER % 'kind = "x"', r"kernel.layers\[1\].kind is not a key here"),
        ('kind = "sum"\nterms = []', "kernel.terms must be a list"),
        ('kind = "sum"\nterms = 3', "kernel.terms must be a list"),
        (
            'kind = "dot-product"\nkernel = "polynomial"\ndegree = 1001',
            "kernel.degree must be at most 1000, got 1001",
        ),
        ('kind = "fully-connected"\nfamily = "rf"\ndepth = 1001', "kernel.depth must be at most 1000"),
        ('kind = "dot-product"\nkernel = "exponential"\nsigma = 1e-200', "kernel.sigma .* overflow"),
        (
            'kind = "convolutional"\nlayers = [{patch = 3, kernel = "exponential", sigma = 1e-30}]',
            r"kernel.layers\[0\].sigma .* overflow",
        ),
        ('kind = "sum"\nterms = [{kind = "dot-product"}]', r"kernel.terms\[0\].kernel is missing"),
        (
            'kind = "sum"\nterms = [{kind = "dot-product", kernel = "linear", weight = -1}]',
            r"kernel.terms\[0\].weight must be a finite number",
        ),
        ('kind = "scaled"\nweight = 1', "kernel.term is missing"),
    ],
)
def test_errors_name_the_key(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        parse(text)


def test_the_path_of_the_table_is_the_callers() -> None:
    with pytest.raises(KernelError, match=r"^variants\[2\]\.kernel\.kind is missing"):
        from_description({}, "variants[2].kernel")


def test_mixed_terms_are_refused_with_the_path() -> None:
    terms = [DotProduct("linear").describe(), Convolutional((Layer(3, "relu"),)).describe()]
    with pytest.raises(KernelError, match=r"^kernel: a sum kernel cannot mix"):
        from_description({"kind": "sum", "terms": terms})


def test_registered_kernels() -> None:
    register("mine", lambda table: DotProduct("polynomial", degree=table["degree"]))
    assert "mine" in kinds()
    assert from_description({"kind": "mine", "degree": 4}) == DotProduct("polynomial", degree=4)
    with pytest.raises(KernelError, match=r"'mine' \(registered in this process\) failed: KeyError"):
        from_description({"kind": "mine"})
    with pytest.raises(KernelError, match="built in"):
        register("sum", lambda table: DotProduct("linear"))
    register("wrong", lambda table: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(KernelError, match="made a int, not a Kernel"):
        from_description({"kind": "wrong"})


def _entry_points(group: str) -> list[EntryPoint]:
    return [
        EntryPoint("theirs", "their_kernels:linear", group),
        EntryPoint("broken", "no_such_module:build", group),
    ]


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other people's kernels come by an installed entry point; one that fails is named."""
    their_kernels = types.ModuleType("their_kernels")
    their_kernels.linear = lambda table: DotProduct("linear")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_kernels", their_kernels)
    monkeypatch.setattr(registry, "entry_points", lambda group: _entry_points(group))
    assert from_description({"kind": "theirs"}) == DotProduct("linear")
    with pytest.raises(KernelError, match=r"\(entry point no_such_module:build\) failed: ModuleNotFound"):
        from_description({"kind": "broken"})


def test_errors_meant_for_the_user_pass_unchanged() -> None:
    """Protects exit codes: an error of a registered kernel that carries one keeps its type and message."""

    class NoData(Exception):
        exit_code = 3

    def build(table: object) -> Kernel:
        raise NoData("K.npy: no such file")

    register("mine", build)
    with pytest.raises(NoData, match=r"^K\.npy: no such file$"):
        from_description({"kind": "sum", "terms": [{"kind": "mine"}]})


@pytest.mark.parametrize(
    "kernel", [DotProduct("linear"), Convolutional((Layer(3, "relu"),)), FullyConnected("rf")]
)
def test_a_misspelt_weight_is_recognised(kernel: Kernel) -> None:
    """Protects terms: the weight, which the sum reads, is among the keys that a term may have."""
    with pytest.raises(
        KernelError, match=r"kernel.terms\[0\].wieght is not a key here: did you mean 'weight'"
    ):
        from_description({"kind": "sum", "terms": [{**kernel.describe(), "wieght": 2}]})
    with pytest.raises(KernelError, match=r"^(?!.*weight\b).*xyzzy"):
        from_description({**kernel.describe(), "xyzzy": 2})
