"""What every step does, where the host can read tensors without waiting for them: on the CPU, through numpy.

The update of the class means and, for few elements, the regularizer. They do what :mod:`spalign.functional` does on any
device, equal to rounding, but may size their work by the values, and a call of numpy costs a third of one of torch.

Shapes: N samples, C classes, D feature dimensions, K classes in the batch.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["alignment_terms", "all_usable", "all_within", "can_align", "can_read", "update_class_means_"]

_Floats = NDArray[np.floating[Any]]
_Ints = NDArray[np.int64]

_PLAIN = (Tensor, nn.Parameter)
_IN_NUMPY = (torch.float32, torch.float64, torch.float16)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Up to this many elements, calls cost more than passing over memory does.
_FEW = 1 << 16
# Samples to add up one after the other in float32: roundings of many that are alike do not average out, and the mean of
# a million pixels of a collapsed class would be off by 0.3 %.
MOST_IN_A_ROW = 1 << 12
# Elements of a temporary: enough to hide the calls, few enough for the cache and for memory that the allocator has at
# hand (fresh pages cost more than the arithmetic).
_BLOCK = 1 << 18


class _Info:
    """Constants of a dtype of the maths, as its scalars: a Python float would do, but numpy looks it up each time."""

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        info = np.finfo(dtype)
        self.scalar, self.one, self.tiny = dtype, dtype(1.0), info.tiny
        self.least = dtype((16.0 * float(info.eps)) ** 2)
        # Beyond, the square of the norm overflows, or rounding could make it.
        self.most = info.max


_INFO = {torch.float32: _Info(np.float32), torch.float64: _Info(np.float64)}


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
    if torch._C._are_functorch_transforms_active():  # their wrappers are of type Tensor and hold nothing
        return False
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
    few = max(len(h_ND), len(mean)) * mean.shape[1] <= _FEW and len(h_ND) <= MOST_IN_A_ROW
    # Finite where all terms are, unless it overflows: then the general way looks again, row by row.
    if not math.isfinite(np.vdot(h_ND, h_ND)):
        return None
    if few:
        rate_N, row_ND = _rows_(mean, weight, h_ND, labels, momentum)
        mean_CD.index_add_(0, labels_N, torch.from_numpy(row_ND))
        if mean_sum_D is not None:
            np.add.reduce(mean, 0, np.float64, out=mean_sum_D.numpy())
    else:
        rate_N = _by_class_(mean_CD, weight, mean_sum_D, h_ND, labels, momentum)
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
    mean_CD: Tensor,
    weight: _Floats,
    mean_sum_D: Tensor | None,
    h_ND: _Floats,
    labels: _Ints,
    momentum: float | None,
) -> _Floats:
    """Move by ``n r (batch mean - mean)`` for each class in the batch: every sample, and every mean, is read once."""
    mean = mean_CD.numpy()
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
    part_K1, order = torch.from_numpy(part_K[:, None]), torch.from_numpy(order_N)
    features, per_sample_N = torch.from_numpy(h_ND), torch.from_numpy(np.repeat(per_sample_K, count_K))

    weight[class_K] = before_K + count_K
    step = max(1, _BLOCK // mean.shape[1])
    one_each = torch.arange(min(step, len(class_K)))
    for k in range(0, len(class_K), step):
        classes = class_K[k : k + step]
        begin, end = int(start_K[k]), int(start_K[k + step]) if k + step < len(start_K) else len(labels)
        # Sums of rows without a copy of them.
        first_K = start_K[k : k + step] - begin
        bags = first_K
        if end - begin > MOST_IN_A_ROW:
            bags = np.union1d(first_K, np.arange(0, end - begin, MOST_IN_A_ROW))
        moved_KD = torch.embedding_bag(
            features, order[begin:end], torch.from_numpy(bags), per_sample_weights=per_sample_N[begin:end]
        )[0]
        if len(bags) > len(first_K):
            sums, place_K = moved_KD.numpy(), np.searchsorted(bags, first_K)
            moved = sums.take(place_K, 0)
            bags_K = np.diff(place_K, append=len(bags))
            for j in np.flatnonzero(bags_K > 1):
                moved[j] = sums[place_K[j] : place_K[j] + bags_K[j]].sum(0, np.float64)
            moved_KD = torch.from_numpy(moved)
        # Sums of one row each: unlike take, it fetches rows ahead, which of many classes are not in the cache.
        before_KD = torch.embedding_bag(mean_CD, torch.from_numpy(classes), one_each[: len(classes)])[0]
        torch.lerp(before_KD, moved_KD, part_K1[k : k + step], out=moved_KD)
        mean[classes] = moved_KD.numpy()
        if mean_sum_D is not None:
            # What the means really moved by, not what they should have: see functional._update_from_rows_.
            mean_sum_D.add_(torch.sub(moved_KD, before_KD, out=before_KD).sum(0))
    return rate_N


def _dots(x_CD: _Floats, y_CD: _Floats) -> _Floats:
    """Return the dot product of each pair of rows; einsum tells nobody of overflow, which is looked for afterwards."""
    dots_C: _Floats = np.einsum("ij,ij->i", x_CD, y_CD)
    return dots_C


def can_align(weight_CD: Tensor, mean_CD: Tensor, center_D: Tensor) -> bool:
    """Return whether :func:`alignment_terms` takes these, and is the shorter way: few elements, all of one dtype."""
    if type(weight_CD) not in _PLAIN or type(mean_CD) is not Tensor or mean_CD.requires_grad:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if weight_CD.dtype not in _INFO or not weight_CD.dtype is mean_CD.dtype is center_D.dtype:
        return False
    return 0 < weight_CD.numel() <= _FEW and weight_CD.is_cpu and mean_CD.is_cpu and not weight_CD.is_neg()


def alignment_terms(
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    center_D: Tensor,
    rate_N: Tensor | None,
    labels_N: Tensor | None,
    *,
    by_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Return the regularizer, its gradient by the weight (C, D) and that by the features (N, D), where asked for.

    Names and formulas are those of :func:`spalign.functional.alignment_loss`. None, if any class has no direction, or
    if rates come without labels.
    """
    if (rate_N is not None and labels_N is None) or not seen_C.numpy().all():
        return None
    # A copy: what numpy has looked at can no longer be resized, and FSDP2 frees gathered parameters by that.
    w_CD, mean, center = weight_CD.detach().clone().numpy(), mean_CD.numpy(), center_D.numpy()
    info = _INFO[weight_CD.dtype]
    d_CD = mean - center
    dd_C, ww_C, wd_C = _dots(d_CD, d_CD), _dots(w_CD, w_CD), _dots(w_CD, d_CD)
    # Not a number is in no interval.
    if not (info.least * np.vdot(center, center) + info.tiny < dd_C.min() and dd_C.max() < info.most):
        return None
    if not (info.tiny < ww_C.min() and ww_C.max() < info.most):
        return None
    part = info.one / info.scalar(len(w_CD))
    inv_w_C, inv_d_C = info.one / np.sqrt(ww_C), info.one / np.sqrt(dd_C)
    b_C = inv_w_C * inv_d_C
    cos_C = (wd_C * b_C).clip(-1.0, 1.0)
    loss = np.multiply((info.one - cos_C).sum(keepdims=True), part).reshape(())
    b_C *= part
    cos_C *= part
    by_w_CD = by_h_ND = None
    if by_weight:
        by_w_CD = w_CD * (cos_C * inv_w_C * inv_w_C)[:, None]
        by_w_CD -= d_CD * b_C[:, None]
    if labels_N is not None and rate_N is not None:
        e_CD = np.multiply(d_CD, (cos_C * inv_d_C * inv_d_C)[:, None], out=d_CD)
        e_CD -= w_CD * b_C[:, None]
        e_CD -= e_CD.sum(0) * part
        by_h_ND = e_CD.take(labels_N.numpy(), 0)
        by_h_ND *= rate_N.numpy()[:, None]
    by_weight_CD, by_features_ND = (None if x is None else torch.from_numpy(x) for x in (by_w_CD, by_h_ND))
    return torch.from_numpy(loss), by_weight_CD, by_features_ND
