"""Class means, alignment loss, rotation and gradient projection as functions of tensors.

No modules, no process groups, no host synchronisation. Every function takes its state as arguments; those whose names
end in an underscore write into it, all others are pure. The classes of :mod:`spalign` are thin wrappers.

Shapes: N samples, C classes, D feature dimensions. ``h_ND`` features, ``w_CD`` classifier rows, ``mu_CD`` class means,
``mu_G`` the mean of the class means over the classes seen so far (``center_D``), ``d_CD = mu_CD - mu_G``. A hat is a
unit vector. Inputs may be float16, bfloat16, float32 or float64; the maths is float32, or float64 where the weight, the
means or the features being averaged into float64 means are.

Derivatives are :mod:`torch.autograd`'s, of first order. Of :mod:`torch.func`, ``vmap`` of the pure functions works,
where an update's state has the dimension that its features or targets have; its derivatives raise ``RuntimeError``.

Equation numbers are those of *Space Alignment Matters*; where the printed formula is wrong the docstring says so.
"""

import contextlib
import math
import numbers
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spalign import host, kernels

__all__ = [
    "BatchShare",
    "RotatedRows",
    "alignment",
    "alignment_loss",
    "alignment_loss_and_grad",
    "attach_features",
    "class_statistics",
    "cosine_schedule",
    "directions",
    "global_mean",
    "project_gradient",
    "slerp",
    "update_class_means",
    "update_class_means_",
]

Radial = Literal["paper", "keep"]

# Rows closer than this to the antipode of their target have no unique shortest path (radians).
_ANTIPODAL_MARGIN = 1e-3
# Below this angle sin(a t) / sin(t) is replaced by its limit a; the relative error is t^2 / 6 < 2e-9 (radians).
_LERP_ANGLE = 1e-4

# ----------------------------------------------------------------------------------------------------------------------
# Class means
# ----------------------------------------------------------------------------------------------------------------------


class BatchShare(NamedTuple):
    """How far each sample of a batch moved each class mean: ``d mu'_c / d h_i``.

    Attributes:
        rate: (N,) for class indices, the derivative of its own class's mean; (N, C) for soft labels.
        labels: (N,) int64 class of each sample, 0 where the rate is 0; ``None`` for soft labels.
    """

    rate: Tensor
    labels: Tensor | None

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return the share as tensors that are no inputs, as a node of a graph must; labels (N, 0) stand for none."""
        if self.labels is None:
            # In the one layout that is promised: the general way keeps that of the soft labels, kernels do not.
            return self.rate.contiguous(), self.rate.new_empty(len(self.rate), 0, dtype=torch.int64)
        return self.rate, self.labels.clone()

    @classmethod
    def of_outputs(cls, rate: Tensor, labels: Tensor) -> "BatchShare":
        """Return the share that :meth:`outputs` came from."""
        return cls(rate, None if labels.ndim == 2 else labels)

    def pull_back(self, grad_CD: Tensor) -> Tensor:
        """Turn a gradient by the new means, (C, D), into one by the features, (N, D)."""
        if self.labels is None:
            with _no_autocast(grad_CD):
                return self.rate.to(grad_CD.dtype) @ grad_CD  # a float64 classifier may meet float32 means
        return grad_CD.index_select(0, self.labels) * self.rate.unsqueeze(1)


class _Batch(NamedTuple):
    """Features and labels in one form: sample weights instead of special values.

    h_ND in the dtype of the maths; labels_N int64 and weight_N in {0, 1} for class indices, or labels None and
    weight_NC >= 0 for soft labels. Samples to pass over weigh 0; their features may hold anything.
    """

    h: Tensor
    weight: Tensor
    labels: Tensor | None


def _is_number_in(value: object, low: float, high: float) -> bool:
    """Return whether ``value`` is a number, not a string or tensor of one, in [low, high]; NaN is in no interval."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) <= high


def _is_count(value: object, least: int) -> bool:
    """Return whether ``value`` is an integer of at least ``least``, numpy's included, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _check_rows(mean_CD: Tensor, seen_C: Tensor, *rows_CD: Tensor, center_D: Tensor | None = None) -> None:
    """Raise ValueError unless all describe the same classes: shapes that broadcast would give wrong values."""
    shape = mean_CD.shape
    if (
        len(shape) != 2
        or seen_C.shape != shape[:1]
        or seen_C.dtype is not torch.bool
        or (center_D is not None and center_D.shape != shape[1:])
        or any(rows.shape != shape for rows in rows_CD)
    ):
        center = "" if center_D is None else f", center_D {tuple(center_D.shape)}"
        raise ValueError(
            f"mean_CD has shape {tuple(shape)}, seen_C {tuple(seen_C.shape)} and dtype {seen_C.dtype}{center}, "
            f"the other tensors {', '.join(str(tuple(rows.shape)) for rows in rows_CD) or 'none'}; expected (C, D) for "
            "means, classifier rows and gradients, (C,) bool for seen_C and (D,) for center_D: one row per class "
            "(transpose a (D, C) weight; weight_C > 0 says which classes are seen)"
        )


def _check_batch(features: Tensor, targets: Tensor, num_classes: int, feature_dim: int | None = None) -> None:
    """Raise ValueError unless features are (N, D) floats and targets class indices (N,) or soft labels (N, C)."""
    shape, soft = features.shape, targets.is_floating_point()
    if len(shape) != 2 or not features.is_floating_point() or feature_dim not in (None, shape[1]):
        raise ValueError(
            f"features have shape {tuple(shape)} and dtype {features.dtype}, expected (N, {feature_dim or 'D'}) and a "
            "float dtype; of dense predictions pass features.movedim(1, -1).flatten(0, -2)"
        )
    expected = (shape[0], num_classes) if soft else (shape[0],)
    if targets.shape != expected or targets.dtype is torch.bool or targets.is_complex():
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}, expected {expected}: class indices "
            "as integers (N,), or soft labels as floats (N, C)"
        )


def _math_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast for the device of ``x``; free where it is off already."""
    # Asked of the meta device, is_autocast_enabled raises.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _is_finite(x: Tensor) -> Tensor:
    """:func:`torch.isfinite` in half its operations: inf - inf is nan, and nan is not itself."""
    difference = x - x
    return difference == difference


def _parse_batch(features: Tensor, targets: Tensor, num_classes: int, ignore_index: int, dtype: torch.dtype) -> _Batch:
    h_ND = features.to(dtype)
    # Finite exactly where every entry is, unless it overflows: nothing could be aligned to such a row, and within this
    # bound neither sums of rows nor differences can overflow and stay in the means for good (pitfall D3).
    squared_N = _dots(h_ND, h_ND)
    usable_N = _is_finite(squared_N)
    if not targets.is_floating_point():
        labels_N = targets.long()  # num_classes may not fit into uint8
        usable_N = usable_N & (labels_N >= 0) & (labels_N < num_classes)
        if 0 <= ignore_index < num_classes:
            usable_N = usable_N & (labels_N != ignore_index)
        return _Batch(h_ND, usable_N.to(dtype), torch.where(usable_N, labels_N, 0))
    # A row's floor is what label smoothing spreads over every class; it says nothing of the class, so it is subtracted
    # and the rest rescaled to the row's sum (pitfall D8). What a uniform row leaves is rounding noise: it weighs 0.
    q_NC = targets.to(dtype)
    total_N = q_NC.sum(1)
    excess_NC = q_NC - q_NC.amin(1, keepdim=True)
    excess_N = excess_NC.sum(1)
    usable_N = torch.isfinite(total_N * total_N * squared_N) & (total_N > 0) & (excess_N > 1e-6 * total_N)
    scale_N = torch.where(usable_N, total_N / torch.where(usable_N, excess_N, 1.0), 0.0)
    weight_NC = excess_NC.nan_to_num_(0.0, 0.0, 0.0) * scale_N.unsqueeze(1)
    # What a softmax leaves of a hopeless class is too little to divide by.
    least = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    return _Batch(h_ND, weight_NC.masked_fill_(weight_NC < least, 0.0), None)


def _batch_statistics(batch: _Batch, num_classes: int) -> tuple[Tensor, Tensor]:
    h_ND = torch.nan_to_num(batch.h, 0.0, 0.0, 0.0)
    if batch.labels is None:
        with _no_autocast(h_ND):
            return batch.weight.t() @ h_ND, batch.weight.sum(0)
    h_ND = h_ND.mul_(batch.weight.unsqueeze(1))
    labels_N, parts = batch.labels, max(1, -(-len(h_ND) // max(host.MOST_IN_A_ROW, num_classes)))
    if parts > 1:  # each adds up in rows of its own
        labels_N = labels_N + num_classes * (torch.arange(len(h_ND), device=h_ND.device) * parts // len(h_ND))
    sum_CD = h_ND.new_zeros(parts * num_classes, h_ND.shape[1]).index_add_(0, labels_N, h_ND)
    weight_C = h_ND.new_zeros(parts * num_classes).index_add_(0, labels_N, batch.weight)
    if parts > 1:
        sum_CD = sum_CD.view(parts, num_classes, -1).sum(0, dtype=torch.float64).to(h_ND.dtype)
        weight_C = weight_C.view(parts, num_classes).sum(0, dtype=torch.float64).to(h_ND.dtype)
    return sum_CD, weight_C


def class_statistics(
    features: Tensor, targets: Tensor, num_classes: int, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Sum the features of each class and count them.

    ``sum_c = sum_i q_ic h_i`` and ``weight_c = sum_i q_ic`` with q one-hot for class indices. Linear in the samples, so
    the results of parts of a batch add up: this is what ranks all-reduce.

    Args:
        features: (N, D), any float dtype.
        targets: (N,) integer class indices, or (N, C) float soft labels, of which each row's floor is ignored.
        num_classes: C.
        ignore_index: label of samples to pass over. Labels outside [0, C) and rows with a non-finite value are too.

    Returns:
        sums (C, D) and weights (C,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> h = torch.tensor([[1., 0.], [3., 0.], [0., 5.]])
        >>> sums, weights = class_statistics(h, torch.tensor([0, 0, 1]), 3)
        >>> sums.tolist(), weights.tolist()
        ([[4.0, 0.0], [0.0, 5.0], [0.0, 0.0]], [2.0, 1.0, 0.0])
    """
    _check_batch(features, targets, num_classes)
    batch = _parse_batch(features, targets, num_classes, ignore_index, _math_dtype(features))
    return _batch_statistics(batch, num_classes)


def _update_from_statistics_(
    mean_CD: Tensor,
    weight_C: Tensor,
    sum_CD: Tensor,
    batch_weight_C: Tensor,
    momentum: float | None,
    mean_sum_D: Tensor | None,
) -> Tensor:
    """Move class means in place by a batch given as sums and weights, O(C D). Return the rates r_C."""
    tiny = torch.finfo(mean_CD.dtype).tiny  # a divisor for classes not in the batch, which have 0 for a dividend
    divisor_C = batch_weight_C.clamp(min=tiny)
    if momentum is None:
        weight_C.add_(batch_weight_C)
        part_C = batch_weight_C / weight_C.clamp(min=tiny)
    else:
        # The share of the batch in the mean: momentum, or momentum^0 for a new class; 0 where there is none.
        part_C = torch.pow(momentum, weight_C.sign()).mul_(batch_weight_C.sign())
        weight_C.add_(batch_weight_C)
    # lerp keeps every bit at 0 and copies at 1.
    mean_CD.lerp_(sum_CD.div_(divisor_C.unsqueeze(1)), part_C.unsqueeze(1))
    if mean_sum_D is not None:
        torch.sum(mean_CD, 0, dtype=mean_sum_D.dtype, out=mean_sum_D)
    return part_C.div_(divisor_C)


def _update_from_rows_(
    mean_CD: Tensor,
    weight_C: Tensor,
    batch: _Batch,
    labels_N: Tensor,
    momentum: float | None,
    mean_sum_D: Tensor | None,
    *,
    same_bits: bool = False,
) -> Tensor:
    """Move class means in place by the samples of a batch with class indices, O(N D). Return the rates r_N.

    ``same_bits`` makes the result a function of the arguments to the last bit, as ranks that repeat each other's
    work need; an accelerator adds up a class's samples in any order otherwise.
    """
    # n_c of each sample's class: sums of ones are exact, so the order of the additions does not matter. They are
    # added up where the class's weight was, because added to it they would stall at 2^24 in float32; then all samples
    # of a class write the same new weight.
    before_N = weight_C.index_select(0, labels_N)
    count_N = weight_C.index_fill_(0, labels_N, 0.0).index_add_(0, labels_N, batch.weight).index_select(0, labels_N)
    after_N = before_N + count_N
    weight_C.index_copy_(0, labels_N, after_N)
    # A usable sample counts itself; where none is, the weight of 0 decides.
    part_N = batch.weight / count_N.clamp(min=1.0)
    if momentum is None:
        rate_N = batch.weight / after_N.clamp(min=1.0)
    else:
        rate_N = part_N * torch.pow(momentum, before_N.sign())

    # One block of memory for both: on the CPU, asking for it afresh costs more than the arithmetic.
    before_ND, row_ND = mean_CD.new_empty(2, *batch.h.shape).unbind()
    torch.index_select(mean_CD, 0, labels_N, out=before_ND)
    torch.sub(batch.h, before_ND, out=row_ND)
    row_ND.nan_to_num_(0.0, 0.0, 0.0).mul_(rate_N.unsqueeze(1))
    if same_bits and mean_CD.device.type != "cpu":
        mean_CD.index_put_((labels_N,), row_ND, accumulate=True)  # sorts, where index_add_ would race
    else:
        mean_CD.index_add_(0, labels_N, row_ND)
    if mean_sum_D is not None:
        # What the means really moved by, not what they should have: a mean that has converged stops a rounding error
        # short, and adding up the steps it did not take would drift without bound.
        torch.index_select(mean_CD, 0, labels_N, out=row_ND).sub_(before_ND)
        with _no_autocast(mean_CD):
            mean_sum_D.add_(torch.mv(row_ND.t(), part_N))
    return rate_N


def update_class_means_(
    mean_CD: Tensor,
    weight_C: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    momentum: float | None = 0.1,
    ignore_index: int = -100,
    mean_sum_D: Tensor | None = None,
) -> BatchShare:
    """Move class means towards a batch, in place.

    ``mean[y_i] += r[y_i] (h_i - mean[y_i])`` with ``r_c = 1 / (N_c + n_c)`` (cumulative), ``momentum / n_c`` (EMA) or
    ``1 / n_c`` (first observation of a class), n_c the batch weight of the class and N_c its weight before. For class
    indices the cost is O(N D) whatever C is; soft labels cost O(N C D).

    Args:
        mean_CD: (C, D) float32 or float64, written. Rows of unseen classes are zero.
        weight_C: (C,) total sample weight, same dtype, written; 0 marks an unseen class.
        features: (N, D), any float dtype.
        targets: (N,) integer class indices, or (N, C) float soft labels, of which each row's floor is ignored.
        momentum: weight of the new value as in BatchNorm; ``None`` for the exact cumulative mean.
        ignore_index: label of samples to pass over. Labels outside [0, C) and rows with a non-finite value are too.
        mean_sum_D: (D,) float64 sum of the class means, written; what makes the global mean cheap.

    Returns:
        How far each sample moved its class mean, which is the derivative of the new means by the features.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> mean, weight = torch.zeros(2, 1), torch.zeros(2)
        >>> for h in (1., 2., 6.):
        ...     _ = update_class_means_(mean, weight, torch.tensor([[h]]), torch.tensor([1]), momentum=None)
        >>> mean.tolist(), weight.tolist()
        ([[0.0], [3.0]], [0.0, 3.0])
    """
    if (
        len(mean_CD.shape) != 2
        or weight_C.shape != mean_CD.shape[:1]
        or (mean_sum_D is not None and mean_sum_D.shape != mean_CD.shape[1:])
    ):
        total = "" if mean_sum_D is None else f", mean_sum_D {tuple(mean_sum_D.shape)}"
        raise ValueError(
            f"mean_CD has shape {tuple(mean_CD.shape)}, weight_C {tuple(weight_C.shape)}{total}; expected (C, D), (C,) "
            "and (D,)"
        )
    _check_batch(features, targets, *mean_CD.shape)
    return _absorb_batch_(mean_CD, weight_C, mean_sum_D, features, targets, momentum, ignore_index)


def _absorb_batch_(
    mean_CD: Tensor,
    weight_C: Tensor,
    mean_sum_D: Tensor | None,
    features: Tensor,
    targets: Tensor,
    momentum: float | None,
    ignore_index: int,
    usable: bool | None = None,
) -> BatchShare:
    """:func:`update_class_means_`; ``usable`` says whether all targets are labels to take in, if that is known."""
    if torch.compiler.is_compiling():
        mean_sum_D = mean_CD.new_zeros(mean_CD.shape[1]) if mean_sum_D is None else mean_sum_D
        arguments = (mean_CD, weight_C, mean_sum_D, features.detach(), targets.detach(), momentum, ignore_index)
        return BatchShare.of_outputs(*_opaque_update(*arguments))
    state, num_classes = (mean_CD, weight_C, mean_sum_D), len(mean_CD)
    if host.can_read(features):
        if usable is None:
            usable = host.all_usable(targets, num_classes, ignore_index)
        if usable:
            labels_N = targets.long()
            rate_N = host.update_class_means_(*state, features, labels_N, momentum)
            if rate_N is not None:
                return BatchShare(rate_N, labels_N)
    if kernels.can_update(*state, features, targets):
        return BatchShare(*kernels.update_class_means_(*state, features, targets, momentum, ignore_index))
    with torch.no_grad():
        batch = _parse_batch(features.detach(), targets, num_classes, ignore_index, mean_CD.dtype)
        if batch.labels is not None and len(batch.labels) < num_classes:
            rate_N = _update_from_rows_(mean_CD, weight_C, batch, batch.labels, momentum, mean_sum_D)
            return BatchShare(rate_N, batch.labels)
        # For no more classes than samples this is the shorter way.
        sum_CD, batch_weight_C = _batch_statistics(batch, num_classes)
        rate_C = _update_from_statistics_(mean_CD, weight_C, sum_CD, batch_weight_C, momentum, mean_sum_D)
        return _share_of_rates(batch, rate_C)


def _share_of_rates(batch: _Batch, rate_C: Tensor) -> BatchShare:
    """Return what a batch's samples have of the rates of their classes."""
    if batch.labels is None:
        return BatchShare(batch.weight * rate_C, None)
    return BatchShare(rate_C.index_select(0, batch.labels).mul_(batch.weight), batch.labels)


@torch.library.custom_op("spalign::update_class_means", mutates_args=("mean", "weight", "mean_sum"))
def _opaque_update(
    mean: Tensor,
    weight: Tensor,
    mean_sum: Tensor,
    features: Tensor,
    targets: Tensor,
    momentum: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The update as one node of a compiled graph.

    Written out, a compiled training step may recompute in backward what the loss read of the state, from buffers that
    the update has changed by then: silently wrong gradients.
    """
    return _absorb_batch_(mean, weight, mean_sum, features, targets, momentum, ignore_index).outputs()


def _empty_outputs(
    mean: Tensor, weight: Tensor, mean_sum: Tensor, features: Tensor, targets: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes of :meth:`BatchShare.outputs`, for nodes whose arguments begin like these."""
    rate = mean.new_empty(targets.shape)
    return rate, targets.new_empty((len(targets), 0) if rate.ndim == 2 else len(targets), dtype=torch.int64)


_opaque_update.register_fake(_empty_outputs)


def update_class_means(
    mean_CD: Tensor,
    weight_C: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    momentum: float | None = 0.1,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Return the class means and weights after a batch; differentiable by the features.

    The pure form of :func:`update_class_means_`, with its arguments; the gradient reaches the features through
    ``mu'_c = mu_c + r_c sum_i (h_i - mu_c)`` and never the stored means.

    Returns:
        means (C, D) and weights (C,).

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> h = torch.tensor([[2., 4.]], requires_grad=True)
        >>> means, weights = update_class_means(torch.ones(1, 2), torch.ones(1), h, torch.tensor([0]), momentum=0.5)
        >>> means.tolist(), torch.autograd.grad(means.sum(), h)[0].tolist()
        ([[1.5, 2.5]], [[0.5, 0.5]])
    """
    with torch.no_grad():
        mean_CD, weight_C = mean_CD.clone(), weight_C.clone()
        share = update_class_means_(mean_CD, weight_C, features, targets, momentum=momentum, ignore_index=ignore_index)
    return attach_features(mean_CD, features, share), weight_C


def _apply(function: Any, *args: Any) -> Tensor:
    """``function.apply`` with a return type, which torch does not declare."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func differentiates what can be differentiated twice, but spalign has closed forms of the first "
            "derivatives alone; use torch.autograd.grad, or spalign.functional.alignment_loss_and_grad"
        )
    result: Tensor = function.apply(*args)
    return result


def _refuse_double_backward() -> None:
    # Gradients are enabled inside backward exactly under create_graph=True.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True asks for second derivatives, but spalign has closed forms of the first alone; keep its "
            "term out of the part of the loss that is differentiated twice"
        )


class _AttachFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_CD: Tensor, features: Tensor, rate: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(rate, index)
        ctx.dtype = features.dtype
        return mean_CD.clone()

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> Any:
        _refuse_double_backward()
        rate, index = ctx.saved_tensors
        return None, BatchShare(rate, index).pull_back(grad_CD).to(ctx.dtype), None, None


def attach_features(mean_CD: Tensor, features: Tensor, share: BatchShare) -> Tensor:
    """Return a copy of updated means (C, D) whose gradient flows to the features (N, D) that ``share`` came from."""
    if not features.requires_grad:
        return mean_CD.clone()
    return _apply(_AttachFeatures, mean_CD, features, share.rate, share.labels)


def global_mean(mean_CD: Tensor, seen_C: Tensor) -> Tensor:
    """Return ``mu_G``, the mean of the rows of ``mean_CD`` (C, D) where ``seen_C`` (C,) bool holds; (D,).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_rows(mean_CD, seen_C)
    seen_CD = torch.where(seen_C.unsqueeze(1), mean_CD.to(_math_dtype(mean_CD)), 0.0)
    return (seen_CD.sum(0) / seen_C.sum().clamp(min=1).to(seen_CD.dtype)).to(mean_CD.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Alignment: all that follows stays, row by row, inside span{w, d} or span{g, w, d}
# ----------------------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Classifier rows against centred class means, (C, D) and (C,), in the dtype of the maths.

    ``inv_w`` and ``inv_d`` are 1 / |w| and 1 / |d|, 0 where ``valid`` is False: an unseen class, a zero row, or a mean
    that lies on the global mean to within rounding. There the cosine is 0 and every coefficient built from it too.
    """

    w: Tensor
    d: Tensor
    inv_w: Tensor
    inv_d: Tensor
    wd: Tensor
    cos: Tensor
    valid: Tensor


def _column(x_C: Tensor) -> Tensor:
    """View (C,) as (C, 1), in functions that are one pass over the rows when compiled.

    Of as_strided inductor stores the values; those of unsqueeze it may compute again for every element. Kept out of
    :func:`alignment_loss`: beside an in-place update in one graph, inductor has corrupted the state with it.
    """
    return x_C.as_strided((x_C.shape[0], 1), (1, 1))


def _row_mask(mask_C: Tensor) -> Tensor:
    """Return the mask; in functions that are one pass over the rows, by way of 16 bits when compiled.

    Inductor does not vectorize 16-bit maths over rows, and so keeps a row's sums, its coefficients and its update in
    one loop over rows: on the CPU that reads memory once instead of thrice.
    """
    return mask_C.to(torch.int16) > 0 if torch.compiler.is_compiling() else mask_C


def _dots(x_CD: Tensor, y_CD: Tensor) -> Tensor:
    return (x_CD * y_CD).sum(1)


def _centered(
    mean_CD: Tensor, seen_C: Tensor, center_D: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_CD = mu - mu_G, the bound that |d_c|^2 of a direction exceeds, and the classes that may have one."""
    info = torch.finfo(_math_dtype(mean_CD))
    floor = 16 * info.eps
    mean_CD = mean_CD.to(dtype)
    if center_D is None:
        center_D = global_mean(mean_CD, seen_C)
        seen_C = seen_C & (seen_C.sum() > 1)  # a single class lies on the global mean
    center_D = center_D.to(dtype)
    # A difference of this size is the rounding of its terms: it points nowhere.
    least = floor**2 * torch.dot(center_D, center_D) + info.tiny
    return mean_CD - center_D, least, seen_C


def _rows(
    weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor, center_D: Tensor | None, *, one_pass: bool = False
) -> _Rows:
    dtype = _math_dtype(weight_CD, mean_CD)
    w_CD = weight_CD.to(dtype)
    d_CD, least, seen_C = _centered(mean_CD, seen_C, center_D, dtype)
    dd_C, ww_C, wd_C = _dots(d_CD, d_CD), _dots(w_CD, w_CD), _dots(w_CD, d_CD)
    inv_w_C, inv_d_C = ww_C.rsqrt(), dd_C.rsqrt()
    # The inverse of a norm is not positive where the row is not finite, and where the row is so short that the inverse
    # of its squared norm is not, it counts as zero.
    tiny = torch.finfo(_math_dtype(weight_CD)).tiny
    valid_C = seen_C & (dd_C > least) & (ww_C > tiny) & (torch.minimum(inv_w_C, inv_d_C) > 0)
    valid_C = _row_mask(valid_C) if one_pass else valid_C
    return _masked_rows(w_CD, d_CD, inv_w_C, inv_d_C, wd_C, valid_C)


def _masked_rows(w_CD: Tensor, d_CD: Tensor, inv_w_C: Tensor, inv_d_C: Tensor, wd_C: Tensor, valid_C: Tensor) -> _Rows:
    invalid_C = ~valid_C
    # Not in place: under vmap some of these may not have the dimension that others have.
    inv_w_C, inv_d_C = inv_w_C.masked_fill(invalid_C, 0.0), inv_d_C.masked_fill(invalid_C, 0.0)
    wd_C = wd_C.masked_fill(invalid_C, 0.0)
    cos_C = (wd_C * inv_w_C * inv_d_C).clamp_(-1.0, 1.0)
    return _Rows(w_CD, d_CD, inv_w_C, inv_d_C, wd_C, cos_C, valid_C)


class _Across(NamedTuple):
    """The part of d across w, ``d - k w`` (C, D), with k (C,) and its squared norm (C,) as it is: 1 - cos^2 cancels."""

    vector: Tensor
    k: Tensor
    squared: Tensor


def _rows_across(weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor, center_D: Tensor | None) -> tuple[_Rows, _Across]:
    """Return rows, in one pass where compiled, and what of d lies across w. Two of the dots give |d|^2 for free."""
    dtype = _math_dtype(weight_CD, mean_CD)
    w_CD = weight_CD.to(dtype)
    d_CD, least, seen_C = _centered(mean_CD, seen_C, center_D, dtype)
    ww_C, wd_C = _dots(w_CD, w_CD), _dots(w_CD, d_CD)
    inv_w_C = ww_C.rsqrt()
    has_row_C = _row_mask((ww_C > torch.finfo(_math_dtype(weight_CD)).tiny) & (inv_w_C > 0))
    k_C = (wd_C * inv_w_C * inv_w_C).masked_fill_(~has_row_C, 0.0)
    across_CD = d_CD - w_CD * _column(k_C)
    aa_C = _dots(across_CD, across_CD)
    dd_C = torch.addcmul(aa_C, k_C, wd_C)
    inv_d_C = dd_C.rsqrt()
    valid_C = _row_mask(seen_C & has_row_C & (dd_C > least) & (inv_d_C > 0))
    rows = _masked_rows(w_CD, d_CD, inv_w_C, inv_d_C, wd_C, valid_C)
    return rows, _Across(across_CD, k_C, aa_C)


def directions(mean_CD: Tensor, seen_C: Tensor, *, center_D: Tensor | None = None) -> Tensor:
    """Return the unit rows of the class means minus the global mean, ``mu_hat`` (Eq. 3).

    Args:
        mean_CD: (C, D) class means, finite.
        seen_C: (C,) bool, classes with a mean.
        center_D: (D,) global mean, if at hand; the mean of the seen rows otherwise.

    Returns:
        (C, D); rows without a direction (unseen, or on the global mean) are zero.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> directions(torch.tensor([[3., 0.], [1., 0.], [9., 9.]]), torch.tensor([True, True, False])).tolist()
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]
    """
    _check_rows(mean_CD, seen_C, center_D=center_D)
    d_CD, least, seen_C = _centered(mean_CD, seen_C, center_D, _math_dtype(mean_CD))
    dd_C = _dots(d_CD, d_CD)
    valid_C = seen_C & (dd_C > least) & _is_finite(dd_C)
    inv_d_C = torch.where(valid_C, torch.where(valid_C, dd_C, 1.0).rsqrt(), 0.0)
    return (d_CD * inv_d_C.unsqueeze(1)).to(mean_CD.dtype)


def alignment(weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor, *, center_D: Tensor | None = None) -> Tensor:
    """Return the cosine between each classifier row and its centred class mean, ``<w_hat_c, mu_hat_c>``.

    Args:
        weight_CD: (C, D) classifier rows.
        mean_CD: (C, D) class means, finite.
        seen_C: (C,) bool, classes with a mean.
        center_D: (D,) global mean, if at hand; the mean of the seen rows otherwise.

    Returns:
        (C,) in [-1, 1]; 0 where there is nothing to compare (unseen class, zero row, mean on the global mean).

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> mean, seen = torch.tensor([[2., 0.], [0., 0.]]), torch.tensor([True, True])
        >>> alignment(torch.tensor([[5., 0.], [0., 1.]]), mean, seen).tolist()
        [1.0, 0.0]
    """
    _check_rows(mean_CD, seen_C, weight_CD, center_D=center_D)
    return _rows(weight_CD.detach(), mean_CD.detach(), seen_C, center_D).cos


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients were computed with it: ``apply(value, x1, grad1, x2, grad2, ...)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_grads: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs_and_grads[1::2])
        ctx.dtypes = [x.dtype for x in inputs_and_grads[::2]]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        _refuse_double_backward()
        grads: list[Tensor | None] = [None]
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # A half-precision loss scale must meet the gradient before the cast, or small values are lost.
            grads += [(grad * grad_value).to(dtype), None]
        return tuple(grads)


def _loss_coefficients(rows: _Rows, seen_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, and per row (a, b, p, q): dL/dw = a w - b d, dL/dd = p d - b w, q = share of each mean in mu_G."""
    share = seen_C.sum(dtype=rows.cos.dtype).clamp_(min=1.0).reciprocal_()
    share_C = seen_C * share
    loss = torch.dot((1.0 - rows.cos).mul_(rows.valid), share_C)
    scaled_w_C = rows.inv_w * share
    a_C, p_C = rows.cos * rows.inv_w * scaled_w_C, rows.cos * rows.inv_d * rows.inv_d * share
    return loss, a_C, scaled_w_C * rows.inv_d, p_C, share_C


def _difference(x_CD: Tensor, a_C1: Tensor, y_CD: Tensor, b_C1: Tensor) -> Tensor:
    return torch.addcmul(x_CD * a_C1, y_CD, b_C1, value=-1)


def alignment_loss(
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    *,
    center_D: Tensor | None = None,
    features: Tensor | None = None,
    share: BatchShare | None = None,
) -> Tensor:
    """Return the regularizer of Eq. 15, ``mean over seen classes of 1 - <w_hat_c, mu_hat_c>``.

    Classes without a direction contribute exactly 0, in value and gradient. The gradients are closed forms computed
    with the value (first order only): by ``weight_CD``; by ``mean_CD``, through the global mean too; and, cheaper than
    the latter because only the batch's rows are formed, by the ``features`` that moved the means.

    Args:
        weight_CD: (C, D) classifier rows, any float dtype.
        mean_CD: (C, D) class means, finite.
        seen_C: (C,) bool, classes with a mean.
        center_D: (D,) global mean, if at hand; the mean of the seen rows otherwise. Not a free variable: gradients by
            the means treat it as their mean in either case.
        features: (N, D) batch that :func:`update_class_means_` moved the means by.
        share: what that call returned. ``features`` and ``share`` go together.

    Returns:
        Scalar, float32 (float64 if the weight or the means are).

    Raises:
        ValueError: features without a share, or shapes that do not fit.

    Example:
        >>> import torch
        >>> w = torch.tensor([[0., 1.], [-1., 0.]], requires_grad=True)
        >>> loss = alignment_loss(w, torch.tensor([[3., 0.], [1., 0.]]), torch.tensor([True, True]))
        >>> loss.item(), torch.autograd.grad(loss, w)[0].tolist()
        (0.5, [[-0.5, 0.0], [0.0, 0.0]])
    """
    _check_rows(mean_CD, seen_C, weight_CD, center_D=center_D)
    if features is not None and share is None:
        raise ValueError(
            f"features of shape {tuple(features.shape)} came without a share, expected both, or no gradient would "
            "reach them; pass share=, what update_class_means_ returned for them"
        )
    moved_by = share if features is not None and features.requires_grad else None
    terms = None
    # Compiled, the general form is one pass over the rows as well.
    if center_D is not None and not torch.compiler.is_compiling():
        if host.can_align(weight_CD, mean_CD, center_D):
            rate, labels_N = (None, None) if moved_by is None else moved_by
            by_weight = weight_CD.requires_grad
            terms = host.alignment_terms(weight_CD, mean_CD, seen_C, center_D, rate, labels_N, by_weight=by_weight)
        elif kernels.can_align(weight_CD, mean_CD, seen_C, center_D):
            return _loss_by_kernels(weight_CD, mean_CD, seen_C, center_D, features, share)
    loss, *grads = terms or _alignment_terms(weight_CD, mean_CD, seen_C, center_D, moved_by)
    inputs_and_grads: list[Tensor] = []
    for leaf, grad in zip((weight_CD, features, mean_CD), grads, strict=False):  # the host's are not by the means
        if leaf is not None and grad is not None:
            inputs_and_grads += (leaf, grad)
    if inputs_and_grads and torch.is_grad_enabled():
        return _apply(_KnownGradient, loss, *inputs_and_grads)
    return loss


class _GradientByKernels(torch.autograd.Function):
    """A scalar whose gradients are made of its terms when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_CD: Tensor | None,
        features: Tensor | None,
        value_and_terms: tuple[Tensor, kernels.Terms],  # of an argument of its own, autograd would want a copy
        share: BatchShare | None,
    ) -> Tensor:
        value, terms = value_and_terms
        ctx.save_for_backward(*terms, *((None, None) if share is None else share))
        ctx.dtypes = [None if x is None else x.dtype for x in (weight_CD, features)]
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        _refuse_double_backward()
        *saved, rate, labels_N = ctx.saved_tensors
        return *_gradients(kernels.Terms(*saved), grad_value, rate, labels_N, *ctx.dtypes), None, None


def _gradients(
    terms: kernels.Terms,
    factor: Tensor,
    rate: Tensor | None,
    labels_N: Tensor | None,
    weight_dtype: torch.dtype | None,
    features_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by the classifier and by the features in these dtypes, times the factor."""
    by_weight = by_features = None
    if kernels.can_pull_back(factor, *terms, rate, labels_N):
        by_weight, by_features = kernels.pull_back(terms, factor, rate, labels_N, weight_dtype, features_dtype)
    elif terms.by_weight is not None:
        by_weight = (terms.by_weight * factor).to(weight_dtype)
    if by_features is None and terms.e is not None:
        assert rate is not None
        assert terms.e_sum is not None
        assert terms.share is not None
        with _no_autocast(terms.e):
            by_mean_CD = torch.addr(terms.e, terms.share, terms.e_sum, alpha=-1)
        by_features = (BatchShare(rate, labels_N).pull_back(by_mean_CD) * factor).to(features_dtype)
    return by_weight, by_features


def _loss_by_kernels(
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    center_D: Tensor,
    features: Tensor | None,
    share: BatchShare | None,
    *,
    of_state: bool = False,
    write_sum: bool = False,
) -> Tensor:
    """:func:`alignment_loss` of what :func:`spalign.kernels.can_align`."""
    learns = torch.is_grad_enabled()
    weight = weight_CD if learns and weight_CD.requires_grad else None
    moved = features if learns and features is not None and features.requires_grad and share is not None else None
    value_and_terms = kernels.alignment_terms(
        weight_CD,
        mean_CD,
        seen_C,
        center_D,
        by_weight=weight is not None,
        by_mean=moved is not None,
        of_state=of_state,
        write_sum=write_sum,
    )
    return _apply(_GradientByKernels, weight, moved, value_and_terms, None if moved is None else share)


def _alignment_terms(
    weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor, center_D: Tensor | None, share: BatchShare | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss and its gradients by the weight, by the features that have the share, and by the means."""
    by_weight = by_features = by_mean = None
    with torch.no_grad(), _no_autocast(weight_CD):
        rows = _rows(weight_CD, mean_CD, seen_C, center_D)
        loss, a_C, b_C, p_C, q_C = _loss_coefficients(rows, seen_C)
        b_C1 = b_C.unsqueeze(1)
        if weight_CD.requires_grad:
            by_weight = _difference(rows.w, a_C.unsqueeze(1), rows.d, b_C1)
        if mean_CD.requires_grad:
            e_CD = _difference(rows.d, p_C.unsqueeze(1), rows.w, b_C1)
            by_mean = e_CD - q_C.unsqueeze(1) * e_CD.sum(0)
        if share is not None:
            by_features = _feature_gradient(rows, b_C, p_C, q_C, share)
    return loss, by_weight, by_features, by_mean


def _feature_gradient(rows: _Rows, b_C: Tensor, p_C: Tensor, q_C: Tensor, share: BatchShare) -> Tensor:
    """Pull dL/dmu_c = e_c - q_c sum_k e_k, e = p d - b w, back to the features; formed for the fewer of N and C."""
    if share.labels is None or len(share.labels) >= len(rows.w):
        e_CD = _difference(rows.d, p_C.unsqueeze(1), rows.w, b_C.unsqueeze(1))
        return share.pull_back(e_CD.addr_(q_C, e_CD.sum(0), alpha=-1))
    sum_D = torch.mv(rows.d.t(), p_C) - torch.mv(rows.w.t(), b_C)
    w_ND, d_ND = rows.w.index_select(0, share.labels), rows.d.index_select(0, share.labels)
    b_N, p_N, q_N = (x_C.index_select(0, share.labels).mul_(share.rate) for x_C in (b_C, p_C, q_C))
    return _difference(d_ND, p_N.unsqueeze(1), w_ND, b_N.unsqueeze(1)).addr_(q_N, sum_D, alpha=-1)


def alignment_loss_and_grad(
    weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor, *, center_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the regularizer of Eq. 15 and its gradient by the classifier, without autograd.

    For loops that add to ``weight.grad`` themselves. Compiled, it is one pass over the inputs.

    Args:
        weight_CD: (C, D) classifier rows.
        mean_CD: (C, D) class means, finite.
        seen_C: (C,) bool, classes with a mean.
        center_D: (D,) global mean, if at hand.

    Returns:
        the scalar of :func:`alignment_loss` and its gradient by ``weight_CD``, (C, D), in the weight's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> w, mean, seen = torch.eye(2), torch.tensor([[3., 0.], [1., 0.]]), torch.tensor([True, True])
        >>> loss, grad = alignment_loss_and_grad(w, mean, seen)
        >>> loss.item(), grad.tolist()
        (0.5, [[0.0, 0.0], [0.5, 0.0]])
    """
    _check_rows(mean_CD, seen_C, weight_CD, center_D=center_D)
    if center_D is not None and kernels.can_align(weight_CD, mean_CD, seen_C, center_D):
        loss, terms = kernels.alignment_terms(weight_CD, mean_CD, seen_C, center_D, by_weight=True, by_mean=False)
        assert terms.by_weight is not None
        return loss, terms.by_weight.to(weight_CD.dtype)
    with torch.no_grad():
        rows = _rows(weight_CD, mean_CD, seen_C, center_D, one_pass=True)
        loss, a_C, b_C, _, _ = _loss_coefficients(rows, seen_C)
        return loss, _difference(rows.w, _column(a_C), rows.d, _column(b_C)).to(weight_CD.dtype)


def cosine_schedule(step: int, total_steps: int, maximum: float) -> float:
    """Return ``alpha_t = alpha_max (1 - cos(pi t / T)) / 2`` with t clamped to [0, T].

    Raises:
        ValueError: ``total_steps`` is less than 1.

    Example:
        >>> [round(cosine_schedule(t, 4, 0.2), 3) for t in (0, 1, 2, 4, 9)]
        [0.0, 0.029, 0.1, 0.2, 0.2]
    """
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps!r}, expected 1 or more; pass the steps of the schedule")
    return maximum * (1.0 - math.cos(math.pi * min(max(step, 0), total_steps) / total_steps)) / 2.0


class RotatedRows(NamedTuple):
    """Result of :func:`slerp`: the rows (C, D), and which were rotated or left alone as antipodal, (C,) bool."""

    weight: Tensor
    rotated: Tensor
    antipodal: Tensor


def slerp(
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    *,
    alpha: float | Tensor,
    threshold: float,
    center_D: Tensor | None = None,
) -> RotatedRows:
    """Rotate classifier rows towards their centred class means along the sphere (the unnumbered SLERP equation).

    ``w_c <- |w_c| (sin((1 - alpha) t) / sin t w_hat_c + sin(alpha t) / sin t mu_hat_c)`` for rows with
    ``cos t = <w_hat_c, mu_hat_c> < threshold``. Departures from print: the angle t is an arc tangent whose sine is
    measured on the vectors (the arc cosine is 0 for angles under 3e-4 in float32), the weights are linear under 1e-4
    rad (as printed NaN at 0), and rows within 1e-3 rad of pi are left alone (no unique path).

    Args:
        weight_CD: (C, D) classifier rows, any float dtype. Their norms are kept.
        mean_CD: (C, D) class means, finite.
        seen_C: (C,) bool, classes with a mean.
        alpha: share of the angle to go, in [0, 1]; a 0-dim tensor avoids recompilation under a schedule. 0 changes
            no bit.
        threshold: rows whose cosine is below it are rotated; above 1, all.
        center_D: (D,) global mean, if at hand.

    Returns:
        New rows (C, D) in the weight's dtype, and the masks of rows rotated and rows left alone near pi.

    Raises:
        ValueError: ``alpha`` is out of range, or shapes do not fit.

    Example:
        >>> import torch
        >>> w, mean, seen = torch.tensor([[0., 2.], [-1., 0.]]), torch.tensor([[3., 0.], [1., 0.]]), torch.ones(2) > 0
        >>> new, rotated, antipodal = slerp(w, mean, seen, alpha=0.5, threshold=0.9)
        >>> [[round(v, 4) for v in row] for row in new.tolist()], rotated.tolist()
        ([[1.4142, 1.4142], [-1.0, 0.0]], [True, False])
    """
    _check_rows(mean_CD, seen_C, weight_CD, center_D=center_D)
    if not isinstance(alpha, Tensor) and not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha!r}, expected a share of the angle in [0, 1]")
    with torch.no_grad():
        rows, across = _rows_across(weight_CD, mean_CD, seen_C, center_D)
        sin_C = across.squared.sqrt() * rows.inv_d
        angle_C = torch.atan2(sin_C, rows.cos)
        below_C = rows.valid & (rows.cos < threshold)
        antipodal_C = below_C & (angle_C > math.pi - _ANTIPODAL_MARGIN)
        alpha_C = torch.zeros_like(angle_C) + alpha
        rotate_C = _row_mask(below_C & ~antipodal_C & (alpha_C != 0))

        # sin(alpha t) / sin t, of the paper's formula with mu_hat = cos t w_hat + (the part across) / |d|.
        small_C = angle_C < _LERP_ANGLE
        to_C = torch.where(small_C, alpha_C, torch.sin(alpha_C * angle_C) / torch.where(small_C, 1.0, sin_C))
        to_C, from_C = to_C * rows.inv_d / torch.where(rotate_C, rows.inv_w, 1.0), torch.cos(alpha_C * angle_C)
        # Near 0 and pi, rounding leaves the part across not quite across, which would show in the norm.
        cross_C = to_C * (to_C * across.squared + 2.0 * from_C * _dots(rows.w, across.vector)) * rows.inv_w * rows.inv_w
        scale_C = (from_C * from_C + cross_C).rsqrt()
        new_CD = rows.w * _column(from_C * scale_C) + across.vector * _column(to_C * scale_C)
        new_CD = new_CD.to(weight_CD.dtype)
        return RotatedRows(torch.where(_column(rotate_C), new_CD, weight_CD), rotate_C, antipodal_C)


def project_gradient(
    grad_CD: Tensor,
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    *,
    gamma: float,
    radial: Radial = "paper",
    center_D: Tensor | None = None,
) -> Tensor:
    """Remove the part of a classifier gradient that would turn rows away from their class means (Eqs. 17 to 20).

    With ``d_c = mu_hat_c - <mu_hat_c, w_hat_c> w_hat_c`` and ``p_c = <g_c, d_hat_c>``, the result is
    ``g - (1 - gamma) (<g, w_hat> w_hat + max(p, 0) d_hat)`` for ``radial="paper"``, which is Eq. 20 (gamma scales the
    radial part too: where it is small, row norms nearly freeze), and ``g - (1 - gamma) max(p, 0) d_hat`` for
    ``radial="keep"``. Eq. 18 prints ``<g, w_hat>`` in d_c: that is not tangent and would make the result depend on the
    loss scale. A row on its mean's direction has no d_hat; its p is 0. A class without a direction keeps its gradient.

    Stateless and positively homogeneous: ``project(s g) = s project(g)`` for s > 0, so it may meet scaled gradients.
    Non-finite rows stay non-finite and do not touch other rows.

    Args:
        grad_CD: (C, D) gradient of a loss by the classifier, any float dtype.
        weight_CD: (C, D) classifier rows.
        mean_CD: (C, D) class means, finite.
        seen_C: (C,) bool, classes with a mean.
        gamma: share of the original gradient that is mixed back in, in [0, 1]; 1 changes nothing.
        radial: what happens to the part along the row.
        center_D: (D,) global mean, if at hand.

    Returns:
        (C, D) in the gradient's dtype.

    Raises:
        ValueError: ``radial`` is unknown, ``gamma`` is out of range, or shapes do not fit.

    Example:
        >>> import torch
        >>> w, mean, seen = torch.tensor([[0., 1.], [-1., 0.]]), torch.tensor([[3., 0.], [1., 0.]]), torch.ones(2) > 0
        >>> g = torch.tensor([[2., 4.], [0., 1.]])
        >>> project_gradient(g, w, mean, seen, gamma=0.5, radial="keep").tolist()
        [[1.0, 4.0], [0.0, 1.0]]
    """
    if radial not in ("paper", "keep"):
        raise ValueError(f"radial is {radial!r}, expected 'paper' (Eq. 20) or 'keep'")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma!r}, expected a share of the original gradient in [0, 1]")
    _check_rows(mean_CD, seen_C, weight_CD, grad_CD, center_D=center_D)
    return _project(grad_CD, weight_CD, mean_CD, seen_C, center_D, gamma, radial)


def _project(
    grad_CD: Tensor,
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    center_D: Tensor | None,
    gamma: float,
    radial: Radial,
    out: Tensor | None = None,
    of_state: bool = False,
) -> Tensor:
    """:func:`project_gradient`, into ``out`` if given, which may be the gradient.

    ``of_state`` has weights of classes for ``seen_C`` and the sum of the means for ``center_D``, if
    :func:`spalign.kernels.can_align` said that it may.
    """
    if center_D is not None and (of_state or kernels.can_align(weight_CD, mean_CD, seen_C, center_D, grad_CD)):
        out, paper = torch.empty_like(grad_CD) if out is None else out, radial == "paper"
        kernels.project_gradient(
            out, grad_CD, weight_CD, mean_CD, seen_C, center_D, gamma=gamma, paper=paper, of_state=of_state
        )
        return out
    with torch.no_grad():
        rows_across = _rows_across(weight_CD, mean_CD, seen_C, center_D)
        projected_CD = _project_rows(grad_CD, *rows_across, gamma=gamma, radial=radial)
    return projected_CD if out is None else out.copy_(projected_CD)


def _project_rows(grad_CD: Tensor, rows: _Rows, across: _Across, *, gamma: float, radial: Radial) -> Tensor:
    g_CD, aa_C = grad_CD.to(rows.w.dtype), across.squared
    undefined_C = _row_mask(aa_C * rows.inv_d * rows.inv_d <= (16 * torch.finfo(aa_C.dtype).eps) ** 2)
    p_C = (_dots(g_CD, across.vector) / aa_C).clamp_(min=0.0).masked_fill_(undefined_C, 0.0)
    # g - (1 - gamma) (p across + along w), with across = d - k w written out: one pass less over the rows.
    by_w_C = -p_C * across.k
    if radial == "paper":
        along_C = _dots(g_CD, rows.w) * rows.inv_w * rows.inv_w
        by_w_C = by_w_C + along_C.masked_fill_(~_row_mask(rows.valid), 0.0)
    projected_CD = torch.addcmul(g_CD, rows.d, _column(p_C), value=gamma - 1.0)
    projected_CD = torch.addcmul(projected_CD, rows.w, _column(by_w_C), value=gamma - 1.0)
    return projected_CD.to(grad_CD.dtype)
