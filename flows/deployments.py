"""The flow that a Prefect deployment runs: an experiment by name or path, on a schedule or from the pages.

``prefect.yaml`` names it as an entry point. This module imports Prefect; nothing else of ours imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from pipelines.experiment import load

from .display import Quiet
from .run import run_study


@flow(name="megagram", flow_run_name="{experiment}")
def run_experiment(
    experiment: str, root: str = "megagram-root", cluster: str = "local", overrides: list[str] | None = None
) -> dict[str, Any]:
    """Run an experiment as ``megagram run`` does; its stages appear as tasks of a flow run below this one.

    Returns the JSON object that ``megagram run --json`` prints.
    """
    study = load(experiment, overrides or ())
    outcome = run_study(study, Path(root), cluster, Quiet(), command=f"megagram run {experiment}")
    return outcome.json()
