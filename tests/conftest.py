"""What all tests share: an environment of their own, a root of their own, and small synthetic pools."""

from __future__ import annotations

import ast
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    # Imported by the fixtures that use it: tests of kernels/ run where Zarr and Dask are not installed.
    import small

# Test processes beside each other have a core each, and threads of a product would wait for those of another: in this
# process, where a plugin may have loaded NumPy by now, and in those that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    from threadpoolctl import threadpool_limits

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    threadpool_limits(1, user_api="blas")

# What a shell starts in the background, and all that this starts, ignores Ctrl-C; tests send it to their children.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Under another name: tests that run in several processes begin with the environment that the first has cleared.
REAL_DATA = os.environ.setdefault("TESTED_DATA", os.environ.get("MEGAGRAM_DATA", ""))

# A server, a data folder or a root of the person who runs the tests must not change what is tested.
for name in list(os.environ):
    if name.startswith(("MEGAGRAM_", "PREFECT_")):
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def headers_are_parsed_one_at_a_time() -> Iterator[None]:
    """Workers of some tests are threads, and the parser of CPython 3.11 fails where a thread that reads the header of
    an array is interrupted by another (SystemError: AST constructor recursion depth mismatch). A worker of a run is a
    process with one such thread."""
    lock, parse = threading.Lock(), ast.literal_eval

    def parse_alone(text: str) -> object:
        with lock:
            return parse(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "literal_eval", parse_alone)
        yield


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with published copies of MNIST, Fashion-MNIST and CIFAR-10; a test that asks for it is
    skipped where there is none."""
    if not REAL_DATA:
        pytest.skip(
            "needs MEGAGRAM_DATA: a folder with the published files of MNIST, Fashion-MNIST, CIFAR-10"
        )
    monkeypatch.setenv("MEGAGRAM_DATA", REAL_DATA)
    return Path(REAL_DATA)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for stores and results; it does not exist yet."""
    return tmp_path / "root"


@pytest.fixture
def samples(tmp_path: Path) -> small.Samples:
    """72 samples of 5 values in three classes, as files of the user's own."""
    import small

    return small.Samples(tmp_path / "data").write(72)


@pytest.fixture
def tiles_of_16(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 16 samples in place of thousands, so that a matrix of a few dozen samples has several."""
    import small

    small.use_tile_side(16, monkeypatch.setattr)
    return 16


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
