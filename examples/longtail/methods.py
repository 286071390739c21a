"""The methods by name: what each may be combined with, and how it is built from the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .arb import AttractionRepulsionBalanced
from .augment import ImageSet
from .baseline import Baseline
from .batches import Batches, ImageBatches
from .ce import CrossEntropy
from .checkpoint import load_checkpoint
from .etf_dr import EtfDotRegression, EtfNet
from .glmc import Glmc, GlmcBatches, GlmcNet, published_options
from .max_norm import MaxNorm
from .networks import Backbone, CifarResNet, initialize, store_channels_last

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True)
class MethodOptions:
    """What may be set of a method beside its recipe. None leaves the method's own value.

    Attributes:
        frozen_head: ce: never train the classifier, as ETF-DR's CIFAR code does.
        class_counts: arb, etf-dr: balance by the classes of each `batch`, of the training set (`global`), or, etf-dr
            alone, not at all (`none`).
        clamp_logits: arb: limit logits to plus or minus this, published 30; 0 for no limit.
        unadjusted_cutmix: glmc: label by lambda even where the box was clipped, as the published code does.
        resample, label_weighting, contrast: glmc: r, l and k; published by data set and imbalance.
        aligned_head: glmc: the head that class means are aligned with.
        moving_statistics: glmc-maxnorm: let batch normalisation adapt, as the published code does.
        first_stage: glmc-maxnorm: output folder of the finished GLMC run to start from.
    """

    frozen_head: bool = False
    class_counts: Literal["batch", "global", "none"] | None = None
    clamp_logits: float = 0.0
    unadjusted_cutmix: bool = False
    resample: float | None = None
    label_weighting: float | None = None
    contrast: float | None = None
    aligned_head: Literal["rebalanced", "conventional"] = "rebalanced"
    moving_statistics: bool = False
    first_stage: Path | None = None


@dataclass(frozen=True)
class Method:
    """What is known of a method before it is built.

    Attributes:
        recipe: the published recipe.
        options: which of `MethodOptions` it takes.
        fixed_head: why no strategy can act on its classifier; empty where it is trained.
    """

    recipe: str
    options: tuple[str, ...] = ()
    fixed_head: str = ""


METHODS: Mapping[str, Method] = {
    "ce": Method("ldam", ("frozen_head",)),
    "etf-dr": Method("etfdr", ("class_counts",), "ETF-DR's classifier is a fixed simplex"),
    "arb": Method("arb", ("class_counts", "clamp_logits")),
    "glmc": Method("glmc", ("unadjusted_cutmix", "resample", "label_weighting", "contrast", "aligned_head")),
    "glmc-maxnorm": Method("maxnorm", ("moving_statistics", "first_stage")),
}


def check_options(name: str, options: MethodOptions) -> None:
    """Check that a method exists and takes the options that were set.

    Raises:
        ValueError: it does not.
    """
    if name not in METHODS:
        raise ValueError(f"--method is {name}; expected one of {', '.join(METHODS)}")
    defaults = MethodOptions()
    for option, default in vars(defaults).items():
        if getattr(options, option) != default and option not in METHODS[name].options:
            takers = ", ".join(other for other, method in METHODS.items() if option in method.options)
            raise ValueError(f"--{option.replace('_', '-')} belongs to {takers}, not to {name}: leave it out")
    if name == "arb" and options.class_counts == "none":
        raise ValueError("--class-counts none would make arb plain cross-entropy: use --method ce")
    if name == "glmc-maxnorm" and options.first_stage is None:
        raise ValueError("glmc-maxnorm retrains the head of a GLMC run: set --first-stage to its output folder")


def build(settings: Settings, images: ImageSet, counts: Sequence[int]) -> tuple[Baseline, Batches]:
    """Build a method's network, on the device of the images, its baseline and its batches.

    Args:
        settings: of the run; PyTorch's global generator gives the initial weights.
        images: the training images.
        counts: training images per class.

    Raises:
        ValueError: the method cannot be built with these settings.
        OSError: the first stage cannot be read.
    """
    recipe, options, num_classes = settings.recipe, settings.method_options, len(counts)
    augment: dict[str, Any] = {"batch_size": recipe.batch_size, "augment": settings.augment}

    def backbone() -> Backbone:
        return Backbone(recipe.depth, recipe.width)

    def place(model: nn.Module) -> Any:
        model.to(images.device)
        if recipe.channels_last:
            store_channels_last(model)
        if settings.compile and images.device.type != "cuda":  # there the whole step is compiled
            model.get_submodule("backbone").compile()
        return model

    def initialized(model: nn.Module) -> Any:
        initialize(model)
        return place(model)

    def single_images() -> Batches:
        return ImageBatches(images, num_classes, mixup=recipe.mixup, **augment)

    def linear() -> Any:
        return place(CifarResNet(num_classes, depth=recipe.depth, width=recipe.width))

    def cross_entropy() -> tuple[Baseline, Batches]:
        return CrossEntropy(linear(), frozen_head=options.frozen_head), single_images()

    def etf_dr() -> tuple[Baseline, Batches]:
        balance: dict[str | None, Any] = {None: "batch", "batch": "batch", "global": counts, "none": None}
        model = initialized(EtfNet(backbone(), num_classes))
        return EtfDotRegression(model, counts=balance[options.class_counts]), single_images()

    def arb() -> tuple[Baseline, Batches]:
        in_batch = options.class_counts == "batch"
        baseline = AttractionRepulsionBalanced(
            linear(), counts=None if in_batch else counts, clamp=options.clamp_logits
        )
        return baseline, single_images()

    def glmc() -> tuple[Baseline, Batches]:
        given = {name: getattr(options, name) for name in ("resample", "label_weighting", "contrast")}
        constants = replace(
            published_options(settings.dataset, settings.imbalance),
            **{name: value for name, value in given.items() if value is not None},
        )
        baseline = Glmc(
            initialized(GlmcNet(backbone(), num_classes)),
            counts,
            epochs=recipe.epochs,
            options=constants,
            aligned_head=options.aligned_head,
        )
        return baseline, GlmcBatches(
            images,
            counts,
            resample=constants.resample,
            unadjusted_cutmix=options.unadjusted_cutmix,
            **augment,
        )

    def max_norm() -> tuple[Baseline, Batches]:
        assert options.first_stage is not None
        model = GlmcNet(backbone(), num_classes)
        load_first_stage(model, options.first_stage, images.device, settings)
        return MaxNorm(place(model), counts, moving_statistics=options.moving_statistics), single_images()

    builders: dict[str, Callable[[], tuple[Baseline, Batches]]] = {
        "ce": cross_entropy,
        "etf-dr": etf_dr,
        "arb": arb,
        "glmc": glmc,
        "glmc-maxnorm": max_norm,
    }
    return builders[settings.method]()


def load_first_stage(model: nn.Module, folder: Path, device: torch.device, settings: Settings) -> None:
    """Load the network of a finished run.

    Raises:
        ValueError: the run is of another method, network or training set, or has not finished.
        OSError: there is no checkpoint.
    """
    state = load_checkpoint(folder / "checkpoint.pt", device)
    options = state["options"]
    if options["method"] != "glmc":
        raise ValueError(f"--first-stage {folder} holds a run of {options['method']}, expected one of glmc")
    if state["epoch"] < options["epochs"]:
        raise ValueError(
            f"--first-stage {folder} has done {state['epoch']} of {options['epochs']} epochs: finish it first"
        )
    now = settings.outcome()
    for option in ("dataset", "imbalance", "subset-seed", "subset-replacement", "validation", "resolution"):
        if options[option] != now[option]:
            raise ValueError(
                f"--first-stage {folder} was trained with --{option} {options[option]}, not {now[option]}: a second "
                "stage goes on with the same training set"
            )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"--first-stage {folder} holds another network ({str(error).splitlines()[-1].strip()}): use the same "
            "--dataset, --depth and --width"
        ) from error
