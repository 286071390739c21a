"""Second stage MaxNorm: the test head alone is retrained on class-balanced losses, its rows limited in norm.

After LTR-weight-balancing, whose second stage GLMC's authors point to. The limit is fixed by the first stage,
`min_c |w_c| + 0.1 (max_c |w_c| - min_c |w_c|)`, and applied once per epoch; the bias has none.

Shapes: N images of a batch, C classes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .baseline import Baseline, Batch, Step
from .glmc import GlmcNet


def effective_weights(counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Return class weights proportional to `(1 - beta) / (1 - beta^n_c)`, (C,) float32, 1 on average."""
    counts_C = torch.tensor(counts, dtype=torch.float64)
    scaled_C = (1.0 - beta) / (1.0 - torch.pow(beta, counts_C))
    return (len(counts) * scaled_C / scaled_C.sum()).float()


def binary_cross_entropy(logits_NC: Tensor, labels_N: Tensor, weight_C: Tensor) -> Tensor:
    """Return the mean over N x C of `w_y (-q log p - (1 - q) log(1 - p))`, p the softmax of the logits, q one-hot."""
    probability_NC = logits_NC.softmax(1)
    one_hot_NC = F.one_hot(labels_N, logits_NC.shape[1]).to(logits_NC.dtype)
    entropy_NC = F.binary_cross_entropy(probability_NC, one_hot_NC, reduction="none")
    return (weight_C[labels_N, None] * entropy_NC).mean()


def norm_limit(weight_CD: Tensor, fraction: float = 0.1) -> Tensor:
    """Return the largest norm allowed, a scalar: `fraction` of the way from the smallest row's to the largest's."""
    norm_C = weight_CD.detach().norm(dim=1)
    limit: Tensor = norm_C.min() + fraction * (norm_C.max() - norm_C.min())
    return limit


def limit_norms_(weight_CD: Tensor, limit: Tensor) -> None:
    """Scale rows that are longer than the limit back to it, in place."""
    with torch.no_grad():
        norm_C1 = weight_CD.norm(dim=1, keepdim=True)
        weight_CD.mul_(torch.where(norm_C1 > limit, limit / norm_C1, torch.ones_like(norm_C1)))


class MaxNorm(Baseline):
    """MaxNorm on a network that GLMC has trained.

    Args:
        model: the trained network, on its device. All but its test head are frozen; the norm limit
            becomes one of its buffers, so that a checkpoint carries it.
        counts: training images per class.
        moving_statistics: let batch normalisation go on adapting, as published code does by leaving the frozen network
            in training mode.
    """

    name = "glmc-maxnorm"

    def __init__(self, model: GlmcNet, counts: Sequence[int], *, moving_statistics: bool = False) -> None:
        self.model: GlmcNet = model.requires_grad_(False)
        self.classifier: nn.Linear = model.rebalanced.requires_grad_(True)
        self.moving_statistics = moving_statistics
        self.weight_C = effective_weights(counts).to(self.classifier.weight.device)
        model.register_buffer("norm_limit", norm_limit(self.classifier.weight))

    def begin_epoch(self, epoch: int) -> None:
        self.model.train(self.moving_statistics)

    def step(self, batch: Batch) -> Step:
        logits_NC, features_ND = self.predict(batch.images)
        # A logarithm of probabilities, which autocast refuses to do in half precision.
        with torch.autocast(logits_NC.device.type, enabled=False):
            loss = binary_cross_entropy(logits_NC.float(), batch.targets, self.weight_C)
        return Step(loss, logits_NC, features_ND, batch.targets)

    def end_epoch(self) -> None:
        limit_norms_(self.classifier.weight, self.model.get_buffer("norm_limit"))

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_ND = self.model.backbone(images)
        return self.model.rebalanced(features_ND), features_ND

    def other_heads(self) -> dict[str, nn.Module]:
        return {"conventional head": self.model.conventional}
