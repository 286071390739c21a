#!/usr/bin/env python3
"""Train on long-tailed CIFAR with any combination of the three alignment strategies.

    python examples/cifar_lt.py --data-dir DIR --preset small
    python examples/cifar_lt.py --data-dir DIR --preset small --spareg 1.0
    python examples/cifar_lt.py --data-dir DIR --recipe mislas --imbalance 100 --spaslerp --spaproj
    python examples/cifar_lt.py --data-dir DIR --method glmc --spareg 0.3

DIR holds the unpacked python archive (`cifar-100-python` or `cifar-10-batches-py`); `--download` fetches it.
The output folder gets `metrics.jsonl` (one record per epoch), `result.json`, `checkpoint.pt` and TensorBoard events.
Accuracies are of the last epoch unless called best. Exit code 2 means a bad option or file, 1 that training failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from longtail.alignment import AlignmentOptions
from longtail.data import ARCHIVES, download
from longtail.engine import Trainer
from longtail.methods import METHODS, MethodOptions
from longtail.options import add_alignment_options, add_method_options
from longtail.recipes import RECIPES, SCHEDULES, Recipe, get_recipe, small_recipe
from longtail.settings import Settings
from longtail.training import TrainingError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--subset-replacement", action="store_true", help="draw images with replacement, as GLMC's code until May 2023"
    )
    data.add_argument("--dataset", choices=tuple(ARCHIVES), default="cifar100")
    data.add_argument("--data-dir", type=Path, required=True, help="folder of the unpacked python archive")
    data.add_argument("--download", action="store_true", help="fetch the archive into --data-dir if it is not there")
    data.add_argument("--download-url", metavar="URL", help="a mirror; the official checksum must still match")
    data.add_argument("--imbalance", type=float, default=100.0, help="largest class over smallest (default 100)")
    data.add_argument(
        "--subset-seed", type=int, default=0, help="which images the subset holds (default 0, as published)"
    )
    data.add_argument(
        "--validation",
        type=int,
        default=0,
        metavar="K",
        help="evaluate on up to K training images per class held out, never on the test set",
    )
    data.add_argument("--no-augment", action="store_true", help="no random crop and flip")

    recipe = parser.add_argument_group("recipe", "options left out keep the recipe's value")
    recipe.add_argument(
        "--recipe", choices=tuple(RECIPES), help="published recipe (default: the method's, ldam for ce)"
    )
    recipe.add_argument("--preset", choices=("small",), help="small: 16 x 16 images, ResNet-14, 40 epochs; for a CPU")
    recipe.add_argument("--depth", type=int, help="6 n + 2 layers")
    recipe.add_argument("--width", type=int, help="1, 2 or 4")
    recipe.add_argument("--resolution", type=int, help="32, 16 or 8 pixels")
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--batch-size", type=int)
    recipe.add_argument("--lr", type=float)
    recipe.add_argument("--weight-decay", type=float)
    recipe.add_argument("--warmup-epochs", type=int)
    recipe.add_argument("--schedule", choices=SCHEDULES)
    recipe.add_argument("--mixup", type=float, metavar="ALPHA", help="Beta(ALPHA, ALPHA); 0 for none")

    method = parser.add_argument_group("method", "what is left out keeps the method's own value")
    method.add_argument("--method", choices=tuple(METHODS), default="ce", help="baseline (default ce)")
    method.add_argument(
        "--frozen-head", action="store_true", help="ce: never train the classifier, as ETF-DR's CIFAR code"
    )
    add_method_options(method)
    method.add_argument(
        "--moving-statistics", action="store_true", help="glmc-maxnorm: batch norm adapts, as published"
    )
    method.add_argument("--first-stage", type=Path, metavar="DIR", help="glmc-maxnorm: output folder of a GLMC run")

    add_alignment_options(parser)

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default 0)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    run.add_argument("--threads", type=int, help="CPU threads")
    run.add_argument(
        "--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision (default off: TF32 convolutions)"
    )
    run.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="memory layout of the network")
    run.add_argument("--compile", action="store_true", help="compile the network, and on a GPU the step")
    run.add_argument("--capture", action=argparse.BooleanOptionalAction, default=False, help="replay a CUDA graph")
    run.add_argument(
        "--evaluate-every", type=int, default=1, metavar="K", help="epochs; the best epoch is one of those evaluated"
    )
    run.add_argument("--clip-norm", type=float, default=0.0, metavar="NORM", help="clip gradients to this norm")
    run.add_argument("--accumulate", type=int, default=1, metavar="K", help="split each batch into K micro-batches")
    run.add_argument("--output-dir", type=Path, help="default runs/NAME, named after dataset, recipe and strategies")
    run.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output-dir, if any")
    run.add_argument("--overwrite", action="store_true", help="start afresh although --output-dir holds a run")
    run.add_argument("--stop-after-epochs", type=int, metavar="N", help="end this call cleanly after N epochs")
    run.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="write a checkpoint no sooner than S seconds after the last one; default 0, after every epoch",
    )
    run.add_argument("--no-tensorboard", action="store_true")
    run.add_argument("--quiet", action="store_true", help="nothing on the terminal but errors")
    return parser


def settings_from(args: argparse.Namespace) -> Settings:
    """Resolve the command line: the recipe's values, replaced by the options that were given.

    Raises:
        ValueError: an option is out of range, or two contradict each other.
    """
    if args.preset and args.recipe and args.preset != args.recipe:
        raise ValueError(f"--preset {args.preset} and --recipe {args.recipe} are two recipes: leave one out")
    name = args.preset or args.recipe or METHODS[args.method].recipe
    recipe = small_recipe(args.method, args.dataset) if name == "small" else get_recipe(name, args.dataset)
    given = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    alignment = AlignmentOptions(**{field.name: getattr(args, field.name) for field in fields(AlignmentOptions)})
    run_name = "-".join(
        [args.dataset, f"if{args.imbalance:g}", name, args.method, *alignment.names, f"seed{args.seed}"]
    )
    return Settings(
        method=args.method,
        method_options=MethodOptions(**{field.name: getattr(args, field.name) for field in fields(MethodOptions)}),
        recipe_name=name,
        recipe=recipe,
        data_dir=args.data_dir,
        output_dir=args.output_dir or Path("runs") / run_name,
        dataset=args.dataset,
        imbalance=args.imbalance,
        subset_seed=args.subset_seed,
        subset_replacement=args.subset_replacement,
        validation=args.validation,
        augment=not args.no_augment,
        alignment=alignment,
        seed=args.seed,
        accumulate=args.accumulate,
        clip_norm=args.clip_norm,
        amp=args.amp,
        compile=args.compile,
        capture=args.capture,
        evaluate_every=args.evaluate_every,
        device=args.device,
        threads=args.threads,
        resume=args.resume,
        overwrite=args.overwrite,
        tensorboard=not args.no_tensorboard,
        quiet=args.quiet,
        stop_after_epochs=args.stop_after_epochs,
        checkpoint_seconds=args.checkpoint_seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        settings = settings_from(args)
        if args.download:
            download(settings.dataset, settings.data_dir, url=args.download_url)
        trainer = Trainer(settings)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.run()
    except TrainingError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
