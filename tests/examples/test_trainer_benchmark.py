"""The benchmark of the trainer, at a size where its numbers mean nothing: what it runs, when, and what it writes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longtail.data import long_tail_counts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import trainer as benchmark  # noqa: E402
from longtail.runner import MPS_PIPES  # noqa: E402
from pretended_gpu import pretended_gpu  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "trainer.py"
TINY = "--dataset cifar10 --imbalance 5000 --resolution 8 --depth 8 --epochs 2 --warmup-epochs 1 --batch-size 256"


@pytest.fixture
def tiny(tmp_path: Path, write_archive: Callable[..., Path]) -> list[str]:
    """The options of a small benchmark on few images."""
    write_archive(tmp_path / "data", "cifar10", long_tail_counts(5000, 10, 5000))
    where = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    return [*where, "--options", TINY, "--rounds", "1", "--steps", "1", "--warm-up", "1", "--window", "0.5"]


def parsed(options: list[str]) -> argparse.Namespace:
    return benchmark.build_parser().parse_args(options)


def test_rows_of_everything(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: options for name, options in benchmark.candidates(parsed(tiny)).items() if "compiled" not in name}
    monkeypatch.setattr(benchmark, "candidates", lambda args: some)  # compiling takes a minute
    monkeypatch.setattr(sys, "argv", ["trainer.py", *tiny, "--packed", "2", "--whole-run"])
    benchmark.main()
    (page,), (path,) = (tmp_path / "out").glob("*.md"), (tmp_path / "out").glob("*.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    *steps, one, two, whole = rows
    assert [row["name"] for row in steps] == ["plain loop", "eager"]
    fastest = min(steps[1:], key=lambda row: float(row["milliseconds"]))["name"]
    assert [one["name"], two["name"]] == [f"{fastest}, one process", f"{fastest}, 2 at once"]
    assert two["over_one"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    assert whole["name"] == f"{fastest}, whole run of 2 epochs"
    assert 0 < whole["seconds_in_epochs"] <= whole["seconds"]
    assert whole["goal_seconds"] is None, "of the published recipe on a GPU alone"
    images = sum(long_tail_counts(5000, 10, 5000))
    step = next(row["milliseconds"] for row in steps if row["name"] == "eager") / 1e3
    assert whole["eager_seconds_calculated"] == pytest.approx(2 * -(-images // 256) * step)
    text = page.read_text()
    assert f"| {fastest}, 2 at once |  | " in text
    assert "s (calculated)" in text
    assert "goal" not in text


def test_a_gpu_has_captured_candidates_too(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*tiny, "--device", "cuda", "--whole-run"]
    some = {name: options for name, options in benchmark.candidates(parsed(options)).items() if "compiled" not in name}
    monkeypatch.setattr(benchmark, "candidates", lambda args: some)
    monkeypatch.setattr(sys, "argv", ["trainer.py", *options])
    with pretended_gpu():
        benchmark.main()
    (path,) = (tmp_path / "out").glob("*-trainer-cuda.json")
    names = [row["name"] for row in json.loads(path.read_text())["rows"]]
    assert names[:-1] == ["plain loop", "eager", "captured", "captured, bf16"]
    assert names[-1].endswith(", whole run of 2 epochs")


@pytest.mark.parametrize(
    ("options", "goal"),
    [("--device cuda --preset full", 15.0), ("--device cuda", None), ("--preset full", None)],
)
def test_the_goal_is_of_the_published_recipe_on_a_gpu(
    options: str, goal: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once one epoch has been the first and the last, all are timed: 200 of the published recipe, 40 of the preset."""
    lengths: list[int] = []

    class Trainer:
        def __init__(self, settings: Any) -> None:
            assert settings.stop_after_epochs is None
            lengths.append(settings.recipe.epochs)
            self.seconds, self.batches = 0.0, argparse.Namespace(steps_per_epoch=85)

        def run(self) -> None: ...

    monkeypatch.setattr(benchmark, "Trainer", Trainer)
    args = parsed(["--data-dir", "nowhere", *options.split()])
    row = benchmark.whole_run(args, tmp_path, "eager", 0.01)
    epochs = 200 if "full" in options else 40
    assert lengths == [1, epochs]
    assert row["goal_seconds"] == goal
    assert row["eager_seconds_calculated"] == pytest.approx(epochs * 85 * 0.01)
    (line,) = [line for line in benchmark.report({"date": "today", "device": "it"}, [row]) if "whole run" in line]
    assert ("(goal: 15 s)" in line) == (goal is not None)


def packed_child(tiny: list[str], name: str = "eager") -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *tiny, "--only", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_packed_process_waits_for_the_word_and_keeps_on_to_the_end(tiny: list[str]) -> None:
    """The window lies in the future, so that nobody can have measured before it is over."""
    with packed_child(tiny) as child:
        assert benchmark.answer(child, "ready") == ""
        assert child.stdin is not None
        begin = time.monotonic() + 0.5
        end = begin + 0.5
        print(begin, end, file=child.stdin, flush=True)
        assert float(benchmark.answer(child, "rate")) > 0
        assert time.monotonic() >= end
    assert child.returncode == 0


def test_a_window_without_two_blocks_is_an_error(tiny: list[str]) -> None:
    with packed_child(tiny) as child:
        benchmark.answer(child, "ready")
        assert child.stdin is not None
        print(time.monotonic(), time.monotonic(), file=child.stdin, flush=True)
        with pytest.raises(RuntimeError, match="ended before it said 'rate', with exit code 1"):
            benchmark.answer(child, "rate")
        assert child.stderr is not None
        assert "fewer than two blocks of --steps 1 end within --window 0.5 seconds" in child.stderr.read()


def test_only_images_within_the_window_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these ends of blocks 3, 5 and 7 lie within 2.5 to 7.5: in 4 s two blocks of 2 steps of 100 images each."""
    clock = iter((0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 11.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(benchmark, "seconds_of", lambda *_: 0.0)
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(readline=lambda: "2.5 7.5\n"))
    step: Any = argparse.Namespace(trainer=argparse.Namespace(batches=argparse.Namespace(batch_size=100)))
    args = argparse.Namespace(device="cpu", warm_up=1, steps=2, window=5.0)
    assert benchmark.packed_process(args, step) == pytest.approx(2 * 2 * 100 / 4)


def test_a_packed_process_builds_its_own_candidate_alone(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(benchmark, "build", lambda args, folder, name: built.append(name))
    monkeypatch.setattr(benchmark, "packed_process", lambda args, step: 1.0)
    monkeypatch.setattr(sys, "argv", ["trainer.py", *tiny, "--only", "eager"])
    benchmark.main()
    assert built == ["eager"]


@pytest.mark.parametrize(("own", "ways"), [(False, ["taking turns"]), (True, ["taking turns", "MPS"])])
def test_a_gpu_is_shared_in_every_way_there_is(
    own: bool, ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without MPS, processes look for a daemon where none is, or else they would find the user's."""
    if own:
        monkeypatch.setenv(MPS_PIPES, str(tmp_path))
    else:
        monkeypatch.delenv(MPS_PIPES, raising=False)
    monkeypatch.setenv("PATH", "")  # no program to start another
    calls: list[tuple[int, str | None]] = []

    def packed(args: Any, name: str, processes: int, environment: dict[str, str]) -> float:
        pipes = {**os.environ, **environment}.get(MPS_PIPES)
        assert pipes is not None
        assert own or not list(Path(pipes).iterdir())
        calls.append((processes, pipes if pipes == str(tmp_path) else None))
        return float(len(calls))

    monkeypatch.setattr(benchmark, "packed", packed)
    rows = benchmark.packed_rows(argparse.Namespace(device="cuda", packed=3), "captured")
    assert [row["name"] for row in rows] == ["captured, one process", *(f"captured, 3 at once, {way}" for way in ways)]
    assert [row["over_one"] for row in rows] == [float(number + 1) for number in range(len(rows))]
    assert calls == [(1, None), (3, None), (3, str(tmp_path))][: len(rows)]


def test_a_packed_process_that_fails_ends_the_others(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> subprocess.Popen[str]:
        if started:
            command = [sys.executable, "-c", "raise SystemExit(3)"]
        started.append(real(command, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(sys, "argv", ["trainer.py", *tiny])
    with pytest.raises(RuntimeError, match="ended before it said 'ready', with exit code 3"):
        benchmark.packed(parsed(tiny), "eager", 2, {})
    assert [child.poll() for child in started] == [-9, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [("--packed 1", "--packed is 1"), ("--window 0", "--window is 0.0"), ("--steps 0", "--steps is 0")],
)
def test_bad_value(options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--data-dir", "nowhere", *options.split()])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
