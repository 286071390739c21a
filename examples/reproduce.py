#!/usr/bin/env python3
"""Run Table 1 of Space Alignment Matters, and print it beside the paper's.

    python examples/reproduce.py --data-dir DIR --preset small
    python examples/reproduce.py --data-dir DIR --jobs 4 --budget 9m
    python examples/reproduce.py report --preset small

14 methods (CE and ARB and GLMC each plain and with three strategies, ETF-DR plain and with SpA-Reg) on long-tailed
CIFAR-10 and CIFAR-100 at imbalance 200, 100 and 50 with three seeds: 252 runs, and GLMC+MaxNorm beside them. The preset
`small` trains CIFAR-100 at 100 in reduced size on a CPU. DIR holds the unpacked python archives, which
`cifar_lt.py --download` fetches.

Every finished run is one line of the records file and is never repeated. Interrupt it whenever you like: the next call
goes on, in the middle of a run from its last checkpoint. On a GPU the runs are captured (`--options=--no-capture` for
none), and several `--jobs` share it through NVIDIA's MPS where that is installed. Exit code 1 means that a run failed,
2 a bad option or file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import cifar_lt
import torch
from longtail.data import find_folder
from longtail.grid import FAMILIES, PRESETS, SEEDS, SETTINGS, STRATEGIES, Cell, Record, Records, cell_of, cells
from longtail.runner import GPU_CHECKPOINT_SECONDS, Job, Local, Ray, run_grid, shared_gpu
from longtail.settings import HOW_STEPS_RUN
from longtail.table import differences, draw, markdown

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "table1.jsonl"


def duration(text: str) -> float:
    """Return the seconds of `90s`, `9m` or `1.5h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 9m or 1.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="full: published recipes (default)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="default benchmarks/results/table1.jsonl")

    which = parser.add_argument_group("which runs", "all by default; the order is by what is worth most")
    which.add_argument("--datasets", nargs="+", choices=("cifar10", "cifar100"), metavar="NAME")
    which.add_argument("--imbalances", nargs="+", type=int, choices=(200, 100, 50), metavar="IF")
    which.add_argument("--methods", nargs="+", choices=tuple(FAMILIES), metavar="NAME", help=", ".join(FAMILIES))
    which.add_argument("--aligns", nargs="+", choices=tuple(STRATEGIES), metavar="NAME", help=", ".join(STRATEGIES))
    which.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default 0 1 2")

    how = parser.add_argument_group("how")
    how.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the archives (default data)")
    how.add_argument("--work-dir", type=Path, default=Path("runs") / "table1", help="default runs/table1")
    how.add_argument("--jobs", type=int, default=1, help="runs at a time; several share a GPU (default 1)")
    how.add_argument("--budget", type=duration, metavar="TIME", help="start no run that would end later: 90s, 9m, 2h")
    how.add_argument("--attempts", type=int, default=2, help="how often a run may die (default %(default)s)")
    how.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: beyond one machine")
    how.add_argument("--ray-address", help="of a running cluster; default: one on this machine")
    how.add_argument("--gpus-per-run", type=float, default=0.0, help="ray: may be a fraction (default 0)")
    how.add_argument("--options", default="", help="further options of cifar_lt.py for every run, in quotes")

    report = parser.add_argument_group("report")
    report.add_argument("--figure", type=Path, help="also draw the gains, .svg or .png")
    report.add_argument("--against", type=Path, metavar="RECORDS", help="instead: what runs of other records differ by")
    return parser


def execution(args: argparse.Namespace) -> tuple[tuple[str, ...], str | None]:
    """Return the options of every run, and the GPU they will run on, None for the CPU.

    On a GPU a step that is launched kernel by kernel takes several times as long as the same step replayed, and an
    epoch may take no longer than a few checkpoints: what the options do not say is set for that there.
    """
    extra = tuple(shlex.split(args.options))
    parser = cifar_lt.build_parser()
    parser.set_defaults(capture=None, checkpoint_seconds=None)
    given = parser.parse_args(["--data-dir", str(args.data_dir), *extra])
    device = given.device
    if device == "auto":
        # Ray shows its tasks the GPUs that they asked for, and the machine here may have none.
        gpu = args.gpus_per_run > 0 if args.engine == "ray" else torch.cuda.is_available()
        device = "cuda" if gpu else "cpu"
    if not device.startswith("cuda"):
        return extra, None
    if given.capture is None and given.amp != "fp16":  # which cannot be captured
        extra += ("--capture",)
    if given.checkpoint_seconds is None:
        extra += ("--checkpoint-seconds", str(GPU_CHECKPOINT_SECONDS))
    return extra, device


def check_options(chosen: Sequence[Cell], records: Sequence[Record], job: Job) -> None:
    """Refuse options that make a run another one, and to count runs that had other options as done.

    Raises:
        ValueError: an option of `cifar_lt.py` is bad, or contradicts what a run is by its name, or a recorded run
            differs in one that decides its outcome.
    """
    parser = cifar_lt.build_parser()
    outcomes = {}
    for cell in chosen:
        settings = cifar_lt.settings_from(parser.parse_args(job.command(cell)[2:]))
        align = "+".join(settings.alignment.names) or "none"
        for option, told, meant in (
            ("dataset", settings.dataset, cell.dataset),
            ("imbalance", settings.imbalance, cell.imbalance),
            ("method", settings.method, cell.method),
            ("align", align, cell.align),
            ("seed", settings.seed, cell.seed),
            ("output-dir", settings.output_dir, job.work_dir / cell.name),
        ):
            if told != meant:
                raise ValueError(
                    f"with --options {shlex.join(job.extra)!r} the run {cell.name} would have the {option} {told}, and "
                    "its record would say otherwise: leave that to --datasets, --imbalances, --methods, --aligns, "
                    "--seeds and --work-dir"
                )
        outcomes[cell.name] = settings.outcome()
    for record in records:
        name = cell_of(record).name
        if name not in outcomes or "options" not in record:
            continue
        for option, now in outcomes[name].items():
            # Options that came later had their default then.
            then = record["options"].get(option, now)
            if option not in (*HOW_STEPS_RUN, "first-stage") and then != now:
                raise ValueError(
                    f"the run {name} was recorded with --{option} {then} and would now have {now}: keep such runs "
                    "apart with another --records file and another --work-dir, or repeat the original --options"
                )


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1 or args.attempts < 1:
        raise ValueError(f"--jobs is {args.jobs} and --attempts {args.attempts}; expected 1 or more")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds is {args.seeds}; expected different numbers of 0 or more")
    if args.engine == "local" and (args.gpus_per_run or args.ray_address):
        raise ValueError("--gpus-per-run and --ray-address are for --engine ray: leave them out")
    if args.gpus_per_run < 0:
        raise ValueError(f"--gpus-per-run is {args.gpus_per_run}; expected 0 or more")
    settings = [
        (dataset, imbalance)
        for dataset, imbalance in SETTINGS
        if dataset in (args.datasets or (dataset,)) and imbalance in (args.imbalances or (imbalance,))
    ]
    if args.preset == "small" and not (args.datasets or args.imbalances):
        settings = settings[:1]
    chosen = cells(
        preset=args.preset,
        settings=settings,
        methods=args.methods or tuple(FAMILIES),
        aligns=args.aligns or tuple(STRATEGIES),
        seeds=args.seeds,
    )
    if not chosen:
        takes = "; ".join(f"{method}: {', '.join(FAMILIES[method])}" for method in args.methods or FAMILIES)
        raise ValueError(f"no run has any of the --aligns {' '.join(args.aligns)}; methods take {takes}")
    for dataset in {cell.dataset for cell in chosen}:
        find_folder(dataset, args.data_dir)
    records = Records(args.records)
    extra, gpu = execution(args)
    job = Job(args.data_dir.resolve(), args.work_dir.resolve(), extra, args.attempts)
    check_options(chosen, records.read(), job)

    def note(text: str) -> None:
        print(text, flush=True)

    with contextlib.ExitStack() as stack:
        engine: Local | Ray
        if args.engine == "ray":
            engine = Ray(job, args.jobs, gpus=args.gpus_per_run, address=args.ray_address)
        elif gpu is None:
            engine = Local(job, args.jobs)
        else:
            engine = Local(job, args.jobs, stack.enter_context(shared_gpu(args.jobs, gpu, note)))
        progress = run_grid(chosen, records, engine, budget_s=args.budget, note=note)
    print(
        f"finished {len(progress.finished)}, failed {len(progress.failed)}, left {len(progress.left)}; "
        f"see: python examples/reproduce.py report --preset {args.preset}"
    )
    return 1 if progress.failed else 0


def report(args: argparse.Namespace) -> int:
    records = Records(args.records).read()
    if args.against is not None:
        print(differences(records, Records(args.against).read(), args.preset), end="")
        return 0
    print(markdown(records, args.preset), end="")
    if args.figure is not None:
        draw(records, args.preset, args.figure)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return report(args) if args.command == "report" else run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # an exception, as Ctrl-C: it ends the runs
    sys.exit(main())
