"""The trainer on a pretended GPU: tensors where they belong, steps that never wait, graphs that replay the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cifar_lt
import pytest
import torch
from longtail.engine import Trainer
from longtail.reporting import read_records
from pretended_gpu import GPU, PretendedGpu, pretended_gpu, why_kernels_cannot_run

Options = Callable[..., list[str]]

ALIGNED = ("--spareg", "0.3", "--spaslerp", "--spaproj")
METHODS = {
    "ce": ALIGNED,
    "ce, accumulated and clipped": (*ALIGNED, "--accumulate", "2", "--clip-norm", "1"),
    "ce with mixup": ("--mixup", "1", *ALIGNED),
    "ce without alignment": (),
    "ce in bfloat16": ("--amp", "bf16", "--channels-last", *ALIGNED),
    "arb": ("--method", "arb", *ALIGNED),
    "arb, batch counts": ("--method", "arb", "--class-counts", "batch", *ALIGNED),
    "etf-dr": ("--method", "etf-dr", "--spareg", "0.3"),
    "etf-dr with mixup": ("--method", "etf-dr", "--mixup", "1", "--spareg", "0.3"),
    "glmc": ("--method", "glmc", *ALIGNED),
    "glmc, conventional head": ("--method", "glmc", "--aligned-head", "conventional", *ALIGNED),
}


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu() as device:
        yield device


def train(argv: list[str], *more: str) -> Trainer:
    trainer = Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args([*argv, *more])))
    trainer.run()
    return trainer


# --- the pretence -----------------------------------------------------------------------------------------------------


def test_operands_on_two_devices_raise(gpu: PretendedGpu) -> None:
    here, there = torch.ones(3), torch.ones(3, device=GPU)
    assert (here.device.type, there.device, (there + 1).device) == ("cpu", GPU, GPU)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        here + there
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        there[torch.tensor([0])]
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()
    assert (here.to(GPU) + there).cpu().device.type == "cpu"


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: bool(t.any()),
        lambda t: t[t > 0],
        lambda t: t.copy_(torch.ones(3)),
        lambda t: torch.tensor([1.0], device=GPU),
        lambda t: torch.ones(3).to(GPU, non_blocking=True),
    ],
)
def test_what_waits_is_noted_and_raises_where_forbidden(gpu: PretendedGpu, wait: Callable[[Any], Any]) -> None:
    values = torch.ones(3, device=GPU)
    wait(values)
    assert gpu.waits
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(values)
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="capturing"):
        wait(values)


def test_a_graph_replays_operations_and_no_python(gpu: PretendedGpu) -> None:
    weight = torch.ones(2, device=GPU, requires_grad=True)
    x, rate, number, kept = (
        torch.ones(2, device=GPU),
        torch.full((), 0.5, device=GPU),
        [1.0],
        torch.zeros(2, device=GPU),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = (weight * x * number[0]).sum()
        loss.backward()
        assert weight.grad is not None
        with torch.no_grad():
            weight -= rate * weight.grad
            kept.copy_(weight)
    assert weight.tolist() == [1.0, 1.0], "recorded, not run"
    assert kept.tolist() == [0.0, 0.0]
    graph.replay()
    assert weight.tolist() == [0.5, 0.5]
    x.fill_(2.0)
    rate.fill_(0.25)
    number[0] = 100.0  # of Python: unseen
    graph.replay()
    assert weight.tolist() == [0.0, 0.0]
    assert kept.tolist() == [0.0, 0.0]
    assert loss.item() == 2.0
    rate = torch.zeros((), device=GPU)  # another tensor: unseen
    graph.replay()
    assert weight.tolist() == [-0.5, -0.5]


# --- CIFAR-LT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_captured_run_is_the_run_of_its_single_steps(
    name: str, tiny_options: Options, tmp_path: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs, evaluation and checkpoints too; and once libraries have warmed up, no step waits for the device."""
    steps: list[int] = []
    real = Trainer._train_step

    def watched(trainer: Trainer, step: int) -> None:
        gpu.forbidden = len(steps) > 0
        real(trainer, step)
        gpu.forbidden = False
        steps.append(step)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    argv = [*tiny_options("eager", *METHODS[name]), "--device", "cuda", "--epochs", "5"]
    # The captured step needs the fused optimizer; here the other run has it too, so that no rounding differs.
    real_sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **options: real_sgd(*a, **{**options, "fused": True}))
    eager = train(argv)
    steps.clear()
    captured = train([*argv, "--capture"], "--output-dir", str(tmp_path / "captured"))
    sizes = {32, len(captured.batches) % 32}
    assert len(steps) == 5 * captured.batches.steps_per_epoch
    assert captured.captured is not None
    assert captured.captured.graphs.keys() == sizes, "after three epochs that of the last batch too"
    without_seconds = [
        [{**record, "seconds": None} for record in read_records(run.folder / "metrics.jsonl")]
        for run in (eager, captured)
    ]
    for a, b in zip(*without_seconds, strict=True):
        # The learning rate is a float32 number on the device, and a float64 number in Python.
        assert a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    weights = [list(run.baseline.model.state_dict().values()) for run in (eager, captured)]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # as above, over five epochs


@pytest.mark.parametrize("capture", [(), ("--capture",)])
def test_a_resumed_run_is_the_whole_run(
    capture: tuple[str, ...], tiny_options: Options, tmp_path: Path, gpu: PretendedGpu
) -> None:
    argv = [*tiny_options("parts", "--method", "glmc", *ALIGNED), "--device", "cuda", *capture]
    whole = train(argv, "--output-dir", str(tmp_path / "whole"))
    train(argv, "--stop-after-epochs", "1")
    resumed = train(argv, "--resume")
    assert resumed.epoch == 3
    states = [run.baseline.model.state_dict() | run.alignment.state_dict()["tracker"] for run in (whole, resumed)]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


CPU, CAPTURED = ("--device", "cpu"), ("--device", "cuda", "--capture")


@pytest.mark.parametrize("ways", [(CPU, CAPTURED), (CAPTURED, CPU)], ids=["begun-on-the-cpu", "begun-captured"])
def test_a_run_goes_on_in_another_way(
    ways: Sequence[Sequence[str]], tiny_options: Options, tmp_path: Path, gpu: PretendedGpu
) -> None:
    argv = tiny_options("parts", *ALIGNED)
    whole = train(argv, "--output-dir", str(tmp_path / "whole"))
    train(argv, *ways[0], "--stop-after-epochs", "1")
    resumed = train(argv, *ways[1], "--resume")
    for group in resumed.optimizer.param_groups:
        assert isinstance(group["lr"], torch.Tensor) == (ways[1] is CAPTURED)
    assert resumed.epoch == 3
    assert resumed.record["loss"] == pytest.approx(whole.record["loss"], rel=1e-4)
    weights = [list(run.baseline.model.state_dict().values()) for run in (whole, resumed)]
    for a, b in zip(*weights, strict=True):
        # Other kernels and rates in float32, which three epochs at a rate of 0.1 carry on.
        torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=1e-3)


def test_the_second_stage_takes_its_network_to_the_device(
    tiny_options: Options, tmp_path: Path, gpu: PretendedGpu
) -> None:
    argv = [*tiny_options("first", "--method", "glmc"), "--device", "cuda"]
    first = train(argv)
    more = ("--method", "glmc-maxnorm", "--first-stage", str(first.folder), "--capture")
    second = train(argv, *more, "--output-dir", str(tmp_path / "second"))
    assert second.record["loss"] > 0


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("ce", 1e-3),  # other orders of sums, over four epochs
        ("glmc", 0.1),  # where a change of 1e-7 in lambda shows in the second digit
    ],
)
def test_the_librarys_own_kernels_train_the_same_in_a_smaller_graph(
    name: str, close: float, tiny_options: Options
) -> None:
    """Class indices and mixed labels; of what the strategies add to a captured step, less than half is left."""
    if why_kernels_cannot_run():
        pytest.skip(why_kernels_cannot_run())
    losses, added = [], []
    for own_kernels in (False, True):
        nodes, record = [], {}
        for strategies in ((), ("--spareg", "0.3", "--spaproj")):
            options = ("--method", name, *strategies, "--device", "cuda", "--capture", "--epochs", "4")
            with pretended_gpu(own_kernels=own_kernels) as gpu:
                run = train(tiny_options(f"{own_kernels}{len(strategies)}", *options))
            assert bool(gpu.launches) == own_kernels
            assert run.captured is not None
            graph: Any = run.captured.graphs[32]
            nodes.append(len(graph._calls))
            record = run.record
        added.append(nodes[1] - nodes[0])
        losses.append(record["loss"])
    assert added[1] < added[0] / 2
    assert losses[1] == pytest.approx(losses[0], rel=close)


def test_half_precision_waits_only_for_its_scaler(tiny_options: Options, gpu: PretendedGpu) -> None:
    argv = [*tiny_options("run", *ALIGNED), "--device", "cuda"]
    train(argv)
    before, gpu.waits = gpu.waits, []
    trained = train([*argv, "--overwrite"], "--amp", "fp16")
    steps = 3 * trained.batches.steps_per_epoch
    # The scaler's beginning and state cost a few; a step asks once whether its gradients are finite.
    assert steps <= len(gpu.waits) - len(before) <= steps + 20


def test_a_cpu_takes_no_graph(tiny_options: Options) -> None:
    with pytest.raises(ValueError, match="--capture records a CUDA graph"):
        train(tiny_options("run"), "--capture")
