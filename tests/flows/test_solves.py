"""What a run leaves of its solve: nothing where it ended well, all of it where more iterations would help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.display import Terminal
from flows.run import run_study
from pipelines import experiment, inventory, results
from pipelines.errors import NumericalError
from pipelines.files import sealed
from pipelines.reports import report
from pipelines.solvers.base import Solution
from pipelines.solvers.checkpoints import EARLIER, Checkpoints

TOML = """
name = "small"
[data]
source = "digits"
train = 200
validation = [200, 300]
preprocess = ["scale", "standardise"]
[kernel]
kind = "fully-connected"
family = "rf"
depth = 2
[solve]
method = "conjugate-gradient"
ridges = [1.0, 1e-7]
tolerance = 1e-9
"""


def run(folder: Path, most: int) -> list[dict[str, Any]]:
    """The path of ridges of a run with so many iterations at most."""
    (folder / "small.toml").write_text(f"{TOML}max_iterations = {most}\n")
    with Terminal() as display:
        outcome = run_study(experiment.load(folder / "small.toml"), folder / "root", "serial", display)
    return outcome.results[0]["evaluation"]["path"]


def test_a_solve_is_kept_where_a_ridge_did_not_converge(tmp_path: Path) -> None:
    """Protects iterations that were done: with more of them allowed the next run goes on, then nothing is left."""
    before = {entry["ridge"]: entry for entry in run(tmp_path, 1)}
    assert before[1e-7]["status"] == "not converged"
    (kept,) = (tmp_path / "root" / "solves").iterdir()
    assert list(kept.glob("**/iterations.npz"))
    after = {entry["ridge"]: entry for entry in run(tmp_path, 1000)}
    assert after[1e-7]["status"] == "solved"
    assert after[1e-7]["iterations"] > before[1e-7]["iterations"] == 1
    assert not list((tmp_path / "root" / "solves").iterdir())


def test_what_a_run_could_not_remove_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the disk from a run killed when its result was safe: the next takes that over, and solves nothing."""

    def killed(root: Path, folders: list[Path]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inventory, "remove_solves", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, 1000)
    assert list((tmp_path / "root" / "solves").iterdir())
    run(tmp_path, 1000)
    assert len(list((tmp_path / "root").glob("results/*/2*"))) == 2
    assert not list((tmp_path / "root" / "solves").iterdir())


def test_a_solve_that_another_experiment_goes_on_from_is_kept(tmp_path: Path) -> None:
    """Protects what one experiment has to go on from, from another on the same system that is finished with it."""
    run(tmp_path, 1)
    other = TOML.replace('name = "', 'name = "other-')
    (tmp_path / "other.toml").write_text(f"{other}max_iterations = 1000\n")
    with Terminal() as display:
        run_study(experiment.load(tmp_path / "other.toml"), tmp_path / "root", "serial", display)
    assert len(list((tmp_path / "root" / "solves").iterdir())) == 1
    run(tmp_path, 1000)
    assert not list((tmp_path / "root" / "solves").iterdir())


@pytest.mark.parametrize(
    "solve",
    [
        pytest.param('method = "conjugate-gradient"', marks=pytest.mark.slow),
        'method = "nystrom"\ncentres = 50\ntolerance = 1e-9',
        'method = "tiled-cholesky"',
    ],
)
def test_another_list_of_ridges_that_finishes_leaves_what_the_first_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solve: str
) -> None:
    """Protects an interrupted run from a trial with other ridges: its ridges, factors and iterations go on, nothing is
    left when it has finished too; and until then ``store clean`` may have what no run of the file as it is resumes."""
    root, save = tmp_path / "root", Checkpoints.save

    def evaluation(ridges: str) -> dict[str, Any]:
        table = TOML.split("[solve]")[0] + f"[solve]\n{solve}\nridges = {ridges}\n"
        (tmp_path / "small.toml").write_text(table)
        with Terminal() as display:
            outcome = run_study(experiment.load(tmp_path / "small.toml"), root, "serial", display)
        return outcome.results[0]["evaluation"]

    def saved_once(self: Checkpoints, solution: Solution) -> None:
        if list(root.glob("solves/**/ridge-*")):
            raise KeyboardInterrupt
        save(self, solution)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved_once)
        with pytest.raises(KeyboardInterrupt):
            evaluation("[1.0, 1e-3, 1e-7]")
    (kept,) = root.glob("solves/*/**/ridge-*")
    evaluation("[1.0, 1e-5]")
    assert list(root.glob("solves/*/**/ridge-1.0")) == [kept]
    left = [entry for entry in inventory.inventory(root) if entry.kind in ("solves", "factors")]
    assert {entry.used_by for entry in left} == {()}
    assert inventory.resumable_bytes(root, "small") == sum(entry.bytes for entry in left)
    path = evaluation("[1.0, 1e-3, 1e-7]")["path"]
    assert [EARLIER in entry["notes"] for entry in path] == [True, False, False]
    assert not list(root.glob("solves/*"))
    assert not list(root.glob("factors/*"))


def test_a_run_whose_system_cannot_be_solved_holds_nothing(tmp_path: Path) -> None:
    """Protects the disk: a list of ridges that was mended after an error leaves no factor of the one that failed."""
    X = np.random.default_rng(0).standard_normal((60, 5))
    K = X @ X.T
    K[0, 0] -= 50.0
    np.save(tmp_path / "K.npy", K)
    np.save(tmp_path / "y.npy", X[:, 0])

    def run(ridges: str) -> None:
        (tmp_path / "small.toml").write_text(
            f'''name = "small"
[data]
source = "arrays"
y = "{tmp_path}/y.npy"
train = 60
[kernel]
kind = "precomputed"
gram = "{tmp_path}/K.npy"
[solve]
method = "tiled-cholesky"
select = "gcv"
ridges = {ridges}
'''
        )
        with Terminal() as display:
            run_study(experiment.load(tmp_path / "small.toml"), tmp_path / "root", "serial", display)

    with pytest.raises(NumericalError):
        run("[10.0, 1e-3]")
    assert list((tmp_path / "root" / "solves").iterdir())
    run("[10.0]")
    assert not list((tmp_path / "root" / "solves").iterdir())
    assert not list((tmp_path / "root").glob("factors/*"))


def test_a_solve_is_kept_where_the_refit_alone_did_not_converge(tmp_path: Path) -> None:
    """Protects iterations of the final model, which has more samples than the path and may take more of them."""

    def evaluation(folder: str, most: int) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "small.toml"
        one = TOML.replace("ridges = [1.0, 1e-7]", "ridges = [1e-7]\nrefit = true")
        path.write_text(f"{one}max_iterations = {most}\n[gram]\ntiles = 'stored'\n")
        with Terminal() as display:
            outcome = run_study(experiment.load(path), tmp_path / folder / "root", "serial", display)
        return outcome.results[0]["evaluation"]

    enough = evaluation("enough", 1000)["path"][0]["iterations"]
    short = evaluation("short", enough)
    assert (short["path"][0]["status"], short["refit"]["status"]) == ("solved", "not converged")
    assert list((tmp_path / "short" / "root").glob("solves/*/**/iterations.npz"))
    longer = evaluation("short", 1000)["refit"]
    assert longer["status"] == "solved"
    assert longer["iterations"] > enough
    assert not list((tmp_path / "short" / "root" / "solves").iterdir())


def test_a_solve_that_did_not_converge_is_told_wherever_its_scores_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects readers of a terminal or of JSON, who would take a score for a solved system's; again too."""
    (tmp_path / "small.toml").write_text(TOML.replace("[1.0, 1e-7]", "[1e-7]") + "max_iterations = 1\n")
    for _ in range(2):
        with Terminal() as display:
            outcome = run_study(
                experiment.load(tmp_path / "small.toml"), tmp_path / "root", "serial", display
            )
        ((_, _, rows),) = outcome.tables
        assert [row[1] for row in rows if row[0] == "Solve"] == ["not converged"]
        facts = outcome.json()
        assert facts["status"] == "not converged"
        assert facts["residual"] > 1e-3
        said = " ".join("".join(capsys.readouterr()).split())
        assert "warning: the ridge 1e-07 is not solved: not converged, relative residual" in said


def test_another_seed_is_another_result(tmp_path: Path) -> None:
    """Protects from a model whose centres were drawn under another seed."""
    table = TOML.split("[solve]")[0] + '[solve]\nmethod = "nystrom"\ncentres = 50\nridges = [1e-3]\n'
    centres, runs = [], []
    for seed in (0, 1, 0):
        (tmp_path / "small.toml").write_text(f"seed = {seed}\n{table}")
        spec = experiment.load(tmp_path / "small.toml")
        with Terminal() as display:
            outcome = run_study(spec, tmp_path / "root", "serial", display)
        (result,) = outcome.results
        folder, _ = results.newest(tmp_path / "root", "small", spec.experiments[0].table())
        centres.append(np.load(folder / "rows.npy").tolist())
        runs.append(result["evaluation"]["solved_by"]["run"])
    assert centres[0] != centres[1]
    assert centres[0] == centres[2]
    assert runs[0] == runs[2] != runs[1]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("alpha.npy", "alpha.npy is damaged"),
        pytest.param(
            "result.json",
            "{folder}: the result cannot be read (it is not as it was written)",
            marks=pytest.mark.slow,
        ),
        *(pytest.param(f"{name}.npy", name, marks=pytest.mark.slow) for name in ("rows", "test_scores")),
    ],
)
def test_a_damaged_result_is_not_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    """Protects the next run from a flipped bit of an earlier one, and the earlier one's whole files from the next: its
    system is solved anew, a warning says why, and later runs rest on the mended result."""
    path = tmp_path / "small.toml"
    path.write_text(TOML.replace("validation", "test = [300, 400]\nvalidation"))

    def ran() -> Path:
        with Terminal() as display:
            outcome = run_study(experiment.load(path), tmp_path / "root", "serial", display)
        return Path(outcome.results[0]["folder"])

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("*.npy")}

    first = ran()
    whole = contents(first)
    assert set(whole) == {"alpha.npy", "rows.npy", "test_scores.npy"}
    flip_a_bit(first / name)
    damaged = contents(first)
    capsys.readouterr()
    second = ran()
    said = "".join("".join(capsys.readouterr()).split())
    warning = f"the result of run {first.name} is not used again, and the system is solved anew: {told}"
    assert "".join(warning.format(folder=first).split()) in said
    assert contents(second) == whole
    assert contents(first) == damaged, "it was written into"
    assert not any((first / one).samefile(second / one) for one in whole)
    third = ran()
    assert all((second / one).samefile(third / one) for one in whole)


@pytest.mark.slow
def test_a_result_without_checksums_is_not_taken_over(tmp_path: Path) -> None:
    """Protects from arrays that nothing tells to be whole: those of results that were written without checksums."""
    first = run(tmp_path, 1000)
    (folder,) = (path.parent for path in (tmp_path / "root").glob("results/*/2*/result.json"))
    document = results.read(folder)
    del document["evaluation"]["checksums"]
    (folder / "result.json").write_text(json.dumps(sealed(document)))
    again = run(tmp_path, 1000)
    assert [entry["seconds"] for entry in again] != [entry["seconds"] for entry in first]


def test_an_unsolved_system_is_named_where_scores_are(tmp_path: Path) -> None:
    """Protects from scores of a system that was not solved passing for a solution's."""
    path = tmp_path / "small.toml"
    path.write_text(TOML.replace("ridges = [1.0, 1e-7]", "ridges = [1e-7]") + "max_iterations = 1\n")
    with Terminal() as display:
        (result,) = run_study(experiment.load(path), tmp_path / "root", "serial", display).results
    assert any("not converged" in note for note in result["evaluation"]["notes"])
    assert "not converged" in str(report.terminal_table(result))
