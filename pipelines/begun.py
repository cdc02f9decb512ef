"""Runs that were interrupted: the next start goes on in the way that was begun, whatever "auto" would take by then.

What a solve keeps is of use to the same method alone, and "auto" rests on times measured anew at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kernels.base import digest

from .experiment import Experiment
from .fit import SOLVES
from .plan_base import PlanBase
from .pools import Pools
from .results import journals

P = TypeVar("P", bound=PlanBase)


def planned(make: Callable[..., P], experiment: Experiment, pools: Pools, root: Path, **options: Any) -> P:
    """The plan that ``make`` makes of an experiment; of an interrupted run, where that still fits, with what it chose.

    Raises: as ``make``.
    """
    begun = _as_begun(experiment, root)
    if begun is not None:
        plan = make(begun, pools, root, **options)
        if not plan.problems():
            return plan.going_on()
    return make(experiment, pools, root, **options)


def experiment_digest(experiment: Experiment) -> str:
    """Names an experiment by all that its file says."""
    return digest(experiment.table())


def _as_begun(experiment: Experiment, root: Path) -> Experiment | None:
    """The experiment with what an interrupted run took for each "auto"; None where nothing is left of such a run."""
    mine = experiment_digest(experiment)
    for journal in journals(root, experiment.name):
        way = journal.get("way") or {}
        if journal.get("state") == "done" or way.get("experiment") != mine or not _left(root, journal):
            continue
        changes = {}
        for part, key in (("solve", "method"), ("gram", "tiles"), ("features", "blocks")):
            table = getattr(experiment, part)
            if table is not None and getattr(table, key) == "auto" and key in way:
                changes[part] = table.model_copy(update={key: way[key]})
        return experiment.model_copy(update=changes) if changes else None
    return None


def _left(root: Path, journal: dict[str, Any]) -> bool:
    """Whether anything that a run's solves kept is still there."""
    names = [Path(path).name for path in journal.get("uses", ()) if Path(path).parent.name == SOLVES]
    return any((root / SOLVES / name).exists() for name in names)
