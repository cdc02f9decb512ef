"""The first stage: every block that a run needs, preprocessed and prepared once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import small

from kernels.registry import from_description
from pipelines import features, leases, pools, preprocessing, stores, tasks
from pipelines import samples as pipeline_samples
from pipelines.errors import ChunkLost, DiskFull, NumericalError
from pipelines.stores import FeatureStore


def materialise(samples: small.Samples, root: Path, rows: np.ndarray | None = None, **data: object) -> tuple:
    """(report, pools, kernel) of the stage over an experiment's rows."""
    one = samples.experiment(data=data)
    resolved, kernel = pools.resolve(one), one.kernel_object
    rows = resolved.split.pool_rows if rows is None else rows
    report = features.materialise(resolved, kernel, one.gram.dtype, root, rows, tasks.Workers)
    return report, resolved, kernel


@pytest.mark.parametrize("preprocess", [[], ["standardise"], ["zca"], ["normalise", "standardise"]])
def test_blocks_are_prepared_samples(
    samples: small.Samples, root: Path, tiles_of_16: int, preprocess: list[str]
) -> None:
    """Protects the stage's result: what the kernel would prepare from all samples at once, row ids included."""
    report, resolved, kernel = materialise(samples, root, preprocess=preprocess)
    steps = resolved.preprocessing
    X = resolved.train.X
    state = steps.fit(lambda start, stop: X[start:stop]) if steps.fitted else {}
    whole = kernel.prepare(steps.apply(X, state, np.dtype("float64")))
    store = FeatureStore(Path(report.store))
    for block in range(store.block_count):
        made = store.read_block(block)
        for name, values in made.arrays.items():
            np.testing.assert_allclose(values, whole.arrays[name][made.rows], rtol=1e-12, atol=1e-12)


def test_only_blocks_with_needed_rows_are_made_and_only_once(
    samples: small.Samples, root: Path, tiles_of_16: int
) -> None:
    """Protects small runs over large pools, and runs that are repeated."""
    first, _, _ = materialise(samples, root, np.array([17, 40]))
    assert (first.computed, first.reused) == (2, 0)
    store = FeatureStore(Path(first.store))
    assert [block for block in range(5) if store.has(block)] == [1, 2]
    again, _, _ = materialise(samples, root, np.arange(72))
    assert (again.computed, again.reused) == (3, 2)
    assert again.store == first.store


def test_expensive_steps_are_stored_once_for_all_kernels(
    samples: small.Samples, root: Path, tiles_of_16: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects whitening: another kernel over the same pool finds the whitened samples."""
    applied: list[int] = []
    apply = preprocessing.Preprocessing.apply

    def counted(self: object, X: np.ndarray, *rest: object) -> np.ndarray:
        applied.append(len(X))
        return apply(self, X, *rest)

    monkeypatch.setattr(preprocessing.Preprocessing, "apply", counted)
    sections = {"data": {"preprocess": ["zca"]}}
    small.make(samples.experiment(**sections), root)
    assert sum(n for n in applied if n > 1) == 72
    applied.clear()
    other = {"kind": "fully-connected", "family": "rf", "floor": 1e-3}
    made = small.make(samples.experiment(kernel=other, **sections), root)
    assert made.features[0].computed == 5
    assert [n for n in applied if n > 1] == []


def test_kernels_that_prepare_alike_share_blocks(
    samples: small.Samples, root: Path, tiles_of_16: int
) -> None:
    """Protects disk and time: dot-product kernels normalise alike, whatever their function is."""
    one = small.make(samples.experiment(), root).features[0]
    other = small.make(samples.experiment(kernel={"kind": "dot-product", "kernel": "linear"}), root).features[
        0
    ]
    assert other.store == one.store
    assert other.computed == 0


@pytest.mark.parametrize("which", ["pool", "preprocessed", "prepared"])
def test_a_damaged_block_is_made_again(
    samples: small.Samples, root: Path, tiles_of_16: int, which: str
) -> None:
    """Protects every store on the way: damage is found when it is read, the stage repeated mends it."""
    report, _, _ = materialise(samples, root, preprocess=["zca"])
    prepared = Path(report.store)
    raw = next((root / "pools").iterdir())
    whitened = next(p for p in (root / "features").iterdir() if p != prepared)
    broken = {"pool": raw, "preprocessed": whitened, "prepared": prepared}[which]
    for path in {"pool": [whitened, prepared], "preprocessed": [prepared], "prepared": []}[which]:
        for file in path.glob("*/c/**/*"):
            file.unlink() if file.is_file() else None
    for file in broken.glob("*/c/**/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])

    def read_all() -> None:
        made, _, _ = materialise(samples, root, preprocess=["zca"])
        for block in range(5):
            FeatureStore(Path(made.store)).read_block(block)

    for _ in range(sum(file.is_file() for file in broken.glob("*/c/**/*"))):  # a turn finds one damaged chunk
        with pytest.raises(ChunkLost, match=str(broken)):
            read_all()
    read_all()


def test_a_damaged_fit_is_fitted_again(samples: small.Samples, root: Path, tiles_of_16: int) -> None:
    """Protects fitted steps: a file of means cut short is named and removed, the next try fits again."""
    materialise(samples, root, np.arange(16), preprocess=["standardise"])
    (file,) = (root / "preprocessing").glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    pipeline_samples.fitted.cache_clear()
    with pytest.raises(ChunkLost, match=str(file)):
        materialise(samples, root, preprocess=["standardise"])
    materialise(samples, root, preprocess=["standardise"])
    assert file.stat().st_size == len(whole)


def test_samples_that_overflow_are_named(samples: small.Samples, root: Path, tiles_of_16: int) -> None:
    """Protects kernels from infinities that preprocessing or a smaller dtype made of good data."""
    X, _ = samples.arrays(72)
    X[20] = 1e300
    np.save(samples.folder / "X.npy", X)
    one = samples.experiment(gram={"dtype": "float32"})
    resolved = pools.resolve(one)
    with pytest.raises(NumericalError, match="sample 20"):
        features.materialise(
            resolved, one.kernel_object, "float32", root, resolved.split.pool_rows, tasks.Workers
        )


def test_a_test_set_has_stores_of_its_own(samples: small.Samples, root: Path, tiles_of_16: int) -> None:
    """Protects test rows from standing in for pool rows of the same number."""
    small.Samples(samples.folder, seed=5).write(20, "_test")
    paths = {"X_test": str(samples.folder / "X_test.npy"), "y_test": str(samples.folder / "y_test.npy")}
    made = small.make(samples.experiment(data={**paths, "test": 20}), root)
    train, test = (FeatureStore(Path(report.store)) for report in made.features)
    assert (train.rows, test.rows) == (72, 20)
    assert train.pool_name != test.pool_name
    assert train.pool_name == FeatureStore(train.path).read_block(0).pool


def test_writers_hold_a_lease(
    samples: small.Samples, root: Path, tiles_of_16: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a stage from ``verify --repair`` beside it, which sweeps what no living process owns."""
    seen = []
    write = FeatureStore.write_block

    def watched(self: FeatureStore, *args: object) -> None:
        seen.append(len(leases.living(self.path)))
        write(self, *args)

    monkeypatch.setattr(FeatureStore, "write_block", watched)
    report, _, _ = materialise(samples, root)
    assert seen == [1] * 5
    assert leases.holders(Path(report.store)) == []


def test_a_full_disk_while_fitting_is_one_clear_error(
    samples: small.Samples, root: Path, tiles_of_16: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the fitted state's file: no half of it under its final name."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DiskFull):
        materialise(samples, root, preprocess=["standardise"])
    assert list((root / "preprocessing").iterdir()) == []


def test_jobs_are_small(samples: small.Samples, root: Path, tiles_of_16: int) -> None:
    """Protects the scheduler: what travels to a worker is paths, numbers and short texts."""
    report, resolved, kernel = materialise(samples, root)
    job = features.FeatureJob(
        pipeline_samples.Preprocessed("a" * 100, "float64"), report.store, features._json(kernel)
    )
    assert len(json.dumps(asdict(job))) < 2000
    assert from_description(json.loads(job.kernel or "")).fingerprint == kernel.fingerprint
    assert resolved.pool_axis.rows == 72
    assert stores.open_store(report.store).kind == "features"
