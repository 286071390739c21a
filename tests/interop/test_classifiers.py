"""Every kind of classifier through loss, rotation and projection, in every precision that heads are trained in.

What each strategy does to rows is tested with the strategy; here it is that each kind, in each dtype, gets the same
from all three (pitfalls B1, B5, B6, B7). Sharded weights are in tests/distributed/.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import FIXED, HEADS, Columns, Head, make_batch, make_problem, to_bools, to_numpy
from reference import Array
from torch import Tensor, nn

import spalign

C, D = 5, 6
SQUARE = "square columns"
KINDS = [*HEADS, SQUARE]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make_head(kind: str, dtype: torch.dtype, seed: int = 1) -> Head:
    """Return a head of some kind; the square one could be read either way but for its ``class_dim``."""
    if kind == SQUARE:
        module = Columns(make_problem(seed, num_classes=C, dim=C, dtype=dtype).w)
        return Head(spalign.Classifier(module, "prototypes", class_dim=1), list(module.parameters()), module)
    return HEADS[kind](make_problem(seed, num_classes=C, dim=D, dtype=dtype).w)


def dim_of(kind: str) -> int:
    return C if kind == SQUARE else D


def fed(head: Head, dtype: torch.dtype) -> spalign.ClassMeanTracker:
    """Return means of all classes but the last, in float64 for a float64 head."""
    tracker = spalign.ClassMeanTracker.for_classifier(head.classifier)
    tracker = tracker.double() if dtype == torch.float64 else tracker
    tracker.update(*make_batch(1, 40, C - 1, tracker.feature_dim, dtype))
    return tracker


def tolerance(dtype: torch.dtype, roundings: int, size: float = 1.0) -> dict[str, Any]:
    """Return that of some roundings of the head's dtype on values of some size, and of float32 maths below it."""
    maths = 1e-12 if dtype == torch.float64 else 2e-6
    return {"rtol": 0, "atol": (roundings * torch.finfo(dtype).eps + 4 * maths) * size}


def pulled_back(head: Head, by_rows: Array, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the gradient by the head's parameters that a gradient by its rows is, by autograd through what it does."""
    rows = head.logits(torch.eye(by_rows.shape[1], dtype=dtype)).t()
    return torch.autograd.grad((rows.double() * torch.from_numpy(by_rows)).sum(), head.parameters)


@every_kind
@every_dtype
def test_loss(kind: str, dtype: torch.dtype) -> None:
    """Value, gradient by the parameters and by the features; B6 for the square weight."""
    head = make_head(kind, dtype)
    tracker = fed(head, dtype)
    before = to_numpy(tracker.weight)
    h, y = make_batch(2, 12, C - 1, dim_of(kind), dtype)
    h.requires_grad_()
    loss = spalign.SpARegLoss(head.classifier, tracker)(h, y)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    *by_parameters, by_h = torch.autograd.grad(loss, [*head.parameters, h])

    problem = to_numpy(head.rows()), to_numpy(tracker.mean), to_bools(tracker.seen)
    # Not of a rounding of the head's: the maths is in float32 from its rows on.
    np.testing.assert_allclose(loss.item(), reference.alignment_loss(*problem), **tolerance(dtype, 0))
    want = pulled_back(head, reference.alignment_loss_grad_weight(*problem), dtype)
    size = max(float(exact.abs().max()) for exact in want)  # that by weight norm's magnitudes is 0
    for p, got, exact in zip(head.parameters, by_parameters, want, strict=True):
        assert got.dtype == p.dtype == dtype
        np.testing.assert_allclose(to_numpy(got), to_numpy(exact), **tolerance(dtype, 4, size))
    _, count = reference.class_statistics(to_numpy(h), y.numpy(), C)
    rate = reference.update_rates(before, count, 0.1)
    exact_h = np.stack([rate[c] * reference.alignment_loss_grad_mean(*problem)[c] for c in y.numpy()])
    np.testing.assert_allclose(to_numpy(by_h), exact_h, **tolerance(dtype, 1, float(np.abs(exact_h).max())))


@every_kind
@every_dtype
def test_rotation(kind: str, dtype: torch.dtype) -> None:
    """B5: the rows of the next forward pass turn by their share, keep their norms, and the unseen one its bits."""
    head = make_head(kind, dtype)
    tracker = fed(head, dtype)
    before = head.rows()
    spalign.SpASlerp(head.classifier, tracker, total_steps=1, alpha_max=0.4, threshold=1.0).step()
    after = head.rows()
    w, mean, seen = to_numpy(before), to_numpy(tracker.mean), to_bools(tracker.seen)
    want = reference.slerp(w, mean, seen, 0.4, 1.0)
    assert all(p.dtype == dtype for p in head.parameters)
    # One rounding of a plain weight; of v, g and g v / |v| with weight norm.
    np.testing.assert_allclose(to_numpy(after), want, **tolerance(dtype, 4, float(np.abs(want).max())))
    torch.testing.assert_close(
        after.double().norm(dim=1), before.double().norm(dim=1), rtol=4 * torch.finfo(dtype).eps, atol=0
    )
    assert (reference.alignment(to_numpy(after), mean, seen) > reference.alignment(w, mean, seen))[seen].all()
    assert torch.equal(after[-1], before[-1])


@every_kind
@every_dtype
@pytest.mark.parametrize("radial", ["paper", "keep"])
def test_projection(kind: str, dtype: torch.dtype, radial: spalign.functional.Radial) -> None:
    """What is left in each parameter's gradient is Eq. 20 of the rows' gradient."""
    head = make_head(kind, dtype)
    tracker = fed(head, dtype)
    g = make_problem(3, num_classes=C, dim=dim_of(kind), dtype=dtype).g
    for p, by_p in zip(head.parameters, pulled_back(head, to_numpy(g), dtype), strict=True):
        p.grad = by_p.clone()
    raw = [p.grad.clone() for p in head.parameters if p.grad is not None]
    inner = torch.optim.SGD(head.parameters, lr=0.0)
    spalign.SpAProj(inner, head.classifier, tracker, gamma=0.3, radial=radial).step()
    problem = to_numpy(head.rows()), to_numpy(tracker.mean), to_bools(tracker.seen)
    want = pulled_back(head, reference.project_gradient(to_numpy(g), *problem, 0.3, radial), dtype)
    for p, exact in zip(head.parameters, want, strict=True):
        assert p.grad is not None
        assert p.grad.dtype == dtype
        np.testing.assert_allclose(to_numpy(p.grad), to_numpy(exact), **tolerance(dtype, 8, float(exact.abs().max())))
    assert not all(torch.equal(p.grad, r) for p, r in zip(head.parameters, raw, strict=True) if p.grad is not None)


@pytest.mark.parametrize("kind", FIXED)
@every_dtype
def test_fixed_classifiers_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    """A fixed tensor, a buffer, a frozen layer: all of the gradient is the features', and no bit of a row changes."""
    w = make_problem(1, num_classes=C, dim=D, dtype=dtype).w
    classifier = FIXED[kind](w)
    tracker = spalign.ClassMeanTracker.for_classifier(classifier).to(torch.promote_types(dtype, torch.float32))
    h, y = make_batch(2, 12, C - 1, D, dtype)
    loss = spalign.SpARegLoss(classifier, tracker)(h.requires_grad_(), y)
    loss.backward()
    problem = to_numpy(w), to_numpy(tracker.mean), to_bools(tracker.seen)
    np.testing.assert_allclose(loss.item(), reference.alignment_loss(*problem), **tolerance(dtype, 0))
    _, count = reference.class_statistics(to_numpy(h), y.numpy(), C)
    rate = reference.update_rates(np.zeros(C), count, 0.1)
    exact = np.stack([rate[c] * reference.alignment_loss_grad_mean(*problem)[c] for c in y.numpy()])
    assert h.grad is not None
    np.testing.assert_allclose(to_numpy(h.grad), exact, **tolerance(dtype, 1, float(np.abs(exact).max())))
    assert torch.equal(spalign.Classifier.of(classifier).rows(), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_low_precision_rows_keep_their_norms(kind: str, dtype: torch.dtype) -> None:
    """B7: a hundred rotations, each rounded once: a drift below 1e-2, and nothing that is not finite."""
    head = make_head(kind, dtype)
    before = head.rows().double().norm(dim=1)
    tracker = spalign.ClassMeanTracker.for_classifier(head.classifier)
    slerp = spalign.SpASlerp(head.classifier, tracker, total_steps=100, alpha_max=0.3, threshold=1.0)
    for step in range(100):
        tracker.update(*make_batch(step, 20, C, dim_of(kind), dtype))
        slerp.step()
    after = head.rows().double()
    assert torch.isfinite(after).all()
    # In so few dimensions a single rounding of bfloat16, 2^-9, does not average out.
    assert ((after.norm(dim=1) - before).abs() / before).max() < (1e-2 if dtype == torch.float16 else 4e-2)


def assign(module: nn.Module) -> None:
    module.load_state_dict({k: 1.5 * v for k, v in copy.deepcopy(module.state_dict()).items()}, assign=True)


def refill(module: nn.Module) -> None:
    state = {k: 1.5 * v for k, v in copy.deepcopy(module.state_dict()).items()}
    module.to("meta").to_empty(device="cpu")
    module.load_state_dict(state)


def swap(module: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# torch itself cannot swap under old weight norm, whose product holds on to the leaves.
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, change)
        for kind in KINDS
        for change in (assign, refill, swap)
        if kind != "parameter" and (kind, change) != ("old_weight_norm", swap)
    ],
)
def test_the_parameters_of_every_kind_may_be_replaced(kind: str, change: Callable[[nn.Module], None]) -> None:
    """B1: all three act on what the module holds now, not on what it held when they were built."""
    head = make_head(kind, torch.float32)
    module = spalign.Classifier.of(head.classifier).module
    assert isinstance(module, nn.Module)
    tracker = fed(head, torch.float32)
    spareg = spalign.SpARegLoss(head.classifier, tracker)
    slerp = spalign.SpASlerp(head.classifier, tracker, total_steps=1, alpha_max=0.4, threshold=1.0)
    optimizer = spalign.SpAProj(torch.optim.SGD(head.parameters, lr=0.0), head.classifier, tracker, gamma=0.0)
    spareg().backward()
    optimizer.step()  # each has used the old ones once
    old = [p.detach().clone() for p in head.parameters]

    change(module)
    now = Head(head.classifier, list(module.parameters()), head.logits)
    assert all(g.any() for g in torch.autograd.grad(spareg(), now.parameters[-1:]))
    mean, seen = to_numpy(tracker.mean), to_bools(tracker.seen)
    w = to_numpy(now.rows())
    np.testing.assert_allclose(spareg().item(), reference.alignment_loss(w, mean, seen), atol=1e-5)
    slerp.step()
    np.testing.assert_allclose(to_numpy(now.rows()), reference.slerp(w, mean, seen, 0.4, 1.0), rtol=0, atol=2e-5)

    optimizer.param_groups[0]["params"] = now.parameters
    g = to_numpy(make_problem(3, num_classes=C, dim=dim_of(kind)).g)
    for p, by_p in zip(now.parameters, pulled_back(now, g, now.parameters[0].dtype), strict=True):
        p.grad = by_p.clone()
    optimizer.step()
    projected = reference.project_gradient(g, to_numpy(now.rows()), mean, seen, 0.0)
    for p, exact in zip(now.parameters, pulled_back(now, projected, now.parameters[0].dtype), strict=True):
        np.testing.assert_allclose(to_numpy(p.grad if p.grad is not None else p), to_numpy(exact), rtol=0, atol=2e-5)
    if change is not swap:  # which keeps the Python objects
        for p, o in zip(head.parameters, old, strict=True):
            assert p.is_meta or torch.equal(p, o) or change is refill
