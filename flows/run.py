"""Running a study: each of its experiments through the flow, on one cluster, then the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.profiles import Profile
from pipelines import results
from pipelines.experiment import Experiment, Study
from pipelines.matrices import run_kernel
from pipelines.reports import report
from pipelines.reports.verdict import final_solve, verdict

from .engine import open_engine, run_flow
from .feature_work import FeatureWork
from .krr import krr
from .machines import Cluster
from .matrix_work import MatrixWork
from .work import Display, Work

NamedTable = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Title, header and rows, for a terminal."""


@dataclass(frozen=True)
class Outcome:
    """What a run of a study came to. missed: a table's figure lies outside its tolerance."""

    title: str
    tables: tuple[NamedTable, ...]
    report: Path
    results: tuple[dict[str, Any], ...]
    missed: bool

    def json(self) -> dict[str, Any]:
        """One JSON object: of the experiment, or of the table with one such object for each variant."""
        each = [facts(result) for result in self.results]
        if len(each) == 1 and not self.title:
            return {**each[0], "report": str(self.report)}
        return {"study": self.title, "report": str(self.report), "passed": not self.missed, "variants": each}


def run_study(study: Study, root: Path, profile: str, display: Display, *, command: str = "") -> Outcome:
    """Run every experiment of a study and write its report.

    root: folder of the stores, made when absent. profile: of the cluster, by name or path.
    """
    root = root.resolve()
    engine = open_engine()
    # Folder and result of each; its data go with the run.
    done: dict[str, tuple[Path, dict[str, Any]]] = {}
    with Cluster(Profile.load(profile), root, display.line) as cluster:
        display.line(engine.name)
        # Kernels that bring another one along come first: an NTK's pass leaves nothing to do for the RF.
        for experiment in sorted(study.experiments, key=_outputs, reverse=True):
            kind: type[Work] = MatrixWork if experiment.features is None else FeatureWork
            work = kind(experiment, root, cluster, display, command=command, engine=lambda: engine.name)
            run_flow("krr", krr, work, engine=engine, run_name=f"{experiment.name} {work.run}")
            done[experiment.name] = work.folder, work.result
    if not study.is_table:
        ((folder, result),) = done.values()
        header, rows = report.terminal_table(result)
        return Outcome("", (("", header, rows),), folder / "report.html", (result,), False)
    return _table(study, root, [(e.label, *done[e.name]) for e in study.experiments])


def _outputs(experiment: Experiment) -> int:
    """How many matrices a run of an experiment fills at once."""
    return 0 if experiment.features is not None else len(run_kernel(experiment).outputs)


def rebuild_reports(study: Study, root: Path) -> list[Path]:
    """Build the newest run's report again, of each experiment and of the table.

    Raises:
        StoreError: an experiment has no result yet.
    """
    root = root.resolve()
    made: list[Path] = []
    entries = []
    for experiment in study.experiments:
        folder, result = results.newest(root, experiment.name, experiment.table())
        made.append(report.build(result, folder))
        entries.append((experiment.label, folder, result))
    return [_table(study, root, entries).report, *made] if study.is_table else made


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """The few facts of a result that scripts ask for; accuracies in percent, else error measures."""
    evaluation = result["evaluation"]

    def score(part: str) -> Any:
        metrics = evaluation.get(part)
        return None if metrics is None else metrics.get("accuracy", metrics)

    return {
        "experiment": result["experiment"],
        "test_accuracy": score("test"),
        "validation_accuracy": score("validation"),
        "loo_accuracy": score("loo"),
        "gcv_accuracy": score("gcv"),
        "select": evaluation["select"],
        "ridge": evaluation["ridge"],
        "status": final_solve(result)["status"],
        "residual": final_solve(result)["residual"],
        **(_tile_facts(result["gram"]) if result["gram"] else _feature_facts(result["features"])),
        "seconds": round(result["seconds"], 3),
        "method": result["solver"]["method"],
        "report": str(Path(result["folder"]) / "report.html"),
        "run": result["run"],
        "engine": result["engine"],
    }


def _tile_facts(gram: dict[str, Any]) -> dict[str, Any]:
    stores = gram["stores"]
    return {
        "tiles_computed": gram["tiles_computed"],
        "tiles_reused": gram["tiles_reused"],
        "paths": gram["paths"],
        "store": stores[0]["path"] if stores else None,
    }


def _feature_facts(features: dict[str, Any]) -> dict[str, Any]:
    stores = features["stores"]
    return {
        "map": features["map"]["description"]["kind"],
        "features": features["width"],
        "learned": None if features["learned"] is None else features["learned"]["digest"],
        "blocks": features["blocks"],
        "blocks_computed": features["blocks_computed"],
        "blocks_reused": features["blocks_reused"],
        "store": stores[0]["path"] if stores else None,
    }


def _table(study: Study, root: Path, entries: list[tuple[str, Path, dict[str, Any]]]) -> Outcome:
    run = results.new_run_id()
    store = results.ResultStore(root, study.name, "0" * 12)
    folder = store.begin(run)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    # Relative to the page, so that a root can be moved or copied whole.
    variants = [
        (label, result, f"../../{where.parent.name}/{where.name}/report.html")
        for label, where, result in entries
    ]
    made = report.make_study(study.name, study.description, run, created, variants)
    report.build_study(made, folder)
    final = store.commit(run, made)
    tables: list[NamedTable] = [(study.description or study.name, *report.study_table(made))]
    if by_ridge := report.ridge_table(made):
        tables.append(
            ("Test scores at each ridge (accuracies in percent), expected ones in brackets", *by_ridge)
        )
    judged = [verdict(result) for _, _, result in entries]
    missed = any(one is not None and one.status == "not reached" for one in judged)
    return Outcome(study.name, tuple(tables), final / "report.html", tuple(r for _, _, r in entries), missed)
