"""Named training recipes, as published, and the learning-rate schedules they use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run that its authors fixed: network, optimizer, schedule, augmentation.

    Attributes:
        depth, width: of the CIFAR ResNet.
        resolution: side of the images in pixels; the originals have 32.
        epochs, batch_size, lr, sgd_momentum, weight_decay: of SGD without Nesterov momentum.
        warmup_epochs: epochs of linear warm-up.
        schedule: `step`, `cosine` or `epoch-cosine`, see `Schedule`.
        milestones: for `step`: (epochs done, factor) at 200 epochs; other lengths scale them in proportion.
        mixup: parameter alpha of Beta(alpha, alpha); 0 for none.
        channels_last: memory layout of the convolutions, by default that of the images, so that nothing is converted;
            changes speed and rounding, not the mathematics.
    """

    depth: int = 32
    width: int = 1
    resolution: int = 32
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    sgd_momentum: float = 0.9
    weight_decay: float = 2e-4
    warmup_epochs: int = 5
    schedule: str = "step"
    milestones: tuple[tuple[int, float], ...] = ((160, 0.1), (180, 0.01))
    mixup: float = 0.0
    channels_last: bool = True


SCHEDULES = ("step", "cosine", "epoch-cosine")

RECIPES = {
    # LDAM-DRW, its ERM baseline: plain cross-entropy, two drops by a factor of 100.
    "ldam": Recipe(milestones=((160, 0.01), (180, 0.0001))),
    # MiSLAS stage 1: mixup with Beta(1, 1).
    "mislas": Recipe(mixup=1.0),
    # ETF-DR's cross-entropy configuration: as MiSLAS, on CIFAR-100 with the network of width 2 (see `get_recipe`). The
    # published CIFAR code never trains its classifier; --frozen-head reproduces that.
    "etfdr": Recipe(mixup=1.0),
    # The ARB repository's cross-entropy: no mixup, and a second drop at epoch 240 of 200, which never comes.
    "arb": Recipe(milestones=((160, 0.1), (240, 0.01))),
    # GLMC, both CIFAR sets: four times as wide, no warm-up, strong weight decay.
    "glmc": Recipe(width=4, batch_size=64, lr=0.01, weight_decay=5e-3, warmup_epochs=0, schedule="epoch-cosine"),
    # MaxNorm's second stage, on GLMC's network. Published, it begins with the first stage's best epoch on the test set,
    # and its rate is one epoch ahead, so that the last epoch's is 0.
    "maxnorm": Recipe(
        width=4, epochs=10, batch_size=64, lr=0.01, weight_decay=0.1, warmup_epochs=0, schedule="epoch-cosine"
    ),
    # Real images, small: a few minutes on one CPU core. Ours, not published.
    "small": Recipe(
        depth=14,
        resolution=16,
        epochs=40,
        weight_decay=5e-4,
        warmup_epochs=2,
        schedule="cosine",
    ),
}


def get_recipe(name: str, dataset: str) -> Recipe:
    """Return a named recipe for `cifar10` or `cifar100`."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; use one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    return replace(recipe, width=2) if (name, dataset) == ("etfdr", "cifar100") else recipe


def small_recipe(method: str, dataset: str) -> Recipe:
    """Return the small preset for a method: its own batches and head, otherwise the same for all.

    ETF-DR keeps mixup and, for a simplex of 100 vertices, the double width; MaxNorm keeps its published second stage.
    """
    small = RECIPES["small"]
    if method == "etf-dr":
        return replace(small, mixup=1.0, width=2 if dataset == "cifar100" else 1)
    if method == "glmc-maxnorm":
        stage = RECIPES["maxnorm"]
        return replace(stage, depth=small.depth, width=small.width, resolution=small.resolution)
    return small


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of epoch and step.

    `step`: constant within an epoch; epoch e = 1, 2, ... of the warm-up uses lr * e / warmup_epochs, and the factor of
    a milestone applies after that many epochs. `cosine`: changes with every step; linear from 0 during the warm-up,
    then half a cosine down to 0 at the end. `epoch-cosine`: the same half cosine, constant within an epoch, from lr in
    the first one after the warm-up, which is that of `step`. `glmc-published`: as GLMC's ImageNet code, which sets the
    rate after each epoch.
    """

    lr: float
    epochs: int
    warmup_epochs: int
    kind: str
    milestones: tuple[tuple[int, float], ...] = ()

    def __call__(self, epoch: int, step: int = 0, steps_per_epoch: int = 1) -> float:
        """Return the learning rate of 0-based `step` in 0-based `epoch`."""
        if self.kind == "glmc-published":
            after = epoch - 1  # the epoch that the rate was set after; before the first, nobody set it
            if after <= self.warmup_epochs:
                return self.lr * (epoch / self.warmup_epochs if epoch else 1.0)
            progress = (after - self.warmup_epochs + 1) / (self.epochs - self.warmup_epochs + 1)
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind != "cosine" and epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        if self.kind == "step":
            factor = 1.0
            for after, value in self.milestones:
                if epoch * 200 >= after * self.epochs:
                    factor = value
            return self.lr * factor
        if self.kind == "epoch-cosine":
            progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        done = epoch + (step + 1) / steps_per_epoch
        if done <= self.warmup_epochs:
            return self.lr * done / self.warmup_epochs
        progress = (epoch + step / steps_per_epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0)))
