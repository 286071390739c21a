"""The benchmark that counts launches: it counts what is there, by the part of the step that it belongs to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from longtail.data import long_tail_counts
from pretended_gpu import why_kernels_cannot_run

if torch.cuda.is_available():
    pytest.skip("the benchmark chooses Triton's interpreter for all of the process", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import launches as benchmark  # noqa: E402

if not why_kernels_cannot_run():
    import cuda_code  # noqa: F401  # with Dynamo, which has to see PyTorch before a pretended GPU does

Options = Callable[..., list[str]]


def test_what_a_step_launches_is_counted_by_part(tiny_options: Options) -> None:
    counts = benchmark.captured(tiny_options("counted", "--spareg", "0.3", "--spaproj"), own_kernels=False)
    # Of 7 layers: convolution, normalisation, ReLU; 3 sums with a shortcut, 2 of them padded; the mean over pixels.
    assert counts["network"] == 3 * 7 + 3 + 2 + 1
    # Logarithm of softmax, loss, linear layer; lambda and the share of the batch; sums of loss, penalty, correct,
    # predictions and images.
    assert counts["loss and figures"] == 3 + 3 + 10
    assert (counts["augmentation"], counts["optimizer"]) == (19, 2)


def test_own_kernels_count_in_the_part_that_they_serve(tiny_options: Options) -> None:
    if why_kernels_cannot_run():
        pytest.skip(why_kernels_cannot_run())
    counts = benchmark.captured(tiny_options("counted", "--spareg", "0.3", "--spaproj"), own_kernels=True)
    without = benchmark.captured(tiny_options("without"), own_kernels=True)
    # move_means, align_rows and project.
    assert (counts["class means"], counts["SpA-Reg"], counts["SpA-Proj"]) == (1, 1, 1)
    # pull_back; lambda, and the sums of two gradients each of features and weight.
    assert counts["backward"] - without["backward"] == 1 + 3


def test_a_record_and_a_page(tmp_path: Path, write_archive: Callable[..., Path]) -> None:
    if why_kernels_cannot_run():
        pytest.skip(why_kernels_cannot_run())
    if torch.version.cuda is None or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this PyTorch knows no tensors of a GPU that is not there")
    write_archive(tmp_path / "data", "cifar100", long_tail_counts(500, 100, 100))
    options = "--spareg 0.3 --spaproj --depth 8 --resolution 8 --batch-size 32 --epochs 2 --warmup-epochs 1"
    argv = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--options", options]
    assert benchmark.main(argv) == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*-launches.json"))
    ways = record["launches"]["bf16"]
    assert sum(ways["own kernels"].values()) < sum(ways["torch"].values()) - 100
    assert sum(ways["own kernels, --compile"].values()) < sum(ways["own kernels"].values())
    assert ways["own kernels, --compile"]["augmentation"] <= 2
    assert ways["own kernels, --compile"]["class means"] == 2, "their sum is not left to what follows in a graph"
    assert str(tmp_path) not in record["command"]
    (page,) = (path.read_text() for path in (tmp_path / "out").glob("*-launches.md"))
    assert f"**{sum(ways['torch'].values())}**" in page
