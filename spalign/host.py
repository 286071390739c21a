"""The update of the class means where the host can read the batch without waiting for it: on the CPU, through numpy.

It does what :func:`spalign.functional.update_class_means_` does on any device, equal to rounding, but may size its work
by the labels, and a call of numpy costs a third of one of torch.

Shapes: N samples, C classes, D feature dimensions, K classes in the batch.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["all_usable", "all_within", "can_read", "update_class_means_"]

_Floats = NDArray[np.floating[Any]]
_Ints = NDArray[np.int64]

_PLAIN = (Tensor, nn.Parameter)
_IN_NUMPY = (torch.float32, torch.float64, torch.float16)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Up to this many elements, calls cost more than passing over memory does.
_FEW = 1 << 16
# Elements of a temporary: enough to hide the calls, few enough for the cache and for memory that the allocator has at
# hand (fresh pages cost more than the arithmetic).
_BLOCK = 1 << 18


def all_within(targets: Tensor, num_classes: int) -> bool:
    """Return whether integer labels on the CPU, at least one, all lie in [0, C)."""
    labels = targets.numpy()
    if labels.ndim != 1:
        labels = labels.reshape(-1)
    # Read as unsigned, negative labels are large, so the maximum says it all; argmax is how numpy finds it fastest.
    unsigned = labels.view(_UNSIGNED[labels.itemsize])
    return bool(unsigned[unsigned.argmax()] < num_classes)


def all_usable(targets: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Return whether targets can be read here, and are labels in [0, C) of which none is to be ignored."""
    if type(targets) is not Tensor or not targets.is_cpu or targets.is_floating_point() or targets.numel() == 0:
        return False
    return not 0 <= ignore_index < num_classes and all_within(targets, num_classes)


def can_read(features: Tensor) -> bool:
    """Return whether features are on the CPU and in a form that numpy has."""
    return type(features) in _PLAIN and features.is_cpu and features.dtype in _IN_NUMPY and not features.is_neg()


def update_class_means_(
    mean_CD: Tensor,
    weight_C: Tensor,
    mean_sum_D: Tensor | None,
    features: Tensor,
    labels_N: Tensor,
    momentum: float | None,
) -> Tensor | None:
    """Move class means in place by features (N, D) that numpy :func:`can_read`, N > 0, with int64 labels in [0, C).

    Returns the rate of each sample, (N,); or None, with nothing changed, if the features are not all finite.
    """
    mean, weight, labels = mean_CD.numpy(), weight_C.numpy(), labels_N.numpy()
    features = features.detach() if features.requires_grad else features
    h_ND = (features if features.dtype is mean_CD.dtype else features.to(mean_CD.dtype)).numpy()
    few = max(len(h_ND), len(mean)) * mean.shape[1] <= _FEW
    # Finite where all terms are, unless it overflows: then the general way looks again, row by row.
    if not math.isfinite(np.vdot(h_ND, h_ND)):
        return None
    if few:
        rate_N, row_ND = _rows_(mean, weight, h_ND, labels, momentum)
        mean_CD.index_add_(0, labels_N, torch.from_numpy(row_ND))
        if mean_sum_D is not None:
            np.add.reduce(mean, 0, np.float64, out=mean_sum_D.numpy())
    else:
        rate_N = _by_class_(mean, weight, mean_sum_D, h_ND, labels, momentum)
        if not mean_CD.is_inference():  # autograd has not seen numpy write
            torch.autograd.graph.increment_version(mean_CD)
    return torch.from_numpy(rate_N)


def _share(before: _Floats, count: _Ints, momentum: float | None) -> Any:
    """Return the share of the batch in the new mean, for classes of some weight before and a count in the batch > 0."""
    return count / (before + count) if momentum is None else np.where(before, momentum, 1.0)


def _rows_(
    mean: _Floats, weight: _Floats, h_ND: _Floats, labels: _Ints, momentum: float | None
) -> tuple[_Floats, _Floats]:
    """Count the batch in the weights, and return the rate of each sample and ``r (h - mean)``: a few cheap calls."""
    count_C = np.bincount(labels, minlength=len(mean))
    divisor_C = np.maximum(count_C, 1)
    known = np.count_nonzero(weight) == len(weight)
    share_C = momentum if known and momentum is not None else _share(weight, divisor_C, momentum)
    rate_N = (share_C / divisor_C).astype(mean.dtype).take(labels)
    weight += count_C
    row_ND = mean.take(labels, 0)
    np.subtract(h_ND, row_ND, out=row_ND)
    row_ND *= rate_N[:, None]
    return rate_N, row_ND


def _by_class_(
    mean: _Floats,
    weight: _Floats,
    mean_sum_D: Tensor | None,
    h_ND: _Floats,
    labels: _Ints,
    momentum: float | None,
) -> _Floats:
    """Move by ``n r (batch mean - mean)`` for each class in the batch: every sample, and every mean, is read once."""
    order_N = labels.argsort()
    sorted_N = labels[order_N]
    start_K = np.flatnonzero(np.concatenate(([True], sorted_N[1:] != sorted_N[:-1])))
    class_K = sorted_N[start_K]
    count_K = np.diff(start_K, append=len(labels))
    before_K = weight[class_K]
    part_K = _share(before_K, count_K, momentum).astype(mean.dtype)
    per_sample_K = (1.0 / count_K).astype(mean.dtype)
    rate_N = np.empty(len(labels), mean.dtype)
    rate_N[order_N] = np.repeat(part_K * per_sample_K, count_K)
    part_K1, order, start = (torch.from_numpy(x) for x in (part_K[:, None], order_N, start_K))
    features, per_sample_N = torch.from_numpy(h_ND), torch.from_numpy(np.repeat(per_sample_K, count_K))

    weight[class_K] = before_K + count_K
    step = max(1, _BLOCK // mean.shape[1])
    for k in range(0, len(class_K), step):
        classes = class_K[k : k + step]
        begin, end = int(start_K[k]), int(start_K[k + step]) if k + step < len(start_K) else len(labels)
        # Sums of rows without a copy of them.
        moved_KD = torch.embedding_bag(
            features, order[begin:end], start[k : k + step] - begin, per_sample_weights=per_sample_N[begin:end]
        )[0]
        before_KD = torch.from_numpy(mean.take(classes, 0))
        torch.lerp(before_KD, moved_KD, part_K1[k : k + step], out=moved_KD)
        mean[classes] = moved_KD.numpy()
        if mean_sum_D is not None:
            # What the means really moved by, not what they should have: see functional._update_from_rows_.
            mean_sum_D.add_(torch.sub(moved_KD, before_KD, out=before_KD).sum(0))
    return rate_N
