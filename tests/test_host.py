"""The update of CPU batches through numpy: the same formula as the way of every other device, by other means."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import make_batch, same_state, state_of, to_numpy
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
