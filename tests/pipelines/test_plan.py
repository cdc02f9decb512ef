"""The plan: what a run would compute, counted against what it then computes; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from kernels import native
from kernels.base import KernelError
from kernels.registry import from_description
from pipelines import matrices, memory, plan, pools, solvers, spectrum, speed
from pipelines.errors import DataError, DoesNotFit, ExperimentError
from pipelines.experiment import Experiment
from pipelines.solvers.choose import PRECONDITIONING
from pipelines.stores import folder_bytes

pytestmark = pytest.mark.usefixtures("tiles_of_16")

SPEED = speed.Speed(entries=1e6, operations=1e9, worker=1e9, worker_single=2e9)
NTK = {"kind": "fully-connected", "family": "ntk", "depth": 3}


def planned(one: Experiment, root: Path, **limits: Any) -> plan.Plan:
    limits = {"workers": 2, "worker_bytes": 2**40, "speed": SPEED, **limits}
    return plan.make(one, pools.resolve(one), root, **limits)


def with_test_set(samples: small.Samples, n: int = 25) -> dict[str, Any]:
    small.Samples(samples.folder, seed=9).write(n, "_test")
    paths = {"X_test": str(samples.folder / "X_test.npy"), "y_test": str(samples.folder / "y_test.npy")}
    return {**paths, "test": n}


@pytest.mark.parametrize("kernel", [NTK, {"kind": "dot-product", "kernel": "linear"}])
@pytest.mark.parametrize("refit", [False, True])
def test_what_is_planned_is_what_is_computed(
    samples: small.Samples, root: Path, kernel: dict, refit: bool
) -> None:
    """Protects the dry run: tiles by matrix, from nothing to all; growing and other splits included."""
    for data in (
        {"train": 20, "validation": 8},
        {"train": 40, "validation": 12, **with_test_set(samples)},
        {"train": 60, "validation": 12, **with_test_set(samples)},
    ):
        one = samples.experiment(kernel=kernel, data=data, solve={"refit": refit})
        before = planned(one, root)
        made = small.make(one, root)
        assert {m.role: len(m.missing) for m in before.matrices} == made.computed
        after = planned(one, root)
        assert after.tiles_missing == 0
        assert after.disk_bytes == 0
        assert (after.cost.operations, after.gram_seconds) == (0, 0)
        assert {m.role: m.stores[-1] for m in after.matrices} == {
            r: s[-1].path for r, s in made.stores.items()
        }
        assert [m.present for m in after.matrices] == [m.needed for m in after.matrices]


def test_a_preconditioner_is_planned_by_no_clock(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects "same file, same bits": the spectrum that is guessed, and the rank with it, are those of any machine."""
    monkeypatch.setattr(spectrum, "LEAST", 20)
    one = samples.experiment(solve={"method": "conjugate-gradient"})
    fast, slow = (
        planned(one, root, speed=speed.Speed(rate, rate, rate, rate), workers=workers).choice.estimate
        for rate, workers in ((1e12, 1), (1e2, 9))
    )
    for key in PRECONDITIONING:
        assert getattr(fast, key) == getattr(slow, key)
    assert fast.floor > 0, "no spectrum was guessed"


def test_planning_makes_nothing(samples: small.Samples, root: Path) -> None:
    """Protects ``before anything is``: a plan leaves no folder behind."""
    planned(samples.experiment(), root)
    assert not root.exists()


def test_damaged_and_ragged_tiles_count_as_missing(samples: small.Samples, root: Path) -> None:
    """Protects the count after growth and repair: only whole tiles of the right extent are present."""
    one = samples.experiment(data={"train": 60, "validation": 12})
    small.make(one, root).store.chunk("gram", (1, 0)).unlink()
    assert planned(one, root).tiles_missing == 1
    samples.write(90)
    grown = samples.experiment(data={"train": 80, "validation": 10})
    before = planned(grown, root)
    assert {"train": before.tiles_missing} == small.make(grown, root).computed


def test_bytes_are_those_that_appear_on_disk(samples: small.Samples, root: Path) -> None:
    """Protects the refusal of a full disk: predicted bytes of tiles, two outputs, and of prepared blocks."""
    one = samples.experiment(kernel=NTK, data={"train": 60, "validation": 12, **with_test_set(samples)})
    before = planned(one, root)
    small.make(one, root)
    tiles = sum(p.stat().st_size for p in root.glob("gram/*/gram/c/*/*"))
    assert sum(m.disk_bytes for m in before.matrices) == tiles
    # What lies beside the numbers is small for real pools, not for this one.
    assert before.samples_bytes <= folder_bytes(root / "features") + folder_bytes(root / "pools")
    arrays = sum(p.stat().st_size for p in root.glob("*/*/*/c/**/*") if p.is_file()) - tiles
    assert before.samples_bytes <= arrays


def test_operations_and_time_are_those_of_the_missing_tiles(samples: small.Samples, root: Path) -> None:
    """Protects expected hours: the sum over missing tiles of their cost, ragged ones at their own size."""
    one = samples.experiment(data={"train": 60, "validation": 12})
    made = planned(one, root)
    (matrix,) = made.matrices
    kernel = one.kernel_object
    extents = [matrix.grid.extent(tile) for tile in matrix.missing]
    costs = [kernel.cost(r.stop - r.start, c.stop - c.start, (5,), 8) for r, c in extents]
    assert made.cost.operations == pytest.approx(sum(c.operations for c in costs))
    assert made.cost.transcendentals == pytest.approx(sum(c.transcendentals for c in costs))
    assert made.cost.scratch_bytes == max(c.scratch_bytes for c in costs)
    entries = sum((r.stop - r.start) * (c.stop - c.start) for r, c in extents)
    assert entries == 10 * 256 + 4 * 8 * 16
    assert made.gram_seconds == pytest.approx(entries / SPEED.entries / 2)


def test_too_little_memory_for_the_solve_says_what_would_fit(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from a driver killed hours later: refused before start, and the size named would pass."""
    one = samples.experiment(data={"train": 60}, solve={"method": "cholesky"})
    needed = solvers.solve_bytes("cholesky", 60, "float64")
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    planned(one, root).check()
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(DoesNotFit, match="60 samples by cholesky in float64") as caught:
        planned(one, root).check()
    assert caught.value.exit_code == 4
    # A method that fits is named, and does.
    assert "float32" in str(caught.value)
    planned(
        samples.experiment(data={"train": 60}, solve={"method": "cholesky", "dtype": "float32"}), root
    ).check()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(DoesNotFit, match="fewer training samples"):
        planned(one, root).check()


def test_a_refit_is_planned_at_its_own_size(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a refit, the largest solve of a run: training and validation samples together."""
    needed = solvers.solve_bytes("cholesky", 72, "float64")
    one = samples.experiment(data={"train": 60}, solve={"method": "cholesky", "refit": True})
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(DoesNotFit, match="72 samples"):
        planned(one, root).check()


def test_too_little_memory_for_a_worker_says_what_to_set(samples: small.Samples, root: Path) -> None:
    """Protects from workers killed one after another: what each needs, what it may use, which key to set."""
    one = samples.experiment()
    needed = planned(one, root).worker.total
    planned(one, root, workers=4, worker_bytes=needed).check()
    with pytest.raises(DoesNotFit, match=r"a worker needs .* set workers = 3 or more memory"):
        planned(one, root, workers=4, worker_bytes=needed - 1).check()
    small.make(one, root)
    planned(one, root, workers=4, worker_bytes=1).check()  # nothing is left to compute: no worker is needed


def test_too_little_disk_says_how_much_and_where(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a disk from being filled: refused before start, with the root and what to do."""
    one = samples.experiment(gram={"tiles": "stored"})
    needed = planned(one, root).disk_bytes
    monkeypatch.setattr(plan, "disk_free", lambda where: needed)
    planned(one, root).check()
    monkeypatch.setattr(plan, "disk_free", lambda where: needed - 1)
    with pytest.raises(DoesNotFit, match=rf"under {root} .* another --root"):
        planned(one, root).check()


def test_all_that_does_not_fit_is_said_at_once(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from mending one thing after another."""
    monkeypatch.setattr(plan, "disk_free", lambda where: 0)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    made = planned(samples.experiment(), root, worker_bytes=1)
    assert len(made.problems()) == 3
    assert not made.json()["fits"]
    with pytest.raises(DoesNotFit) as caught:
        made.check()
    assert "\n" not in str(caught.value)


def test_the_disk_of_a_root_that_is_not_there_yet() -> None:
    """Protects ``--root new/deep/folder``: free space of the nearest folder that exists."""
    assert plan.disk_free(Path("/no/such/folder/anywhere")) > 0


@pytest.mark.parametrize(
    ("table", "shape"),
    [
        (NTK, (7,)),
        ({"kind": "convolutional", "layers": [{"patch": 3, "kernel": "relu"}]}, (6, 6, 1)),
        ({"kind": "sum", "terms": [NTK, {"kind": "dot-product", "kernel": "linear"}]}, (7,)),
    ],
)
def test_calibration_times_this_machine(table: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Protects expected time: positive speeds for kernels of any kind, and a quick answer for slow ones."""
    found = speed.calibrate(from_description(table), shape, "float32", seconds=0.01)
    for rate in (found.entries, found.operations, found.worker, found.worker_single):
        assert 0 < rate < np.inf


IMAGES = {"kind": "convolutional", "layers": [{"patch": 3, "kernel": "relu"}]}


def test_of_a_tile_on_the_diagonal_image_kernels_take_a_triangle(samples: small.Samples, root: Path) -> None:
    """Protects the expected time of small runs, where tiles on the diagonal are many."""
    X, _ = samples.arrays(72)
    np.save(samples.folder / "X.npy", np.repeat(X, 5, axis=1).reshape(72, 5, 5, 1))
    made = planned(samples.experiment(kernel=IMAGES, data={"train": 60, "validation": 12}), root)
    entries = 4 * (16 * 17 // 2) + 6 * 256 + 4 * 8 * 16
    assert made.gram_seconds == pytest.approx(entries / SPEED.entries / 2)


@pytest.mark.parametrize(
    ("path", "least"),
    [("numpy", 1), ("compiled avx512", speed.GROUPED), ("compiled avx2, numpy", speed.GROUPED)],
)
def test_calibration_blocks_are_as_wide_as_the_path_works(
    monkeypatch: pytest.MonkeyPatch, path: str, least: int
) -> None:
    """Protects expected time: compiled code takes whole groups of second images, so that a narrower block would
    be timed at a fraction of its speed; a block with itself would at up to twice it."""
    kernel = from_description(IMAGES)
    seen: list[tuple[int, int]] = []

    def pair(self: Any, a: Any, b: Any) -> np.ndarray:
        assert a is not b
        seen.append((len(a), len(b)))
        return np.zeros((len(a), len(b)))

    monkeypatch.setattr(type(kernel), "tile_sides", {"float32": 128, "float64": 128})
    monkeypatch.setattr(type(kernel), "path", lambda self, a: path)
    monkeypatch.setattr(type(kernel), "pair", pair)
    speed.entries_per_second(kernel, (6, 6, 1), "float32", 10.0)
    sizes = [1, 1, 2, 4, 8, 16, 32, 64, 128, 128]  # the first is not counted, the last is timed twice
    assert seen == [(n, max(n, least)) for n in sizes]
    seen.clear()
    speed.entries_per_second(kernel, (6, 6, 1), "float32", 0.0)
    assert seen == [(1, least)] * 2


def test_a_device_is_timed_with_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects expected time: few pairs would not fill a device, and nothing is done when a call returns."""
    kernel = from_description(IMAGES)
    events: list[Any] = []
    monkeypatch.setattr(speed.device, "used", lambda: True)
    monkeypatch.setattr(speed.device, "placed", lambda block: block)
    monkeypatch.setattr(speed.device, "finish", lambda: events.append("finished"))
    monkeypatch.setattr(
        type(kernel), "pair", lambda self, a, b: events.append(len(b)) or np.zeros((len(a), len(b)))
    )
    speed.entries_per_second(kernel, (6, 6, 1), "float32", 0.0)
    assert events == [16, "finished"] * 2  # tiles have a side of 16 here


def test_the_plan_says_which_code_will_run_and_why_none_quicker(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the choice of a path: known before anything is computed, as is that a quicker one is missing."""
    vectors = planned(samples.experiment(), root)
    assert (vectors.path, vectors.path_remark, vectors.json()["path"]) == ("numpy", "", "numpy")
    X, _ = samples.arrays(72)
    np.save(samples.folder / "X.npy", np.repeat(X, 5, axis=1).reshape(72, 5, 5, 1))
    one = samples.experiment(kernel=IMAGES)
    monkeypatch.setattr(native, "obstacle", lambda *arguments: "not built")
    images = planned(one, root)
    assert (images.path, images.path_remark) == ("numpy", "not built")
    both = {"kind": "sum", "terms": [IMAGES, {"kind": "scaled", "weight": 2.0, "term": IMAGES}]}
    assert speed.path_of(from_description(both), (5, 5, 1), "float32") == ("numpy", "not built")
    turned = {**IMAGES, "kind": "roto-translation", "pooling_mode": "same"}
    # Where the plain kernel does the work, its obstacle is told; nothing is missing where no other path exists.
    for final, remark in (("orbit", "not built"), ("rot", "")):
        described = from_description({**turned, "final": final})
        assert speed.path_of(described, (5, 5, 1), "float32") == ("numpy", remark)
    monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", "general")
    assert planned(one, root).path_remark == ""  # it was declined
    monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", "compiled")
    with pytest.raises(KernelError, match="MEGAGRAM_KERNEL_PATH=compiled, but not built"):
        planned(one, root)
    monkeypatch.setenv("MEGAGRAM_KERNEL_PATH", "cuda")
    monkeypatch.setattr(speed.device, "why_no_device", lambda: "no GPU here")
    with pytest.raises(KernelError, match="MEGAGRAM_KERNEL_PATH=cuda, but no GPU here"):
        planned(one, root)
    assert not root.exists()


def test_workers_elsewhere_are_asked(samples: small.Samples, root: Path) -> None:
    """Protects plans for a running scheduler: path and speed are those of its workers, not of this machine."""
    asked: list[Any] = []

    def ask(function: Any, *arguments: Any) -> Any:
        asked.append(function)
        return ("a path", "a remark") if function is speed.path_of else 123.0 if len(arguments) > 1 else 1e9

    made = planned(samples.experiment(), root, ask=ask, speed=None, workers=1)
    assert asked == [speed.path_of, speed.entries_per_second, *[speed.worker_operations] * 2]
    assert (made.path, made.path_remark) == ("a path", "a remark")
    assert made.gram_seconds == pytest.approx(
        sum(m.grid.entries(t) for m in made.matrices for t in m.missing) / 123
    )


MACHINES = plan.Assumed("moon", 1e13, 2e13, 1e11, 1e12, 10**12, 10**15, 1e11)


def test_recomputed_tiles_are_neither_counted_nor_stored(samples: small.Samples, root: Path) -> None:
    """Protects the plan of what takes products alone: no tile, the operations of every pass, no bytes for tiles."""
    one = samples.experiment(gram={"tiles": "recomputed"}, solve={"method": "conjugate-gradient"})
    made = planned(one, root)
    assert (made.matrices, made.tiles_missing, made.gram_seconds) == ((), 0, 0)
    assert made.recomputed
    assert made.disk_bytes == made.samples_bytes + made.solve_disk_bytes
    passes = made.choice.estimate.passes
    one_pass = one.kernel_object.cost(16, 16, (5,), 8).operations * (40 * 41 / 2) / 16**2
    assert made.cost.operations == pytest.approx(passes * one_pass, rel=1e-3)
    assert made.solve_seconds > passes * (40 * 41 / 2) / SPEED.entries / 2
    assert made.json()["gram_tiles"] == "recomputed"
    needed = made.solve_worker_bytes
    planned(one, root, worker_bytes=needed).check()
    with pytest.raises(DoesNotFit, match="worker needs"):
        planned(one, root, worker_bytes=needed // 2).check()


def test_the_disk_of_a_factor_is_planned(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects an out-of-core solve from a full disk hours later."""
    made = planned(samples.experiment(solve={"method": "tiled-cholesky"}), root)
    assert made.solve_disk_bytes == 2048**2 * 8 + 4
    monkeypatch.setattr(plan, "disk_free", lambda where: made.disk_bytes - 1)
    with pytest.raises(DoesNotFit, match="the stores need"):
        planned(samples.experiment(solve={"method": "tiled-cholesky"}), root).check()


def test_assumed_machines_are_neither_timed_nor_mistaken_for_this_one(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a plan for a cluster that is not there: its rates, memory and disk alone, and said to be assumed."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this machine was asked")

    for name in ("calibrate", "path_of", "read_rate", "disk_free"):
        monkeypatch.setattr(plan, name, refuse)
    monkeypatch.setattr(memory, "available_bytes", refuse)
    one = samples.experiment()
    made = planned(one, root, speed=None, workers=64, assumed=MACHINES)
    assert (made.assumed, made.json()["assumed"]) == ("moon", "moon")
    assert (made.driver_limit, made.disk_free) == (10**12, 10**15)
    cost = one.kernel_object.cost(16, 16, (5,), 8)
    seconds = (cost.operations / 1e13 + cost.transcendentals / 1e11) / 16**2
    entries = sum(m.missing_entries for m in made.matrices)
    assert made.gram_seconds == pytest.approx(entries * seconds / 64)


def test_millions_of_samples_are_planned_without_walking_through_their_tiles(
    samples: small.Samples, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects n = 5,000,000: tiles are counted by blocks of samples, and no set of them is made."""
    monkeypatch.setattr(
        matrices, "_tiles", lambda mask: (_ for _ in ()).throw(AssertionError("tiles were listed"))
    )
    for solve in ({"method": "conjugate-gradient"}, {"method": "tiled-cholesky"}, {}):
        made = planned(samples.experiment(solve=solve), root)
        made.check()
        assert made.json()["fits"]


@pytest.mark.parametrize(
    ("labels", "task", "said"),
    [
        (lambda y: 0 * y, "classification", "one class"),
        (lambda y: np.where(np.arange(len(y)) == 3, np.nan, y), "regression", "NaN or infinite"),
        (lambda y: np.array([f"class {k}" for k in range(len(y))]), None, "fewer than 72 classes"),
    ],
    ids=["one class", "NaN", "fewer samples than classes"],
)
def test_targets_that_cannot_be_trained_on_are_refused_before_any_work(
    samples: small.Samples, root: Path, labels: Any, task: str | None, said: str
) -> None:
    """Protects hours of tiles from an error at their end."""
    np.save(samples.folder / "y.npy", labels(np.load(samples.folder / "y.npy")))
    with pytest.raises(DataError, match=said):
        planned(samples.experiment(task=task), root)
    assert not root.exists()


def test_more_centres_than_samples_are_refused_before_any_work(samples: small.Samples, root: Path) -> None:
    with pytest.raises(ExperimentError, match=r"solve\.centres = 41 are more than the 40 training samples"):
        planned(samples.experiment(solve={"method": "nystrom", "centres": 41}), root)


def test_more_workers_and_faster_machines_take_less_time(samples: small.Samples, root: Path) -> None:
    """Protects the estimate's direction."""
    one = samples.experiment()
    slow = planned(one, root, workers=1)
    assert planned(one, root, workers=4).gram_seconds == pytest.approx(slow.gram_seconds / 4)
    fast = replace(SPEED, operations=10 * SPEED.operations, read=10 * SPEED.read)
    assert planned(one, root, speed=fast).solve_seconds == pytest.approx(slow.solve_seconds / 10)


def test_the_json_of_a_plan_agrees_with_it(samples: small.Samples, root: Path) -> None:
    """Protects ``plan --json``."""
    one = samples.experiment(kernel=NTK)
    small.make(samples.experiment(kernel=NTK, data={"train": 16}), root)
    made = planned(one, root).json()
    assert made["tiles"]["train"] == {"needed": 12, "present": 3, "missing": 9, "side": 16, "outputs": 2}
    assert made["tiles_missing"] == 9
    assert made["fits"]
    assert made["problems"] == []
