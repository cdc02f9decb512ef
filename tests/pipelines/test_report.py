"""The report: complete and true for every kind of result, and harmless whatever a user called things."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reports import report
from pipelines.reports.document import Cell, Page, Section, Table, Text, to_html, to_markdown
from pipelines.reports.verdict import final_solve, trained_on, verdict
from pipelines.wording import (
    GCV_CAUTION,
    NO_PLOTS,
    ORACLE,
    bytes_text,
    first_line,
    kernel_phrase,
    number_text,
    ridge_text,
    score_text,
    seconds_text,
)

RIDGES = (1.0, 0.1, 0.01, 1e-3)
LAYER = {"patch": 3, "kernel": "exponential", "sigma": 0.6, "pooling": "gaussian", "subsampling": 2}


def accuracy(value: float, n: int = 200) -> dict[str, Any]:
    return {"accuracy": value, "n": n}


def errors(rmse: float, n: int = 200) -> dict[str, Any]:
    return {"rmse": rmse, "mse": rmse**2, "mae": 0.8 * rmse, "r2": 1 - rmse**2, "n": n}


def a_result(
    select: str = "validation", score: Any = accuracy, classes: int = 3, **changes: Any
) -> dict[str, Any]:
    """A complete result; its scores are 90, 91, ... along the path, on test 0.5 more."""
    oracle = select == "oracle"
    path = [
        {
            "ridge": ridge, "status": "ok", "residual": 1e-14, "iterations": 0, "effective_dimension": 12.5,
            "seconds": 0.02, "peak_bytes": 2**20, "jitter": 0.0, "notes": [],
            "train": score(95.0 + k, 1000), "validation": None if oracle else score(90.0 + k),
            "loo": None, "test": score(90.5 + k, 300) if oracle else None,
        }
        for k, ridge in enumerate(RIDGES)
    ]  # fmt: skip
    confusion = [
        [300 // classes - 2 * (i > 0) if i == j else 2 * (j == 0) for j in range(classes)]
        for i in range(classes)
    ]
    result: dict[str, Any] = {
        "megagram": "0.1.0",
        "experiment": "first-run",
        "run": "20260102-030405-abcdef",
        "created": "2026-01-02T03:04:05Z",
        "task": "classification",
        "experiment_table": {},
        "experiment_toml": 'name = "first-run"\n',
        "evaluation": {
            "task": "classification", "select": select, "metric": "accuracy", "ridge": 0.01,
            "classes": list(range(classes)), "train": path[2]["train"], "validation": path[2]["validation"],
            "loo": None, "test": score(92.5, 300), "confusion": confusion, "notes": [], "refit": None, "path": path,
        },
        "data": {
            "source": "digits", "identity": "digits", "digest": "d" * 64, "test_digest": None, "order": "canonical",
            "train": [0, 1000], "validation": [1000, 1200], "test": [1200, 1500], "test_of": "pool",
            "shape": [8, 8, 1], "preprocess": [{"name": "scale", "by": 16}], "warnings": [], "labels": None,
        },
        "kernel": {"description": {"kind": "convolutional", "layers": [LAYER]}, "fingerprint": "f" * 64},
        "solver": {"method": "cholesky", "reason": "the quickest for four ridges", "dtype": "float64"},
        "gram": {
            "dtype": "float32", "tile_side": 128, "tiles_computed": 70, "tiles_reused": 8, "paths": {"numpy": 70},
            "tile_seconds": [0.1, 0.2, 0.3, 0.4], "bytes": 5_000_000,
            "stores": [{"role": "train", "address": "a" * 40, "path": "/data/gram/a", "tiles_needed": 78,
                        "tiles_computed": 70, "tiles_reused": 8}],
        },
        "stages": [{"name": "gram", "seconds": 9.0, "note": "70 tiles"}, {"name": "solve", "seconds": 1.0, "note": ""}],
        "seconds": 10.5,
        "engine": "no Prefect server: stages ran directly",
        "cluster": {"profile": "local", "workers": 2, "worker": {"threads": 1}},
        "provenance": {
            "versions": {"numpy": "2.4.6"}, "python": "3.11.2", "platform": "Linux", "cpu": "a processor", "cores": 2,
            "memory_bytes": 2**34, "gpu": None, "blas": {"core_type": "SkylakeX"}, "command": "megagram run first-run",
        },
        "expected": None,
    }  # fmt: skip
    return {**result, **changes}


def a_regression() -> dict[str, Any]:
    result = a_result(score=lambda value, n=200: errors((100 - value) / 100, n))
    result["evaluation"].update(task="regression", metric="rmse", classes=None, confusion=None)
    return {**result, "task": "regression"}


class Checker(HTMLParser):
    """Collects tags, ids and text, and insists that every element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return checker


def written(result: dict[str, Any], folder: Any) -> tuple[str, str]:
    html = report.build(result, folder)
    return html.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


def cells(markdown_row: str) -> int:
    """Number of cells of a row of a Markdown table: unescaped bars, less one."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", markdown_row)) - 1


# ----------------------------------------------------------------------------------------- the whole page


def test_report_is_complete(tmp_path):
    """Protects the promise that a report names everything that made a result, in both formats."""
    result = a_result()
    html, markdown = written(result, tmp_path)
    page = read(html)
    wanted = [
        "first-run", "92.50 %", "0.01", "chosen on 200 validation samples", "Confusion matrix", "70", "numpy: 70",
        "digits", "d" * 64, "canonical", "rows 1,000 to 1,199 (200)", "name: scale, by: 16", 'name = "first-run"',
        "f" * 64, "numpy 2.4.6", "a processor", "SkylakeX", "/data/gram/a", "megagram run first-run",
        "no Prefect server: stages ran directly", result["run"], "float64", "cholesky",
    ]  # fmt: skip
    plain = markdown.replace("\\", "")
    assert [text for text in wanted if text not in page.text] == []
    assert [text for text in wanted if text not in plain] == []
    assert page.tags["svg"] == 2


def test_the_mix_of_paths_stands_on_every_page(tmp_path):
    """Protects provenance: which code made how many tiles, what was asked for and what there was; on the page of a
    run, of a study, and on the terminal."""
    result = a_result()
    result["gram"]["paths"] = {"compiled avx512": 1060, "numpy": 18}
    result["cluster"]["kernel_path"] = "compiled"
    result["provenance"]["paths"] = {"compiled": "compiled avx512", "cuda": "absent: no GPU"}
    mix = "compiled avx512: 1,060, numpy: 18"
    for text in written(result, tmp_path):
        assert mix in text
        assert "compiled avx512; absent: no GPU" in text
    assert ["Tiles made by", mix, ""] in report.terminal_table(result)[1]
    study = report.make_study("table", "A table", "run", "now", [("one", result, "r.html")])
    assert mix in report.build_study(study, tmp_path).read_text(encoding="utf-8")


def test_report_is_self_contained(tmp_path):
    """Protects offline reading: nothing is loaded from anywhere, no script runs."""
    html, _ = written(a_result(), tmp_path)
    page = read(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith("#") for value in loads)


def test_drawings_follow_the_page_colours(tmp_path):
    """Protects dark mode: every colour in a drawing is one of the page's variables, and no id repeats."""
    html, _ = written(a_result(), tmp_path)
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg) == []
    assert [name for name, times in read(html).ids.items() if times > 1] == []


def test_report_replaces_an_older_one(tmp_path):
    """Protects ``megagram report``: a rebuild leaves exactly the two new files."""
    written(a_result(), tmp_path)
    html, _ = written(a_result(experiment="second"), tmp_path)
    assert "second" in html
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_what_a_user_wrote_is_shown_as_text(tmp_path):
    """Protects the reader: names, labels, notes and configuration never become markup or a script."""
    evil = '<script>alert("1")</script> | *x* [a](javascript:b) `c` $d$'
    result = a_result(experiment=evil, experiment_toml=f'# ``` </pre>\nname = """{evil}"""')
    result["data"].update(labels=[evil, "$x", "_y"], warnings=[evil], source=evil)
    result["evaluation"]["path"][0]["notes"] = [evil]
    study = report.make_study(
        "s", evil, "r", "now", [(evil, result, "javascript:alert(1)"), ("$\\foo", result, "x")]
    )
    html, markdown = written(result, tmp_path)
    table_html = report.build_study(study, tmp_path / "study").read_text(encoding="utf-8")
    for text in (html, table_html):
        page = read(text)
        assert page.tags["script"] == 0
        assert evil in page.text
    assert not any(v and v.startswith("javascript:") for n, v in read(table_html).attributes if n == "href")
    outside_code = re.sub(r"````.*?````", "", markdown, flags=re.DOTALL)
    assert re.findall(r"(?<!\\)<", outside_code) == []
    assert re.findall(r"(?<!\\)\]\(", outside_code) == []


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4))
def test_markdown_tables_keep_their_columns(labels):
    """Protects Markdown tables against labels that hold bars, backslashes or line breaks."""
    table = Table.of(["", "value"], [[label, Cell("1", tone="bad")] for label in labels])
    lines = (
        to_markdown(Page("t", "s", (), (Section("x", (table,)),), "f")).split("## x\n\n")[1].split("\n\n")[0]
    )
    assert [cells(line) for line in lines.split("\n")] == [2] * (len(labels) + 2)


def test_warnings_stand_before_everything_else(tmp_path):
    """Protects warnings of the data and of the evaluation from being overlooked."""
    result = a_result()
    result["data"]["warnings"] = ["the checksum is not the published one"]
    result["evaluation"]["notes"] = ["no training sample has class 2"]
    html, markdown = written(result, tmp_path)
    for text in ("the checksum is not the published one", "no training sample has class 2"):
        assert html.index(text) < html.index("<section>")
        assert markdown.index(text) < markdown.index("## ")


# ------------------------------------------------------------------------------------- kinds of result


def test_without_matplotlib_only_the_plots_are_missing(tmp_path, monkeypatch):
    """Protects the optional extra: the report says what to install and keeps every number."""
    complete, _ = written(a_result(), tmp_path / "with")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    html, markdown = written(a_result(), tmp_path / "without")
    page = read(html)
    assert page.tags["svg"] == 0
    assert NO_PLOTS in page.text
    assert NO_PLOTS in markdown.replace("\\", "")
    assert page.tags["table"] == read(complete).tags["table"]


def test_regression_reports_its_errors(tmp_path):
    """Protects regression: no percent, no confusion matrix, the four measures for each set."""
    html, markdown = written(a_regression(), tmp_path)
    page = read(html)
    assert "root mean squared error of 0.075" in page.text
    assert "explains 99.4 % of their variance" in page.text
    assert "Confusion" not in page.text
    assert "| test | 300 | 0.075 | 0.005625 | 0.06 | 0.9944 |" in markdown


def test_constant_regression_targets_have_no_r2(tmp_path):
    """Protects the case in which the variance to be explained is zero."""
    result = a_regression()
    result["evaluation"]["test"]["r2"] = None
    html, _ = written(result, tmp_path)
    assert "of their variance" not in read(html).text


def test_one_ridge_has_a_table_and_no_curve(tmp_path):
    """Protects runs with a single ridge: nothing was chosen, so nothing claims it was."""
    result = a_result()
    result["evaluation"]["path"] = result["evaluation"]["path"][2:3]
    html, _ = written(result, tmp_path)
    text = read(html).text
    assert "given, the only one tried" in text
    assert "chosen on" not in text
    assert read(html).tags["svg"] == 1  # the tile times


def test_numbers_that_are_not_finite_are_said_to_be_so(tmp_path):
    """Protects the path against a ridge whose scores broke down."""
    result = a_result()
    result["evaluation"]["path"][3].update(validation=accuracy(math.nan), residual=math.inf)
    html, _ = written(result, tmp_path)
    assert read(html).text.count("not finite") == 2
    assert not re.search(r"\b(nan|inf)\b", read(html).text)


def test_many_classes_are_drawn_and_few_are_counted(tmp_path):
    """Protects readability: up to twenty classes as a table of counts, more as a drawing."""
    few, _ = written(a_result(classes=20), tmp_path / "few")
    many, _ = written(a_result(classes=100), tmp_path / "many")
    assert 'class="heat"' in few
    assert 'class="heat"' not in many
    assert read(many).tags["svg"] == read(few).tags["svg"] + 1


def test_most_frequent_mistakes_carry_the_class_names(tmp_path):
    """Protects the order of truth and prediction, and the mapping from class ids to names."""
    result = a_result()
    result["evaluation"].update(confusion=[[90, 7, 0], [1, 100, 0], [0, 3, 99]])
    result["data"]["labels"] = ["cat", "dog", "fox"]
    _, markdown = written(result, tmp_path)
    rows = markdown.split("| true class | taken for | times | of the class |")[1].splitlines()[2:5]
    assert rows == ["| cat | dog | 7 | 7.2 % |", "| fox | dog | 3 | 2.9 % |", "| dog | cat | 1 | 1.0 % |"]


def test_reused_tiles_have_no_times(tmp_path):
    """Protects a resumed run that computed nothing."""
    result = a_result()
    result["gram"].update(tiles_computed=0, tiles_reused=78, tile_seconds=[], paths={})
    html, _ = written(result, tmp_path)
    assert "Every tile was already stored; none was computed." in read(html).text


def test_no_test_set_is_said(tmp_path):
    """Protects runs that only train."""
    result = a_result()
    result["evaluation"].update(test=None, confusion=None)
    result["data"].update(test=None)
    html, _ = written(result, tmp_path)
    assert "no test samples were given" in read(html).text
    assert all("Test" not in row[0] for row in report.terminal_table(result)[1])


def test_generalised_cross_validation_is_shown_as_leave_one_out_is(tmp_path):
    """Protects ``select = "gcv"``: how the ridge was chosen, its score, and that of every ridge."""
    result = a_result("gcv")
    evaluation = result["evaluation"]
    for k, entry in enumerate(evaluation["path"]):
        entry |= {"validation": None, "gcv": accuracy(80.25 + k)}
    evaluation |= {"validation": None, "gcv": evaluation["path"][2]["gcv"]}
    text = to_markdown(report.page(result))
    assert "chosen by generalised cross-validation on the training samples" in text
    assert "GCV accuracy" in text
    assert GCV_CAUTION in text
    assert all(f"{80.25 + k}" in text for k in range(4))


@pytest.mark.parametrize(("method", "estimated"), [("tiled-cholesky", True), ("eigen", False)])
def test_leave_one_out_by_probes_is_said_to_be_an_estimate(method, estimated):
    """Protects from reading an estimate as exact, or its error, which is all that it knows, as an accuracy."""
    result = a_result("loo")
    loo = {"rmse": 0.25, "n": 4000} if estimated else accuracy(80.25)
    result["evaluation"] |= {"validation": None, "loo": loo}
    for entry in result["evaluation"]["path"]:
        entry |= {"validation": None, "loo": loo}
    result["solver"]["method"] = method
    text = to_markdown(report.page(result))
    assert ("leave-one-out, error (RMSE)" in text) == estimated
    (row,) = [row for row in report.terminal_table(result)[1] if row[0].startswith("Leave-one-out")]
    assert row[2].endswith("; estimated") == estimated
    assert row[:2] == (
        ["Leave-one-out error (RMSE)", "0.25"] if estimated else ["Leave-one-out accuracy", "80.25 %"]
    )


def test_recomputed_tiles_and_estimated_dimensions_are_said_to_be_so():
    """Protects from reading an estimate as exact, and from looking for a matrix that nobody stored."""

    def marked(result: dict[str, Any]) -> int:
        return len(re.findall(r"≈\s12\.5", to_markdown(report.page(result))))

    result = a_result()
    assert not marked(result)
    result["evaluation"]["path"][1]["notes"] = ["effective dimension estimated with 32 random probes"]
    assert marked(result) == 1
    result["solver"]["method"] = "conjugate-gradient"
    result["gram"] |= {
        "stores": [],
        "tiles_computed": 0,
        "tiles_reused": 0,
        "paths": {},
        "recomputed": "numpy",
    }
    text = to_markdown(report.page(result))
    assert marked(result) == 4
    assert "No tile was stored" in text
    assert ["Tiles made by", "numpy", ""] in report.terminal_table(result)[1]


def test_edge_of_the_grid_is_pointed_out():
    """Protects against trusting a ridge that a wider grid might better."""
    result = a_result()
    result["evaluation"]["ridge"] = RIDGES[-1]
    (row,) = [row for row in report.terminal_table(result)[1] if row[0] == "Ridge λ"]
    assert "the smallest of the grid, so smaller ones may do better" in row[2]


def test_oracle_is_marked_wherever_a_number_appears(tmp_path):
    """Protects rule five: scores of a ridge chosen on the test set never pass for honest ones."""
    result = a_result("oracle")
    html, markdown = written(result, tmp_path)
    for section in ("Result", "Accuracy against ridge", "Confusion matrix"):
        part = html.split(f"<h2>{section}</h2>")[1].split("</section>")[0]
        assert ORACLE in part
    assert ORACLE in html.split("<h2>")[0]
    assert markdown.count(ORACLE) >= 5
    marked = [row for row in report.terminal_table(result)[1] if ORACLE in row[2]]
    assert [row[0] for row in marked] == ["Test accuracy", "Ridge λ"]
    study = report.make_study("s", "S", "r", "now", [("one", result, "x")])
    assert "test *" in report.study_table(study)[0]
    table_html = report.build_study(study, tmp_path / "study").read_text(encoding="utf-8")
    assert table_html.count(ORACLE) >= 4


def test_honest_selection_is_not_marked(tmp_path):
    """Protects the mark's meaning."""
    html, markdown = written(a_result(), tmp_path)
    assert ORACLE not in html
    assert ORACLE not in markdown


# ---------------------------------------------------------------------------------- expected values


@settings(deadline=None, max_examples=60)
@given(tenths=st.integers(-30, 30), tolerance=st.integers(0, 20))
def test_verdict_is_the_tolerance(tenths, tolerance):
    """Protects pass and not reached: decimal differences of exactly the tolerance pass, on both sides."""
    expected = {"value": round(92.5 - tenths / 10, 1), "tolerance": tolerance / 10, "train": 1000}
    found = verdict(a_result(expected=expected))
    assert found is not None
    assert found.status == ("pass" if abs(tenths) <= tolerance else "not reached")


def test_other_sizes_are_not_comparable():
    """Protects against comparing with a value published for another number of training samples."""
    found = verdict(a_result(expected={"value": 92.5, "tolerance": 1.0, "train": 50000}))
    assert found is not None
    assert found.status == "not comparable"
    assert found.reason == "trained on 1,000 samples, the expected value is for 50,000"
    assert found.largest is None


def test_a_refit_counts_all_its_samples():
    """Protects comparisons with runs that were refitted on training and validation samples."""
    result = a_result(expected={"value": 92.5, "tolerance": 1.0, "train": 1200})
    result["evaluation"]["refit"] = {**result["evaluation"]["path"][2], "train": accuracy(99.0, 1200)}
    assert trained_on(result) == 1200
    assert verdict(result).status == "pass"


def test_the_final_solve_is_the_chosen_ridge_s_or_the_refit_s():
    """Protects reports of results whose chosen ridge and its entry differ in the last digit."""
    evaluation = a_result()["evaluation"]
    chosen = evaluation["path"][2]
    assert final_solve({"evaluation": {**evaluation, "ridge": 0.01 * (1 + 1e-15)}}) is chosen
    refit = {**chosen, "status": "not converged"}
    assert final_solve({"evaluation": {**evaluation, "refit": refit}}) is refit


def test_expected_path_is_matched_ridge_by_ridge(tmp_path):
    """Protects published tables over ridges: keys are ridges as a person writes them."""
    path = {"1": 90.5, "1e-1": 91.5, "1e-2": 92.9, "0.001": 93.5}
    result = a_result("oracle", expected={"path": path, "tolerance": 0.3, "source": "a table"})
    found = verdict(result)
    assert [round(c.difference, 9) for c in found.comparisons] == [0.0, 0.0, -0.4, 0.0]
    assert (found.status, found.reason) == ("not reached", "1 of 4 outside the tolerance")
    html, _ = written(result, tmp_path)
    assert 'class="bad">-0.40' in html
    assert html.count('class="good">+0.00') == 3


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (a_result(), "a test score at each ridge exists only with"),
        (a_result("oracle"), "1 of 2 expected numbers were not computed"),
    ],
)
def test_expected_path_that_was_not_computed_is_not_comparable(result, reason):
    """Protects a pass from being given to what was never run."""
    found = verdict({**result, "expected": {"path": {"1": 90.5, "1e-7": 99.0}, "tolerance": 0.3}})
    assert found.status == "not comparable"
    assert reason in found.reason


def test_score_that_is_not_finite_is_not_reached():
    """Protects against NaN passing every comparison."""
    result = a_result(expected={"value": 92.5, "tolerance": 0.5})
    result["evaluation"]["test"]["accuracy"] = math.nan
    assert verdict(result).status == "not reached"


# --------------------------------------------------------------------------------------------- studies


def a_study() -> dict[str, Any]:
    values = [("reached", 92.4), ("missed", 90.0), ("none", None)]
    variants = []
    for label, value in values:
        expected = {"value": value, "tolerance": 0.5, "train": 1000} if value else None
        variants.append((label, a_result(expected=expected), f"../{label}/r.html"))
    return report.make_study("table", "A table", "run", "now", variants)


def test_study_shows_each_value_beside_the_expected_one(tmp_path):
    """Protects the table that a study exists for: obtained, expected, difference, tolerance, verdict."""
    header, rows = report.study_table(a_study())
    assert header == ["", "test", "validation", "ridge λ", "expected", "difference", "tolerance", "verdict"]
    assert rows == [
        ["reached", "92.50 %", "92.00 %", "0.01", "92.40 %", "+0.10", "0.5", "pass"],
        ["missed", "92.50 %", "92.00 %", "0.01", "90.00 %", "+2.50", "0.5", "not reached"],
        ["none", "92.50 %", "92.00 %", "0.01", "–", "–", "–", "–"],
    ]
    html = report.build_study(a_study(), tmp_path).read_text(encoding="utf-8")
    assert "1 pass, 1 not reached, 1 without an expected value" in read(html).text
    assert ("href", "../missed/r.html") in read(html).attributes
    assert read(html).tags["svg"] == 1


def test_study_over_ridges_judges_each_number(tmp_path):
    """Protects tables of test scores at every ridge, as the digits tables are."""
    expected = {"path": {"1": 90.5, "1e-1": 95.0}, "tolerance": 0.4}
    study = report.make_study("t", "T", "r", "now", [("one", a_result("oracle", expected=expected), "x")])
    html = report.build_study(study, tmp_path).read_text(encoding="utf-8")
    part = html.split("<h2>Test scores at each ridge λ</h2>")[1].split("</section>")[0]
    assert re.findall(r'class="(good|bad)">([\d.]+)', part) == [("good", "90.50"), ("bad", "91.50")]
    assert "95.00, -3.50" in part
    assert "92.50" in part  # a ridge of which nothing was expected


def test_study_is_json_and_leaves_its_results_alone():
    """Protects what is stored: building a page changes nothing in it."""
    study = a_study()
    before = copy.deepcopy(study)
    report.study_table(study)
    assert study == before


# --------------------------------------------------------------------------------------------- wording


@settings(deadline=None)
@given(st.floats(1e-14, 1e4))
def test_a_ridge_reads_back(ridge):
    """Protects ridges from being rounded away in a table."""
    assert float(ridge_text(ridge)) == pytest.approx(ridge, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (seconds_text(2e-4), "200 µs"), (seconds_text(0.25), "250 ms"), (seconds_text(12.34), "12.3 s"),
        (seconds_text(600), "10.0 min"), (seconds_text(7500), "2 h 05 min"), (seconds_text(None), "–"),
        (seconds_text(0.99999), "1000 ms"), (bytes_text(10), "10 B"), (bytes_text(3 * 2**29), "1.5 GiB"),
        (bytes_text(1023.6 * 2**20), "1024 MiB"), (ridge_text(1e-5), "1e-5"), (ridge_text(1.0), "1"),
        (number_text(97738.7), "97,700"), (number_text(999.6), "1,000"), (number_text(9.41e-5), "9.41e-05"),
        (number_text(1e9), "1e+09"), (score_text(98.6, "accuracy"), "98.60 %"),
        (score_text(0.123456, "rmse"), "0.1235"),
    ],
)  # fmt: skip
def test_numbers_read_naturally(text, wanted):
    """Protects units and precision."""
    assert text == wanted


def test_a_long_message_is_cut_off_between_words():
    """Protects what a message of damage says: also where one of its words, as a path, is longer than a line."""
    assert first_line(ValueError("word " * 100)) == "word " * 31 + "..."
    assert first_line(ValueError("short\nand more")) == "short"
    assert first_line(OSError("cannot open /" + "x" * 300)) == "cannot open /" + "x" * 143 + " ..."
    assert first_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"


def test_kernels_have_names_that_people_use():
    """Protects the summary sentence for every kind of kernel, unknown ones included."""
    ntk = {"kind": "fully-connected", "family": "ntk", "depth": 3}
    assert kernel_phrase(ntk) == "the neural tangent kernel of a fully connected network of 3 layers"
    assert kernel_phrase({"kind": "scaled", "weight": 2.0, "term": ntk}) == kernel_phrase(ntk)
    assert kernel_phrase({"kind": "convolutional", "layers": [LAYER]}) == (
        "a convolutional kernel of 1 layer (exponential 0.6)"
    )
    turned = {
        "kind": "roto-translation",
        "final": "rot+gap",
        "rotations": 8,
        "tangent": True,
        "layers": [LAYER],
    }
    assert kernel_phrase(turned) == (
        "a roto-translation neural tangent kernel of 1 layer (exponential 0.6; rot+gap over 8 rotations)"
    )
    assert kernel_phrase({"kind": "sum", "terms": [ntk, ntk]}) == "a sum of 2 kernels"
    assert kernel_phrase({"kind": "my-own", "size": 3}) == "a my-own kernel"


@pytest.mark.parametrize(
    ("test_of", "where"),
    [
        ("pool", "the pool"),
        ("test set", "the source's own test set"),
        ("test set, turned by 90 degrees", "the source's own test set, turned by 90 degrees"),
    ],
)
def test_the_headline_says_what_was_tested(test_of, where, tmp_path):
    """Protects from taking a turned test set of the source's own for rows of the pool."""
    result = a_result()
    result["data"]["test_of"] = test_of
    _, markdown = written(result, tmp_path)
    assert f"of {where};" in markdown.replace("\\", "")


def test_an_empty_table_and_a_code_fence_survive():
    """Protects the writers at their edges: no rows, and code that holds a fence."""
    page = Page("t", "s", ("w",), (Section("x", (Table.of(["a"], []), Text("note", "note"))),), "f")
    assert read(to_html(page)).tags["table"] == 1
    assert "| a |" in to_markdown(page)
