"""Data sets: canonical formats and own arrays come in whole and right, or with one clear error."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.server
import io
import json
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import canonical
from pipelines.datasets import (
    Pool,
    block_digests,
    duplicates_across,
    infer_task,
    load,
    order,
    pool_digest,
    read_labels,
    require_two_classes,
    short_samples,
    validate,
)
from pipelines.errors import DataError, DiskFull, ExperimentError


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_files():
    """Contents of the four files of a small set in MNIST's format: 7 training images, 3 test images."""
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": idx(rng.integers(0, 256, (7, 28, 28), np.uint8)),
        "train-labels-idx1-ubyte": idx(np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)),
        "t10k-images-idx3-ubyte": idx(rng.integers(0, 256, (3, 28, 28), np.uint8)),
        "t10k-labels-idx1-ubyte": idx(np.array([6, 5, 3], np.uint8)),
    }


@pytest.fixture
def cifar_files():
    rng = np.random.default_rng(1)
    files = {}
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (2, 3073), np.uint8)
        records[:, 0] %= 10
        files[name] = records.tobytes()
    return files


def write(folder, files, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def published(monkeypatch):
    """Make ``files`` the published ones of a source, served from ``url`` (nowhere unless given)."""

    def publish(name, files, url="http://127.0.0.1:9/", archive=None):
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        digest = hashlib.sha256(archive).hexdigest() if archive else None
        source = replace(canonical.SOURCES[name], url=url, sha256=digests, archive_sha256=digest)
        monkeypatch.setitem(canonical.SOURCES, name, source)

    return publish


@pytest.fixture
def server():
    """An HTTP server on this machine; returns its address and the dict of what it serves."""
    served: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.get(self.path.removeprefix("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/", served
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def no_network(monkeypatch):
    """Every connection fails at once, as on a machine without a network."""

    def refuse(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Published sources


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = load("digits")
    np.testing.assert_array_equal(dataset.train.X[..., 0], bunch.images)
    np.testing.assert_array_equal(dataset.train.y, bunch.target)
    assert dataset.train.X.dtype == np.uint8
    assert dataset.train.X.shape == (1797, 8, 8, 1)
    assert dataset.train.y.dtype == np.int64
    assert dataset.test is None
    assert (dataset.scale, dataset.identity, dataset.warnings) == (16.0, "digits", ())
    assert dataset.train.labels == tuple("0123456789")
    validate(dataset.train, "classification")


def test_digits_load_without_importing_scikit_learn():
    """The quickstart must not pay for that import."""
    code = "import sys, pipelines.datasets as d; d.load('digits'); sys.exit('sklearn' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_damaged_digits_are_refused(monkeypatch, tmp_path):
    """The file inside the installed package may be damaged or another one."""
    folder = tmp_path / "datasets" / "data"
    folder.mkdir(parents=True)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(canonical.importlib.util, "find_spec", lambda _: spec)
    for content in (b"no gzip", gzip.compress(b"1,2,x\n"), gzip.compress(b"1,2,3\n" * 9)):
        (folder / "digits.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"digits\.csv\.gz .*reinstall scikit-learn"):
            load("digits")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_as_they_are(name, compress, idx_files, published, tmp_path):
    published(name, idx_files)
    write(tmp_path / name, idx_files, compress)
    dataset = load(name, data_dir=tmp_path)
    assert dataset.train.X.shape == (7, 28, 28, 1)
    assert dataset.test.X.shape == (3, 28, 28, 1)
    assert dataset.train.X.tobytes() == idx_files["train-images-idx3-ubyte"][16:]
    np.testing.assert_array_equal(dataset.train.y, [3, 1, 4, 1, 5, 9, 2])
    np.testing.assert_array_equal(dataset.test.y, [6, 5, 3])
    assert dataset.train.X.dtype == np.uint8
    assert dataset.train.y.dtype == np.int64
    assert (dataset.scale, dataset.identity, dataset.warnings) == (255.0, name, ())
    assert len(dataset.train.labels) == 10
    validate(dataset.train, "classification")


@pytest.mark.parametrize("place", ["cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", "cifar10", "."])
def test_cifar_batches_are_read_in_order_with_channels_last(place, cifar_files, published, tmp_path):
    """Record r of batch b is row 2 (b - 1) + r; byte 1 + 1024 q + 32 i + j of a record is pixel (i, j, q)."""
    published("cifar10", cifar_files, archive=b"-")
    write(tmp_path / place, cifar_files)
    dataset = load("cifar10", data_dir=tmp_path)
    assert dataset.train.X.shape == (10, 32, 32, 3)
    assert dataset.test.X.shape == (2, 32, 32, 3)
    record = cifar_files["data_batch_3.bin"][3073:]
    assert dataset.train.y[5] == record[0]
    for i, j, q in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (30, 17, 2)):
        assert dataset.train.X[5, i, j, q] == record[1 + 1024 * q + 32 * i + j]
    assert dataset.train.labels[3] == "cat"
    assert dataset.warnings == ()


def test_a_file_that_is_not_the_published_one_is_used_with_a_warning(idx_files, published, tmp_path):
    published("mnist", idx_files)
    changed = idx_files | {"train-labels-idx1-ubyte": idx(np.array([0, 1, 4, 1, 5, 9, 2], np.uint8))}
    write(tmp_path / "mnist", changed, compress=True)
    dataset = load("mnist", data_dir=tmp_path)
    assert dataset.train.y[0] == 0
    assert len(dataset.warnings) == 1
    assert str(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz") in dataset.warnings[0]


def test_the_published_tables_name_every_file_once():
    """A digest copied twice, or cut short, would make a right file look wrong."""
    digests = [d for source in canonical.SOURCES.values() for d in source.sha256.values()]
    assert len(set(digests)) == len(digests) == 14
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)
    assert all(source.url.startswith("https://") for source in canonical.SOURCES.values())


def damage(files, name, change):
    return files | {name: change(files[name])}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], "truncated"),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "too long"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "truncated within its header"),
        ("train-images-idx3-ubyte", lambda b: b"", "begins with nothing"),
        ("train-images-idx3-ubyte", lambda b: b"\0\0\x0d\3" + b[4:], "not 00000803"),
        ("train-images-idx3-ubyte", lambda _: idx(np.zeros((7, 20, 28), np.uint8)), "20 x 28 pixels"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.array([1, 2, 10], np.uint8)), "label 10 of row 2"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.array([1, 2], np.uint8)), "3 images .* 2 labels"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(name, change, words, idx_files, published, tmp_path):
    published("mnist", idx_files)
    write(tmp_path / "mnist", damage(idx_files, name, change))
    with pytest.raises(DataError, match=words) as caught:
        load("mnist", data_dir=tmp_path)
    assert str(tmp_path / "mnist" / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [10, 50, -4])
def test_truncated_gzip_files_are_refused_by_name(cut, idx_files, published, tmp_path):
    published("mnist", idx_files)
    write(tmp_path / "mnist", idx_files, compress=True)
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:-1], "not a whole number of 3073-byte records"),
        (lambda b: b"", "not a whole number"),
        (lambda b: b[:3073] + b"\x0a" + b[3074:], "label 10 of row 1"),
    ],
)
def test_damaged_cifar_batches_are_refused_by_name(change, words, cifar_files, published, tmp_path):
    published("cifar10", cifar_files, archive=b"-")
    write(tmp_path, damage(cifar_files, "data_batch_2.bin", change))
    with pytest.raises(DataError, match=words) as caught:
        load("cifar10", data_dir=tmp_path)
    assert str(tmp_path / "data_batch_2.bin") in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(content=st.binary(max_size=60), axes=st.sampled_from([1, 3]))
def test_arbitrary_bytes_never_parse_as_idx_by_accident(content, axes):
    """Either a DataError, or the bytes are exactly what their own array would be written as."""
    try:
        array = canonical.parse_idx(content, Path("file"), axes)
    except DataError:
        return
    assert idx(array) == content


def test_flat_folders_are_taken_where_the_labels_tell_the_set(idx_files, published, tmp_path, no_network):
    """MNIST and Fashion-MNIST have the same file names: neither may be taken for the other."""
    fashion = idx_files | {"train-labels-idx1-ubyte": idx(np.array([9, 9, 9, 9, 0, 0, 0], np.uint8))}
    published("mnist", idx_files)
    published("fashion-mnist", fashion)
    write(tmp_path, fashion, compress=True)
    assert load("fashion-mnist", data_dir=tmp_path).train.y[0] == 9
    with pytest.raises(DataError, match="mnist is not in"):
        load("mnist", data_dir=tmp_path)
    write(tmp_path, {"train-labels-idx1-ubyte": idx(np.zeros(7, np.uint8))}, compress=True)
    with pytest.raises(DataError, match=r"may be MNIST or Fashion-MNIST; move them to .*/mnist"):
        load("mnist", data_dir=tmp_path)


def test_the_data_folder_is_the_argument_else_the_environment_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAGRAM_DATA", str(tmp_path / "set"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert canonical.data_folder(tmp_path / "given") == tmp_path / "given"
    assert canonical.data_folder() == tmp_path / "set"
    monkeypatch.delenv("MEGAGRAM_DATA")
    assert canonical.data_folder() == tmp_path / "cache" / "megagram" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert canonical.data_folder() == Path.home() / ".cache" / "megagram" / "data"


# Downloads


def left_over(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_missing_idx_files_are_downloaded_and_kept(server, idx_files, published, tmp_path, no_proxy):
    url, served = server
    published("mnist", idx_files, url)
    served.update({f"{name}.gz": gzip.compress(content) for name, content in idx_files.items()})
    write(tmp_path / "mnist", {"t10k-labels-idx1-ubyte": idx_files["t10k-labels-idx1-ubyte"]})
    first = load("mnist", data_dir=tmp_path)
    served.clear()
    again = load("mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(first.train.X, again.train.X)
    assert again.warnings == ()
    assert left_over(tmp_path) == [
        "mnist/t10k-images-idx3-ubyte.gz",
        "mnist/t10k-labels-idx1-ubyte",
        "mnist/train-images-idx3-ubyte.gz",
        "mnist/train-labels-idx1-ubyte.gz",
    ]


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def cifar_archive(files, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in (*files.items(), *extra):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_the_cifar_archive_is_downloaded_and_only_its_batches_are_kept(
    server, cifar_files, published, tmp_path, no_proxy
):
    """No path inside the archive decides where anything is written."""
    url, served = server
    archive = cifar_archive(cifar_files, [("../../outside.bin", b"x"), ("readme.html", b"x")])
    served["cifar.tar.gz"] = archive
    published("cifar10", cifar_files, url + "cifar.tar.gz", archive)
    dataset = load("cifar10", data_dir=tmp_path / "data")
    assert dataset.warnings == ()
    assert dataset.train.X.shape == (10, 32, 32, 3)
    assert left_over(tmp_path) == sorted(f"data/cifar10/cifar-10-batches-bin/{name}" for name in cifar_files)


@pytest.mark.parametrize("wrong", ["another file", "truncated", "no gzip"])
def test_a_download_with_a_wrong_checksum_is_an_error_and_nothing_is_kept(
    wrong, server, idx_files, published, tmp_path, no_proxy
):
    url, served = server
    published("mnist", idx_files, url)
    served.update({f"{name}.gz": gzip.compress(content) for name, content in idx_files.items()})
    right = served["train-images-idx3-ubyte.gz"]
    served["train-images-idx3-ubyte.gz"] = {
        "another file": gzip.compress(idx(np.zeros((7, 28, 28), np.uint8))),
        "truncated": right[:-20],
        "no gzip": b"<html>sign in to this wireless network</html>",
    }[wrong]
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz sent is damaged or not the published"):
        load("mnist", data_dir=tmp_path)
    assert left_over(tmp_path) == []


def test_a_damaged_cifar_download_leaves_nothing(server, cifar_files, published, tmp_path, no_proxy):
    url, served = server
    archive = cifar_archive(cifar_files)
    served["cifar.tar.gz"] = archive[:-1] + b"x"
    published("cifar10", cifar_files, url + "cifar.tar.gz", archive)
    with pytest.raises(DataError, match="nothing was kept"):
        load("cifar10", data_dir=tmp_path)
    assert left_over(tmp_path) == []


def test_a_file_that_is_gone_from_its_server_is_one_clear_error(
    server, idx_files, published, tmp_path, no_proxy
):
    published("mnist", idx_files, server[0])
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*404") as caught:
        load("mnist", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_without_a_network_the_error_says_which_files_go_where(name, tmp_path, no_network, no_proxy):
    with pytest.raises(DataError, match="MEGAGRAM_DATA") as caught:
        load(name, data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path / canonical.SOURCES[name].folder) in message
    assert ("test_batch.bin" if name == "cifar10" else "t10k-labels-idx1-ubyte.gz") in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, no_network):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="MEGAGRAM_DATA"):
        load("mnist", data_dir=tmp_path / "file")


def test_a_full_disk_is_told_as_such(monkeypatch, tmp_path, idx_files, published, server, no_proxy):
    """Not as a network that fails: the user must free space, not look for files."""
    published("mnist", idx_files, server[0])
    server[1].update({f"{name}.gz": gzip.compress(content) for name, content in idx_files.items()})

    def refuse(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DiskFull, match="no space left on"):
        load("mnist", data_dir=tmp_path)


# Own arrays


def save(folder, **arrays):
    paths = {}
    for key, array in arrays.items():
        paths[key] = str(folder / f"{key}.npy")
        np.save(paths[key], array)
    return paths


@pytest.mark.parametrize("kind", ["npy", "npz", "npz-only-one", "zarr3", "zarr2"])
def test_arrays_come_in_from_every_format(kind, tmp_path):
    X = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    y = np.array([2, 0, 2, 5, 5, 0])
    paths = {}
    for key, array in (("X", X), ("y", y)):
        path = tmp_path / f"{key}.{kind[:4].rstrip('23-')}"
        paths[key] = str(path)
        if kind == "npy":
            np.save(path, array)
        elif kind == "npz":
            np.savez_compressed(path, other=np.zeros(2), **{key: array})
        elif kind == "npz-only-one":
            np.savez(path, values=array)
        else:
            store = zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=(2,) * array.ndim,
                                      zarr_format=int(kind[-1]))  # fmt: skip
            store[...] = array
    dataset = load("arrays", paths=paths)
    np.testing.assert_array_equal(dataset.train.X, X)
    assert dataset.train.X.dtype == np.float32
    np.testing.assert_array_equal(dataset.train.y, [1, 0, 1, 2, 2, 0])
    assert dataset.train.labels == ("0", "2", "5")
    assert dataset.test is None
    assert dataset.scale == 1.0
    validate(dataset.train, "classification")


def test_npy_files_are_memory_mapped_and_cannot_be_changed(tmp_path):
    """A user's file of 100 GB must not be read whole, and never be written."""
    paths = save(tmp_path, X=np.zeros((5, 3)))
    X = load("arrays", paths=paths).train.X
    assert not X.flags.writeable
    assert isinstance(X.base, np.memmap)


def test_images_without_channels_get_one(tmp_path):
    grey = np.zeros((5, 3, 7), np.uint8)
    colour = np.zeros((5, 3, 7, 3), np.uint8)
    assert load("arrays", paths=save(tmp_path, X=grey)).train.X.shape == (5, 3, 7, 1)
    assert load("arrays", paths=save(tmp_path, X=colour)).train.X.shape == (5, 3, 7, 3)


def test_a_test_set_shares_the_labels_of_training(tmp_path):
    """Ids count the sorted labels of both parts, so that an id means one class in both."""
    paths = save(tmp_path, X=np.zeros((3, 2)), y=np.array(["dog", "ant", "dog"]),
                 X_test=np.zeros((2, 2)), y_test=np.array(["cat", "dog"]))  # fmt: skip
    dataset = load("arrays", paths=paths)
    assert dataset.train.labels == dataset.test.labels == ("ant", "cat", "dog")
    np.testing.assert_array_equal(dataset.train.y, [2, 0, 2])
    np.testing.assert_array_equal(dataset.test.y, [1, 2])


def test_one_npz_for_all_never_takes_training_data_for_the_test_set(tmp_path):
    path = str(tmp_path / "all.npz")
    np.savez(path, X=np.zeros((3, 2)), y=np.arange(3), X_test=np.ones((1, 2)), y_test=np.arange(1))
    keys = ("X", "y", "X_test", "y_test")
    assert load("arrays", paths=dict.fromkeys(keys, path)).test.X[0, 0] == 1
    np.savez(path, X=np.zeros((3, 2)), y=np.arange(3))
    with pytest.raises(DataError, match="no array 'X_test'; it has X, y"):
        load("arrays", paths=dict.fromkeys(keys, path))


@settings(deadline=None, max_examples=25)
@given(names=st.lists(st.text("abcxyz", min_size=1, max_size=4), min_size=1, max_size=20))
def test_labels_go_to_ids_and_back(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    for y in (np.array(names), np.array(names, dtype="S")):
        pool = load("arrays", paths=save(folder, X=np.zeros((len(names), 1)), y=y)).train
        assert [pool.labels[i] for i in pool.y] == names
        assert list(pool.labels) == sorted(set(names))


@pytest.mark.parametrize(
    ("y", "task", "inferred"),
    [
        (np.array([-1, 1, 1]), None, "classification"),
        (np.array([True, False, True]), None, "classification"),
        (np.array(["a", "b", "a"]), None, "classification"),
        (np.array([0.5, 1.0, 2.0]), None, "regression"),
        (np.array([[0.5, 1.0]] * 3), None, "regression"),
        (np.array([1, 2, 3]), "regression", "regression"),
        (np.array([0.0, 1.0, 1.0]), "classification", "classification"),
    ],
)
def test_the_task_is_inferred_or_obeyed(y, task, inferred, tmp_path):
    """Class ids are int64 and contiguous, targets float64; validate agrees."""
    pool = load("arrays", paths=save(tmp_path, X=np.zeros((3, 2)), y=y), task=task).train
    assert infer_task(pool.y) == inferred
    assert pool.y.dtype == (np.int64 if inferred == "classification" else np.float64)
    assert (pool.labels is not None) == (inferred == "classification")
    assert pool.y.shape == y.shape
    validate(pool, inferred)


def test_a_column_of_targets_becomes_a_vector(tmp_path):
    paths = save(tmp_path, X=np.zeros((3, 2)), y=np.array([[0.5], [1.5], [2.5]]))
    np.testing.assert_array_equal(load("arrays", paths=paths).train.y, [0.5, 1.5, 2.5])


def test_doubtful_inferences_are_told(tmp_path):
    """Whole numbers stored as floats may be classes, hundreds of integers may be quantities."""
    whole = save(tmp_path, X=np.zeros((3, 2)), y=np.array([0.0, 1.0, 1.0]))
    assert 'set task = "classification"' in load("arrays", paths=whole).warnings[0]
    assert load("arrays", paths=whole, task="regression").warnings == ()
    many = save(tmp_path, X=np.zeros((300, 2)), y=np.arange(300))
    assert 'set task = "regression"' in load("arrays", paths=many).warnings[0]
    assert load("arrays", paths=many, task="classification").warnings == ()


X4 = np.zeros((4, 2))


@pytest.mark.parametrize(
    ("arrays", "task", "words"),
    [
        ({"X": np.zeros((4, 2), complex)}, None, "dtype complex128"),
        ({"X": np.array([["a", "b"]])}, None, "must be bool, integer or real"),
        ({"X": np.zeros(4)}, None, r"shape \(4,\)"),
        ({"X": np.zeros((2, 2, 2, 2, 2))}, None, r"\(n, h, w, c\) images"),
        ({"X": np.zeros((0, 3))}, None, "is empty"),
        ({"X": np.zeros((3, 0))}, None, "is empty"),
        ({"X": X4, "y": np.arange(3)}, None, "3 labels but .* 4 samples"),
        ({"X": X4, "y": np.zeros(4, complex)}, None, "dtype complex128"),
        ({"X": X4, "y": np.float64(3)}, None, r"shape \(\)"),
        ({"X": X4, "y": np.zeros((4, 2, 2))}, None, r"shape \(4, 2, 2\)"),
        ({"X": X4, "y": np.zeros((4, 2), int)}, None, r"class labels must be \(n,\)"),
        ({"X": X4, "y": np.array([0.5, 1, 2, 3])}, "classification", 'set task = "regression"'),
        ({"X": X4, "y": np.array(list("abcd"))}, "regression", "strings"),
        ({"X": X4, "X_test": np.zeros((4, 3))}, None, "they must be the same"),
        ({"X": X4, "y": np.arange(4), "X_test": X4, "y_test": np.arange(4.0)}, None, "set the task"),
        ({"X": X4, "y": np.arange(4), "X_test": X4, "y_test": np.array(["a"] * 4)}, None, "one holds strings"),
    ],
)  # fmt: skip
def test_arrays_of_wrong_shape_or_dtype_are_refused_by_file(arrays, task, words, tmp_path):
    with pytest.raises(DataError, match=words) as caught:
        load("arrays", paths=save(tmp_path, **arrays), task=task)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_arrays_are_refused_and_execute_nothing(suffix, tmp_path):
    """An object array unpickles on load, and unpickling executes what the file says."""
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = tmp_path / f"X{suffix}"
    trap = np.array([[Trap()]], dtype=object)
    if suffix == ".npy":
        np.save(path, trap, allow_pickle=True)
    else:
        np.savez(path, X=trap)
    with pytest.raises(DataError, match="cannot be read as X"):
        load("arrays", paths={"X": str(path)})
    assert not marker.exists()


@pytest.mark.parametrize("where", ["filters", "compressor", "nested"])
def test_zarr_codecs_that_could_execute_code_are_refused(where, tmp_path):
    """Zarr's format 2 knows a codec that unpickles chunks."""
    path = tmp_path / "X.zarr"
    version = 3 if where == "nested" else 2
    zarr.create_array(path, shape=(4, 2), dtype="f8", chunks=(2, 2), zarr_format=version)[...] = 1.0
    file = path / ("zarr.json" if version == 3 else ".zarray")
    metadata = json.loads(file.read_text())
    if where == "nested":
        inner = [{"name": "numcodecs.pickle"}]
        metadata["codecs"] = [{"name": "sharding_indexed", "configuration": {"codecs": inner}}]
    else:
        metadata[where] = [{"id": "pickle"}] if where == "filters" else {"id": "pickle"}
    file.write_text(json.dumps(metadata))
    with pytest.raises(DataError, match="pickle', which is not read: it might execute code"):
        load("arrays", paths={"X": str(path)})


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_garbled_array_files_are_refused_by_name(content, suffix, tmp_path):
    path = tmp_path / f"X{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("arrays", paths={"X": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_npy_file_is_refused(tmp_path):
    paths = save(tmp_path, X=np.zeros((100, 10)))
    path = Path(paths["X"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"X\.npy cannot be read as X"):
        load("arrays", paths=paths)


def test_wrong_zarr_folders_are_refused(tmp_path):
    zarr.create_group(tmp_path / "group.zarr")
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "damaged.zarr").mkdir()
    (tmp_path / "damaged.zarr" / "zarr.json").write_text("[1]")
    for name, words in (("group", "is a Zarr group"), ("empty", "not a Zarr array"), ("damaged", "damaged")):
        with pytest.raises(DataError, match=words):
            load("arrays", paths={"X": str(tmp_path / f"{name}.zarr")})


@pytest.mark.parametrize(
    ("source", "paths", "error", "words"),
    [
        ("mnits", None, ExperimentError, "did you mean 'mnist'"),
        ("arrays", None, ExperimentError, "needs a path for X"),
        ("arrays", {"X": "a.npy", "X_tst": "b.npy"}, ExperimentError, "did you mean 'X_test'"),
        ("arrays", {"X": "a.npy", "y_test": "b.npy"}, ExperimentError, "needs a path for X_test"),
        (
            "arrays",
            {"X": "a.npy", "X_test": "b.npy", "y_test": "c.npy"},
            ExperimentError,
            "a path for y where",
        ),
        ("digits", {"X": "a.npy"}, ExperimentError, "paths are for the source 'arrays'"),
        ("arrays", {"X": "/nowhere/X.npy"}, DataError, "/nowhere/X.npy, the path of X, does not exist"),
        ("arrays", {"X": __file__}, DataError, "must end with .npy, .npz or .zarr"),
    ],
)
def test_wrong_sources_and_paths_are_refused(source, paths, error, words):
    with pytest.raises(error, match=words):
        load(source, paths=paths)


def test_the_identity_of_arrays_survives_growth_and_tells_arrays_apart(tmp_path):
    """A grown array must find its stores again; another dtype, shape or first sample must not."""
    X = np.random.default_rng(3).random((10, 4))

    def identity(array):
        return load("arrays", paths=save(tmp_path, X=array)).identity

    assert identity(X) == identity(X[:3]) == identity(np.vstack([X, X]))
    others = (X.astype(np.float32), X[:, :3], X[1:], X.reshape(10, 2, 2))
    assert len({identity(X), *map(identity, others)}) == 5


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_labels_can_be_read_alone_and_counted_like_those_of_training(kind, tmp_path):
    """For a precomputed kernel there are labels but no samples; ids must mean the same in both parts."""
    paths = {}
    for name, y in (("train", np.array([10, 2, 10, 7])), ("test", np.array([7, 10])), ("bad", np.array([3]))):
        paths[name] = str(tmp_path / f"{name}.{kind}")
        np.save(paths[name], y) if kind == "npy" else np.savez(paths[name], y=y)
    y, labels = read_labels(paths["train"], "y")
    np.testing.assert_array_equal(y, [2, 0, 2, 1])
    assert labels == ("2", "7", "10")
    y_test, same = read_labels(paths["test"], "y", labels)
    np.testing.assert_array_equal(y_test, [1, 2])
    assert same == labels
    with pytest.raises(DataError, match="the label '3', which no training sample has"):
        read_labels(paths["bad"], "y", labels)
    targets, none = read_labels(paths["train"], "y", task="regression")
    np.testing.assert_array_equal(targets, [10.0, 2.0, 10.0, 7.0])
    assert none is None


# Values


def test_non_finite_values_are_named_with_place_and_count():
    X = np.zeros((3000, 5), np.float32)
    X[2100, 3], X[2500, 1], X[2999, 4] = np.inf, np.nan, -np.inf
    with pytest.raises(DataError, match=r"3 values are .* X of mine.npy.* inf at row 2100, column 3;"):
        validate(Pool("mine.npy", X, None, None))
    images = np.zeros((3, 2, 2, 1))
    images[1, 0, 1, 0] = np.nan
    with pytest.raises(DataError, match=r"1 value is .* nan at row 1, column \(0, 1, 0\);"):
        validate(Pool("mine.npy", images, None, None))
    y = np.array([0.0, 1.0, np.nan])
    with pytest.raises(DataError, match=r"in y of mine.npy: the first is nan at row 2;"):
        validate(Pool("mine.npy", np.zeros((3, 2)), y, None), "regression")


def test_pools_without_labels_are_good_only_without_a_task():
    pool = Pool("mine.npy", np.zeros((3, 2)), None, None)
    validate(pool)
    with pytest.raises(DataError, match=r"mine\.npy is unlabelled: classification needs y"):
        validate(pool, "classification")


@pytest.mark.parametrize(
    ("y", "task", "words"),
    [
        (np.zeros(2, np.int64), "classification", "3 samples but y has 2 rows"),
        (np.zeros(3), "classification", 'set task = "regression"'),
        (np.zeros((3, 2), np.int64), "classification", 'set task = "regression"'),
        (np.array(list("abc")), "classification", "must be"),
        (np.zeros(3, complex), "regression", "must be"),
        (np.zeros((3, 1, 1)), "regression", "must be"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y, task, words):
    with pytest.raises(DataError, match=words):
        validate(Pool("mine.npy", np.zeros((3, 2)), y, None), task)


def test_class_ids_never_pass_for_regression_targets():
    """Ids count the sorted labels: a regression on them would be silently wrong."""
    pool = Pool("mine.npy", np.zeros((3, 2)), np.array([0, 2, 1]), ("10", "20", "70"))
    with pytest.raises(DataError, match="class ids, not targets"):
        validate(pool, "regression")


def test_training_needs_two_classes():
    require_two_classes(np.array([0, 1]), "training")
    with pytest.raises(DataError, match="the training range holds one sample, hence one class"):
        require_two_classes(np.array([4]), "training")
    with pytest.raises(DataError, match="all 3 samples of the training range have one class"):
        require_two_classes(np.array([4, 4, 4]), "training")


def test_extended_precision_samples_are_refused(tmp_path):
    """Wider floats than float64 would lose digits unasked."""
    wide = np.zeros((3, 2), np.longdouble)
    if wide.dtype.itemsize <= 8:
        pytest.skip("this platform has no wider float")
    with pytest.raises(DataError, match=r"X\.npy has dtype .*: save it as float64"):
        load("arrays", paths=save(tmp_path, X=wide))


@pytest.mark.parametrize("task", [None, "classification", "regression"])
def test_non_finite_labels_are_named_by_their_own_file(task, tmp_path):
    """The file to mend is that of y, whatever the task."""
    paths = save(tmp_path, X=np.zeros((3, 2)), y=np.array([0.0, np.nan, 1.0]))
    with pytest.raises(DataError, match=r"1 value is NaN or infinite in y of \S*y\.npy: .* at row 1;"):
        load("arrays", paths=paths, task=task)


def test_byte_strings_that_are_not_ascii_are_refused(tmp_path):
    """Their encoding is not known."""
    paths = save(tmp_path, X=np.zeros((2, 2)), y=np.array(["a", "ä"]).astype("U1"))
    np.save(paths["y"], np.array([b"a", "ä".encode("latin-1")]))
    with pytest.raises(DataError, match=r"y\.npy holds byte strings that are not ASCII"):
        load("arrays", paths=paths)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("X.npy", b"garbage", "is not a .npy file"),
        ("X.npy", b"", "is not a .npy file"),
        ("X.npz", b"garbage", "is not a .npz file"),
        ("X.npz", b"PK\x03\x04 cut short", "is not a .npz file"),
    ],
)
def test_nobody_is_advised_to_unpickle(name, content, words, tmp_path):
    """NumPy's own messages advise to; objects are refused with what to save instead."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load("arrays", paths={"X": str(tmp_path / name)})
    assert "pickle" not in str(caught.value)
    objects = np.array([{}, []], dtype=object)
    np.save(tmp_path / "o.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "o.npz", X=objects)
    for file in ("o.npy", "o.npz"):
        with pytest.raises(DataError, match="holds Python objects; save numbers or strings") as caught:
            load("arrays", paths={"X": str(tmp_path / file)})
        assert "pickle" not in str(caught.value)


def test_files_under_a_wrong_ending_are_refused(tmp_path):
    """A .npy file called .npz, the other way round, and an .npz member that is no array."""
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    (tmp_path / "a.npy").rename(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", X=np.zeros((2, 2)))
    (tmp_path / "c.npz").rename(tmp_path / "d.npy")
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("X.npy", "text")
    for file, words in [("b.npz", "not a .npz"), ("d.npy", "not a .npy"), ("e.npz", "'X' is not an array")]:
        with pytest.raises(DataError, match=words):
            load("arrays", paths={"X": str(tmp_path / file)})


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_inside_a_zarr_group_is_read(zarr_format, tmp_path):
    """Its path is a folder without an ending."""
    X = np.arange(6.0).reshape(3, 2)
    group = zarr.open_group(tmp_path / "G.zarr", mode="w", zarr_format=zarr_format)
    group.create_array("X", data=X)
    loaded = load("arrays", paths={"X": str(tmp_path / "G.zarr" / "X")})
    np.testing.assert_array_equal(loaded.train.X, X)
    with pytest.raises(DataError, match=r"not a Zarr array|is a Zarr group"):
        load("arrays", paths={"X": str(tmp_path / "G.zarr")})


# Order, duplicates, digests


def test_a_permutation_is_that_of_the_legacy_generator_and_keeps_pairs_together():
    """SPEC R10: numpy RandomState(seed).permutation(n); the first entries of a known case are pinned."""
    X = np.arange(60000, dtype=np.int32)[:, np.newaxis]
    pool = Pool("p", X, X[:, 0].astype(np.int64), ("a",))
    shuffled = order(pool, 42)
    np.testing.assert_array_equal(shuffled.X[:4, 0], [12628, 37730, 39991, 8525])
    np.testing.assert_array_equal(shuffled.X[:, 0], shuffled.y)
    np.testing.assert_array_equal(np.sort(shuffled.y), pool.y)
    assert order(pool, None) is pool
    assert order(Pool("p", X, None, None), 1).y is None


def test_duplicates_across_sets_are_counted_and_the_first_pair_named():
    rng = np.random.default_rng(4)
    X = rng.integers(0, 256, (3000, 5, 5, 1)).astype(np.uint8)
    X_test = rng.integers(0, 256, (50, 5, 5, 1)).astype(np.uint8)
    X[2500], X[2999] = X[17], X[18]
    X_test[8] = X[1999]
    X[3] = X[4]
    validation, test = duplicates_across(X[:2000], {"validation": X[2000:], "test": X_test})
    assert "2 of the 1000 samples of the validation set also stand in the training set" in validation
    assert "sample 500 is training sample 17" in validation
    assert "1 of the 50 samples of the test set" in test
    assert "sample 8 is training sample 1999" in test


def test_no_duplicates_no_warning_and_other_dtypes_are_compared_by_value():
    X = np.arange(20, dtype=np.uint8).reshape(10, 2)
    assert duplicates_across(X[:5], {"validation": None, "test": X[5:]}) == []
    assert duplicates_across(X[:5], {"validation": None}) == []
    [warning] = duplicates_across(X[:5], {"test": X[4:8].astype(np.float64)})
    assert "sample 0 is training sample 4" in warning


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 11), dtype=st.sampled_from(["u1", "f4", "f8", "?"]))
def test_duplicates_are_those_that_comparing_each_with_each_finds(seed, d, dtype):
    """Protects the search by keys: few values, so that many samples differ in few bits, against plain comparison."""
    rng = np.random.default_rng(seed)
    X, Z = (rng.integers(0, 3, (n, d)).astype(dtype) for n in (60, 20))
    rows = np.flatnonzero(rng.random(60) < 0.5)
    pairs = [(i, j) for j, z in enumerate(Z) for i, row in enumerate(rows) if np.array_equal(X[row], z)]
    said = duplicates_across(X, {"test": Z}, rows)
    if not pairs:
        assert said == []
        return
    (warning,) = said
    assert warning.startswith(f"{len({j for _, j in pairs})} of the 20 samples")
    assert f"(first: sample {pairs[0][1]} is training sample {pairs[0][0]})" in warning


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 40), rows=st.integers(1, 12), cut=st.integers(0, 40))
def test_digests_of_a_prefix_are_a_prefix_of_the_digests(n, rows, cut):
    """Data that grow keep the digests of their full blocks; any prefix can be compared."""
    X = np.random.default_rng(n).random((n, 3))
    digests = block_digests(X, rows)
    assert len(digests) == -(-n // rows)
    whole = min(cut, n) // rows
    assert block_digests(X[: min(cut, n)], rows)[:whole] == digests[:whole]


def test_digests_see_every_byte_the_dtype_and_the_shape_but_not_the_layout():
    X = np.random.default_rng(5).integers(0, 256, (100, 6)).astype(np.uint8)
    digests = block_digests(X, 10)
    changed = X.copy()
    changed[57, 3] ^= 1
    assert [a == b for a, b in zip(digests, block_digests(changed, 10), strict=True)].index(False) == 5
    assert block_digests(X.view(np.int8), 10) != digests
    assert block_digests(X.reshape(100, 2, 3, 1), 10)[0] != digests[0]
    assert block_digests(np.asfortranarray(X), 10) == digests
    assert len({pool_digest(digests), pool_digest(digests[:-1]), pool_digest(digests[::-1])}) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint8, bool])
def test_short_samples_are_counted(dtype):
    """Zero rows and rows below the floor, across blocks, for every dtype; extreme values do not overflow."""
    X = np.ones((2500, 4), dtype)
    X[[0, 1024, 2499]] = 0
    if np.dtype(dtype).kind == "f":
        X[7] = 4e-7  # its norm, 8e-7, is below 1e-6
        X[8] = 6e-7  # its norm, 1.2e-6, is not
        X[9] = np.finfo(dtype).max
        assert short_samples(X, 1e-6) == (3, 1)
    else:
        assert short_samples(X, 1e-6) == (3, 0)
