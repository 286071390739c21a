#!/usr/bin/env python3
"""Measure what spalign costs, as ratios against yardsticks timed in the same run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --threads 2 --output DIR
    python benchmarks/overhead.py --device cuda

Four measurements, each with its goal: the tracker's update against a per-class Python loop; its cost by the number of
classes; the functions that touch every classifier row against one copy of a C x D matrix, with what they allocate;
and the whole method against a training step of a CIFAR ResNet-32.

Candidates of one measurement take turns (a rotation of them each round, each timed over as many calls as fill some
milliseconds) and the medians over rounds are divided, so a slow spell of the machine meets all of them. On one CPU
thread it is processor time that counts, so that other processes take none of it. Labels are long-tailed (largest class
100 times the smallest) and new in every call; features stay the same tensor, as recently written as in training. Every
tracker is warm: no class is new.

The loop keeps what the tracker keeps of a class, its mean and its count, and is the cheaper one, of a moving average,
for both modes; what it takes without the counts is given beside it. The functions of classifier rows are compiled and
written in place, as the library writes them (the gradient into `.grad`, the rotation into the weight). Returned as a
new tensor they cost its memory besides, which on some systems costs more than they do: it is listed by itself.

Writes `DATE-overhead-DEVICE.json` and `.md` to the output folder. Exit code 0 whether or not goals are met.

Shapes: N samples, C classes, D feature dimensions; a `copy` is `a.copy_(b)` of float32 (C, D).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import spalign
from spalign import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from longtail.networks import CifarResNet  # noqa: E402
from longtail.reporting import recorded_command  # noqa: E402
from longtail.training import gpu_facts  # noqa: E402

Call = Callable[[], object]
MODES: dict[str, float | None] = {"EMA": 0.1, "cumulative": None}
STEPS_PER_EPOCH = 85  # CIFAR-100-LT, imbalance 100, batches of 128
TRACKER, REGULARISER = "tracker alone", "tracker and regulariser with its backward"
PROJECTION, ROTATION = "projection", "SLERP, once per epoch"


@dataclass
class Row:
    """One line of the report.

    Attributes:
        measure: section of the report.
        name: what was measured.
        value: the ratio, in `unit`.
        unit: what the ratio is of.
        goal: bound on the value; None where there is none.
        at_least: whether the goal is a lower bound.
        details: what the value was made from, median milliseconds of one call where not said otherwise.
    """

    measure: str
    name: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = False
    details: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "met" if (self.value >= self.goal if self.at_least else self.value <= self.goal) else "MISSED"

    def cells(self) -> tuple[str, str, str, str]:
        goal = "" if self.goal is None else f"{'>=' if self.at_least else '<='} {self.goal:g} {self.unit}"
        value = f"{self.value:.3g}" if self.value < 100 else f"{self.value:.0f}"
        return self.name, goal, f"{value} {self.unit}", self.verdict


class Clock:
    """Times interleaved candidates on one device."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.rounds = rounds

    def once(self, call: Call, repeats: int) -> float:
        """Return seconds per call."""
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            torch.cuda.synchronize(self.device)
            return float(start.elapsed_time(stop)) / 1e3 / repeats
        # On one thread the processor's time is the wall clock's less what other processes take of it.
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = now()
        for _ in range(repeats):
            call()
        return (now() - begin) / repeats

    def medians(self, calls: dict[str, Call], what: str, at_least_s: float = 4e-3) -> dict[str, float]:
        """Return the median seconds of one call of each candidate, after warming each up."""
        repeats = {}
        for name, call in calls.items():
            self.once(call, 2)
            repeats[name] = max(1, min(1000, round(at_least_s / max(self.once(call, 1), 1e-7))))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in tqdm(range(self.rounds), desc=what, leave=False, disable=None):
            for name in order:
                seconds[name].append(self.once(calls[name], repeats[name]))
            order.append(order.pop(0))
        return {name: statistics.median(values) for name, values in seconds.items()}


def milliseconds(seconds: dict[str, float], *names: str) -> dict[str, float]:
    return {name: 1e3 * seconds[name] for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def label_batches(n: int, c: int, count: int, device: torch.device) -> list[Tensor]:
    """Return `count` batches of n labels of a long tail over c classes, the largest 100 times the smallest."""
    frequency_C = 100.0 ** -torch.linspace(0, 1, c, dtype=torch.float64)
    cumulative_C = torch.cumsum(frequency_C / frequency_C.sum(), 0)
    labels = torch.searchsorted(cumulative_C, torch.rand(count, n, dtype=torch.float64)).clamp(max=c - 1)
    # Class indices say nothing of class sizes in real data.
    return list(torch.randperm(c)[labels].to(device).unbind())


def warm_tracker(c: int, d: int, momentum: float | None, device: torch.device) -> spalign.ClassMeanTracker:
    """Return a tracker that has seen every class, with all of its memory in use."""
    tracker = spalign.ClassMeanTracker(c, d, momentum=momentum, device=device)
    with torch.no_grad():
        tracker.mean.normal_()
        tracker.weight.fill_(100.0)
    return tracker.eval().train()  # sums the means afresh


class Cycle:
    """Calls a function with the next of several batches of labels each time."""

    def __init__(self, function: Callable[[Tensor], object], batches: Sequence[Tensor]) -> None:
        self.function, self.batches, self.next = function, batches, 0

    def __call__(self) -> None:
        self.function(self.batches[self.next])
        self.next = (self.next + 1) % len(self.batches)


# ----------------------------------------------------------------------------------------------------------------------
# Measurements
# ----------------------------------------------------------------------------------------------------------------------


def python_loop(mean_CD: Tensor, count_C: Tensor, momentum: float, counting: bool, h_ND: Tensor, y_N: Tensor) -> None:
    """Move class means as a training script would that has not thought about it."""
    for c in y_N.unique():
        mask = y_N == c
        batch_mean = h_ND[mask].mean(0)
        if count_C[c] == 0:
            mean_CD[c] = batch_mean
        else:
            mean_CD[c].lerp_(batch_mean, momentum)
        if counting:
            count_C[c] += mask.sum()


def measure_tracker(clock: Clock, quick: bool) -> list[Row]:
    """Time `ClassMeanTracker.update` against the loop; where time goes into calls, not into memory, compiled too."""
    rows = []
    for n, c, d, goal in ((128, 100, 64, 30.0), (256, 1000, 2048, 7.0), (1024, 8142, 2048, 7.0)):
        if quick and c > 1000:
            continue
        h_ND, batches = torch.randn(n, d, device=clock.device), label_batches(n, c, 16, clock.device)
        mean_CD, count_C = torch.randn(c, d, device=clock.device), torch.ones(c, device=clock.device)
        calls: dict[str, Call] = {
            "loop": Cycle(partial(python_loop, mean_CD, count_C, 0.1, True, h_ND), batches),
            "loop without counts": Cycle(partial(python_loop, mean_CD, count_C, 0.1, False, h_ND), batches),
        }
        for mode, momentum in MODES.items():
            tracker = warm_tracker(c, d, momentum, clock.device)
            calls[mode] = Cycle(partial(tracker.update, h_ND), batches)
            if c <= 100:
                compiled = torch.compile(
                    warm_tracker(c, d, momentum, clock.device).update, fullgraph=True, dynamic=False
                )
                calls[f"{mode}, compiled"] = Cycle(partial(compiled, h_ND), batches)
        with torch.no_grad():
            seconds = clock.medians(calls, f"tracker {n, c, d}")
        rows += [
            Row(
                "tracker update over a per-class Python loop",
                f"(N, C, D) = {n, c, d}, {name}",
                seconds["loop"] / seconds[name],
                "times faster",
                goal if name in MODES else None,
                at_least=True,
                details=milliseconds(seconds, name, "loop", "loop without counts"),
            )
            for name in calls
            if not name.startswith("loop")
        ]
    return rows


def measure_scaling(clock: Clock, quick: bool) -> list[Row]:
    """Time `ClassMeanTracker.update` by the number of classes."""
    n, d, sizes = 1024, 128, (1_000, 10_000, 100_000) if quick else (1_000, 10_000, 100_000, 1_000_000)
    h_ND = torch.randn(n, d, device=clock.device)
    calls: dict[str, Call] = {}
    for c in sizes:
        batches = label_batches(n, c, 256, clock.device)  # many, or a cache would hold the few rows that they touch
        for mode, momentum in MODES.items():
            tracker = warm_tracker(c, d, momentum, clock.device)
            calls[f"{mode} {c:.0e}"] = Cycle(partial(tracker.update, h_ND), batches)
    seconds = clock.medians(calls, "tracker by C")
    first, last = f"{sizes[0]:.0e}", f"{sizes[-1]:.0e}"
    return [
        Row(
            f"tracker update by C, N = {n}, D = {d}",
            f"{mode}, C = {sizes[-1]:,} over C = {sizes[0]:,}",
            seconds[f"{mode} {last}"] / seconds[f"{mode} {first}"],
            "times the cost",
            goal,
            details=milliseconds(seconds, *(name for name in calls if name.startswith(mode))),
        )
        for mode, goal in (("EMA", 2.0), ("cumulative", 1.5))
    ]


def large_allocations(call: Call, size: int, device: torch.device) -> tuple[int, float]:
    """Return how many tensors of at least `size` bytes one call allocates, and its peak of new memory in such sizes."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
        del result
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if event.device_type().name == device.type.upper()]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return sum(event.nbytes() >= size for event in events), peak / size


def measure_rows(clock: Clock, quick: bool) -> list[Row]:
    """Time the functions of all classifier rows against one copy, and count what they allocate."""
    c, d = (1000, 2048) if quick else (8142, 2048)
    tracker = warm_tracker(c, d, 0.1, clock.device)
    mean_CD, seen_C, center_D = tracker.mean, tracker.seen, tracker.center
    weight_CD, grad_CD, other_CD = (torch.randn(c, d, device=clock.device) for _ in range(3))
    alpha = torch.tensor(1e-3, device=clock.device)

    def regulariser() -> tuple[Tensor, Tensor]:
        return functional.alignment_loss_and_grad(weight_CD, mean_CD, seen_C, center_D=center_D)

    def projection() -> Tensor:
        return functional.project_gradient(grad_CD, weight_CD, mean_CD, seen_C, gamma=0.5, center_D=center_D)

    def rotation() -> functional.RotatedRows:
        return functional.slerp(weight_CD, mean_CD, seen_C, alpha=alpha, threshold=0.95, center_D=center_D)

    def add_regulariser() -> Tensor:
        loss, by_weight_CD = regulariser()
        other_CD.add_(0.1 * by_weight_CD)
        return loss

    def write_projection() -> None:
        grad_CD.copy_(projection())

    def write_rotation() -> tuple[Tensor, Tensor]:
        rows_CD, rotated_C, antipodal_C = rotation()
        weight_CD.copy_(rows_CD)
        return rotated_C, antipodal_C

    functions: dict[str, tuple[Call, Call, float]] = {
        "regulariser with gradient": (regulariser, add_regulariser, 4.5),
        "projection": (projection, write_projection, 3.0),
        "SLERP": (rotation, write_rotation, 5.0),
    }
    calls: dict[str, Call] = {"copy": lambda: other_CD.copy_(grad_CD), "a new tensor, filled": lambda: grad_CD.clone()}
    for name, (returned, in_place, _) in functions.items():
        tqdm.write(f"compiling: {name}", file=sys.stderr)
        calls[f"{name}, compiled, in place"] = torch.compile(in_place, fullgraph=True, dynamic=False)
        calls[f"{name}, compiled, returned"] = torch.compile(returned, fullgraph=True, dynamic=False)
        calls[f"{name}, eager, returned"] = returned
    with torch.no_grad():
        seconds = clock.medians(calls, "rows")

    times, allocations = [], []
    for label, call in calls.items():
        if label == "copy":
            continue
        name, _, form = label.partition(", ")
        on_cpu, compiled = clock.device.type == "cpu", form.startswith("compiled")
        times.append(
            Row(
                f"functions of classifier rows, C = {c}, D = {d}",
                label,
                seconds[label] / seconds["copy"],
                "copies",
                functions[name][2] if form == "compiled, in place" and on_cpu else None,
                details=milliseconds(seconds, label, "copy"),
            )
        )
        count, peak = large_allocations(call, 4 * c * d, clock.device)
        allocations.append(
            Row(
                "what they allocate",
                label,
                count,
                "C x D tensors",
                1.0 if compiled else None,
                details={"peak of new memory, C x D tensors": peak},
            )
        )
    return times + allocations


class NoOptimizer(torch.optim.Optimizer):
    """Steps nothing, so that what remains of a wrapped step is the wrapper."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


def method_parts(
    n: int, c: int, d: int, device: torch.device, *, dtype: torch.dtype = torch.float32, compiled: str | None = None
) -> dict[str, Call]:
    """Return the parts of the method, each by itself, through the public classes.

    Args:
        n, c, d: N, C, D.
        device, dtype: of the features.
        compiled: name under which the regulariser is also returned compiled; None for not.
    """
    # A layer of its own: the method's cost must not depend on what a network is doing to its weight meanwhile.
    fc = nn.Linear(d, c).to(device)
    h_ND = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    for leaf in (fc.weight, fc.bias, h_ND):
        leaf.grad = torch.randn_like(leaf) * 1e-3  # cross-entropy's, which the regulariser's is added to
    tracker, batches = warm_tracker(c, d, 0.1, device), label_batches(n, c, 16, device)
    spareg = spalign.SpARegLoss(fc, tracker)

    def regularise(term: Callable[[Tensor, Tensor], Tensor], y_N: Tensor) -> None:
        (0.1 * term(h_ND, y_N)).backward()

    parts: dict[str, Call] = {
        TRACKER: Cycle(partial(tracker.update, h_ND), batches),
        REGULARISER: Cycle(partial(regularise, spareg), batches),
    }
    if compiled is not None:
        fused = torch.compile(spareg, fullgraph=True, dynamic=False)
        parts[compiled] = Cycle(partial(regularise, fused), batches)
    parts[PROJECTION] = spalign.SpAProj(NoOptimizer(fc.parameters(), {}), fc, tracker, gamma=0.5).step
    parts[ROTATION] = spalign.SpASlerp(fc, tracker, total_steps=10**6, alpha_max=0.01).step
    return parts


def measure_step(clock: Clock) -> list[Row]:
    """Time each part of the method by itself, through the public classes, against a training step of ResNet-32."""
    n, c = 128, 100
    model = CifarResNet(c).to(clock.device).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images_N3HW, batches = torch.randn(n, 3, 32, 32, device=clock.device), label_batches(n, c, 16, clock.device)

    def step(y_N: Tensor) -> None:
        sgd.zero_grad()
        F.cross_entropy(model(images_N3HW), y_N).backward()
        sgd.step()

    tqdm.write("compiling: SpARegLoss", file=sys.stderr)
    fused = "the same, SpARegLoss compiled"
    parts = method_parts(n, c, model.classifier.in_features, clock.device, compiled=fused)
    seconds = clock.medians({"step": Cycle(step, batches), **parts}, "ResNet-32")
    seconds[ROTATION] /= STEPS_PER_EPOCH
    totals = {"everything together": REGULARISER, "everything together, SpARegLoss compiled": fused}
    for total, regulariser in totals.items():
        seconds[total] = seconds[regulariser] + seconds[PROJECTION] + seconds[ROTATION]
    return [
        Row(
            f"share of a ResNet-32 training step (eager, {n} x 32 x 32, C = {c})",
            name,
            100 * seconds[name] / seconds["step"],
            "%",
            0.1 if name in totals and clock.device.type == "cpu" else None,
            details=milliseconds(seconds, name, "step"),
        )
        for name in (*parts, *totals)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str | None:
    result = subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> str:
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", "spalign", "benchmarks/*.py", "examples")
    return f"{head} with uncommitted changes" if changed else head


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "processors and load": f"{os.cpu_count()}, {os.getloadavg()[1]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "spalign": spalign.__version__,
        "commit": commit(),
        "seed": str(args.seed),
        "rounds": str(args.rounds),
        "command": recorded_command(f"benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:]),
        **{name: str(value) for name, value in gpu_facts(device).items()},
    }


def terminal_table(rows: Sequence[Row]) -> str:
    header = ("", "goal", "measured", "")
    widths = [max(len(cells[i]) for cells in (header, *(row.cells() for row in rows))) for i in range(4)]
    lines, measure = [], ""
    for row in rows:
        if row.measure != measure:
            measure = row.measure
            lines += ["", measure[0].upper() + measure[1:]]
        lines.append(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row.cells(), widths, strict=True)).rstrip()
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row], about: dict[str, str], title: str) -> str:
    lines = [f"# {title}, {about['date']}, {about['device']}", ""]
    lines += [f"- {key}: `{value}`" if key == "command" else f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "Ratios of medians of interleaved calls in one run; the docstring of the script says how.", ""]
    measure = ""
    for row in rows:
        if row.measure != measure:
            measure = row.measure
            lines += [
                "",
                f"## {measure[0].upper() + measure[1:]}",
                "",
                "| | goal | measured | | milliseconds |",
                "|---|---|---|---|---|",
            ]
        times = ", ".join(f"{name} {value:.3g}" for name, value in row.details.items())
        lines.append("| " + " | ".join((*row.cells(), times)) + " |")
    return "\n".join(lines) + "\n"


def write_record(rows: Sequence[Row], about: dict[str, str], args: argparse.Namespace, name: str, title: str) -> None:
    """Print the rows, and write `DATE-NAME-DEVICE.json` and `.md` to the output folder."""
    print(f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}, spalign at {about['commit']}")
    print(terminal_table(rows))
    args.output.mkdir(parents=True, exist_ok=True)
    stem = f"{about['date']}-{name}-{torch.device(args.device).type}" + ("-quick" if args.quick else "")
    record = {"about": about, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}
    (args.output / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output / f"{stem}.md").write_text(markdown(rows, about, title), encoding="utf-8")
    verdicts = [row.verdict for row in rows if row.verdict]
    missed, goals = verdicts.count("MISSED"), len(verdicts)
    print(f"\n{missed} of {goals} goals missed. Written: {args.output / stem}.json and .md")


def common_parser(description: str | None, *, rounds: int, quick: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    parser.add_argument("--rounds", type=int, default=rounds, help="of which medians are taken, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of labels and features, default %(default)s")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """Parse and check the common options, and set threads and seed."""
    args = parser.parse_args()
    for name, value in (("threads", args.threads), ("rounds", args.rounds)):
        if value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output is {args.output}, expected a folder")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device is {args.device!r}, expected cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device is {args.device!r}, expected cpu, or cuda where torch finds a device")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.empty(0, device=device).device  # by its number, which set_device insists on
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where events are recorded
    return args, device


def main() -> None:
    parser = common_parser(__doc__, rounds=15, quick="3 rounds, no large sizes: whether it runs, not how fast")
    args, device = parse(parser)
    if args.quick:
        args.rounds = 3
    clock = Clock(device, args.rounds)
    rows: list[Row] = []
    for measurement in (measure_tracker, measure_scaling, measure_rows):
        rows += measurement(clock, args.quick)
    rows += measure_step(clock)
    write_record(rows, conditions(args, device), args, "overhead", "Overhead")


if __name__ == "__main__":
    main()
