"""Baseline CE: one linear head, cross-entropy, instance-balanced batches.

Shapes: N images of a batch, C classes, D feature dimensions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .baseline import Baseline, Batch, Step
from .networks import LinearNet


class CrossEntropy(Baseline):
    """Cross-entropy training.

    Args:
        model: the network.
        frozen_head: leave the classifier at its initial values.
    """

    name = "ce"

    def __init__(self, model: LinearNet, *, frozen_head: bool = False) -> None:
        self.model: LinearNet = model
        self.classifier: nn.Linear = model.classifier
        if frozen_head:
            self.classifier.requires_grad_(False)

    def loss(self, logits_NC: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch with logits (N, C) float32."""
        return F.cross_entropy(logits_NC, batch.targets)

    def step(self, batch: Batch) -> Step:
        logits_NC, features_ND = self.predict(batch.images)
        return Step(self.loss(logits_NC.float(), batch), logits_NC, features_ND, batch.targets)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_ND = self.model.forward_features(images)
        return self.classifier(features_ND), features_ND
