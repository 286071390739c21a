"""What a baseline is: which head, which loss, which batches. Nothing in it knows about alignment.

Shapes: N images of a batch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Augmented images (N, 3, R, R) float32 with class indices (N,) int64 or soft labels (N, C) float32."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def split(self, parts: int) -> Sequence[Batch]:
        """Split into at most `parts` micro-batches of nearly equal size, none of them empty."""
        if parts == 1:
            return [self]
        pairs = zip(self.images.chunk(parts), self.targets.chunk(parts), strict=True)
        return [Batch(images, targets) for images, targets in pairs]


@dataclass(frozen=True)
class Step:
    """What one forward pass gives: the mean loss, logits (N, C), features (N, D) and their targets (N,) or (N, C)."""

    loss: Tensor
    logits: Tensor
    features: Tensor
    targets: Tensor


class Baseline(Protocol):
    """One training method.

    Attributes:
        name: for reports.
        steps_per_epoch: how many batches `batches` yields.
    """

    name: str
    steps_per_epoch: int

    @property
    def model(self) -> nn.Module:
        """Everything that is trained and saved."""

    @property
    def classifier(self) -> nn.Module:
        """The head that class means are aligned with: the one used at test time."""

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield the epoch's batches; all randomness comes from the CPU `generator`."""

    def step(self, batch: Batch, epoch: int) -> Step:
        """Run the model in training mode on a batch or micro-batch."""

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, C) and the classifier's features (N, D) of images (N, 3, R, R)."""
