"""Baseline ARB: cross-entropy against the class prior, which is Balanced Softmax.

`-log(e^{z_y} / sum_j (n_j / n_y) e^{z_j})` is the cross-entropy of `z + log n`. The method counts the training set, as
the published ImageNet runs do and one of the two published CIFAR configurations; in the other n counts the classes of
the batch, so that classes absent from it are not pushed away.

Shapes: N images of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .baseline import Batch, batch_counts
from .ce import CrossEntropy
from .networks import LinearNet

# What the logit of a class of no images is moved by: its probability is 0 in float32, its product with 0 is not NaN.
_NONE = -1e9


def balanced_softmax(logits_NC: Tensor, targets: Tensor, counts_C: Tensor, *, clamp: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of `logits + log counts`.

    Args:
        logits_NC: (N, C) float32 or float64.
        targets: (N,) class indices or (N, C) soft labels.
        counts_C: (C,) images per class; 0 takes a class out of the denominator.
        clamp: limit logits to plus or minus this value first, which ends their gradients there; 0 for no limit.
    """
    if clamp:
        logits_NC = logits_NC.clamp(-clamp, clamp)
    prior_C = torch.where(counts_C > 0, counts_C.clamp(min=torch.finfo(counts_C.dtype).tiny).log(), _NONE)
    return F.cross_entropy(logits_NC + prior_C, targets)


class AttractionRepulsionBalanced(CrossEntropy):
    """ARB training; at test time the plain logits decide.

    Args:
        model: the network, on its device.
        counts: training images per class, or None to count each batch, as one published configuration does.
        clamp: as published 30; 0 for no limit.
    """

    name = "arb"

    def __init__(self, model: LinearNet, *, counts: Sequence[int] | None, clamp: float = 0.0) -> None:
        super().__init__(model)
        self.clamp = clamp
        device = self.classifier.weight.device
        self.counts_C = None if counts is None else torch.tensor(counts, dtype=torch.float32, device=device)

    def loss(self, logits_NC: Tensor, batch: Batch) -> Tensor:
        counts_C = batch_counts(batch, logits_NC.shape[1]) if self.counts_C is None else self.counts_C
        return balanced_softmax(logits_NC, batch.targets, counts_C, clamp=self.clamp)
