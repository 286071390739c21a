#!/usr/bin/env python3
"""Train on ImageNet-LT with any combination of the three alignment strategies, on one GPU or many machines.

    python examples/imagenet_lt.py --data-dir ILSVRC --train-list ImageNet_LT_train.txt --test-list ImageNet_LT_test.txt
    torchrun --nproc-per-node 8 examples/imagenet_lt.py ... --method arb --spareg 0.3 --amp bf16 --resume
    python examples/imagenet_lt.py --data synthetic --amp bf16 --compile --epochs 1
    python examples/imagenet_lt.py report runs/imagenet-lt-*

The lists hold a path below --data-dir and a label on each line; docs/imagenet_lt.md says where to get them. SIGTERM
saves and ends the run cleanly, --resume goes on, on any number of ranks. The output folder gets `metrics.jsonl` (one
record per epoch), `result.json`, `model.pt` (the last weights), `checkpoints/` and TensorBoard events. Accuracies are
of the last epoch unless called best. Exit code 2 means a bad option, list or file, 1 that training failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from longtail.alignment import AlignmentOptions
from longtail.imagenet.engine import Trainer
from longtail.imagenet.loader import BadImage
from longtail.imagenet.networks import NETWORKS
from longtail.imagenet.recipes import METHOD_RECIPES, RECIPES, SCHEDULES, ImageNetRecipe
from longtail.imagenet.settings import ImageNetSettings
from longtail.imagenet.table import report
from longtail.methods import MethodOptions
from longtail.options import add_alignment_options, add_method_options
from longtail.parallel import SharedError, World, world
from longtail.training import TrainingError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imagenet_lt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=("files", "synthetic"), default="files", help="synthetic: for throughput alone")
    data.add_argument("--data-dir", type=Path, help="folder that the lists' paths are relative to")
    data.add_argument("--train-list", type=Path)
    data.add_argument("--test-list", type=Path)
    data.add_argument(
        "--val-list", type=Path, help="looked at after every epoch instead of the test list, which is kept for the end"
    )
    data.add_argument("--scan", choices=("off", "fast", "full"), default="fast", help="of all files, before training")
    data.add_argument("--skip-bad", action="store_true", help="leave bad lines and files out, and count them")
    data.add_argument("--workers", type=int, default=8, help="loader processes of each rank (default %(default)s)")
    data.add_argument("--decode", choices=("cpu", "device"), default="cpu", help="device: JPEGs on the GPU")
    data.add_argument("--num-synthetic", type=int, default=115_846, metavar="N", help="synthetic training images")
    data.add_argument("--num-synthetic-classes", type=int, default=1000, metavar="C")

    recipe = parser.add_argument_group("recipe", "options left out keep the recipe's value")
    recipe.add_argument("--recipe", choices=tuple(RECIPES), help="published recipe (default: the method's)")
    recipe.add_argument("--network", choices=tuple(NETWORKS))
    recipe.add_argument("--resolution", type=int, help="of the crops, in pixels")
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--batch-size", type=int, help="of all ranks together")
    recipe.add_argument("--lr", type=float)
    recipe.add_argument("--weight-decay", type=float)
    recipe.add_argument("--warmup-epochs", type=int)
    recipe.add_argument("--schedule", choices=SCHEDULES)
    recipe.add_argument("--mixup", type=float, metavar="ALPHA", help="Beta(ALPHA, ALPHA); 0 for none")

    method = parser.add_argument_group("method", "what is left out keeps the method's own value")
    method.add_argument("--method", choices=tuple(METHOD_RECIPES), default="ce", help="baseline (default ce)")
    add_method_options(method)
    add_alignment_options(parser)

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default 0)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--threads", type=int, help="CPU threads of each rank")
    run.add_argument(
        "--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision (default off: TF32 convolutions)"
    )
    run.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    run.add_argument("--compile", action="store_true", help="compile the backbone with torch.compile")
    run.add_argument("--deterministic", action="store_true", help="only algorithms that repeat themselves exactly")
    run.add_argument(
        "--evaluate-every", type=int, default=1, metavar="K", help="epochs; the best epoch is one of those evaluated"
    )
    run.add_argument("--clip-norm", type=float, default=0.0, metavar="NORM", help="clip gradients to this norm")
    run.add_argument("--accumulate", type=int, default=1, metavar="K", help="micro-batches of each rank per step")
    run.add_argument("--sync-bn", action="store_true", help="batch normalisation over all ranks")
    run.add_argument("--fsdp", action="store_true", help="shard parameters and optimizer state over the ranks (FSDP2)")
    run.add_argument("--output-dir", type=Path, help="default runs/NAME, named after recipe, method and strategies")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir, if any")
    run.add_argument("--overwrite", action="store_true", help="start afresh although --output-dir holds a run")
    run.add_argument(
        "--checkpoint-steps", type=int, default=0, metavar="K", help="also save after every K steps of an epoch"
    )
    run.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints to keep (default %(default)s)")
    run.add_argument("--stop-after-epochs", type=int, metavar="N", help="end this call cleanly after N epochs")
    run.add_argument("--no-tensorboard", action="store_true")
    run.add_argument("--quiet", action="store_true", help="nothing on the terminal but errors")
    return parser


def settings_from(args: argparse.Namespace) -> ImageNetSettings:
    """Resolve the command line: the recipe's values, replaced by the options that were given.

    Raises:
        ValueError: an option is missing or out of range, or two contradict each other.
    """
    if args.data == "files":
        missing = [name for name in ("data_dir", "train_list", "test_list") if getattr(args, name) is None]
        if missing:
            names = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise ValueError(f"{names} missing: say where the images and their lists are, or use --data synthetic")
    name = args.recipe or METHOD_RECIPES[args.method]
    recipe = RECIPES[name]
    given = {field.name: getattr(args, field.name, None) for field in fields(ImageNetRecipe)}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    method_names = [field.name for field in fields(MethodOptions) if hasattr(args, field.name)]
    alignment = AlignmentOptions(**{field.name: getattr(args, field.name) for field in fields(AlignmentOptions)})
    run_name = "-".join(["imagenet-lt", name, args.method, *alignment.names, f"seed{args.seed}"])
    special: dict[str, Any] = {
        "recipe_name": name,
        "recipe": recipe,
        "method_options": MethodOptions(**{option: getattr(args, option) for option in method_names}),
        "alignment": alignment,
        "output_dir": args.output_dir or Path("runs") / run_name,
        "tensorboard": not args.no_tensorboard,
    }
    if args.data == "synthetic":
        special |= {"data_dir": Path(), "train_list": Path(), "test_list": Path(), "val_list": None}
    plain = {field.name: getattr(args, field.name) for field in fields(ImageNetSettings) if field.name not in special}
    return ImageNetSettings(**special, **plain)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "report":
        return report(argv[1:])
    # Processes of one machine have one command line: one of them says what is wrong with it.
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        parser = build_parser()
        args = parser.parse_args(argv)
        try:
            settings = settings_from(args)
        except ValueError as error:
            return failed(error, 2)
    with contextlib.ExitStack() as stack:
        try:
            ranks = stack.enter_context(world(settings.device))
        except (ValueError, OSError) as error:
            return failed(error, 2)
        code = train(settings, ranks)
        if code:
            ranks.leave(code)
    return code


def train(settings: ImageNetSettings, ranks: World) -> int:
    """Train and return the exit code; what is no fault of options, lists or files keeps its traceback."""
    try:
        trainer = Trainer(settings, ranks)
    except (ValueError, OSError) as error:
        return failed(error, 2, quiet=isinstance(error, SharedError) and not ranks.first)
    try:
        trainer.run()
    except TrainingError as error:
        return failed(error, 1, quiet=not ranks.first)  # of figures that are those of all ranks
    except BadImage as error:
        return failed(error, 1)
    return 0


def failed(error: Exception, code: int, *, quiet: bool = False) -> int:
    """Say what is wrong, unless another process does, and return the exit code."""
    if not quiet:
        print(f"imagenet_lt.py: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
