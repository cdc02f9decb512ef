"""The engine: the same flow with a Prefect server and without one, and the same errors from both."""

from __future__ import annotations

import errno
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect_servers import clean_environment, running_server

from cluster.errors import ClusterLost, PreflightError
from flows import engine
from flows.engine import DirectEngine, PrefectEngine, open_engine, run_flow
from pipelines.errors import DataError, MegagramError, may_pass


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No server is configured or recorded, and changed variables are put back."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ["MEGAGRAM_HOME"] = str(tmp_path)
    os.environ["PREFECT_HOME"] = str(tmp_path / "prefect-home")
    monkeypatch.setattr(engine, "RETRY_DELAY", 0.0)
    return tmp_path


@pytest.fixture
def answering():
    """The address of something that answers as a healthy Prefect API does."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def add_profile(folder: Path, url: str) -> None:
    (folder / "prefect-home").mkdir()
    (folder / "prefect-home" / "profiles.toml").write_text(
        f'active = "work"\n[profiles.work]\nPREFECT_API_URL = "{url}"\n[profiles.other]\n'
    )


class Flaky:
    """Fails with these errors, one per call, then returns 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


class KilledWorker(Exception):
    __module__ = "distributed.scheduler"


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (OSError(errno.EIO, "I/O error"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(errno.ENOENT, "absent"), False),
        (PermissionError(errno.EACCES, "refused"), False),
        (KilledWorker(), False),
        (ClusterLost("gone"), True),
        (PreflightError("other code"), False),
        (DataError("row 3 is NaN"), False),
        (MegagramError("x"), False),
        (ValueError("x"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_only_errors_that_may_pass_are_transient(error, transient):
    assert may_pass(error) is transient


def test_a_flow_without_a_server_is_a_plain_call(alone):
    def flow(a: int, *, b: int, run: engine.Engine) -> dict:
        run.progress("add", 1, 2, "half")
        run.table("sums", [{"a": a, "b": b}])
        run.markdown("report", "# Sum")
        return {"sum": run.stage("add", lambda x, y: x + y, a, y=b)}

    chosen = open_engine()
    assert chosen.name == "no Prefect server: stages ran directly"
    assert run_flow("adding", flow, 2, b=3, engine=chosen) == {"sum": 5}


def test_a_passing_failure_is_tried_again(alone, caplog):
    stage = Flaky(ConnectionResetError("reset"))
    assert DirectEngine().stage("gram", stage) == 7
    assert "stage gram failed and is tried again: ConnectionResetError: reset" in caplog.text


def test_retries_are_counted(alone):
    stage = Flaky(*(ConnectionResetError(str(i)) for i in range(9)))
    with pytest.raises(ConnectionResetError, match="2"):
        DirectEngine().stage("gram", stage, retries=2)
    assert stage.calls == 3


def test_a_users_error_is_raised_at_once_and_unchanged(alone):
    error = DataError("x.npy: row 3 is NaN")
    stage = Flaky(error)
    with pytest.raises(DataError) as caught:
        DirectEngine().stage("load", stage, retries=5)
    assert caught.value is error
    assert stage.calls == 1


def test_servers_are_looked_for_in_order(alone, answering):
    """The variable, then the active profile; each only if it answers."""
    silent = "http://127.0.0.1:9/api"
    add_profile(alone, answering)
    assert (
        open_engine().name == f"Prefect server at {answering.removesuffix('/api')} (Prefect profile 'work')"
    )
    os.environ["PREFECT_API_URL"] = silent
    assert "(Prefect profile 'work')" in open_engine().name
    os.environ["PREFECT_API_URL"] = f"{answering}/"
    assert open_engine().name.endswith("(PREFECT_API_URL)")
    del os.environ["PREFECT_API_URL"]
    os.environ["PREFECT_PROFILE"] = "other"
    assert isinstance(open_engine(), DirectEngine)


def test_a_configured_server_that_is_silent_is_named(alone):
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    chosen = open_engine()
    assert isinstance(chosen, DirectEngine)
    assert chosen.name == (
        "no Prefect server: stages ran directly (http://127.0.0.1:9/api (PREFECT_API_URL) does not answer)"
    )


def test_a_recorded_server_is_found(alone, answering):
    facts = {"url": answering, "pid": os.getpid(), "started": time.time()}
    (alone / "server.json").write_text(json.dumps(facts))
    chosen = open_engine()
    assert isinstance(chosen, PrefectEngine)
    assert chosen.name.endswith("(started by megagram server)")


@pytest.mark.parametrize("text", ["not toml [", 'active = "work"', "active = 3\nprofiles = 4"])
def test_broken_profiles_are_no_reason_to_fail(alone, text):
    (alone / "prefect-home").mkdir()
    (alone / "prefect-home" / "profiles.toml").write_text(text)
    assert isinstance(open_engine(), DirectEngine)


def run_script(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_without_a_server_prefect_is_not_imported(tmp_path):
    """Its import alone costs more than many a run."""
    script = """
import sys
from flows.engine import open_engine, run_flow
run_flow("f", lambda run: run.stage("s", int), engine=open_engine())
heavy = {"prefect", "numpy", "distributed", "zarr"} & set(sys.modules)
print(sorted(heavy))
"""
    done = run_script(script, clean_environment(tmp_path))
    assert (done.stdout, done.stderr) == ("[]\n", "")


FLOW = """
import json, os, sys, time
from pathlib import Path
from cluster.local import open_cluster
from cluster.profiles import Profile
from flows import engine
from flows.engine import open_engine, run_flow
from pipelines.errors import DataError
engine.RETRY_DELAY = 0.1
mode, folder = sys.argv[1], Path(sys.argv[2])

def features():
    return {"blocks": 3}

def gram():
    attempts = folder / "attempts"
    attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
    if mode == "user-error":
        raise DataError("x.npy: row 3 is NaN; remove it")
    if mode == "transient" and attempts.read_text() == "x":
        raise ConnectionResetError("reset")
    if mode in ("interrupt", "server-lost"):
        print("in the middle", flush=True)
        if mode == "interrupt":
            time.sleep(60)
        sys.stdin.readline()
    with open_cluster(Profile(workers=2, memory=700 * 2**20)) as client:
        return {"pids": len(set(client.run(os.getpid).values()))}

def flow(name, *, run):
    run.stage("features", features)
    for done in range(4):
        run.progress("Gram tiles", done, 3)
    made = run.stage("gram", gram)
    run.progress("Gram tiles", 3, 3, "all tiles")
    run.table("Result", [{"ridge": 0.1, "accuracy": 98.5}])
    run.markdown("report", "# Report of " + name)
    return made

if __name__ == "__main__":
    chosen = open_engine()
    try:
        print(json.dumps(run_flow("krr", flow, "mine", engine=chosen, run_name=mode + " {1}")))
    except DataError as error:
        print("DataError", error)
        sys.exit(error.exit_code)
    finally:
        print(chosen.name)
"""


@pytest.fixture
def script(tmp_path) -> list[str]:
    path = tmp_path / "flow.py"
    path.write_text(FLOW)
    return [sys.executable, str(path)]


def flow_run(server, name: str) -> dict:
    """The flow run of this name, and its task runs in the order they were made, once all are recorded."""
    (run,) = server.runs("flow_runs", flow_runs={"name": {"any_": [name]}})
    deadline = time.monotonic() + 20
    while True:
        tasks = server.runs("task_runs", flow_runs={"id": {"any_": [run["id"]]}})
        if (tasks and all(t["state_type"] in ("COMPLETED", "FAILED", "CRASHED") for t in tasks)) or (
            time.monotonic() > deadline
        ):
            return {**run, "tasks": tasks}
        time.sleep(0.2)


@pytest.mark.slow
def test_a_flow_on_a_server_shows_its_stages_and_artifacts(prefect_server, script, tmp_path):
    """With a real cluster inside a stage; nothing of arguments, results or errors is stored by Prefect."""
    done = subprocess.run(
        [*script, "plain", str(tmp_path)],
        env=prefect_server.environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    result, name = done.stdout.splitlines()
    assert json.loads(result) == {"pids": 2}
    assert name == f"Prefect server at {prefect_server.record.ui} (started by megagram server)"
    assert done.stderr == ""

    run = flow_run(prefect_server, "plain {1}")
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"] == {}
    assert [task["name"].rsplit("-", 1)[0] for task in run["tasks"]] == ["features", "gram"]
    assert {task["state_type"] for task in run["tasks"]} == {"COMPLETED"}
    assert {task["task_inputs"] == {} for task in run["tasks"]} == {True}

    found = prefect_server.ask("artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})
    artifacts = {artifact["key"]: artifact for artifact in found}
    assert set(artifacts) == {"gram-tiles", "result", "report"}
    assert len(found) == 3, "one progress artifact is updated, not many made"
    assert artifacts["gram-tiles"]["data"] == 100.0
    assert artifacts["gram-tiles"]["description"] == "all tiles"
    assert json.loads(artifacts["result"]["data"]) == [{"ridge": 0.1, "accuracy": 98.5}]
    assert artifacts["report"]["data"] == "# Report of mine"
    assert [p for p in (prefect_server.home / "client").rglob("*") if "storage" in p.parts] == []


@pytest.mark.slow
def test_a_users_error_fails_the_run_and_comes_out_unchanged(prefect_server, script, tmp_path):
    done = subprocess.run(
        [*script, "user-error", str(tmp_path)],
        env=prefect_server.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == DataError.exit_code
    assert done.stdout.splitlines()[0] == "DataError x.npy: row 3 is NaN; remove it"
    assert done.stderr == "", "the terminal belongs to the command line"
    assert (tmp_path / "attempts").read_text() == "x", "a user's error is not tried again"
    run = flow_run(prefect_server, "user-error {1}")
    assert (run["state_type"], run["state"]["message"]) == (
        "FAILED",
        "DataError: x.npy: row 3 is NaN; remove it",
    )
    assert [task["state_type"] for task in run["tasks"]] == ["COMPLETED", "FAILED"]


@pytest.mark.slow
def test_a_passing_failure_is_tried_again_on_a_server(prefect_server, script, tmp_path):
    subprocess.run(
        [*script, "transient", str(tmp_path)], env=prefect_server.environment(), check=True, timeout=120
    )
    assert (tmp_path / "attempts").read_text() == "xx"
    run = flow_run(prefect_server, "transient {1}")
    assert run["state_type"] == "COMPLETED"
    assert run["tasks"][1]["run_count"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_not_left_running(prefect_server, script, tmp_path, number):
    process = subprocess.Popen(
        [*script, "interrupt", str(tmp_path)],
        env=prefect_server.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    before = {run["id"] for run in prefect_server.runs("flow_runs") if run["state_type"] == "RUNNING"}
    assert len(before) == 1
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.startswith("Prefect server at"), "what surrounds the flow is put in order as well"
    (run,) = prefect_server.runs("flow_runs", flow_runs={"id": {"any_": list(before)}})
    assert run["state_type"] == "CRASHED"


@pytest.mark.slow
def test_the_work_goes_on_when_the_server_is_killed(script, tmp_path):
    """Prefect only shows the work; what it computes is in the stores."""
    (tmp_path / "home").mkdir()
    with running_server(tmp_path / "home") as server:
        process = subprocess.Popen(
            [*script, "server-lost", str(tmp_path)],
            env=server.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        os.kill(server.record.pid, signal.SIGKILL)
        output, _ = process.communicate("go on\n", timeout=120)
    result, name = output.splitlines()
    assert process.returncode == 0
    assert json.loads(result) == {"pids": 2}
    assert name.endswith("it was lost on the way, and the work went on without it")
    assert (tmp_path / "attempts").read_text() == "x", "a stage that was done is not done again"


@pytest.mark.slow
def test_a_flow_inside_a_flow_of_prefects_own(prefect_server, tmp_path):
    """As a deployment runs it: Prefect is imported and a run of it is under way before ours begins."""
    script = """
from prefect import flow
from flows.engine import open_engine, run_flow

@flow(name="deployed")
def deployed():
    return run_flow("krr", lambda run: run.stage("inner", int, "7"), engine=open_engine(), run_name="inner run")

print(deployed())
"""
    path = tmp_path / "deployed.py"
    path.write_text(script)
    environment = {**prefect_server.environment(), "PREFECT_API_URL": prefect_server.record.url}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "7"
    run = flow_run(prefect_server, "inner run")
    assert run["state_type"] == "COMPLETED"
    assert run["parent_task_run_id"] is not None
