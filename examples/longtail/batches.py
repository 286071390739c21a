"""Instance-balanced batches of one look per image, with mixup where the recipe has it.

Shapes: N images of a batch, R pixels a side, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .augment import ImageSet, draw_epoch, mix
from .baseline import Batch, Draws


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
