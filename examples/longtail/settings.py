"""All options of one training run, resolved and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .alignment import AlignmentOptions
from .data import ARCHIVES
from .methods import METHODS, MethodOptions, check_options
from .recipes import SCHEDULES, Recipe

if TYPE_CHECKING:
    from .imagenet.settings import ImageNetSettings

WHERE_AND_HOW = (
    "data_dir",
    "output_dir",
    "device",
    "threads",
    "resume",
    "overwrite",
    "tensorboard",
    "quiet",
    "stop_after_epochs",
    "checkpoint_seconds",
)
HOW_STEPS_RUN = ("compile", "capture")  # of the outcome, no more than its rounding

CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats itself


@dataclass(frozen=True)
class Settings:
    """One run. `WHERE_AND_HOW` names the fields that say where and how it is done; the others decide its outcome.

    Attributes:
        method: one of `METHODS`.
        dataset: `cifar10` or `cifar100`.
        imbalance: size of the largest class over the smallest.
        subset_seed: of the choice of images.
        subset_replacement: draw them with replacement, as GLMC's code did until May 2023.
        validation: evaluate on up to this many held-out training images per class; 0: on the test set.
        recipe_name, recipe: network, optimizer, schedule.
        augment: random crop and flip.
        method_options: of the method.
        alignment: the three strategies.
        seed: of initial weights, order and augmentation; runs with equal seeds are paired.
        accumulate: micro-batches per optimizer step.
        clip_norm: largest gradient norm; 0 for no clipping.
        amp: `off`, `bf16` or `fp16`.
        compile: compile the network, and on a GPU all of the step but the optimizer.
        capture: replay the training step as a CUDA graph.
        evaluate_every: evaluate after every so many epochs, and after the last; the best epoch is one of these.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        threads: of the CPU; None leaves PyTorch's choice.
        data_dir, output_dir: where the archive is and where results go.
        resume: continue from the checkpoint in `output_dir` where there is one.
        overwrite: start afresh although `output_dir` holds a run.
        tensorboard, quiet: what is reported.
        stop_after_epochs: end this call cleanly after so many epochs; None for the whole run.
        checkpoint_seconds: write no checkpoint sooner after the last one; 0 for one after every epoch.
    """

    recipe_name: str
    recipe: Recipe
    data_dir: Path
    output_dir: Path
    method: str = "ce"
    dataset: str = "cifar100"
    imbalance: float = 100.0
    subset_seed: int = 0
    subset_replacement: bool = False
    validation: int = 0
    augment: bool = True
    method_options: MethodOptions = field(default_factory=MethodOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    seed: int = 0
    accumulate: int = 1
    clip_norm: float = 0.0
    amp: str = "off"
    compile: bool = False
    capture: bool = False
    evaluate_every: int = 1
    device: str = "auto"
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    tensorboard: bool = True
    quiet: bool = False
    stop_after_epochs: int | None = None
    checkpoint_seconds: float = 0.0

    def __post_init__(self) -> None:
        check("dataset", self.dataset, self.dataset in ARCHIVES, f"one of {', '.join(ARCHIVES)}")
        check("imbalance", self.imbalance, 1 <= self.imbalance < math.inf, "1 or more")
        check("subset-seed", self.subset_seed, 0 <= self.subset_seed < 2**32, "0 .. 2^32 - 1")
        check("validation", self.validation, self.validation >= 0, "a number of images per class, or 0")
        check("checkpoint-seconds", self.checkpoint_seconds, self.checkpoint_seconds >= 0, "0 or more")
        check_run(self, SCHEDULES)
        if self.capture and self.amp == "fp16":
            raise ValueError("--capture cannot wait to see whether scaled gradients are finite: use --amp bf16 or off")
        counts = self.method_options.class_counts or ("batch" if self.method == "etf-dr" else None)
        if self.accumulate > 1 and counts == "batch":
            raise ValueError(
                f"--accumulate {self.accumulate} would count the classes of micro-batches, not of the batch: use "
                "--class-counts global, or no accumulation"
            )

    def outcome(self) -> dict[str, Any]:
        """Return the options that decide the outcome, by the names that the command line uses, as plain values."""
        options = asdict(self)
        for name in WHERE_AND_HOW:
            del options[name]
        recipe, alignment, method = options.pop("recipe"), options.pop("alignment"), options.pop("method_options")
        method["first_stage"] = None if method["first_stage"] is None else str(method["first_stage"])
        recipe["milestones"] = [list(milestone) for milestone in recipe["milestones"]]
        options["recipe"] = options.pop("recipe_name")
        return {name.replace("_", "-"): value for name, value in {**options, **recipe, **alignment, **method}.items()}


def torch_device(name: str) -> torch.device:
    """Return the device of an option, `auto`, `cpu`, `cuda` or `cuda:1`, by its number.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A tensor's device has a number, which set_device insists on.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here ({reason}); try cpu") from error


def choose_algorithms(device: torch.device, *, deterministic: bool = False) -> None:
    """Let a GPU try which convolutions are quickest for the few shapes of a run, or use what repeats itself alone.

    To be called before the device multiplies anything: cuBLAS reads the environment once.

    Raises:
        ValueError: the environment sets cuBLAS up so that it does not repeat itself.
    """
    gpu = device.type == "cuda"
    if deterministic and gpu:
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
        if workspace not in CUBLAS_WORKSPACES:
            raise ValueError(
                f"CUBLAS_WORKSPACE_CONFIG is {workspace!r}, and --deterministic needs {' or '.join(CUBLAS_WORKSPACES)} "
                "on a GPU: set one of them, or leave it unset"
            )
    if deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = gpu and not deterministic


def check_same(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Compare the options of a run with those in its checkpoint. How its steps are executed may change.

    Raises:
        ValueError: they differ; names the options and both values.
    """
    differing = [
        f"--{name} {now.get(name)} (was {before.get(name)})"
        for name in {**before, **now}
        if name not in HOW_STEPS_RUN and now.get(name) != before.get(name)
    ]
    if differing:
        raise ValueError(
            f"cannot resume with other options: {', '.join(differing)}; repeat the original ones, "
            "or start another run with another --output-dir"
        )


def check_run(settings: Settings | ImageNetSettings, schedules: Sequence[str]) -> None:
    """Check the options that the training scripts share.

    Raises:
        ValueError: one is out of range, or two contradict each other.
    """
    recipe, alignment, options = settings.recipe, settings.alignment, settings.method_options
    check("seed", settings.seed, 0 <= settings.seed < 2**63, "0 or more")
    check("epochs", recipe.epochs, recipe.epochs >= 1, "1 or more")
    check("batch-size", recipe.batch_size, recipe.batch_size >= 2, "2 or more, for batch normalisation")
    check("lr", recipe.lr, 0 < recipe.lr < math.inf, "more than 0")
    check("weight-decay", recipe.weight_decay, 0 <= recipe.weight_decay < math.inf, "0 or more")
    check("schedule", recipe.schedule, recipe.schedule in schedules, ", ".join(schedules))
    good = 0 <= recipe.warmup_epochs < recipe.epochs
    check("warmup-epochs", recipe.warmup_epochs, good, f"0 or more and less than the {recipe.epochs} epochs")
    check("mixup", recipe.mixup, 0 <= recipe.mixup < math.inf, "alpha of Beta(alpha, alpha), or 0")
    check("clip-norm", settings.clip_norm, 0 <= settings.clip_norm < math.inf, "more than 0, or 0 for no clipping")
    good = 1 <= settings.accumulate <= recipe.batch_size
    check("accumulate", settings.accumulate, good, f"1 to the batch size, {recipe.batch_size}")
    check("amp", settings.amp, settings.amp in ("off", "bf16", "fp16"), "off, bf16 or fp16")
    check("evaluate-every", settings.evaluate_every, settings.evaluate_every >= 1, "1 or more")
    check("threads", settings.threads, settings.threads is None or settings.threads >= 1, "1 or more")
    stop = settings.stop_after_epochs
    check("stop-after-epochs", stop, stop is None or stop >= 1, "1 or more")
    check_alignment(alignment)
    check_options(settings.method, options)
    check_numbers(options)
    fixed = "--frozen-head fixes the classifier" if options.frozen_head else METHODS[settings.method].fixed_head
    check_fixed_head(alignment, fixed)
    if recipe.mixup and settings.method in ("glmc", "glmc-maxnorm"):
        raise ValueError(
            f"--mixup {recipe.mixup} is not for {settings.method}, which mixes by itself or not at all: use 0"
        )
    if settings.resume and settings.overwrite:
        raise ValueError("--resume continues a run and --overwrite removes it: leave one out")


def check_alignment(alignment: AlignmentOptions) -> None:
    """Check the strategies' hyper-parameters.

    Raises:
        ValueError: one is out of range.
    """
    check("spareg", alignment.spareg, math.isfinite(alignment.spareg), "a finite weight, or 0 for none")
    sides = ("both", "classifier", "features")
    check("spareg-align", alignment.spareg_align, alignment.spareg_align in sides, ", ".join(sides))
    check("alpha-max", alignment.alpha_max, 0 <= alignment.alpha_max <= 1, "0 .. 1")
    check("threshold", alignment.threshold, -1 <= alignment.threshold <= 1, "a cosine, -1 .. 1")
    check("gamma", alignment.gamma, 0 <= alignment.gamma <= 1, "0 .. 1")
    check("radial", alignment.radial, alignment.radial in ("paper", "keep"), "paper or keep")
    check("momentum", alignment.momentum, 0 < alignment.momentum <= 1, "more than 0, at most 1")


def check_fixed_head(alignment: AlignmentOptions, fixed: str) -> None:
    """Check that the strategies can act on a classifier; `fixed` says why it does not move, or is empty.

    Raises:
        ValueError: one cannot.
    """
    if not fixed:
        return
    if alignment.spaslerp or alignment.spaproj:
        raise ValueError(
            f"--spaslerp and --spaproj turn the classifier, but {fixed}: use --spareg, which then pulls the features"
        )
    if alignment.spareg and alignment.spareg_align == "classifier":
        raise ValueError(f"--spareg-align classifier has nothing to pull, because {fixed}: use --spareg-align features")


def check_numbers(options: MethodOptions) -> None:
    """Check the methods' constants.

    Raises:
        ValueError: one is out of range.
    """
    for name in ("resample", "label_weighting", "contrast", "clamp_logits"):
        value = getattr(options, name)
        check(name.replace("_", "-"), value, value is None or 0 <= value < math.inf, "0 or more")


def check(name: str, value: object, good: bool, expected: str) -> None:
    """Raise ValueError unless an option's value is good."""
    if not good:
        raise ValueError(f"--{name} is {value}; expected {expected}")
