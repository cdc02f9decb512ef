"""A run with the exact kernel: blocks are prepared, a Gram matrix is computed in tiles, and solved with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import features, fit, gram, matrices, modelfiles, plan, results
from pipelines.recomputed import RecomputedTiles
from pipelines.stores import GramStore

from .work import Work


class MatrixWork(Work):
    """One run of an experiment without ``[features]``."""

    planned = staticmethod(plan.make)
    plan: plan.Plan

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kernel = matrices.run_kernel(self.experiment)
        self._reports: dict[str, gram.GramReport] = {}

    def make_plan(self) -> dict[str, Any]:
        """Count the tiles that are missing, and refuse what cannot fit."""
        expected = super().make_plan()
        if self.plan.recomputed:  # nothing is stored that another kernel's tiles could come along with
            self.kernel = self.experiment.kernel_object
        if self.plan.tiles_missing or self.plan.recomputed:
            self.cluster.say_path(self.plan.path, self.plan.path_remark)
        return {"tiles_missing": self.plan.tiles_missing, **expected}

    @property
    def computing(self) -> tuple[tuple[str, Callable[[], dict[str, Any]]], ...]:
        return (*super().computing, ("gram", self.make_gram))

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

    @property
    def _requested(self) -> int:
        """Which output of the kernel is the experiment's own."""
        own = self.experiment.kernel_object.fingerprint
        return [output.fingerprint for output in self.kernel.outputs].index(own)

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

    def _identity(self) -> dict[str, Any]:
        return {"matrices": [fit.matrix_identity(source) for source in self._sources()]}

    def _fit(self, place: fit.Place) -> dict[str, Any]:
        own, *cross = self._sources()
        return fit.fit(
            self.experiment,
            self.pools,
            own,
            cross[0] if cross else None,
            self._folder,
            choice=self.plan.choice,
            place=place,
            progress=self._progress,
        )

    def _save_model(self) -> None:
        modelfiles.save(
            self._folder,
            pools=self.pools,
            kernel=self.experiment.kernel_object,
            dtype=self.dtype,
            features_path=self._features["train"],
            ridge=self.evaluation["ridge"],
            checksums=self.evaluation["checksums"],
            root=self.root,
        )

    def _chunks(self) -> Iterator[Callable[[], object]]:
        yield from super()._chunks()
        for role, tiles in (self._needed if hasattr(self, "_needed") else {}).items():
            store = self._stores[role][self._requested]
            yield from (partial(store.read_tile, *tile) for tile in sorted(tiles))

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

    def _facts(self) -> dict[str, Any]:
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
        made_of = {
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
        return {"gram": made_of}


def _role(role: str, store: GramStore) -> str:
    """What a store holds of a run that fills several: the role and the family."""
    kernel = store.description["kernel"]
    return f"{role}, {kernel.get('family') or ('ntk' if kernel.get('tangent') else 'rf')}"
