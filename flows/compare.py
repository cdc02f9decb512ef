"""Explicit features beside the exact kernel, size by size: of an experiment, or of a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.profiles import Profile
from cluster.signals import sigterm_unwinds
from cluster.watchdog import explain
from pipelines import provenance
from pipelines.comparison import compare, page
from pipelines.comparison.findings import findings
from pipelines.comparison.sizes import has_features, read_sizes, read_target
from pipelines.comparison.store import ComparisonStore
from pipelines.comparison.subject import Request, Subject, address
from pipelines.errors import ExperimentError
from pipelines.experiment import Experiment, Study
from pipelines.fit import Place

from .machines import Cluster
from .run import NamedTable
from .work import Display


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to. comparison: a JSON value. missed: in a table, a slope outside its tolerance."""

    comparison: dict[str, Any]
    tables: tuple[NamedTable, ...]
    sentences: tuple[str, ...]
    report: Path
    missed: bool

    def json(self) -> dict[str, Any]:
        return {**self.comparison, "report": str(self.report)}


def compare_features(
    study: Study,
    sizes: str,
    samples: int,
    repeat: int,
    targets: Sequence[str],
    root: Path,
    profile: str,
    display: Display,
    *,
    command: str = "",
) -> Outcome:
    """Compare experiments of a study that have features with their exact kernel and write the page, or read it again.

    sizes, targets: as on the command line. samples: of training. repeat: seeds for each size. root: made when absent.

    Raises:
        ExperimentError: an option is invalid, no experiment has features, or those of one have no size.
        DataError: data are missing or bad.
        DoesNotFit: the matrices and features do not fit into the free memory.
    """
    if samples < 2:
        raise ExperimentError(f"--samples {samples}: two samples at least are compared")
    if repeat < 1:
        raise ExperimentError(f"--repeat {repeat}: must be a number of seeds from 1 on")
    request = Request(read_sizes(sizes), samples, repeat, tuple(read_target(text) for text in targets))
    subjects = _subjects(study, request)
    root = root.resolve()
    store = ComparisonStore(root, study.name, address(subjects))
    found = store.read()
    if found is None:
        found = {
            "comparison": study.name,
            "title": study.description or study.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "entries": _compared(subjects, root, profile, display),
            "megagram": provenance.version("megagram"),
            "provenance": provenance.machine(),
        }
        store.write(found, page.compare_page(found))
    return _outcome(study, found, store.folder / "report.html")


def _subjects(study: Study, request: Request) -> list[Subject]:
    """What there is to compare: experiments without features are the exact kernel anyway, and those whose features
    differ in size alone are one, named by all of their labels.

    Raises:
        ExperimentError: no experiment has features.
    """
    # Where none has any, Subject says what to do.
    experiments = [one for one in study.experiments if has_features(one)] or study.experiments
    alike: dict[str, list[Experiment]] = {}
    for one in experiments:
        alike.setdefault(address([Subject(one, request)]), []).append(one)
    labelled = [
        group[0].model_copy(update={"label": "; ".join(one.label for one in group)})
        for group in alike.values()
    ]
    return [Subject(one, request) for one in labelled]


def _compared(
    subjects: Sequence[Subject], root: Path, profile: str, display: Display
) -> list[dict[str, Any]]:
    entries = []
    with sigterm_unwinds(), Cluster(Profile.load(profile), root, display.line) as cluster:
        place = Place(root, cluster.workers, cluster.resources.memory)
        for subject in subjects:
            display.stage(subject.experiment.name, "features beside the exact kernel")
            for warning in subject.pools.warnings:
                display.line(f"warning: {warning}")
            try:
                found = compare.compare(subject, root, place, display.progress)
            except Exception as error:
                raise explain(error) or error from None
            entries.append(findings(subject, found))
    return entries


def _outcome(study: Study, found: dict[str, Any], report: Path) -> Outcome:
    entries = found["entries"]
    tables: list[NamedTable] = []
    sentences: list[str] = []
    for entry in entries:
        tables.append((entry["label"] or entry["experiment"], *page.sizes_table(entry)))
        prefix = f"{entry['label']}: " if study.is_table else ""
        sentences += [prefix + text for text in page.sentences(entry)]
    if study.is_table:
        tables.append((found["title"], *page.slopes_table(entries)))
    missed = any(entry["slope"] and entry["slope"]["status"] != "pass" for entry in entries)
    return Outcome(found, tuple(tables), tuple(sentences), report, study.is_table and missed)
