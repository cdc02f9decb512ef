"""What the runs of all experiments share: stages timed and journalled, stores held, results found again or made."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from cluster.watchdog import explain
from kernels.base import digest
from pipelines import begun, features, fit, inventory, leases, pools, provenance, results
from pipelines.errors import ChunkLost, MegagramError, NumericalError, StoreError
from pipelines.experiment import Experiment
from pipelines.experiment.toml import to_toml
from pipelines.fit import hash_array
from pipelines.plan_base import PlanBase
from pipelines.reports import report
from pipelines.stores import FeatureStore

from .machines import Cluster


class Display(Protocol):
    """Where a person sees what happens."""

    def stage(self, experiment: str, name: str) -> None: ...

    def progress(self, done: int, total: int, message: str) -> None: ...

    def line(self, text: str) -> None: ...


class Work(ABC):
    """One run of one experiment: its stages are methods, called in order by a flow.

    experiment: validated. root: folder of the stores. cluster: where tiles or features are computed.
    command: what a person types to run it again. engine: says which engine runs the stages, as far as is
    known when it is asked.
    """

    planned: ClassVar[Callable[..., PlanBase]]
    """Makes the plan: ``plan.make``, or that of features."""

    plan: PlanBase

    def __init__(
        self,
        experiment: Experiment,
        root: Path,
        cluster: Cluster,
        display: Display,
        *,
        command: str = "",
        engine: Callable[[], str] = str,
    ) -> None:
        self.experiment = experiment
        self.root = root
        self.cluster = cluster
        self.display = display
        self.command = command
        self.engine = engine
        self.run = results.new_run_id()
        self.started = time.time()
        self.stages: list[dict[str, Any]] = []
        self.journal = results.Journal(root, experiment.name, self.run)
        self.on_progress: Callable[[int, int, str], None] = features.silent
        self._used: list[Path] = []
        self._solves: list[Path] = []
        self._leases = contextlib.ExitStack()

    # Stages, in the order in which the flow calls them.

    def load(self) -> dict[str, Any]:
        """Load, check, order and split the data."""
        self.pools = pools.resolve(self.experiment)
        for warning in self.pools.warnings:
            self.display.line(f"warning: {warning}")
        return {"samples": len(self.pools.train.X), "train": len(self.pools.split.train)}

    def make_plan(self) -> dict[str, Any]:
        """Count what is missing, and refuse what cannot fit."""
        resources = self.cluster.resources
        self.plan = begun.planned(
            self.planned,
            self.experiment,
            self.pools,
            self.root,
            workers=resources.workers,
            worker_bytes=resources.memory,
            on_devices=bool(resources.gpus),
            ask=self.cluster.ask,
        )
        self.plan.check()
        self.journal.way({"experiment": begun.experiment_digest(self.experiment), **self.plan.way})
        return {"expected_seconds": round(self.plan.seconds, 1)}

    @property
    def computing(self) -> tuple[tuple[str, Callable[[], dict[str, Any]]], ...]:
        """The stages between the plan and the solve, by name."""
        return (("features", self.make_features),)

    @abstractmethod
    def make_features(self) -> dict[str, Any]:
        """Compute what is computed once for each sample."""

    def solve(self) -> dict[str, Any]:
        """Solve for every ridge, choose one, score the test set once; or find that this was done before."""
        self.cluster.rest()
        self._results = results.ResultStore(self.root, self.experiment.name, self._result_address())
        self._folder = self._results.begin(self.run)
        self.evaluation = self._found_before() or self._fitted()
        for note in self.evaluation["notes"]:
            self.display.line(f"warning: {note}")
        solved = self.evaluation["solved_by"]
        self._solve_note = solved["reason"] if solved["run"] == self.run else f"solved by run {solved['run']}"
        return {"ridge": self.evaluation["ridge"], "note": self._solve_note}

    def make_report(self) -> dict[str, Any]:
        """Write the result and the report, and publish them under the run's id."""
        final = self._results.folder / self.run
        result = {**self._result(), "folder": str(final)}
        self._save_model()
        report.build(result, self._folder)
        self._results.commit(self.run, result)
        self.journal.finish("done", report=str(final / "report.html"), result=str(final))
        # Of earlier starts as well: one may have been killed when another had the result.
        version = begun.experiment_digest(self.experiment)
        inventory.remove_solves(self.root, inventory.solves_of(self.root, self.experiment.name, version))
        self.result = result
        self.folder = final
        return {"report": str(final / "report.html")}

    # What differs between matrices and features.

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What names the numbers that a solve rests on, as JSON."""

    @abstractmethod
    def _fit(self, place: fit.Place) -> dict[str, Any]:
        """Solve for every ridge, choose one, score the test set; the evaluation."""

    @abstractmethod
    def _save_model(self) -> None:
        """Write what predictions need into the run's folder."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What the result says of what was computed before the solve."""

    def _chunks(self) -> Iterator[Callable[[], object]]:
        """Reads of all that the run needs and that may be damaged."""
        for path in self._used:
            if path.parent.name == FeatureStore.kind:
                store = FeatureStore(path)
                yield from (partial(store.read_block, k) for k in range(store.block_count) if store.has(k))

    # What the stages share.

    @property
    def dtype(self) -> str:
        return self.experiment.gram.dtype

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and tell the display and the journal of it."""
        self.display.stage(self.experiment.name, name)
        self.journal.stage(name)
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            explained = explain(error)
            if explained is None:
                raise
            # A cluster that was lost is of no use to the stage's next try: that one opens another.
            self.cluster.close()
            raise explained from error
        finally:
            self.stages.append({"name": name, "seconds": time.perf_counter() - started})
            with contextlib.suppress(MegagramError, OSError):
                self.journal.end_stage()

    def mend(self) -> int:
        """Read every tile and block that the run needs, so that all damaged ones are set aside at once.

        Returns how many are to be computed again.
        """
        lost = 0
        todo = list(self._chunks())
        for number, read in enumerate(todo):
            self._progress(number, len(todo), "chunks checked")
            try:
                read()
            except ChunkLost:
                lost += 1
        return lost

    def failed(self, error: BaseException) -> None:
        """Note in the journal how the run ended, and leave no half-made result."""
        if hasattr(self, "_folder"):
            results.discard(self._folder)
        if isinstance(error, NumericalError | MemoryError):  # the next start chooses anew
            with contextlib.suppress(MegagramError, OSError):
                self.journal.way({"experiment": begun.experiment_digest(self.experiment)})
        # What went wrong is the error in flight; a disk too full to note it must not take its place.
        with contextlib.suppress(MegagramError, OSError):
            self.journal.finish("failed", error=str(error) or type(error).__name__)

    def close(self) -> None:
        """Give back the leases."""
        self._leases.close()

    @property
    def _has_cross(self) -> bool:
        return self.pools.split.test is not None and not self.pools.split.test_in_pool

    def _progress(self, done: int, total: int, message: str) -> None:
        self.display.progress(done, total, message)
        self.journal.progress(done, total, message)
        self.on_progress(done, total, message)

    def _result_address(self) -> str:
        """Digest of all that the numbers depend on."""
        data = self.pools
        pooled = data.split.pool_rows
        labels = [hash_array(data.y(pooled))]
        if self._has_cross and data.split.test is not None:
            labels.append(hash_array(data.y(data.split.test, test=True)))
        return digest(
            {
                **self._identity(),
                "split": _digests(data.sets),
                "labels": labels,
                "task": data.task,
                "solve": self.experiment.solve.model_dump(mode="json"),
                # Centres, sketches and probes are drawn under it.
                "seed": self.experiment.seed,
                "revision": fit.REVISION,
            }
        )

    def _fitted(self) -> dict[str, Any]:
        place = fit.Place(self.root, self.cluster.workers, self.cluster.resources.memory, self._use_solve)
        evaluation = self._fit(place)
        solved_by = {"run": self.run, "reason": self.plan.reason, "made_with": provenance.arithmetic()}
        return {**evaluation, "solved_by": solved_by}

    def _found_before(self) -> dict[str, Any] | None:
        """The evaluation of an earlier run of the same address, its arrays linked; None where there is none, or it is
        damaged or of a version without checksums."""
        before = self._results.latest()
        if before is None:
            return None
        try:
            evaluation = results.read(before)["evaluation"]
            checksums = evaluation.get("checksums")
            if checksums is None:
                raise StoreError("it has no checksums of its arrays")
            for name, checksum in checksums.items():
                results.load_array(before, name, checksum)
            for name in checksums:  # only when all are known to be whole
                results.link(before / f"{name}.npy", self._folder / f"{name}.npy")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MegagramError) as error:
            self.display.line(
                f"warning: the result of run {before.name} is not used again, and the system is solved anew: {error}"
            )
            return None
        return evaluation

    def _use(self, path: Path) -> None:
        """Keep a store from being cleaned away or grown while this run, and its result, rest on it."""
        if path not in self._used:
            self._used.append(path)
            self._leases.enter_context(leases.Lease(path))
            self._note_uses()

    def _use_solve(self, folder: Path) -> None:
        """Keep what a solve goes on from while this run has not ended well."""
        self._solves.append(folder)
        self._note_uses()

    def _note_uses(self) -> None:
        self.journal.uses([str(used) for used in (*self._used, *self._solves)])

    def _result(self) -> dict[str, Any]:
        experiment, data = self.experiment, self.pools
        return {
            "megagram": provenance.version("megagram"),
            "experiment": experiment.name,
            "run": self.run,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": data.task,
            "experiment_table": experiment.table(),
            "experiment_toml": to_toml(experiment.table()),
            "evaluation": self.evaluation,
            "data": {
                "source": data.dataset.source,
                "identity": data.dataset.identity,
                "digest": digest(data.pool_axis.json()),
                "test_digest": digest(data.test_axis.json()) if self._has_cross else None,
                "order": "canonical"
                if experiment.data.permutation is None
                else f"permutation {experiment.data.permutation}",
                **{name: _extent(rows) for name, rows in data.sets.items()},
                "sets": _digests(data.sets),
                "test_of": data.test_of,
                "shape": list(data.raw_shape),
                "preprocess": data.preprocessing.describe(),
                "warnings": [*data.warnings, *self.evaluation["notes"]],
                "labels": None if data.train.labels is None else list(data.train.labels),
            },
            "kernel": {
                "description": experiment.kernel_object.describe(),
                "fingerprint": experiment.kernel_object.fingerprint,
            },
            "solver": {
                "method": self.plan.method,
                "reason": self._solve_note,
                "dtype": experiment.solve.dtype,
                "planned": {"seconds": self.plan.solve_seconds, "driver_bytes": self.plan.solve_bytes},
            },
            **self._facts(),
            "stages": self.stages,
            "seconds": time.time() - self.started,
            "engine": self.engine(),
            "cluster": {
                "profile": self.cluster.profile.name,
                "workers": self.cluster.resources.workers,
                "kernel_path": self.cluster.profile.kernel_path,
                "worker": self.cluster.worker,
            },
            "provenance": {**provenance.machine(), "command": self.command},
            "expected": None
            if experiment.expected is None
            else experiment.expected.model_dump(mode="json", exclude_none=True),
        }


def _digests(sets: Mapping[str, np.ndarray | None]) -> dict[str, str | None]:
    return {name: None if rows is None else hash_array(rows) for name, rows in sets.items()}


def _extent(rows: np.ndarray | None) -> list[int] | str | None:
    """[start, stop) of one range of rows, or in words that they are not one range."""
    if rows is None:
        return None
    first, last = int(rows[0]), int(rows[-1]) + 1
    return (
        [first, last]
        if last - first == len(rows)
        else f"{len(rows):,} rows between {first:,} and {last - 1:,}"
    )
