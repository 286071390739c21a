"""Instance-balanced batches of one look per image, with mixup where the recipe has it.

Shapes: N images of a batch, R pixels a side, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .augment import ImageSet, draw_epoch, mix
from .baseline import Batch


class ImageBatches:
    """Every image once per epoch, in random order.

    Args:
        images: the training images.
        num_classes: C, of the soft labels that mixup makes.
        batch_size: the last batch of an epoch is smaller where the set does not divide.
        augment: random crop and flip.
        mixup: alpha of Beta(alpha, alpha), one draw per batch and partners within the batch; 0 for none.
    """

    def __init__(
        self, images: ImageSet, num_classes: int, *, batch_size: int, augment: bool = True, mixup: float = 0.0
    ) -> None:
        self.images = images
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.augment = augment
        self.mixup = mixup

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def draw(self, generator: torch.Generator) -> Iterator[Batch]:
        """Yield an epoch's batches; with mixup, soft labels (N, C)."""
        images = self.images
        draws = draw_epoch(len(images), images.padding, generator, images.device)
        if self.mixup:
            shares, partner_of = self._draw_mixup(generator)
        for step in range(len(self)):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index_N = draws.order[part]
            if self.augment:
                images_N3RR = images.crops(index_N, draws.top[part], draws.left[part], draws.flip[part])
            else:
                images_N3RR = images.plain(index_N)
            targets = images.labels_N[index_N]
            if self.mixup:
                one_hot_NC = F.one_hot(targets, self.num_classes).to(torch.float32)
                images_N3RR, targets = mix(images_N3RR, one_hot_NC, partner_of[part], shares[step])
            yield Batch(images_N3RR, targets)

    def _draw_mixup(self, generator: torch.Generator) -> tuple[list[float], Tensor]:
        """Return each batch's share, and for each position of the epoch its partner's position in the same batch."""
        # PyTorch's Beta takes no generator, so numpy draws it from a seed that the generator draws.
        seed = int(torch.randint(2**62, (), generator=generator))
        shares = np.random.default_rng(seed).beta(self.mixup, self.mixup, len(self)).tolist()
        sizes = [len(part) for part in torch.split(torch.arange(len(self.images)), self.batch_size)]
        partner_of = torch.cat([torch.randperm(size, generator=generator) for size in sizes])
        return shares, partner_of.to(self.images.device)
