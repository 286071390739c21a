"""Named ImageNet-LT recipes, as published."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipes import SCHEDULES as CIFAR_SCHEDULES

SCHEDULES = (*CIFAR_SCHEDULES, "glmc-published")


@dataclass(frozen=True)
class ImageNetRecipe:
    """Everything about a run that its authors fixed.

    Attributes:
        network: one of `networks.NETWORKS`.
        epochs, batch_size, lr, sgd_momentum, weight_decay: of SGD without Nesterov momentum; the batch is that of all
            ranks together.
        warmup_epochs, schedule: see `longtail.recipes.Schedule`.
        mixup: parameter alpha of Beta(alpha, alpha); 0 for none.
        resolution: side of the crops in pixels.
    """

    network: str = "resnet50"
    epochs: int = 200
    batch_size: int = 1024
    lr: float = 0.1
    sgd_momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    schedule: str = "epoch-cosine"
    mixup: float = 0.0
    resolution: int = 224


RECIPES = {
    # The ARB repository's cross-entropy.
    "ce": ImageNetRecipe(),
    # ETF-DR's shipped configuration, for itself and for its cross-entropy: the widened network, mixup.
    "etfdr": ImageNetRecipe(network="resnet50-etfdr", epochs=90, mixup=0.2),
    # The ARB repository, global class counts; its README's command is the second, with mixup.
    "arb": ImageNetRecipe(batch_size=768),
    "arb-mixup": ImageNetRecipe(mixup=0.2),
    # GLMC. Published, its schedule is set after each epoch: the first runs at full rate before the warm-up takes
    # effect, and the warm-up overshoots by a tenth (--schedule glmc-published).
    "glmc": ImageNetRecipe(
        network="resnext50",
        epochs=135,
        batch_size=120,
        weight_decay=2e-4,
        warmup_epochs=10,
    ),
    # Minutes on a CPU: a small network on small images. Ours, not published.
    "small": ImageNetRecipe(network="resnet10", epochs=10, batch_size=32, lr=0.05, warmup_epochs=1, resolution=64),
}

METHOD_RECIPES = {"ce": "ce", "etf-dr": "etfdr", "arb": "arb", "glmc": "glmc"}
