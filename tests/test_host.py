"""The update and the regularizer on the CPU through numpy: the formulas of every other device, by other means."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import Problem, make_batch, make_problem, same_state, state_of, to_bools, to_numpy
from torch import Tensor

import spalign
from spalign import functional as F
from spalign import host

# Few elements, where calls decide, and many, where memory does: two ways to go. One and several blocks of the latter.
SIZES = {"few": (40, 5, 6), "many samples": (3000, 5, 24), "many classes": (40, 3000, 24)}
# float32 against float64: a batch mean of up to 600 samples adds up as many roundings of 6e-8 of values of O(10).
SINGLE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def close_to(state: Tensor, want: reference.Array, tolerance: dict[str, Any]) -> None:
    np.testing.assert_allclose(to_numpy(state), want, **tolerance)


@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("block", [1 << 18, 100])
def test_a_stream_equals_the_reference(
    momentum: float | None, size: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_BLOCK", block)
    n, c, d = SIZES[size]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mean, weight = torch.zeros(c, d, dtype=state_dtype), torch.zeros(c, dtype=state_dtype)
    mean_sum = torch.zeros(d, dtype=torch.float64)
    want_mean, want_weight = np.zeros((c, d)), np.zeros(c)
    tolerance = TIGHT if dtype == torch.float64 else SINGLE
    for step in range(4):
        h, y = make_batch(step, n, c, d, dtype)
        assert host.can_read(h)
        rate = host.update_class_means_(mean, weight, mean_sum, h, y, momentum)
        before = want_weight
        want_mean, want_weight = reference.update_class_means(want_mean, want_weight, to_numpy(h), y.numpy(), momentum)
        close_to(mean, want_mean, tolerance)
        close_to(weight, want_weight, TIGHT)
        close_to(mean_sum, want_mean.sum(0), {"rtol": 1e-12, "atol": 1e-9} if tolerance is TIGHT else {"atol": 1e-2})
        count = np.bincount(y.numpy(), minlength=c)
        part = count / want_weight.clip(1) if momentum is None else np.where(before > 0, momentum, 1.0)
        assert rate is not None
        close_to(rate, (part / count.clip(1))[y.numpy()], {"rtol": 1e-6})


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("size", SIZES)
def test_it_equals_the_way_of_other_devices(momentum: float | None, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, c, d = SIZES[size]
    here, there = (spalign.ClassMeanTracker(c, d, momentum=momentum) for _ in range(2))
    for step in range(3):
        h, y = make_batch(step, n, c, d)
        here.update(h, y)
        with monkeypatch.context() as patch:
            patch.setattr(host, "can_read", lambda features: False)
            there.update(h, y)
        close_to(here.mean, to_numpy(there.mean), SINGLE)
        assert torch.equal(here.weight, there.weight)


@pytest.mark.parametrize("dim", [1, 12])
@pytest.mark.parametrize("n", [60_000, 450_000])
@pytest.mark.parametrize("block", [1 << 18, 24])
def test_large_batches_are_not_biased_by_rounding(
    dim: int, n: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collapsed class that is most of a batch: equal terms round alike."""
    monkeypatch.setattr(host, "_BLOCK", block)
    c = 5
    y = torch.where(torch.arange(n) % 9 < 8, 1, torch.arange(n) % c)
    y[y == 3] = 4
    h = torch.full((n, dim), 1.1) + 0.3 * y.unsqueeze(1)
    tracker = spalign.ClassMeanTracker(c, dim)
    tracker.update(h, y)
    h_ND, labels = to_numpy(h), y.numpy()
    want = np.array([h_ND[labels == k].mean(0) if (labels == k).any() else np.zeros(dim) for k in range(c)])
    # At most 4096 roundings of 6e-8 that all go the same way, half as many on average.
    np.testing.assert_allclose(to_numpy(tracker.mean), want, rtol=1.2e-4)
    np.testing.assert_array_equal(to_numpy(tracker.weight), np.bincount(labels, minlength=c))


@pytest.mark.parametrize("size", SIZES)
def test_means_that_have_converged_do_not_drift_and_their_sum_stays_right(size: str) -> None:
    """A batch equal to the means moves nothing, bit for bit, however often; so the rates cannot bias the means."""
    n, c, d = SIZES[size]
    tracker = spalign.ClassMeanTracker(c, d)
    y = torch.arange(n) % c
    h = make_batch(0, c, c, d)[0].round()[y]  # integers, so that sums of equal rows are exact
    tracker.update(h, y)
    first = state_of(tracker)
    for _ in range(50):
        tracker.update(h, y)
    # Sums of many samples times 1 / n round, by 6e-8 of values of up to 16 and for each of up to 600 samples.
    torch.testing.assert_close(tracker.mean, first["mean"], rtol=0, atol=1e-6 if n < 100 else 2e-4)
    torch.testing.assert_close(tracker.mean_sum, tracker.mean.double().sum(0), rtol=1e-6, atol=1e-5)


def test_long_cumulative_means_are_not_biased_by_rounded_shares() -> None:
    """1 - 1e-6 rounds by 3e-8, which a thousand times over would show: the means move by differences instead."""
    for c in (4, 20_000):
        mean, weight = torch.full((c, 8), 10.0), torch.full((c,), 1_000_003.0)
        h, y = torch.full((4, 8), 10.0), torch.arange(4)
        for _ in range(1000):
            host.update_class_means_(mean, weight, None, h, y, None)
        assert torch.equal(mean, torch.full((c, 8), 10.0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_left_to_the_general_way(size: str, value: float) -> None:
    n, c, d = SIZES[size]
    tracker, without = spalign.ClassMeanTracker(c, d), spalign.ClassMeanTracker(c, d)
    for t in (tracker, without):
        t.update(*make_batch(1, n, c, d))
    h, y = make_batch(2, n, c, d)
    h[3, 2] = value
    before = state_of(tracker)
    arguments = (tracker.mean, tracker.weight, tracker.mean_sum, h, y, 0.1)
    assert host.update_class_means_(*arguments) is None
    assert same_state(tracker, before)
    tracker.update(h, y)
    keep = torch.arange(n) != 3
    without.update(h[keep], y[keep])
    torch.testing.assert_close(tracker.mean, without.mean, **SINGLE)
    assert torch.equal(tracker.weight, without.weight)


def test_what_it_takes() -> None:
    h, y = make_batch(1, 12, 4, 6)
    assert host.can_read(h)
    assert host.can_read(h.half())
    assert host.can_read(h.requires_grad_())
    assert not host.can_read(h.bfloat16())  # which numpy has no type for
    assert not host.can_read(h.to("meta"))
    assert host.all_usable(y, 4, -100)
    assert host.all_usable(y.to(torch.uint8), 4, 4)
    assert not host.all_usable(y, 4, 0)
    assert not host.all_usable(y, 3, -100)
    assert not host.all_usable(y.float(), 4, -100)
    assert not host.all_usable(y[:0], 4, -100)
    assert not host.all_usable(y.to("meta"), 4, -100)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_range_of_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 3, 99], dtype=dtype)
    assert host.all_within(labels, 100)
    assert not host.all_within(labels, 99)
    if dtype.is_signed:
        assert not host.all_within(torch.tensor([0, -1, 3], dtype=dtype), 100)


@pytest.mark.parametrize("size", SIZES)
def test_autograd_sees_the_means_change(size: str) -> None:
    """A graph that saved the means themselves fails, instead of using other values in backward."""
    n, c, d = SIZES[size]
    tracker = spalign.ClassMeanTracker(c, d)
    x = torch.ones(c, d, requires_grad=True)
    product = (x * tracker.mean).sum()
    tracker.update(*make_batch(1, n, c, d))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("ignored", [-100, 2])
def test_the_functional_form_reads_labels_itself(ignored: int) -> None:
    """Labels out of range and ignored ones change nothing; who calls the function has checked nothing."""
    h, y = make_batch(1, 12, 4, 6)
    y[0], y[1] = 7, -3
    mean, weight = torch.zeros(4, 6), torch.zeros(4)
    F.update_class_means_(mean, weight, h, y, ignore_index=ignored)
    keep = (y >= 0) & (y < 4) & (y != ignored)
    want_mean, want_weight = reference.update_class_means(
        np.zeros((4, 6)), np.zeros(4), to_numpy(h[keep]), y[keep].numpy(), 0.1
    )
    close_to(mean, want_mean, SINGLE)
    close_to(weight, want_weight, TIGHT)


# ----------------------------------------------------------------------------------------------------------------------
# The regularizer
# ----------------------------------------------------------------------------------------------------------------------


def terms(p: Problem, rate_N: Tensor | None = None, labels_N: Tensor | None = None, *, by_weight: bool = True) -> Any:
    center_D = F.global_mean(p.mean, p.seen)
    assert host.can_align(p.w, p.mean, center_D)
    return host.alignment_terms(p.w, p.mean, p.seen, center_D, rate_N, labels_N, by_weight=by_weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [3, 40])
def test_the_loss_and_its_gradients_equal_eq_15(dtype: torch.dtype, n: int) -> None:
    """By the weight, and by the features of fewer samples than classes and of more."""
    tolerance = TIGHT if dtype == torch.float64 else SINGLE
    p = make_problem(5, unseen=(), dtype=dtype)
    rate_N, labels_N = torch.rand(n, dtype=dtype), torch.arange(n) * 5 % 6
    loss, by_weight, by_features = terms(p, rate_N, labels_N)
    w, mean, seen, _ = p.numpy()
    close_to(loss, np.array(reference.alignment_loss(w, mean, seen)), tolerance)
    close_to(by_weight, reference.alignment_loss_grad_weight(w, mean, seen), tolerance)
    by_mean = reference.alignment_loss_grad_mean(w, mean, seen)
    close_to(by_features, to_numpy(rate_N)[:, None] * by_mean[labels_N.numpy()], tolerance)
    assert loss.dtype is by_weight.dtype is by_features.dtype is dtype
    assert loss.shape == ()
    assert [x is None for x in terms(p, by_weight=False)] == [False, True, True]


BAD_ROWS: dict[str, Any] = {
    "unseen": lambda p: p.seen[1].logical_not_(),
    "zero row": lambda p: p.w[1].zero_(),
    "row whose square vanishes": lambda p: p.w[1].mul_(1e-30),
    "row whose square overflows": lambda p: p.w[1].mul_(1e30),
    "row of nan": lambda p: p.w[1, 2].fill_(float("nan")),
    "infinite row": lambda p: p.w[1, 2].fill_(float("inf")),
    "mean on the global mean": lambda p: p.mean[1].copy_((p.mean.sum(0) - p.mean[1]) / 5),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_classes_without_a_direction_are_left_to_the_general_way(name: str) -> None:
    """Which gives exactly 0 for them, and for the others what the reference says of them."""
    p = make_problem(5, unseen=(), dtype=torch.float32)
    BAD_ROWS[name](p)
    assert terms(p) is None
    w = p.w.clone().requires_grad_()
    loss = F.alignment_loss(w, p.mean, p.seen, center_D=F.global_mean(p.mean, p.seen))
    loss.backward()
    assert w.grad is not None
    nw, nmean, nseen = to_numpy(p.w), to_numpy(p.mean), to_bools(p.seen)
    nw[1] = 0  # nothing to align, like each of these
    want = reference.alignment_loss_grad_weight(nw, nmean, nseen)
    close_to(loss, np.array(reference.alignment_loss(nw, nmean, nseen)), SINGLE)
    close_to(w.grad[[0, 2, 3, 4, 5]], want[[0, 2, 3, 4, 5]], SINGLE)
    finite = w[1].isfinite()  # zero times what is not finite is not zero: such a value stays where it is
    assert (w.grad[1][finite] == 0).all()


def test_means_whose_squares_overflow_are_left_to_the_general_way() -> None:
    p = make_problem(5, unseen=(), dtype=torch.float32)
    p.mean[1] = 8e18  # times 5/6, squared, times 8; a sixth of it, the global mean, is still well within float32
    assert terms(p) is None


def test_rounding_takes_no_cosine_beyond_one() -> None:
    """Rows that are their means' directions: some of 6000 cosines round to more than 1, but no loss to less than 0."""
    worst = 0.0
    for seed in range(1000):
        p = make_problem(seed, unseen=(), dtype=torch.float32)
        p.w.copy_(p.mean - F.global_mean(p.mean, p.seen))
        loss = float(terms(p)[0])
        assert loss >= 0
        worst = max(worst, loss)
    assert worst < 1e-6


def test_the_weights_storage_can_still_be_resized() -> None:
    """As FSDP2 does to gathered parameters; what numpy shares memory with cannot."""
    p = make_problem(5, unseen=(), dtype=torch.float32)
    assert terms(p) is not None
    p.w.untyped_storage().resize_(0)


def test_soft_labels_are_left_to_the_general_way() -> None:
    p = make_problem(5, unseen=(), dtype=torch.float32)
    assert terms(p, torch.rand(4, 6)) is None


@pytest.mark.parametrize("align", ["both", "classifier", "features"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_equals_the_way_of_other_devices(align: Any, soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients over a stream in which the last class is seen late."""
    torch.manual_seed(0)
    fc = torch.nn.Linear(8, 5)
    here, there = (spalign.SpARegLoss(fc, spalign.ClassMeanTracker(5, 8), align=align) for _ in range(2))
    used = 0
    whole = host.alignment_terms

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal used
        result = whole(*args, **options)
        used += result is not None
        return result

    for step in range(6):
        h, y = make_batch(step, 30, 4 + step // 3, 8)
        targets = torch.nn.functional.one_hot(y, 5).float() if soft else y
        results = []
        for term, numpy in ((here, True), (there, False)):
            with monkeypatch.context() as patch:
                patch.setattr(host, "alignment_terms", counted)
                if not numpy:
                    patch.setattr(host, "can_align", lambda *_: False)
                leaf = h.clone().requires_grad_()
                fc.weight.grad = None
                loss = term(leaf, targets)
                (3.0 * loss).backward()
                results.append([loss.detach(), fc.weight.grad, leaf.grad])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, **SINGLE)
    # Soft labels need none of it where the features receive a gradient.
    assert used == (0 if soft and align != "classifier" else 3)


def test_which_tensors_the_loss_takes() -> None:
    p = make_problem(5, unseen=(), dtype=torch.float32)
    center = F.global_mean(p.mean, p.seen)
    assert host.can_align(torch.nn.Parameter(p.w), p.mean, center)
    assert not host.can_align(p.w.double(), p.mean, center)
    assert not host.can_align(torch.complex(p.w, -p.w).conj().imag, p.mean, center)  # negated when read, not in memory
    assert not host.can_align(p.w.bfloat16(), p.mean.bfloat16(), center.bfloat16())
    assert not host.can_align(p.w, p.mean.clone().requires_grad_(), center)
    assert not host.can_align(p.w.to("meta"), p.mean.to("meta"), center.to("meta"))
    assert not host.can_align(torch.zeros(1 << 9, 1 << 8), torch.zeros(1 << 9, 1 << 8), torch.zeros(1 << 8))
    assert not host.can_align(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(4))
