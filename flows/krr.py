"""Kernel ridge regression, with a kernel's matrix or with explicit features: from an experiment to a report. Reads
like the table of contents of the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.errors import ChunkLost
from pipelines.reports import report

from .engine import Engine
from .work import Work

REPAIRS = 3
"""How often damaged chunks are looked for and computed again before a run gives up."""


def krr(work: Work, run: Engine) -> dict[str, Any]:
    """Run every stage; what is stored already is found, not computed."""

    def stage(name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        def timed() -> dict[str, Any]:
            with work.stage(name):
                return function()

        work.on_progress = lambda done, total, message: run.progress(name, done, total, message)
        return run.stage(name, timed)

    try:
        stage("data", work.load)
        stage("plan", work.make_plan)
        for attempt in range(REPAIRS + 1):
            try:
                for name, compute in work.computing:
                    stage(name, compute)
                stage("solve", work.solve)
                break
            except ChunkLost as error:
                # Whoever read the damaged chunk set it aside; where there is one, there may be more.
                if attempt == REPAIRS:
                    raise
                work.display.line(f"warning: {error}")
                lost = work.mend()
                work.display.line(f"{lost or 1} damaged or missing chunks are computed again")
        stage("report", work.make_report)
        header, rows = report.terminal_table(work.result)
        names = [name or "what" for name in header]
        run.table("result", [dict(zip(names, row, strict=True)) for row in rows], work.experiment.name)
        run.markdown("report", (work.folder / "report.md").read_text(), str(work.folder / "report.html"))
        return {"report": str(work.folder / "report.html")}
    except BaseException as error:
        work.failed(error)
        raise
    finally:
        work.close()
