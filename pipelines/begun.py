"""Runs that were interrupted, or ended before they had converged: the next start goes on in the way that was begun,
whatever "auto" would take by then.

What a solve keeps is of use to the same method alone, and "auto" rests on times measured anew at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kernels.base import digest

from .experiment import Experiment
from .fit import SOLVES
from .inventory import factors_of
from .plan_base import PlanBase
from .pools import Pools
from .results import journals

P = TypeVar("P", bound=PlanBase)


def planned(make: Callable[..., P], experiment: Experiment, pools: Pools, root: Path, **options: Any) -> P:
    """The plan that ``make`` makes of an experiment; of an interrupted run, where that still fits, with what it chose.

    Raises: as ``make``.
    """
    # Machines that are not there have no root to go on from.
    begun = _as_begun(experiment, root) if options.get("assumed") is None else None
    if begun is not None:
        plan = make(begun, pools, root, **options)
        if not plan.problems() and plan.comfortable:
            return plan.going_on()
    return make(experiment, pools, root, **options)


def experiment_digest(experiment: Experiment) -> str:
    """Names an experiment by all that what its solve keeps depends on."""
    table = experiment.table()
    named = {key: table.get(key) for key in ("data", "kernel", "features", "gram", "seed")}
    solve = {key: value for key, value in table["solve"].items() if key != "max_iterations"}
    return digest({**named, "solve": solve})


def _as_begun(experiment: Experiment, root: Path) -> Experiment | None:
    """The experiment with what a run took for each "auto" that left something to go on from; None where none did since
    the last that finished and left nothing."""
    mine = experiment_digest(experiment)
    for journal in journals(root, experiment.name):
        way = journal.get("way") or {}
        if way.get("experiment") != mine:
            continue
        if not _left(root, journal):
            if journal.get("state") == "done":
                return None
            continue
        changes = {}
        for part, key in (("solve", "method"), ("gram", "tiles"), ("features", "blocks")):
            table = getattr(experiment, part)
            if table is not None and getattr(table, key) == "auto" and key in way:
                changes[part] = table.model_copy(update={key: way[key]})
        return experiment.model_copy(update=changes) if changes else None
    return None


def _left(root: Path, journal: dict[str, Any]) -> bool:
    """Whether anything that a run's solves kept is still there: more than what every solve makes when it begins."""
    names = {Path(path).name for path in journal.get("uses", ()) if Path(path).parent.name == SOLVES}
    kept = (path.name for name in names for path in (root / SOLVES / name).glob("*"))
    return any(name != "leases" and not name.startswith(("scratch-", ".")) for name in kept) or bool(
        factors_of(root, names)
    )
