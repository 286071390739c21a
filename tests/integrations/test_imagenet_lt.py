"""`imagenet_lt.py` by one and two processes: kills, stops, resumes, sharding, and bad input."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from imagenet_ranks import (
    COUNTS,
    EXAMPLES,
    SECONDS,
    Ranks,
    compile_to_graphs,
    end_like_nccl,
    fail_on_rank_1,
    make_tree,
    options,
)
from packaging.version import Version
from pretended_gpu import pretended_gpu
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install -e '.[imagenet]'")
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

import imagenet_lt
from longtail.baseline import Batch
from longtail.ce import CrossEntropy
from longtail.etf_dr import EtfDotRegression
from longtail.imagenet import loader
from longtail.imagenet.engine import EpochDraws, Trainer
from longtail.imagenet.loader import Plan, TrainLoader
from longtail.parallel import World, _launch

# Python 3.12 and later say so of every fork of a process with threads, which is how loader workers start.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

METHODS = {
    "ce": "--spareg 0.3 --spaslerp --spaproj",
    "etf-dr": "--spareg 0.3 --mixup 0.2",
    "arb": "--spareg 0.3 --spaslerp --spaproj --class-counts batch",
    "glmc": "--spareg 0.3 --spaslerp --spaproj",
}
REPOSITORY = EXAMPLES.parent
SAMPLE = REPOSITORY.parent / "shared" / "data" / "imagenet_sample"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def command(tree: Path, tmp_path: Path) -> Callable[..., list[str]]:
    return lambda output, *more: options(tree, tmp_path / output, *" ".join(more).split())


def train(argv: list[str]) -> int:
    """Run the script in this process."""
    try:
        return imagenet_lt.main(argv)
    finally:
        torch.use_deterministic_algorithms(False)


def weights(folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return loaded


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    """The weights to the last bit; figures to the rounding of sums in another order."""
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name
    for a, b in zip(records(one), records(other), strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert a["images"] == b["images"]
        for name in ("loss", "train_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-12)
        assert a["alignment"]["all"] == pytest.approx(b["alignment"]["all"], rel=1e-12)


def kill_early(argv: list[str], folder: Path) -> None:
    """Kill both processes with signal 9 soon after the first checkpoint, in the middle of an epoch."""
    ranks = Ranks(argv)
    ranks.until(lambda: list(folder.glob("checkpoints/epoch-0000-step-000001")))
    assert ranks.kill() == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_killed_and_resumed_end_as_one_that_was_not(
    method: str, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights equal bit for bit; and one process goes on from two, with every image seen once in every epoch."""
    arguments = ("--method", method, METHODS[method])
    assert Ranks(command("whole", *arguments)).wait() == [0, 0]
    kill_early(command("killed", *arguments), tmp_path / "killed")
    shutil.copytree(tmp_path / "killed", tmp_path / "one")
    assert Ranks(command("killed", *arguments, "--resume")).wait() == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "killed")

    begun: list[tuple[int, int]] = []
    whole = TrainLoader.epoch

    def recorded(self: TrainLoader, epoch: int, first_step: int = 0) -> Any:
        begun.append((epoch, first_step))
        return whole(self, epoch, first_step)

    monkeypatch.setattr(TrainLoader, "epoch", recorded)
    assert train(command("one", *arguments, "--resume")) == 0
    (epoch, step), *later = begun
    assert later == [(e, 0) for e in range(epoch + 1, 3)]
    seen = [
        place for rank in range(2) for s in range(step) for part in Plan(36, 12, 2, rank).parts(s) for place in part
    ]
    seen += [place for s in range(step, 3) for part in Plan(36, 12).parts(s) for place in part]
    assert sorted(seen) == list(range(36))
    assert [record["images"] for record in records(tmp_path / "one")] == [36, 36, 36]
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["counts"] == list(COUNTS)
    assert set(weights(tmp_path / "one")) == set(weights(tmp_path / "whole"))


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_to_one_process_saves_in_the_middle_of_an_epoch_and_ends_both(
    workers: int, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Without periodic checkpoints: what is there to go on from is what the signal saved. Loader workers get it too."""
    arguments = ("--spareg 0.3", "--checkpoint-steps 0", f"--epochs 6 --workers {workers}")
    assert Ranks(command("whole", *arguments)).wait() == [0, 0]
    ranks = Ranks(command("run", *arguments))
    ranks.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and records(tmp_path / "run"))
    listed = ["ps", "--ppid", str(ranks.processes[1].pid), "-o", "pid="]
    children = subprocess.run(listed, capture_output=True, check=False, text=True).stdout.split()
    assert len(children) >= workers
    for pid in (*map(int, children), ranks.processes[1].pid):
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert ranks.wait() == [0, 0]
    assert not (tmp_path / "run" / "result.json").exists()
    *_, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert 1 <= torch.load(newest / "state.pt", weights_only=True)["epoch"] < 6
    assert Ranks(command("run", *arguments, "--resume")).wait() == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_sigterm_to_one_process_ends_both_where_an_epoch_is_one_step(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """No question is under way when the epoch ends, and still no process may go by what it alone has heard."""
    ranks = Ranks(command("run", "--checkpoint-steps 0 --batch-size 36 --epochs 500"))
    ranks.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and records(tmp_path / "run"))
    assert ranks.processes[1].pid is not None
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [0, 0]
    assert len(records(tmp_path / "run")) < 500


def test_sigterm_in_an_epoch_s_last_step_saves_before_the_evaluation(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take longer than a scheduler waits; the run that goes on makes up for it."""
    assert train(command("whole", "--spareg 0.3 --spaslerp --checkpoint-steps 0")) == 0
    whole = Trainer._train_step

    def stopped(self: Trainer, step: int, *args: Any) -> None:
        whole(self, step, *args)
        if (self.epoch, step) == (1, self.plan.steps - 1):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", stopped)
    arguments = command("run", "--spareg 0.3 --spaslerp --checkpoint-steps 0")
    assert train(arguments) == 0
    assert len(records(tmp_path / "run")) == 1
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == "epoch-0001-step-000003"
    assert train([*arguments, "--resume"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_process_that_fails_leaves_without_waiting_for_the_others(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for it in a collective, and under NCCL the end of its process group would wait for theirs."""
    assert Ranks(command("run"), errors=tmp_path, prepare=fail_on_rank_1).wait() == [1, 1]
    assert "RuntimeError: nobody expects it" in (tmp_path / "stderr1").read_text()
    assert Ranks(command("run", "--resume --lr 0.2"), prepare=end_like_nccl).wait() == [2, 2]


def test_what_fails_in_training_keeps_its_traceback(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip of the code is neither a bad option, nor told in a line."""

    def slip(self: Trainer, *_: Any) -> None:
        raise ValueError("a slip")

    monkeypatch.setattr(Trainer, "_train_step", slip)
    with pytest.raises(ValueError, match="a slip"):
        train(command("run"))


def test_a_restart_goes_on_with_nothing_but_what_its_own_launch_began(command: Callable[..., list[str]]) -> None:
    """Its first attempt may have failed because the folder was another run's, or before it came to overwrite it."""

    def trainer(launch: str, more: str = "", *, restarted: bool = True) -> Trainer:
        settings = imagenet_lt.settings_from(imagenet_lt.build_parser().parse_args(command("run", "--epochs 2", more)))
        return Trainer(settings, World(0, 1, torch.device("cpu"), grouped=False, restarted=restarted, launch=launch))

    try:
        trainer("one", "--stop-after-epochs 1", restarted=False).run()
        with pytest.raises(ValueError, match="holds a run: pass --resume"):
            trainer("other")
        assert trainer("one").epoch == 1
        assert trainer("other", "--overwrite").epoch == 0
        assert trainer("other").epoch == 0
        trainer("third", "--resume --stop-after-epochs 1").run()
        assert trainer("third", "--overwrite").epoch == 1
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_launch_is_known_by_the_process_that_starts_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by torchrun's run id alone, which `--rdzv-id 1` makes the same for all."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    ours = _launch()
    assert _launch() == ours
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert _launch() != ours


def test_torchrun_starts_anew_after_a_dead_worker(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Elastic restart: all workers go on from the newest checkpoint, without `--resume`."""
    arguments = ("--spareg 0.3",)
    assert Ranks(command("whole", *arguments)).wait() == [0, 0]
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    argv += ["--monitor-interval=0.1", str(EXAMPLES / "imagenet_lt.py"), *command("elastic", *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    agent = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + SECONDS
        while not list((tmp_path / "elastic").glob("checkpoints/epoch-0000-step-000001")):
            assert agent.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        children = subprocess.run(["ps", "--ppid", str(agent.pid), "-o", "pid="], capture_output=True, check=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        output, _ = agent.communicate(timeout=SECONDS)
    finally:
        agent.kill()
    assert agent.returncode == 0, output
    assert_same(tmp_path / "whole", tmp_path / "elastic")


@pytest.mark.parametrize("method", ["ce", "etf-dr", "glmc"])
def test_two_processes_train_as_one_with_two_micro_batches(
    method: str, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The same images meet in each batch normalisation, and gradients add up alike, to float32 rounding over 9 steps.

    Without strategies: one process feeds the class means twice a step, two feed them together. Only running statistics,
    of which the first process has its own, differ.
    """
    arguments = ("--method", method, "--mixup 0", "--lr 0.01")
    assert Ranks(command("two", *arguments)).wait() == [0, 0]
    assert train(command("one", *arguments, "--accumulate 2")) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5, msg=name)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["images"] == b["images"] == 36


def test_micro_batches_are_balanced_by_the_classes_of_the_whole_batch(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts that ETF-DR's energy sees of two micro-batches are those of both together, before mixing."""
    seen: list[tuple[int, list[float]]] = []
    whole = EtfDotRegression.energy

    def recorded(self: EtfDotRegression, batch: Batch) -> Tensor:
        assert batch.counts is not None
        seen.append((len(batch), batch.counts.tolist()))
        return whole(self, batch)

    monkeypatch.setattr(EtfDotRegression, "energy", recorded)
    assert train(command("run", "--method etf-dr --mixup 0.2 --accumulate 2 --epochs 1")) == 0
    assert [size for size, _ in seen] == [6] * 6
    assert [one for _, one in seen[::2]] == [one for _, one in seen[1::2]]
    assert [sum(counts) for _, counts in seen] == [12] * 6
    assert [sum(of_class) for of_class in zip(*(one for _, one in seen[::2]), strict=True)] == list(COUNTS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_ranks_draw_of_an_epoch(ranks: int, command: Callable[..., list[str]]) -> None:
    """Shares are equal on all ranks and depend on seed and epoch; partners stay within the micro-batch."""
    settings = imagenet_lt.settings_from(imagenet_lt.build_parser().parse_args(command("run", "--mixup 0.2")))
    labels, cpu = torch.arange(36) % 5, torch.device("cpu")

    def draws(rank: int, epoch: int) -> EpochDraws:
        return EpochDraws(settings, Plan(36, 12, ranks, rank, accumulate=2), epoch, labels, 5, cpu)

    first, again, later = draws(0, 0), draws(ranks - 1, 0), draws(0, 1)
    assert torch.equal(first.share_S, again.share_S)
    assert not torch.equal(first.share_S, later.share_S)
    assert (ranks == 1) == all(torch.equal(a, b) for a, b in zip(first.partners[0], again.partners[0], strict=True))
    for step in first.partners:
        assert [sorted(part.tolist()) for part in step] == [list(range(6 // ranks))] * 2


def test_every_strategy_acts_on_the_same_start_and_batches(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal seeds give equal weights and images to all; each strategy then changes the classifier, in its own way."""
    begun: list[list[Tensor]] = []
    whole = CrossEntropy.step

    def recorded(self: CrossEntropy, batch: Batch) -> Any:
        begun[-1] += [batch.images.clone()] if begun[-1] else [batch.images.clone(), *self.model.state_dict().values()]
        begun[-1] = [tensor.clone() for tensor in begun[-1]]
        return whole(self, batch)

    monkeypatch.setattr(CrossEntropy, "step", recorded)
    ended: dict[str, Tensor] = {}
    for strategy in ("", "--spareg 0.3", "--spaslerp", "--spaproj --gamma 0.1"):
        begun.append([])
        output = "run" + strategy.replace(" ", "")
        assert train(command(output, strategy, "--epochs 2")) == 0
        ended[strategy] = weights(tmp_path / output)["classifier.weight"]
    for one in begun[1:]:
        for a, b in zip(begun[0], one, strict=True):
            assert torch.equal(a, b)
    for a, b in itertools.combinations(ended.values(), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
def test_algorithms_are_chosen_before_anything_is_built(
    deterministic: bool, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its own device, and as `--deterministic` says; what is wrong there is a bad option."""

    def refuse(device: torch.device, **chosen: bool) -> None:
        raise ValueError(f"{device.type} {chosen}")

    monkeypatch.setattr("longtail.training.choose_algorithms", refuse)
    argv = [one for one in command("run") if deterministic or one != "--deterministic"]
    settings = imagenet_lt.settings_from(imagenet_lt.build_parser().parse_args(argv))
    with pytest.raises(ValueError, match=rf"cuda {{'deterministic': {deterministic}}}"):
        Trainer(settings, World(0, 1, torch.device("cuda", 0), grouped=False))


@pytest.mark.gpu(real=True)
def test_a_gpu_repeats_itself(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """By processes of its own: cuBLAS reads once how it is to be set up."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    for run in ("one", "other"):
        argv = command(run, "--device cuda --spareg 0.3 --spaslerp --spaproj --epochs 2")
        subprocess.run([sys.executable, str(EXAMPLES / "imagenet_lt.py"), *argv], env=environment, check=True)
    assert_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.gpu
@pytest.mark.parametrize("more", ["--amp bf16 --method glmc", "--amp fp16", "--amp bf16 --method etf-dr --mixup 0.2"])
def test_a_gpu_trains(more: str, command: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = ("--device cuda --spareg 0.3 --epochs 2", more)
    assert train([one for one in command("run", *arguments) if one != "--deterministic"]) == 0
    assert len(records(tmp_path / "run")) == 2


@pytest.mark.parametrize("method", METHODS)
def test_between_an_epoch_s_first_and_last_step_nothing_waits_for_the_device(
    method: str, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended GPU: neither the step, nor the loader, nor the progress line, nor the question whether to stop."""
    waits: list[list[str]] = []
    real = Trainer._train_step
    with pretended_gpu() as gpu:

        def watched(trainer: Trainer, step: int, *args: Any) -> None:
            if step == 0:
                gpu.waits.clear()
            real(trainer, step, *args)
            if step == trainer.plan.steps - 1:
                waits.append(list(gpu.waits))

        monkeypatch.setattr(Trainer, "_train_step", watched)
        arguments = (METHODS[method], "--device cuda --accumulate 2 --clip-norm 1 --checkpoint-steps 0 --epochs 2")
        without = ("--deterministic", "--quiet")
        assert train([one for one in command("run", "--method", method, *arguments) if one not in without]) == 0
    loader._copy_stream.cache_clear()  # of no use to a real GPU
    assert waits == [[], []]


def test_two_processes_train_compiled_as_they_do_otherwise(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """The backbone is one graph in every step, and the loss the same to float32 rounding over two steps."""
    arguments = ("--spareg 0.3 --epochs 1 --batch-size 18",)
    assert Ranks(command("plain", *arguments)).wait() == [0, 0]
    assert Ranks(command("compiled", *arguments, "--compile"), prepare=compile_to_graphs).wait() == [0, 0]
    (plain,), (compiled,) = records(tmp_path / "plain"), records(tmp_path / "compiled")
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_a_compiled_run_equals_an_eager_one(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph for each batch size of training and of evaluation, by a compiler that leaves operations alone."""
    whole, frames = torch.nn.Module.compile, []

    def recorded(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        frames.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: whole(module, backend=recorded, **how))
    arguments = ("--spareg 0.3 --spaslerp --spaproj", "--epochs 2")
    for run, more in (("eager", ""), ("compiled", "--compile")):
        assert train(command(run, *arguments, more)) == 0
    assert_same(tmp_path / "eager", tmp_path / "compiled")
    assert len(frames) == 3


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="FSDP2 of torch 2.6 does not run on the CPU")
def test_sharded_training_equals_replicated_and_its_checkpoint_is_read_without_sharding(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """FSDP2 against DDP, both with contiguous weights, which FSDP2 needs: the same convolutions, so no rounding to
    speak of; killed in between, and then one process without shards goes on from it.
    """
    arguments = ("--spareg 0.3 --spaslerp --spaproj", "--no-channels-last --epochs 2")
    assert Ranks(command("replicated", *arguments)).wait() == [0, 0]
    assert Ranks(command("sharded", *arguments, "--fsdp", "--stop-after-epochs 1")).wait() == [0, 0]
    shutil.copytree(tmp_path / "sharded", tmp_path / "one")
    assert Ranks(command("sharded", *arguments, "--fsdp", "--resume")).wait() == [0, 0]
    replicated, sharded = weights(tmp_path / "replicated"), weights(tmp_path / "sharded")
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-7)
    assert train(command("one", *arguments, "--resume")) == 0
    assert [record["epoch"] for record in records(tmp_path / "one")] == [1, 2]


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ../shared/data/imagenet_sample beside the repository")
@pytest.mark.parametrize("method", ["ce", "glmc"])
def test_real_images_train_end_to_end(method: str, tmp_path: Path) -> None:
    """63 classes of one image each: the loss of a network that learns them by heart falls."""
    files = sorted(SAMPLE.glob("*.JPEG"))
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{file.name} {label}\n" for label, file in enumerate(files)))
    argv = f"--data-dir {SAMPLE} --train-list {path} --test-list {path} --recipe small --method {method} --epochs 4"
    argv += " --batch-size 16 --resolution 64 --lr 0.02 --workers 1 --threads 1 --device cpu --scan full --quiet"
    argv += f" --spareg 0.1 --spaslerp --spaproj --output-dir {tmp_path / 'run'}"
    assert train(argv.split()) == 0
    first, *_, last = records(tmp_path / "run")
    assert last["loss"] < first["loss"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["counts"]) == len(files) == 63
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "more",
    ["--amp bf16 --clip-norm 1", "--data synthetic --num-synthetic 40 --num-synthetic-classes 5 --method glmc"],
)
def test_other_ways_to_run(more: str, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert train(command("run", more, "--epochs 1")) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_validation_list_is_looked_at_between_epochs_and_the_test_list_at_the_end(
    tree: Path, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    lines = (tree / "test.txt").read_text().splitlines(keepends=True)
    (tmp_path / "val.txt").write_text("".join(lines[::2]))
    assert train(command("run", f"--val-list {tmp_path / 'val.txt'} --epochs 2")) == 0
    first, last = records(tmp_path / "run")
    assert first["evaluated_on"] == last["evaluated_on"] == "validation"
    assert "accuracy_test" not in first
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["accuracy_last"] == last["accuracy_test"]
    assert result["best_on"] == "validation"


BAD = {
    "no lists": ("--data-dir . --recipe small", "--train-list, --test-list missing"),
    "network": ("--recipe small --lr 0", "--lr is 0.0; expected more than 0"),
    "warm-up": ("--warmup-epochs 3", "--warmup-epochs is 3; expected 0 or more and less than the 3 epochs"),
    "accumulate": ("--accumulate 13", "--accumulate is 13; expected 1 to the batch size, 12"),
    "fixed head": ("--method etf-dr --spaproj", "fixed simplex"),
    "glmc mixes": ("--method glmc --mixup 0.2", "--mixup 0.2 is not for glmc"),
    "fsdp": ("--fsdp", "start with torchrun"),
    "fsdp fp16": ("--fsdp --amp fp16", "use --amp bf16"),
    "fsdp compiled": ("--fsdp --compile", "--compile with --fsdp"),
    "sync bn compiled": ("--sync-bn --compile", "--compile with --sync-bn"),
    "sync bn": ("--sync-bn", "--sync-bn works on GPUs alone"),
    "resume": ("--resume --overwrite", "leave one out"),
    "batches": ("--batch-size 2 --accumulate 2", "batch normalisation needs 2"),
    "simplex": ("--method etf-dr --network resnet10 --data synthetic --num-synthetic-classes 600", "no simplex of 600"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(
    name: str, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = BAD[name]
    argv = more.split() if name == "no lists" else command("run", more)
    assert train(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_bad_file_is_named_before_training_on_every_process_or_left_out(
    tree: Path, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    file = broken / "train" / "n0" / "3.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    lists = (f"--data-dir {broken} --train-list {broken / 'train.txt'}", "--epochs 1")
    assert train(command("run", *lists)) == 2
    assert f"{broken / 'train.txt'}:4 ({file}): " in capsys.readouterr().err
    assert Ranks(command("run", *lists), errors=tmp_path).wait() == [2, 2]
    first, second = ((tmp_path / f"stderr{rank}").read_text() for rank in range(2))
    assert f"{broken / 'train.txt'}:4 ({file}): " in first
    assert second == ""
    assert train(command("run", *lists, "--skip-bad")) == 0
    assert records(tmp_path / "run")[0]["images"] == 35
    # Not looked at beforehand, it ends the training.
    assert train(command("other", *lists, "--scan off")) == 1
    assert f"{broken / 'train.txt'}:4 ({file})" in capsys.readouterr().err


def test_what_all_processes_know_the_first_one_says(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert train(command("run", "--epochs 1")) == 0
    for more, message in {
        "--lr x": "invalid float value",
        "--lr 0": "--lr is 0.0",
        "--overwrite --batch-size 2": "batch normalisation needs 2",
        "": "holds a run",
        "--resume --lr 0.2": "--lr 0.2 (was 0.05)",
    }.items():
        assert Ranks(command("run", "--epochs 1", more), errors=tmp_path).wait() == [2, 2]
        assert message in (tmp_path / "stderr0").read_text()
        assert (tmp_path / "stderr1").read_text() == ""
    assert Ranks(command("other", "--lr 1e30"), errors=tmp_path).wait() == [1, 1]
    assert "no longer finite in epoch 1" in (tmp_path / "stderr0").read_text()
    assert (tmp_path / "stderr1").read_text() == ""


def test_runs_are_neither_overwritten_nor_resumed_with_other_options(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(command("run", "--stop-after-epochs 2")) == 0
    before = records(tmp_path / "run")
    assert train(command("run")) == 2
    assert "holds a run: pass --resume" in capsys.readouterr().err
    assert train(command("run", "--resume --lr 0.2")) == 2
    assert "--lr 0.2 (was 0.05)" in capsys.readouterr().err
    assert records(tmp_path / "run") == before
    assert train(command("run", "--overwrite --lr 0.2 --epochs 1")) == 0
    # As many as --keep says, and none of the run before, which was further.
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["epoch-0000-step-000002", "epoch-0001-step-000000"]


def test_what_a_kill_leaves_of_a_checkpoint_is_not_gone_on_from(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A folder that was not renamed is incomplete, whatever is in it."""
    assert train(command("run", "--stop-after-epochs 1")) == 0
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    half = newest.with_name("epoch-0001-step-000002.tmp")
    half.mkdir()
    assert train(command("run", "--resume --checkpoint-steps 0")) == 0
    assert [record["epoch"] for record in records(tmp_path / "run")] == [1, 2, 3]


def test_workers_that_shared_memory_cannot_serve_are_refused(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written, and for all processes of the machine."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has its shared memory elsewhere")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=10**6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train(command("run", "--workers 3 --method glmc")) == 2
    # 12 images x 4 looks of 3 x 32 x 32, for 3 workers twice, in 4 processes.
    assert "4 processes with --workers 3 have up to 4 MB" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_not_finite_ends_the_run(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(command("run", "--lr 1e30")) == 1
    assert "no longer finite in epoch 1" in capsys.readouterr().err
