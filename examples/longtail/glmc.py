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
from .baseline import Baseline, Batch, Step
from .batches import Batches, Draws
from .networks import feature_dim


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
    """A backbone with two linear classifiers, `conventional` (fc) and `rebalanced` (fc_cb), and two for agreement.

    These have `agreement_dim` outputs, half of D if not given: 128 on CIFAR. On ImageNet 256 are published.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, agreement_dim: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        dim = feature_dim(backbone)
        agreement_dim = agreement_dim or dim // 2
        self.conventional = nn.Linear(dim, num_classes)
        self.rebalanced = nn.Linear(dim, num_classes)
        self.projection = nn.Linear(dim, agreement_dim)
        self.prediction = nn.Linear(agreement_dim, agreement_dim)


def cut_mask(size: int, share: Tensor, row: Tensor, column: Tensor, *, even: bool = False) -> Tensor:
    """Return where CutMix pastes, (R, R) bool: a box of side `ceil(R sqrt(1 - share))`, clipped to the image.

    Args:
        size: R.
        share: lambda, one float.
        row, column: the middle of the box, one int64 each.
        even: odd sides are one shorter, as in published code, which goes half a side either way.
    """
    side = (size * (1.0 - share).sqrt()).ceil().long()
    if even:
        side = side // 2 * 2
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


@dataclass(frozen=True)
class Pairs:
    """What both looks of a batch are mixed from, in two augmented versions: one for mixup, one for CutMix.

    Attributes:
        own_mixup, own_cutmix: (N, 3, R, R) float images of loader A.
        other_mixup, other_cutmix: (N, 3, R, R) float images of loader B.
        own, other: (N,) int64, their classes.
    """

    own_mixup: Tensor
    own_cutmix: Tensor
    other_mixup: Tensor
    other_cutmix: Tensor
    own: Tensor
    other: Tensor


def mix_pairs(pairs: Pairs, num_classes: int, share: Tensor, middle_2: Tensor, *, unadjusted: bool = False) -> Batch:
    """Mix pairs of images into a batch of two looks with soft labels (N, C).

    Args:
        pairs: the images.
        num_classes: C.
        share: lambda, one float.
        middle_2: row and column of the middle of CutMix's box, two int64.
        unadjusted: label the second look by lambda, whatever was pasted of its even box, as published code does.
    """
    own_NC, other_NC = (F.one_hot(labels_N, num_classes).float() for labels_N in (pairs.own, pairs.other))
    mixed_N3RR = torch.lerp(pairs.other_mixup, pairs.own_mixup, share)
    row, column = middle_2.view(2, 1)
    pasted_RR = cut_mask(mixed_N3RR.shape[-1], share, row, column, even=unadjusted)
    cut_N3RR = torch.where(pasted_RR, pairs.other_cutmix, pairs.own_cutmix)
    cut_share = share if unadjusted else 1.0 - pasted_RR.float().mean()
    second = Batch(cut_N3RR, torch.lerp(other_NC, own_NC, cut_share))
    return Batch(mixed_N3RR, torch.lerp(other_NC, own_NC, share), second)


def sampling_weights(labels_N: Tensor, counts: Sequence[int], resample: float) -> Tensor:
    """Return what the chances of each image in loader B are proportional to, `n_y^-r`, (N,) float64 on the CPU."""
    return torch.tensor(counts, dtype=torch.float64)[labels_N.cpu()].pow(-resample)


class GlmcBatches(Batches):
    """Pairs of looks at images of loader A, each mixed with one of loader B.

    Args:
        images: the training images.
        counts: training images per class.
        batch_size: of each loader.
        resample: r.
        augment: random crop and flip, drawn anew for each of the four images behind a pair of looks.
        unadjusted_cutmix: see `mix_pairs`.
    """

    def __init__(
        self,
        images: ImageSet,
        counts: Sequence[int],
        *,
        batch_size: int,
        resample: float,
        augment: bool = True,
        unadjusted_cutmix: bool = False,
    ) -> None:
        super().__init__(images, batch_size)
        self.augment, self.unadjusted_cutmix, self.num_classes = augment, unadjusted_cutmix, len(counts)
        self.sampling_N = sampling_weights(images.labels_N, counts, resample)

    def draw(self, generator: torch.Generator) -> Draws:
        images, n, device = self.images, len(self), self.device
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
        images = self.images

        def look(loader: str, kind: str) -> Tensor:
            index_N = draws[loader][positions_N]
            if not self.augment:
                return images.plain(index_N)
            crop = (draws[f"{loader}_{kind}_{name}"][positions_N] for name in ("top", "left", "flip"))
            return images.crops(index_N, *crop)

        looks = (look(loader, kind) for loader in ("own", "other") for kind in ("mixup", "cutmix"))
        labels = (images.labels_N[draws[loader][positions_N]] for loader in ("own", "other"))
        return mix_pairs(
            Pairs(*looks, *labels),
            self.num_classes,
            draws["step_share"][step],
            draws["step_middle"][step],
            unadjusted=self.unadjusted_cutmix,
        )


class Glmc(Baseline):
    """GLMC training.

    The class means are of both looks, with the mixed labels as weights: within a batch, every image counts for the
    classes it shows by how much of it shows them. (Between batches the moving average gives every batch that shows a
    class the same say.) They are aligned with the rebalanced head, which predicts.

    Args:
        model: the network, on its device.
        counts: training images per class.
        epochs: T.
        options: the method's constants.
        aligned_head: which head class means are aligned with.
    """

    name = "glmc"

    def __init__(
        self,
        model: GlmcNet,
        counts: Sequence[int],
        *,
        epochs: int,
        options: GlmcOptions,
        aligned_head: Literal["rebalanced", "conventional"] = "rebalanced",
    ) -> None:
        self.model: GlmcNet = model
        self.classifier: nn.Linear = model.rebalanced if aligned_head == "rebalanced" else model.conventional
        self.epochs = epochs
        self.options = options
        device = self.classifier.weight.device
        self.conventional_share = torch.ones((), device=device)  # a_t
        self.weight_C = class_weights(counts, options.label_weighting).to(device)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.conventional_share.fill_(1.0 - (epoch / self.epochs) ** 2)

    def step(self, batch: Batch) -> Step:
        assert batch.second is not None
        model, conventional_share = self.model, self.conventional_share
        features, logits, projected, predicted, loss = [], [], [], [], torch.zeros((), device=batch.images.device)
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

    def other_heads(self) -> dict[str, nn.Module]:
        return {"conventional head": self.model.conventional}
