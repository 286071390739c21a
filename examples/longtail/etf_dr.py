"""Baseline ETF-DR: a fixed simplex as classifier, and a loss that only pulls features towards their vertex.

Shapes: N images of a batch, C classes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spalign import theory

from .baseline import Baseline, Batch, Step, batch_counts
from .networks import feature_dim


def simplex_etf(num_classes: int, dim: int) -> Tensor:
    """Return a simplex equiangular tight frame in a random position, from PyTorch's global generator.

    That of `spalign.theory`, turned by draws that follow from the run's seed.

    Returns:
        (C, D) float32: unit rows, every pair at the cosine -1 / (C - 1).

    Raises:
        ValueError: D < C - 1, where there is no such frame.
    """
    if num_classes < 2 or dim < num_classes - 1:
        raise ValueError(
            f"no simplex of {num_classes} classes fits into {dim} feature dimensions; it takes at least "
            f"{max(num_classes - 1, 1)} and two classes: use a wider network (--width 2 has 128)"
        )
    rotation = torch.linalg.qr(torch.randn(dim, num_classes - 1, dtype=torch.float64)).Q
    etf_CD: Tensor = theory.simplex_etf(num_classes, num_classes - 1) @ rotation.t()
    return etf_CD.to(torch.float32)


def dot_regression(features_ND: Tensor, etf_CD: Tensor, targets: Tensor, energy_C: Tensor) -> Tensor:
    """Return the dot-regression loss `1/(2N) sum_i E_y (<m_y, h_i> - |h_i|)^2 / |h_i|`, |h_i| taken as a constant.

    Args:
        features_ND: (N, D) float.
        etf_CD: (C, D) unit rows m_c.
        targets: (N,) class indices or (N, C) soft labels, over which the loss is averaged.
        energy_C: (C,) squared lengths of the classifier's vectors, E_W by class.
    """
    norm_N1 = features_ND.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
    loss_NC = 0.5 * energy_C * (features_ND @ etf_CD.t() - norm_N1).square() / norm_N1
    chosen = loss_NC.gather(1, targets[:, None]) if targets.ndim == 1 else loss_NC * targets
    loss: Tensor = chosen.sum() / len(targets)
    return loss


class EtfHead(nn.Module):
    """Batch normalisation, unit length, and a fixed simplex: the logits are cosines.

    The simplex is a buffer, so a checkpoint carries it.

    Args:
        num_classes, dim: C and D.
        unit_length: scale embedded features to unit length, as published for CIFAR; not for ImageNet.
    """

    weight: Tensor

    def __init__(self, num_classes: int, dim: int, *, unit_length: bool = True) -> None:
        super().__init__()
        self.unit_length = unit_length
        self.norm = nn.BatchNorm1d(dim)
        self.register_buffer("weight", simplex_etf(num_classes, dim))

    def embed(self, features_ND: Tensor) -> Tensor:
        """Return vectors (N, D) in the space that the simplex lies in."""
        embedded_ND: Tensor = self.norm(features_ND)
        return F.normalize(embedded_ND, eps=1e-8) if self.unit_length else embedded_ND

    def forward(self, embedded_ND: Tensor) -> Tensor:
        """Return the logits (N, C) of embedded features, cosines where these have unit length."""
        return F.linear(embedded_ND, self.weight)


class EtfNet(nn.Module):
    """A backbone and an `EtfHead`."""

    def __init__(self, backbone: nn.Module, num_classes: int, *, unit_length: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = EtfHead(num_classes, feature_dim(backbone), unit_length=unit_length)


class EtfDotRegression(Baseline):
    """ETF-DR training. Class means are of the vectors that the simplex is compared with.

    Args:
        model: the network, on its device.
        counts: what E_W balances: `"batch"`, classes within each batch, as published code does; training images per
            class; or None for E_W = 1, the printed loss.
        length_penalty: weight of the mean length of the embedded features; published for ImageNet, where nothing else
            bounds it: 0.01.
    """

    name = "etf-dr"

    def __init__(
        self, model: EtfNet, *, counts: Sequence[int] | str | None = "batch", length_penalty: float = 0.0
    ) -> None:
        self.model: EtfNet = model
        self.classifier: EtfHead = model.classifier
        self.length_penalty = length_penalty
        self.num_classes = len(model.classifier.weight)
        self.balance_batch = counts == "batch"
        device = model.classifier.weight.device
        self.energy_C = torch.ones(self.num_classes, device=device)
        if not (counts is None or isinstance(counts, str)):
            counts_C = torch.tensor(counts, dtype=torch.float32, device=device)
            self.energy_C = counts_C.mean() / counts_C  # 1 on average over the images

    def energy(self, batch: Batch) -> Tensor:
        """Return E_W by class, (C,): for a balanced batch N / (classes present * n_c)."""
        if not self.balance_batch:
            return self.energy_C
        counts_C = batch_counts(batch, self.num_classes)
        size = len(batch) if batch.counts is None else counts_C.sum()
        present_C = (counts_C > 0).float()
        return present_C * size / (present_C.sum() * counts_C.clamp(min=torch.finfo(torch.float32).tiny))

    def step(self, batch: Batch) -> Step:
        logits_NC, embedded_ND = self.predict(batch.images)
        # Squares of small differences: not a matter for half precision.
        with torch.autocast(embedded_ND.device.type, enabled=False):
            loss = dot_regression(embedded_ND.float(), self.classifier.weight, batch.targets, self.energy(batch))
            if self.length_penalty:
                loss = loss + self.length_penalty * embedded_ND.float().norm(dim=1).mean()
        return Step(loss, logits_NC, embedded_ND, batch.targets)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedded_ND = self.classifier.embed(self.model.backbone(images))
        return self.classifier(embedded_ND), embedded_ND
