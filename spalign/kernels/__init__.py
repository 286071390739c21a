"""What every step does, where there is an NVIDIA GPU: a few Triton kernels for dozens of torch's.

The update of the class means, the regularizer with its gradients, and the projection. They do what
:mod:`spalign.functional` does on any device, equal to rounding, and add up in a fixed order: equal arguments give equal
bits. Before their first use on a GPU they are compared with it there, once, which takes the seconds that they need to
compile; where they cannot be compiled or do not agree, a warning says so and torch's operations do the work.
``SPALIGN_KERNELS=0`` in the environment turns them off.

Shapes: N samples, C classes, D feature dimensions, P programs.
"""

import contextlib
import importlib.util
import os
import threading
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Terms",
    "alignment_terms",
    "can_align",
    "can_pull_back",
    "can_read",
    "can_update",
    "geometry",
    "in_use",
    "project_gradient",
    "pull_back",
    "ready",
    "update_class_means_",
]

SWITCH = "SPALIGN_KERNELS"
# Beyond, a program would hold too much of a row or of the labels, or look at too many classes one after the other.
MOST_SAMPLES, MOST_DIMENSIONS, MOST_CLASSES = 4096, 8192, 1 << 16
MOST_SOFT = 1 << 16  # elements of features with soft labels, which every class reads
MOST_PROGRAMS = 512  # for the rows of a classifier: enough to fill a GPU
# Up to this many classes and elements of a classifier, launches cost more than one program for all rows does, or than
# every program counting the classes seen.
FEW_CLASSES, FEW_ELEMENTS = 1024, 1 << 15

_PLAIN = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EPS, _TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
_FLOOR_SQUARED = (16 * _EPS) ** 2
_ready: dict[int | None, bool] = {}  # by GPU
_comparing = threading.Lock()


def _code() -> Any:
    from spalign.kernels import code  # which needs Triton

    return code


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the GPU of ``x`` the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _block(n: int, least: int = 16, most: int = MOST_DIMENSIONS) -> int:
    """Return the power of two that holds ``n``."""
    return min(max(least, 1 << (n - 1).bit_length()), most)


def _blocks(n: int, block: int) -> tuple[int]:
    return (-(-n // block),)


def _warps(block: int, least: int = 1) -> int:
    return min(max(block // 256, least), 16)


def _tile(block: int) -> int:
    """Return how many rows of ``block`` entries a program reads at a time."""
    return min(max(2048 // block, 1), 32)


# ----------------------------------------------------------------------------------------------------------------------
# Whether they can be used
# ----------------------------------------------------------------------------------------------------------------------


def ready(x: Tensor) -> bool:
    """Return whether the kernels can be used on the device of ``x``."""
    known = _ready.get(x.device.index)
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return False  # comparing would wait
        with _comparing:
            known = _ready.get(x.device.index)
            if known is None:
                known = _ready[x.device.index] = _try(x.device)
    return known


def in_use(device: torch.device) -> bool | None:
    """Return whether the kernels are used on a GPU; None before anything could have used them there."""
    return _ready.get(torch.cuda.current_device() if device.index is None else device.index)


def _try(device: torch.device) -> bool:
    if os.environ.get(SWITCH) == "0" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    told = torch.cuda.get_sync_debug_mode()  # setting it, even to what it is, warns of a prototype
    try:
        if told:
            torch.cuda.set_sync_debug_mode("default")
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            wrong = disagreement(device)
    except Exception as error:  # of a compiler that is missing, a driver, a version
        wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        if told:
            torch.cuda.set_sync_debug_mode(told)
    if wrong:
        warnings.warn(
            f"spalign's own kernels are not used on {device}, torch's operations are: {wrong}. {SWITCH}=0 in the "
            "environment turns them off without this warning; set it on all ranks, or their roundings differ",
            stacklevel=2,
        )
    return not wrong


@torch.no_grad()
def disagreement(device: torch.device) -> str:
    """Compare the kernels with torch's operations on small problems. Return what differs, ``""`` if nothing does."""
    from spalign import functional  # which imports this module

    num_samples = 24

    def wave(*shape: int, step: float) -> Tensor:  # not random numbers, whose generator is the user's
        numbers = torch.arange(1, 1 + torch.Size(shape).numel(), device=device, dtype=torch.float32)
        return numbers.mul_(step).sin_().view(shape)

    factor = torch.full((), 0.5, device=device)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    # Few elements, which leave the global mean to the kernels that use it, and more, which have kernels for it.
    for kind, num_classes, dim in (("hard", 5, 40), ("soft", 1 + FEW_ELEMENTS // 1000, 1000)):
        of_state, paper = (kind == "hard",) * 2
        h_ND = wave(num_samples, dim, step=0.7)
        labels_N = torch.arange(num_samples, device=device) % (num_classes - 1)
        soft_NC = torch.softmax(wave(num_samples, num_classes, step=1.9), 1)
        targets = labels_N if kind == "hard" else soft_NC
        mean_CD = wave(num_classes, dim, step=0.3)
        w_CD, g_CD = (mean_CD + wave(num_classes, dim, step=1.3)).requires_grad_(), wave(num_classes, dim, step=2.1)
        mean_CD[0] = 0.0
        weight_C = mean_CD.any(1).float()
        state, expected = [[mean_CD.clone(), weight_C.clone(), mean_CD.double().sum(0)] for _ in range(2)]
        share = update_class_means_(state[0], state[1], state[2], h_ND, targets, 0.3, -100)
        # Products of float32 matrices may be rounded to TF32, where the user allows it.
        batch = functional._parse_batch(h_ND, targets, num_classes, -100, torch.float64)
        sum_CD, batch_weight_C = (x.float() for x in functional._batch_statistics(batch, num_classes))
        rates = functional._update_from_statistics_(expected[0], expected[1], sum_CD, batch_weight_C, 0.3, expected[2])
        seen_C = expected[1] > 0
        rows = (w_CD, expected[0], seen_C, functional.global_mean(expected[0], seen_C))
        afresh_D = torch.empty_like(state[2])
        mine = (w_CD, expected[0], *((state[1], afresh_D) if of_state else geometry(state[1], state[2])))
        loss, terms = alignment_terms(*mine, by_weight=True, by_mean=True, of_state=of_state, write_sum=of_state)
        if of_state:
            pairs["sum of the means, afresh"] = afresh_D, expected[2]
        else:
            pairs["global mean"] = mine[-1], rows[-1]
        projected_CD = torch.empty_like(g_CD)
        project_gradient(projected_CD, g_CD, *mine, gamma=0.4, paper=paper, of_state=of_state)
        moved_by = functional.BatchShare(wave(num_samples, step=0.9), labels_N)
        by_weight, by_features = pull_back(terms, factor, *moved_by, w_CD.dtype, h_ND.dtype)
        radial: functional.Radial = "paper" if paper else "keep"
        their_terms: Any = functional._alignment_terms(*rows, moved_by)
        across = functional._rows_across(*rows)
        for name, own, theirs in (
            ("class means", state[0], expected[0]),
            ("weights", state[1], expected[1]),
            ("sum of the means", state[2], expected[2]),
            ("rates", share[0], functional._share_of_rates(batch, rates).rate),
            ("projection", projected_CD, functional._project_rows(g_CD, *across, gamma=0.4, radial=radial)),
            ("loss", loss, their_terms[0]),
            ("gradient by the classifier", by_weight, 0.5 * their_terms[1]),
            ("gradient by the features", by_features, 0.5 * their_terms[2]),
        ):
            assert own is not None
            pairs[f"{name} ({kind} labels)"] = own, theirs
    # Sums of at most 1000 numbers of about 1, in another order, and quotients of them.
    wrong = [name for name, (a, b) in pairs.items() if not torch.allclose(a.double(), b.double(), 1e-4, 1e-5)]
    return f"they differ in {', '.join(wrong)}" if wrong else ""


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether tensors are on one device and hold their values where their pointers point, as a kernel needs."""
    if torch._C._are_functorch_transforms_active():  # their wrappers are of type Tensor and point nowhere
        return False
    device = tensors[0].device
    # What stands for the many gradients of torch.autograd.grad(is_grads_batched=True) has no storage, nor a functorch.
    return all(
        type(x) in _PLAIN and x.device == device and not x.is_neg() and torch._C._has_storage(x) for x in tensors
    )


def _is_state(*tensors: Tensor) -> bool:
    return all(x.dtype is torch.float32 and x.is_contiguous() for x in tensors)


def _is_sum(mean_sum_D: Tensor, dim: int) -> bool:
    return mean_sum_D.dtype is torch.float64 and mean_sum_D.is_contiguous() and mean_sum_D.shape == (dim,)


# ----------------------------------------------------------------------------------------------------------------------
# Class means
# ----------------------------------------------------------------------------------------------------------------------


def can_update(mean_CD: Tensor, weight_C: Tensor, mean_sum_D: Tensor | None, features: Tensor, targets: Tensor) -> bool:
    """Return whether :func:`update_class_means_` takes this state and a batch of these shapes and dtypes."""
    if not features.is_cuda or torch.compiler.is_compiling() or features.ndim != 2:
        return False
    (num_samples, dim), num_classes, soft = features.shape, len(mean_CD), targets.is_floating_point()
    if not (0 < num_samples <= MOST_SAMPLES and 0 < dim <= MOST_DIMENSIONS and features.dtype in _FLOATS):
        return False
    if soft and not (features.numel() <= MOST_SOFT and num_classes <= MOST_DIMENSIONS):
        return False
    # Kernels check no shapes: torch's operations have the error for those that do not fit.
    sums = () if mean_sum_D is None else (mean_sum_D,)
    return (
        targets.dtype in (_FLOATS if soft else _INTEGERS)
        and targets.shape == ((num_samples, num_classes) if soft else (num_samples,))
        and mean_CD.shape == (num_classes, dim)
        and weight_C.shape == (num_classes,)
        and _are_plain(mean_CD, weight_C, features, targets, *sums)
        and _is_state(mean_CD, weight_C)
        and (mean_sum_D is None or _is_sum(mean_sum_D, dim))
        and ready(features)
    )


def update_class_means_(
    mean_CD: Tensor,
    weight_C: Tensor,
    mean_sum_D: Tensor | None,
    features: Tensor,
    targets: Tensor,
    momentum: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    """Move class means in place by a batch that :func:`can_update` takes.

    Returns:
        the rate of each sample (N,) and its class (N,) int64, both 0 where it was passed over; of soft labels the rates
        (N, C) and None.
    """
    features, targets = features.detach(), targets.detach().contiguous()
    (num_samples, dim), num_classes = features.shape, len(mean_CD)
    block = _block(dim)
    soft = targets.is_floating_point()
    # What the means move by: in the row of a class's first sample, or of the class.
    delta = mean_CD.new_empty(num_classes if soft else num_samples, dim)
    owner = delta.new_empty(len(delta), dtype=torch.int8)  # whether the row holds any
    rate = delta.new_empty(targets.shape)
    class_N = None if soft else targets.new_empty(num_samples, dtype=torch.int64)
    # As Triton takes them: no numbers of numpy, no integers of more than 64 bits.
    weight_of_new = float(momentum or 0.0)
    ignore_index = int(ignore_index) if 0 <= ignore_index < num_classes else -1
    how: dict[str, Any] = {"CUMULATIVE": momentum is None, "BLOCK_R": _tile(block), "BLOCK_D": block}
    how["num_warps"] = _warps(block, 4)
    code = _code()
    with _on(features):
        if soft:
            block_c = _block(num_classes)
            code.soft_weights[(num_samples,)](
                rate,
                features,
                targets,
                *features.stride(),
                num_classes,
                dim,
                _TINY / _EPS,
                BLOCK_C=block_c,
                BLOCK_D=block,
                num_warps=_warps(max(block, block_c)),
            )
            state = (mean_CD, weight_C, delta, owner, rate, features)
            code.move_soft_means[(num_classes,)](
                *state, *features.stride(), num_samples, num_classes, dim, weight_of_new, **how
            )
        else:
            arguments = (mean_CD, weight_C, delta, owner, rate, class_N, features, targets)
            code.move_means[(num_samples,)](
                *arguments,
                *features.stride(),
                num_samples,
                num_classes,
                dim,
                ignore_index,
                weight_of_new,
                BLOCK_N=_block(num_samples),
                **how,
            )
        if mean_sum_D is not None:
            code.add_deltas[_blocks(dim, 64)](
                mean_sum_D, delta, owner, len(delta), dim, BLOCK_R=32, BLOCK_D=64, num_warps=4
            )
    for written in (mean_CD, weight_C):
        if not written.is_inference():  # autograd has not seen it
            torch.autograd.graph.increment_version(written)
    return rate, class_N


def can_read(mean_CD: Tensor, weight_C: Tensor, mean_sum_D: Tensor) -> bool:
    """Return whether :func:`geometry` takes this state."""
    return (
        weight_C.is_cuda
        and not torch.compiler.is_compiling()
        and len(weight_C) <= MOST_CLASSES
        and _are_plain(mean_CD, weight_C, mean_sum_D)
        and _is_state(mean_CD, weight_C)
        and _is_sum(mean_sum_D, mean_CD.shape[1])
        and ready(weight_C)
    )


def geometry(weight_C: Tensor, mean_sum_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes to align, (C,) bool, which are those seen if there are two, and the global mean (D,)."""
    num_classes, dim = len(weight_C), len(mean_sum_D)
    alignable_C, center_D = torch.empty_like(weight_C, dtype=torch.bool), weight_C.new_empty(dim)
    block, block_c = _block(dim, most=1024), _block(num_classes, most=1024)
    with _on(weight_C):
        _code().geometry[_blocks(dim, block)](
            center_D,
            alignable_C.view(torch.int8),
            weight_C,
            mean_sum_D,
            num_classes,
            dim,
            BLOCK_C=block_c,
            BLOCK_D=block,
            num_warps=4,
        )
    return alignable_C, center_D


# ----------------------------------------------------------------------------------------------------------------------
# Alignment
# ----------------------------------------------------------------------------------------------------------------------


def can_align(
    weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor, center_D: Tensor, *grads: Tensor, of_state: bool = False
) -> bool:
    """Return whether :func:`alignment_terms`, and with a gradient :func:`project_gradient`, take these.

    ``of_state`` asks whether they take, for classes and global mean, the weights (C,) and the sum of the means (D,) of
    which they are made: where classes are few.
    """
    if not mean_CD.is_cuda or torch.compiler.is_compiling():
        return False
    shape = mean_CD.shape
    if of_state:
        fits = len(seen_C) <= FEW_CLASSES and mean_CD.numel() <= FEW_ELEMENTS and seen_C.shape == shape[:1]
        fits = fits and _is_state(mean_CD, seen_C) and _is_sum(center_D, shape[1])
    else:
        fits = (center_D.shape, seen_C.shape, seen_C.dtype) == (shape[1:], shape[:1], torch.bool)
        fits = fits and _is_state(mean_CD, center_D)
    return (
        fits
        and mean_CD.numel() > 0
        and shape[1] <= MOST_DIMENSIONS
        and not mean_CD.requires_grad
        and all(x.dtype in _FLOATS and x.shape == shape for x in (weight_CD, *grads))
        and _are_plain(weight_CD, mean_CD, seen_C, center_D, *grads)
        and ready(mean_CD)
    )


class Terms(NamedTuple):
    """What the regularizer's gradients are made of, None where not asked for.

    Attributes:
        by_weight: (C, D), its gradient by the classifier.
        e: (C, D), that by the class means, as if the global mean were fixed.
        e_sum: (D,), sum of the rows of e.
        share: (C,), of each mean in the global mean: the gradient by the class means is ``e - share e_sum``.
    """

    by_weight: Tensor | None
    e: Tensor | None
    e_sum: Tensor | None
    share: Tensor | None


def alignment_terms(
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    center_D: Tensor,
    *,
    by_weight: bool,
    by_mean: bool,
    of_state: bool = False,
    write_sum: bool = False,
) -> tuple[Tensor, Terms]:
    """Return the regularizer, and what gives its gradients by the weight and by the means, where asked for.

    ``of_state`` has the weights (C,) for ``seen_C`` and the sum of the means (D,) for ``center_D``. The means are added
    up afresh then, and ``write_sum`` writes the sum, which an update may have left to this.
    """
    code, (num_classes, dim) = _code(), mean_CD.shape
    weight_CD, block = weight_CD.detach(), _block(dim)
    # One program has the sums of all rows; of several, each looks at one row at a time.
    few = mean_CD.numel() <= FEW_ELEMENTS
    programs = 1 if few else min(num_classes, MOST_PROGRAMS)
    tile = min(_block(num_classes, least=1), max(8192 // block, 1)) if few else 1
    loss = mean_CD.new_empty(())
    loss_P = loss if programs == 1 else mean_CD.new_empty(programs)
    by_weight_CD = torch.empty_like(mean_CD) if by_weight else None
    e_CD, e_sum_PD, e_sum_D, share_C = None, None, None, None
    if by_mean:
        e_CD, e_sum_D, share_C = torch.empty_like(mean_CD), mean_CD.new_empty(dim), mean_CD.new_empty(num_classes)
        e_sum_PD = e_sum_D if programs == 1 else mean_CD.new_empty(programs, dim)
    with _on(mean_CD):
        code.align_rows[(programs,)](
            by_weight_CD,
            e_CD,
            e_sum_PD,
            share_C,
            loss_P,
            center_D if write_sum else None,
            weight_CD,
            mean_CD,
            None if of_state else center_D,
            seen_C if of_state else seen_C.contiguous().view(torch.int8),
            None if of_state else seen_C.sum(),
            *weight_CD.stride(),
            num_classes,
            dim,
            programs,
            _FLOOR_SQUARED,
            _TINY,
            OF_STATE=of_state,
            WRITE_SUM=write_sum,
            BY_WEIGHT=by_weight,
            BY_MEAN=by_mean,
            BLOCK_R=tile,
            BLOCK_D=block,
            num_warps=_warps(tile * block),
        )
        if programs > 1:
            code.add_terms[_blocks(dim if by_mean else 1, 64)](
                loss, e_sum_D, loss_P, e_sum_PD, programs, dim, BY_MEAN=by_mean, BLOCK_P=32, BLOCK_D=64, num_warps=4
            )
    return loss, Terms(by_weight_CD, e_CD, e_sum_D, share_C)


def can_pull_back(factor: Tensor, *saved: Tensor | None) -> bool:
    """Return whether :func:`pull_back` takes a gradient of the regularizer, beside what was saved for it."""
    known = (x for x in saved if x is not None)
    return (
        factor.is_cuda
        and not torch.compiler.is_compiling()
        and (factor.dtype, factor.ndim) == (torch.float32, 0)
        and _are_plain(factor, *known)
    )


def pull_back(
    terms: Terms,
    factor: Tensor,
    rate_N: Tensor | None,
    class_N: Tensor | None,
    weight_dtype: torch.dtype | None,
    features_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by the weight (C, D) and by the features (N, D) in these dtypes, times the factor.

    Each where there are terms for it, and for the latter what :func:`update_class_means_` returned of hard labels.
    """
    by_weight_CD = by_features_ND = None
    num_rows = num_samples = dim = 0
    if terms.by_weight is not None:
        by_weight_CD = torch.empty_like(terms.by_weight, dtype=weight_dtype)
        num_rows, dim = by_weight_CD.shape
    if terms.e is not None and rate_N is not None and class_N is not None:
        num_samples, dim, rate_N, class_N = len(class_N), terms.e.shape[1], rate_N.contiguous(), class_N.contiguous()
        by_features_ND = terms.e.new_empty(num_samples, dim, dtype=features_dtype)
    if num_samples + num_rows == 0:
        return by_weight_CD, by_features_ND
    block = _block(dim)
    with _on(factor):
        _code().pull_back[(num_samples + num_rows,)](
            by_features_ND,
            by_weight_CD,
            terms.by_weight,
            terms.e,
            terms.e_sum,
            terms.share,
            rate_N,
            class_N,
            factor,
            num_samples,
            dim,
            BY_FEATURES=num_samples > 0,
            BY_WEIGHT=num_rows > 0,
            BLOCK_D=block,
            num_warps=_warps(block),
        )
    return by_weight_CD, by_features_ND


def project_gradient(
    out_CD: Tensor,
    grad_CD: Tensor,
    weight_CD: Tensor,
    mean_CD: Tensor,
    seen_C: Tensor,
    center_D: Tensor,
    *,
    gamma: float,
    paper: bool,
    of_state: bool = False,
) -> None:
    """Write the projected gradient into ``out_CD``, which may be the gradient itself; ``of_state`` as above."""
    num_classes, dim = grad_CD.shape
    block = _block(dim)
    with _on(mean_CD):
        _code().project[(num_classes,)](
            out_CD,
            grad_CD.detach(),
            weight_CD.detach(),
            mean_CD,
            center_D,
            seen_C if of_state else seen_C.contiguous().view(torch.int8),
            *out_CD.stride(),
            *grad_CD.stride(),
            *weight_CD.stride(),
            num_classes,
            dim,
            float(gamma),
            _FLOOR_SQUARED,
            _TINY,
            OF_STATE=of_state,
            PAPER=paper,
            BLOCK_C=_block(num_classes) if of_state else 1,
            BLOCK_D=block,
            num_warps=_warps(block),
        )
    if not out_CD.is_inference():
        torch.autograd.graph.increment_version(out_CD)
