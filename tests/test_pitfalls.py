"""One test or more for each pitfall that concerns tracker, classifier access, loss, rotation, projection and capture.

Numbers are those of the project's list of pitfalls. Most of A (optimizers) is interop/test_optimizers.py; D1 (syncs) is
test_no_sync.py; C1 to C3, C5 and B3 need several ranks: distributed/test_ranks.py; D9 (CUDA graphs) needs a GPU:
gpu/test_gpu.py.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import HEADS, Head, make_batch, make_problem, rotation, same_state, state_of, to_numpy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import spalign
from spalign import functional as F

C, D, N = 5, 6, 20


def fed(classifier: spalign.classifier.ClassifierLike | None = None) -> spalign.ClassMeanTracker:
    tracker = spalign.ClassMeanTracker(C, D)
    tracker.update(*make_batch(1, N, C, D))
    return tracker


# ----------------------------------------------------------------------------------------------------------------------
# A: the optimizer
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radial", ["paper", "keep"])
@pytest.mark.parametrize("s", [1e-4, 1.0, 65536.0])
def test_a5_projection_is_positively_homogeneous(s: float, radial: F.Radial) -> None:
    """A5: gradients may still carry the loss scale; 2000 random rows."""
    p = make_problem(1, num_classes=2000, dim=16, unseen=(), dtype=torch.float32)
    one = F.project_gradient(p.g, p.w, p.mean, p.seen, gamma=0.2, radial=radial)
    scaled = F.project_gradient(p.g * s, p.w, p.mean, p.seen, gamma=0.2, radial=radial)
    # A power of two is exact; 1e-4 rounds once on the way in, relative to the row.
    error = (scaled / s - one).norm(dim=1) / p.g.norm(dim=1)
    assert error.max() <= (0.0 if s != 1e-4 else 1e-6)


@pytest.mark.parametrize("radial", ["paper", "keep"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a5_non_finite_rows_stay_so_and_touch_no_other(bad: float, radial: F.Radial) -> None:
    """A5: the scaler's search for inf must find it, and rows beside it must not suffer."""
    p = make_problem(2, unseen=(2,), dtype=torch.float32)
    want = F.project_gradient(p.g, p.w, p.mean, p.seen, gamma=0.2, radial=radial)
    g = p.g.clone()
    g[1, 3] = g[2, 0] = bad  # class 2 is unseen
    got = F.project_gradient(g, p.w, p.mean, p.seen, gamma=0.2, radial=radial)
    finite = torch.isfinite(got).all(1)
    assert finite.tolist() == [True, False, False, True, True, True]
    assert torch.equal(got[finite], want[finite])
    assert torch.equal(got[2].nan_to_num(7.0), g[2].nan_to_num(7.0)), "an unseen class keeps its gradient"


@pytest.mark.parametrize("kind", HEADS)
def test_a17_gradients_are_written_in_place(kind: str) -> None:
    """A17: CUDA graphs and DDP's buckets know gradients by their address."""
    head = HEADS[kind](make_problem(1, num_classes=C, dim=D).w.float())
    tracker = fed()
    optimizer = spalign.SpAProj(torch.optim.SGD(head.parameters, lr=0.1), head.classifier, tracker, gamma=0.2)
    h, y = make_batch(3, N, C, D)
    nn.functional.cross_entropy(head.logits(h), y).backward()
    grads = [p.grad for p in head.parameters]
    pointers = [g.data_ptr() for g in grads if g is not None]
    bucket = torch.zeros(C * D)
    if kind == "linear":  # as DDP's gradient_as_bucket_view has it
        p = head.parameters[0]
        assert p.grad is not None
        bucket.copy_(p.grad.flatten())
        p.grad = bucket.view(C, D)
        grads, pointers = [p.grad], [bucket.data_ptr()]
    before = [g.clone() for g in grads if g is not None]
    for _ in range(2):
        optimizer.step()
        for p, g, pointer in zip(head.parameters, grads, pointers, strict=True):
            assert p.grad is g
            assert p.grad is not None
            assert p.grad.data_ptr() == pointer
    assert any(not torch.equal(g, b) for g, b in zip(grads, before, strict=True) if g is not None)
    if kind == "linear":
        assert torch.equal(bucket.view(C, D), head.parameters[0].grad)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------
# B: the classifier's weight
# ----------------------------------------------------------------------------------------------------------------------


def assign(fc: nn.Linear) -> None:
    fc.load_state_dict(copy.deepcopy(fc.state_dict()), assign=True)


def refill(fc: nn.Linear) -> None:
    fc.to("meta").to_empty(device="cpu")
    nn.init.normal_(fc.weight)
    nn.init.zeros_(fc.bias)


def replace(fc: nn.Linear) -> None:
    fc.weight = nn.Parameter(torch.randn(C, D))


def widen(fc: nn.Linear) -> None:
    fc.double()


def swap(fc: nn.Linear) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        fc.to(torch.bfloat16).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("change", [assign, refill, replace, widen, swap])
def test_b1_the_weight_is_looked_up_at_every_use(change: Callable[[nn.Linear], None]) -> None:
    """B1: attach, use, replace the parameter, and loss, rotation and projection act on the new one."""
    fc = nn.Linear(D, C)
    tracker = fed()
    spareg = spalign.SpARegLoss(fc, tracker)
    slerp = spalign.SpASlerp(fc, tracker, total_steps=1, alpha_max=0.5, threshold=1.0)
    optimizer = spalign.SpAProj(torch.optim.SGD(fc.parameters(), lr=0.0), fc, tracker, gamma=0.0)
    spareg().backward()
    slerp.step()
    optimizer.step()
    optimizer.zero_grad()
    old = fc.weight.detach().clone()
    change(fc)

    (grad,) = torch.autograd.grad(spareg(), fc.weight)
    assert grad.any()
    before = F.alignment(fc.weight, tracker.mean, tracker.seen)
    slerp.step()
    assert (F.alignment(fc.weight, tracker.mean, tracker.seen) > before).all()
    assert not torch.equal(fc.weight.detach().float(), old)

    optimizer.param_groups[0]["params"] = list(fc.parameters())
    h, y = make_batch(2, N, C, D, fc.weight.dtype)
    nn.functional.cross_entropy(fc(h), y).backward()
    raw = fc.weight.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    want = F.project_gradient(raw, fc.weight, tracker.mean, tracker.seen, gamma=0.0)
    # The tracker keeps its centre incrementally: a float32 rounding.
    torch.testing.assert_close(fc.weight.grad, want, rtol=1e-4, atol=1e-6)
    assert not torch.equal(want, raw)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("trained", [False, True])
def test_b5_after_a_rotation_the_next_forward_pass_is_better_aligned(kind: str, trained: bool) -> None:
    """B5: parametrized heads recompute their weight; the rows of the next forward count, and keep their norms."""
    w = make_problem(1, num_classes=C, dim=D).w.float()
    head: Head = HEADS[kind](w)
    tracker = fed()
    if trained:  # a forward, backward and step leave stale attributes behind
        optimizer = torch.optim.SGD(head.parameters, lr=0.1)
        h, y = make_batch(2, N, C, D)
        nn.functional.cross_entropy(head.logits(h), y).backward()
        optimizer.step()
    before = head.rows()
    spalign.SpASlerp(head.classifier, tracker, total_steps=1, alpha_max=0.5, threshold=1.0).step()
    after = head.rows()
    assert (F.alignment(after, tracker.mean, tracker.seen) > F.alignment(before, tracker.mean, tracker.seen)).all()
    # A few roundings of a norm and, for weight norm, of g v / |v|.
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-6, atol=0)


def test_b6_square_weights_are_read_as_told() -> None:
    """B6: with C == D nothing but ``class_dim`` can tell rows from columns."""
    w = make_problem(1, num_classes=4, dim=4, unseen=()).w.float()
    tracker = spalign.ClassMeanTracker(4, 4)
    tracker.update(*make_batch(1, N, 4, 4))
    results = []
    for weight, class_dim in ((w, 0), (w.t().contiguous(), 1)):
        p = nn.Parameter(weight.clone())
        adapter = spalign.Classifier(p, class_dim=class_dim)
        loss = spalign.SpARegLoss(adapter, tracker)()
        optimizer = spalign.SpAProj(torch.optim.SGD([p], lr=0.0), adapter, tracker, gamma=0.0)
        p.grad = torch.ones(4, 4) if class_dim == 0 else torch.ones(4, 4).t()
        optimizer.step()
        spalign.SpASlerp(adapter, tracker, total_steps=1, alpha_max=0.5, threshold=1.0).step()
        results.append((loss.detach(), *(x if class_dim == 0 else x.t() for x in (p.grad, p.detach()))))
    for a, b in zip(*results, strict=True):
        # Sums over strided rows may add up in another order.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    wrong = spalign.SpARegLoss(nn.Parameter(w.t().contiguous()), tracker)()
    assert (wrong - results[0][0]).abs() > 1e-3


def pair_at(theta: float, dtype: torch.dtype, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and means of two classes, the first row at the angle theta from its mean's direction."""
    q = rotation(5, dim)
    mean, w = torch.zeros(2, dim, dtype=torch.float64), torch.zeros(2, dim, dtype=torch.float64)
    mean[0, 0], mean[1, 0] = 1.0, -1.0
    w[0, 0], w[0, 1], w[1, 1] = math.cos(theta), math.sin(theta), 1.0
    return (3.0 * w @ q).to(dtype), (mean @ q).to(dtype), torch.tensor([True, True])


@pytest.mark.parametrize("theta", [0.0, 1e-8, 1e-4, math.pi / 2, math.pi - 1e-4, math.pi])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_b9_slerp_at_every_angle(theta: float, alpha: float, dtype: torch.dtype) -> None:
    """B9: no NaN at 0, no 0 for 1e-4, no path at pi; norms to the last place; alpha 0 changes no bit."""
    w, mean, seen = pair_at(theta, dtype)
    # The threshold is above every cosine, also those that round to 1.
    new, rotated, antipodal = F.slerp(w, mean, seen, alpha=alpha, threshold=1.1)
    assert torch.isfinite(new).all()
    want = reference.slerp(to_numpy(w), to_numpy(mean), np.array([True, True]), alpha, 1.1)
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(new), want, rtol=20 * eps, atol=20 * eps)
    torch.testing.assert_close(new.norm(dim=1), w.norm(dim=1), rtol=4 * eps, atol=0)
    if alpha == 0.0:
        assert torch.equal(new, w)
        assert not rotated.any()
    assert antipodal.tolist() == [math.pi - theta < 1e-3, False]
    if antipodal[0]:
        assert torch.equal(new[0], w[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1.1e-3, 2e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.9])
def test_b9_norms_hold_close_to_pi(dtype: torch.dtype, distance: float, alpha: float) -> None:
    """B9: there both sine ratios are large and nearly cancel."""
    w, mean, seen = pair_at(math.pi - distance, dtype)
    new, rotated, _ = F.slerp(w, mean, seen, alpha=alpha, threshold=1.0)
    assert rotated.all()
    torch.testing.assert_close(new.norm(dim=1), w.norm(dim=1), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("theta", [1e-2, 1e-3, 3e-4, 1e-4])
def test_b9_small_angles_in_single_precision(theta: float) -> None:
    """B9: the arc cosine of a float32 cosine is 0 or wrong by half here; the angle must shrink by its share."""
    w, mean, seen = pair_at(theta, torch.float32)
    new = F.slerp(w, mean, seen, alpha=0.5, threshold=1.1).weight  # above every cosine, also one rounded to 1
    before, after = (reference.angle(to_numpy(x[0]), to_numpy(mean[0] - mean[1])) for x in (w, new))
    # Unit vectors are good to a few 6e-8.
    assert after == pytest.approx(0.5 * before, abs=3e-7)


# ----------------------------------------------------------------------------------------------------------------------
# C: state
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["update", "reset", "load", "rotation", "second loss"])
def test_c7_state_may_change_between_forward_and_backward(between: str) -> None:
    """C7: autograd saves nothing that is written later; the gradient is that of the forward pass."""
    fc = nn.Linear(D, C)
    tracker = fed()
    spareg = spalign.SpARegLoss(fc, tracker)
    h, y = make_batch(2, N, C, D)
    h.requires_grad_()
    start = copy.deepcopy(tracker.state_dict())
    want = torch.autograd.grad(spareg(h, y) + tracker(h, y).sum(), (fc.weight, h))

    tracker.load_state_dict(start)
    loss = spareg(h, y) + tracker(h, y).sum()
    if between == "update":
        tracker.update(*make_batch(3, N, C, D))
    elif between == "reset":
        tracker.reset()
    elif between == "load":
        tracker.load_state_dict(start)
    elif between == "second loss":
        spareg(*make_batch(3, N, C, D))
    else:
        spalign.SpASlerp(fc, tracker, total_steps=1, alpha_max=0.5, threshold=1.0).step()
    for got, w in zip(torch.autograd.grad(loss, (fc.weight, h)), want, strict=True):
        assert torch.equal(got, w)


def test_c7_two_losses_one_backward() -> None:
    """C7: two forward passes (two views), their losses summed, one backward pass."""
    fc = nn.Linear(D, C)
    spareg = spalign.SpARegLoss(fc)
    (h1, y1), (h2, y2) = make_batch(1, N, C, D), make_batch(2, N, C, D)
    h1.requires_grad_()
    h2.requires_grad_()
    inputs = (fc.weight, h1, h2)
    one = spareg(h1, y1)
    two = spareg(h2, y2)
    both = torch.autograd.grad(one + two, inputs)
    twin = spalign.SpARegLoss(fc)
    parts = [torch.autograd.grad(twin(h, y), inputs, allow_unused=True) for h, y in ((h1, y1), (h2, y2))]
    for k in range(3):
        want = sum(g[k] for g in parts if g[k] is not None)
        assert isinstance(want, Tensor)
        torch.testing.assert_close(both[k], want, rtol=1e-6, atol=1e-8)  # one addition


def test_c8_buffers_keep_their_addresses() -> None:
    """C8: DDP, CUDA graphs and shared state know them by address; everything is written in place."""
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    buffers = dict(spareg.named_buffers())
    pointers = {k: b.data_ptr() for k, b in buffers.items()}
    for seed in range(100):
        h, y = make_batch(seed, N, C, D)
        spareg(h, torch.softmax(h[:, :C], 1) if seed % 3 == 0 else y)
        if seed % 10 == 0:
            spareg.eval()
            spareg(h, y)
            spareg.train()
    spareg.tracker.reset()
    assert {k: b.data_ptr() for k, b in spareg.named_buffers()} == pointers
    assert all(b is buffers[k] for k, b in spareg.named_buffers())


@pytest.mark.parametrize("soft", [False, True])
def test_c8_updates_under_inference_mode_do_not_spoil_later_training(soft: bool) -> None:
    """C8: a buffer replaced under ``inference_mode`` could not be saved for backward afterwards."""
    fc = nn.Linear(D, C)
    spareg, twin = spalign.SpARegLoss(fc), spalign.SpARegLoss(fc)
    h, y = make_batch(1, N, C, D)
    targets = torch.softmax(h[:, :C], 1) if soft else y
    with torch.inference_mode():
        spareg.tracker.update(h, targets)
        spareg.eval()(h, targets)
        spareg.train()
    twin.tracker.update(h, targets)
    twin.eval().train()
    assert not any(b.is_inference() for b in spareg.buffers())
    h2, y2 = make_batch(2, N, C, D)
    h2.requires_grad_()
    for got, want in zip(
        torch.autograd.grad(spareg(h2, y2), (fc.weight, h2)),
        torch.autograd.grad(twin(h2, y2), (fc.weight, h2)),
        strict=True,
    ):
        assert torch.equal(got, want)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, C))


def test_c9_weight_averaging_of_a_model_with_a_tracker() -> None:
    """C9: an average of an integer counter is not one; every entry is a float, averages alike, and loads again."""

    def make() -> nn.ModuleDict:
        fc = nn.Linear(D, C)
        return nn.ModuleDict({"fc": fc, "spareg": spalign.SpARegLoss(fc)})

    model = make()
    average = AveragedModel(model, use_buffers=True)
    total = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    for step in range(3):
        model["spareg"](*make_batch(step, N, C, D))
        average.update_parameters(model)
        for k, v in model.state_dict().items():
            total[k] += v / 3
    values = average.module.state_dict()
    assert all(v.is_floating_point() for v in values.values())
    for k, v in values.items():
        torch.testing.assert_close(v, total[k], rtol=1e-5, atol=1e-6)  # a running mean in float32
    averaged: Any = average.module.eval()
    loss = averaged["spareg"]()
    assert 0 < loss < 2
    reloaded = make().eval()
    reloaded.load_state_dict(values)
    assert torch.equal(reloaded["spareg"](), loss)


def test_c12_nothing_is_added_to_checkpoints_of_the_model() -> None:
    """C12: old checkpoints load strictly with every strategy attached (what is missing then: D12)."""
    model = network()
    keys = list(model.state_dict())
    spareg, _ = spalign.SpARegLoss(model[2]), spalign.FeatureCapture(model[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spalign.SpAProj(optimizer, model[2], spareg.tracker, gamma=0.3)
    spalign.SpASlerp(model[2], spareg.tracker, total_steps=3)
    assert list(model.state_dict()) == keys


def test_c13_every_number_that_matters_is_a_buffer() -> None:
    """C13: after a load, the next update, and what is read from it, are bit-equal."""
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    for step in range(3):
        spareg(*make_batch(step, N, C, D))
    other = spalign.SpARegLoss(spareg.classifier)
    other.load_state_dict(spareg.state_dict())
    h, y = make_batch(3, N, C, D)
    assert torch.equal(other(h, y), spareg(h, y))
    assert same_state(other, state_of(spareg))


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel])
def test_c10_copies_of_the_model_leave_the_original_alone(make: Callable[[nn.Module], nn.Module]) -> None:
    """C10: a hook that closes over the original would record validation passes of the EMA model."""
    model = network()
    features, spareg = spalign.FeatureCapture(model[2]), spalign.SpARegLoss(model[2])
    x, y = make_batch(1, N, C, 4)
    model(x)
    spareg(features(), y)
    before = state_of(spareg)
    other = make(model)
    other(x)
    other.eval()(x)
    with pytest.raises(RuntimeError, match="no features"):
        features()
    assert same_state(spareg, before)
    model(x)
    assert torch.equal(features(), model[:2](x))


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel])
def test_c10_copies_while_features_are_pending(make: Callable[[nn.Module], nn.Module]) -> None:
    """C10: non-leaf tensors cannot be deep-copied; the copy starts empty, the original keeps what it has."""
    model = network()
    features = spalign.FeatureCapture(model[2])
    model(make_batch(1, N, C, 4)[0])
    make(model)
    assert len(features()) == N


@pytest.mark.parametrize("whole", [False, True], ids=["head", "whole model"])
def test_c11_checkpointing_feeds_the_tracker_once(whole: bool) -> None:
    """C11: the segment runs again during backward; only the first run is recorded."""
    model = network()
    features, spareg = spalign.FeatureCapture(model[2]), spalign.SpARegLoss(model[2])
    for step in range(3):
        x, y = make_batch(step, N, C, 4)
        segment: Any = model if whole else model[2]
        logits = checkpoint(segment, x if whole else model[:2](x), use_reentrant=False)
        h = features()
        assert h.shape == (N, D)
        (nn.functional.cross_entropy(logits, y) + spareg(h, y)).backward()
    assert spareg.tracker.weight.sum() == 3 * N
    with pytest.raises(RuntimeError, match="no features"):
        features()


# ----------------------------------------------------------------------------------------------------------------------
# D: numbers and labels
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg", [False, True], ids=["tracker", "loss"])
def test_d2_all_samples_ignored(reg: bool) -> None:
    """D2: such a batch changes nothing and its features receive exactly 0."""
    tracker = fed()
    module: nn.Module = spalign.SpARegLoss(torch.randn(C, D), tracker) if reg else tracker
    before = state_of(tracker)
    h = torch.randn(N, D, requires_grad=True)
    out: Tensor = module(h, torch.full((N,), -100))
    (grad,) = torch.autograd.grad(out.sum(), h)
    assert same_state(tracker, before)
    assert not grad.any()


def test_d2_some_samples_ignored() -> None:
    """D2: the result is that of the batch without them, and their gradient is 0."""
    h, y = make_batch(1, N, C, D)
    ignored = torch.arange(N) % 3 == 0
    a, b = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    out = a(h.requires_grad_(), torch.where(ignored, -100, y))
    b.update(h[~ignored], y[~ignored])
    # Without the ignored zeros the additions may associate differently.
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-6, atol=1e-7)
    assert torch.equal(a.weight, b.weight)
    (grad,) = torch.autograd.grad(out.sum(), h)
    assert not grad[ignored].any()
    assert grad[~ignored].all()


def test_d2_segmentation_maps() -> None:
    """D2: ``[N, H, W]`` labels with ``[N, D, H, W]`` features, a border of 255."""
    tracker = spalign.ClassMeanTracker(C, D, momentum=None, ignore_index=255)
    h = torch.randn(2, D, 4, 5)
    y = torch.randint(0, C, (2, 4, 5))
    y[:, 0] = 255
    tracker.update(h, y)
    flat_h, flat_y = h.permute(0, 2, 3, 1).reshape(-1, D), y.flatten()
    for c in range(C):
        mine = flat_h[flat_y == c]
        assert tracker.weight[c] == len(mine)
        if len(mine):
            torch.testing.assert_close(tracker.mean[c], mine.mean(0), rtol=1e-5, atol=1e-6)  # other order of sums


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_d3_one_non_finite_sample(bad: float, soft: bool, dtype: torch.dtype) -> None:
    """D3: the means are those of the other samples; so are gradients, and the bad sample's is 0."""
    h, y = make_batch(1, N, C, D, dtype)
    targets = torch.softmax(h[:, :C].double(), 1) if soft else y
    h[4, 2] = bad
    keep = torch.arange(N) != 4
    w = torch.randn(C, D)
    a, b = spalign.SpARegLoss(w), spalign.SpARegLoss(w)
    good = h[keep].clone().requires_grad_()
    h.requires_grad_()
    la, lb = a(h, targets), b(good, targets[keep])
    for x, z in ((a.tracker.mean, b.tracker.mean), (a.tracker.weight, b.tracker.weight), (la, lb)):
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-6)  # the same sums in another order
    (ga,), (gb,) = torch.autograd.grad(la, h), torch.autograd.grad(lb, good)
    assert not ga[4].any()
    torch.testing.assert_close(ga[keep], gb, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


def test_d3_training_recovers_from_an_overflow() -> None:
    """D3: BatchNorm's running mean would stay NaN for good."""
    tracker = fed()
    before = state_of(tracker)
    tracker.update(torch.full((3, D), math.inf), torch.tensor([0, 1, 2]))
    tracker.update(torch.full((3, D), math.nan), torch.tensor([0, 1, 2]))
    assert same_state(tracker, before)


def test_d3_the_sum_of_large_finite_features_is_no_reason_for_nan() -> None:
    """D3: whatever is done with rows whose sum overflows, the state stays finite."""
    tracker = spalign.ClassMeanTracker(2, 4)
    tracker.update(torch.full((2, 4), 3e38), torch.tensor([0, 1]))
    tracker.update(torch.full((2, 4), -3e38), torch.tensor([0, 1]))
    assert all(torch.isfinite(b).all() for b in tracker.buffers())
    assert torch.isfinite(tracker.directions()).all()


@pytest.mark.parametrize("general", [False, True], ids=["host", "general"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "rows", [[[3e38, 0.0], [3e38, 0.0]], [[3e38, 0.0], [-3e38, 0.0]], [[-2e19, 1.0], [2e19, 1.0]]], ids=str
)
def test_d3_rows_of_finite_entries_that_overflow_in_sums_count_as_not_finite(
    rows: list[list[float]], soft: bool, general: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: each entry is finite, but not the sum of two samples or the step from one batch to the next."""
    if general:
        monkeypatch.setattr("spalign.host.can_read", lambda features: False)
    tracker = spalign.ClassMeanTracker(2, 2)
    tracker.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    before = state_of(tracker)
    h, y = torch.tensor(rows), torch.tensor([[1.0, 0.0], [1.0, 0.0]]) if soft else torch.tensor([0, 0])
    tracker.update(h, y)
    for i in range(2):
        tracker.update(h[i : i + 1], y[i : i + 1])
    assert same_state(tracker, before)


@pytest.mark.parametrize("weight", [1e30, 1e19])
def test_d3_soft_labels_may_not_make_sums_overflow(weight: float) -> None:
    """D3: finite weights times finite features."""
    tracker = spalign.ClassMeanTracker(2, 1)
    tracker.update(torch.full((3, 1), 1e15), torch.tensor([[weight, 0.0]]).expand(3, 2))
    assert all(torch.isfinite(b).all() for b in tracker.buffers())
    assert not tracker.seen.any()


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_d8_what_a_softmax_leaves_of_a_hopeless_class_is_not_divided_by(momentum: float | None) -> None:
    """D8: a weight of 1e-42 is no float32 divisor; the class stays unseen instead of getting a wrong mean."""
    tracker = spalign.ClassMeanTracker(3, 1, momentum=momentum)
    tracker.update(torch.tensor([[5.0]]), torch.tensor([[1.0, 1e-42, 0.0]]))
    assert tracker.seen.tolist() == [True, False, False]
    tracker.update(torch.tensor([[5.0]]), torch.tensor([[1.0, 1e-30, 0.0]]))
    assert tracker.seen.tolist() == [True, True, False]
    torch.testing.assert_close(tracker.mean.flatten(), torch.tensor([5.0, 5.0, 0.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("general", [False, True], ids=["host", "general"])
def test_d4_features_beyond_float32_raise_no_warning(general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """D4: float64 features of 1e300 are infinite in float32 state, and pass by like infinite ones."""
    if general:
        monkeypatch.setattr("spalign.host.can_read", lambda features: False)
    tracker = spalign.ClassMeanTracker(2, 1)
    tracker.update(torch.tensor([[1e300], [1.0]], dtype=torch.float64), torch.tensor([0, 1]))
    assert tracker.mean.flatten().tolist() == [0.0, 1.0]


def test_d4_a_float64_classifier_with_float32_means_and_soft_labels() -> None:
    """D4: their gradient meets in float64, and the state is not updated by a call that fails later."""
    spareg = spalign.SpARegLoss(nn.Linear(D, C).double())
    h, y = make_batch(1, N, C, D)
    h.requires_grad_()
    by_hard, by_soft = (
        torch.autograd.grad(spalign.SpARegLoss(spareg.classifier)(h, t), h)[0]
        for t in (y, nn.functional.one_hot(y, C).float())
    )
    assert by_soft.dtype == torch.float32
    torch.testing.assert_close(by_soft, by_hard, rtol=1e-5, atol=1e-7)  # sums of float32 rates in another order


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_d4_features_in_eight_bits(dtype: torch.dtype) -> None:
    """D4: numpy has no such type; they go the general way."""
    a, b = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    h, y = make_batch(1, N, C, D)
    a.update(h.to(dtype), y)
    b.update(h.to(dtype).float(), y)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-6, atol=1e-6)


def test_d4_views_with_the_negative_bit() -> None:
    """D4: the imaginary part of a conjugate is a view that numpy cannot read."""
    a, b = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    h, y = make_batch(1, N, C, D)  # a conversion of dtype would resolve the bit
    view, q = torch.complex(h, -h).conj().imag, nn.functional.one_hot(y, C).double()
    assert view.is_neg()
    for targets, negated in ((y, y), (q, torch.complex(q, -q).conj().imag)):
        a.update(view, negated)
        b.update(h, targets)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_d4_autocast_loss_close_to_float64(dtype: torch.dtype) -> None:
    """D4: features in half precision, state and maths in float32: within 1e-3 of the float64 value."""
    fc = nn.Linear(D, C)
    encoder = nn.Linear(4, D)
    x, y = make_batch(1, 200, C, 4)
    spareg = spalign.SpARegLoss(fc)
    exact = spalign.SpARegLoss(fc.weight.detach().double(), spalign.ClassMeanTracker(C, D).double())
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            h = encoder(x)
            assert h.dtype == dtype
            loss = spareg(h, y)
        want = exact(encoder(x).double(), y)
    assert loss.dtype == torch.float32
    assert (loss - want).abs() < 1e-3
    assert spareg.tracker.mean.dtype == torch.float32


def test_d4_running_sums_do_not_stall_in_half_precision() -> None:
    """D4: a bfloat16 sum of ones stops at 256."""
    tracker = spalign.ClassMeanTracker(2, 1, momentum=None).bfloat16()
    for _ in range(4):
        tracker.update(torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64))
    assert tracker.weight[0] == 4000
    assert tracker.mean[0].item() == pytest.approx(1, rel=1e-5)  # a thousand float32 additions


def test_d5_deterministic_algorithms() -> None:
    """D5: nothing raises, two runs are bit-equal (the CUDA side is in gpu/test_gpu.py)."""

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        fc = nn.Linear(D, C)
        spareg = spalign.SpARegLoss(fc)
        optimizer = spalign.SpAProj(torch.optim.SGD(fc.parameters(), lr=0.1), fc, spareg.tracker, gamma=0.3)
        for seed in range(3):
            h, y = make_batch(seed, N, C, D)
            optimizer.zero_grad()
            (
                nn.functional.cross_entropy(fc(h), y) + spareg(h, torch.softmax(h[:, :C], 1) if seed == 2 else y)
            ).backward()
            optimizer.step()
        spalign.SpASlerp(fc, spareg.tracker, total_steps=1, alpha_max=0.3, threshold=1.0).step()
        return [fc.weight.detach(), spareg.tracker.mean]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_d6_zero_rows_receive_exactly_zero(dtype: torch.dtype) -> None:
    """D6: the gradient of ``normalize(0)`` is 1e12; a zero row, an unseen class and a mean on mu_G must give 0."""
    p = make_problem(1, num_classes=6, dim=4, unseen=(1,), dtype=dtype)
    w, mean = p.w.clone(), p.mean.clone()
    w[0] = 0.0
    others = [0, 2, 3, 4]
    mean[5] = mean[others].mean(0)  # on the global mean, up to rounding
    w.requires_grad_()
    mean.requires_grad_()
    loss = F.alignment_loss(w, mean, p.seen)
    by_w, by_mean = torch.autograd.grad(loss, (w, mean))
    for row in (0, 1, 5):
        assert not by_w[row].any()
    assert by_w[[2, 3, 4]].any(1).all()
    assert not by_mean[1].any()
    # Classes 0 and 5 have no cosine of their own, but are part of mu_G: the same share for both, and nothing else.
    torch.testing.assert_close(by_mean[0], by_mean[5], rtol=1e-5, atol=1e-7)
    assert by_mean.abs().max() < 10
    w, mean, nothing = w.detach(), mean.detach(), [0, 1, 5]
    assert not F.alignment(w, mean, p.seen)[nothing].any()
    assert torch.equal(F.slerp(w, mean, p.seen, alpha=1.0, threshold=1.0).weight[nothing], w[nothing])
    assert torch.equal(F.project_gradient(p.g, w, mean, p.seen, gamma=0.0)[nothing], p.g[nothing])


def test_d6_gradcheck_beside_a_zero_row() -> None:
    """D6: rows that have a gradient keep the right one."""
    p = make_problem(2, num_classes=5, dim=4, unseen=(3,))
    p.w[0] = 0.0
    rest = p.w[1:].clone().requires_grad_()
    mean = p.mean.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, m: F.alignment_loss(torch.cat([p.w[:1], r]), m, p.seen), (rest, mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_d6_all_classes_at_one_point(dtype: torch.dtype) -> None:
    """D6: constant features, as after a collapse: no direction, no loss, no gradient, no rotation."""
    tracker = spalign.ClassMeanTracker(C, D).to(dtype)
    fc = nn.Linear(D, C).to(dtype)
    spareg = spalign.SpARegLoss(fc, tracker)
    h = (torch.linspace(0.1, 3.3, D, dtype=dtype)).repeat(N, 1).requires_grad_()
    y = torch.arange(N) % C
    before = fc.weight.detach().clone()
    for _ in range(30):
        loss = spareg(h, y)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (fc.weight, h)))
    spalign.SpASlerp(fc, tracker, total_steps=1, alpha_max=1.0, threshold=1.0).step()
    assert torch.equal(fc.weight, before)


@pytest.mark.parametrize("side", ["rows", "features"])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-20, 1e-17])
def test_d6_gradients_of_vanishing_rows_and_features_are_finite(scale: float, side: str) -> None:
    """D6: the gradient goes as 1 / length; where its square is no float any more, the length counts as 0."""
    fc = nn.Linear(D, C)
    h, y = make_batch(1, N, C, D)
    if side == "rows":
        nn.init.uniform_(fc.weight, -scale, scale)
    else:
        h = h * scale
    h.requires_grad_()
    grads = torch.autograd.grad(spalign.SpARegLoss(fc)(h, y), (fc.weight, h))
    assert all(torch.isfinite(g).all() for g in grads)
    assert bool(grads[0 if side == "rows" else 1].any()) == (scale > 1e-18)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_d6_rows_of_any_length_that_is_not_zero_count(scale: float) -> None:
    """D6: zero means zero; float32 rows are normalised from 1e-15 to 1e15."""
    p = make_problem(3, dtype=torch.float32)
    want = F.alignment(p.w, p.mean, p.seen)
    torch.testing.assert_close(F.alignment(p.w * scale, p.mean, p.seen), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(F.alignment(p.w, p.mean * scale, p.seen), want, rtol=1e-5, atol=1e-6)


def test_d7_four_classes_of_ten_are_a_problem_of_four() -> None:
    """D7: unseen classes neither shift the global mean nor water down the loss."""
    h, y = make_batch(1, 40, 4, D, torch.float64)
    names = torch.tensor([1, 4, 5, 9])
    w = make_problem(1, num_classes=10, dim=D).w
    results = []
    for rows, labels in ((w, names[y]), (w[names], y)):
        p = nn.Parameter(rows.clone())
        tracker = spalign.ClassMeanTracker(len(rows), D).double()
        spareg = spalign.SpARegLoss(p, tracker)
        features = h.clone().requires_grad_()
        loss = spareg(features, labels)
        by_w, by_h = torch.autograd.grad(loss, (p, features))
        optimizer = spalign.SpAProj(torch.optim.SGD([p], lr=0.0), p, tracker, gamma=0.2)
        p.grad = torch.ones_like(p)
        optimizer.step()
        spalign.SpASlerp(p, tracker, total_steps=1, alpha_max=0.5, threshold=1.0).step()
        tens = [by_w, tracker.directions(), p.grad, p.detach()]
        results.append([loss.detach(), by_h, *(x[names] if len(rows) == 10 else x for x in tens)])
        if len(rows) == 10:
            others = [c for c in range(10) if c not in names.tolist()]
            assert not by_w[others].any()
            assert torch.equal(p.detach()[others], w[others])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # float64, other order of sums


def smooth(q: Tensor, epsilon: float) -> Tensor:
    return (1 - epsilon) * q + epsilon / q.shape[1]


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_d8_smoothed_labels_are_hard_labels(epsilon: float, momentum: float | None) -> None:
    """D8: what smoothing spreads over every class says nothing of the class."""
    hard, soft = (spalign.ClassMeanTracker(C, D, momentum=momentum) for _ in range(2))
    for seed in range(4):
        h, y = make_batch(seed, N, C - 1, D)
        hard.update(h, y)
        soft.update(h, smooth(nn.functional.one_hot(y, C).float(), epsilon))
    torch.testing.assert_close(soft.mean, hard.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(soft.weight, hard.weight, rtol=1e-6, atol=0)
    assert soft.seen.tolist() == hard.seen.tolist()
    assert not soft.seen[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_d8_mixup_with_smoothing_leaves_absent_classes_unseen(dtype: torch.dtype) -> None:
    """D8: timm's Mixup: ``on`` and ``off`` values, mixed with the flipped batch."""
    h, y = make_batch(1, N, 3, D)
    off, lam = 0.1 / C, 0.3
    one_hot = torch.full((N, C), off).scatter_(1, y.unsqueeze(1), 1 - 0.1 + off)
    q = (one_hot * lam + one_hot.flip(0) * (1 - lam)).to(dtype)
    mixed = h * lam + h.flip(0) * (1 - lam)
    tracker = spalign.ClassMeanTracker(C, D, momentum=None)
    tracker.update(mixed, q)
    assert tracker.seen.tolist() == [True, True, True, False, False]
    want = np.zeros((C, D))
    _, weights = reference.class_statistics(to_numpy(mixed), to_numpy(q), C)
    sums, _ = reference.class_statistics(to_numpy(mixed), to_numpy(q), C)
    want[:3] = sums[:3] / weights[:3, None]
    np.testing.assert_allclose(to_numpy(tracker.mean), want, rtol=1e-4, atol=1e-5)
    # Each sample weighs 1 in all, up to the rounding of its label.
    assert tracker.weight.sum().item() == pytest.approx(N, rel=2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_d11_momentum_is_the_weight_of_the_new_value() -> None:
    """D11: as in BatchNorm; but the first observation of a class copies, there is no cold start from 0."""
    tracker = spalign.ClassMeanTracker(2, 1, momentum=0.1)
    tracker.update(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]))
    assert tracker.mean.flatten().tolist() == [3.0, 0.0]
    tracker.update(torch.tensor([[13.0], [5.0]]), torch.tensor([0, 1]))
    # 0.9 * 3 + 0.1 * 13, to a rounding; the other class copies although it comes later.
    torch.testing.assert_close(tracker.mean.flatten(), torch.tensor([4.0, 5.0]), rtol=1e-6, atol=0)


def test_d11_momentum_1_keeps_the_last_batch_and_small_momentum_the_first() -> None:
    """D11: the two ends tell an EMA decay from a momentum."""
    for momentum, want in ((1.0, 9.0), (1e-6, 1.0)):
        tracker = spalign.ClassMeanTracker(1, 1, momentum=momentum)
        tracker.update(torch.tensor([[1.0]]), torch.tensor([0]))
        tracker.update(torch.tensor([[9.0]]), torch.tensor([0]))
        assert tracker.mean.item() == pytest.approx(want, rel=1e-4)


def test_d11_an_absent_class_keeps_its_mean() -> None:
    """D11: an EMA over batches moves only the classes of the batch."""
    tracker = fed()
    before = tracker.mean.clone()
    tracker.update(torch.randn(4, D), torch.tensor([2, 2, 3, 2]))
    assert torch.equal(tracker.mean[[0, 1, 4]], before[[0, 1, 4]])
    assert not (tracker.mean[[2, 3]] == before[[2, 3]]).any()


def test_d11_none_is_the_exact_mean_of_the_stream() -> None:
    """D11: 1, 2, 6 gives 3, however it is split."""
    values = torch.tensor([[1.0], [2.0], [6.0]])
    for split in ([3], [1, 1, 1], [2, 1], [1, 2]):
        tracker = spalign.ClassMeanTracker(1, 1, momentum=None)
        for part in values.split(split):
            tracker.update(part, torch.zeros(len(part), dtype=torch.int64))
        assert tracker.mean.item() == 3.0
        assert tracker.weight.item() == 3.0


def train(
    make_loss: Callable[[nn.Linear, Tensor, Tensor], Tensor], wrap: bool = False, rotate: bool = False
) -> list[Tensor]:
    """Train three steps and return the weights."""
    torch.manual_seed(5)
    encoder, fc = nn.Linear(4, D), nn.Linear(D, C)
    parameters = [*encoder.parameters(), *fc.parameters()]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
    unseen = spalign.ClassMeanTracker.for_classifier(fc)
    if wrap:
        optimizer = spalign.SpAProj(optimizer, fc, unseen, gamma=0.0)
    slerp = spalign.SpASlerp(fc, unseen, total_steps=3, alpha_max=1.0, threshold=1.0)
    for seed in range(3):
        x, y = make_batch(seed, N, C, 4)
        h = torch.tanh(encoder(x))
        optimizer.zero_grad()
        (nn.functional.cross_entropy(fc(h), y) + make_loss(fc, h, y)).backward()
        optimizer.step()
        if rotate:
            slerp.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("what", ["lambda 0", "no class seen", "projection and rotation without means"])
def test_d12_a_term_that_is_off_changes_no_bit(what: str) -> None:
    """D12 and C12: with lambda 0, or without state after a resume, a run is bit-equal to one without spalign."""
    plain = train(lambda fc, h, y: torch.zeros(()))
    if what == "lambda 0":
        losses: dict[int, spalign.SpARegLoss] = {}
        off = train(lambda fc, h, y: 0.0 * losses.setdefault(id(fc), spalign.SpARegLoss(fc))(h, y))
    elif what == "no class seen":
        off = train(lambda fc, h, y: spalign.SpARegLoss(fc)())
    else:
        off = train(lambda fc, h, y: torch.zeros(()), wrap=True, rotate=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))


@pytest.mark.parametrize("kind", HEADS)
def test_d12_no_means_no_loss_no_gradient(kind: str) -> None:
    """D12: exactly 0, a gradient of exactly 0, never NaN; also when the first batch is all ignored."""
    head = HEADS[kind](make_problem(1, num_classes=C, dim=D).w.float())
    spareg = spalign.SpARegLoss(head.classifier)
    h = torch.randn(N, D, requires_grad=True)
    for loss in (spareg(), spareg(h, torch.full((N,), -100))):
        assert loss == 0
        grads = torch.autograd.grad(loss, [*head.parameters, h], allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
        assert all(g is None or torch.isfinite(g).all() for g in grads)


def test_d12_zero_times_an_overflowed_batch_is_not_nan() -> None:
    """D12: ``0 * nan`` is NaN; a batch of non-finite features gives a finite term."""
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    h = torch.full((N, D), math.nan, requires_grad=True)
    loss = spareg(h, torch.arange(N) % C)
    assert torch.isfinite(loss)
    assert not torch.autograd.grad(loss, h)[0].any()
