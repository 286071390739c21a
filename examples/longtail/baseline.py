"""What a baseline is: which head, which loss, and what it does with a batch. Nothing in it knows about alignment.

Shapes: N images of a batch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Augmented images (N, 3, R, R) float32 with class indices (N,) int64 or soft labels (N, C) float32.

    Methods that look at every image twice have the other look in `second`, with labels of its own. `counts`, (C,)
    float32, are the images per class of the whole batch that this is a part of, before mixing; None if this is the
    whole batch.
    """

    images: Tensor
    targets: Tensor
    second: Batch | None = None
    counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def split(self, parts: int) -> Sequence[Batch]:
        """Split into at most `parts` micro-batches of nearly equal size, none of them empty."""
        if parts == 1:
            return [self]
        pairs = zip(self.images.chunk(parts), self.targets.chunk(parts), strict=True)
        split = [replace(self, images=images, targets=targets) for images, targets in pairs]
        if self.second is None:
            return split
        return [replace(one, second=other) for one, other in zip(split, self.second.split(parts), strict=True)]


@dataclass(frozen=True)
class Step:
    """What one forward pass gives: the mean loss, logits (N, C), features (N, D) and their targets (N,) or (N, C).

    With two looks at every image, logits, features and targets have the rows of both.
    """

    loss: Tensor
    logits: Tensor
    features: Tensor
    targets: Tensor


class Baseline(ABC):
    """One training method.

    Attributes:
        name: for reports.
        model: everything that is trained and saved.
        classifier: the head that class means are aligned with; its `weight` is (C, D).
    """

    name: str
    model: nn.Module
    classifier: nn.Module

    @abstractmethod
    def step(self, batch: Batch) -> Step:
        """Run the model in training mode on a batch or micro-batch."""

    @abstractmethod
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return test-time logits (N, C) and `classifier`'s features (N, D) of images (N, 3, R, R)."""

    def other_heads(self) -> dict[str, nn.Module]:
        """Return, by name, what else reads logits (N, C) off the features, though it does not predict."""
        return {}

    def begin_epoch(self, epoch: int) -> None:
        """Prepare the 0-based `epoch` of training: put the model into training mode, move schedules on."""
        self.model.train()

    def end_epoch(self) -> None:  # noqa: B027
        """Act on the model after an epoch of training, before it is evaluated."""


def batch_counts(batch: Batch, num_classes: int) -> Tensor:
    """Return how often each class occurs in a batch, (C,) float32; of mixed labels, in what they were mixed from.

    Partners are a permutation of the batch, so the columns of the soft labels add up to the counts before mixing.
    """
    if batch.counts is not None:
        return batch.counts
    targets = batch.targets
    if targets.ndim == 2:
        return targets.sum(0, dtype=torch.float32)
    counts_C = torch.zeros(num_classes, device=targets.device)
    return counts_C.index_add_(0, targets, torch.ones(len(targets), device=targets.device))
