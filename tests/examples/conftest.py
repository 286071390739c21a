"""Makes `examples/` importable and writes tiny archives in CIFAR's own format."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples"))

TINY_MAX = 60  # images of the largest class where a test trains

WriteArchive = Callable[..., Path]


def make_archive(
    data_dir: Path, dataset: str, counts: Sequence[int], *, per_test_class: int = 4, protocol: int = 2
) -> Path:
    """Write `counts[c]` training images of class c, noise around its own colour, and return their folder."""
    random = np.random.default_rng(0)
    colours = random.integers(40, 215, (len(counts), 3))

    def write(path: Path, labels: list[int]) -> None:
        images = colours[labels][:, :, None] + random.normal(0, 40, (len(labels), 3, 1024))
        data = images.clip(0, 255).astype(np.uint8).reshape(-1, 3072)
        key = "labels" if dataset == "cifar10" else "fine_labels"
        path.write_bytes(pickle.dumps({"data": data, key: labels, "batch_label": path.name}, protocol=protocol))

    train = random.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    test = np.repeat(np.arange(len(counts)), per_test_class).tolist()
    folder = data_dir / ("cifar-10-batches-py" if dataset == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    if dataset == "cifar10":
        for i in range(5):
            write(folder / f"data_batch_{i + 1}", train[i::5])
        write(folder / "test_batch", test)
    else:
        write(folder / "train", train)
        write(folder / "test", test)
    return folder


@pytest.fixture
def write_archive() -> WriteArchive:
    return make_archive


@pytest.fixture
def tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a CIFAR-10 of at most `TINY_MAX` images per class; the rule's n_max is lowered to match."""
    from longtail import data

    monkeypatch.setitem(data.ARCHIVES, "cifar10", replace(data.ARCHIVES["cifar10"], max_per_class=TINY_MAX))
    make_archive(tmp_path / "data", "cifar10", [TINY_MAX] * 10)
    return tmp_path / "data"


@pytest.fixture
def tiny_options(tiny_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a command line that trains for three short epochs; later options win over earlier ones."""

    def options(output: str, *more: str) -> list[str]:
        common = (
            f"--dataset cifar10 --imbalance 10 --preset small --resolution 8 --depth 8 --epochs 3 --batch-size 32 "
            f"--warmup-epochs 1 --threads 1 --device cpu --no-tensorboard --quiet --data-dir {tiny_data}"
        )
        return [*common.split(), "--output-dir", str(tmp_path / output), *more]

    return options
