#!/usr/bin/env python3
"""Measure ImageNet-LT training: images per second of the step, of the loader, of both, and what alignment adds.

    python benchmarks/imagenet.py
    python benchmarks/imagenet.py --device cuda --compile --workers 16

`examples/imagenet_lt.py` is what runs: its training step on synthetic images that are on the device already (the step
alone), its loader over a folder of JPEGs (the loader alone), and both together. Candidates take turns in one run and
the medians of their rounds are compared, as in `overhead.py`; on one CPU thread processor time counts. `plain` is
cross-entropy without anything of spalign; `tracker` is what the script does for a baseline, whose alignment it reports.
The rotation, once per epoch, counts by its share of an epoch of ImageNet-LT's 115,846 images.

What alignment costs a step is measured by its parts, each by itself, over the plain step: the difference of two whole
steps, which stands beside it, is smaller than the noise of either. On CUDA this is the time of kernels, because there
the host's share of the parts passes unseen as long as it is ahead, which is measured too.

On the CPU the batch is reduced, which overstates what alignment costs: the parts hardly depend on the batch, and the
step is proportional to it. A goal that is missed there says little of a GPU.

The folder is links to the JPEGs in --data-dir, where left out to the sample beside the repository, where that is
missing to noise. So files come from the page cache, and a slow disk is not in these numbers.

Writes `DATE-imagenet-DEVICE.json` and `.md` to the output folder. Exit code 0 whether or not goals are met.

Shapes: N images of a batch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import overhead
import torch
from overhead import PROJECTION, REGULARISER, ROOT, ROTATION, TRACKER, Call, Clock, Row, milliseconds
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(ROOT / "examples"))
import imagenet_lt
from longtail.alignment import Alignment, AlignmentOptions
from longtail.imagenet.engine import EpochDraws, Trainer, synthetic_lists
from longtail.imagenet.loader import EpochOrder, LoadedStep, TrainLoader
from longtail.imagenet.networks import NETWORKS
from longtail.parallel import World

NUM_IMAGES, NUM_CLASSES = 115_846, 1000
SAMPLE = ROOT.parent / "shared" / "data" / "imagenet_sample"
STRATEGIES = {
    "+SpAReg": AlignmentOptions(spareg=0.3),
    "+SpAProj": AlignmentOptions(spaproj=True),
    "all together": AlignmentOptions(spareg=0.3, spaslerp=True, spaproj=True),
}
PLAIN, TRACKED = "plain", "tracker"


class Untracked(Alignment):
    """Nothing at all, not even class means."""

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor | None:
        return None


class Steps:
    """The batches of a trainer, epoch after epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        trainer.baseline.begin_epoch(0)
        self._batches = self._endless()

    def _endless(self) -> Iterator[tuple[int, LoadedStep, EpochDraws]]:
        trainer = self.trainer
        labels_N = trainer.train_images.labels_N
        for epoch in itertools.count():
            order_N = EpochOrder(len(labels_N)).order(trainer.settings.seed, epoch)
            draws = EpochDraws(
                trainer.settings, trainer.plan, epoch, labels_N[order_N], trainer.num_classes, trainer.device
            )
            for step, parts in enumerate(trainer.loader.epoch(epoch)):
                yield step, parts, draws

    def __call__(self) -> tuple[int, LoadedStep, EpochDraws]:
        return next(self._batches)

    def drain(self) -> None:
        """Take what workers have made in advance while something else was measured."""
        if isinstance(self.trainer.loader, TrainLoader):
            for _ in range(2 * self.trainer.settings.workers):
                self()


class Variant:
    """Training steps of a trainer with one choice of strategies; variants share its network."""

    def __init__(self, steps: Steps, options: AlignmentOptions | None) -> None:
        trainer = steps.trainer
        recipe = trainer.settings.recipe
        kind = Untracked if options is None else Alignment
        options = options or AlignmentOptions()
        self.steps, self.settings = steps, replace(trainer.settings, alignment=options)
        self.alignment = kind(trainer.baseline.classifier, options, epochs=recipe.epochs)
        sgd = torch.optim.SGD(
            trainer.parameters, lr=recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay
        )
        self.optimizer = self.alignment.wrap(sgd)

    def __call__(self) -> None:
        trainer = self.steps.trainer
        trainer.settings, trainer.alignment, trainer.optimizer = self.settings, self.alignment, self.optimizer
        trainer._train_step(*self.steps())

    def drain(self) -> None:
        self.steps.drain()


class DrainingClock(Clock):
    def once(self, call: Call, repeats: int) -> float:
        if isinstance(call, Steps | Variant):
            call.drain()
        return super().once(call, repeats)


# ----------------------------------------------------------------------------------------------------------------------
# Data and trainers
# ----------------------------------------------------------------------------------------------------------------------


def noise_jpegs(folder: Path, count: int) -> list[Path]:
    """Write JPEGs of ImageNet's usual size and, at this quality, about its number of bytes."""
    random = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        Image.fromarray(random.integers(256, size=(375, 500, 3), dtype=np.uint8)).save(path, quality=60)
    return paths


def image_folder(folder: Path, source: Path | None, count: int) -> tuple[list[str], str]:
    """Fill a folder with `count` links to the source's JPEGs; write its list; return options and a description."""
    if source is None and SAMPLE.is_dir():
        source = SAMPLE
    if source is None:
        (folder / "noise").mkdir(parents=True)
        files, name = noise_jpegs(folder / "noise", 32), "noise"
    else:
        files, name = (
            sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")),
            source.name,
        )
        if not files:
            raise ValueError(f"--data-dir {source} holds no .jpg or .jpeg file")
    (folder / "train").mkdir(parents=True)
    labels = synthetic_lists(count, NUM_CLASSES)[0].labels_N.tolist()
    lines = []
    for number, (file, label) in enumerate(zip(itertools.cycle(files), labels, strict=False)):
        link = Path("train") / f"{number}.jpg"
        (folder / link).symlink_to(file.resolve())
        lines.append(f"{link} {label}\n")
    (folder / "train.txt").write_text("".join(lines))
    (folder / "test.txt").write_text(lines[0])
    options = ["--data-dir", str(folder), "--scan", "off"]
    options += ["--train-list", str(folder / "train.txt"), "--test-list", str(folder / "test.txt")]
    kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1e3
    return options, f"{len(files)} JPEGs ({name}, {kilobytes:.0f} kB on average), linked {count:,} times"


def make_trainer(args: argparse.Namespace, device: torch.device, folder: Path, *data: str) -> Trainer:
    argv = ["--network", args.network, "--resolution", str(args.resolution), "--batch-size", str(args.batch_size)]
    argv += ["--device", device.type, "--threads", str(args.threads), "--workers", str(args.workers)]
    argv += ["--amp", args.amp, "--lr", "1e-3", "--output-dir", str(folder), "--seed", str(args.seed)]
    argv += ["--quiet", "--no-tensorboard", *(["--compile"] if args.compile else []), *data]
    settings = imagenet_lt.settings_from(imagenet_lt.build_parser().parse_args(argv))
    return Trainer(settings, World(0, 1, device, grouped=False))


# ----------------------------------------------------------------------------------------------------------------------
# Measurements
# ----------------------------------------------------------------------------------------------------------------------


def kernel_seconds(call: Call, device: torch.device, repeats: int = 10) -> float:
    """Return how long kernels and copies of one call run on a CUDA device."""
    call()
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.device_type().name == "CUDA"]
    nanoseconds: int = sum(event.duration_ns() for event in events if not event.is_user_annotation())
    return nanoseconds / 1e9 / repeats


def enqueue_seconds(call: Call, device: torch.device, rounds: int) -> float:
    """Return how long the host takes to hand one call to an idle device."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    return statistics.median(seconds)


def peak_gib(variant: Variant, device: torch.device) -> float:
    """Return the peak of allocated memory in a step, without the optimizer states of other variants."""
    variant()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    variant.optimizer.state.clear()
    variant.optimizer.zero_grad(set_to_none=True)
    return peak


def shares(seconds: dict[str, float], step: float, steps_per_epoch: int) -> list[Row]:
    """Return what each strategy adds to the plain step, from its parts.

    Args:
        seconds: of each part.
        step: seconds of the plain step.
        steps_per_epoch: of the real data, which share one rotation.
    """
    rotation = seconds[ROTATION] / steps_per_epoch
    added = {
        "tracker alone": seconds[TRACKER],
        "+SpAReg, with the tracker": seconds[REGULARISER],
        "+SpASLERP, with the tracker": seconds[TRACKER] + rotation,
        "+SpAProj, with the tracker": seconds[TRACKER] + seconds[PROJECTION],
        "all together": seconds[REGULARISER] + seconds[PROJECTION] + rotation,
    }
    return [
        Row("share of the plain step, by parts", name, 100 * value / step, "%", 1.0, details={"added": 1e3 * value})
        for name, value in added.items()
    ]


def measure(args: argparse.Namespace, device: torch.device, synthetic: Trainer, files: Trainer) -> list[Row]:
    clock, cuda = DrainingClock(device, args.rounds), device.type == "cuda"
    steps, loaded = Steps(synthetic), Steps(files)
    variants = {PLAIN: Variant(steps, None), TRACKED: Variant(steps, AlignmentOptions())}
    variants |= {name: Variant(steps, options) for name, options in STRATEGIES.items()}
    both = {PLAIN: Variant(loaded, None), "all together": Variant(loaded, STRATEGIES["all together"])}
    peaks = {name: peak_gib(variants[name], device) for name in (PLAIN, "all together")} if cuda else {}

    n, precision = args.batch_size, {"off": "float32"}.get(args.amp, args.amp)
    feature_dim = variants[PLAIN].alignment.tracker.mean.shape[1]
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    parts = overhead.method_parts(n, NUM_CLASSES, feature_dim, device, dtype=dtype)
    alone, loader, together = "step alone, {}".format, "loader alone", "loader and step, {}".format
    calls: dict[str, Call] = {alone(name): variant for name, variant in variants.items()}
    calls |= {loader: loaded, **{together(name): variant for name, variant in both.items()}, **parts}
    seconds = clock.medians(calls, args.network, at_least_s=args.block_seconds)

    steps_per_epoch = -(-NUM_IMAGES // n)
    rotation = seconds[ROTATION] / steps_per_epoch
    # No block reaches the end of an epoch: until then, steps with rotations are those with class means.
    seconds[alone("+SpASLERP")] = seconds[alone(TRACKED)] + rotation
    for form in (alone, together):
        seconds[form("all together")] += rotation
    plain = alone(PLAIN)
    candidates = [plain, *map(alone, (TRACKED, "+SpAReg", "+SpASLERP", "+SpAProj", "all together"))]
    throughput = partial(
        Row, f"images per second: {args.network}, {n} x {args.resolution} x {args.resolution}, {precision}"
    )
    rows = [
        throughput(
            name,
            n / seconds[name],
            "images/s",
            2500.0 if cuda and name == plain else None,
            at_least=True,
            details=milliseconds(seconds, name),
        )
        for name in (*candidates, loader, *map(together, both))
    ]
    rows += [
        Row("whole steps over the plain one", name, seconds[name] / seconds[plain], "times")
        for name in candidates
        if name != plain
    ]
    rows.append(Row("the loader", "loader alone over step alone", seconds[loader] / seconds[plain], "times"))
    for name in both:
        # Without workers nothing overlaps, and the loader alone is all that both cost more.
        added = seconds[together(name)] - seconds[alone(name)] if args.workers else seconds[loader]
        share = 100 * added / seconds[together(name)]
        rows.append(Row("the loader", f"its share of loader and step, {name}", share, "%"))
    if not cuda:
        return rows + shares(seconds, seconds[plain], steps_per_epoch)

    timed: dict[str, Call] = {PLAIN: variants[PLAIN], **parts}
    kernels = {name: kernel_seconds(call, device) for name, call in timed.items()}
    rows += shares(kernels, kernels[PLAIN], steps_per_epoch)
    for name in (PLAIN, "all together"):
        busy, host = kernel_seconds(variants[name], device), enqueue_seconds(variants[name], device, args.rounds)
        times = {"host": 1e3 * host, "kernels": 1e3 * busy, "step": 1e3 * seconds[alone(name)]}
        # A step that waits for the device, be it once, takes the host as long as the device.
        rows.append(Row("the host", f"its time for a step over the kernels', {name}", host / busy, "times", 0.9))
        share = 100 * busy / seconds[alone(name)]
        rows.append(Row("the host", f"kernels' share of the step's wall time, {name}", share, "%", details=times))
    return rows + [Row("peak memory, step alone", name, peak, "GiB") for name, peak in peaks.items()]


def build_parser() -> argparse.ArgumentParser:
    parser = overhead.common_parser(
        __doc__, rounds=5, quick="a small network on small images, 2 rounds: whether it runs, not how fast"
    )
    parser.add_argument("--data-dir", type=Path, help="folder of JPEGs, at any depth")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet50")
    parser.add_argument("--resolution", type=int, default=224, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, help="default 256 on CUDA, 16 on the CPU")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), help="default bf16 on CUDA, off on the CPU")
    parser.add_argument("--compile", action="store_true", help="compile the backbone")
    parser.add_argument("--decode", choices=("cpu", "device"), default="cpu", help="where, default %(default)s")
    parser.add_argument("--workers", type=int, help="of the loader, default 8 on CUDA, 0 on the CPU")
    return parser


def main() -> None:
    parser = build_parser()
    args, device = overhead.parse(parser)
    cuda = device.type == "cuda"
    if args.quick:
        args.rounds, args.network, args.resolution, args.batch_size = 2, "resnet10", 32, args.batch_size or 4
    defaults = (
        {"batch_size": 256, "amp": "bf16", "workers": 8} if cuda else {"batch_size": 16, "amp": "off", "workers": 0}
    )
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.workers and not cuda:
        parser.error(f"--workers is {args.workers}, expected 0 on the CPU: the time of this process alone is measured")
    # A block is a whole turn of the workers and more, or on the CPU one step, and some calls of a part.
    args.block_seconds = 2.0 if cuda else 0.1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            options, images = image_folder(folder / "images", args.data_dir, max(4096, 160 * args.batch_size))
            synthetic = make_trainer(args, device, folder / "a", "--data", "synthetic")
            files = make_trainer(args, device, folder / "b", *options, "--decode", args.decode)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        rows = measure(args, device, synthetic, files)
        files.loader.close()
        about = {
            **overhead.conditions(args, device),
            "torchvision, pillow": f"{version('torchvision')}, {version('pillow')}",
            "images": images,
            "loader processes": str(args.workers),
            "decoding": args.decode,
        }
    overhead.write_record(rows, about, args, "imagenet", "ImageNet-LT training")


if __name__ == "__main__":
    main()
