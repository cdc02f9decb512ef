"""The command ``megagram``. Heavy imports happen inside the commands: ``--help`` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipelines.experiment import Study

EXIT_CODES = """
Exit codes: 0 done; 1 unexpected error; 2 invalid command, experiment or profile; 3 data missing or bad;
4 does not fit memory or disk; 5 a store is damaged or does not match; 6 numerical failure;
7 cluster or server failure; 8 disk full; 9 a table's figure missed its tolerance; 130 interrupted;
143 ended by SIGTERM.
"""

app = typer.Typer(
    name="megagram",
    help="Large-scale kernel experiments: one TOML file in, a trained, evaluated, reported model out."
    + "\n\n"
    + " ".join(EXIT_CODES.split()),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
store_app = typer.Typer(no_args_is_help=True, help="What lies under a root.", rich_markup_mode=None)
app.add_typer(store_app, name="store")

ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A TOML file, or the name of a shipped experiment.")
]
RootOption = Annotated[
    Path,
    typer.Option(
        "--root",
        envvar="MEGAGRAM_ROOT",
        metavar="DIR",
        help="Folder of all stores and results.",
    ),
]
ClusterOption = Annotated[
    str, typer.Option("--cluster", metavar="PROFILE", help="A shipped cluster profile, or a TOML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the experiment, e.g. data.train=500."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
DEFAULT_ROOT = Path("megagram-root")


def example(text: str) -> str:
    """The epilog of a command's help."""
    return f"Example: {text}"


@app.command(epilog=example("megagram run quickstart"))
def run(
    experiment: ExperimentArgument,
    root: RootOption = DEFAULT_ROOT,
    cluster: ClusterOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment, or a table of them; run it again to resume. Nothing stored is computed twice."""
    _prepare_blas()
    from .display import Terminal
    from .run import run_study

    study = _load(experiment, overrides)
    with Terminal() as display:
        outcome = run_study(study, root, cluster, display, command=_command())
    _print_outcome(outcome, as_json)
    if outcome.missed:
        raise typer.Exit(9)


@app.command(epilog=example("megagram plan mnist-ntk-3 --set data.train=20000"))
def plan(
    experiment: ExperimentArgument,
    root: RootOption = DEFAULT_ROOT,
    cluster: ClusterOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would compute: tiles, operations, disk, memory, time. Exit code 4 if it cannot fit."""
    _prepare_blas()
    from .display import table
    from .facts import plans
    from .plan_table import plan_rows

    made = plans(_load(experiment, overrides), root, cluster)
    for one in made:
        table(("", "", ""), plan_rows(one), title=f"Plan of {one.experiment}")
    if as_json:
        print(json.dumps(made[0].json() if len(made) == 1 else [one.json() for one in made]))
    for one in made:
        one.check()


@app.command(epilog=example("megagram status quickstart"))
def status(
    what: Annotated[
        str, typer.Argument(metavar="EXPERIMENT|STORE", help="An experiment, or a store's path.")
    ],
    root: RootOption = DEFAULT_ROOT,
    as_json: JsonOption = False,
) -> None:
    """Stages and tiles done, rate, remaining time, failed tiles: read from the store alone."""
    from .status import experiment_status, status_rows, store_status

    path = Path(what)
    is_store = (path / "zarr.json").exists()
    found = [store_status(path)] if is_store else experiment_status(what, root)
    from .display import table

    for one in found:
        table(("", ""), status_rows(one), title=one["title"])
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found))


@app.command(epilog=example("megagram verify megagram-root/gram/0123456789abcdef01234567 --repair"))
def verify(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A store, or a root: then every store in it.")
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Set bad tiles aside, so that the next run computes them again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every tile; name missing, damaged and non-finite ones. Exit code 5 if any is bad."""
    from pipelines.verify import verify as check
    from pipelines.verify import verify_rows

    from .display import Terminal, table

    with Terminal() as display:
        checked = check(store, repair=repair, progress=display.progress)
    table(
        ("store", "chunks", "missing", "bad", "not computed", "temporaries", "remark"), verify_rows(checked)
    )
    for one in checked:
        for line in (*one.bad, *one.missing):
            print(line)
    if as_json:
        print(json.dumps([one.json() for one in checked]))
    if any(one.bad or one.missing for one in checked):
        if not repair:
            raise typer.Exit(5)
        print("bad tiles are set aside: run the experiment again to compute them")


@app.command(epilog=example("megagram gram kernel.toml --x X.npy --out K.npy"))
def gram(
    kernel: Annotated[Path, typer.Argument(metavar="KERNEL.toml", help="A file with a kernel table.")],
    x: Annotated[Path, typer.Option("--x", metavar="X.npy", help="(n, d) vectors or (n, h, w, c) images.")],
    out: Annotated[Path, typer.Option("--out", metavar="K.npy|K.zarr", help="The dense matrix.")],
    y: Annotated[
        Path | None, typer.Option("--y", metavar="Y.npy", help="Columns; X itself if absent.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="float32 or float64.")] = "float64",
    cluster: ClusterOption = "local",
    as_json: JsonOption = False,
) -> None:
    """The Gram matrix of your own arrays: tiled, resumable, finally dense with both triangles.

    Without --y a sample meets itself with a cosine of exactly 1; equal rows of two files do not.
    """
    _prepare_blas()
    from .arrays import gram_of_arrays
    from .display import Terminal

    with Terminal() as display:
        facts = gram_of_arrays(kernel, x, y, out, dtype, cluster, display)
    print(f"{facts['out']}: {facts['shape'][0]} x {facts['shape'][1]} {dtype}")
    if as_json:
        print(json.dumps(facts))


@app.command(epilog=example("megagram predict quickstart --x X.npy --out y.npy"))
def predict(
    experiment: ExperimentArgument,
    x: Annotated[Path, typer.Option("--x", metavar="X.npy", help="New samples, (n, ...) as the data set's.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="y.npy", help="Labels (n,), or values (n, t) of a regression.")
    ],
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="S.npy", help="The scores (n, t) behind them as well.")
    ] = None,
    root: RootOption = DEFAULT_ROOT,
    cluster: ClusterOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict new samples with the model of an experiment's newest run.

    X has the values of the data set itself, before preprocessing, which is done here as it was for training:
    bytes from 0 to 255 for mnist, fashion-mnist and cifar10, 0 to 16 for digits, for your own arrays whatever those
    hold. Images of one channel may be (n, h, w). However many samples there are, memory stays bounded.
    """
    _prepare_blas()
    from .display import Terminal
    from .predict import predict_arrays

    study = _load(experiment, overrides)
    with Terminal() as display:
        facts = predict_arrays(study, x, out, scores, root, cluster, display)
    print(
        f"{facts['out']}: {facts['samples']} samples predicted by run {facts['run']} of {facts['experiment']}"
    )
    if as_json:
        print(json.dumps(facts))


@app.command(epilog=example("megagram compare random-features-convergence --features 64,256,1024"))
def compare(
    experiment: ExperimentArgument,
    features: Annotated[
        str,
        typer.Option(
            "--features", metavar="SIZES", help="Sizes such as 64,256,1024; layer by layer 64x256,64x1024."
        ),
    ],
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="Training samples; no more for validation and test.")
    ] = 1000,
    repeat: Annotated[
        int, typer.Option("--repeat", metavar="R", help="Seeds for each size: the experiment's and the next.")
    ] = 1,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="MEASURE=ERROR", help="How many features it needs, e.g. relF=0.01."),
    ] = None,
    root: RootOption = DEFAULT_ROOT,
    cluster: ClusterOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare explicit features of several sizes with the exact kernel they stand for, on some samples.

    SIZES take the place of widths, landmarks or anchors in the experiment's [features]; a single number counts for all
    layers. Errors are relF, relOp and relMax of the two matrices; ridge regression with both is scored alike.
    """
    _prepare_blas()
    from .compare import compare_features
    from .display import Terminal, table

    study = _load(experiment, overrides)
    with Terminal() as display:
        outcome = compare_features(
            study, features, samples, repeat, target or (), root, cluster, display, command=_command()
        )
    for title, header, rows in outcome.tables:
        table(header, rows, title=title)
    for text in outcome.sentences:
        print(text)
    print(f"Report: {outcome.report}")
    if as_json:
        print(json.dumps(outcome.json()))
    if outcome.missed:
        raise typer.Exit(9)


@app.command(epilog=example("megagram report quickstart"))
def report(
    experiment: ExperimentArgument,
    root: RootOption = DEFAULT_ROOT,
    overrides: SetOption = None,
    show: Annotated[bool, typer.Option("--show", help="Show the report on the terminal as well.")] = False,
) -> None:
    """Build the report of the experiment's newest run again."""
    from .display import page
    from .run import rebuild_reports

    paths = rebuild_reports(_load(experiment, overrides), root)
    if show:
        page(paths[0].with_suffix(".md"))
    for path in paths:
        print(path)


@app.command("list", epilog=example("megagram list"))
def list_(as_json: JsonOption = False) -> None:
    """Shipped experiments, with their size and the time to expect on this machine."""
    from .display import table
    from .facts import shipped_rows

    header, rows = shipped_rows()
    table(header, rows)
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in rows]))


@app.command(epilog=example("megagram doctor"))
def doctor(root: RootOption = DEFAULT_ROOT, as_json: JsonOption = False) -> None:
    """Versions, BLAS and its core type, threads, GPU or why not, root reachable, server up or not."""
    _prepare_blas()
    from .display import table
    from .facts import doctor_facts

    facts = doctor_facts(root)
    table(("", ""), list(facts.items()))
    if as_json:
        print(json.dumps(facts))


@app.command(epilog=example("megagram server --port 4200"))
def server(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port of the server and its pages.")] = 4200,
) -> None:
    """Run a Prefect server in the foreground; runs on this machine report to it while it is up."""
    from .server import serve

    serve(host, port)


@store_app.command("list", epilog=example("megagram store list"))
def store_list(root: RootOption = DEFAULT_ROOT, as_json: JsonOption = False) -> None:
    """What lies under a root: kind, size, and which experiments use it."""
    from pipelines.inventory import inventory, inventory_rows

    from .display import table

    found = inventory(root)
    table(("store", "kind", "size", "holds", "used by"), inventory_rows(found))
    if as_json:
        print(json.dumps([one.json() for one in found]))


@store_app.command("clean", epilog=example("megagram store clean --yes"))
def store_clean(
    root: RootOption = DEFAULT_ROOT,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the stores that no experiment's result uses, after asking."""
    from pipelines.inventory import inventory, inventory_rows, remove, unused

    from .display import table

    found = unused(inventory(root))
    if not found:
        print(f"{root}: nothing to remove; every store is used by a result or by a run in progress")
        return
    table(("store", "kind", "size", "holds", "used by"), inventory_rows(found))
    if not yes and not typer.confirm(f"Remove these {len(found)} stores?"):
        raise typer.Exit(0)
    print(f"removed {remove(found)}")


def main() -> None:
    """Entry point: errors that a user can mend are one line and an exit code, without a traceback."""
    try:
        # No traceback of ours either way; MEGAGRAM_DEBUG=1 shows it.
        code = app(standalone_mode=False)
        if code == 130:  # what Ctrl-C within a command comes back as
            _fail(INTERRUPTED, 130)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        _fail(INTERRUPTED, 130)
    except SystemExit as ended:
        if ended.code == 143:
            _fail(TERMINATED, 143)
        raise
    except BrokenPipeError:
        # The reader of our output, head say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)
            sys.exit(2)
        if os.environ.get("MEGAGRAM_DEBUG"):
            raise
        _fail(*_explained(error))


INTERRUPTED = "interrupted; what is stored is kept, run the same command again to resume"
TERMINATED = "ended by signal 15; what is stored is kept, run the same command again to resume"


def _explained(error: Exception) -> tuple[str, int]:
    """One line and an exit code for any error."""
    # By name and attributes: depending on its version, typer raises click's exceptions or its own copies.
    if type(error).__name__ == "Abort":
        return INTERRUPTED, 130
    code = getattr(error, "exit_code", None)
    text = " ".join((error.format_message() if hasattr(error, "format_message") else str(error)).split())
    if isinstance(code, int):
        return text, code
    return f"unexpected {type(error).__name__}: {text} (set MEGAGRAM_DEBUG=1 for the traceback)", 1


def _fail(text: str, code: int) -> None:
    print(f"megagram: error: {text}", file=sys.stderr)
    sys.exit(code)


def _prepare_blas() -> None:
    """Choose the BLAS core type before NumPy is imported."""
    from cluster.worker import set_blas_environment

    set_blas_environment()


def _load(experiment: str, overrides: list[str] | None) -> Study:
    from pipelines.experiment import load

    return load(experiment, overrides or ())


def _command() -> str:
    return " ".join(["megagram", *sys.argv[1:]])


def _print_outcome(outcome: Any, as_json: bool) -> None:
    from .display import table

    for title, header, rows in outcome.tables:
        table(header, rows, title=title)
    print(f"Report: {outcome.report}")
    if as_json:
        print(json.dumps(outcome.json()))


if __name__ == "__main__":
    main()
