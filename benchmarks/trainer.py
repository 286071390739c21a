#!/usr/bin/env python3
"""Measure the trainer: images per second of the step, against the loop that people write first.

    python benchmarks/trainer.py --data-dir DIR
    python benchmarks/trainer.py --data-dir DIR --device cuda --preset full --packed 4

Candidates train the same network with SpA-Reg on the same long-tailed CIFAR-100 and take turns in blocks of steps: a
slow spell of the machine meets all of them; the medians of their blocks are divided.

- `plain loop`: images as a tensor data set behind a DataLoader, crop and flip per image, figures read every step.
- `eager`: this project's step: images on the device as uint8, one gather per batch, figures read once per epoch.
- `channels last`, `compiled`: the same with the layout, and with the network compiled.
- `captured`: the same as a CUDA graph; with bfloat16 beside it. CUDA only.

`--packed K` also runs K processes on the device at once and compares their sum with one alone.

Writes `DATE-trainer-DEVICE.json` and `.md` to the output folder. Exit code 0 whatever is measured.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import cifar_lt  # noqa: E402
from longtail.data import MEAN, STD  # noqa: E402
from longtail.engine import Trainer, environment  # noqa: E402
from longtail.reporting import write_result  # noqa: E402


class PlainLoop:
    """The loop that most scripts have, around the same network, images and loss term."""

    def __init__(self, trainer: Trainer) -> None:
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
            Augmented(), batch_size=trainer.batches.batch_size, shuffle=True, drop_last=True
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


def make_trainer(args: argparse.Namespace, folder: Path, *options: str) -> Trainer:
    """Return a trainer at the beginning of its first epoch."""
    argv = ["--data-dir", str(args.data_dir), "--output-dir", str(folder), "--device", args.device, "--spareg", "0.3"]
    argv += ["--preset", "small"] if args.preset == "small" else ["--recipe", "ldam"]
    argv += ["--quiet", "--no-tensorboard", "--overwrite", "--threads", str(args.threads), *options]
    trainer = Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv)))
    begin_epoch(trainer)
    return trainer


def begin_epoch(trainer: Trainer) -> None:
    steps = trainer.batches.steps_per_epoch
    trainer.baseline.begin_epoch(0)
    trainer.training_step.begin_epoch(trainer.batches.draw(trainer.generator), [1e-3] * steps)


class Stepper:
    """Takes steps of a trainer, epoch after epoch, full batches only."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.step = trainer, 0

    def __call__(self, _: int) -> None:
        if self.step == len(self.trainer.batches) // self.trainer.batches.batch_size:
            begin_epoch(self.trainer)
            self.step = 0
        self.trainer.training_step(self.step)
        self.step += 1


def candidates(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[int], None]]:
    cuda = args.device.startswith("cuda")
    plain, last = "--no-channels-last", "--channels-last"
    steps: dict[str, Callable[[int], None]] = {
        "plain loop": PlainLoop(make_trainer(args, folder / "plain", plain)),
        "eager": Stepper(make_trainer(args, folder / "eager", plain)),
        "channels last": Stepper(make_trainer(args, folder / "last", last)),
        "channels last, compiled": Stepper(make_trainer(args, folder / "compiled", last, "--compile")),
    }
    if cuda:
        for name, options in {
            "captured": (plain, "--capture"),
            "captured, channels last, bf16": (last, "--capture", "--amp", "bf16"),
            "captured, channels last, bf16, compiled": (last, "--capture", "--amp", "bf16", "--compile"),
        }.items():
            steps[name] = Stepper(make_trainer(args, folder / name.replace(" ", "-"), *options))
    return steps


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


def measure(args: argparse.Namespace, steps: dict[str, Callable[[int], None]]) -> dict[str, float]:
    device, blocks = torch.device(args.device), {name: list[float]() for name in steps}
    for name, step in steps.items():
        tqdm.write(f"warming up: {name}", file=sys.stderr)
        seconds_of(step, args.warm_up, device)
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False, disable=None):
        for name, step in steps.items():
            blocks[name].append(seconds_of(step, args.steps, device))
    return {name: statistics.median(values) for name, values in blocks.items()}


def packed(args: argparse.Namespace, name: str) -> float:
    """Return images per second of K processes at once, each running the candidate by itself."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.packed)]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"a packed process ended with {[worker.returncode for worker in workers]}")
    return sum(float(output.strip().splitlines()[-1]) for output in outputs)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the unpacked CIFAR-100 archive")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--preset", choices=("small", "full"), default="small", help="full: ResNet-32 at 32 x 32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken, default %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="per block, default %(default)s")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first block, default %(default)s")
    parser.add_argument("--packed", type=int, default=0, metavar="K", help="also K processes at once")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    for name in ("threads", "rounds", "steps", "warm_up"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        try:
            steps = candidates(args, Path(folder))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if args.only is not None:
            steps = {args.only: steps[args.only]}
        seconds = measure(args, steps)
        batch = 128
        if args.only is not None:
            print(batch / seconds[args.only])
            return
        about: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/trainer.py", *sys.argv[1:]]),
            "preset": args.preset,
            "python": platform.python_version(),
            **environment(torch.device(args.device)),
        }
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "milliseconds": 1e3 * value,
            "images_per_second": batch / value,
            "over_plain_loop": seconds["plain loop"] / value,
            "over_eager": seconds["eager"] / value,
        }
        for name, value in seconds.items()
    ]
    if args.packed:
        fastest = min(seconds, key=lambda name: seconds[name])
        together = packed(args, fastest)
        alone = batch / seconds[fastest]
        rows.append(
            {"name": f"{fastest}, {args.packed} at once", "images_per_second": together, "over_one": together / alone}
        )
    lines = [f"# Trainer, {about['date']}, {about['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| | ms per step | images/s | x plain loop | x eager |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.get(key) for key in ("milliseconds", "images_per_second", "over_plain_loop", "over_eager"))
        more = f" ({row['over_one']:.2f} times one alone)" if "over_one" in row else ""
        numbers = ("" if value is None else f"{value:.3g}" for value in cells)
        lines.append(f"| {row['name']}{more} | " + " | ".join(numbers) + " |")
    print("\n".join(lines))
    args.output.mkdir(parents=True, exist_ok=True)
    stem = f"{about['date']}-trainer-{torch.device(args.device).type}"
    write_result(args.output / f"{stem}.json", {"about": about, "rows": rows})
    (args.output / f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
