"""Predictions for a user's new samples with the model of an experiment's newest result."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from cluster.profiles import Profile
from cluster.signals import sigterm_unwinds
from cluster.watchdog import explain
from pipelines import gram, leases, modelfiles, predictions, results, tasks
from pipelines.array_files import open_array
from pipelines.errors import DataError, ExperimentError
from pipelines.experiment import Study
from pipelines.files import disk_errors
from pipelines.site import Site

from .machines import Cluster
from .work import Display

ALONE_SECONDS = 10.0
"""What this process would do in less is not worth starting workers for."""
ALONE_BYTES = 2**30
"""What this process may hold where it computes; half of it are prepared samples that it keeps."""


def predict_arrays(
    study: Study, x: Path, out: Path, scores: Path | None, root: Path, profile: str, display: Display
) -> dict[str, Any]:
    """Predict the samples of ``x`` into ``out``: (n,) labels, or (n, t) values of a regression.

    scores: gets the (n, t) float64 scores that the labels were chosen by. Both files appear when they are whole.
    Returns paths, number of samples, what predicted them, seconds.

    Raises:
        ExperimentError: a table of experiments, or an output that exists or cannot be.
        StoreError: no result yet, or what its model needs is gone; run the experiment (again).
        DataError: samples that the model does not take.
    """
    started = time.perf_counter()
    if study.is_table:
        names = ", ".join(one.name for one in study.experiments[:3])
        raise ExperimentError(
            f"{study.name} is a table of {len(study.experiments)} experiments ({names}, ...), each with a model of its"
            " own; give a single experiment"
        )
    (experiment,) = study.experiments
    outputs = {"--out": out} if scores is None else {"--out": out, "--scores": scores}
    _check_outputs(outputs)
    root = root.resolve()
    folder, result = results.newest(root, experiment.name, experiment.table())
    fitted = modelfiles.load(folder)
    X = fitted.check(_open(x), str(x))
    working = root / "solves" / f"prediction-{results.new_run_id()}"
    with sigterm_unwinds(), Cluster(Profile.load(profile), root, display.line) as cluster:
        display.stage(experiment.name, f"prediction by run {result['run']}")
        alone = predictions.seconds(fitted, len(X), root) < ALONE_SECONDS
        workers: tasks.Open = tasks.Workers if alone else cluster.workers
        room = ALONE_BYTES if alone else cluster.resources.memory
        none = np.zeros((1, fitted.coefficients.shape[1]))
        try:
            with (
                Site(working, workers, room) as site,
                _Rows(out, len(X), fitted.answers(none)) as answers,
                _Rows(scores, len(X), none) as values,
            ):
                for _, found in predictions.slabs(fitted, X, root, site, _progress(display)):
                    answers.append(fitted.answers(found))
                    values.append(found)
        except Exception as error:
            raise explain(error) or error from None
        finally:
            shutil.rmtree(working, ignore_errors=True)
            gram.forget()
    return {
        "out": str(out),
        "scores": None if scores is None else str(scores),
        "samples": len(X),
        "experiment": experiment.name,
        "run": result["run"],
        "ridge": fitted.ridge,
        "trained_on": len(fitted.rows),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _progress(display: Display) -> Callable[[int, int], None]:
    return lambda done, total: display.progress(done, total, "predicting samples")


def _open(x: Path) -> np.ndarray:
    if x.suffix != ".npy":
        raise DataError(f"--x {x}: samples are read from a .npy file; write one with numpy.save")
    return open_array(x, ["--x"])


def _check_outputs(outputs: dict[str, Path]) -> None:
    for option, path in outputs.items():
        if path.suffix != ".npy":
            raise ExperimentError(f"{option} {path}: predictions are written as .npy")
        if not path.resolve().parent.is_dir():
            raise ExperimentError(f"{option} {path}: there is no folder {path.resolve().parent}")
        if path.exists():
            raise ExperimentError(f"{option} {path}: exists already; remove it or choose another name")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise ExperimentError(f"--scores {outputs['--scores']}: is the file of --out; choose another name")


def _here() -> str:
    """A short name of this machine or container, within which a pid means something."""
    return hashlib.sha256(leases.machine().encode()).hexdigest()[:12]


def _remove_leftovers(path: Path) -> None:
    """Remove what predictions into ``path`` that were killed on this machine left beside it."""
    for left in path.parent.glob(glob.escape(f".{path.name}.{_here()}-") + "*-????????"):
        pid = left.name.rsplit("-", 2)[1]
        if pid.isdigit() and leases.process_started(int(pid)) == 0.0:
            left.unlink(missing_ok=True)


class _Rows:
    """An array file that grows row by row and gets its name when it is whole; nothing where there is no path.

    n: how many rows it will have. like: an array of such rows.
    """

    def __init__(self, path: Path | None, n: int, like: np.ndarray) -> None:
        self._path = path
        self._shape = (n, *like.shape[1:])
        self._dtype = like.dtype
        self._stream: BinaryIO | None = None

    def __enter__(self) -> _Rows:
        if self._path is not None:
            _remove_leftovers(self._path)
            begun = f"{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._temporary = self._path.with_name(f".{self._path.name}.{begun}")
            with disk_errors(self._path.parent):
                self._stream = self._temporary.open("wb")
                described = np.lib.format.dtype_to_descr(self._dtype)
                np.lib.format.write_array_header_1_0(
                    self._stream, {"descr": described, "fortran_order": False, "shape": self._shape}
                )
        return self

    def append(self, rows: np.ndarray) -> None:
        if self._stream is not None and self._path is not None:
            with disk_errors(self._path.parent):
                self._stream.write(np.ascontiguousarray(rows, self._dtype).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is None or self._path is None:
            return
        try:
            with disk_errors(self._path.parent):
                self._stream.close()
                if error is None:
                    os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)
