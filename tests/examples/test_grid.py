"""The grid: what it holds, in which order, what survives a kill, and what the report says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import reproduce
import torch
from longtail import grid, runner, table
from longtail.data import long_tail_counts
from longtail.grid import Cell, Records, cell_of, cells, record_of
from longtail.reporting import recorded_command
from longtail.runner import Job, Local, run_grid

EXAMPLES = Path(reproduce.__file__).parent
RESULTS = EXAMPLES.parent / "benchmarks" / "results"


def cell(method: str = "ce", align: str = "none", seed: int = 0) -> Cell:
    return Cell("cifar100", 100, method, align, seed, "small")


def record(of: Cell, accuracy: float = 50.0, **more: Any) -> dict[str, Any]:
    groups = {"all": accuracy, "balanced": accuracy, "many": accuracy + 10, "medium": accuracy, "few": accuracy - 10}
    return {
        **vars(of),
        "accuracy_last": groups,
        "accuracy_best": {"all": accuracy + 1, "balanced": accuracy + 1, "epoch": 3},
        "train_accuracy": 99.0,
        "alignment": {"all": 0.8, "many": 0.9, "medium": 0.8, "few": 0.7},
        "alignment_exact": {"all": 0.8, "many": 0.9, "medium": 0.8, "few": 0.7},
        "seconds": 1.0,
        **more,
    }


# --- what the grid holds ----------------------------------------------------------------------------------------------


def test_the_grid_is_table_1() -> None:
    everything = cells(preset="full")
    plain = [one for one in everything if one.method != "glmc-maxnorm"]
    assert len(plain) == 252
    assert len({one.name for one in everything}) == len(everything) == 252 + 18
    assert Counter(one.method for one in plain) == {"ce": 72, "arb": 72, "etf-dr": 36, "glmc": 72}
    rows = {table.TITLES[one.method] + table.SUFFIXES[one.align] for one in everything}
    paper = json.loads((EXAMPLES / "longtail" / "paper_table1.json").read_text())
    assert rows <= paper["rows"].keys(), "every row of ours is one of the paper's"


def test_the_order_is_by_worth() -> None:
    order = cells(preset="full")
    settings = list(dict.fromkeys((one.dataset, one.imbalance) for one in order))
    assert settings == list(grid.SETTINGS)
    first = [one for one in order if (one.dataset, one.imbalance) == ("cifar100", 100)]
    assert [one.seed for one in first[:15]] == [0] * 15, "one value of every gain before any second"
    assert [one.align for one in first[:4]] == ["none", "reg", "slerp", "proj"]
    assert {one.method for one in first[15:31]} == {"ce", "arb"}
    for one in order:
        stage = one.first_stage()
        assert stage is None or order.index(stage) < order.index(one)


def test_every_cell_is_a_valid_command_line(tmp_path: Path) -> None:
    import cifar_lt

    for preset in grid.PRESETS:
        for one in cells(preset=preset, seeds=(0,)):
            argv = ["--data-dir", "d", "--output-dir", str(tmp_path), *one.options(tmp_path)]
            settings = cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv))
            assert settings.method == one.method
            assert settings.alignment.names == ([] if one.align == "none" else [one.align])
            epochs = {"full": 200, "small": 40}[preset]
            assert settings.recipe.epochs == (10 if one.method == "glmc-maxnorm" else epochs)


# --- the records ------------------------------------------------------------------------------------------------------


def test_records_round_trip_and_remember(tmp_path: Path) -> None:
    records = Records(tmp_path / "new" / "table1.jsonl")
    assert records.read() == []
    records.add(record(cell()))
    records.add({**vars(cell("arb")), "failed": "exit code 1", "attempts": 2})
    assert [cell_of(one) for one in records.read()] == [cell(), cell("arb")]
    assert records.done() == {cell().name}, "a failed run is not done"


def test_a_torn_last_line_is_kept_reported_and_its_run_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table1.jsonl"
    torn = json.dumps(record(cell("arb")))[:40]
    path.write_text(json.dumps(record(cell())) + "\n" + torn)
    records = Records(path)
    assert records.done() == {cell().name}
    assert "cut short" in capsys.readouterr().err
    records.add(record(cell("arb")))
    assert records.done() == {cell().name, cell("arb").name}
    assert (tmp_path / "table1.jsonl.torn").read_text() == torn + "\n"


def test_a_damaged_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table1.jsonl"
    path.write_text(json.dumps(record(cell())) + "\n{}\n" + json.dumps(record(cell("arb"))) + "\n")
    assert reproduce.main(["report", "--preset", "small", "--records", str(path)]) == 2
    assert "line 2 is no record" in capsys.readouterr().err


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table1.jsonl"
    script = (
        "import sys; from longtail.grid import Records; from pathlib import Path\n"
        "for i in range(15): Records(Path(sys.argv[1])).add({'dataset': 'cifar10', 'imbalance': 50, 'method': 'ce',"
        " 'align': 'none', 'seed': 100 * int(sys.argv[2]) + i, 'preset': 'small'})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(i)], cwd=EXAMPLES) for i in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(Records(path).done()) == 30


@pytest.mark.skipif(sys.platform == "win32", reason="file locks of POSIX")
def test_a_writer_waits_for_another(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.jsonl")
    script = (
        "import json, sys; from longtail.grid import Records; from pathlib import Path; print('ready', flush=True)\n"
        "Records(Path(sys.argv[1])).add(json.loads(sys.argv[2])); print('written', flush=True)"
    )
    command = [sys.executable, "-c", script, str(records.path), json.dumps(record(cell()))]
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.ExitStack())
        lock.enter_context(records._locked())
        writer = stack.enter_context(subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE, text=True))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.3)
        assert not records.path.exists()
        lock.close()
        assert writer.stdout.readline() == "written\n"
    assert records.done() == {cell().name}


# --- running ----------------------------------------------------------------------------------------------------------


class Engine:
    """Runs nothing: gives records that were prepared, one at a time."""

    def __init__(self, failing: set[str] | None = None, slots: int = 1) -> None:
        self.slots, self.failing, self.job = slots, failing or set(), self
        self.running: dict[Any, Cell] = {}
        self.started: list[str] = []

    def start(self, one: Cell) -> None:
        self.running[one.name] = one
        self.started.append(one.name)

    def finished(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        name, one = next(iter(self.running.items()))
        del self.running[name]
        yield one, {**vars(one), "failed": "x", "attempts": 2} if name in self.failing else record(one)

    def close(self) -> None:
        pass

    def has_network(self, one: Cell) -> bool:  # as its own job
        return True


def quiet(_: str) -> None:
    pass


def test_finished_runs_are_never_repeated_and_failed_ones_are(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.jsonl")
    todo = cells(preset="small", settings=grid.SETTINGS[:1], seeds=(0,))
    broken = cell("arb", "reg").name
    first: Any = Engine({broken})
    progress = run_grid(todo, records, first, note=quiet)
    assert len(progress.finished) == 14
    assert [one.name for one in progress.failed] == [broken]
    again: Any = Engine()
    run_grid(todo, records, again, note=quiet)
    assert again.started == [broken]
    third: Any = Engine()
    run_grid(todo, records, third, note=quiet)
    assert third.started == []


def test_what_another_call_finishes_meanwhile_is_not_repeated(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.jsonl")
    engine: Any = Engine()
    inner = engine.finished

    def finished() -> Iterator[tuple[Cell, dict[str, Any]]]:
        if len(engine.started) == 1:
            records.add(record(cell("glmc")))
        yield from inner()

    engine.finished = finished
    progress = run_grid([cell(), cell("glmc"), cell("glmc-maxnorm")], records, engine, note=quiet)
    assert engine.started == [cell().name, cell("glmc-maxnorm").name]
    assert progress.left == []
    assert len(records.read()) == 3


def test_max_norm_waits_for_its_first_stage(tmp_path: Path) -> None:
    todo = [cell("glmc-maxnorm"), cell("glmc")]
    engine: Any = Engine(slots=2)
    run_grid(todo, Records(tmp_path / "r.jsonl"), engine, note=quiet)
    assert engine.started == [cell("glmc").name, cell("glmc-maxnorm").name]
    failing: Any = Engine({cell("glmc").name})
    progress = run_grid(todo, Records(tmp_path / "s.jsonl"), failing, note=quiet)
    assert progress.left == [cell("glmc-maxnorm")]


def test_records_hold_no_path_of_a_machine() -> None:
    """A second stage's record names the run that it starts from; a command's folders are DIR."""
    second = cell("glmc-maxnorm")
    result = record(second) | {"environment": {"device": "x", "commit": None}, "data_fingerprint": "x"}
    result |= {"readouts": {}, "neural_collapse": {}}
    result |= {"epochs": 1, "finished": "", "options": {"first-stage": "/somewhere/else", "lr": 0.1}}
    assert record_of(second, result)["options"] == {"first-stage": cell("glmc").name, "lr": 0.1}
    command = recorded_command("benchmarks/x.py", ["--data-dir", "/a b/c", "--output=/d", "--device", "cuda"])
    assert command == "python benchmarks/x.py --data-dir DIR --output=DIR --device cuda"
    for path in RESULTS.iterdir():
        assert not re.findall(r"(?<![\w.)])/(?:tmp|home|root|work|mnt|Users)/.*", path.read_text()), path.name


def test_no_run_is_started_that_would_pass_the_budget(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.jsonl")
    records.add(record(cell("arb"), seconds=1000.0))
    records.add(record(cell("ce"), seconds=1.0))
    engine: Any = Engine()
    todo = [cell("arb", "reg"), cell("ce", "reg"), cell("glmc")]
    progress = run_grid(todo, records, engine, budget_s=500.0, note=quiet)
    assert engine.started == [cell("ce", "reg").name]
    assert progress.left == [cell("arb", "reg"), cell("glmc")], "a method never seen is as long as the longest"


TINY = (
    "--resolution 8 --depth 8 --epochs 3 --batch-size 256 --warmup-epochs 1 --threads 1 --device cpu --dataset cifar10 "
    "--imbalance 5000"  # few images beside the largest class, whose 5000 are the rule's
)


@pytest.fixture
def tiny_job(tmp_path: Path, write_archive: Any) -> Job:
    write_archive(tmp_path / "data", "cifar10", long_tail_counts(5000, 10, 5000))
    return Job(tmp_path / "data", tmp_path / "work", tuple(TINY.split()))


def test_a_run_leaves_a_full_record(tiny_job: Job) -> None:
    got = runner.run_cell(cell("ce", "reg"), tiny_job)
    assert "failed" not in got, got
    run = ["dataset", "imbalance", "method", "align", "seed", "epochs", "preset"]
    figures = ["accuracy_last", "accuracy_best", "train_accuracy", "alignment", "seconds"]
    for key in (*run, *figures, "versions", "hardware", "commit", "finished", "options"):
        assert key in got, key
    assert got["accuracy_last"].keys() == {"all", "balanced", "many", "medium", "few"}
    assert got["options"]["spareg"] == 0.3


def test_a_dying_run_is_tried_again_then_reported(tiny_job: Job, tmp_path: Path) -> None:
    missing = Job(tmp_path / "nowhere", tiny_job.work_dir)
    got = runner.run_cell(cell(), missing)
    assert got["attempts"] == 1, "a missing folder stays missing"
    assert "no cifar100 under" in got["failed"]
    diverging = Job(tiny_job.data_dir, tiny_job.work_dir, (*tiny_job.extra, "--lr", "1e30"))
    got = runner.run_cell(cell(), diverging)
    assert got["attempts"] == 2
    assert "no longer finite" in got["failed"]
    assert not table.rows_of([got], "cifar100", 100, "small")
    assert "small-cifar100-if100-ce-none-seed0: exit code 1" in table.markdown([got], "small")


def test_a_kill_loses_at_most_an_epoch(tiny_job: Job, tmp_path: Path) -> None:
    """kill -9 of a run: the next call resumes it, and ends where an undisturbed one does."""
    whole = runner.run_cell(cell(), Job(tiny_job.data_dir, tmp_path / "whole", tiny_job.extra))
    job = tiny_job
    child = subprocess.Popen(job.command(cell()), start_new_session=True)
    folder = job.work_dir / cell().name
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "checkpoint.pt").exists():
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first = metrics.read_text().splitlines()[0]
    assert not (folder / "result.json").exists()
    records = Records(tmp_path / "r.jsonl")
    run_grid([cell()], records, Local(job, 1), note=quiet)
    (got,) = records.read()
    for key in ("accuracy_last", "train_accuracy", "alignment"):
        assert got[key] == whole[key]
    assert metrics.read_text().splitlines()[0] == first, "its first epoch, seconds and all, was not repeated"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_grid_ends_its_runs(tiny_job: Job) -> None:
    """Ctrl-C in the terminal: the runs end, none is started again, and the call returns."""
    slow = Job(tiny_job.data_dir, tiny_job.work_dir, (*tiny_job.extra, "--epochs", "500"))
    engine = Local(slow, 1)
    engine.start(cell())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not engine.children.processes:
        time.sleep(0.02)
    (process,) = engine.children.processes
    engine.close()
    assert process.returncode == -signal.SIGTERM
    ((_, got),) = engine.finished()
    assert (got["failed"], got["attempts"]) == (f"exit code -{signal.SIGTERM.value}: no message", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_grid_that_is_told_to_end_ends_its_runs(tmp_path: Path) -> None:
    """Or else they go on without it, and the next call finds their folders in use."""
    run, pid = tmp_path / "run.py", tmp_path / "pid"
    run.write_text(f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(600)")
    script = (
        "import runpy, sys; from pathlib import Path; from longtail import data, runner\n"
        f"data.find_folder = lambda *_: None; runner.SCRIPT = Path({str(run)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    where = ["--records", str(tmp_path / "r.jsonl"), "--work-dir", str(tmp_path / "work"), "--options=--device=cpu"]
    command = f"import sys; sys.argv[0] = 'reproduce.py'\n{script}"
    grid_call = subprocess.Popen([sys.executable, "-c", command, "--preset", "small", *where], cwd=EXAMPLES)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (pid.exists() and pid.read_text()):
        time.sleep(0.02)
    grid_call.terminate()
    assert grid_call.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert not (tmp_path / "r.jsonl").exists(), "what was told to end has not failed"


def test_max_norm_needs_the_network_not_its_record(tmp_path: Path) -> None:
    records, notes = Records(tmp_path / "r.jsonl"), list[str]()
    records.add(record(cell("glmc")))
    engine = Local(Job(tmp_path, tmp_path / "work"), 1)
    progress = run_grid([cell("glmc-maxnorm")], records, engine, note=notes.append)
    assert progress.left == [cell("glmc-maxnorm")]
    assert "not in the work folder" in notes[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a worker by signal")
def test_ray_workers_may_die(tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Ray workers; one is killed in the middle of its run. Nothing is lost, nothing is run twice to a record."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    engine = runner.Ray(tiny_job, 2)
    todo = [cell("ce"), cell("ce", "reg"), cell("arb")]
    records = Records(tmp_path / "r.jsonl")
    killed: list[int] = []
    inner = engine.finished

    def kill_once() -> Iterator[tuple[Cell, dict[str, Any]]]:
        if not killed:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and not killed:
                for one in todo[:2]:
                    metrics = tiny_job.work_dir / one.name / "metrics.jsonl"
                    if metrics.exists() and metrics.read_text().count("\n") >= 1:
                        killed.extend(kill_worker_of(one))
                        break
                time.sleep(0.05)
        yield from inner()

    engine.finished = kill_once  # type: ignore[method-assign]
    try:
        progress = run_grid(todo, records, engine, note=quiet)
    finally:
        ray.shutdown()
    assert killed, "no worker was found to kill"
    assert sorted(one.name for one in progress.finished) == sorted(one.name for one in todo)
    assert records.done() == {one.name for one in todo}
    assert len(records.read()) == 3


def kill_worker_of(one: Cell) -> list[int]:
    """Kill the training process of a cell and the Ray worker that started it; return what was killed."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, UnicodeDecodeError):
            continue
        if "cifar_lt.py" in command and one.name in command:
            for process in (parent, int(folder.name)):
                os.kill(process, signal.SIGKILL)
            return [parent]
    return []


def test_runs_with_other_options_are_compared_pair_by_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = Records(tmp_path / "here.jsonl"), Records(tmp_path / "there.jsonl")
    for seed, accuracy in enumerate((50.0, 52.0, 51.0)):
        here.add(record(cell("ce", seed=seed), accuracy, epochs=40, options={"amp": "bf16", "lr": 0.1}))
        there.add(record(cell("ce", seed=seed), 49.0, epochs=40, options={"amp": "off", "lr": 0.1}))
    there.add(record(cell("arb"), 60.0, epochs=40))  # in one of them alone
    for records in (here, there):  # of a seed that is none of the grid's own three
        records.add(record(cell("ce", "reg", seed=7), 51.0, epochs=40))
    argv = ["report", "--preset", "small", "--records", str(here.path), "--against", str(there.path)]
    assert reproduce.main(argv) == 0
    text = capsys.readouterr().out
    assert "--amp bf16 against off." in text
    # Differences 1, 3, 2: mean 2, deviation 1, and 4.303 of its third part's root.
    assert "| CE, cifar100, imbalance 100 | 3 | 51.0 ± 1.0 | 49.0 ± 0.0 | +2.0 ± 2.5 | +2.0 ± 2.5 |" in text
    assert "| CE+SpAReg, cifar100, imbalance 100 | 1 | 51.0 |" in text
    assert "ARB" not in text
    for records in (here, there):  # of CIFAR-10's classes none is few-shot
        empty = record(Cell("cifar10", 100, "ce", "none", 0, "small"), 80.0, epochs=40)
        records.add({**empty, "accuracy_last": {**empty["accuracy_last"], "few": None}})
    assert reproduce.main(argv) == 0
    assert "| CE, cifar10, imbalance 100 | 1 | 80.0 | 80.0 | +0.0 | +0.0 | +0.0 |  |" in capsys.readouterr().out
    here.add(record(cell("arb"), 60.0, epochs=41))
    assert reproduce.main(argv) == 2
    assert "they are no pair" in capsys.readouterr().err
    assert reproduce.main([*argv[:2], "full", *argv[3:]]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_records_in_the_repository_do_not_make_its_code_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid writes into benchmarks/results while it runs; what its next run has trained with is still the commit."""
    from longtail import training

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code, records = tmp_path / "examples" / "longtail" / "training.py", tmp_path / "benchmarks" / "table1.jsonl"
    for file in (code, records):
        file.parent.mkdir(parents=True)
        file.write_text("one\n")
    monkeypatch.setattr(training, "__file__", str(code))
    assert training.git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    records.write_text("one\ntwo\n")
    assert training.git_commit() == head
    code.write_text("two\n")
    assert training.git_commit() == head + "-dirty"


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data-dir nowhere", "no cifar100 under 'nowhere'"),
        ("--jobs 0", "--jobs is 0"),
        ("--engine ray --gpus-per-run -1", "--gpus-per-run is -1.0"),
        ("--gpus-per-run 0.5", "are for --engine ray"),
        ("--seeds 0 0", "--seeds is [0, 0]"),
        ("--methods etf-dr --aligns slerp", "no run has any of the --aligns slerp; methods take etf-dr: none, reg"),
    ],
)
def test_bad_value(argv: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--preset", "small", "--records", str(tmp_path / "r.jsonl"), *argv.split()]
    assert reproduce.main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("then", "options", "message"),
    [
        ({"epochs": 2}, "", "recorded with --epochs 2 and would now have 40"),
        ({"epochs": 40}, "--epochs 9", "recorded with --epochs 40 and would now have 9"),
        ({"epochs": 40, "capture": True}, "--threads 1", None),
        ({}, "--lr 0.1", None),
    ],
)
def test_runs_with_other_options_do_not_count_as_done(
    then: dict[str, Any], options: str, message: str | None, tmp_path: Path
) -> None:
    """A trial with two epochs must not pass for the real run; what changes no outcome may change."""
    job = Job(tmp_path, tmp_path, tuple(options.split()))
    chosen, records = [cell(), cell("arb")], [record(cell(), options=then), {**vars(cell("arb")), "failed": "died"}]
    if message is None:
        reproduce.check_options(chosen, records, job)
        return
    with pytest.raises(ValueError, match=message):
        reproduce.check_options(chosen, records, job)
    reproduce.check_options(chosen[1:], records, job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 5", "would have the seed 5"),
        ("--imbalance 50", "the imbalance 50.0"),
        ("--dataset cifar10", "the dataset cifar10"),
        ("--method arb", "the method arb"),
        ("--spareg 1.0", "the align reg"),
        ("--spaslerp", "the align slerp"),
        ("--output-dir runs/mine", "the output-dir runs/mine"),
    ],
)
def test_options_cannot_make_a_run_another_one(options: str, message: str, tmp_path: Path) -> None:
    """Three seeds would be one, and a baseline would be its own variant, beside records that say otherwise."""
    job = Job(tmp_path, tmp_path, tuple(options.split()))
    with pytest.raises(ValueError, match=message):
        reproduce.check_options([cell()], [], job)
    if "spareg" in options:
        reproduce.check_options([cell("ce", "reg")], [], job)


@pytest.mark.parametrize("argv", ["--methods best", "--budget soon", "--imbalances 7", "--aligns all", "--preset huge"])
def test_bad_syntax(argv: str) -> None:
    with pytest.raises(SystemExit) as caught:
        reproduce.main(argv.split())
    assert caught.value.code == 2


def test_durations() -> None:
    assert [reproduce.duration(text) for text in ("90s", "9m", "1.5h")] == [90.0, 540.0, 5400.0]


def test_ray_that_is_not_installed_is_named(tiny_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'spalign\[ray\]'"):
        runner.Ray(tiny_job, 1)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "here", "gpu", "captured"),
    [
        ([], True, "cuda", True),
        ([], False, None, False),
        (["--options=--device cuda:1"], False, "cuda:1", True),
        (["--options=--device cpu"], True, None, False),
        (["--options=--amp bf16 --channels-last"], True, "cuda", True),
        (["--options=--amp=fp16"], True, "cuda", False),
        (["--options=--no-capture"], True, "cuda", False),
        (["--options=--capture"], True, "cuda", True),
        (["--options=--checkpoint-seconds 0.5"], True, "cuda", True),
        # A driver without a GPU sends runs to machines that have one, and one that has a GPU to others without.
        (["--engine", "ray", "--gpus-per-run", "0.25"], False, "cuda", True),
        (["--engine", "ray", "--gpus-per-run", "1", "--options=--no-capture"], False, "cuda", False),
        (["--engine", "ray", "--gpus-per-run", "1", "--options=--device cpu"], True, None, False),
        (["--engine", "ray"], True, None, False),
        (["--engine", "ray", "--options=--device cuda"], False, "cuda", True),
    ],
)
def test_runs_on_a_gpu_are_captured(
    argv: list[str], here: bool, gpu: str | None, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cifar_lt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    extra, device = reproduce.execution(reproduce.build_parser().parse_args(argv))
    assert device == gpu
    for one in (cell(), cell("glmc-maxnorm")):
        command = Job(Path("data"), Path("work"), extra).command(one)
        settings = cifar_lt.settings_from(cifar_lt.build_parser().parse_args(command[2:]))
        assert settings.capture == captured
        assert settings.checkpoint_seconds == (0.5 if "0.5" in " ".join(argv) else 2.0 if gpu else 0.0)


@dataclass
class FakeMps:
    """A control program in NVIDIA's stead, whose daemon is a process that sleeps and holds what it inherited.

    Attributes:
        log: a line for every call, with the folder of pipes; for a client too.
        notes: what was said of it.
    """

    folder: Path
    log: Path
    notes: list[str] = field(default_factory=list)

    def calls(self) -> list[str]:
        return [line.split()[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def pipes(self) -> Path:
        (folder,) = {line.split()[1] for line in self.log.read_text().splitlines()}
        return Path(folder)

    def daemon(self) -> int:
        return int((self.folder / "daemon").read_text())

    def is_gone(self) -> bool:
        """Return whether daemon and folder are gone, within a minute: what is told to end may linger."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                ended = Path(f"/proc/{self.daemon()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                ended = True
            if ended and not self.pipes().parent.exists():
                return True
            time.sleep(0.02)
        return False


@pytest.fixture
def mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMps:
    if not sys.platform.startswith("linux"):
        pytest.skip("MPS is of Linux alone")
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / runner.MPS_CONTROL
    program.write_text(
        '#!/bin/sh\nwhat="$1"\n[ "$what" ] || read -r what\n'
        'echo "$what $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY" >>"$FAKE/log"\n'
        'if [ "$what" = quit ]; then kill $(cat "$FAKE/daemon"); exit; fi\n'
        'sleep 600 &\necho $! >"$FAKE/daemon"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    for name in (runner.MPS_PIPES, runner.MPS_LOGS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    client = f"import os; print('client', os.environ[{runner.MPS_PIPES!r}], file=open({str(folder / 'log')!r}, 'a'))"
    monkeypatch.setattr(runner, "USE_GPU", client)
    return FakeMps(folder, folder / "log")


def test_several_runs_share_a_gpu_through_a_private_daemon(
    mps: FakeMps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    with runner.shared_gpu(2, note=mps.notes.append) as environment:
        assert mps.calls() == ["-d", "client"]
        assert environment.keys() == {runner.MPS_PIPES, runner.MPS_LOGS}
        assert environment[runner.MPS_PIPES] == str(mps.pipes())
        assert all(Path(path).is_dir() for path in environment.values())
        # The longest name of a socket or pipe in this folder; a Unix socket's path ends with the 107th byte.
        assert len(f"{mps.pipes()}/nvidia-cuda-mps-control.pid") < 108
        assert runner.MPS_PIPES not in os.environ
    assert mps.calls() == ["-d", "client", "quit"]
    assert mps.is_gone()
    assert len(mps.notes) == 1
    assert "through MPS" in mps.notes[0]


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt])
def test_the_daemon_ends_after_an_exception(reason: type[BaseException], mps: FakeMps) -> None:
    with pytest.raises(reason), runner.shared_gpu(2, note=mps.notes.append):
        raise reason
    assert mps.calls() == ["-d", "client", "quit"]
    assert mps.is_gone()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_daemon_ends_with_a_grid_that_is_killed(end: signal.Signals, mps: FakeMps) -> None:
    """Its keeper must be out of the reach of Ctrl-C, and a run that goes on must not hold the pipe to it."""
    run = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    script = (
        "import os, subprocess, sys; from longtail import runner; runner.USE_GPU = 'pass'\n"
        "with runner.shared_gpu(2) as environment:\n"
        f"    command = [sys.executable, '-c', {run!r}]\n"
        "    run = subprocess.Popen(command, env=runner.Children(environment).environment, stdout=subprocess.PIPE)\n"
        "    run.stdout.readline()\n"
        "    with open(os.environ['FAKE'] + '/run', 'w') as file:\n"
        "        file.write(str(run.pid))\n"
        f"    os.{'killpg(0' if end == signal.SIGINT else 'kill(os.getpid()'}, {end.value})\n"
        "    run.wait()"
    )
    grid = subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, check=False, start_new_session=True)
    assert grid.returncode == -end
    gone = mps.is_gone()
    os.kill(int((mps.folder / "run").read_text()), signal.SIGKILL)  # it was still there
    assert gone
    assert mps.calls() == ["-d", "quit"]


def test_a_daemon_that_cannot_start_is_done_without(mps: FakeMps) -> None:
    program = mps.folder / runner.MPS_CONTROL
    program.write_text('#!/bin/sh\necho "-d $CUDA_MPS_PIPE_DIRECTORY" >>"$FAKE/log"\necho not permitted >&2\nexit 3\n')
    with runner.shared_gpu(4, note=mps.notes.append) as environment:
        assert environment == {}
    assert mps.calls() == ["-d"]
    assert not mps.pipes().parent.exists()
    (note,) = mps.notes
    assert note == (
        "4 runs at a time only take turns on the GPU: nvidia-cuda-mps-control -d ended with exit code 3: not permitted"
    )


def test_a_daemon_that_cannot_serve_is_done_without(mps: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts its server for the first client only, as in a container that may not."""
    monkeypatch.setattr(runner, "USE_GPU", "import sys; sys.exit('server not ready')")
    with runner.shared_gpu(2, note=mps.notes.append) as environment:
        assert environment == {}
        assert mps.calls() == ["-d", "quit"]
        assert mps.is_gone()
    (note,) = mps.notes
    assert note.endswith("through MPS it cannot be used here: server not ready")


def test_what_asks_for_the_gpu_says_why_not() -> None:
    command = [sys.executable, "-c", runner.USE_GPU]
    assert subprocess.run([*command, "cpu"], check=False).returncode == 0
    failing = subprocess.run([*command, "nowhere"], capture_output=True, text=True, check=False)
    assert failing.returncode == 1
    assert "nowhere" in failing.stderr
    assert failing.stderr.count("\n") == 1


def test_without_mps_the_package_is_named(mps: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with runner.shared_gpu(2, note=mps.notes.append) as environment:
        assert environment == {}
    (note,) = mps.notes
    assert "only take turns on the GPU" in note
    assert "install nvidia-cuda-mps (Debian)" in note
    assert "\n" not in note


@pytest.mark.parametrize(("jobs", "variable"), [(1, None), (2, runner.MPS_PIPES)])
def test_no_daemon_where_none_is_needed(
    jobs: int, variable: str | None, mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one run there is nothing to share, and a daemon of the user's serves as it is."""
    if variable is not None:
        monkeypatch.setenv(variable, "/tmp/mine")
    with runner.shared_gpu(jobs, note=mps.notes.append) as environment:
        assert environment == {}
        assert runner.Children(environment).environment.get(runner.MPS_PIPES) == (variable and "/tmp/mine")
    assert mps.calls() == []
    assert mps.notes == []


@pytest.mark.parametrize(("visible", "good"), [("0,1", True), ("GPU-1a2b", True), ("1", False), ("1,0", False)])
def test_the_daemon_numbers_gpus_as_the_runs_do(
    visible: str, good: bool, mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with runner.shared_gpu(2, note=mps.notes.append) as environment:
        assert bool(environment) == good
    assert bool(mps.calls()) == good
    (note,) = mps.notes
    assert good or f"CUDA_VISIBLE_DEVICES is {visible}, and MPS would number these GPUs anew" in note


@pytest.mark.parametrize(
    ("argv", "shared"),
    [
        ("--jobs 2", True),
        ("--jobs 2 --options=--no-capture", True),
        ("--jobs 1", False),
        ("--jobs 2 --options=--device=cpu", False),
    ],
)
def test_the_grid_gives_its_runs_the_gpu_at_once_and_ends_the_daemon_when_they_fail(
    argv: str, shared: bool, mps: FakeMps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; print('run', os.environ.get('CUDA_MPS_PIPE_DIRECTORY'), *sys.argv, "
        f"file=open({str(tmp_path / 'runs')!r}, 'a')); sys.exit(2)"
    )
    monkeypatch.setattr(runner, "SCRIPT", script)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reproduce, "find_folder", lambda *_: None)
    options = ["--records", str(tmp_path / "r.jsonl"), "--work-dir", str(tmp_path / "work"), "--methods", "ce"]
    options += ["--preset", "small", "--aligns", "none", "--seeds", "0", "1", *argv.split()]
    assert reproduce.main(options) == 1
    runs = [line.split() for line in (tmp_path / "runs").read_text().splitlines()]
    assert len(runs) == 2
    for run in runs:
        assert run[1] == (str(mps.pipes()) if shared else "None")
        assert ("--capture" in run) == ("--options" not in argv)
    assert mps.calls() == (["-d", "client", "quit"] if shared else [])
    assert not shared or mps.is_gone()


# --- the report -------------------------------------------------------------------------------------------------------


def some_records() -> list[dict[str, Any]]:
    base, gains = [26.1, 26.9, 26.5], [0.5, -0.1, 0.9]
    plain = [record(cell(seed=seed), value) for seed, value in enumerate(base)]
    reg = [record(cell("ce", "reg", seed), base[seed] + gain) for seed, gain in enumerate(gains)]
    return [*plain, *reg, record(cell("arb", "proj"), 30.0)]


def test_gains_are_paired_and_have_student_intervals() -> None:
    rows = {row.title: row for row in table.rows_of(some_records(), "cifar100", 100, "small")}
    assert list(rows) == ["CE", "CE+SpAReg", "ARB+SpAProj"]
    gain = rows["CE+SpAReg"].gain
    assert gain is not None
    values = [0.5, -0.1, 0.9]
    assert gain.mean == pytest.approx(statistics.fmean(values))
    # Student's 97.5 % point at 2 degrees of freedom, from a printed table
    assert gain.confidence() == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3), rel=1e-3)
    assert rows["CE"].gain is None
    assert rows["ARB+SpAProj"].gain is None, "no baseline of the same seed"
    assert rows["CE"].paper == 42.1
    assert rows["CE+SpAReg"].paper_gain == pytest.approx(2.2)
    assert rows["ARB+SpAProj"].last.deviation is None


def test_a_table_of_its_own_says_what_else_reads_the_features() -> None:
    def read(of: Cell, mean: float, head: float) -> dict[str, Any]:
        readouts = {"nearest class mean": {"balanced": mean}, "conventional head": {"balanced": head}}
        return record(of, 20.0, readouts=readouts)

    records = [
        read(cell("glmc", seed=0), 26.0, 24.0),
        read(cell("glmc", seed=1), 28.0, 25.0),
        read(cell("glmc", "reg", 0), 27.0, 24.0),
        read(cell("glmc", "reg", 1), 28.0, 25.5),
        record(cell("arb"), 31.0),  # of before there was any
    ]
    text = table.markdown(records, "small")
    assert "| | last | nearest class mean | gain | conventional head | gain |" in text
    # Differences 1 and 0: mean 0.5, and 12.706 times 0.7071 over the root of 2; half of that for 0 and 0.5.
    assert "| GLMC+SpAReg | 20.0 ± 0.0 | 27.5 ± 0.7 | +0.5 ± 6.4 | 24.8 ± 1.1 | +0.2 ± 3.2 |" in text
    assert "| GLMC | 20.0 ± 0.0 | 27.0 ± 1.4 |  | 24.5 ± 0.7 |  |" in text
    assert text.count("| ARB |") == 1


def test_gains_only_compare_equal_seeds() -> None:
    records = [record(cell(seed=0), 10.0), record(cell("ce", "reg", 0), 11.0), record(cell("ce", "reg", 1), 99.0)]
    row = table.rows_of(records, "cifar100", 100, "small")[1]
    assert row.gain is not None
    assert row.gain.mean == pytest.approx(1.0)
    assert row.gain.count == 1
    assert row.gain.confidence() is None
    # And equal training images: another archive's subset is another set, which the report says.
    assert row.unpaired == []
    records[1]["data_fingerprint"] = "another"
    text = table.markdown(records, "small")
    assert table.rows_of(records, "cifar100", 100, "small")[1].gain is None
    assert "No gain of CE+SpAReg, seeds 0: options or training images are not the baseline's." in text


def test_gains_only_compare_runs_that_differ_in_their_strategy() -> None:
    base = {"lr": 0.1, "compile": False, "spareg": 0.0, "momentum": 0.1}

    def gain(of: Cell, **other: Any) -> table.Spread | None:
        family = "glmc" if of.method == "glmc-maxnorm" else of.method
        plain = record(cell(family), 10.0, epochs=40, options=base)
        variant = record(of, 11.0, **{"epochs": 40, **other})
        return table.rows_of([plain, variant], "cifar100", 100, "small")[1].gain

    reg = cell("ce", "reg")
    assert gain(reg, options={**base, "compile": True, "spareg": 0.3, "momentum": 0.2, "later": 1}) is not None
    assert gain(reg, options={**base, "lr": 0.05}) is None
    assert gain(reg, epochs=41, options=base) is None
    assert gain(cell("glmc-maxnorm"), epochs=10, options={**base, "lr": 0.01}) is not None


def test_report_prints_last_before_best_and_what_is_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figure = tmp_path / "r.jsonl", tmp_path / "gains.svg"
    path.write_text("".join(json.dumps(one) + "\n" for one in some_records()))
    assert reproduce.main(["report", "--preset", "small", "--records", str(path), "--figure", str(figure)]) == 0
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("| |"))
    assert header.index("last") < header.index("best")
    assert "| CE+SpAReg | 44.3 | 26.9 ± 0.4 | 27.9 ± 0.4 | +0.4 | ± 1.3 | +2.2 |" in text
    assert "with replacement" in text
    assert "three networks" in text
    assert figure.read_text().startswith("<?xml")


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    assert reproduce.main(["report", "--records", str(path)]) == 0
    assert "no finished run" in capsys.readouterr().out
    assert reproduce.main(["report", "--records", str(path), "--figure", str(tmp_path / "f.svg")]) == 2
    assert "nothing to draw" in capsys.readouterr().err
