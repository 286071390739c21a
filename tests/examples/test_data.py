"""Archives, the long-tail rule, the hold-out split."""

from __future__ import annotations

import contextlib
import doctest
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from longtail import data

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"

WriteArchive = Callable[..., Path]


# The published subsets, from the table of counts that all CIFAR-LT codes share: total, first and last counts.
@pytest.mark.parametrize(
    ("n_max", "classes", "imbalance", "total", "head", "tail"),
    [
        (5000, 10, 50, 13996, [5000, 3237, 2096, 1357, 878], [568, 368, 238, 154, 100]),
        (5000, 10, 100, 12406, [5000, 2997, 1796, 1077, 645], [387, 232, 139, 83, 50]),
        (5000, 10, 200, 11203, [5000, 2775, 1540, 854, 474], [263, 146, 81, 45, 25]),
        (500, 100, 50, 12608, [500, 480, 462, 444, 426], [11, 11, 10, 10, 10]),
        (500, 100, 100, 10847, [500, 477, 455, 434, 415], [6, 5, 5, 5, 5]),
        (500, 100, 200, 9502, [500, 473, 449, 425, 403], [3, 2, 2, 2, 2]),
    ],
)
def test_counts_are_the_published_ones(
    n_max: int, classes: int, imbalance: float, total: int, head: list[int], tail: list[int]
) -> None:
    counts = data.long_tail_counts(n_max, classes, imbalance)
    assert (len(counts), sum(counts), counts[:5], counts[-5:]) == (classes, total, head, tail)


def test_imbalance_one_is_the_balanced_set() -> None:
    assert data.long_tail_counts(5000, 10, 1) == [5000] * 10


@pytest.mark.parametrize("imbalance", [0.5, float("nan"), 501])
def test_counts_refuse_impossible_imbalance(imbalance: float) -> None:
    with pytest.raises(ValueError, match="imbalance"):
        data.long_tail_counts(500, 100, imbalance)


@pytest.mark.parametrize(("imbalance", "sizes"), [(50, [41, 41, 18]), (100, [35, 35, 30]), (200, [30, 31, 39])])
def test_shot_groups_have_the_published_sizes(imbalance: float, sizes: list[int]) -> None:
    groups = data.shot_groups(data.long_tail_counts(500, 100, imbalance))
    assert [len(classes) for classes in groups.values()] == sizes


def test_shot_groups_at_the_borders() -> None:
    assert data.shot_groups([101, 100, 20, 19]) == {"many": [0], "medium": [1, 2], "few": [3]}


def test_choice_is_that_of_the_published_codes() -> None:
    labels = np.random.default_rng(1).integers(0, 3, 90)
    split = data.choose_images(labels, [9, 5, 2], seed=0)
    random = np.random.RandomState(0)
    expected = []
    for label, count in enumerate([9, 5, 2]):  # LDAM-DRW's imbalance_cifar.py
        positions = np.where(labels == label)[0]
        random.shuffle(positions)
        expected.append(positions[:count])
    np.testing.assert_array_equal(split.train, np.concatenate(expected))
    assert len(split.held_out) == 0


def test_choice_names_the_lacking_class() -> None:
    labels = np.repeat([0, 1], [10, 3])
    with pytest.raises(ValueError, match=r"class 1 should have 5 images but the archive has 3"):
        data.choose_images(labels, [10, 5])


def test_hold_out_takes_unused_images_first_and_at_most_a_fifth() -> None:
    labels = np.repeat([0, 1, 2], [100, 60, 9])
    counts = [100, 50, 9]
    full = data.choose_images(labels, counts)
    split = data.choose_images(labels, counts, hold_out=12)
    held = [np.sort(split.held_out[labels[split.held_out] == c]).tolist() for c in range(3)]
    # Class 0 uses all its images: 12 of 20 allowed; class 1 has 10 unused and gives 2; class 2 gives a fifth, 1.
    assert [len(positions) for positions in held] == [12, 12, 1]
    assert not set(split.train) & set(split.held_out)
    assert set(split.train) <= set(full.train)
    assert len(set(held[1]) - set(full.train)) == 10
    small = data.choose_images(labels, counts, hold_out=8)  # class 1's unused images suffice
    assert np.bincount(labels[small.train]).tolist() == [92, 50, 8]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_archive_loads(tmp_path: Path, write_archive: WriteArchive, dataset: str, protocol: int) -> None:
    classes = data.ARCHIVES[dataset].num_classes
    folder = write_archive(tmp_path, dataset, [3] * classes, protocol=protocol)
    assert data.find_folder(dataset, tmp_path) == data.find_folder(dataset, folder) == folder
    images, labels = data.load_train(dataset, folder)
    assert images.shape == (3 * classes, 3, 32, 32)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [3] * classes
    assert len(data.load_test(dataset, folder)[1]) == 4 * classes


def test_python_2_archive_loads(tmp_path: Path) -> None:
    """The official files: written by Python 2, so byte strings, and numpy's old module name."""

    def short_string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    pixels = bytes(range(256)) * 12
    path = tmp_path / "batch"
    path.write_bytes(
        b"\x80\x02}("
        + short_string(b"data")
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + short_string(b"b")
        + b"\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n"
        + short_string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short_string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels
        + b"tb"
        + short_string(b"labels")
        + b"]K\x07au."
    )
    images, labels = data.load_batch(path, "labels", 10)
    assert images.tobytes() == pixels
    assert labels.tolist() == [7]


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": _Evil(), "labels": []}),
        pickle.dumps({"data": getattr, "labels": []}),
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cnumpy\nload\n.",
    ],
    ids=["os.system", "getattr", "codec", "numpy.load"],
)
def test_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match="no CIFAR file needs"):
        data.load_batch(tmp_path / "train", "labels", 10)
    assert not (tmp_path / "executed").exists()


_PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Ran out of input"),
        (b"<html>not found</html>", "truncated or no CIFAR"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"data": _PIXELS}), "has no 'labels'"),
        (pickle.dumps({"data": _PIXELS, "labels": [1]}), "expected 2 integers"),
        (pickle.dumps({"data": _PIXELS, "labels": [1, 10]}), r"span 1 \.\. 10"),
        (pickle.dumps({"data": _PIXELS.astype(float), "labels": [1, 2]}), "expected uint8"),
        (pickle.dumps({"data": "x", "labels": [1]}), "is str"),
    ],
)
def test_foreign_file_is_explained(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        data.load_batch(path, "labels", 10)
    assert str(path) in str(caught.value)


def test_truncated_file_is_explained(tmp_path: Path, write_archive: WriteArchive) -> None:
    path = write_archive(tmp_path, "cifar100", [2] * 100) / "train"
    whole = path.read_bytes()
    for length in (10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            data.load_batch(path, "fine_labels", 100)


def test_missing_archive_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        data.find_folder("cifar10", tmp_path)


def test_reduced_resolution_is_the_area_average() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    reduced = data.reduce_resolution(images, 16)
    assert reduced.dtype == np.uint8
    assert reduced[1, 2, 3, 4] == np.rint(images[1, 2, 6:8, 8:10].mean())
    assert data.reduce_resolution(images, 32) is images
    with pytest.raises(ValueError, match="resolution is 12"):
        data.reduce_resolution(images, 12)


def test_fingerprint_tells_sets_apart(tiny_data: Path) -> None:
    folder = data.find_folder("cifar10", tiny_data)
    first, again = (data.load_dataset("cifar10", folder, imbalance=10) for _ in range(2))
    other = data.load_dataset("cifar10", folder, imbalance=10, subset_seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_docstrings() -> None:
    assert doctest.testmod(data).failed == 0


# --- downloading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address of a local server for it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}/archive.tar.gz"
        server.shutdown()
        thread.join()


def _pack(served: Path, tmp_path: Path, write_archive: WriteArchive) -> str:
    folder = write_archive(tmp_path / "original", "cifar10", [2] * 10)
    with tarfile.open(served / "archive.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    return hashlib.md5((served / "archive.tar.gz").read_bytes()).hexdigest()


def test_download_unpacks_what_matches(
    tmp_path: Path, served: tuple[Path, str], write_archive: WriteArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    md5 = _pack(served[0], tmp_path, write_archive)
    monkeypatch.setitem(data.ARCHIVES, "cifar10", replace(data.ARCHIVES["cifar10"], md5=md5))
    folder = data.download("cifar10", tmp_path / "new", url=served[1])
    assert len(data.load_train("cifar10", folder)[1]) == 20
    assert [path.name for path in (tmp_path / "new").iterdir()] == [folder.name]
    (served[0] / "archive.tar.gz").unlink()
    assert data.download("cifar10", tmp_path / "new", url=served[1]) == folder  # already there: nothing is fetched


def test_download_keeps_nothing_of_another_file(
    tmp_path: Path, served: tuple[Path, str], write_archive: WriteArchive
) -> None:
    _pack(served[0], tmp_path, write_archive)
    with pytest.raises(ValueError, match=f"expected {data.ARCHIVES['cifar10'].md5}"):
        data.download("cifar10", tmp_path / "new", url=served[1])
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("kind", ["climbing", "absolute", "link"])
def test_download_refuses_what_leaves_its_folder(kind: str, tmp_path: Path, served: tuple[Path, str]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("secret")
    with tarfile.open(served[0] / "archive.tar.gz", "w:gz") as tar:
        if kind == "link":
            (tmp_path / "link").symlink_to(tmp_path)
            tar.add(tmp_path / "link", "cifar-10-batches-py/up", recursive=False)
            tar.add(victim, "cifar-10-batches-py/up/escaped")
        else:
            member = tar.gettarinfo(victim)
            member.name = "../../escaped" if kind == "climbing" else str(tmp_path / "escaped")
            with victim.open("rb") as file:
                tar.addfile(member, file)
    md5 = hashlib.md5((served[0] / "archive.tar.gz").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="cannot be unpacked"):
        data.download("cifar10", tmp_path / "new", url=served[1], md5=md5)
    assert not list(tmp_path.rglob("escaped"))


def test_download_reports_an_unreachable_server(tmp_path: Path, served: tuple[Path, str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        (served[0] / "archive.tar.gz").unlink()
    with pytest.raises(OSError, match="404"):
        data.download("cifar10", tmp_path / "new", url=served[1])


# --- the real images, where they are ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "unpack.py").exists(), reason="no ../shared/data beside the repository")
def test_subset_archive_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(SHARED / "unpack.py"), "cifar100_lt50", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    folder = data.find_folder("cifar100", tmp_path)
    for imbalance, total in ((50, 12608), (100, 10847), (200, 9502)):
        loaded = data.load_dataset("cifar100", folder, imbalance=imbalance, resolution=16)
        assert sum(loaded.counts) == total
        assert loaded.eval_images.shape == (10000, 3, 16, 16)
    with pytest.raises(ValueError, match="class 1 should have 488 images but the archive has 480"):
        data.load_dataset("cifar100", folder, imbalance=10)
