"""The training step as torch.compile writes it for a GPU: it builds, it trains as the step it was written from."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cifar_lt
import pytest
import torch
from longtail import engine
from longtail.engine import Trainer
from longtail.reporting import flatten

pytest.importorskip("triton", reason="Inductor writes Triton kernels for a GPU")
if torch.version.cuda is None or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
    pytest.skip("this PyTorch knows no tensors of a GPU that is not there", allow_module_level=True)

from cuda_code import Code, cuda_code

Options = Callable[..., list[str]]
ALIGNED = ("--spareg", "0.3", "--spaproj")
CALLS = {
    "extern_kernels.convolution",
    "torch.ops.aten.convolution_backward.default",
    "extern_kernels.addmm",
    "extern_kernels.mm",
    "torch.ops.spalign.update_class_means.default",
}


def train(argv: list[str], *, compiled: bool, epochs: int = 2) -> Trainer:
    trainer = Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv)))
    if compiled:
        trainer.compile()
    for _ in range(epochs):
        trainer._run_epoch()
    return trainer


@pytest.mark.parametrize(
    ("options", "batch_launches"),
    [
        (("--amp", "bf16", *ALIGNED), 2),  # of 19 operations
        (("--method", "glmc", *ALIGNED), 4),  # of about 100
    ],
)
def test_the_step_compiles_for_a_gpu_and_trains_alike(
    options: tuple[str, ...], batch_launches: int, tiny_options: Options
) -> None:
    """Batch, loss and backward pass are one graph each for each of two sizes, however many epochs follow.

    Of libraries and operators only those are called that nothing could be written for.
    """
    with cuda_code() as codes:
        compiled = train(tiny_options("compiled", *options), compiled=True)
    assert len(compiled.batches) % compiled.batches.batch_size, "the last batch is smaller"
    assert [code.backward for code in codes] == [False, False, True] * 2
    assert {name for code in codes for name in code.launches if not name.startswith("triton_")} <= CALLS
    assert len(codes[0].launches) <= batch_launches

    eager = train(tiny_options("eager", *options), compiled=False)
    for name in ("loss", "spareg"):
        # Sums are added in another order, and two epochs carry that on: with 24 bits, and with the 8 of bfloat16.
        tolerance = 0.1 if "bf16" in options else 1e-4
        assert compiled.record[name] == pytest.approx(eager.record[name], rel=tolerance)


def evaluate(trainer: Trainer) -> dict[str, float]:
    return {name: value for name, value in flatten(trainer._evaluate()) if value is not None}


@pytest.mark.parametrize("method", ["ce", "etf-dr", "glmc"])
def test_evaluation_compiles_for_a_gpu_and_says_the_same(
    method: str, tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all epochs, training images and test images; what is left at the end runs as it is written."""
    monkeypatch.setitem(engine.EVAL_BATCH, "cpu", 32)
    options = ("--method", method, "--epochs", "1", "--warmup-epochs", "0")
    trainer, plain = (train(tiny_options(name, *options), compiled=False, epochs=0) for name in ("one", "other"))
    assert all(len(images) % 32 for images in (trainer.eval_set, trainer.train_set)), "something is left"
    with cuda_code() as codes:
        trainer.compile()
        figures = [evaluate(trainer) for _ in range(2)]
    (code,) = codes
    convolutions = [module for module in trainer.baseline.model.modules() if isinstance(module, torch.nn.Conv2d)]
    called = [name for name in code.launches if not name.startswith("triton_")]
    assert called.count("extern_kernels.convolution") == len(convolutions)
    assert set(called) <= {"extern_kernels.convolution", "extern_kernels.addmm", "extern_kernels.mm"}
    # Batch normalisation, ReLU and shortcut are one kernel after each convolution, and the head needs a few.
    assert len(code.launches) - len(called) <= len(convolutions) + 6
    for figure in figures:
        assert figure == pytest.approx(evaluate(plain), rel=1e-4)  # float32, sums in another order


def build(codes: list[Code], folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the kernels in a process without Triton's interpreter, which prints how many there are."""
    (folder / "codes.json").write_text(json.dumps([dataclasses.asdict(code) for code in codes]))
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cuda_code import Code
print(sum(Code(**code).compile() for code in json.load(open(sys.argv[2]))))
"""
    command = [sys.executable, "-c", script, str(Path(__file__).resolve().parents[1]), str(folder / "codes.json")]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_kernels_build(tiny_options: Options, tmp_path: Path) -> None:
    """As Triton's compiler and ptxas see it."""
    with cuda_code() as codes:
        train(tiny_options("compiled", *ALIGNED, "--batch-size", "250"), compiled=True, epochs=1)
    batch, loss, backward = codes
    built = build(codes, tmp_path)
    assert built.returncode == 0, built.stderr[-2000:]
    assert int(built.stdout) > 20
    assert len(loss.launches) + len(backward.launches) > 40
    broken = dataclasses.replace(batch, source=batch.source.replace("tl.program_id(0)", "tl.no_such_thing(0)"))
    assert "no_such_thing" in build([broken], tmp_path).stderr
