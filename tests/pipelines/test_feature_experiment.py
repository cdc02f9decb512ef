"""``[features]`` in an experiment file: what it makes, what is refused, and that every refusal names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernels.features.ckn import NystromCKN
from kernels.features.random import RandomFeatures
from pipelines.errors import ExperimentError
from pipelines.experiment import Experiment, load

TABLES = """
name = "features"
seed = 7
[data]
source = "digits"
train = 100
validation = 50
preprocess = ["scale"]
[kernel]
kind = "fully-connected"
family = "rf"
depth = 2
[features]
kind = "random"
widths = 64
[solve]
ridges = [0.1]
"""
LAYERS = "[{ patch = 3, kernel = 'exponential', sigma = 0.6, subsampling = 2 }]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    where = tmp_path / "features.toml"
    where.write_text(TABLES)
    return where


def one(path: Path, *overrides: str) -> Experiment:
    (experiment,) = load(path, overrides).experiments
    return experiment


def test_one_table_switches_from_the_kernel_to_features(path: Path) -> None:
    """Protects the switch: the kernel stays what it is, the map stands for it and draws by the experiment's seed."""
    experiment = one(path)
    made = experiment.feature_map
    assert made == RandomFeatures(kernel=experiment.kernel_object, widths=(64,), seed=7)
    assert one(path, "features.seed=3").feature_map.seed == 3
    path.write_text(TABLES.replace('[features]\nkind = "random"\nwidths = 64\n', ""))
    plain = one(path)
    assert plain.feature_map is None
    assert plain.kernel_object == experiment.kernel_object


def test_the_table_survives_its_json(path: Path) -> None:
    """Protects results, which hold the table: read again it is the same experiment, with the same map."""
    experiment = one(path, "features.orthogonal=true", "features.blocks=streamed")
    again = Experiment.model_validate(experiment.table())
    assert again == experiment
    assert again.feature_map == experiment.feature_map
    assert (again.features.blocks, again.feature_map.orthogonal) == ("streamed", True)


def test_features_of_another_kind_replace_those_of_the_base(path: Path) -> None:
    """Protects ``extends`` and variants: no parameter of one kind is left in a table of another."""
    path.with_name("other.toml").write_text(
        f"extends = 'features.toml'\nname = 'other'\nkernel = {{ kind = 'convolutional', layers = {LAYERS} }}\n"
        "features = { kind = 'nystrom-ckn', anchors = [8] }\n"
    )
    made = one(path.with_name("other.toml")).feature_map
    assert isinstance(made, NystromCKN)
    assert made.anchors == (8,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.kind=randm"], "features.kind = 'randm' is unknown: .*random"),
        (["features.width=8"], "features.width is not a key here: .*widths"),
        (["features.block=stored"], "features.block is not a key here: .*blocks"),
        (["features.widths=0"], "features.widths must be"),
        (["features.blocks=kept"], "features.blocks: must be 'auto', 'stored' or 'streamed'"),
        (["features.kind=[1]"], "features.kind = .* is unknown"),
        (["features=3"], "features: must be a table"),
        (
            ["solve.method=tiled-cholesky"],
            'solve.method = "tiled-cholesky" .*choose from auto, cholesky, eigen, conjugate-gradient, falkon',
        ),
        (["solve.method=cholesky", "solve.select=loo"], "no leave-one-out with .features..*gcv"),
        (["solve.method=nystrom", "solve.centres=5"], 'solve.method = "nystrom" .*choose from'),
        (["solve.method=conjugate-gradient", "solve.select=loo"], "has no leave-one-out"),
        (["solve.method=falkon", "solve.select=loo"], "has no leave-one-out.* with .features. eigen"),
        (["solve.method=falkon", "solve.centres=5"], 'centres goes with method = "nystrom" alone'),
        (["solve.dtype=float32"], 'solve.dtype = "float32" has no meaning with .features.'),
        (["gram.tiles=stored"], "gram.tiles has no meaning with .features.*features.blocks"),
        (["gram.joint=false"], "gram.joint has no meaning with .features."),
    ],
)
def test_a_refusal_names_the_key(path: Path, overrides: list[str], message: str) -> None:
    """Protects the first line of an error: the file, the key, and what would be valid."""
    with pytest.raises(ExperimentError, match=message) as caught:
        one(path, *overrides)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["auto", "eigen"])
def test_leave_one_out_goes_with_features(path: Path, method: str) -> None:
    """Protects ``select = "loo"``, which features have by the hat matrix."""
    assert one(path, f"solve.method={method}", "solve.select=loo").solve.select == "loo"


def test_a_map_that_cannot_stand_for_the_kernel_is_refused(path: Path) -> None:
    """Protects from features of another kernel than the one named."""
    with pytest.raises(ExperimentError, match=r"features\.kernel"):
        one(path, "kernel.family=ntk", "kernel.depth=4")


def test_precomputed_matrices_have_no_features(path: Path) -> None:
    """Protects the reason, that there are no samples to compute features of, and what to do."""
    table: dict[str, Any] = {
        "name": "p",
        "data": {"source": "arrays", "y": "y.npy", "train": 5, "validation": 2},
        "kernel": {"kind": "precomputed", "gram": "K.npy"},
        "features": {"kind": "random", "widths": 8},
        "solve": {"ridges": [0.1]},
    }
    with pytest.raises(
        ValueError, match=r"features: a precomputed kernel has no samples.*leave out \[features\]"
    ):
        Experiment.model_validate(table)
