"""A run with explicit features: a map learns, features are computed or streamed, and a primal system is solved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import features, fit, modelfiles
from pipelines.explicit import feature_fit, feature_plan, mapfiles, maps
from pipelines.explicit.featuresource import FeatureSource, StoredFeatures, stream
from pipelines.features import prepared_description
from pipelines.stores import FeatureStore
from pipelines.tiles import as_ranges

from .work import Work


@dataclass
class _Computed:
    """Blocks of features that the stage computed and found in the store at ``path``; None where none is stored."""

    role: str
    path: Path | None
    computed: int = 0
    reused: int = 0


class FeatureWork(Work):
    """One run of an experiment with ``[features]``."""

    planned = staticmethod(feature_plan.make)
    plan: feature_plan.FeaturePlan

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._made: dict[str, _Computed] = {}

    def make_plan(self) -> dict[str, Any]:
        """Count the features that are missing, and refuse what cannot fit."""
        expected = super().make_plan()
        return {"width": self.plan.width, "blocks_missing": self.plan.blocks_missing, **expected}

    def make_features(self) -> dict[str, Any]:
        """Learn the map, then compute the features that are missing, unless they are computed when they are read."""
        unlearned = self.experiment.feature_map
        assert unlearned is not None
        self.map, self._learned = maps.learned(
            self.pools,
            unlearned,
            self.dtype,
            self.root,
            self.pools.split.train,
            self.cluster.workers,
            progress=self._progress,
            use=self._use,
        )
        split = self.pools.split
        self._sources = {"train": self._source("train", split.pool_rows)}
        if self._has_cross:
            assert split.test is not None
            self._sources["test"] = self._source("test", split.test)
        self._note_stores()
        if self.plan.streamed:
            return {"width": self.plan.width, "note": "features are computed whenever they are read"}
        return {"blocks_computed": self._count("computed"), "blocks_reused": self._count("reused")}

    def _source(self, role: str, rows: np.ndarray) -> FeatureSource:
        """The features of the pool's samples or of the test set's, those of ``rows`` ready to be read."""
        arguments = (self.pools, self.map, self.dtype, self.root, rows, self.cluster.workers)
        options: dict[str, Any] = {
            "learned": self._learned,
            "test": role == "test",
            "progress": self._progress,
            "use": self._use,
        }
        if self.plan.streamed:
            self._made[role] = _Computed(role, None)
            return stream(*arguments, **options)
        report = features.materialise(*arguments, **options)
        before = self._made.get(role)
        computed = report.computed + (before.computed if before else 0)
        # A stage that was repeated to mend finds its own blocks.
        found = report.computed + report.reused - computed
        self._made[role] = _Computed(role, Path(report.store), computed, max(found, 0))
        return StoredFeatures.of(Path(report.store))

    def _note_stores(self) -> None:
        """Note in the journal which blocks of features the run rests on."""
        entries = []
        for role, one in self._made.items():
            rows = self.pools.split.test if role == "test" else self.pools.split.pool_rows
            if one.path is not None and rows is not None:
                blocks = np.unique(rows // FeatureStore(one.path).side).tolist()
                ranges = [list(run) for run in as_ranges(blocks)]
                entries.append({"role": role, "path": str(one.path), "blocks": ranges})
        self.journal.stores(entries)

    def _count(self, what: str) -> int:
        return sum(getattr(one, what) for one in self._made.values())

    def _identity(self) -> dict[str, Any]:
        # Stored or streamed, the features are the same.
        axes = [self.pools.pool_axis, *([self.pools.test_axis] if self._has_cross else [])]
        return {
            "features": [
                prepared_description(self.pools, self.map, self.dtype, test=test)
                for test in (False, True)[: len(axes)]
            ],
            "axes": [axis.json() for axis in axes],
            "primal": feature_fit.REVISION,
        }

    def _fit(self, place: fit.Place) -> dict[str, Any]:
        return feature_fit.fit(
            self.experiment,
            self.pools,
            self._sources["train"],
            self._sources.get("test"),
            self._folder,
            choice=self.plan.choice,
            place=place,
            progress=self._progress,
        )

    def _save_model(self) -> None:
        modelfiles.save(
            self._folder,
            pools=self.pools,
            kernel=self.map,
            dtype=self.dtype,
            features_path=None,
            ridge=self.evaluation["ridge"],
            checksums=self.evaluation["checksums"],
            root=self.root,
        )

    def _learned_facts(self) -> dict[str, Any] | None:
        """What names what the map learned, where it lies, and from what it was learned."""
        if self._learned is None:
            return None
        facts = mapfiles.describe(self._learned)["facts"]
        return {"digest": self.map.learned, "path": str(self._learned), **facts}

    def _facts(self) -> dict[str, Any]:
        stored = [one for one in self._made.values() if one.path is not None]
        return {
            "gram": None,
            "features": {
                "map": {"description": self.map.describe(), "fingerprint": self.map.fingerprint},
                "learned": self._learned_facts(),
                "width": self.plan.width,
                "dtype": self.dtype,
                "blocks": "streamed" if self.plan.streamed else "stored",
                "blocks_reason": self.plan.blocks_reason,
                "block_rows": self.plan.side,
                "blocks_computed": self._count("computed"),
                "blocks_reused": self._count("reused"),
                "stores": [
                    {
                        "role": one.role,
                        "address": one.path.name,
                        "path": str(one.path),
                        "computed": one.computed,
                        "reused": one.reused,
                    }
                    for one in stored
                    if one.path is not None
                ],
                "bytes": sum(FeatureStore(one.path).size() for one in stored if one.path is not None),
                "path": self.plan.path,
                "planned": {
                    "worker_peak_bytes": self.plan.worker.total,
                    "seconds": self.plan.seconds,
                    "learning_seconds": self.plan.learning_seconds,
                    "feature_seconds": self.plan.feature_seconds,
                },
            },
        }
