"""CIFAR archives, the long-tailed subset, and the hold-out split.

Shapes: N images, C classes; images are uint8, channel first, (N, 3, 32, 32); labels are int64 (N,).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

MEAN = (0.4914, 0.4822, 0.4465)  # of both CIFAR sets in the published codes but GLMC's
STD = (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Archive:
    """What the official distribution of one data set looks like."""

    num_classes: int
    max_per_class: int
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    label_key: str
    url: str
    md5: str


ARCHIVES = {
    "cifar10": Archive(
        num_classes=10,
        max_per_class=5000,
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_file="test_batch",
        label_key="labels",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": Archive(
        num_classes=100,
        max_per_class=500,
        folder="cifar-100-python",
        train_files=("train",),
        test_file="test",
        label_key="fine_labels",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
    ),
}


# --- reading ----------------------------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds numpy arrays and Python's plain containers, and refuses every other global.

    A pickle may name any callable, so loading a foreign one runs foreign code; CIFAR's files need only these.
    """

    _reconstruct = np.empty(0).__reduce__()[0]
    _frombuffer = np.empty(0).__reduce_ex__(5)[0]
    _allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # protocol 2 written by Python 3 spells bytes this way
            return _encode_latin1
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}, which no CIFAR file needs")
    return text.encode("latin1")


def load_batch(path: Path, label_key: str, num_classes: int) -> tuple[Images, Labels]:
    """Read one file of a CIFAR python archive without running anything that it may contain.

    Args:
        path: the pickle, `data` (N, 3072) uint8 beside a list of N labels; written by Python 2 or 3.
        label_key: `labels` (CIFAR-10) or `fine_labels` (CIFAR-100).
        num_classes: labels lie in 0 .. num_classes - 1.

    Returns:
        images (N, 3, 32, 32) uint8 and labels (N,) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign or asks for code to be run.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise _foreign(path, str(error) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _foreign(path, f"it holds a {type(content).__name__}, not a dict")
    content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    missing = {"data", label_key} - content.keys()
    if missing:
        raise _foreign(path, f"it has no {' and no '.join(repr(key) for key in sorted(missing))}")
    data = content["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise _foreign(path, f"'data' is {found}, expected uint8 (N, 3072)")
    labels = np.asarray(content[label_key])
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise _foreign(path, f"{label_key!r} is {labels.dtype} {labels.shape}, expected {len(data)} integers")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise _foreign(path, f"labels span {labels.min()} .. {labels.max()}, expected 0 .. {num_classes - 1}")
    return data.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _foreign(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is truncated or no CIFAR python archive file: {reason}. "
        "Replace it by the original, or remove its folder and pass --download."
    )


def find_folder(dataset: str, data_dir: Path) -> Path:
    """Return the folder of the data set's files: inside `data_dir`, or `data_dir` itself.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    archive = ARCHIVES[dataset]
    for folder in (data_dir / archive.folder, data_dir):
        if (folder / archive.train_files[0]).is_file():
            return folder
    raise FileNotFoundError(
        f"no {dataset} under {str(data_dir)!r}: expected {archive.folder}/{archive.train_files[0]} there. "
        "Set --data-dir to the folder that holds the unpacked python archive, or pass --download to fetch it."
    )


def load_train(dataset: str, folder: Path) -> tuple[Images, Labels]:
    """Read the training files in `folder`: images (N, 3, 32, 32) uint8, labels (N,) int64, in the archive's order."""
    archive = ARCHIVES[dataset]
    parts = [load_batch(folder / name, archive.label_key, archive.num_classes) for name in archive.train_files]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def load_test(dataset: str, folder: Path) -> tuple[Images, Labels]:
    """Read the test file in `folder`: images (N, 3, 32, 32) uint8, labels (N,) int64."""
    archive = ARCHIVES[dataset]
    return load_batch(folder / archive.test_file, archive.label_key, archive.num_classes)


# --- downloading ------------------------------------------------------------------------------------------------------


def download(dataset: str, data_dir: Path, *, url: str | None = None, md5: str | None = None) -> Path:
    """Fetch the official archive, verify its checksum and unpack it into `data_dir`; return its folder.

    Nothing is left under its final name before it is complete: the download is checked in a temporary folder beside
    the target, unpacked there (plain files alone, no path leaves the folder), and then renamed.

    Args:
        dataset: `cifar10` or `cifar100`.
        data_dir: created if absent; not touched when it already holds the data set.
        url: a mirror instead of the official address.
        md5: the mirror's checksum, where it serves another file than the official one.

    Raises:
        ValueError: the checksum differs, or the archive does not hold the data set's folder.
        OSError: the server cannot be reached, or the target cannot be written.
    """
    archive = ARCHIVES[dataset]
    try:
        return find_folder(dataset, data_dir)
    except FileNotFoundError:
        pass
    target = data_dir / archive.folder
    if target.exists():
        raise ValueError(f"{target} is there but incomplete: remove it, then --download can fetch the archive")
    url, md5 = url or archive.url, md5 or archive.md5
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary:
        packed = Path(temporary) / "archive.tar.gz"
        with urllib.request.urlopen(url, timeout=60) as response, packed.open("wb") as file:
            found = _copy_and_hash(response, file)
        if found != md5:
            raise ValueError(
                f"{url} has MD5 {found}, expected {md5}: the download is damaged or another file. Nothing was kept; "
                "try again, or fetch the archive by hand and set --data-dir."
            )
        try:
            with tarfile.open(packed) as tar:
                _unpack(tar, Path(temporary))
        except tarfile.TarError as error:
            raise ValueError(f"{url} cannot be unpacked ({error}): it is not the {dataset} python archive") from error
        unpacked = Path(temporary) / archive.folder
        if not unpacked.is_dir():
            raise ValueError(f"{url} holds no folder {archive.folder}: it is not the {dataset} python archive")
        os.replace(unpacked, target)
    return find_folder(dataset, data_dir)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the archive's files. The filters of tarfile came with Python 3.11.4; distributions have older ones.

    Raises:
        tarfile.TarError: a member is no file or folder below this one. What came before it is written.
    """
    for member in tar:
        path = (folder / member.name).resolve()
        if not path.is_relative_to(folder.resolve()) or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is no file or folder below the one to unpack into")
        content = tar.extractfile(member)
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)


def _copy_and_hash(source: IO[bytes], target: IO[bytes]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


# --- choosing images --------------------------------------------------------------------------------------------------


def long_tail_counts(max_per_class: int, num_classes: int, imbalance: float) -> list[int]:
    """Return how many images class c = 0 .. C-1 keeps: int(n_max * (1 / imbalance) ** (c / (C - 1))).

    The rule of every published CIFAR-LT code, truncation included, so CIFAR-100 at imbalance 200 ends at 2 images.

    Example:
        >>> long_tail_counts(5000, 10, 100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    if not imbalance >= 1:
        raise ValueError(f"imbalance is {imbalance}; it is the largest class over the smallest: use 1 or more")
    counts = [int(max_per_class * (1 / imbalance) ** (c / (num_classes - 1))) for c in range(num_classes)]
    if counts[-1] == 0:
        raise ValueError(
            f"imbalance {imbalance:g} leaves class {counts.index(0)} without images; "
            f"use {max_per_class} or less, the size of the largest class"
        )
    return counts


@dataclass(frozen=True)
class Split:
    """Positions in the training archive: what to train on and what is held out, both int64, class by class."""

    train: Labels
    held_out: Labels


def choose_images(
    labels: Labels, counts: Sequence[int], *, seed: int = 0, hold_out: int = 0, replacement: bool = False
) -> Split:
    """Choose each class's images: a seeded shuffle, the first n_c of it, and optionally a hold-out set.

    With the official archive and seed 0 this is the subset of the published codes (LDAM-DRW and its descendants:
    `np.random.seed(0)`, then per class in label order `np.random.shuffle` of its positions).

    Up to `hold_out` images per class are held out: first those that the long-tail rule leaves unused, in shuffled
    order, then, only where these are too few, the last of the class's n_c, at most a fifth of them (rounded down).

    With `replacement` the n_c of a class are drawn with replacement from all of its images, so about a quarter of the
    training set repeats another part of it: how GLMC's published numbers came about until May 2023.

    Raises:
        ValueError: a class has fewer images than wanted, or replacement is asked for beside a hold-out set.
    """
    if replacement and hold_out:
        raise ValueError(
            f"--validation {hold_out} holds out unused images, which drawing with replacement does not know"
        )
    random = np.random.RandomState(seed)
    train, held_out = [], []
    for label, wanted in enumerate(counts):
        positions = np.flatnonzero(labels == label)
        if len(positions) < wanted:
            raise ValueError(
                f"class {label} should have {wanted} images but the archive has {len(positions)}: it is a subset made "
                "for a larger imbalance factor. Use a larger --imbalance, or the complete archive."
            )
        if replacement:
            train.append(random.choice(positions, wanted, replace=True))
            held_out.append(positions[:0])
            continue
        random.shuffle(positions)
        unused = positions[wanted : wanted + hold_out]
        taken = min(hold_out - len(unused), wanted // 5)
        train.append(positions[: wanted - taken])
        held_out.append(np.concatenate([unused, positions[wanted - taken : wanted]]))
    return Split(np.concatenate(train), np.concatenate(held_out))


def shot_groups(counts: Sequence[int]) -> dict[str, list[int]]:
    """Group the classes by training count: many n > 100, medium 20 <= n <= 100, few n < 20 (the OLTR rule).

    Example:
        >>> {name: len(classes) for name, classes in shot_groups(long_tail_counts(500, 100, 100)).items()}
        {'many': 35, 'medium': 35, 'few': 30}
    """
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(counts):
        groups["many" if count > 100 else "medium" if count >= 20 else "few"].append(label)
    return groups


def reduce_resolution(images: Images, resolution: int) -> Images:
    """Average square areas so that (N, 3, 32, 32) becomes (N, 3, resolution, resolution), rounded to uint8."""
    size = images.shape[-1]
    if resolution < 8 or size % resolution:
        raise ValueError(f"resolution is {resolution}; it must divide {size}: use 32, 16 or 8")
    if resolution == size:
        return images
    area = size // resolution
    tiles = images.reshape(len(images), 3, resolution, area, resolution, area)
    return np.asarray(np.rint(tiles.mean(axis=(3, 5), dtype=np.float32)), dtype=np.uint8)


@dataclass(frozen=True)
class Dataset:
    """A long-tailed training set and what to evaluate on.

    Attributes:
        train_images, train_labels: (N, 3, R, R) uint8 and (N,) int64.
        eval_images, eval_labels: the test set, or the held-out images.
        counts: training images per class, (C,), after holding out.
        groups: shot groups by the long-tail rule's counts, the same with and without a hold-out set.
        fingerprint: of the training images and labels, in order.
    """

    train_images: Images
    train_labels: Labels
    eval_images: Images
    eval_labels: Labels
    counts: tuple[int, ...]
    groups: dict[str, list[int]]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.counts)


def load_dataset(
    dataset: str,
    folder: Path,
    *,
    imbalance: float,
    subset_seed: int = 0,
    hold_out: int = 0,
    replacement: bool = False,
    resolution: int = 32,
) -> Dataset:
    """Read the archive in `folder` and choose the long-tailed subset.

    With `hold_out` > 0 the evaluation images come from the training files, and the test file is not opened.
    """
    archive = ARCHIVES[dataset]
    counts = long_tail_counts(archive.max_per_class, archive.num_classes, imbalance)
    images, labels = load_train(dataset, folder)
    split = choose_images(labels, counts, seed=subset_seed, hold_out=hold_out, replacement=replacement)
    train_images, train_labels = reduce_resolution(images[split.train], resolution), labels[split.train]
    if hold_out:
        eval_images, eval_labels = images[split.held_out], labels[split.held_out]
    else:
        eval_images, eval_labels = load_test(dataset, folder)
    return Dataset(
        train_images=train_images,
        train_labels=train_labels,
        eval_images=reduce_resolution(eval_images, resolution),
        eval_labels=eval_labels,
        counts=tuple(np.bincount(train_labels, minlength=archive.num_classes).tolist()),
        groups=shot_groups(counts),
        fingerprint=hashlib.sha256(train_images.tobytes() + train_labels.tobytes()).hexdigest()[:16],
    )
