"""The plan of a run with features: counted against what it then computes; what is streamed, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from kernels.base import KernelError
from pipelines import features, memory, pools, speed, tasks
from pipelines.errors import DoesNotFit
from pipelines.experiment import Experiment
from pipelines.explicit import feature_plan, maps
from pipelines.plan_base import Assumed
from pipelines.stores import FeatureStore

pytestmark = pytest.mark.usefixtures("tiles_of_16")

SPEED = speed.Speed(entries=1e6, operations=1e9, worker=1e9, worker_single=2e9)
RANDOM = {"kind": "random", "widths": 24}
NYSTROM = {"kind": "nystrom", "landmarks": 6}


def experiment(samples: small.Samples, table: dict[str, Any], **sections: Any) -> Experiment:
    return samples.experiment(features=table, **sections)


def planned(one: Experiment, root: Path, **limits: Any) -> feature_plan.FeaturePlan:
    limits = {"workers": 2, "worker_bytes": 2**40, "speed": SPEED, **limits}
    return feature_plan.make(one, pools.resolve(one), root, **limits)


def computed(one: Experiment, root: Path) -> features.FeatureReport:
    """What the run's stage ``features`` does, in this process."""
    resolved, dtype = pools.resolve(one), one.gram.dtype
    made, learned = maps.learned(resolved, one.feature_map, dtype, root, resolved.split.train, tasks.Workers)
    return features.materialise(
        resolved, made, dtype, root, resolved.split.pool_rows, tasks.Workers, learned=learned
    )


@pytest.mark.parametrize("table", [RANDOM, NYSTROM], ids=["random", "nystrom"])
def test_what_is_planned_is_what_is_computed(samples: small.Samples, root: Path, table: dict) -> None:
    """Protects the dry run: blocks and bytes before, nothing after; learned maps are found again."""
    one = experiment(samples, {**table, "blocks": "stored"}, data={"train": 60, "validation": 12})
    before = planned(one, root)
    assert not root.exists(), "a plan makes nothing"
    made = computed(one, root)
    (blocks,) = before.blocks
    assert (blocks.missing, blocks.present) == (made.computed, 0)
    width = FeatureStore(Path(made.store)).array("features").shape[1]
    assert before.width == width
    entries = 5 * 16 * width
    assert before.feature_seconds == pytest.approx(entries / SPEED.entries / 2, rel=0.2)
    after = planned(one, root)
    assert (after.blocks_missing, after.cost.operations, after.learning.operations) == (0, 0, 0)
    assert after.disk_bytes < before.disk_bytes


def test_learning_is_counted_where_there_is_something_to_learn(samples: small.Samples, root: Path) -> None:
    """Protects the expected time of maps that learn."""
    one = experiment(samples, NYSTROM)
    made = planned(one, root, speed=replace(SPEED, operations=8e9))
    assert made.learning.operations > 0
    assert made.learning_seconds == pytest.approx(made.learning.operations / SPEED.worker), "on one thread"
    assert made.seconds > made.feature_seconds + made.solve_seconds
    assert planned(experiment(samples, RANDOM), root).learning.operations == 0


def test_nystrom_features_are_known_as_whitened(samples: small.Samples, root: Path) -> None:
    """Protects Falkon's preconditioner: a diagonal is one of Nystrom features alone."""
    falkon = {"method": "falkon"}
    assert planned(experiment(samples, NYSTROM, solve=falkon), root).choice.estimate.whitened
    assert not planned(experiment(samples, RANDOM, solve=falkon), root).choice.estimate.whitened


def test_streamed_where_the_disk_lacks_room(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects runs on a small disk: stored features would not fit, so each pass computes them; the plan says so."""
    one = experiment(samples, RANDOM, solve={"method": "eigen"})
    assert not planned(one, root).streamed
    needed = planned(one, root).disk_bytes
    monkeypatch.setattr(feature_plan, "disk_free", lambda where: needed - 1)
    made = planned(one, root)
    assert made.streamed
    assert "of disk are free" in made.blocks_reason
    assert made.disk_bytes < needed
    made.check()
    stored = planned(experiment(samples, {**RANDOM, "blocks": "stored"}, solve={"method": "eigen"}), root)
    with pytest.raises(DoesNotFit, match="choose another --root"):
        stored.check()


def test_streamed_where_computing_beats_the_disk(samples: small.Samples, root: Path) -> None:
    """Protects the choice by cost: a quick map beside a slow disk is not stored, a slow one beside a quick disk is."""
    one = experiment(samples, RANDOM)
    quick = speed.Speed(entries=1e12, operations=1e9, worker=1e9, worker_single=2e9, read=1e3)
    assert planned(one, root, speed=quick).streamed
    slow = speed.Speed(entries=1e3, operations=1e9, worker=1e9, worker_single=2e9, read=1e9)
    assert not planned(one, root, speed=slow).streamed


@pytest.mark.parametrize("blocks", ["stored", "streamed"])
def test_what_is_asked_for_is_planned(samples: small.Samples, root: Path, blocks: str) -> None:
    """Protects ``features.blocks`` from the choice by cost."""
    made = planned(experiment(samples, {**RANDOM, "blocks": blocks}), root)
    assert (made.streamed, made.blocks_reason) == (blocks == "streamed", "asked for")


def test_a_width_that_no_memory_holds_is_refused_with_what_would_fit(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from a driver killed hours later: one line that names the features, the memory and the remedy."""
    one = experiment(
        samples, {"kind": "random", "widths": 5_000_000}, data={"train": 60}, solve={"method": "eigen"}
    )
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    with pytest.raises(DoesNotFit, match="fewer features") as caught:
        planned(one, root).check()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_a_worker_that_cannot_hold_a_block_is_refused(samples: small.Samples, root: Path) -> None:
    """Protects from workers killed one after another, and passes with what the plan says that it needs."""
    one = experiment(samples, {**RANDOM, "blocks": "stored"}, solve={"method": "eigen"})
    needed = planned(one, root).worker_bytes
    planned(one, root, worker_bytes=needed).check()
    with pytest.raises(DoesNotFit, match=r"a worker needs .* or fewer features than 24"):
        planned(one, root, worker_bytes=needed - 1).check()


def test_a_plan_for_machines_that_are_not_there_measures_nothing(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects ``assume``: rates and memory are the profile's, and this machine is not asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this machine was asked")

    for name in ("calibrate_map", "map_path", "read_rate", "disk_free"):
        monkeypatch.setattr(feature_plan, name, refuse)
    there = Assumed("far", 1e12, 2e12, 1e11, 1e11, 2**40, 2**45, 2e9)
    made = planned(experiment(samples, RANDOM), root, speed=None, assumed=there)
    assert (made.assumed, made.driver_limit, made.disk_free) == ("far", 2**40, 2**45)
    twice = planned(
        experiment(samples, {**RANDOM, "blocks": "stored"}),
        root,
        speed=None,
        assumed=Assumed("far", 2e12, 4e12, 2e11, 1e11, 2**40, 2**45, 2e9),
    )
    slower = planned(experiment(samples, {**RANDOM, "blocks": "stored"}), root, speed=None, assumed=there)
    assert slower.feature_seconds == pytest.approx(2 * twice.feature_seconds)


def test_maps_are_timed_as_the_workers_compute_them(samples: small.Samples, root: Path) -> None:
    """Protects the calibration: a learned map and one that learns nothing are timed, one that has to learn follows
    from its cost; all give a pace."""
    for table in (RANDOM, NYSTROM):
        one = experiment(samples, table)
        assert planned(one, root, speed=None).seconds > 0
        computed(one, root)
        assert planned(one, root, speed=None).seconds > 0


def test_maps_that_no_memory_holds_are_not_tried(samples: small.Samples, root: Path) -> None:
    """Protects against weights that are drawn to be timed, before memory is looked at."""
    one = experiment(samples, {"kind": "random", "widths": 10**9})
    made = feature_plan.make(one, pools.resolve(one), root, workers=2, worker_bytes=2**33)
    with pytest.raises(DoesNotFit, match="fewer features"):
        made.check()


def test_more_landmarks_than_samples_are_refused_in_the_plan(samples: small.Samples, root: Path) -> None:
    """Protects against a plan of a run that cannot be."""
    with pytest.raises(KernelError, match="landmarks must be at most 60"):
        planned(experiment(samples, {"kind": "nystrom", "landmarks": 61}, data={"train": 60}), root)


def test_more_anchors_than_patches_are_refused_in_the_plan(samples: small.Samples, root: Path) -> None:
    """Protects against passes over all images before the error: 3 images have 48 patches, then 3."""
    np.save(samples.folder / "X.npy", np.random.default_rng(0).random((72, 4, 4, 1)))
    first, second = (
        {"patch": size, "kernel": "relu", "pooling": "strided", "subsampling": size + 1} for size in (3, 1)
    )
    kernel = {"kind": "convolutional", "pooling_mode": "same", "layers": [first, second]}
    for anchors, message in (
        ([49, 3], "layer 1: 49 anchors need as many patches, and there are 48: ask for fewer anchors"),
        ([48, 4], "layer 2: 4 anchors need as many patches, and there are 3: ask for fewer anchors"),
    ):
        one = experiment(
            samples,
            {"kind": "nystrom-ckn", "anchors": anchors},
            kernel=kernel,
            data={"train": 3, "validation": 3},
        )
        with pytest.raises(KernelError, match=message):
            planned(one, root)
