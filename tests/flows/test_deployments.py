"""The flow that a deployment runs: an experiment by name, visible on the server with its stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
from flows.deployments import run_experiment
print(json.dumps(run_experiment("quickstart", "root", "serial", ["data.train=100", "data.validation=[100, 150]"])))
"""


@pytest.mark.slow
def test_a_deployed_flow_runs_an_experiment_below_it(prefect_server, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **prefect_server.environment(),
            "PREFECT_API_URL": prefect_server.record.url,
            "DO_NOT_TRACK": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["tiles_computed"] > 0
    assert "Prefect server at" in facts["engine"]
    finished = prefect_server.runs("flow_runs", flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}})
    assert any(run["parent_task_run_id"] for run in finished), "the experiment's run stands below the flow's"


def test_the_deployment_file_names_a_flow_that_exists():
    import yaml

    root = Path(__file__).parents[2]
    deployments = yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]
    assert deployments
    for deployment in deployments:
        path, _, name = deployment["entrypoint"].partition(":")
        assert f"def {name}(" in (root / path).read_text()
        from pipelines.experiment import find

        assert find(deployment["parameters"]["experiment"]).exists()
