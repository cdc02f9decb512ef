"""``megagram compare`` as a person meets it: tables, words, a page, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.compare import compare_features
from flows.display import Quiet, Terminal
from pipelines import experiment
from pipelines.comparison import compare
from pipelines.errors import ExperimentError

TOML = """
name = "pilot"
[data]
source = "digits"
train = 60
validation = [100, 140]
test = [200, 260]
preprocess = ["scale", "flatten"]
[kernel]
kind = "dot-product"
kernel = "exponential"
sigma = 0.6
[features]
kind = "random"
widths = 64
[solve]
ridges = [0.1, 0.001]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pilot.toml"
    path.write_text(TOML)
    return path


def megagram(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_command_prints_a_table_and_leaves_a_page(file: Path) -> None:
    """Protects the command as a whole: table, slope, target in words, JSON as the last line, the page and its data."""
    done = megagram(
        *("compare", "pilot.toml", "--features", "16,64,256", "--repeat", "5", "--target", "relF=0.02"),
        *("--root", "root", "--cluster", "serial", "--json"),
        cwd=file.parent,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    (entry,) = facts["entries"]
    assert [row["size"] for row in entry["sizes"]] == [[16], [64], [256]]
    assert "exact kernel" in done.stdout
    assert "relF goes like widths to the power" in done.stdout
    assert "relF = 0.02 needs about widths = " in done.stdout
    report = Path(facts["report"])
    assert f"Report: {report}" in done.stdout
    assert json.loads((report.parent / "comparison.json").read_text())["entries"] == facts["entries"]
    assert "relF goes like widths" in report.read_text()
    assert "Traceback" not in done.stderr


def test_the_same_command_again_finds_the_comparison(
    file: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects write-once: nothing is computed, and what was found is said again."""
    study = experiment.load(file)

    def once() -> object:
        outcome = compare_features(study, "16,32", 1000, 1, ["relF=0.5"], root, "serial", Quiet())
        return outcome.tables, outcome.sentences, outcome.report, outcome.report.stat().st_mtime_ns

    first = once()
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("computed again"))
    assert once() == first


def test_a_table_of_kernels_has_one_page_and_a_verdict(
    file: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects tables such as the shipped ones: every variant, then their slopes; a slope that is off is missed."""
    file.write_text(
        TOML.replace(
            'name = "pilot"',
            'name = "pilot"\nvariants = [{ label = "narrow" }, { label = "wide", kernel.sigma = 2.0 }]',
        )
    )
    study = experiment.load(file)
    with Terminal() as display:
        outcome = compare_features(study, "16,64,256", 60, 6, [], root, "serial", display)
    titles = [title for title, _, _ in outcome.tables]
    assert titles == ["narrow", "wide", "pilot"]
    _, header, rows = outcome.tables[-1]
    assert header[-1] == "verdict"
    assert [row[0] for row in rows] == ["narrow", "wide"]
    statuses = [entry["slope"]["status"] for entry in outcome.comparison["entries"]]
    assert outcome.missed == (statuses != ["pass", "pass"])
    assert statuses[0] == "pass"
    assert "features beside the exact kernel" in capsys.readouterr().err


def test_a_table_with_the_exact_kernel_compares_the_features_of_the_others(file: Path, root: Path) -> None:
    """Protects tables of sizes of features beside the exact kernel: the sizes asked for replace those of the table, so
    that its variants are one comparison; features that differ in more are another."""
    text = TOML[: TOML.index("[features]")] + TOML[TOML.index("[solve]") :]
    variants = """variants = [
      { label = "exact kernel" },
      { label = "few", features = { kind = "random", widths = 16 } },
      { label = "many", features = { kind = "random", widths = 64 } },
      { label = "orthogonal", features = { kind = "random", widths = 64, orthogonal = true } },
    ]"""
    file.write_text(text.replace('name = "pilot"', f'name = "pilot"\n{variants}'))
    outcome = compare_features(experiment.load(file), "8,16", 30, 1, [], root, "serial", Quiet())
    assert [entry["label"] for entry in outcome.comparison["entries"]] == ["few; many", "orthogonal"]


@pytest.mark.parametrize("name", ["digits-nystrom-ckn", "digits-random-features"])
def test_shipped_tables_of_features_are_compared(name: str, root: Path) -> None:
    outcome = compare_features(experiment.load(name), "2,4", 10, 1, [], root, "serial", Quiet())
    assert all("exact" not in entry["label"] for entry in outcome.comparison["entries"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--features", "64,16"), 2, "sizes must increase"),
        (("--features", "many"), 2, '"many" is no size'),
        (("--features", "8x16"), 2, "features.widths"),
        (("--features", "8", "--target", "relF"), 2, "--target relF"),
        (("--features", "8", "--samples", "1"), 2, "--samples 1"),
        (("--features", "8", "--repeat", "0"), 2, "--repeat 0"),
        (("--features", "2000000000"), 4, "fewer --samples"),
        (("--features", "8", "--set", "features.kind='nystrom-ckn'"), 2, "features."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line_and_an_exit_code(
    file: Path, root: Path, arguments: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Protects against tracebacks, and against work that begins before what is asked for is checked."""
    from flows import cli

    monkeypatch.setattr(
        sys,
        "argv",
        ["megagram", "compare", str(file), *arguments, "--root", str(root), "--cluster", "serial"],
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("megagram: error: ")
    assert said in error[-1]
    assert not (root / "gram").exists()


def test_an_experiment_without_features_is_refused(root: Path) -> None:
    with pytest.raises(ExperimentError, match=r"quickstart has no \[features\]"):
        compare_features(experiment.load("quickstart"), "8", 10, 1, [], root, "serial", Quiet())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "repeat"),
    [
        ("random-features-convergence", "32,64,128,256,512,1024", 10),
        ("convolutional-features-convergence", "16,32,64,128,256", 24),
    ],
)
def test_random_features_converge_at_the_monte_carlo_rate(
    name: str, sizes: str, repeat: int, root: Path
) -> None:
    """Protects X8, X28, F6: slope -1/2 within 0.15, and clearly not zero, for every kernel of the shipped tables."""
    outcome = compare_features(experiment.load(name), sizes, 1000, repeat, [], root, "serial", Quiet())
    slopes = {entry["label"]: entry["slope"] for entry in outcome.comparison["entries"]}
    assert {slope["status"] for slope in slopes.values()} == {"pass"}, slopes
    assert not outcome.missed
