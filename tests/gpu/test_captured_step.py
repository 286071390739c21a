"""The trainer's step as a CUDA graph: the same training as step by step, whatever the method."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu(own_kernels=False)  # thousands of steps; in the interpreter each takes a second
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

METHODS = {
    "ce": ("--spareg", "0.3", "--spaslerp", "--spaproj"),
    "ce with mixup": ("--mixup", "1", "--spareg", "0.3"),
    "arb": ("--method", "arb", "--class-counts", "batch", "--spareg", "0.3"),
    "etf-dr": ("--method", "etf-dr", "--spareg", "0.3"),
    "glmc": ("--method", "glmc", "--spareg", "0.3", "--clip-norm", "5"),
}


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are not beside the tests")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    random = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    counts = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
    for name, labels in (("train", np.repeat(np.arange(100), counts)), ("test", np.arange(100))):
        data = (random.integers(0, 256, (len(labels), 3072)) // 4 + labels[:, None]).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels.tolist()}, protocol=2))
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Convolutions in TF32 make one rounding of the weights the third digit of an epoch's loss."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


def trainer_of(data_dir: Path, folder: Path, *options: str) -> Any:
    cifar_lt = sys.modules.get("cifar_lt") or __import__("cifar_lt")
    argv = f"--data-dir {data_dir} --output-dir {folder} --preset small --depth 8 --resolution 8 --epochs 5".split()
    argv += ["--warmup-epochs", "1", "--device", "cuda", "--quiet", "--no-tensorboard"]
    settings = cifar_lt.settings_from(cifar_lt.build_parser().parse_args([*argv, *options]))
    return sys.modules["longtail.engine"].Trainer(settings)


def train(data_dir: Path, folder: Path, *options: str) -> Any:
    trainer = trainer_of(data_dir, folder, *options)
    trainer.run()
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_captured_steps_equal_eager_steps(name: str, data_dir: Path, tmp_path: Path) -> None:
    assert_equal_steps(data_dir, tmp_path, "--capture", *METHODS[name])


@pytest.mark.gpu(real=True)
@pytest.mark.parametrize("name", ["ce", "glmc"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_captured_compiled_steps_equal_eager_steps(name: str, data_dir: Path, tmp_path: Path) -> None:
    assert_equal_steps(data_dir, tmp_path, "--capture", "--compile", *METHODS[name])


def assert_equal_steps(data_dir: Path, tmp_path: Path, *options: str) -> None:
    """Three steps before the capture and nine replays, which chaos has not reached yet."""
    plain = [option for option in options if option not in ("--capture", "--compile")]
    eager, captured = (
        trainer_of(data_dir, tmp_path / name, *more) for name, more in (("eager", plain), ("captured", options))
    )
    for trainer in (eager, captured):
        trainer._begin_epoch([0.01] * trainer.steps_per_epoch)
        for step in range(12):
            trainer._train_step(step)
    assert len(captured.captured.graphs) == 1
    # Sums of float32 in other orders, by a fused optimizer and other kernels.
    torch.testing.assert_close(captured.totals[:2], eager.totals[:2], rtol=1e-4, atol=0.0)
    for a, b in zip(eager.parameters, captured.parameters, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    for a, b in zip(eager.alignment.tracker.buffers(), captured.alignment.tracker.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ce", "glmc"])
def test_captured_training_goes_on_as_eager_training(name: str, data_dir: Path, tmp_path: Path) -> None:
    """Five epochs, so that an epoch's last, smaller batch has a graph too. By then chaos has amplified any rounding."""
    eager = train(data_dir, tmp_path / "eager", *METHODS[name])
    captured = train(data_dir, tmp_path / "captured", "--capture", *METHODS[name])
    assert len(captured.captured.graphs) == 2
    assert captured.record["loss"] == pytest.approx(eager.record["loss"], rel=0.05)
    assert captured.record["train_accuracy"] == pytest.approx(eager.record["train_accuracy"], abs=3.0)
    assert torch.equal(eager.alignment.tracker.weight, captured.alignment.tracker.weight)


def test_a_captured_run_resumes(data_dir: Path, tmp_path: Path) -> None:
    train(data_dir, tmp_path / "run", "--capture", "--stop-after-epochs", "1")
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    resumed = train(data_dir, tmp_path / "run", "--capture", "--resume")
    assert resumed.epoch == 5
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(first), "the first epoch was not repeated"
