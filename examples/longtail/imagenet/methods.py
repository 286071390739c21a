"""The methods on torchvision's networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..arb import AttractionRepulsionBalanced
from ..baseline import Baseline
from ..ce import CrossEntropy
from ..etf_dr import EtfDotRegression, EtfNet
from ..glmc import Glmc, GlmcNet, GlmcOptions
from ..networks import LinearNet
from .networks import TorchvisionBackbone
from .settings import ImageNetSettings


def glmc_options(settings: ImageNetSettings) -> GlmcOptions:
    """Return GLMC's constants: those that were set, else those of its README for ImageNet-LT."""
    options, published = settings.method_options, {"resample": 0.2, "label_weighting": 1.0, "contrast": 10.0}
    given = {name: getattr(options, name) for name in published}
    return GlmcOptions(**{name: published[name] if value is None else value for name, value in given.items()})


def balances_batch(settings: ImageNetSettings) -> bool:
    """Return whether the loss counts the classes of each batch."""
    default = "batch" if settings.method == "etf-dr" else "global"
    return settings.method in ("etf-dr", "arb") and (settings.method_options.class_counts or default) == "batch"


def build(settings: ImageNetSettings, counts: Sequence[int], place: Any) -> tuple[Baseline, TorchvisionBackbone]:
    """Build a method's network and its baseline; PyTorch's global generator gives the initial weights.

    Args:
        settings: of the run.
        counts: training images per class.
        place: moves a network to where and how it is trained, and returns it.

    Raises:
        ValueError: the method cannot be built with these settings.
    """
    num_classes, options = len(counts), settings.method_options
    backbone = TorchvisionBackbone(settings.recipe.network)

    def placed(model: nn.Module) -> Any:
        return place(model)

    if settings.method == "etf-dr":
        balance: dict[str | None, Any] = {None: "batch", "batch": "batch", "global": counts, "none": None}
        model = placed(EtfNet(backbone, num_classes, unit_length=False))
        # Published for ImageNet, where nothing else keeps the features short.
        return EtfDotRegression(model, counts=balance[options.class_counts], length_penalty=0.01), backbone
    if settings.method == "arb":
        by_batch = options.class_counts == "batch"
        model = placed(LinearNet(backbone, num_classes))
        return (
            AttractionRepulsionBalanced(model, counts=None if by_batch else counts, clamp=options.clamp_logits),
            backbone,
        )
    if settings.method == "glmc":
        model = placed(GlmcNet(backbone, num_classes, agreement_dim=256))
        glmc = Glmc(
            model,
            counts,
            epochs=settings.recipe.epochs,
            options=glmc_options(settings),
            aligned_head=options.aligned_head,
        )
        return glmc, backbone
    return CrossEntropy(placed(LinearNet(backbone, num_classes))), backbone
