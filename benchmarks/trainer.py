#!/usr/bin/env python3
"""Measure the trainer: images per second of the step, against the loop that people write first.

    python benchmarks/trainer.py --data-dir DIR
    python benchmarks/trainer.py --data-dir DIR --device cuda --preset full --steps 100 --workers 4 --packed 4 \
        --whole-run

Candidates train the same network with SpA-Reg on the same long-tailed CIFAR-100 and take turns in blocks of steps: a
slow spell of the machine meets all of them; the medians of their blocks are divided.

- `plain loop`: images as a tensor data set behind a DataLoader (`--workers`), crop and flip per image, weights
  contiguous, figures read every step.
- `eager`: this project's step: images on the device as uint8, one gather per batch, channels last, figures read once
  per epoch.
- `compiled`: the same with the network compiled, on a GPU all of the step but the optimizer.
- `captured`: the step as a CUDA graph, with the fused optimizer; with bfloat16, and compiled, beside it. CUDA only.

Steps are those of one epoch and the next; what comes between epochs is in `--whole-run` alone.

`--packed K` also runs the fastest in one process and in K at once, which all warm up first and then measure the same
`--window` of seconds: on a GPU as they are, taking turns, and through NVIDIA's MPS where it is to be had.

`--whole-run` also trains the fastest to the recipe's last epoch, with evaluation and checkpoints as in the grid, in a
process that has trained with its options before, and says how long the eager steps of so many epochs take: calculated
from the step.

Writes `DATE-trainer-DEVICE.json` and `.md` to the output folder. Exit code 0 whatever is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import cifar_lt  # noqa: E402
from longtail.data import MEAN, STD  # noqa: E402
from longtail.engine import Trainer  # noqa: E402
from longtail.reporting import recorded_command, write_result  # noqa: E402
from longtail.runner import GPU_CHECKPOINT_SECONDS, MPS_PIPES, shared_gpu  # noqa: E402
from longtail.settings import Settings  # noqa: E402
from longtail.training import environment, gpu_facts  # noqa: E402

PLAIN_LOOP = "plain loop"
LEAD_S = 1.0  # between the word to go and the window
GOAL_S = 15.0  # of a whole run of the published recipe on an H200


class PlainLoop:
    """The loop that most scripts have, around the same network, images and loss term."""

    def __init__(self, trainer: Trainer, workers: int) -> None:
        self.trainer = trainer
        images, labels = torch.from_numpy(trainer.data.train_images), torch.from_numpy(trainer.data.train_labels)
        pixels = images.float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

        class Augmented(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
            def __len__(self) -> int:
                return len(labels)

            def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
                image, size = F.pad(pixels[index], [trainer.train_set.padding] * 4), pixels.shape[-1]
                top, left = torch.randint(2 * trainer.train_set.padding + 1, (2,)).tolist()
                image = image[:, top : top + size, left : left + size]
                image = image.flip(2) if torch.rand(()) < 0.5 else image
                return (image - mean) / std, int(labels[index])

        self.loader = torch.utils.data.DataLoader(
            Augmented(),
            batch_size=trainer.batches.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self.batches: Any = iter(self.loader)
        self.losses: list[float] = []

    def __call__(self, step: int) -> None:
        trainer, device = self.trainer, self.trainer.device
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        images, labels = (tensor.to(device) for tensor in batch)
        logits, features = trainer.baseline.predict(images)
        penalty = trainer.alignment.penalty(features, labels)
        assert penalty is not None
        loss = F.cross_entropy(logits, labels) + 0.3 * penalty
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        self.losses.append(loss.item())


def settings_of(args: argparse.Namespace, folder: Path, *options: str) -> Settings:
    argv = ["--data-dir", str(args.data_dir), "--output-dir", str(folder), "--device", args.device, "--spareg", "0.3"]
    argv += ["--preset", "small"] if args.preset == "small" else ["--recipe", "ldam"]
    argv += ["--quiet", "--no-tensorboard", "--overwrite", "--threads", str(args.threads)]
    argv += [*options, *shlex.split(args.options)]
    return cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv))


def begin_epoch(trainer: Trainer) -> None:
    trainer._begin_epoch([1e-3] * trainer.steps_per_epoch)


class Stepper:
    """Takes steps of a trainer, epoch after epoch, full batches only."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.step = trainer, 0

    def __call__(self, _: int) -> None:
        if self.step == len(self.trainer.batches) // self.trainer.batches.batch_size:
            begin_epoch(self.trainer)
            self.step = 0
        self.trainer._train_step(self.step)
        self.step += 1


def candidates(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Return the options of `cifar_lt.py` by candidate."""
    options: dict[str, tuple[str, ...]] = {
        PLAIN_LOOP: ("--no-channels-last",),
        "eager": (),
        "compiled": ("--compile",),
    }
    if args.device.startswith("cuda"):
        options |= {
            "captured": ("--capture",),
            "captured, compiled": ("--capture", "--compile"),
            "captured, bf16": ("--capture", "--amp", "bf16"),
            "captured, bf16, compiled": ("--capture", "--amp", "bf16", "--compile"),
        }
    return options


def build(args: argparse.Namespace, folder: Path, name: str) -> PlainLoop | Stepper:
    """Return what takes the steps of a candidate, at the beginning of its first epoch."""
    trainer = Trainer(settings_of(args, folder / name.replace(" ", "-"), *candidates(args)[name]))
    begin_epoch(trainer)
    return PlainLoop(trainer, args.workers) if name == PLAIN_LOOP else Stepper(trainer)


def release(device: torch.device) -> None:
    """Free what trainers that are no longer needed hold of the GPU's memory."""
    gc.collect()  # a trainer and its captured step know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(step: Callable[[int], None], count: int, device: torch.device) -> float:
    """Return seconds per step over `count` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for number in range(count):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / count


def measure(args: argparse.Namespace, steps: dict[str, PlainLoop | Stepper]) -> dict[str, float]:
    device, blocks = torch.device(args.device), {name: list[float]() for name in steps}
    for name, step in steps.items():
        tqdm.write(f"warming up: {name}", file=sys.stderr)
        seconds_of(step, args.warm_up, device)
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False, disable=None):
        for name, step in steps.items():
            blocks[name].append(seconds_of(step, args.steps, device))
    return {name: statistics.median(values) for name, values in blocks.items()}


def packed_process(args: argparse.Namespace, step: PlainLoop | Stepper) -> float:
    """Warm up, wait for the word, and return images per second within the window that the parent sets for all.

    Steps go on until the window is over, so that nobody measures after another has stopped.

    Raises:
        RuntimeError: the window is too short for two blocks of steps.
    """
    device = torch.device(args.device)
    seconds_of(step, args.warm_up, device)
    print("ready", flush=True)
    begin, end = (float(word) for word in sys.stdin.readline().split())
    ends = [time.monotonic()]  # of blocks; all processes read one clock
    while ends[-1] < end:
        seconds_of(step, args.steps, device)
        ends.append(time.monotonic())
    inside = [moment for moment in ends if begin <= moment <= end]
    if len(inside) < 2:
        raise RuntimeError(f"fewer than two blocks of --steps {args.steps} end within --window {args.window} seconds")
    images: int = args.steps * (len(inside) - 1) * step.trainer.batches.batch_size
    return images / (inside[-1] - inside[0])


def packed(args: argparse.Namespace, name: str, processes: int, environment: dict[str, str]) -> float:
    """Return images per second of so many processes at once, each running the candidate by itself.

    Raises:
        RuntimeError: one of them failed.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    with contextlib.ExitStack() as stack:
        children = []
        for _ in range(processes):
            child = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            answer(child, "ready")
        begin = time.monotonic() + LEAD_S
        for child in children:
            assert child.stdin is not None
            print(begin, begin + args.window, file=child.stdin, flush=True)
        rates = [float(answer(child, "rate")) for child in children]
        for child in children:
            child.wait()  # killed, a client of MPS may take the others with it
    return sum(rates)


def answer(child: subprocess.Popen[str], key: str) -> str:
    """Wait for a line that begins with the key, and return the rest of it.

    Raises:
        RuntimeError: the process ended without one.
    """
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(key):
            return line.removeprefix(key).strip()
    raise RuntimeError(f"a packed process ended before it said {key!r}, with exit code {child.wait()}")


def packed_rows(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Return the rows of one process, and of K at once in every way there is here."""
    many, rates = f"{name}, {args.packed} at once", dict[str, float]()
    if not args.device.startswith("cuda"):
        alone = packed(args, name, 1, {})
        rates[many] = packed(args, name, args.packed, {})
    else:
        with tempfile.TemporaryDirectory() as nobody:
            without = {MPS_PIPES: nobody}  # processes go without where no daemon listens, also beside a user's own
            alone = packed(args, name, 1, without)
            rates[f"{many}, taking turns"] = packed(args, name, args.packed, without)
        with shared_gpu(args.packed, args.device, note=lambda text: tqdm.write(text, file=sys.stderr)) as variables:
            if MPS_PIPES in {**os.environ, **variables}:
                rates[f"{many}, MPS"] = packed(args, name, args.packed, variables)
    rows = [{"name": f"{name}, one process", "images_per_second": alone, "over_one": 1.0}]
    return rows + [{"name": way, "images_per_second": rate, "over_one": rate / alone} for way, rate in rates.items()]


def whole_run(args: argparse.Namespace, folder: Path, name: str, eager_s: float) -> dict[str, Any]:
    """Train a candidate to the last epoch, and return the row of it.

    Args:
        args: of the command line.
        folder: for its files.
        name: of the candidate.
        eager_s: seconds of an eager step.
    """
    cuda = args.device.startswith("cuda")
    as_in_grid = ("--checkpoint-seconds", str(GPU_CHECKPOINT_SECONDS)) if cuda else ()
    settings = settings_of(args, folder / "whole", *candidates(args)[name], *as_in_grid)
    tqdm.write(f"a whole run: {name}", file=sys.stderr)
    # An epoch that is the last one too, whose evaluation has shapes of its own.
    Trainer(replace(settings, recipe=replace(settings.recipe, epochs=1, warmup_epochs=0))).run()
    release(torch.device(args.device))
    begin = time.perf_counter()
    trainer = Trainer(settings)
    trainer.run()
    seconds = time.perf_counter() - begin
    steps = settings.recipe.epochs * trainer.batches.steps_per_epoch
    published = cuda and args.preset == "full" and not args.options
    return {
        "name": f"{name}, whole run of {settings.recipe.epochs} epochs",
        "seconds": seconds,
        "seconds_in_epochs": trainer.seconds,
        "goal_seconds": GOAL_S if published else None,
        "eager_seconds_calculated": eager_s * steps,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the unpacked CIFAR-100 archive")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--preset", choices=("small", "full"), default="small", help="full: ResNet-32 at 32 x 32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="of the plain loop's DataLoader, default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken, default %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="per block, default %(default)s")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first block, default %(default)s")
    parser.add_argument("--packed", type=int, default=0, metavar="K", help="also K processes at once")
    parser.add_argument("--window", type=float, default=5.0, metavar="S", help="seconds of it, default %(default)s")
    parser.add_argument("--whole-run", action="store_true", help="also the fastest to its last epoch")
    parser.add_argument("--options", default="", help="further options of cifar_lt.py for all, in quotes")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    for name in ("threads", "rounds", "steps", "warm_up"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if args.workers < 0:
        parser.error(f"--workers is {args.workers}, expected 0 or more")
    if args.packed < 0 or args.packed == 1:
        parser.error(f"--packed is {args.packed}, expected at least 2, or 0 for none")
    if not args.window > 0:
        parser.error(f"--window is {args.window}, expected more than 0")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        names = [args.only] if args.only is not None else list(candidates(args))
        try:
            steps = {name: build(args, folder, name) for name in names}
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if args.only is not None:
            print("rate", packed_process(args, steps[args.only]))
            return
        about: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": recorded_command("benchmarks/trainer.py", sys.argv[1:]),
            "preset": args.preset,
            "python": platform.python_version(),
            **environment(torch.device(args.device)),
        }
        seconds = measure(args, steps)
        batch = steps["eager"].trainer.batches.batch_size
        about |= gpu_facts(torch.device(args.device))
        steps.clear()
        release(torch.device(args.device))
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "milliseconds": 1e3 * value,
                "images_per_second": batch / value,
                "over_plain_loop": seconds[PLAIN_LOOP] / value,
                "over_eager": seconds["eager"] / value,
            }
            for name, value in seconds.items()
        ]
        fastest = min(seconds.keys() - {PLAIN_LOOP}, key=lambda name: seconds[name])
        if args.packed:
            rows += packed_rows(args, fastest)
        if args.whole_run:
            rows.append(whole_run(args, folder, fastest, seconds["eager"]))
    lines = report(about, rows)
    print("\n".join(lines))
    args.output.mkdir(parents=True, exist_ok=True)
    stem = f"{about['date']}-trainer-{torch.device(args.device).type}"
    write_result(args.output / f"{stem}.json", {"about": about, "rows": rows})
    (args.output / f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the page: a table of steps, and below it what was measured by the second."""
    lines = [f"# Trainer, {about['date']}, {about['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| | ms per step | images/s | x plain loop | x eager | x one process |", "|---|---|---|---|---|---|"]
    columns = ("milliseconds", "images_per_second", "over_plain_loop", "over_eager", "over_one")
    for row in rows:
        if "seconds" not in row:
            cells = ("" if row.get(key) is None else f"{row[key]:.3g}" for key in columns)
            lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    for row in rows:
        if "seconds" in row:
            seconds, eager = row["seconds"], row["eager_seconds_calculated"]
            goal = "" if row["goal_seconds"] is None else f" (goal: {row['goal_seconds']:g} s)"
            lines += [
                "",
                f"{row['name']}: {seconds:.1f} s{goal}, of which {row['seconds_in_epochs']:.1f} s are epochs; so many "
                f"eager steps alone: {eager:.1f} s (calculated), {eager / seconds:.2f} times as long.",
            ]
    return lines


if __name__ == "__main__":
    main()
