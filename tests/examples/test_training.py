"""The engine: resuming, pairing, options that must or must not change the outcome."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cifar_lt
import pytest
import reference
import torch
from longtail.checkpoint import FolderLock
from longtail.data import long_tail_counts
from longtail.engine import Trainer
from longtail.networks import CifarResNet
from longtail.reporting import accuracy_figures, group_means, read_records
from longtail.settings import choose_algorithms, torch_device
from longtail.training import TrainingError
from torch import Tensor

Options = Callable[..., list[str]]
ALL_THREE = ("--spareg", "0.5", "--spaslerp", "--alpha-max", "0.5", "--spaproj")
EXAMPLES = Path(cifar_lt.__file__).parent
TINY_MAX = 60  # as in conftest.py


def trainer(argv: list[str]) -> Trainer:
    return Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv)))


def run(argv: list[str]) -> None:
    assert cifar_lt.main(argv) == 0


def records(folder: Path) -> list[dict[str, Any]]:
    """The run's records without their times, which no two runs share."""
    return [{**record, "seconds": None} for record in read_records(folder / "metrics.jsonl")]


def assert_same_run(first: Path, second: Path) -> None:
    """Equal records, and equal bits in everything the checkpoint holds."""
    assert records(first) == records(second)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (first, second)]
    for state in states:
        del state["seconds"], state["record"]["seconds"]
    assert_equal(*states)


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_run_writes_records_and_result(
    tiny_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [option for option in tiny_options("run", *ALL_THREE) if option != "--quiet"]
    run(argv)
    lines = records(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["accuracy"].keys() == {"all", "balanced", "many", "medium", "few"} for line in lines)
    assert [line["alpha"] for line in lines] == pytest.approx([0.125, 0.375, 0.5])  # 0.5 (1 - cos(pi t / 3)) / 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["accuracy_last"] == lines[-1]["accuracy"]
    assert result["accuracy_best"]["all"] == max(line["accuracy"]["all"] for line in lines)
    assert result["strategies"] == ["reg", "slerp", "proj"]
    assert result["options"]["spareg"] == 0.5
    assert result["counts"] == long_tail_counts(TINY_MAX, 10, 10)
    # Running and exact means differ, but belong to the same network.
    assert result["alignment_exact"]["all"] == pytest.approx(result["alignment"]["all"], abs=0.3)
    printed = capsys.readouterr().out
    assert "alignment, exact means" in printed
    assert "(best " in printed


def test_closing_figures_are_exact(tiny_options: Options, tmp_path: Path) -> None:
    trained = trainer(tiny_options("run"))
    result = trained.run()
    assert result is not None
    model, images = trained.baseline.model.eval(), trained.train_set
    assert isinstance(model, CifarResNet)
    with torch.no_grad():
        features = model.forward_features(images.plain(torch.arange(len(images)))).double()
        means = torch.stack([features[images.labels_N == c].mean(0) for c in range(10)])
        centred = means - means.mean(0)
        cosines = torch.cosine_similarity(centred, model.classifier.weight.double())
        logits = model(images.plain(torch.arange(len(images))))
    correct = (logits.argmax(1) == images.labels_N).double().mean()
    # float32 sums over at most 60 images a class
    assert result["alignment_exact"]["all"] == pytest.approx(float(cosines.mean()), abs=1e-4)
    assert result["train_accuracy"] == pytest.approx(100 * float(correct), abs=1e-4)
    weight = model.classifier.weight.detach().double().numpy()
    collapse = reference.neural_collapse(features.numpy(), images.labels_N.numpy(), weight)
    assert result["neural_collapse"] == pytest.approx(collapse, rel=1e-3)  # float32 features, and their pseudo-inverse
    with torch.no_grad():
        test_features = model.forward_features(trained.eval_set.plain(torch.arange(len(trained.eval_set)))).double()
    distances = (test_features[:, None] - means).square().sum(2)
    right = (distances.argmin(1) == trained.eval_set.labels_N).double().mean()
    assert result["readouts"]["nearest class mean"]["all"] == pytest.approx(100 * float(right), abs=1e-4)


def test_glmc_says_what_its_other_head_would_predict(tiny_options: Options) -> None:
    trained = trainer(tiny_options("run", "--method", "glmc"))
    result = trained.run()
    assert result is not None
    model: Any = trained.baseline.model
    images = trained.eval_set
    with torch.no_grad():
        logits = model.eval().conventional(model.backbone(images.plain(torch.arange(len(images)))))
    right = (logits.argmax(1) == images.labels_N).double().mean()
    assert result["readouts"]["conventional head"]["all"] == pytest.approx(100 * float(right), abs=1e-4)


def test_evaluation_may_be_rarer_and_changes_nothing_else(tiny_options: Options, tmp_path: Path) -> None:
    """Every second epoch and the last; the best is one of these, also over an interruption."""
    run(tiny_options("each", "--epochs", "5"))
    rare = tiny_options("rare", "--epochs", "5", "--evaluate-every", "2")
    run([*rare, "--stop-after-epochs", "3"])
    run([*rare, "--resume"])
    each, some = records(tmp_path / "each"), records(tmp_path / "rare")
    assert [record["epoch"] for record in some if "accuracy" in record] == [2, 4, 5]
    for one, other in zip(each, some, strict=True):
        assert {**one, "seconds": 0} == {**one, **other, "seconds": 0}
    result = json.loads((tmp_path / "rare" / "result.json").read_text())
    best = max((some[1], some[3], some[4]), key=lambda record: record["accuracy"]["balanced"])
    assert (result["accuracy_best"]["epoch"], result["accuracy_last"]) == (best["epoch"], some[4]["accuracy"])
    with pytest.raises(ValueError, match=r"--evaluate-every 1 \(was 2\)"):
        trainer(tiny_options("rare", "--epochs", "5", "--resume"))


def test_tensorboard_has_every_epoch(tiny_options: Options, tmp_path: Path) -> None:
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    argv = [option for option in tiny_options("run") if option != "--no-tensorboard"]
    run([*argv, "--stop-after-epochs", "1"])
    run([*argv, "--resume"])
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = records(tmp_path / "run")
    expected = {
        "loss": {line["epoch"]: line["loss"] for line in lines},
        "accuracy/all": {line["epoch"]: line["accuracy"]["all"] for line in lines},
    }
    for name, values in expected.items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(values)  # kept as float32


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ALL_THREE,
        (*ALL_THREE, "--mixup", "1", "--accumulate", "2", "--amp", "bf16", "--clip-norm", "1"),
    ],
    ids=["all-three", "mixup-accumulate-bf16-clip"],
)
def test_resumed_run_is_the_same_bit_for_bit(tiny_options: Options, tmp_path: Path, more: tuple[str, ...]) -> None:
    run(tiny_options("whole", *more))
    for _ in range(3):
        run(tiny_options("parts", *more, "--resume", "--stop-after-epochs", "1"))
        torch.manual_seed(99)  # nothing may depend on the state that a new process happens to have
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")]
    assert results[0]["accuracy_best"] == results[1]["accuracy_best"]


KILL_AT = {
    # Before the first checkpoint: the record of epoch 1 is written, its checkpoint is not in place yet.
    "first-checkpoint": "when('checkpoint.pt', 1, before=True)",
    # In the middle of epoch 2's steps.
    "step": "at_step(9)",
    # Epoch 2's record and a complete temporary file are there, the checkpoint is still epoch 1's.
    "second-checkpoint": "when('checkpoint.pt', 2, before=True)",
    # All epochs done, the result not yet written.
    "result": "when('result.json', 1, before=True)",
}


@pytest.mark.parametrize("moment", KILL_AT)
def test_kill_9_loses_at_most_one_epoch(tiny_options: Options, tmp_path: Path, moment: str) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        from dataclasses import replace
        sys.path.insert(0, {str(EXAMPLES)!r})
        import cifar_lt
        from longtail import ce, checkpoint, data

        data.ARCHIVES["cifar10"] = replace(data.ARCHIVES["cifar10"], max_per_class={TINY_MAX})
        real, calls = os.replace, []

        def when(name, number, before):
            def replace_or_die(source, target):
                if os.path.basename(target) == name:
                    calls.append(target)
                    if len(calls) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                real(source, target)
            checkpoint.os.replace = replace_or_die

        def at_step(number):
            step = ce.CrossEntropy.step
            def step_or_die(*args):
                calls.append(1)
                if len(calls) == number + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*args)
            ce.CrossEntropy.step = step_or_die

        {KILL_AT[moment]}
        cifar_lt.main(sys.argv[1:])
        """
    )
    more = (*ALL_THREE, "--batch-size", "40")
    killed = subprocess.run([sys.executable, "-c", script, *tiny_options("killed", *more)], check=False)
    assert killed.returncode == -signal.SIGKILL
    written = len(records(tmp_path / "killed"))
    run(tiny_options("killed", *more, "--resume", "--stop-after-epochs", "1"))
    assert len(records(tmp_path / "killed")) >= written  # at most one epoch was repeated
    run(tiny_options("killed", *more, "--resume"))
    run(tiny_options("whole", *more))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_checkpoints_keep_their_distance_and_the_last_epoch_has_one(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which an epoch takes a second; the loss is at most that distance, or an epoch."""
    saved, seconds = [], itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr("longtail.engine.time", clock)
    monkeypatch.setattr("longtail.engine.save_checkpoint", lambda path, state: saved.append(state["epoch"]))
    trainer(tiny_options("run", "--epochs", "8", "--checkpoint-seconds", "3")).run()
    assert saved == [3, 6, 8]
    saved.clear()
    trainer(tiny_options("run", "--epochs", "8", "--stop-after-epochs", "2", "--checkpoint-seconds", "3")).run()
    assert saved == [2]


def test_resume_without_checkpoint_starts_fresh(
    tiny_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [option for option in tiny_options("run", "--resume", "--stop-after-epochs", "1") if option != "--quiet"]
    run(argv)
    assert "no checkpoint" in capsys.readouterr().out
    assert [line["epoch"] for line in records(tmp_path / "run")] == [1]


def test_resume_with_other_options_names_them(tiny_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_options("run", "--stop-after-epochs", "1"))
    assert cifar_lt.main(tiny_options("run", "--resume", "--lr", "0.2", "--spaproj")) == 2
    message = capsys.readouterr().err
    assert "--lr 0.2 (was 0.1)" in message
    assert "--spaproj True (was False)" in message
    assert "--epochs" not in message


def test_resume_refuses_other_images(
    tiny_options: Options, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_options("run", "--stop-after-epochs", "1"))
    path = tiny_data / "cifar-10-batches-py" / "data_batch_1"
    content = pickle.loads(path.read_bytes())
    content["data"] = 255 - content["data"]
    path.write_bytes(pickle.dumps(content))
    assert cifar_lt.main(tiny_options("run", "--resume")) == 2
    assert "training images differ" in capsys.readouterr().err


def test_damaged_checkpoint_is_explained(
    tiny_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_options("run", "--stop-after-epochs", "1"))
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"nothing")
    assert cifar_lt.main(tiny_options("run", "--resume")) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_finished_run_is_not_overwritten_unasked(
    tiny_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_options("run"))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert cifar_lt.main(tiny_options("run")) == 2
    assert "--overwrite" in capsys.readouterr().err
    run(tiny_options("run", "--resume"))  # nothing left to do
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    run(tiny_options("run", "--overwrite", "--seed", "1", "--stop-after-epochs", "1"))
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_folder_is_free_once_its_process_has_gone_though_a_forked_one_lives(tmp_path: Path) -> None:
    """Loader workers outlive a killed process by seconds, in which torchrun starts the next attempt."""
    lock = FolderLock(tmp_path)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def live() -> None:
        there.send("up")
        there.recv()

    worker = context.Process(target=live)
    worker.start()
    try:
        assert here.recv() == "up"
        with pytest.raises(OSError, match="in use by another process"):
            FolderLock(tmp_path)
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        worker.kill()
        worker.join()


# --- equal seeds ------------------------------------------------------------------------------------------------------


def test_variants_with_equal_seeds_are_paired(tiny_options: Options) -> None:
    plain, aligned = trainer(tiny_options("plain")), trainer(tiny_options("aligned", *ALL_THREE))
    seen: list[list[Tensor]] = []
    for variant in (plain, aligned):
        make, tensors = variant.batches.batch, [p.clone() for p in variant.baseline.model.parameters()]

        def recorded(*args: Any, make: Any = make, tensors: Any = tensors) -> Any:
            batch = make(*args)
            tensors.extend([batch.images.clone(), batch.targets.clone()])
            return batch

        variant.batches.batch = recorded  # type: ignore[method-assign, assignment]
        variant.run()
        seen.append(tensors)
    assert_equal(*seen)
    weights = [variant.baseline.classifier.weight for variant in (plain, aligned)]
    assert not torch.equal(*weights)  # type: ignore[arg-type]


def test_tracking_means_changes_nothing_in_a_plain_run(tiny_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked, untracked = trainer(tiny_options("tracked")), trainer(tiny_options("untracked"))
    tracked.run()
    monkeypatch.setattr(type(untracked.alignment), "penalty", lambda self, features, targets: None)
    untracked.run()
    assert_equal(tracked.baseline.model.state_dict(), untracked.baseline.model.state_dict())
    assert not untracked.alignment.tracker.seen.any()


def test_seed_changes_weights_and_batches(tiny_options: Options) -> None:
    first, second = trainer(tiny_options("first")), trainer(tiny_options("second", "--seed", "1"))
    assert not torch.equal(first.baseline.classifier.weight, second.baseline.classifier.weight)  # type: ignore[arg-type]
    batches = [next(iter(t.batches.epoch(t.generator))).images for t in (first, second)]
    assert not torch.equal(*batches)


# --- options ----------------------------------------------------------------------------------------------------------


def freeze_batch_norm(variant: Trainer) -> None:
    """Keep batch normalisation in evaluation mode, where a batch's parts do not depend on each other."""
    for module in variant.baseline.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]


@pytest.mark.parametrize("mixup", ["0", "1"])
def test_accumulating_equals_the_whole_batch(tiny_options: Options, mixup: str) -> None:
    # Batches of 32 in parts of 7 and less: the weights of unequal parts matter. A small rate keeps the frozen
    # normalisation from amplifying rounding.
    more = ("--mixup", mixup, "--lr", "0.001", "--stop-after-epochs", "1")
    whole, parts = trainer(tiny_options("whole", *more)), trainer(tiny_options("parts", *more, "--accumulate", "5"))
    for variant in (whole, parts):
        freeze_batch_norm(variant)
        variant.run()
    for a, b in zip(whole.baseline.model.parameters(), parts.baseline.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # float32 sums in another order, through 8 steps
    assert whole.record["loss"] == pytest.approx(parts.record["loss"], rel=1e-5)
    assert whole.record["train_accuracy"] == parts.record["train_accuracy"]


def test_clipping_bounds_the_gradient(tiny_options: Options) -> None:
    variant = trainer(tiny_options("run", "--clip-norm", "0.01", "--stop-after-epochs", "1"))
    norms: list[float] = []

    def record(*_: object) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in variant.parameters if p.grad is not None]).norm()))

    variant.optimizer.register_step_pre_hook(record)
    variant.run()
    assert norms == pytest.approx([0.01] * variant.batches.steps_per_epoch, rel=1e-3)  # it divides by norm + 1e-6


@pytest.mark.parametrize(
    "more",
    [
        ("--amp", "bf16", "--clip-norm", "5"),
        ("--amp", "fp16", "--clip-norm", "5", "--spaproj"),
        ("--recipe", "mislas", "--preset", "small"),
        ("--mixup", "1", "--spareg", "1"),
        ("--frozen-head", "--spareg", "1", "--spareg-align", "features"),
        ("--no-augment", "--no-channels-last", "--schedule", "step"),
        ("--spareg", "-0.5", "--spareg-align", "classifier", "--radial", "keep", "--spaproj"),
    ],
    ids=" ".join,
)
def test_option_trains(tiny_options: Options, tmp_path: Path, more: tuple[str, ...]) -> None:
    if "mislas" in more:
        argv = tiny_options("run", "--recipe", "mislas")
        preset = argv.index("--preset")
        del argv[preset : preset + 2]
    else:
        argv = tiny_options("run", *more)
    run(argv)
    lines = records(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] or "--mixup" in argv or "mislas" in argv
    assert 0 <= lines[-1]["accuracy"]["all"] <= 100


def test_compiled_network_trains(tiny_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager backend stands in for a compiler, which takes minutes and a C++ toolchain."""
    compiled: list[bool] = []
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module) -> None:
        compiled.append(True)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    plain = trainer(tiny_options("plain", "--stop-after-epochs", "1"))
    variant = trainer(tiny_options("compiled", "--stop-after-epochs", "1", "--compile"))
    plain.run()
    variant.run()
    assert compiled == [True]
    assert_equal(plain.baseline.model.state_dict(), variant.baseline.model.state_dict())


def test_frozen_head_stays(tiny_options: Options) -> None:
    variant = trainer(tiny_options("run", "--frozen-head"))
    before = {name: value.clone() for name, value in variant.baseline.classifier.state_dict().items()}
    variant.run()
    assert_equal(before, dict(variant.baseline.classifier.state_dict()))


def test_validation_never_opens_the_test_file(tiny_options: Options, tiny_data: Path, tmp_path: Path) -> None:
    (tiny_data / "cifar-10-batches-py" / "test_batch").unlink()
    run(tiny_options("run", "--validation", "5"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["evaluated_on"] == "validation"
    # Class 0 gives 5 of its own images, the others 5 that the rule leaves unused.
    counts = long_tail_counts(TINY_MAX, 10, 10)
    assert result["counts"] == [counts[0] - 5, *counts[1:]]


def test_loss_that_diverges_stops_the_run(tiny_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar_lt.main(tiny_options("run", "--lr", "1e30")) == 1
    assert "no longer finite in epoch" in capsys.readouterr().err
    with pytest.raises(TrainingError):
        trainer(tiny_options("again", "--lr", "1e30")).run()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_group_figures() -> None:
    groups = {"many": [0, 1], "medium": [2], "few": []}
    correct, count = torch.tensor([9, 1, 0]), torch.tensor([10, 2, 0])
    assert accuracy_figures(correct, count, groups) == {
        "all": pytest.approx(100 * 10 / 12),
        "balanced": pytest.approx(70.0),
        "many": pytest.approx(70.0),
        "medium": None,
        "few": None,
    }
    means = group_means(torch.tensor([0.5, -1.0, 0.25]), torch.tensor([True, False, True]), groups)
    assert means == {"all": 0.375, "many": 0.5, "medium": 0.25, "few": None}


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_is_named_by_its_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without one, so no run could have begun; a GPU is pretended here."""
    first = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **options: SimpleNamespace(device=first))
    assert torch_device(name).index == 0


# --- algorithms -------------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)  # nothing below needs it to be there


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave PyTorch's choices as they were, and begin without the environment's."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # or what is set where nothing was would stay
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cudnn.benchmark = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize(
    ("device", "deterministic", "tries"),
    [(CUDA, False, True), (CUDA, True, False), (torch.device("cpu"), False, False), (torch.device("cpu"), True, False)],
)
def test_a_gpu_tries_convolutions_unless_they_must_repeat(
    device: torch.device, deterministic: bool, tries: bool
) -> None:
    torch.backends.cudnn.benchmark = not tries
    choose_algorithms(device, deterministic=deterministic)
    assert torch.backends.cudnn.benchmark == tries
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    workspace = ":4096:8" if deterministic and device.type == "cuda" else None
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace


@pytest.mark.usefixtures("algorithms")
def test_what_the_environment_says_of_cublas_is_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_algorithms(CUDA, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.* :4096:8 or :16:8"):
        choose_algorithms(CUDA, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    for device in (CUDA, torch.device("cpu")):  # of no concern where it changes nothing that was asked for
        choose_algorithms(device, deterministic=device.type == "cpu")


@pytest.mark.usefixtures("algorithms")
def test_the_trainer_chooses_for_its_device(tiny_options: Options) -> None:
    torch.backends.cudnn.benchmark = True
    trainer(tiny_options("run"))
    assert not torch.backends.cudnn.benchmark
