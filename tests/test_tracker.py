"""ClassMeanTracker: what it takes in, what it keeps, and that its state survives everything a module goes through."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import make_batch, same_state, state_of, to_bools, to_numpy
from torch import Tensor, nn

import spalign

C, D = 5, 6
# float32 means of O(1) values against float64: some roundings of 6e-8 per update.
SINGLE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def fed_tracker(steps: int = 3, momentum: float | None = 0.1) -> spalign.ClassMeanTracker:
    tracker = spalign.ClassMeanTracker(C, D, momentum=momentum)
    for step in range(steps):
        h, y = make_batch(step, 11, C - 1, D)  # the last class stays unseen
        tracker.update(h, y)
    return tracker


def reference_stream(steps: int, momentum: float | None) -> tuple[reference.Array, reference.Array]:
    mean, weight = np.zeros((C, D)), np.zeros(C)
    for step in range(steps):
        h, y = make_batch(step, 11, C - 1, D)
        mean, weight = reference.update_class_means(mean, weight, to_numpy(h), y.numpy(), momentum)
    return mean, weight


# ----------------------------------------------------------------------------------------------------------------------
# Construction
# ----------------------------------------------------------------------------------------------------------------------


def test_buffers_and_defaults() -> None:
    tracker = spalign.ClassMeanTracker(C, D)
    assert isinstance(tracker, nn.Module)
    assert list(tracker.parameters()) == []
    assert (tracker.mean.shape, tracker.mean.dtype) == ((C, D), torch.float32)
    assert (tracker.weight.shape, tracker.weight.dtype) == ((C,), torch.float32)
    assert (tracker.momentum, tracker.ignore_index) == (0.1, -100)
    assert not tracker.mean.any()
    assert not tracker.seen.any()
    assert tracker.seen.dtype == torch.bool
    assert not tracker.directions().any()
    assert not tracker.center.any()


def test_running_sums_are_double_precision_and_the_default_dtype_plays_no_part() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        tracker = spalign.ClassMeanTracker(C, D)
    finally:
        torch.set_default_dtype(torch.float32)
    dtypes = {k: v.dtype for k, v in tracker.named_buffers()}
    assert dtypes["mean"] == dtypes["weight"] == torch.float32
    assert dtypes["mean_sum"] == torch.float64


def test_for_classifier_takes_sizes_device_and_options() -> None:
    tracker = spalign.ClassMeanTracker.for_classifier(nn.Linear(D, C), momentum=None, ignore_index=255)
    assert tracker.mean.shape == (C, D)
    assert (tracker.momentum, tracker.ignore_index) == (None, 255)
    on_meta = spalign.ClassMeanTracker.for_classifier(nn.Linear(D, C, device="meta"))
    assert on_meta.mean.is_meta
    turned = spalign.Classifier(nn.Linear(C, D), class_dim=1)
    assert spalign.ClassMeanTracker.for_classifier(turned).mean.shape == (C, D)
    assert spalign.ClassMeanTracker(C, D, device="meta").mean.is_meta


def test_repr_names_the_sizes() -> None:
    assert "num_classes=5, feature_dim=6" in repr(spalign.ClassMeanTracker(C, D))


# ----------------------------------------------------------------------------------------------------------------------
# Updates
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5, 1.0])
def test_stream_equals_the_reference(momentum: float | None) -> None:
    tracker = fed_tracker(8, momentum)
    mean, weight = reference_stream(8, momentum)
    np.testing.assert_allclose(to_numpy(tracker.mean), mean, **SINGLE)
    assert to_numpy(tracker.weight).tolist() == weight.tolist()  # counts are exact in float32
    assert tracker.seen.tolist() == [True, True, True, True, False]
    seen = to_bools(tracker.seen)
    np.testing.assert_allclose(to_numpy(tracker.center), reference.global_mean(mean, seen), **SINGLE)
    np.testing.assert_allclose(to_numpy(tracker.directions()), reference.directions(mean, seen), **SINGLE)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_stream_in_float64_equals_the_reference_to_rounding(momentum: float | None) -> None:
    tracker = spalign.ClassMeanTracker(C, D, momentum=momentum).double()
    mean, weight = np.zeros((C, D)), np.zeros(C)
    for step in range(8):
        h, y = make_batch(step, 11, C - 1, D, torch.float64)
        tracker.update(h, y)
        mean, weight = reference.update_class_means(mean, weight, h.numpy(), y.numpy(), momentum)
    np.testing.assert_allclose(to_numpy(tracker.mean), mean, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("num_classes", [20, 200, 256, 300, 1000])
def test_labels_of_every_integer_type(dtype: torch.dtype, num_classes: int) -> None:
    """Also where the number of classes does not fit into the labels' type: masks are often uint8."""
    tracker = spalign.ClassMeanTracker(num_classes, 2, momentum=None)
    labels = torch.tensor([0, 7, 19, 100 if num_classes > 100 else 3, 19])
    tracker.update(torch.ones(5, 2), labels.to(dtype))
    assert tracker.seen.nonzero().flatten().tolist() == sorted(set(labels.tolist()))
    assert tracker.weight.sum() == 5


def test_ignore_index_inside_the_range_of_classes() -> None:
    tracker = spalign.ClassMeanTracker(3, 2, ignore_index=1)
    tracker.update(torch.ones(3, 2), torch.tensor([0, 1, 2]))
    assert tracker.seen.tolist() == [True, False, True]


def test_ignore_index_255_of_uint8_masks() -> None:
    tracker = spalign.ClassMeanTracker(19, 2, ignore_index=255)
    tracker.update(torch.ones(1, 2, 2, 2), torch.tensor([[[0, 255], [18, 255]]], dtype=torch.uint8))
    assert tracker.weight.sum() == 2
    assert tracker.seen.nonzero().flatten().tolist() == [0, 18]


@pytest.mark.parametrize("soft", [False, True])
def test_dense_shapes_equal_their_flat_form(soft: bool) -> None:
    flat, dense = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    h, y = make_batch(1, 24, C, D)
    q = torch.softmax(torch.randn(24, C), 1)
    flat.update(h, q if soft else y)
    h_dense = h.reshape(2, 3, 4, D).permute(0, 3, 1, 2)
    targets = q.reshape(2, 3, 4, C).permute(0, 3, 1, 2) if soft else y.reshape(2, 3, 4)
    dense.update(h_dense, targets)
    assert torch.equal(flat.mean, dense.mean)
    assert torch.equal(flat.weight, dense.weight)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 3)])
def test_dense_gradient_has_the_shape_of_the_features(shape: tuple[int, ...]) -> None:
    tracker = spalign.ClassMeanTracker(C, D)
    h = torch.randn(2, D, *shape, requires_grad=True)
    (grad,) = torch.autograd.grad(tracker(h, torch.randint(0, C, (2, *shape))).sum(), h)
    assert grad.shape == h.shape
    assert grad.any()


def test_non_contiguous_and_strided_inputs() -> None:
    a, b = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    h, y = make_batch(2, 12, C, D)
    wide = torch.stack([h, -h], 2)
    a.update(wide[:, :, 0], torch.stack([y, y], 1)[:, 0])
    b.update(h, y)
    assert torch.equal(a.mean, b.mean)


@pytest.mark.parametrize("soft", [False, True])
def test_empty_batches_change_nothing(soft: bool) -> None:
    tracker = fed_tracker()
    before = state_of(tracker)
    targets = torch.empty(0, C) if soft else torch.empty(0, dtype=torch.int64)
    tracker.update(torch.empty(0, D), targets)
    out = tracker(torch.empty(0, D, requires_grad=True), targets)
    now = state_of(tracker)
    for name in ("mean", "weight"):
        assert torch.equal(now[name], before[name])
    # The incremental sum may be replaced by the exact one: float32 roundings of 4 means of size 4.
    torch.testing.assert_close(now["mean_sum"], before["mean_sum"], rtol=0, atol=1e-5)
    assert torch.equal(out, tracker.mean)


def test_soft_one_hot_labels_are_hard_labels() -> None:
    hard, soft = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    for step in range(4):
        h, y = make_batch(step, 11, C, D)
        hard.update(h, y)
        soft.update(h, nn.functional.one_hot(y, C).float())
    torch.testing.assert_close(soft.mean, hard.mean, **SINGLE)
    assert torch.equal(soft.weight, hard.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_labels_of_every_float_type(dtype: torch.dtype) -> None:
    tracker = spalign.ClassMeanTracker(3, 2)
    tracker.update(torch.tensor([[2.0, 4.0]]), torch.tensor([[0.0, 0.25, 0.75]], dtype=dtype))
    assert tracker.weight.tolist() == [0.0, 0.25, 0.75]
    # The first observation of both classes is the one feature there is, up to the rounding of q h / q.
    torch.testing.assert_close(tracker.mean[1:], torch.tensor([[2.0, 4.0], [2.0, 4.0]]), rtol=1e-6, atol=0)


def test_soft_rows_that_are_not_finite_or_say_nothing_change_nothing() -> None:
    tracker = spalign.ClassMeanTracker(3, 2)
    inf, nan = torch.inf, torch.nan
    rows = [[0.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [nan, 1, 0], [inf, 0, 0], [0.2, nan, nan]]
    tracker.update(torch.ones(5, 2), torch.tensor(rows))
    assert not tracker.seen.any()
    assert not tracker.mean.any()


def test_inputs_are_not_written() -> None:
    tracker = spalign.ClassMeanTracker(C, D)
    h, y = make_batch(3, 11, C, D)
    h[2, 1], y[4] = torch.nan, -100
    q = torch.softmax(torch.randn(11, C), 1)
    h0, y0, q0 = h.clone(), y.clone(), q.clone()
    tracker.update(h, y)
    tracker.update(h, q)
    tracker(h, q)
    assert torch.equal(h.nan_to_num(), h0.nan_to_num())
    assert torch.isnan(h[2, 1])
    assert torch.equal(y, y0)
    assert torch.equal(q, q0)
    double = spalign.ClassMeanTracker(C, D).double()
    h, q = h0.double(), q0.double()
    double.update(h, q)
    double.update(h, y)
    assert torch.isnan(h[2, 1])
    assert torch.equal(q, q0.double())


# ----------------------------------------------------------------------------------------------------------------------
# forward
# ----------------------------------------------------------------------------------------------------------------------


def test_forward_updates_in_training_and_only_reads_in_evaluation() -> None:
    tracker, twin = fed_tracker(), fed_tracker()
    h, y = make_batch(9, 11, C, D)
    out = tracker(h, y)
    twin.update(h, y)
    assert torch.equal(tracker.mean, twin.mean)
    assert torch.equal(out, tracker.mean)
    tracker.eval()
    before = state_of(tracker)
    out = tracker(h.requires_grad_(), y)
    assert same_state(tracker, before)
    assert torch.equal(out, tracker.mean)
    assert not out.requires_grad


def test_update_works_in_evaluation_mode_and_builds_no_graph() -> None:
    tracker = spalign.ClassMeanTracker(C, D).eval()
    h, y = make_batch(9, 11, C, D)
    tracker.update(h.requires_grad_(), y)
    assert tracker.seen.any()
    assert not any(b.requires_grad for b in tracker.buffers())


def test_forward_returns_a_copy() -> None:
    tracker = fed_tracker()
    h, y = make_batch(9, 11, C, D)
    for mode in (True, False):
        out = tracker.train(mode)(h, y)
        out.mul_(0.0)
        assert tracker.mean.any()


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_forward_gradient_is_the_rate_of_the_update(momentum: float | None) -> None:
    """d mu'_c / d h_i = r_c: 1 / n_c at first, then 1 / (N_c + n_c) or momentum / n_c."""
    tracker = spalign.ClassMeanTracker(2, 1, momentum=momentum)
    h = torch.tensor([[1.0], [3.0], [5.0]], requires_grad=True)
    y = torch.tensor([0, 0, -100])
    (first,) = torch.autograd.grad(tracker(h, y).sum(), h)
    assert first.flatten().tolist() == [0.5, 0.5, 0.0]
    (second,) = torch.autograd.grad(tracker(h, y).sum(), h)
    rate = 0.25 if momentum is None else 0.05
    torch.testing.assert_close(second.flatten(), torch.tensor([rate, rate, 0.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_forward_gradient_comes_in_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    tracker = spalign.ClassMeanTracker(C, D)
    h, y = make_batch(9, 11, C, D, dtype)
    out = tracker(h.requires_grad_(), y)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), h)[0].dtype == dtype


# ----------------------------------------------------------------------------------------------------------------------
# State
# ----------------------------------------------------------------------------------------------------------------------


def test_reset_forgets_everything_in_place() -> None:
    tracker = fed_tracker()
    pointers = {k: v.data_ptr() for k, v in tracker.named_buffers()}
    tracker.reset()
    assert {k: v.data_ptr() for k, v in tracker.named_buffers()} == pointers
    assert same_state(tracker, state_of(spalign.ClassMeanTracker(C, D)))
    tracker.update(*make_batch(1, 11, C, D))
    twin = spalign.ClassMeanTracker(C, D)
    twin.update(*make_batch(1, 11, C, D))
    assert same_state(tracker, state_of(twin))


def through_file(tracker: spalign.ClassMeanTracker) -> spalign.ClassMeanTracker:
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = spalign.ClassMeanTracker(C, D, momentum=tracker.momentum)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def by_assignment(tracker: spalign.ClassMeanTracker) -> spalign.ClassMeanTracker:
    other = spalign.ClassMeanTracker(C, D, momentum=tracker.momentum)
    other.load_state_dict(copy.deepcopy(tracker.state_dict()), assign=True)
    return other


COPIES: dict[str, Callable[[spalign.ClassMeanTracker], spalign.ClassMeanTracker]] = {
    "state_dict": through_file,
    "assign": by_assignment,
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_copies_continue_bit_for_bit_and_on_their_own(how: str, momentum: float | None) -> None:
    tracker = fed_tracker(3, momentum)
    other = COPIES[how](tracker)
    assert same_state(other, state_of(tracker))
    before = state_of(tracker)
    h, y = make_batch(50, 20, C, D)
    other.update(h, y)
    assert same_state(tracker, before)
    tracker.update(h, y)
    assert same_state(other, state_of(tracker))
    assert torch.equal(other.directions(), tracker.directions())


def test_loading_writes_into_the_buffers() -> None:
    tracker = spalign.ClassMeanTracker(C, D)
    pointers = [b.data_ptr() for b in tracker.buffers()]
    tracker.load_state_dict(fed_tracker().state_dict())
    assert [b.data_ptr() for b in tracker.buffers()] == pointers


@pytest.mark.parametrize("assign", [False, True])
def test_means_set_by_hand_have_their_center(assign: bool) -> None:
    """Many classes, whose sum is kept and not made afresh by each update: a wrong one would last."""
    rng = torch.Generator().manual_seed(0)
    mean, weight = torch.randn(400, 8, generator=rng) + 3.0, torch.ones(400)
    mean[7], weight[7] = 0.0, 0.0  # not seen
    tracker = spalign.ClassMeanTracker(400, 8)
    tracker.load_state_dict({"mean": mean, "weight": weight}, assign=assign)
    # One float32 rounding of numbers about 3.
    np.testing.assert_allclose(to_numpy(tracker.center), to_numpy(mean)[to_bools(weight > 0)].mean(0), rtol=1e-6)
    with pytest.raises(RuntimeError, match="Missing key"):
        tracker.load_state_dict({"mean_sum": tracker.mean_sum})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_fewer_bits_has_the_center_of_its_means(dtype: torch.dtype, assign: bool) -> None:
    """The sum of 400 means of about 300 is beyond what float16 holds."""
    first, tracker = (spalign.ClassMeanTracker(400, 8) for _ in range(2))
    h, y = make_batch(0, 4000, 400, 8)
    first.update(h + 300.0, y)
    narrow = {k: v.to(dtype) for k, v in first.state_dict().items()}
    tracker.load_state_dict(narrow, assign=assign)
    assert [b.dtype for b in tracker.buffers()] == [torch.float32, torch.float32, torch.float64]
    want = reference.global_mean(to_numpy(narrow["mean"]), to_bools(narrow["weight"] > 0))
    # One float32 rounding.
    np.testing.assert_allclose(to_numpy(tracker.center), want, rtol=1e-6)
    tracker.update(h + 300.0, y)
    assert tracker.mean.dtype == torch.float32


def test_what_is_built_and_moved_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        tracker = spalign.ClassMeanTracker(C, D)
        double = spalign.ClassMeanTracker(C, D).double()
    for one in (tracker, double):
        one.update(*make_batch(0, 11, C, D))
        h, y = make_batch(1, 11, C, D)
        one(h.requires_grad_(), y).sum().backward()
        assert h.grad is not None


def test_a_device_without_float64_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises on Apple's MPS, which is not here."""
    zeros = torch.zeros

    def without_float64(*size: int, dtype: torch.dtype, **options: Any) -> Tensor:
        if dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", without_float64)
    with pytest.raises(ValueError, match="device is cpu, which has no float64"):
        spalign.ClassMeanTracker(C, D)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "to half", "to bfloat16", "float"])
def test_narrow_conversions_leave_the_state_as_it_is(convert: str) -> None:
    tracker = fed_tracker()
    before = state_of(tracker)
    holder = nn.ModuleList([tracker, nn.Linear(2, 2)])
    if convert.startswith("to "):
        holder.to(getattr(torch, convert[3:]))
    else:
        getattr(holder, convert)()
    assert same_state(tracker, before)
    tracker.update(*make_batch(1, 11, C, D, torch.bfloat16))
    assert tracker.mean.dtype == torch.float32


def test_double_is_honoured_and_float_goes_back() -> None:
    tracker = fed_tracker()
    mean = tracker.mean.clone()
    tracker.double()
    assert (tracker.mean.dtype, tracker.weight.dtype) == (torch.float64, torch.float64)
    assert tracker.directions().dtype == torch.float64
    assert torch.equal(tracker.mean, mean.double())
    tracker.update(*make_batch(1, 11, C, D, torch.float64))
    tracker.update(*make_batch(1, 11, C, D, torch.float16))
    tracker.float()
    assert (tracker.mean.dtype, tracker.mean_sum.dtype) == (torch.float32, torch.float64)
    tracker.update(*make_batch(1, 11, C, D))


def test_device_moves() -> None:
    tracker = spalign.ClassMeanTracker(C, D).half().to("meta")
    assert all(b.is_meta for b in tracker.buffers())
    assert tracker.mean.dtype == torch.float32
    with pytest.raises(ValueError, match=r"class means on meta.*\.to_empty\(device='cpu'\).*reset\(\)"):
        tracker.update(*make_batch(1, 11, C, D))
    tracker.to_empty(device="cpu").reset()
    tracker.update(*make_batch(1, 11, C, D))
    assert tracker.seen.any()


def exact_center(tracker: spalign.ClassMeanTracker) -> Tensor:
    return tracker.mean.double()[tracker.seen].mean(0)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_center_after_thousands_of_updates_is_the_mean_of_the_means(momentum: float | None) -> None:
    """Offset features, as behind a ReLU: the incremental sum must not drift away from what it sums."""
    tracker = spalign.ClassMeanTracker(10, 8, momentum=momentum)
    rng = torch.Generator().manual_seed(1)
    for step in range(4000):
        h = torch.randn(16, 8, generator=rng) + 20.0
        tracker.update(h, torch.randint(0, 5 if step < 2000 else 10, (16,), generator=rng))
    # Directions are the means minus their mean: an error of the center is an error of every direction. The means
    # themselves carry float32 roundings of 1e-6 (20 x 6e-8); the center may not be off by many of those.
    assert (tracker.center.double() - exact_center(tracker)).abs().max() < 2e-5


def test_leaving_training_mode_refreshes_the_center() -> None:
    tracker = fed_tracker(200)
    tracker.mean_sum.add_(0.1)
    tracker.eval()
    assert (tracker.center.double() - exact_center(tracker)).abs().max() < 1e-6  # one float32 rounding


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_a_single_class_never_gets_a_direction(momentum: float | None) -> None:
    """Its mean is the global mean; what rounding leaves of the difference points nowhere."""
    tracker = spalign.ClassMeanTracker(4, 8, momentum=momentum)
    loss = spalign.SpARegLoss(nn.Linear(8, 4), tracker)
    rng = torch.Generator().manual_seed(1)
    for _ in range(2000):
        tracker.update(torch.randn(8, 8, generator=rng) * 3 + 5, torch.zeros(8, dtype=torch.int64))
    assert not tracker.directions().any()
    assert loss() == 0


def test_a_single_class_gets_no_direction_from_what_a_large_batch_left_behind() -> None:
    """Roundings of features of 1e6 are large beside later means of 1e-3."""
    tracker = spalign.ClassMeanTracker(4, 8, momentum=1.0)
    for scale in (1e6, 1e6, 1e-3):
        tracker.update(torch.randn(7, 8) * scale, torch.full((7,), 2))
    assert not tracker.directions().any()


def test_weight_keeps_counting_beyond_the_integers_of_float32() -> None:
    tracker = spalign.ClassMeanTracker(2, 1, momentum=None)
    tracker.weight[0] = 2.0**24
    tracker.mean[0], tracker.mean_sum[0] = 1.0, 1.0
    for _ in range(10):
        tracker.update(torch.ones(1000, 1), torch.zeros(1000, dtype=torch.int64))
    assert tracker.weight[0] == 2.0**24 + 10_000
    assert tracker.mean[0] == 1.0


def test_process_group_none_needs_no_distributed() -> None:
    a, b = spalign.ClassMeanTracker(C, D, process_group=None), spalign.ClassMeanTracker(C, D)
    a.update(*make_batch(1, 11, C, D))
    b.update(*make_batch(1, 11, C, D))
    assert same_state(a, state_of(b))


@pytest.mark.parametrize("on_the_host", [True, False])
def test_lightly_used_classes_do_not_cost_time_in_the_hard_path(
    on_the_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For class indices nothing of shape (C, D) is formed: a million classes are updated by 4 rows."""
    if not on_the_host:
        monkeypatch.setattr("spalign.host.can_read", lambda features: False)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """Record the largest tensor that an operation allocates."""

        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func._schema.name.endswith(("_", "detach")):
                self.numel = max(self.numel, out.numel())
            return out

    tracker = spalign.ClassMeanTracker(100_000, 4)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        tracker.update(torch.ones(4, 4), torch.tensor([1, 5, 5, 99_999]))
    assert largest.numel < 1000


def test_a_single_class_has_no_direction_however_its_sum_was_rounded() -> None:
    """It lies on the global mean, which is kept apart from it: their difference is rounding and points nowhere."""
    tracker = spalign.ClassMeanTracker(C, D)
    tracker.update(torch.ones(2, D), torch.tensor([1, 1]))
    tracker.mean_sum.mul_(torch.linspace(1, 1.001, D))
    assert tracker.seen.sum() == 1
    assert not tracker.directions().any()
    assert spalign.SpARegLoss(nn.Linear(D, C), tracker)().item() == 0.0
