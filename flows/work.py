"""The stages of a run, as methods of one object that holds what they share; a flow calls them in order."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from cluster.errors import ProfileError
from cluster.local import open_cluster
from cluster.preflight import preflight
from cluster.profiles import KERNEL_PATH_VARIABLE, Profile, Resources
from cluster.watchdog import Watchdog, explain
from cluster.worker import describe_worker, kernel_path_set
from kernels.base import digest
from pipelines import (
    features,
    fit,
    gram,
    inventory,
    leases,
    matrices,
    memory,
    model,
    plan,
    pools,
    provenance,
    report,
    results,
    tasks,
)
from pipelines.errors import ChunkLost, MegagramError
from pipelines.experiment import Experiment
from pipelines.fit import hash_array
from pipelines.recomputed import RecomputedTiles
from pipelines.solvers import tiled_factor
from pipelines.solvers.base import Status
from pipelines.stores import FeatureStore, GramStore

T = TypeVar("T")


class Display(Protocol):
    """Where a person sees what happens."""

    def stage(self, experiment: str, name: str) -> None: ...

    def progress(self, done: int, total: int, message: str) -> None: ...

    def line(self, text: str) -> None: ...


class Cluster:
    """A cluster that starts when the first task needs it, and is shared by all runs of a study.

    A context manager, within which this process, too, computes by the profile's kernel path.
    """

    def __init__(self, profile: Profile, root: Path, say: Callable[[str], None]) -> None:
        self.profile = profile
        self.worker: dict[str, Any] = {}
        self._root = root
        self._say = say
        self._said: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._told = contextlib.ExitStack()
        if profile.assume is not None:
            raise ProfileError(
                f"profile {profile.name} assumes machines that are not there: it serves megagram plan alone;"
                " take another --cluster"
            )
        self._workers: tasks.Workers | None = None

    def say_path(self, path: str, remark: str) -> None:
        """Say which code computes the tiles, and why none quicker does: once each, in however many runs."""
        for text in (f"tiles are computed by {path}", remark):
            if text and text not in self._said:
                self._said.add(text)
                self._say(text)

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)`` on a machine like those of the workers: on this one, or on one of theirs."""
        if self.profile.kind == "address":
            return tasks.ask(self.workers(), function, *arguments)
        return function(*arguments)

    @cached_property
    def resources(self) -> Resources:
        """Workers and memory of each: of the profile, or of the running cluster that it names."""
        return self._found() if self.profile.kind == "address" else self.profile.resources()

    def _found(self) -> Resources:
        workers = self.workers().client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
        gpus = tuple(str(k) for k, worker in enumerate(workers) if worker["resources"].get("GPU"))
        return Resources(len(workers), min(limits, default=memory.available_bytes()), gpus)

    def workers(self) -> tasks.Workers:
        """Where tasks run; opened when it is not open."""
        if self._workers is not None:
            return self._workers
        client = self._stack.enter_context(open_cluster(self.profile))
        preflight(client, self._root)
        if client is None:
            self.worker = describe_worker()
            self._workers = tasks.Workers()
            return self._workers
        if self.profile.dashboard:
            self._say(f"Dask's pages are at {client.dashboard_link}")
        self.worker = next(iter(client.run(describe_worker).values()))
        expected = len(client.scheduler_info(n_workers=-1)["workers"])
        watchdog = Watchdog(client, expected, self.profile.worker_timeout, self._say)
        info = client.scheduler_info(n_workers=-1)["workers"].values()
        gpus = sum(1 for worker in info if worker["resources"].get("GPU"))
        needs = {"GPU": 1.0} if gpus else None
        told = told_path(self.profile)
        self._workers = tasks.Workers(client, gpus or len(info), needs, watchdog.check, told)
        return self._workers

    def rest(self) -> None:
        """Have idle workers give back the memory of what they kept."""
        if self._workers is not None and self._workers.client is not None:
            self._workers.client.run(_forget)
        _forget()

    def close(self) -> None:
        self._workers = None
        self._stack.close()

    def __enter__(self) -> Cluster:
        self._told.enter_context(kernel_path_set(self.profile))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._told.close()


def _forget() -> None:
    """Give back the memory of kept blocks and tiles of factors; runs on workers."""
    tiled_factor.release()
    gram.forget()


def told_path(profile: Profile) -> str:
    """What workers are told to take for convolutional kernels; empty leaves it to the environment in which they were
    started: a profile's "auto" is no wish, that of this process's environment is one."""
    path = profile.kernel_path
    return "" if path == "auto" and KERNEL_PATH_VARIABLE not in os.environ else path


class Work:
    """One run of one experiment.

    experiment: validated. root: folder of the stores. cluster: where tiles are computed.
    command: what a person types to run it again. engine: says which engine runs the stages, as far as is
    known when it is asked.
    """

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
        self.kernel = matrices.run_kernel(experiment)
        self._reports: dict[str, gram.GramReport] = {}
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
        self.plan = plan.make(
            self.experiment,
            self.pools,
            self.root,
            workers=resources.workers,
            worker_bytes=resources.memory,
            on_devices=bool(resources.gpus),
            ask=self.cluster.ask,
        )
        self.plan.check()
        if self.plan.recomputed:
            self.kernel = (
                self.experiment.kernel_object
            )  # nothing is stored that another could come along with
        if self.plan.tiles_missing or self.plan.recomputed:
            self.cluster.say_path(self.plan.path, self.plan.path_remark)
        return {"tiles_missing": self.plan.tiles_missing, "expected_seconds": round(self.plan.seconds, 1)}

    def make_features(self) -> dict[str, Any]:
        """Preprocess and prepare every block of samples that a tile needs."""
        split = self.pools.split
        made = features.materialise(
            self.pools,
            self.kernel,
            self.dtype,
            self.root,
            split.pool_rows,
            self.cluster.workers,
            progress=self._progress,
            use=self._use,
        )
        self._features = {"train": Path(made.store)}
        computed, reused = made.computed, made.reused
        if self._has_cross:
            assert split.test is not None
            made = features.materialise(
                self.pools,
                self.kernel,
                self.dtype,
                self.root,
                split.test,
                self.cluster.workers,
                test=True,
                progress=self._progress,
                use=self._use,
            )
            self._features["test"] = Path(made.store)
            computed, reused = computed + made.computed, reused + made.reused
        return {"blocks_computed": computed, "blocks_reused": reused}

    def make_gram(self) -> dict[str, Any]:
        """Compute the tiles that are missing, unless they are computed whenever they are needed."""
        if self.plan.recomputed:
            self._stores, self._needed = {}, {}
            return {"tiles_computed": 0, "note": "tiles are computed whenever they are needed"}
        planned = matrices.matrix_plans(self.experiment, self.pools, self.kernel, self.root)
        self._stores = {
            m.role: gram.open_stores(self.pools, self.kernel, self.dtype, self.root, test=m.role == "test")
            for m in planned
        }
        self._needed = {m.role: m.needed for m in planned}
        for stores in self._stores.values():
            for store in stores:
                self._use(store.path)
        self.journal.stores(
            [
                {
                    "role": m.role if len(self._stores[m.role]) == 1 else _role(m.role, store),
                    "path": str(store.path),
                    "needed": results.by_row(m.needed),
                }
                for m in planned
                for store in self._stores[m.role]
            ]
        )
        missing = self.plan.tiles_missing
        tile_seconds = self.plan.gram_seconds * self.plan.workers / missing if missing else 1.0
        for matrix in planned:
            reports = gram.assemble(
                self.kernel,
                self._stores[matrix.role],
                self._features[matrix.role],
                self._features["train"],
                matrix.needed,
                self.cluster.workers,
                tile_seconds=tile_seconds,
                memory_bytes=self.cluster.resources.memory,
                requested=self._requested,
                progress=self._progress,
            )
            self._add(matrix.role, reports[self._requested])
        return {"tiles_computed": self.tiles_computed, "tiles_reused": self.tiles_reused}

    def solve(self) -> dict[str, Any]:
        """Solve for every ridge, choose one, score the test set once; or find that this was done before."""
        self.cluster.rest()
        self._results = results.ResultStore(self.root, self.experiment.name, self._result_address())
        self._folder = self._results.begin(self.run)
        self.evaluation = self._found_before() or self._fitted()
        solved = self.evaluation["solved_by"]
        self._solve_note = solved["reason"] if solved["run"] == self.run else f"solved by run {solved['run']}"
        return {"ridge": self.evaluation["ridge"], "note": self._solve_note}

    def make_report(self) -> dict[str, Any]:
        """Write the result and the report, and publish them under the run's id."""
        final = self._results.folder / self.run
        result = {**self._result(), "folder": str(final)}
        model.save(
            self._folder,
            pools=self.pools,
            kernel=self.experiment.kernel_object,
            dtype=self.dtype,
            features_path=self._features["train"],
            ridge=self.evaluation["ridge"],
            root=self.root,
        )
        report.build(result, self._folder)
        self._results.commit(self.run, result)
        if all(entry["status"] != Status.NOT_CONVERGED for entry in self.evaluation["path"]):
            inventory.remove_solves(self.root, self._solves)
        self.journal.finish("done", report=str(final / "report.html"), result=str(final))
        self.result = result
        self.folder = final
        return {"report": str(final / "report.html")}

    # What the stages share.

    @property
    def dtype(self) -> str:
        return self.experiment.gram.dtype

    @property
    def store(self) -> GramStore:
        """The matrix over the pool that the experiment's own kernel fills."""
        return self._stores["train"][self._requested]

    @property
    def tiles_computed(self) -> int:
        return sum(r.computed for r in self._reports.values())

    @property
    def tiles_reused(self) -> int:
        return sum(r.reused + r.by_others for r in self._reports.values())

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
        blocks = [FeatureStore(path) for path in self._used if path.parent.name == FeatureStore.kind]
        todo: list[Callable[[], object]] = [
            partial(store.read_block, k) for store in blocks for k in range(store.block_count) if store.has(k)
        ]
        todo += [
            partial(self._stores[role][self._requested].read_tile, *tile)
            for role, tiles in (self._needed if hasattr(self, "_needed") else {}).items()
            for tile in sorted(tiles)
        ]
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
        # What went wrong is the error in flight; a disk too full to note it must not take its place.
        with contextlib.suppress(MegagramError, OSError):
            self.journal.finish("failed", error=str(error) or type(error).__name__)

    def close(self) -> None:
        """Give back the leases."""
        self._leases.close()

    @property
    def _has_cross(self) -> bool:
        return self.pools.split.test is not None and not self.pools.split.test_in_pool

    @property
    def _requested(self) -> int:
        """Which output of the kernel is the experiment's own."""
        own = self.experiment.kernel_object.fingerprint
        return [output.fingerprint for output in self.kernel.outputs].index(own)

    def _progress(self, done: int, total: int, message: str) -> None:
        self.display.progress(done, total, message)
        self.journal.progress(done, total, message)
        self.on_progress(done, total, message)

    def _add(self, role: str, made: gram.GramReport) -> None:
        """Add a report to the role's: a stage that was repeated to mend a store computed a few more tiles."""
        before = self._reports.get(role)
        if before is not None:
            made.computed += before.computed
            made.by_others += before.by_others
            made.reused = max(made.needed - made.computed - made.by_others, 0)
            made.tile_seconds = before.tile_seconds + made.tile_seconds
            made.seconds += before.seconds
        self._reports[role] = made

    def _result_address(self) -> str:
        """Digest of all that the numbers depend on."""
        data = self.pools
        pooled = data.split.pool_rows
        labels = [hash_array(data.y(pooled))]
        if self._has_cross and data.split.test is not None:
            labels.append(hash_array(data.y(data.split.test, test=True)))
        return digest(
            {
                "matrices": [fit.matrix_identity(source) for source in self._sources()],
                "split": _digests(data.sets),
                "labels": labels,
                "task": data.task,
                "solve": self.experiment.solve.model_dump(mode="json"),
                "revision": fit.REVISION,
            }
        )

    def _fitted(self) -> dict[str, Any]:
        own, *cross = self._sources()
        place = fit.Place(self.root, self.cluster.workers, self.cluster.resources.memory, self._use_solve)
        evaluation = fit.fit(
            self.experiment,
            self.pools,
            own,
            cross[0] if cross else None,
            self._folder,
            choice=self.plan.choice,
            place=place,
            progress=self._progress,
        )
        solved_by = {"run": self.run, "reason": self.plan.reason, "made_with": provenance.arithmetic()}
        return {**evaluation, "solved_by": solved_by}

    def _found_before(self) -> dict[str, Any] | None:
        """The evaluation of an earlier run of the same address, its arrays linked; None where there is
        none, or it is damaged."""
        before = self._results.latest()
        if before is None:
            return None
        try:
            evaluation = results.read(before)["evaluation"]
            for path in before.glob("*.npy"):
                np.load(path, mmap_mode="r", allow_pickle=False)
                results.link(path, self._folder / path.name)
        except (OSError, ValueError, KeyError, EOFError, MegagramError) as error:
            self.display.line(f"warning: the result of run {before.name} is not used again: {error}")
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

    def _sources(self) -> list[GramStore | RecomputedTiles]:
        """The matrix over the pool, and that of a test set against it: the experiment's own, of several outputs."""
        if not self.plan.recomputed:
            return [stores[self._requested] for stores in self._stores.values()]
        kernel, memory_bytes = self.experiment.kernel_object, self.cluster.resources.memory
        columns = self._features["train"]
        return [
            RecomputedTiles.of(kernel, rows, columns, self.dtype, memory_bytes)
            for rows in self._features.values()
        ]

    def _own_stores(self) -> list[GramStore]:
        return [stores[self._requested] for stores in self._stores.values()]

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
                "tiles": self.plan.choice.estimate.tiles,
                "planned": {"seconds": self.plan.solve_seconds, "driver_bytes": self.plan.solve_bytes},
            },
            "gram": self._gram_facts(),
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

    def _gram_facts(self) -> dict[str, Any]:
        made = [
            line
            for role, store in zip(self._stores, self._own_stores(), strict=True)
            for line in gram.made_by(store, self._needed[role])
        ]
        paths = dict(Counter(line["path"] for line in made))
        made_with = dict(Counter(line["made_with"] for line in made))
        seconds = [s for r in self._reports.values() for s in r.tile_seconds]
        if len(seconds) > 2000:
            seconds = sorted(seconds)[:: len(seconds) // 2000 + 1]
        facts = [
            {
                "role": role,
                "address": Path(made.store).name,
                "path": made.store,
                "tiles_needed": made.needed,
                "tiles_computed": made.computed,
                "tiles_reused": made.reused + made.by_others,
            }
            for role, made in self._reports.items()
        ]
        return {
            "dtype": self.dtype,
            "tile_side": self.kernel.tile_side(self.dtype),
            "recomputed": self.plan.path if self.plan.recomputed else None,
            "stores": facts,
            "tiles_computed": self.tiles_computed,
            "tiles_reused": self.tiles_reused,
            "paths": paths,
            "made_with": made_with,
            "tile_seconds": seconds,
            "bytes": sum(store.size() for store in self._own_stores()),
            "peak_bytes": max((r.peak_bytes for r in self._reports.values()), default=0),
            "planned": {"worker_peak_bytes": self.plan.worker.total, "seconds": self.plan.seconds},
        }


def to_toml(table: dict[str, Any]) -> str:
    """An experiment's plain values as TOML text."""
    values = [f"{key} = {_toml_value(v)}" for key, v in table.items() if not isinstance(v, dict)]
    for key, inner in table.items():
        if isinstance(inner, dict):
            values += ["", f"[{key}]", *(f"{k} = {_toml_value(v)}" for k, v in inner.items())]
    return "\n".join(values) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else f'"{key}"'


def _role(role: str, store: GramStore) -> str:
    """What a store holds of a run that fills several: the role and the family."""
    kernel = store.description["kernel"]
    return f"{role}, {kernel.get('family') or ('ntk' if kernel.get('tangent') else 'rf')}"


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
