"""The experiment file: what is valid, what is refused, and that every refusal names the key."""

from __future__ import annotations

import copy
import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines import experiment
from pipelines.errors import ExperimentError
from pipelines.experiment import Experiment, load, merged

BASE: dict[str, Any] = {
    "name": "base",
    "task": "classification",
    "seed": 3,
    "description": "everything there is",
    "label": "base",
    "data": {
        "source": "digits",
        "folder": "somewhere",
        "order": "canonical",
        "train": 100,
        "validation": 50,
        "test": [1000, 1100],
        "preprocess": ["scale"],
    },
    "kernel": {"kind": "fully-connected", "family": "ntk", "depth": 3, "normalized": False},
    "gram": {"dtype": "float32", "joint": True},
    "solve": {
        "method": "auto",
        "dtype": "float64",
        "ridges": [1.0, 0.1],
        "select": "validation",
        "refit": False,
        "absolute": False,
        "jitter": 0.0,
    },
    "expected": {
        "source": "a paper",
        "value": 98.0,
        "tolerance": 0.1,
        "train": 100,
        "metric": "accuracy",
        "note": "none",
    },
}
ARRAYS = {"source": "arrays", "X": "X.npy", "y": "y.npy", "train": 10, "validation": 5}


def toml(table: dict[str, Any]) -> str:
    """A table as TOML: JSON's values are TOML's, but for tables, which are written inline."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in item.items()) + " }"
        if isinstance(item, list):
            return "[" + ", ".join(value(v) for v in item) + "]"
        return json.dumps(item)

    return "".join(f"{json.dumps(key)} = {value(item)}\n" for key, item in table.items())


def changed(path: str, value: Any, base: dict[str, Any] = BASE) -> dict[str, Any]:
    table = copy.deepcopy(base)
    here = table
    *parents, last = path.split(".")
    for parent in parents:
        here = here.setdefault(parent, {})
    here[last] = value
    return table


def without(path: str, base: dict[str, Any] = BASE) -> dict[str, Any]:
    table = copy.deepcopy(base)
    here = table
    *parents, last = path.split(".")
    for parent in parents:
        here = here[parent]
    del here[last]
    return table


def read(folder: Path, table: dict[str, Any], *overrides: str, name: str = "e.toml") -> Experiment:
    path = folder / name
    path.write_text(toml(table))
    (one,) = load(path, overrides).experiments
    return one


def refusal(folder: Path, table: dict[str, Any], *overrides: str) -> str:
    """The one line with which a table is refused; it begins with the file."""
    with pytest.raises(ExperimentError) as caught:
        read(folder, table, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_the_whole_table_is_valid(tmp_path: Path) -> None:
    """Protects the format: every key that there is, and what it becomes."""
    one = read(tmp_path, BASE)
    assert (one.data.train, one.data.validation, one.data.test) == (100, 50, (1000, 1100))
    assert one.solve.ridges == (1.0, 0.1)
    assert one.kernel_object.describe()["depth"] == 3
    assert one.data.permutation is None


def keys_of(table: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in table.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += keys_of(value, (*prefix, key))
    return found


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(keys_of(BASE)), st.data())
def test_any_misspelt_key_is_named_with_the_right_one(key: tuple[str, ...], data: st.DataObject) -> None:
    """Protects against a key that is silently ignored: one letter dropped, doubled, swapped or replaced."""
    word = key[-1]
    at = data.draw(st.integers(0, len(word) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
    typo = data.draw(
        st.sampled_from(
            [
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at:],
                word[:at] + letter + word[at + 1 :],
                word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
            ]
        )
    )
    table = copy.deepcopy(BASE)
    here = table
    for parent in key[:-1]:
        here = here[parent]
    assume(typo and typo not in here and typo not in ("X", "y"))
    here[typo] = here.pop(word)
    with pytest.raises(ExperimentError) as caught:
        experiment._experiment(table, Path("e.toml"))
    text = str(caught.value)
    if key == ("kernel", "kind"):
        assert "kernel.kind is missing" in text
        return
    assert ".".join((*key[:-1], typo)) in text
    named = text.partition("did you mean ")[2]
    # Of short words another may be as near, and "forder" is no nearer to folder than to order.
    assert word in named or len(word) < 5 or likeness(named.strip('"?'), typo) >= likeness(word, typo)


def likeness(word: str, typo: str) -> float:
    return SequenceMatcher(None, typo, word).ratio()


@pytest.mark.parametrize(
    ("table", "named", "nearest"),
    [
        (changed("slove", {}), "slove", "solve"),
        (changed("data.trian", 5), "data.trian", "train"),
        (changed("data.validation", {"randm": 5}), "data.validation.randm", "random"),
        (changed("data.order", {"permutaton": 5}), "data.order.permutaton", "permutation"),
        (changed("gram.dtpye", "float32"), "gram.dtpye", "dtype"),
        (changed("solve.rigdes", [1.0]), "solve.rigdes", "ridges"),
        (changed("expected.tolerence", 1.0), "expected.tolerence", "tolerance"),
        (changed("kernel.dept", 4), "kernel.dept", "depth"),
        (changed("data.source", "mnst"), "data.source", "mnist"),
        (changed("solve.method", "choleski"), "solve.method", "cholesky"),
        (changed("kernel.kind", "fully-conected"), "kernel.kind", "fully-connected"),
        (changed("data.preprocess", ["standardize"]), "data.preprocess", "standardise"),
        (changed("data.preprocess", [{"name": "zca", "ridg": 1.0}]), "data.preprocess", "ridge"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    tmp_path: Path, table: dict[str, Any], named: str, nearest: str
) -> None:
    """Protects ``unknown keys are errors that name the nearest valid one``, at every level of the file."""
    text = refusal(tmp_path, table)
    assert text.startswith(str(tmp_path / "e.toml"))
    assert named in text
    assert nearest in text.partition("did you mean")[2]


@pytest.mark.parametrize(
    "key", ["name", "data", "kernel", "solve", "data.source", "data.train", "solve.ridges"]
)
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    """Protects against a file that lacks what has no default."""
    assert f"{key} is missing" in refusal(tmp_path, without(key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "../escape"),
        ("name", 5),
        ("task", "clustering"),
        ("seed", -1),
        ("seed", True),
        ("seed", 1.5),
        ("seed", 2**32),
        ("data", 3),
        ("data.train", 0),
        ("data.train", -5),
        ("data.train", True),
        ("data.train", 1.5),
        ("data.train", "100"),
        ("data.train", [5]),
        ("data.train", [5, 3]),
        ("data.train", [5, 5]),
        ("data.train", [-1, 5]),
        ("data.train", [True, 5]),
        ("data.train", [0, 5, 10]),
        ("data.train", {"random": 5}),
        ("data.validation", 0),
        ("data.validation", [9, 3]),
        ("data.validation", {"random": 0}),
        ("data.validation", {"random": True}),
        ("data.validation", {}),
        ("data.test", -1),
        ("data.turn_test", 45),
        ("data.turn_test", "90"),
        ("data.order", "reversed"),
        ("data.order", {"permutation": -1}),
        ("data.order", {"permutation": 2**32}),
        ("data.preprocess", "scale"),
        ("data.preprocess", [3]),
        ("data.preprocess", [{"by": 3}]),
        ("data.preprocess", [{"name": "scale", "by": -1}]),
        ("gram.dtype", "float16"),
        ("gram.joint", 1),
        ("gram.joint", "yes"),
        ("solve.ridges", []),
        ("solve.ridges", 0.1),
        ("solve.ridges", [0.0]),
        ("solve.ridges", [-1e-3]),
        ("solve.ridges", [True]),
        ("solve.ridges", ["0.1"]),
        ("solve.ridges", [0.1, 0.1]),
        ("solve.select", "best"),
        ("solve.refit", "true"),
        ("solve.refit", 1),
        ("solve.jitter", -1.0),
        ("solve.jitter", True),
        ("solve.dtype", "int8"),
        ("expected.tolerance", -0.1),
        ("expected.value", "98"),
        ("expected.train", 0),
        ("kernel", "ntk"),
        ("kernel", {}),
        ("kernel.depth", 0),
        ("kernel.depth", 2.5),
        ("kernel.family", 3),
    ],
)
def test_bad_values_are_refused_by_key(tmp_path: Path, key: str, value: Any) -> None:
    """Protects ``every value checked before work starts``: the wrong type or value, named by its key."""
    assert f": {key}" in refusal(tmp_path, changed(key, value))


@pytest.mark.parametrize("ridge", ["nan", "inf", "-inf"])
def test_ridges_are_finite(tmp_path: Path, ridge: str) -> None:
    """Protects the solver from TOML's own words for what is no number."""
    path = tmp_path / "e.toml"
    path.write_text(toml(BASE).replace('"ridges" = [1.0, 0.1]', f'"ridges" = [{ridge}]'))
    with pytest.raises(ExperimentError, match=r"solve\.ridges"):
        load(path)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (without("data.validation"), "data.validation"),
        (changed("solve.select", "oracle", without("data.test")), "data.test"),
        (changed("data.turn_test", 90, without("data.test")), "give test as well"),
        (changed("solve.refit", True, changed("solve.select", "oracle")), "exclude"),
        (
            changed("solve.refit", True, changed("solve.select", "loo", without("data.validation"))),
            "data.validation",
        ),
        (changed("data.X", "X.npy"), "arrays"),
        (changed("data", without("X", ARRAYS)), "data.X"),
        (changed("data", without("y", ARRAYS)), "data.y"),
        (changed("data", {**ARRAYS, "folder": "x"}), "folder"),
        (changed("data", {**ARRAYS, "X_test": "x.npy"}), "y_test"),
        (changed("expected.path", {"0.1": 98.0}), "either"),
        (changed("expected", {"source": "s", "tolerance": 1.0}), "either"),
        (changed("expected", {"source": "s", "tolerance": 1.0, "path": {"tiny": 1.0}}), "tiny"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    """Protects against a selection without its data, a data set of two kinds, a comparison with nothing."""
    assert said in refusal(tmp_path, table)


GRADIENT, FALKON = {"method": "conjugate-gradient"}, {"method": "nystrom", "centres": 10}
TILED, RECOMPUTED = {"method": "tiled-cholesky"}, {"gram": {"tiles": "recomputed"}}


@pytest.mark.parametrize(
    ("solve", "sections", "said"),
    [
        ({"method": "nystrom"}, {}, 'solve: method = "nystrom" needs centres'),
        ({**GRADIENT, "centres": 10}, {}, 'centres goes with method = "nystrom" alone'),
        ({"centres": 10}, {}, "centres goes with"),
        ({**FALKON, "centres": 0}, {}, "solve.centres"),
        ({**TILED, "tolerance": 1e-4}, {}, 'tolerance has no meaning for method = "tiled-cholesky"'),
        ({"method": "eigen", "max_iterations": 9}, {}, "max_iterations has no meaning"),
        ({**GRADIENT, "tolerance": 0.0}, {}, "solve.tolerance"),
        ({**GRADIENT, "tolerance": 1.0}, {}, "solve.tolerance"),
        ({**GRADIENT, "max_iterations": 0}, {}, "solve.max_iterations"),
        ({**GRADIENT, "dtype": "mixed"}, {}, 'dtype = "mixed" has no meaning'),
        ({**FALKON, "dtype": "float32"}, {}, 'dtype = "float32" has no meaning'),
        ({"method": "eigen", "dtype": "float32"}, {}, 'dtype = "float32" has no meaning'),
        ({**GRADIENT, "select": "loo"}, {}, 'use select = "gcv"'),
        ({**FALKON, "select": "loo"}, {}, 'use select = "gcv"'),
        (TILED, RECOMPUTED, 'gram.tiles = "recomputed" goes with solve.method'),
        ({"method": "cholesky"}, RECOMPUTED, 'gram.tiles = "recomputed" goes with solve.method'),
        ({"method": "falkon"}, {}, 'solve.method = "falkon" works on [features], and there are none'),
        ({"select": "loo"}, RECOMPUTED, 'gram.tiles = "recomputed" excludes solve.select = "loo"'),
        ({"dtype": "float32"}, RECOMPUTED, 'gram.tiles = "recomputed" excludes solve.dtype'),
        ({}, {"gram": {"tiles": "kept"}}, "gram.tiles"),
        ({"ridges": [1.0, 0.0]}, {}, "solve.ridges"),
        ({"ridges": [-1e-3]}, {}, "solve.ridges"),
    ],
)
def test_options_without_a_meaning_for_the_method_are_refused(
    tmp_path: Path, solve: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    """Protects from an option that is read and forgotten: an error before any work, naming the keys."""
    table = {**BASE, **{k: {**BASE.get(k, {}), **v} for k, v in sections.items()}}
    assert said in refusal(tmp_path, {**table, "solve": {**BASE["solve"], **solve}})


@pytest.mark.parametrize(
    "solve",
    [
        {**GRADIENT, "tolerance": 1e-4, "max_iterations": 50, "select": "gcv"},
        FALKON,
        {**TILED, "dtype": "mixed"},
        {"dtype": "mixed", "select": "gcv"},
        {"tolerance": 1e-3},
    ],
)
def test_options_with_a_meaning_are_taken_and_survive_their_own_table(
    tmp_path: Path, solve: dict[str, Any]
) -> None:
    """Protects reports and reruns: what a result says of its experiment is an experiment again."""
    path = tmp_path / "e.toml"
    path.write_text(toml({**BASE, "solve": {**BASE["solve"], **solve}}))
    (one,) = load(path).experiments
    assert type(one).model_validate(one.table()) == one
    for key, value in solve.items():
        assert getattr(one.solve, key) == value


def test_whole_numbers_pass_for_real_ones(tmp_path: Path) -> None:
    """Protects ``ridges = [1, 0.1]``: largest first, whatever the order in the file."""
    assert read(tmp_path, changed("solve.ridges", [0.1, 1])).solve.ridges == (1.0, 0.1)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """Protects against TOML errors without a file name, binary rubbish, a folder, and a file that is not there."""
    broken = tmp_path / "broken.toml"
    for content in (b"name = ", b"\xff\xfe", b"[data\n"):
        broken.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"broken\.toml.*TOML"):
            load(broken)
    for absent in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(ExperimentError, match="no such file"):
            load(absent)


def test_an_unknown_shipped_name_is_met_with_the_nearest() -> None:
    """Protects ``megagram run quikstart``."""
    with pytest.raises(ExperimentError, match='did you mean "quickstart"'):
        load("quikstart")


def test_extends_merges_over_a_chain(tmp_path: Path) -> None:
    """Protects inheritance: tables merge key by key, arrays are replaced, the nearest file wins."""
    (tmp_path / "a.toml").write_text(toml(BASE))
    (tmp_path / "b.toml").write_text(toml({"extends": "a.toml", "name": "b", "solve": {"ridges": [5.0]}}))
    one = read(tmp_path, {"extends": "b.toml", "name": "c", "data": {"train": 7}})
    assert (one.name, one.data.train, one.data.validation) == ("c", 7, 50)
    assert one.solve.ridges == (5.0,)
    assert one.kernel["depth"] == 3


def test_extends_a_shipped_experiment(tmp_path: Path) -> None:
    """Protects ``extends = "quickstart"`` from anywhere."""
    assert read(tmp_path, {"extends": "quickstart", "name": "mine"}).data.source == "digits"


def test_a_kernel_of_another_kind_replaces_the_base_whole(tmp_path: Path) -> None:
    """Protects against parameters of one kernel that reach another through inheritance."""
    (tmp_path / "a.toml").write_text(toml(BASE))
    kernel = {"kind": "dot-product", "kernel": "linear"}
    assert read(tmp_path, {"extends": "a.toml", "kernel": kernel}).kernel == kernel
    assert read(tmp_path, {"extends": "a.toml", "kernel": {"depth": 5}}).kernel["family"] == "ntk"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_extends_in_a_circle_is_refused(tmp_path: Path, length: int) -> None:
    """Protects against endless reading."""
    for k in range(length):
        (tmp_path / f"{k}.toml").write_text(toml({"extends": f"{(k + 1) % length}.toml"}))
    with pytest.raises(ExperimentError, match="extends itself"):
        load(tmp_path / "0.toml")


def test_extends_names_what_it_does_not_find(tmp_path: Path) -> None:
    """Protects against a base that is not there, or is no text."""
    assert "nowhere.toml" in refusal(tmp_path, {"extends": "nowhere.toml"})
    assert "extends must be" in refusal(tmp_path, {"extends": 5})


tables = st.recursive(
    st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
dictionaries = st.dictionaries(st.sampled_from("abcd"), tables, max_size=4)


@settings(deadline=None, max_examples=80)
@given(dictionaries, dictionaries, dictionaries)
def test_merging_is_associative_and_idempotent(a: dict, b: dict, c: dict) -> None:
    """Protects chains of ``extends``: how they are bracketed makes no difference, nor does repeating one."""
    assert merged(a, {}) == a
    assert merged(merged(a, b), b) == merged(a, b)
    # Where a value stands between two tables the last table starts anew only if the bracket kept it apart.
    if not _value_between_tables(a, b, c):
        assert merged(merged(a, b), c) == merged(a, merged(b, c))


def _value_between_tables(a: Any, b: Any, c: Any) -> bool:
    if not isinstance(b, dict):
        return isinstance(a, dict) and isinstance(c, dict)
    both = [x if isinstance(x, dict) else {} for x in (a, b, c)]
    return any(
        k in both[1] and _value_between_tables(both[0].get(k), both[1][k], both[2].get(k)) for k in both[2]
    )


def test_variants_share_a_base(tmp_path: Path) -> None:
    """Protects studies: each variant is the base with its own keys, named after its label."""
    table = {
        **BASE,
        "variants": [{"label": "Deep & wide!", "kernel": {"depth": 5}}, {"label": "b", "name": "own-name"}],
    }
    (tmp_path / "s.toml").write_text(toml(table))
    study = load(tmp_path / "s.toml")
    assert study.is_table
    assert [e.name for e in study.experiments] == ["base-deep-wide", "own-name"]
    assert [e.kernel["depth"] for e in study.experiments] == [5, 3]
    assert [e.label for e in study.experiments] == ["Deep & wide!", "b"]


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ([], "variants"),
        (3, "variants"),
        ({"label": "x"}, "variants"),
        (["x"], "variants"),
        ([{"kernel": {"depth": 2}}], r"variants\[0\] needs a label"),
        ([{"label": "a"}, {"label": "A"}], "same label"),
        ([{"label": "a", "kernel": {"dept": 2}}], "dept"),
        ([{"label": "a", "extends": "quickstart"}], "extends"),
    ],
)
def test_bad_variants_are_refused(tmp_path: Path, variants: Any, said: str) -> None:
    """Protects studies from variants that are no tables, nameless, of one name, or misspelt."""
    (tmp_path / "s.toml").write_text(toml({**BASE, "variants": variants}))
    with pytest.raises(ExperimentError, match=said):
        load(tmp_path / "s.toml")


def test_paths_are_relative_to_the_file_that_says_them(tmp_path: Path) -> None:
    """Protects experiments started from another folder: base, heir and variant each mean their own."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "b.toml").write_text(toml({**BASE, "data": ARRAYS}))
    heir = {
        "extends": "base/b.toml",
        "data": {"y": "labels.npy"},
        "variants": [{"label": "v", "data": {"X": "v.npy"}}],
    }
    (tmp_path / "e.toml").write_text(toml(heir))
    (one,) = load(tmp_path / "e.toml").experiments
    assert (one.data.X, one.data.y) == (str(tmp_path / "v.npy"), str(tmp_path / "labels.npy"))
    (base,) = load(tmp_path / "base" / "b.toml").experiments
    assert (base.data.X, base.data.y) == (str(tmp_path / "base" / "X.npy"), str(tmp_path / "base" / "y.npy"))


@pytest.mark.parametrize(
    ("override", "read_back", "value"),
    [
        ("data.train=5", lambda e: e.data.train, 5),
        ("data.train=[5, 9]", lambda e: e.data.train, (5, 9)),
        ("data.validation={random = 7}", lambda e: e.data.validation.random, 7),
        ("solve.ridges=[1e-3]", lambda e: e.solve.ridges, (1e-3,)),
        ("solve.ridges.1=0.5", lambda e: e.solve.ridges, (1.0, 0.5)),
        ("data.source=mnist", lambda e: e.data.source, "mnist"),
        ('data.source="mnist"', lambda e: e.data.source, "mnist"),
        (" seed = 9 ", lambda e: e.seed, 9),
        ("gram.joint=false", lambda e: e.gram.joint, False),
        ("kernel.depth=7", lambda e: e.kernel_object.describe()["depth"], 7),
        ("description=a=b", lambda e: e.description, "a=b"),
    ],
)
def test_overrides_change_a_key(tmp_path: Path, override: str, read_back: Any, value: Any) -> None:
    """Protects ``--set``: numbers, lists, tables, entries of lists by index, words without quotes."""
    assert read_back(read(tmp_path, BASE, override)) == value


def test_overrides_create_a_table(tmp_path: Path) -> None:
    """Protects ``--set gram.dtype=float64`` where the file has no [gram]."""
    assert read(tmp_path, without("gram"), "gram.dtype=float64").gram.dtype == "float64"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train", "key.path=value"),
        ("=5", "key.path=value"),
        ("data..train=5", "key.path=value"),
        ("data.trian=5", "data.trian"),
        ("name.first=5", "name is not a table"),
        ("solve.ridges.7=5", "not an index"),
        ("solve.ridges.-1=5", "not an index"),
        ("solve.ridges=0", "solve.ridges"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, said: str) -> None:
    """Protects ``--set`` against a missing sign, misspelt keys, entries that are not there, bad values."""
    assert said in refusal(tmp_path, BASE, override)


def test_overrides_reach_variants_that_set_the_key_themselves(tmp_path: Path) -> None:
    """Protects ``--set data.train=5`` on a study: no variant keeps its own number, none gains keys."""
    variants = [{"label": "a", "data": {"train": 9}}, {"label": "b", "kernel": {"depth": 2}}]
    (tmp_path / "s.toml").write_text(toml({**BASE, "variants": variants}))
    study = load(tmp_path / "s.toml", ["data.train=5", "kernel.depth=4"])
    assert [e.data.train for e in study.experiments] == [5, 5]
    assert [e.kernel["depth"] for e in study.experiments] == [4, 4]


def test_a_kernel_file_is_a_table_alone_or_an_experiment(tmp_path: Path) -> None:
    """Protects ``megagram gram KERNEL.toml``: both forms, and errors that name file and key."""
    alone = tmp_path / "k.toml"
    alone.write_text(toml(BASE["kernel"]))
    whole = tmp_path / "e.toml"
    whole.write_text(toml(BASE))
    assert experiment.read_kernel(alone).fingerprint == experiment.read_kernel(whole).fingerprint
    alone.write_text(toml({**BASE["kernel"], "dept": 3}))
    with pytest.raises(ExperimentError, match=r"k\.toml.*dept.*depth"):
        experiment.read_kernel(alone)


def test_the_table_of_an_experiment_makes_it_again(tmp_path: Path) -> None:
    """Protects reports: the table that they print is the experiment."""
    one = read(tmp_path, BASE)
    again = Experiment.model_validate(json.loads(json.dumps(one.table())))
    assert again.table() == one.table()


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    """Protects files of editors that begin UTF-8 with a mark."""
    file = tmp_path / "e.toml"
    file.write_bytes(b"\xef\xbb\xbf" + toml(BASE).encode())
    (one,) = load(file).experiments
    assert one.name == BASE["name"]


@pytest.mark.parametrize("where", ["x" * 5000, "x" * 5000 + ".toml", "a/" * 3000, "a\0b", "a\0b.toml"])
def test_names_that_no_system_takes_are_refused(tmp_path: Path, where: str) -> None:
    """Protects the command line and ``extends`` from arguments that are too long, and from long answers."""
    with pytest.raises(ExperimentError, match=r"no such file|no shipped experiment") as caught:
        load(where)
    assert len(str(caught.value)) < 400
    (tmp_path / "e.toml").write_text(toml({**BASE, "extends": where}))
    with pytest.raises(ExperimentError):
        load(tmp_path / "e.toml")


@pytest.mark.parametrize("name", ["", "-a", "a b", "ä", "a/b", "x" * 101, 3])
def test_a_bad_name_says_which_characters_are_allowed(tmp_path: Path, name: Any) -> None:
    """Protects from answers in regular expressions."""
    said = refusal(tmp_path, changed("name", name))
    assert "name: must be 1 to 100 letters, digits, dots, underscores or hyphens" in said
    assert "^" not in said


@pytest.mark.parametrize("terms", [3, "x", {"kind": "dot-product"}, [3]])
def test_terms_that_are_no_list_are_refused(tmp_path: Path, terms: Any) -> None:
    """Protects sums from terms of another type, in experiments and in kernel files."""
    kernel = {"kind": "sum", "terms": terms}
    assert "kernel.terms" in refusal(tmp_path, changed("kernel", kernel))
    (tmp_path / "k.toml").write_text(toml(kernel))
    with pytest.raises(ExperimentError, match=r"kernel\.terms"):
        experiment.read_kernel(tmp_path / "k.toml")
