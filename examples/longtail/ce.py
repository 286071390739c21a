"""Baseline CE: one linear head, cross-entropy, instance-balanced batches.

Shapes: N images of a batch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .baseline import Baseline, Batch, Draws, Step
from .batches import ImageBatches
from .networks import CifarResNet


class CrossEntropy(Baseline):
    """Cross-entropy training of a CIFAR ResNet.

    Args:
        model: the network, on the device of the images.
        images: the training batches.
        frozen_head: leave the classifier at its initial values.
    """

    name = "ce"

    def __init__(self, model: CifarResNet, images: ImageBatches, *, frozen_head: bool = False) -> None:
        self.model: CifarResNet = model
        self.classifier = model.classifier
        self.images = images
        self.num_images, self.batch_size, self.device = len(images.images), images.batch_size, images.images.device
        if frozen_head:
            self.classifier.requires_grad_(False)

    def draw(self, generator: torch.Generator) -> Draws:
        return self.images.draw(generator)

    def batch(self, draws: Draws, positions_N: Tensor, step: Tensor) -> Batch:
        return self.images.batch(draws, positions_N, step)

    def loss(self, logits_NC: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of logits (N, C) float32 and class indices (N,) or soft labels (N, C)."""
        return F.cross_entropy(logits_NC, targets)

    def step(self, batch: Batch) -> Step:
        logits_NC, features_ND = self.predict(batch.images)
        return Step(self.loss(logits_NC.float(), batch.targets), logits_NC, features_ND, batch.targets)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_ND = self.model.forward_features(images)
        return self.classifier(features_ND), features_ND
