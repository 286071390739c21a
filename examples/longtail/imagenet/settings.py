"""All options of one ImageNet-LT run, resolved and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..alignment import AlignmentOptions
from ..methods import MethodOptions
from ..settings import check, check_run
from .networks import NETWORKS
from .recipes import METHOD_RECIPES, SCHEDULES, ImageNetRecipe

WHERE_AND_HOW = (
    "data_dir",
    "output_dir",
    "device",
    "threads",
    "workers",
    "scan",
    "resume",
    "overwrite",
    "tensorboard",
    "quiet",
    "stop_after_epochs",
    "checkpoint_steps",
    "keep",
    "accumulate",
    "fsdp",
    "compile",
)


@dataclass(frozen=True)
class ImageNetSettings:
    """One run. `WHERE_AND_HOW` names the fields that say where and how it is done; the others decide its outcome.

    How many ranks share the work is not among them: a run may go on with another number. That changes which images meet
    in one batch normalisation and one mixup, and so the outcome to that extent.

    Attributes:
        method: one of `METHOD_RECIPES`.
        method_options: of the method.
        recipe_name, recipe: network, optimizer, schedule.
        data: `files` or `synthetic`.
        data_dir: folder that the lists' paths are relative to.
        train_list, val_list, test_list: list files; without `val_list` the test list is looked at after every epoch.
        num_synthetic, num_synthetic_classes: size of synthetic data.
        decode: `cpu` in the workers, or `device`.
        scan: how the files are looked at before training: `off`, `fast` or `full`.
        skip_bad: leave bad lines and files out instead of refusing them.
        alignment: the three strategies.
        seed: of weights, order and augmentation; runs with equal seeds are paired.
        accumulate: micro-batches per optimizer step and rank.
        clip_norm: largest gradient norm; 0 for no clipping.
        amp: `off`, `bf16` or `fp16`.
        channels_last: memory layout of the network.
        sync_bn: batch normalisation over all ranks.
        fsdp: shard parameters, gradients and optimizer state over the ranks.
        compile: compile the backbone.
        deterministic: only algorithms that repeat themselves to the last bit.
        evaluate_every: evaluate after every so many epochs, and after the last; the best epoch is one of these.
        device: `auto`, `cpu` or `cuda`; each rank takes its own.
        threads, workers: CPU threads and loader processes of each rank.
        output_dir: where results go.
        resume: continue from the newest checkpoint in `output_dir` where there is one.
        overwrite: start afresh although `output_dir` holds a run.
        checkpoint_steps: also save after every so many steps of an epoch; 0 for the ends of epochs alone.
        keep: how many checkpoints to keep.
        tensorboard, quiet: what is reported.
        stop_after_epochs: end this call cleanly after so many epochs; None for the whole run.
    """

    recipe_name: str
    recipe: ImageNetRecipe
    output_dir: Path
    method: str = "ce"
    method_options: MethodOptions = field(default_factory=MethodOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    data: str = "files"
    data_dir: Path = Path()
    train_list: Path = Path()
    test_list: Path = Path()
    val_list: Path | None = None
    num_synthetic: int = 115_846
    num_synthetic_classes: int = 1000
    decode: str = "cpu"
    scan: str = "fast"
    skip_bad: bool = False
    seed: int = 0
    accumulate: int = 1
    clip_norm: float = 0.0
    amp: str = "off"
    channels_last: bool = True
    sync_bn: bool = False
    fsdp: bool = False
    compile: bool = False
    deterministic: bool = False
    evaluate_every: int = 1
    device: str = "auto"
    threads: int | None = None
    workers: int = 8
    resume: bool = False
    overwrite: bool = False
    checkpoint_steps: int = 0
    keep: int = 2
    tensorboard: bool = True
    quiet: bool = False
    stop_after_epochs: int | None = None

    def __post_init__(self) -> None:
        recipe = self.recipe
        check("method", self.method, self.method in METHOD_RECIPES, f"one of {', '.join(METHOD_RECIPES)}")
        check("network", recipe.network, recipe.network in NETWORKS, f"one of {', '.join(NETWORKS)}")
        check("resolution", recipe.resolution, recipe.resolution >= 32, "32 pixels or more")
        check("workers", self.workers, self.workers >= 0, "0 (in the main process) or more")
        check("checkpoint-steps", self.checkpoint_steps, self.checkpoint_steps >= 0, "0 or more")
        check("keep", self.keep, self.keep >= 1, "1 or more")
        check("num-synthetic", self.num_synthetic, self.num_synthetic >= 2, "2 or more")
        good = 2 <= self.num_synthetic_classes <= self.num_synthetic
        check("num-synthetic-classes", self.num_synthetic_classes, good, f"2 to {self.num_synthetic}, the images")
        check_run(self, SCHEDULES)
        if recipe.schedule == "glmc-published" and not recipe.warmup_epochs:
            raise ValueError("--schedule glmc-published is a warm-up's quirk: set --warmup-epochs, published 10")
        if self.fsdp and self.amp == "fp16":
            raise ValueError("--fsdp with --amp fp16 would see each rank's overflows alone: use --amp bf16 or off")
        for name, given in (("fsdp", self.fsdp), ("sync-bn", self.sync_bn)):
            if self.compile and given:
                raise ValueError(
                    f"--compile with --{name} would run most layers uncompiled, because their exchange among ranks "
                    "breaks the graph: leave one out"
                )

    def outcome(self) -> dict[str, Any]:
        """Return the options that decide the outcome, by the names that the command line uses, as plain values."""
        options = asdict(self)
        for name in WHERE_AND_HOW:
            del options[name]
        recipe, alignment, method = options.pop("recipe"), options.pop("alignment"), options.pop("method_options")
        for name in ("frozen_head", "moving_statistics", "first_stage"):  # of CIFAR alone
            del method[name]
        for name in ("train_list", "val_list", "test_list"):  # their contents count, not their place
            options[name] = None if options[name] is None else options[name].name
        options["recipe"] = options.pop("recipe_name")
        return {name.replace("_", "-"): value for name, value in {**options, **recipe, **alignment, **method}.items()}
