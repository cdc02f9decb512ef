"""Runs that were interrupted: what they chose is chosen again, while anything is left of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small

from pipelines import begun, plan, pools, results
from pipelines.experiment import Experiment
from pipelines.explicit import feature_plan
from pipelines.files import sealed, unsealed
from pipelines.fit import SOLVES
from pipelines.plan_base import PlanBase

WORKER = 2**31
LANDMARKS = {"kind": "nystrom", "landmarks": 10}


def planned(experiment: Experiment, root: Path, worker_bytes: int = WORKER) -> PlanBase:
    make: Any = plan.make if experiment.features is None else feature_plan.make
    resolved = pools.resolve(experiment)
    return begun.planned(make, experiment, resolved, root, workers=1, worker_bytes=worker_bytes)


@pytest.fixture
def samples(tmp_path: Path) -> small.Samples:
    return small.Samples(tmp_path / "data").write(60)


def interrupted(experiment: Experiment, root: Path, **way: str) -> Path:
    """Leave what a start leaves that was killed in a solve; the solve's folder."""
    journal = results.Journal(root, experiment.name, results.new_run_id())
    folder = root / SOLVES / "a"
    for name in ("leases", "scratch-a", "ridge-0.1"):
        (folder / name).mkdir(parents=True)
    journal.uses([str(folder)])
    journal.way({"experiment": begun.experiment_digest(experiment), **way})
    return folder


def test_a_run_goes_on_in_the_way_that_it_began(samples: small.Samples, tmp_path: Path) -> None:
    """Protects hours of iterations from a choice that falls otherwise the next time; and says so."""
    one = samples.experiment()
    root = tmp_path / "root"
    assert planned(one, root).method == "cholesky"
    folder = interrupted(one, root, method="conjugate-gradient", tiles="recomputed")
    again = planned(one, root)
    assert again.way == {"method": "conjugate-gradient", "tiles": "recomputed"}
    assert again.reason == "conjugate-gradient with recomputed tiles: an earlier start began with it"
    (folder / "ridge-0.1").rmdir()
    assert planned(one, root).method == "cholesky", "nothing is left that it could go on from"


def test_features_are_streamed_on_if_they_were(samples: small.Samples, tmp_path: Path) -> None:
    """Protects sums over features: those of stored ones have another address than those of streamed ones."""
    one, root = samples.experiment(features=LANDMARKS), tmp_path / "root"
    before = planned(one, root)
    assert before.way == {"method": "cholesky", "blocks": "stored"}
    interrupted(one, root, method="eigen", blocks="streamed")
    again = planned(one, root)
    assert again.way == {"method": "eigen", "blocks": "streamed"}
    assert again.json()["blocks_reason"] == "as an earlier start began"


def test_another_experiment_chooses_for_itself(samples: small.Samples, tmp_path: Path) -> None:
    """Protects changed files, and methods that are named."""
    one, root = samples.experiment(), tmp_path / "root"
    interrupted(one, root, method="conjugate-gradient", tiles="stored")
    assert planned(samples.experiment(solve={"ridges": [0.1]}), root).method == "cholesky"
    named = samples.experiment(solve={"method": "eigen"})
    interrupted(named, tmp_path / "other", method="conjugate-gradient", tiles="stored")
    assert planned(named, tmp_path / "other").way == {"method": "eigen", "tiles": "stored"}


def test_a_run_that_finished_since_ends_it(samples: small.Samples, tmp_path: Path) -> None:
    """Protects reports: what a later run finished is not told by the way of an earlier one."""
    one, root = samples.experiment(), tmp_path / "root"
    interrupted(one, root, method="conjugate-gradient", tiles="stored")
    assert planned(one, root).method == "conjugate-gradient"
    later = results.Journal(root, one.name, results.new_run_id())
    later.way({"experiment": begun.experiment_digest(one), "method": "eigen", "tiles": "stored"})
    later.finish("done")
    assert planned(one, root).method == "cholesky"


def test_a_run_that_stopped_short_is_gone_on_with(samples: small.Samples, tmp_path: Path) -> None:
    """Protects iterations when more are allowed: their number counts in the choice, which could fall on other tiles."""
    one, root = samples.experiment(), tmp_path / "root"
    folder = interrupted(one, root, method="conjugate-gradient", tiles="recomputed")
    (path,) = (root / "runs").glob("*/*.json")
    path.write_text(json.dumps(sealed({**unsealed(json.loads(path.read_text())), "state": "done"})))
    more = samples.experiment(solve={"max_iterations": 1000})
    assert planned(more, root).way == {"method": "conjugate-gradient", "tiles": "recomputed"}
    (folder / "ridge-0.1").rmdir()
    assert planned(more, root).method == "cholesky"


def test_a_word_in_the_file_changes_nothing(samples: small.Samples, tmp_path: Path) -> None:
    """Protects kept iterations from a description, and from more of them."""
    one, root = samples.experiment(), tmp_path / "root"
    interrupted(one, root, method="conjugate-gradient", tiles="stored")
    for changes in ({"description": "better"}, {"solve": {"max_iterations": 5000}}):
        assert planned(samples.experiment(**changes), root).method == "conjugate-gradient"


def test_a_way_that_fits_no_longer_is_left(samples: small.Samples, tmp_path: Path) -> None:
    """Protects from a refusal on a smaller machine, where another way still fits."""
    one, root = samples.experiment(), tmp_path / "root"
    interrupted(one, root, method="tiled-cholesky", tiles="stored")
    assert planned(one, root).method == "tiled-cholesky"
    assert planned(one, root, worker_bytes=2**20).method != "tiled-cholesky"


def test_a_way_in_memory_must_leave_what_a_choice_leaves(
    samples: small.Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from a matrix that nearly fills the memory, of which the earlier start may have died."""
    one, root = samples.experiment(), tmp_path / "root"
    interrupted(one, root, method="eigen", tiles="stored")
    again = planned(one, root)
    assert (again.method, again.comfortable) == ("eigen", True)
    monkeypatch.setattr("pipelines.memory.available_bytes", lambda: int(again.solve_bytes / 0.95))
    assert planned(one, root).method != "eigen"
