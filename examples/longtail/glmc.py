"""Baseline GLMC: mixup and CutMix looks at pairs of images, two heads, and agreement between the looks.

Loader A is instance-balanced; loader B draws with replacement, class c with probability proportional to n_c^(1 - r).
One lambda per batch mixes each image of A with one of B, by mixup in the first look and by CutMix in the second.

`L = a_t (CE(fc(u), q_u) + CE(fc(v), q_v)) + (1 - a_t) (CE(fc_cb(u), w q_u) + CE(fc_cb(v), w q_v))
     + k (D(p_u, z_v) + D(p_v, z_u))`, with `a_t = 1 - (t/T)^2`, `D(p, z) = -mean cos(p, z)` and z without gradient,
and class weights `w_c = C n_c^-l / sum_j n_j^-l`. `fc_cb`, the rebalanced head, decides at test time.

Shapes: N images of a batch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .augment import ImageSet, draw_epoch
from .baseline import Baseline, Batch, Draws, Step
from .networks import Backbone


@dataclass(frozen=True)
class GlmcOptions:
    """Constants of the method.

    Attributes:
        resample: r, 0 draws loader B from the natural distribution, 1 class-balanced.
        label_weighting: l, the power of the class weights.
        contrast: k, the weight of the agreement term.
    """

    resample: float
    label_weighting: float
    contrast: float


def published_options(dataset: str, imbalance: float) -> GlmcOptions:
    """Return the README's constants for CIFAR at imbalance 100, 50 or 10, whichever is closest by ratio.

    There are none for 200: those of 100 stand in.
    """
    if dataset == "cifar10":
        return GlmcOptions(0.0, 1.2, 1.0) if imbalance > 22.4 else GlmcOptions(0.2, 1.0, 2.0)
    if imbalance > 70.7:
        return GlmcOptions(0.0, 1.2, 4.0)
    return GlmcOptions(0.2, 1.2, 6.0) if imbalance > 22.4 else GlmcOptions(0.2, 1.2, 4.0)


class GlmcNet(nn.Module):
    """A backbone with two linear classifiers, `conventional` (fc) and `rebalanced` (fc_cb), and two for agreement."""

    def __init__(self, num_classes: int, *, depth: int, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(depth, width)
        dim = self.backbone.feature_dim
        self.conventional = nn.Linear(dim, num_classes)
        self.rebalanced = nn.Linear(dim, num_classes)
        self.projection = nn.Linear(dim, dim // 2)
        self.prediction = nn.Linear(dim // 2, dim // 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)


def cut_mask(size: int, share: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return where CutMix pastes, (R, R) bool: a box of side `ceil(R sqrt(1 - share))`, clipped to the image.

    Args:
        size: R.
        share: lambda, one float.
        row, column: the middle of the box, one int64 each.
    """
    side = (size * (1.0 - share).sqrt()).ceil().long()
    place_R = torch.arange(size, device=share.device)

    def within(middle: Tensor) -> Tensor:
        first = middle - side // 2
        return (place_R >= first) & (place_R < first + side)

    return within(row)[:, None] & within(column)[None, :]


def weighted_cross_entropy(logits_NC: Tensor, targets_NC: Tensor, weight_C: Tensor) -> Tensor:
    """Return `-mean_i sum_c w_c q_ic log softmax(z_i)_c` of soft labels (N, C)."""
    return -(weight_C * targets_NC * logits_NC.log_softmax(1)).sum(1).mean()


def disagreement(predicted_NP: Tensor, projected_NP: Tensor) -> Tensor:
    """Return `-mean cos(p, z)` without gradient by z."""
    return -F.cosine_similarity(predicted_NP, projected_NP.detach(), dim=1).mean()


def class_weights(counts: Sequence[int], power: float) -> Tensor:
    """Return `C n_c^-power / sum_j n_j^-power`, (C,) float32."""
    scaled_C = torch.tensor(counts, dtype=torch.float64).pow(-power)
    return (len(counts) * scaled_C / scaled_C.sum()).float()


class Glmc(Baseline):
    """GLMC training of a CIFAR ResNet.

    The class means are of both looks, with the mixed labels as weights: within a batch, every image counts for the
    classes it shows by how much of it shows them. (Between batches the moving average gives every batch that shows a
    class the same say.) They are aligned with the rebalanced head, which predicts.

    Args:
        model: the network, on the device of the images.
        images: the training images.
        counts: training images per class.
        epochs: T.
        batch_size: of each loader.
        options: the method's constants.
        augment: random crop and flip, drawn anew for each of the four images behind a pair of looks.
        unadjusted_cutmix: label the second look by lambda even where its box was clipped, as published code does.
        aligned_head: which head class means are aligned with.
    """

    name = "glmc"

    def __init__(
        self,
        model: GlmcNet,
        images: ImageSet,
        counts: Sequence[int],
        *,
        epochs: int,
        batch_size: int,
        options: GlmcOptions,
        augment: bool = True,
        unadjusted_cutmix: bool = False,
        aligned_head: Literal["rebalanced", "conventional"] = "rebalanced",
    ) -> None:
        self.model: GlmcNet = model
        self.classifier: nn.Linear = model.rebalanced if aligned_head == "rebalanced" else model.conventional
        self.images = images
        self.epochs = epochs
        self.batch_size = batch_size
        self.options = options
        self.augment = augment
        self.unadjusted_cutmix = unadjusted_cutmix
        self.num_classes = len(counts)
        self.num_images, self.device = len(images), images.device
        self.conventional_share = torch.ones((), device=images.device)  # a_t
        self.weight_C = class_weights(counts, options.label_weighting).to(images.device)
        size_C = torch.tensor(counts, dtype=torch.float64)
        self.sampling_N = size_C[images.labels_N.cpu()].pow(-options.resample)

    def draw(self, generator: torch.Generator) -> Draws:
        images, n, device = self.images, self.num_images, self.device
        # The order of each loader, and crops for each of its looks.
        draws: Draws = {}
        for look in ("own_mixup", "own_cutmix", "other_mixup", "other_cutmix"):
            epoch = draw_epoch(n, images.padding, generator, device)
            draws |= {f"{look}_{name}": value for name, value in vars(epoch).items()}
        draws["own"] = draws["own_mixup_order"]
        draws["other"] = torch.multinomial(self.sampling_N, n, replacement=True, generator=generator).to(device)
        steps = self.steps_per_epoch
        draws["step_share"] = torch.rand(steps, generator=generator).to(device)
        draws["step_middle"] = torch.randint(images.resolution, (steps, 2), generator=generator).to(device)
        return draws

    def batch(self, draws: Draws, positions_N: Tensor, step: Tensor) -> Batch:
        images, share = self.images, draws["step_share"][step]

        def look(loader: str, kind: str) -> Tensor:
            index_N = draws[loader][positions_N]
            if not self.augment:
                return images.plain(index_N)
            crop = (draws[f"{loader}_{kind}_{name}"][positions_N] for name in ("top", "left", "flip"))
            return images.crops(index_N, *crop)

        own_NC, other_NC = (
            F.one_hot(images.labels_N[draws[loader][positions_N]], self.num_classes).float()
            for loader in ("own", "other")
        )
        mixed_N3RR = torch.lerp(look("other", "mixup"), look("own", "mixup"), share)
        row, column = draws["step_middle"][step].unbind(1)
        pasted_RR = cut_mask(images.resolution, share, row, column)
        cut_N3RR = torch.where(pasted_RR, look("other", "cutmix"), look("own", "cutmix"))
        cut_share = share if self.unadjusted_cutmix else 1.0 - pasted_RR.float().mean()
        second = Batch(cut_N3RR, torch.lerp(other_NC, own_NC, cut_share))
        return Batch(mixed_N3RR, torch.lerp(other_NC, own_NC, share), second)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.conventional_share.fill_(1.0 - (epoch / self.epochs) ** 2)

    def step(self, batch: Batch) -> Step:
        assert batch.second is not None
        model, conventional_share = self.model, self.conventional_share
        features, logits, projected, predicted, loss = [], [], [], [], torch.zeros((), device=self.images.device)
        for look in (batch, batch.second):
            features_ND = model.backbone(look.images)
            conventional_NC, rebalanced_NC = model.conventional(features_ND), model.rebalanced(features_ND)
            loss = loss + conventional_share * F.cross_entropy(conventional_NC.float(), look.targets)
            rebalanced = weighted_cross_entropy(rebalanced_NC.float(), look.targets, self.weight_C)
            loss = loss + (1.0 - conventional_share) * rebalanced
            projected.append(model.projection(features_ND))
            predicted.append(model.prediction(projected[-1]).float())
            features.append(features_ND)
            logits.append(rebalanced_NC)
        agreement = disagreement(predicted[0], projected[1].float()) + disagreement(predicted[1], projected[0].float())
        targets = torch.cat([batch.targets, batch.second.targets])
        return Step(loss + self.options.contrast * agreement, torch.cat(logits), torch.cat(features), targets)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_ND = self.model.backbone(images)
        return self.model.rebalanced(features_ND), features_ND
