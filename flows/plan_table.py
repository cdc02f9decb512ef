"""A plan as a table: what, how much, and a remark."""

from __future__ import annotations

from pipelines.explicit.feature_plan import FeaturePlan
from pipelines.plan import Plan
from pipelines.plan_base import PlanBase
from pipelines.wording import GCV_CAUTION, bytes_text, seconds_text

Row = tuple[str, str, str]


def plan_rows(made: Plan | FeaturePlan) -> list[Row]:
    """Rows for a table: what, how much, remark."""
    rows = _tiles(made) if isinstance(made, Plan) else _features(made)
    if made.assumed:
        rows.append(
            ("machines", f"{made.workers} assumed workers", f"profile {made.assumed}: nothing measured")
        )
    cost = made.cost
    rows += [
        ("computed by", made.path, made.path_remark),
        (
            "operations",
            f"{cost.operations:.3g}",
            f"and {cost.transcendentals:.3g} calls of exp, arccos or sqrt",
        ),
        ("solved by", made.choice.estimate.name, made.reason),
        *_selection(made),
        ("disk", bytes_text(made.disk_bytes), _disk(made)),
        ("memory of a worker", *_worker(made)),
        ("memory of the driver", bytes_text(made.solve_bytes), f"{bytes_text(made.driver_limit)} free"),
        ("expected time", seconds_text(made.seconds), _times(made)),
    ]
    return rows + [("does not fit", "", problem) for problem in made.problems()]


def _tiles(made: Plan) -> list[Row]:
    rows = []
    for m in made.matrices:
        what = f"{m.grid.n} x {m.grid.m} entries, tiles of {m.grid.side}, {len(m.stores)} stored per pass"
        present = m.needed_count - m.missing_count
        rows.append((f"tiles ({m.role})", f"{m.missing_count} missing, {present} present", what))
    if made.recomputed:
        rows.append(
            ("tiles", "none stored", f"computed at each of about {made.choice.estimate.passes} passes")
        )
    return rows


def _features(made: FeaturePlan) -> list[Row]:
    rows = [("features", f"{made.width:,}", f"of each sample, {made.dtype}, by a {made.map} map")]
    if made.learning.operations:
        rows.append(
            (
                "to learn first",
                f"{made.learning.operations:.3g} operations",
                f"on the driver, about {seconds_text(made.learning_seconds)}",
            )
        )
    if made.streamed:
        passes = f"computed at each of about {made.choice.estimate.passes} passes: {made.blocks_reason}"
        return [*rows, ("blocks", "none stored", passes)]
    for one in made.blocks:
        each = f"of {made.side:,} samples"
        rows.append((f"blocks ({one.role})", f"{one.missing} missing, {one.present} present", each))
    return [*rows, ("blocks", "stored", made.blocks_reason)]


def _selection(made: PlanBase) -> list[Row]:
    """How the ridge is chosen, where that wants a word of caution."""
    if made.select == "gcv":
        return [("ridge", "by generalised cross-validation", GCV_CAUTION)]
    if made.select == "loo" and made.method == "tiled-cholesky":
        return [("ridge", "by leave-one-out", "its error estimated with random probes; exact in memory")]
    return []


def _disk(made: Plan | FeaturePlan) -> str:
    free = f"{bytes_text(made.disk_free)} free under {made.root}"
    if isinstance(made, FeaturePlan):
        return free
    return f"{bytes_text(made.solve_disk_bytes)} of it for the solve, and then free again; {free}"


def _worker(made: PlanBase) -> tuple[str, str]:
    computing, solving = made.worker.total, made.solve_worker_bytes
    what = "tiles" if isinstance(made, Plan) else "features"
    return (
        bytes_text(max(computing, solving)),
        f"{what} {bytes_text(computing)}, solve {bytes_text(solving)};"
        f" each of {made.workers} may use {bytes_text(made.worker_limit)}",
    )


def _times(made: Plan | FeaturePlan) -> str:
    if isinstance(made, Plan):
        parts = f"tiles {seconds_text(made.gram_seconds)}"
    else:
        parts = (
            f"learning {seconds_text(made.learning_seconds)}, features {seconds_text(made.feature_seconds)}"
        )
    return (
        f"{parts}, solve {seconds_text(made.solve_seconds)},"
        f" of which the driver hands out tasks for {seconds_text(made.choice.estimate.task_seconds)}"
        f" ({'by assumed rates' if made.assumed else 'calibrated just now'})"
    )
