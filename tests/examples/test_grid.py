"""The grid: what it holds, in which order, what survives a kill, and what the report says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reproduce
from longtail import grid, runner, table
from longtail.data import long_tail_counts
from longtail.grid import Cell, Records, cell_of, cells
from longtail.runner import Job, Local, run_grid

EXAMPLES = Path(reproduce.__file__).parent


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


def test_max_norm_waits_for_its_first_stage(tmp_path: Path) -> None:
    todo = [cell("glmc-maxnorm"), cell("glmc")]
    engine: Any = Engine(slots=2)
    run_grid(todo, Records(tmp_path / "r.jsonl"), engine, note=quiet)
    assert engine.started == [cell("glmc").name, cell("glmc-maxnorm").name]
    failing: Any = Engine({cell("glmc").name})
    progress = run_grid(todo, Records(tmp_path / "s.jsonl"), failing, note=quiet)
    assert progress.left == [cell("glmc-maxnorm")]


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
            deadline = time.monotonic() + 60
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


def test_records_in_the_repository_do_not_make_its_code_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid writes into benchmarks/results while it runs; what its next run has trained with is still the commit."""
    from longtail import engine

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code, records = tmp_path / "examples" / "longtail" / "engine.py", tmp_path / "benchmarks" / "table1.jsonl"
    for file in (code, records):
        file.parent.mkdir(parents=True)
        file.write_text("one\n")
    monkeypatch.setattr(engine, "__file__", str(code))
    assert engine.git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    records.write_text("one\ntwo\n")
    assert engine.git_commit() == head
    code.write_text("two\n")
    assert engine.git_commit() == head + "-dirty"


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data-dir nowhere", "no cifar100 under 'nowhere'"),
        ("--jobs 0", "--jobs is 0"),
        ("--engine ray --gpus-per-run -1", "--gpus-per-run is -1.0"),
        ("--gpus-per-run 0.5", "are for --engine ray"),
        ("--seeds 0 0", "--seeds is [0, 0]"),
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


def test_gains_only_compare_equal_seeds() -> None:
    records = [record(cell(seed=0), 10.0), record(cell("ce", "reg", 0), 11.0), record(cell("ce", "reg", 1), 99.0)]
    row = table.rows_of(records, "cifar100", 100, "small")[1]
    assert row.gain is not None
    assert row.gain.mean == pytest.approx(1.0)
    assert row.gain.count == 1
    assert row.gain.confidence() is None


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
