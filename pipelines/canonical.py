"""The published data sets in their canonical file formats: found locally, else downloaded, and parsed.

A file is known by the SHA-256 of its *uncompressed* content, because gzip bytes differ between tools.
Only binary formats are read (IDX, CIFAR-10 binary batches, a CSV of small integers), never a pickle.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import logging
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen
from uuid import uuid4

import numpy as np

from .errors import DataError, DiskFull

log = logging.getLogger("megagram.data")

Labelled = tuple[np.ndarray, np.ndarray]
"""(n, h, w, c) uint8 images and (n,) uint8 class ids."""


@dataclass(frozen=True)
class Source:
    """A published data set.

    url: folder of the gzip'd files, or the one archive that holds all of them.
    archive_sha256: digest of that archive; None where ``url`` is a folder.
    folder: where the files lie under the data folder, and where a download puts them.
    sha256: file name without ``.gz`` to the digest of the uncompressed content.
    """

    url: str
    archive_sha256: str | None
    folder: str
    sha256: Mapping[str, str]
    labels: tuple[str, ...]

    @property
    def downloads(self) -> tuple[str, ...]:
        """The file names as they are written to disk after a download."""
        suffix = "" if self.archive_sha256 else ".gz"
        return tuple(name + suffix for name in self.sha256)


IDX_IMAGES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
IDX_LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue plane, row by row

SOURCES: dict[str, Source] = {
    "mnist": Source(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        archive_sha256=None,
        folder="mnist",
        sha256={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        labels=tuple("0123456789"),
    ),
    "fashion-mnist": Source(
        url="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        archive_sha256=None,
        folder="fashion-mnist",
        sha256={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        labels=(
            "T-shirt/top", "trouser", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot",
        ),
    ),
    "cifar10": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        archive_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar10/cifar-10-batches-bin",
        sha256={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}  # fmt: skip

DIGITS_SHA256 = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"
"""Digest of the (1797, 65) uint8 table, 64 pixels and the class, in row-major order."""


def data_folder(data_dir: Path | None = None) -> Path:
    """The one folder that is searched and that downloads go to.

    ``data_dir``, else the environment's MEGAGRAM_DATA, else ``megagram/data`` in the user's cache.
    """
    if data_dir is not None:
        return Path(data_dir)
    if os.environ.get("MEGAGRAM_DATA"):
        return Path(os.environ["MEGAGRAM_DATA"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "megagram" / "data"


def read(name: str, data_dir: Path | None = None) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Training images and labels, test images and labels, and warnings, of mnist, fashion-mnist or cifar10.

    A local file whose digest is not the published one is used, and a warning says so.

    Raises:
        DataError: files are missing and cannot be downloaded, or a file is damaged; the message names it.
    """
    source, root = SOURCES[name], data_folder(data_dir)
    found = _locate(name, root)
    missing = [file for file in source.sha256 if file not in found]
    if missing:
        found |= _download(name, root, missing)
    warnings: list[str] = []
    contents = {file: _content(path, source.sha256[file], warnings) for file, path in found.items()}
    if source.archive_sha256 is None:
        parts = [
            _idx_part((found[i], contents[i]), (found[k], contents[k]), len(source.labels))
            for i, k in zip(IDX_IMAGES, IDX_LABELS, strict=True)
        ]
        train, test = parts
    else:
        batches = {file: _cifar_batch(found[file], contents[file]) for file in source.sha256}
        test = batches.pop("test_batch.bin")
        train = (
            np.concatenate([images for images, _ in batches.values()]),
            np.concatenate([labels for _, labels in batches.values()]),
        )
    return train, test, tuple(warnings)


def read_digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The digits bundled with scikit-learn: (1797, 8, 8, 1) uint8 values 0..16, (1797,) labels, warnings.

    Their file is read without importing scikit-learn, which takes longer than a small experiment.

    Raises:
        DataError: scikit-learn is not installed, or its file does not hold the digits.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        try:
            table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); reinstall scikit-learn") from None
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        table = np.column_stack([bunch.data, bunch.target])
    pixels, labels = table[:, :-1], table[:, -1]
    whole = np.array_equal(table, np.rint(table))
    if table.shape != (1797, 65) or not whole or pixels.min() < 0 or pixels.max() > 16:
        raise DataError(f"{path} does not hold 1797 digits of 8 x 8 values 0..16; reinstall scikit-learn")
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path} has labels outside 0..9; reinstall scikit-learn")
    bytes_ = table.astype(np.uint8)
    warnings = []
    if hashlib.sha256(bytes_.tobytes()).hexdigest() != DIGITS_SHA256:
        warnings.append(f"{path} does not hold the published digits: its checksum differs")
    return bytes_[:, :-1].reshape(-1, 8, 8, 1), bytes_[:, -1], tuple(warnings)


def parse_idx(content: bytes, path: Path, axes: int) -> np.ndarray:
    """The uint8 array of ``axes`` axes that an IDX file holds; ``path`` is named in errors.

    Raises:
        DataError: wrong magic number, or more or fewer bytes than the header announces.
    """
    magic = bytes([0, 0, 8, axes])
    if content[:4] != magic:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes with {axes} axes: "
            f"it begins with {content[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    header = 4 + 4 * axes
    if len(content) < header:
        raise DataError(f"{path} is truncated within its header; fetch it again")
    shape = tuple(int(side) for side in np.frombuffer(content, ">u4", axes, 4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        kind = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path} is {kind}: {len(content)} bytes where its header announces {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _idx_part(images: tuple[Path, bytes], labels: tuple[Path, bytes], classes: int) -> Labelled:
    X, y = parse_idx(images[1], images[0], 3), parse_idx(labels[1], labels[0], 1)
    h, w = X.shape[1:]
    if (h, w) != (28, 28):
        raise DataError(f"{images[0]} holds images of {h} x {w} pixels, not 28 x 28")
    if len(X) != len(y):
        raise DataError(f"{images[0]} holds {len(X)} images but {labels[0]} holds {len(y)} labels")
    _check_labels(y, classes, labels[0])
    return X[..., np.newaxis], y


def _cifar_batch(path: Path, content: bytes) -> Labelled:
    if not content or len(content) % CIFAR_RECORD:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes are not a whole number of {CIFAR_RECORD}-byte records"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    _check_labels(records[:, 0], 10, path)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0]


def _check_labels(y: np.ndarray, classes: int, path: Path) -> None:
    if len(y) == 0:
        raise DataError(f"{path} is empty")
    if y.max() >= classes:
        row = int(np.argmax(y >= classes))
        raise DataError(f"{path} is damaged: label {y[row]} of row {row} is not one of 0..{classes - 1}")


def _content(path: Path, sha256: str, warnings: list[str]) -> bytes:
    """The uncompressed content; a digest other than the published one adds a warning."""
    content = _uncompressed(path)
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        warnings.append(
            f"{path} is not the published file (sha256 of its content {actual[:12]}..., "
            f"published {sha256[:12]}...): results may not compare with published ones"
        )
    return content


def _uncompressed(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from None


def _locate(name: str, root: Path) -> dict[str, Path]:
    """The files of a source that lie under ``root``, each plain or gzip'd."""
    source = SOURCES[name]
    folder = root / source.folder
    found = _present(source, folder)
    if source.archive_sha256 is not None:  # the batches' own names tell what they are
        for other in (root / "cifar10", root / "cifar-10-batches-bin", root):
            found = _present(source, other) | found
    elif not found:
        found = _flat(name, root)
    return found


def _present(source: Source, folder: Path) -> dict[str, Path]:
    candidates = [(name, folder / (name + suffix)) for name in source.sha256 for suffix in ("", ".gz")]
    return {name: path for name, path in candidates if path.is_file()}


def _flat(name: str, root: Path) -> dict[str, Path]:
    """Files that lie in ``root`` itself: taken where the folder's name or the labels tell which set they are.

    MNIST and Fashion-MNIST have the same file names, so that names alone do not tell.
    """
    found = _present(SOURCES[name], root)
    if not found or root.name == name:
        return found
    training_labels = IDX_LABELS[0]
    if training_labels in found:
        digest = hashlib.sha256(_uncompressed(found[training_labels])).hexdigest()
        known = [s for s, source in SOURCES.items() if source.sha256.get(training_labels) == digest]
        if known:
            return found if known == [name] else {}
    raise DataError(
        f"the IDX files in {root} may be MNIST or Fashion-MNIST; "
        f"move them to {root / SOURCES[name].folder} if they are {name}"
    )


def _download(name: str, root: Path, missing: list[str]) -> dict[str, Path]:
    """Fetch the missing files of a source; nothing with a wrong digest is kept."""
    source = SOURCES[name]
    folder = root / source.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if source.archive_sha256 is None:
            for file in missing:
                target = folder / (file + ".gz")
                _fetch(source.url + file + ".gz", target, _sha256_gzip, source.sha256[file])
            return {file: folder / (file + ".gz") for file in missing}
        archive = folder / f".archive.{uuid4().hex}.tar.gz"
        try:
            _fetch(source.url, archive, _sha256, source.archive_sha256)
            _extract(archive, folder, missing)
        finally:
            archive.unlink(missing_ok=True)
        return {file: folder / file for file in missing}
    except (OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DiskFull(f"no space left on {root} for {name}; free some, or set MEGAGRAM_DATA") from None
        raise DataError(
            f"{name} is not in {root} and cannot be downloaded ({error}): put {', '.join(source.downloads)} "
            f"into {folder}, or set MEGAGRAM_DATA to a folder that has them in {source.folder}"
        ) from None


def _fetch(url: str, target: Path, digest: Callable[[Path], str], expected: str) -> None:
    """Stream ``url`` to a temporary name, check it, then rename it to ``target``."""
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    log.info("downloading %s", url)
    try:
        with urlopen(url, timeout=30) as response, partial.open("wb") as out:
            total = int(response.headers.get("Content-Length") or 0)
            began = told = time.monotonic()
            while piece := response.read(1 << 20):
                out.write(piece)
                if (now := time.monotonic()) - told > 5:
                    told, done = now, out.tell() / 1e6
                    log.info("%s: %.0f of %.0f MB, %.1f MB/s", url, done, total / 1e6, done / (now - began))
        if digest(partial) != expected:
            raise DataError(
                f"what {url} sent is damaged or not the published file (its checksum differs); "
                f"nothing was kept: try again, or put the file into {target.parent} yourself"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _extract(archive: Path, folder: Path, names: list[str]) -> None:
    """Write the named members of the verified CIFAR-10 archive, and nothing else of it, into ``folder``."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = Path(member.name).name
            if name in names and member.isfile():
                partial = folder / f".{name}.{uuid4().hex}.partial"
                stream = tar.extractfile(member)
                assert stream is not None  # a regular file has a stream
                try:
                    partial.write_bytes(stream.read())
                    partial.replace(folder / name)
                finally:
                    partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_gzip(path: Path) -> str:
    """Digest of the uncompressed content; empty where the file is no whole gzip file."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return ""
    return digest.hexdigest()
