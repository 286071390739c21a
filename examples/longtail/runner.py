"""Runs cells of the grid, here or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .grid import Cell, Record, Records, record_of

SCRIPT = Path(__file__).resolve().parent.parent / "cifar_lt.py"

GPU_CHECKPOINT_SECONDS = 2.0  # apart: on a GPU an epoch may take little more than writing one

MPS_CONTROL, MPS_PIPES, MPS_LOGS = "nvidia-cuda-mps-control", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
# Waits for the end of its input, which comes however the grid ends. The daemon must not hold the pipes.
MPS_KEEPER = f"""
{MPS_CONTROL} -d </dev/null >"$0/start" 2>&1 || exit
echo started
read -r _
echo quit | {MPS_CONTROL} >/dev/null 2>&1
rm -rf "$0"
"""
USE_GPU = """
import sys, torch
try:
    torch.zeros(1, device=sys.argv[1])
except RuntimeError as error:
    sys.exit(str(error).splitlines()[0])
"""


@dataclass(frozen=True)
class Job:
    """How every cell is run.

    Attributes:
        data_dir: where the archives are.
        work_dir: one folder per run; a run that was cut off resumes from its own.
        extra: further options of `cifar_lt.py`, for all runs alike.
        attempts: how often a run may die before it is given up.
    """

    data_dir: Path
    work_dir: Path
    extra: tuple[str, ...] = ()
    attempts: int = 2

    def has_network(self, cell: Cell) -> bool:
        """Return whether the checkpoint of a run is at hand."""
        return (self.work_dir / cell.name / "checkpoint.pt").exists()

    def command(self, cell: Cell) -> list[str]:
        where = ["--data-dir", str(self.data_dir), "--output-dir", str(self.work_dir / cell.name)]
        how = ["--resume", "--quiet", "--no-tensorboard"]
        return [sys.executable, str(SCRIPT), *cell.options(self.work_dir), *where, *how, *self.extra]


class Children:
    """The training processes of a grid, so that an interrupted grid can end them.

    Args:
        environment: added to the variables of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = {**os.environ, **(environment or {})}
        self.stopped = False
        self.processes: set[subprocess.Popen[str]] = set()

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a command to its end and return its exit code and what it wrote to stderr."""
        with subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True) as process:
            self.processes.add(process)
            if self.stopped:
                process.terminate()
            message = process.communicate()[1]
            self.processes.discard(process)
        return process.returncode, message

    def stop(self) -> None:
        """End all processes, and let none start again: they go on from their checkpoints in another call."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def run_cell(cell: Cell, job: Job, children: Children | None = None) -> Record:
    """Train one cell, again if it dies, and return its record: of a failure, one with `failed`."""
    children = children or Children()
    folder = job.work_dir / cell.name
    (folder / "result.json").unlink(missing_ok=True)
    error, attempts = "", 0
    while attempts < job.attempts:
        attempts += 1
        code, message = children.run(job.command(cell))
        if code == 0 and (folder / "result.json").exists():
            if message.strip():  # a warning
                print(f"{cell.name}: {message.strip()}", file=sys.stderr)
            return record_of(cell, json.loads((folder / "result.json").read_text()))
        lines = message.strip().splitlines()
        error = f"exit code {code}: {lines[-1] if lines else 'no message'}"
        if code == 2 or children.stopped:  # a bad option or file stays bad
            break
    return {**vars(cell), "failed": error, "attempts": attempts}


@contextlib.contextmanager
def shared_gpu(jobs: int, device: str = "cuda", note: Callable[[str], None] = print) -> Iterator[dict[str, str]]:
    """Have a GPU compute for several processes at once, by a daemon of NVIDIA's Multi-Process Service (MPS).

    Without one it takes turns between processes, however little of it each uses. The daemon is private and ends with
    the context, or with this process, even killed. Where there is none to be had, the reason is noted; a daemon of the
    user's own (`CUDA_MPS_PIPE_DIRECTORY`) is used as it is.

    Args:
        jobs: how many processes there will be at a time; one needs no daemon.
        device: that they will use.
        note: says what happens, in a line.

    Yields:
        The variables to add to the environment of these processes.
    """
    with contextlib.ExitStack() as stack:
        environment: dict[str, str] = {}
        if jobs > 1 and not os.environ.get(MPS_PIPES):
            try:
                environment = stack.enter_context(_mps_daemon(device))
                note(f"{jobs} runs at a time compute on the GPU at once, through MPS")
            except OSError as error:
                note(f"{jobs} runs at a time only take turns on the GPU: {error}")
        yield environment


@contextlib.contextmanager
def _mps_daemon(device: str) -> Iterator[dict[str, str]]:
    """Run an MPS daemon and yield the variables of its clients.

    Raises:
        OSError: no GPU can be used through one here.
    """
    if shutil.which(MPS_CONTROL) is None:
        raise OSError(
            f"{MPS_CONTROL} is missing; install nvidia-cuda-mps (Debian), nvidia-compute-utils-N for driver N (Ubuntu)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible[0].isdigit() and visible != [str(number) for number in range(len(visible))]:
        raise OSError(
            f"CUDA_VISIBLE_DEVICES is {','.join(visible)}, and MPS would number these GPUs anew from 0; name them by "
            "their UUIDs, which nvidia-smi -L lists"
        )
    folder = Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))  # the path of a Unix socket has 107 bytes at most
    variables = {MPS_PIPES: str(folder / "pipes"), MPS_LOGS: str(folder / "logs")}
    for path in variables.values():
        Path(path).mkdir()
    environment = {**os.environ, **variables}
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", MPS_KEEPER, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # out of the reach of Ctrl-C
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        if not keeper.stdout.readline():
            lines = (folder / "start").read_text().split("\n")
            raise OSError(f"{MPS_CONTROL} -d ended with exit code {keeper.wait()}: {lines[0] or 'no message'}")
        # The daemon starts its server for the first client only, and where that fails every run would.
        client = [sys.executable, "-c", USE_GPU, device]
        try:
            subprocess.run(client, env=environment, capture_output=True, text=True, check=True, timeout=120)
        except subprocess.SubprocessError as error:
            lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
            raise OSError(f"through MPS it cannot be used here: {lines[-1]}") from error
        yield variables
    finally:
        keeper.stdin.close()
        keeper.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it ends after us
            keeper.wait(timeout=30)
            shutil.rmtree(folder, ignore_errors=True)


class Local:
    """Runs cells on this machine, `jobs` at a time; several may share a GPU.

    Args:
        job: how.
        jobs: how many at a time.
        environment: added to their variables, as from `shared_gpu`.
    """

    def __init__(self, job: Job, jobs: int, environment: Mapping[str, str] | None = None) -> None:
        self.job, self.slots = job, jobs
        self.pool = ThreadPoolExecutor(jobs)
        self.children = Children(environment)
        self.running: dict[Future[Record], Cell] = {}

    def start(self, cell: Cell) -> None:
        self.running[self.pool.submit(run_cell, cell, self.job, self.children)] = cell

    def finished(self) -> Iterator[tuple[Cell, Record]]:
        """Wait for at least one run to end, and yield those that have."""
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            yield self.running.pop(future), future.result()

    def close(self) -> None:
        """End what is still running, as after an interrupt."""
        self.children.stop()
        self.pool.shutdown(cancel_futures=True)


class Ray:
    """Runs cells as Ray tasks. A task whose worker or machine dies is run again, and resumes from its checkpoint.

    Args:
        job: `data_dir` and `work_dir` must be the same place for every machine.
        jobs: how many tasks to have under way.
        gpus: of each task, may be a fraction; 0 for none.
        address: of the cluster; None starts one on this machine.
    """

    def __init__(self, job: Job, jobs: int, *, gpus: float = 0.0, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray needs Ray: pip install 'spalign[ray]', or use --engine local") from error
        self.ray: Any = ray
        self.job, self.slots = job, jobs
        ray.init(
            address=address,
            num_cpus=None if address else jobs,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(SCRIPT.parent)}},
        )
        self.task = ray.remote(run_cell).options(num_cpus=1, num_gpus=gpus, max_retries=job.attempts)
        self.running: dict[Any, Cell] = {}

    def start(self, cell: Cell) -> None:
        self.running[self.task.remote(cell, self.job)] = cell

    def finished(self) -> Iterator[tuple[Cell, Record]]:
        """Wait for at least one run to end, and yield those that have."""
        ready, _ = self.ray.wait(list(self.running), num_returns=1)
        for reference in ready:
            cell = self.running.pop(reference)
            try:
                yield cell, self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                yield cell, {**vars(cell), "failed": f"Ray: {reason}", "attempts": self.job.attempts + 1}

    def close(self) -> None:
        self.ray.shutdown()


@dataclass
class Progress:
    """What one call has done.

    Attributes:
        finished, failed: cells by outcome.
        left: cells not run, because the budget ended or what they start from is missing.
    """

    finished: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    left: list[Cell] = field(default_factory=list)


def run_grid(
    cells: Sequence[Cell],
    records: Records,
    engine: Local | Ray,
    *,
    budget_s: float | None = None,
    note: Callable[[str], None] = print,
) -> Progress:
    """Run all cells that have no record yet, in their order.

    A run is not started when its likely length, that of the longest run of its method so far, would pass the budget;
    runs under way are finished.
    """
    begin, progress = time.monotonic(), Progress()
    done = records.done()
    todo = [cell for cell in cells if cell.name not in done]
    note(f"{len(cells) - len(todo)} of {len(cells)} runs are done already, {len(todo)} to go")
    # Of a method without a record, the longest of the others is the best guess.
    lengths: dict[tuple[str, str], float] = {}

    def learn(record: Record) -> None:
        key = (record["method"], record["preset"])
        lengths[key] = max(lengths.get(key, 0.0), float(record["seconds"]))

    for record in records.read():
        if "failed" not in record:
            learn(record)

    def ready(cell: Cell) -> bool:
        stage = cell.first_stage()
        return stage is None or (stage.name in done and engine.job.has_network(stage))

    def in_budget(cell: Cell) -> bool:
        longest = max((value for key, value in lengths.items() if key[1] == cell.preset), default=0.0)
        likely = lengths.get((cell.method, cell.preset), longest)
        return budget_s is None or time.monotonic() - begin + likely < budget_s

    try:
        while True:
            done = records.done()  # another call may finish some too
            todo = [cell for cell in todo if cell.name not in done]
            for cell in [cell for cell in todo if ready(cell) and in_budget(cell)]:
                if len(engine.running) >= engine.slots:
                    break
                todo.remove(cell)
                engine.start(cell)
            if not engine.running:
                break
            for cell, record in engine.finished():
                records.add(record)
                if "failed" in record:
                    progress.failed.append(cell)
                    note(f"FAILED {cell.name}: {record['failed']} (attempts: {record['attempts']})")
                    continue
                progress.finished.append(cell)
                learn(record)
                note(
                    f"{cell.name}: {record['accuracy_last']['balanced']:.2f} %, alignment "
                    f"{record['alignment']['all']:.3f}, {record['seconds']:.0f} s; {len(todo)} to go"
                )
    finally:
        engine.close()
    progress.left = todo
    for cell in todo:
        stage = cell.first_stage()
        if stage is not None and not ready(cell):
            note(f"left out {cell.name}: it starts from the network of {stage.name}, which is not in the work folder")
    return progress
