"""Baseline CE: one linear head, cross-entropy, instance-balanced batches, mixup where the recipe has it.

Shapes: N images of a batch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .augment import ImageSet, draw_epoch, mix
from .baseline import Batch, Step
from .networks import CifarResNet


class CrossEntropy:
    """Cross-entropy training of a CIFAR ResNet.

    Args:
        model: the network, on the device of `train_set`.
        train_set: the training images.
        batch_size: the last batch of an epoch is smaller where the set does not divide.
        augment: random crop and flip.
        mixup: alpha of Beta(alpha, alpha), one draw per batch and partners within the batch; 0 for none.
        frozen_head: leave the classifier at its initial values.
    """

    name = "ce"

    def __init__(
        self,
        model: CifarResNet,
        train_set: ImageSet,
        *,
        batch_size: int,
        augment: bool = True,
        mixup: float = 0.0,
        frozen_head: bool = False,
    ) -> None:
        self.model = model
        self.classifier = model.classifier
        self.train_set = train_set
        self.batch_size = batch_size
        self.augment = augment
        self.mixup = mixup
        self.steps_per_epoch = -(-len(train_set) // batch_size)
        if frozen_head:
            self.classifier.requires_grad_(False)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield every image once, in random order; with mixup, soft labels (N, C)."""
        images = self.train_set
        draws = draw_epoch(len(images), images.padding, generator, images.device)
        if self.mixup:
            shares, partner_of = self._draw_mixup(generator)
        for step in range(self.steps_per_epoch):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index_N = draws.order[part]
            if self.augment:
                images_N3RR = images.crops(index_N, draws.top[part], draws.left[part], draws.flip[part])
            else:
                images_N3RR = images.plain(index_N)
            targets = images.labels_N[index_N]
            if self.mixup:
                one_hot_NC = F.one_hot(targets, self.classifier.out_features).to(torch.float32)
                images_N3RR, targets = mix(images_N3RR, one_hot_NC, partner_of[part], shares[step])
            yield Batch(images_N3RR, targets)

    def _draw_mixup(self, generator: torch.Generator) -> tuple[list[float], Tensor]:
        """Return each batch's share, and for each position of the epoch its partner's position in the same batch."""
        # PyTorch's Beta takes no generator, so numpy draws it from a seed that the generator draws.
        seed = int(torch.randint(2**62, (), generator=generator))
        shares = np.random.default_rng(seed).beta(self.mixup, self.mixup, self.steps_per_epoch).tolist()
        sizes = [len(part) for part in torch.split(torch.arange(len(self.train_set)), self.batch_size)]
        partner_of = torch.cat([torch.randperm(size, generator=generator) for size in sizes])
        return shares, partner_of.to(self.train_set.device)

    def step(self, batch: Batch, epoch: int) -> Step:
        logits_NC, features_ND = self.predict(batch.images)
        loss = F.cross_entropy(logits_NC.float(), batch.targets)
        return Step(loss, logits_NC, features_ND, batch.targets)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_ND = self.model.forward_features(images)
        return self.classifier(features_ND), features_ND
