"""Batches of a set of images that lies on the device: instance-balanced ones, with mixup where the recipe has it.

All that is random in an epoch is drawn at its beginning (`draw`) and then only read (`batch`), by positions that may
live on the device: a training step can so be captured once and replayed.

Shapes: N images of a batch, R pixels a side, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .augment import ImageSet, draw_epoch, mix
from .baseline import Batch

Draws = dict[str, Tensor]
"""An epoch's random numbers on the device, by name: one row per position in the epoch, or, where the name begins with
`step_`, one per batch. Shapes and dtypes are those of every other epoch."""


class Batches(ABC):
    """The batches of a training method.

    Args:
        images: the training images.
        batch_size: the last batch of an epoch is smaller where the set does not divide.
    """

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self.images, self.batch_size, self.device = images, batch_size, images.device

    def __len__(self) -> int:
        """Return how many positions an epoch has."""
        return len(self.images)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self) // self.batch_size)

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Draws:
        """Draw an epoch's random numbers from the CPU `generator`, and move them to the device."""

    @abstractmethod
    def batch(self, draws: Draws, positions_N: Tensor, step: Tensor) -> Batch:
        """Return the batch of these positions of the epoch; `step`, (1,) int64, is its number."""

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """Yield an epoch's batches."""
        draws, everything = self.draw(generator), torch.arange(len(self), device=self.device)
        for step, positions_N in enumerate(everything.split(self.batch_size)):
            yield self.batch(draws, positions_N, torch.tensor([step], device=self.device))


class ImageBatches(Batches):
    """Every image once per epoch, in random order.

    Args:
        images: the training images.
        num_classes: C, of the soft labels that mixup makes.
        batch_size: of each but the last.
        augment: random crop and flip.
        mixup: alpha of Beta(alpha, alpha), one draw per batch and partners within the batch; 0 for none.
    """

    def __init__(
        self, images: ImageSet, num_classes: int, *, batch_size: int, augment: bool = True, mixup: float = 0.0
    ) -> None:
        super().__init__(images, batch_size)
        self.num_classes = num_classes
        self.augment = augment
        self.mixup = mixup

    def draw(self, generator: torch.Generator) -> Draws:
        draws = draw_epoch(len(self.images), self.images.padding, generator, self.images.device)
        return {**vars(draws), **(self._draw_mixup(generator) if self.mixup else {})}

    def batch(self, draws: Draws, positions_N: Tensor, step: Tensor) -> Batch:
        """Return images (N, 3, R, R) and class indices (N,); with mixup, soft labels (N, C)."""
        images, index_N = self.images, draws["order"][positions_N]
        if self.augment:
            crop = (draws[name][positions_N] for name in ("top", "left", "flip"))
            images_N3RR = images.crops(index_N, *crop)
        else:
            images_N3RR = images.plain(index_N)
        targets = images.labels_N[index_N]
        if self.mixup:
            one_hot_NC = F.one_hot(targets, self.num_classes).to(torch.float32)
            partner_N = draws["partner"][positions_N]
            images_N3RR, targets = mix(images_N3RR, one_hot_NC, partner_N, draws["step_share"][step])
        return Batch(images_N3RR, targets)

    def _draw_mixup(self, generator: torch.Generator) -> Draws:
        """Draw each batch's share, and for each position of the epoch its partner's place in the same batch."""
        # PyTorch's Beta takes no generator, so numpy draws it from a seed that the generator draws.
        seed = int(torch.randint(2**62, (), generator=generator))
        sizes = [len(part) for part in torch.split(torch.arange(len(self.images)), self.batch_size)]
        share = torch.from_numpy(np.random.default_rng(seed).beta(self.mixup, self.mixup, len(sizes))).float()
        partner = torch.cat([torch.randperm(size, generator=generator) for size in sizes])
        return {"step_share": share.to(self.images.device), "partner": partner.to(self.images.device)}
