"""SpASlerp: the schedule, what is rotated in every kind of head, and what never changes."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import HEADS, make_batch, make_problem, same_state, state_of, to_bools, to_numpy
from torch import Tensor, nn

import spalign

C, D = 5, 6
# float32: sines, a norm and, for weight norm, g / |v| on values of size up to 3.
SINGLE: dict[str, Any] = {"rtol": 5e-6, "atol": 2e-6}
every_head = pytest.mark.parametrize("kind", HEADS)


def fed(classifier: spalign.classifier.ClassifierLike, num_seen: int = C - 1) -> spalign.ClassMeanTracker:
    tracker = spalign.ClassMeanTracker.for_classifier(classifier)
    tracker.update(*make_batch(1, 40, num_seen, D))
    return tracker


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return make_problem(1, num_classes=C, dim=D, dtype=dtype).w


def one_step(t: int, total: int) -> spalign.SpASlerp:
    fc = nn.Linear(D, C)
    slerp = spalign.SpASlerp(fc, fed(fc), total_steps=total, alpha_max=0.3, threshold=1.0)
    slerp.load_state_dict({"last_step": t})
    return slerp


@every_head
@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_step_rotates_the_rows_of_the_next_forward_pass(kind: str, threshold: float) -> None:
    w = rows()
    head = HEADS[kind](w)
    tracker = fed(head.classifier)
    before = state_of(tracker)
    slerp = spalign.SpASlerp(head.classifier, tracker, total_steps=1, alpha_max=0.4, threshold=threshold)
    slerp.step()
    mean, seen = to_numpy(tracker.mean), to_bools(tracker.seen)
    want = reference.slerp(to_numpy(w), mean, seen, 0.4, threshold)
    np.testing.assert_allclose(to_numpy(head.rows()), want, **SINGLE)
    assert same_state(tracker, before), "rotation only reads the means"
    below = (reference.alignment(to_numpy(w), mean, seen) < threshold) & seen
    assert 0 < below.sum() < C
    assert int(slerp.num_rotated) == below.sum()
    assert int(slerp.num_antipodal) == 0


@every_head
def test_the_layer_shows_the_rotated_rows_before_the_next_forward_pass(kind: str) -> None:
    """Old weight norm keeps its product in an attribute, which checkpoints of other libraries and plots read."""
    head = HEADS[kind](rows())
    before = head.rows()
    spalign.SpASlerp(head.classifier, fed(head.classifier), total_steps=1, alpha_max=0.4, threshold=1.0).step()
    shown = spalign.Classifier.of(head.classifier)._weight().detach()
    shown = shown.flatten(1) if kind == "conv1x1" else shown.t() if kind == "columns" else shown
    torch.testing.assert_close(shown, head.rows(), rtol=1e-6, atol=1e-6)  # another kernel may round otherwise
    assert not torch.allclose(shown, before)


@every_head
def test_norms_stay_over_many_steps(kind: str) -> None:
    w = rows()
    head = HEADS[kind](w)
    slerp = spalign.SpASlerp(head.classifier, fed(head.classifier), total_steps=50, alpha_max=0.2, threshold=1.0)
    for _ in range(50):
        slerp.step()
    # One or two roundings per step, which do not conspire.
    torch.testing.assert_close(head.rows().norm(dim=1), w.norm(dim=1), rtol=50 * 1.2e-7, atol=0)


@every_head
def test_nothing_to_do_changes_no_bit(kind: str) -> None:
    """No class seen, alpha 0, or all rows at the threshold: every parameter keeps its bits."""
    head = HEADS[kind](rows())
    before = [p.detach().clone() for p in head.parameters]
    empty = spalign.ClassMeanTracker.for_classifier(head.classifier)
    spalign.SpASlerp(head.classifier, empty, total_steps=1, alpha_max=1.0, threshold=1.0).step()
    spalign.SpASlerp(head.classifier, fed(head.classifier), total_steps=1, alpha_max=0.0, threshold=1.0).step()
    spalign.SpASlerp(head.classifier, fed(head.classifier), total_steps=1, alpha_max=1.0, threshold=-1.0).step()
    for p, old in zip(head.parameters, before, strict=True):
        assert torch.equal(p, old)


@every_head
def test_rows_of_unseen_classes_keep_every_bit(kind: str) -> None:
    head = HEADS[kind](rows())
    before = head.rows()
    spalign.SpASlerp(head.classifier, fed(head.classifier, 3), total_steps=1, alpha_max=1.0, threshold=1.0).step()
    after = head.rows()
    assert torch.equal(after[3:], before[3:])
    assert not torch.equal(after[:3], before[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_weight(dtype: torch.dtype) -> None:
    w = rows(dtype)
    fc = nn.Linear(D, C, bias=False).to(dtype)
    with torch.no_grad():
        fc.weight.copy_(w)
    tracker = fed(fc)
    spalign.SpASlerp(fc, tracker, total_steps=1, alpha_max=0.4, threshold=1.0).step()
    assert fc.weight.dtype == dtype
    want = reference.slerp(to_numpy(w), to_numpy(tracker.mean), to_bools(tracker.seen), 0.4, 1.0)
    eps = torch.finfo(dtype).eps
    # For float64 the means are float32, so is the rounding of their centre.
    np.testing.assert_allclose(to_numpy(fc.weight), want, rtol=eps + 5e-6, atol=2e-6 + eps * 1e-2)


def test_norms_of_a_half_precision_head_over_many_steps() -> None:
    """Pitfall B7: a hundred steps in bfloat16, whose own rounding is 4e-3."""
    fc = nn.Linear(64, 10).bfloat16()
    before = fc.weight.float().norm(dim=1)
    tracker = spalign.ClassMeanTracker.for_classifier(fc)
    slerp = spalign.SpASlerp(fc, tracker, total_steps=100, alpha_max=0.3, threshold=1.0)
    for step in range(100):
        tracker.update(*make_batch(step, 40, 10, 64))
        slerp.step()
    after = fc.weight.float().norm(dim=1)
    assert ((after - before).abs() / before).max() < 1e-2


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
def test_negative_norms_of_weight_norm(kind: str) -> None:
    """A row with g < 0 points against v; it is the row that must turn towards the mean."""
    head = HEADS[kind](rows())
    magnitude = spalign.Classifier.of(head.classifier).leaves().magnitude
    assert magnitude is not None
    with torch.no_grad():
        magnitude.mul_(-1)
    w, tracker = head.rows(), fed(head.classifier)
    spalign.SpASlerp(head.classifier, tracker, total_steps=1, alpha_max=0.4, threshold=1.0).step()
    want = reference.slerp(to_numpy(w), to_numpy(tracker.mean), to_bools(tracker.seen), 0.4, 1.0)
    np.testing.assert_allclose(to_numpy(head.rows()), want, **SINGLE)


def test_the_schedule_counts_the_present_call_from_one() -> None:
    fc = nn.Linear(D, C)
    slerp = spalign.SpASlerp(fc, fed(fc), total_steps=4, alpha_max=0.2, threshold=0.9)
    assert (slerp.alpha, slerp.last_step) == (0.0, 0)
    for t in range(1, 7):
        slerp.step()
        assert slerp.last_step == t
        # One cosine.
        assert slerp.alpha == pytest.approx(reference.cosine_schedule(min(t, 4), 4, 0.2), rel=1e-14)
    assert slerp.alpha == 0.2, "the last of total_steps calls, and all later ones, rotate by alpha_max"


def test_the_first_call_rotates_by_alpha_of_1_not_of_0() -> None:
    fc = nn.Linear(D, C)
    slerp = spalign.SpASlerp(fc, fed(fc), total_steps=10, alpha_max=0.5, threshold=1.0)
    w = fc.weight.detach().clone()
    slerp.step()
    mean, seen = to_numpy(slerp.tracker.mean), to_bools(slerp.tracker.seen)
    want = reference.slerp(to_numpy(w), mean, seen, reference.cosine_schedule(1, 10, 0.5), 1.0)
    np.testing.assert_allclose(to_numpy(fc.weight), want, **SINGLE)
    assert not torch.equal(fc.weight, w)


def test_state_dict_is_the_count_and_total_steps_may_change_on_resume() -> None:
    slerp = one_step(3, 10)
    assert slerp.state_dict() == {"last_step": 3}
    fc = nn.Linear(D, C)
    resumed = spalign.SpASlerp(fc, fed(fc), total_steps=20, alpha_max=0.3, threshold=1.0)
    resumed.load_state_dict(slerp.state_dict())
    assert resumed.last_step == 3
    assert resumed.alpha == pytest.approx(reference.cosine_schedule(3, 20, 0.3), rel=1e-14)


def test_resuming_equals_not_stopping() -> None:
    torch.manual_seed(1)
    fc = nn.Linear(D, C)
    tracker = fed(fc)
    slerp = spalign.SpASlerp(fc, tracker, total_steps=5, alpha_max=0.3, threshold=1.0)
    slerp.step()
    slerp.step()
    fc2 = copy.deepcopy(fc)
    resumed = spalign.SpASlerp(fc2, tracker, total_steps=5, alpha_max=0.3, threshold=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(slerp.state_dict())))
    slerp.step()
    resumed.step()
    assert torch.equal(fc.weight, fc2.weight)


def test_is_no_lr_scheduler_and_hooks_into_nothing() -> None:
    fc = nn.Linear(D, C)
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    slerp = spalign.SpASlerp(fc, fed(fc), total_steps=5, alpha_max=0.3, threshold=1.0)
    assert not isinstance(slerp, torch.optim.lr_scheduler.LRScheduler)
    assert not optimizer._optimizer_step_post_hooks
    assert not fc._forward_hooks
    assert not fc._forward_pre_hooks


def test_in_place_and_outside_the_graph() -> None:
    fc = nn.Linear(D, C)
    pointer, version = fc.weight.data_ptr(), fc.weight._version
    weight = fc.weight
    spalign.SpASlerp(fc, fed(fc), total_steps=1, alpha_max=0.3, threshold=1.0).step()
    assert fc.weight is weight
    assert fc.weight.data_ptr() == pointer
    assert fc.weight.requires_grad
    assert fc.weight.is_leaf
    assert fc.weight._version > version, "a graph that saved the old rows must notice"


def test_works_under_inference_mode_and_training_goes_on() -> None:
    fc = nn.Linear(D, C)
    slerp = spalign.SpASlerp(fc, fed(fc), total_steps=1, alpha_max=0.3, threshold=1.0)
    with torch.inference_mode():
        slerp.step()
    assert not fc.weight.is_inference()
    assert torch.autograd.grad(fc(torch.ones(1, D)).sum(), fc.weight)[0].any()


def test_copies_rotate_their_own_model() -> None:
    fc = nn.Linear(D, C)
    slerp = spalign.SpASlerp(fc, fed(fc), total_steps=2, alpha_max=0.3, threshold=1.0)
    slerp.step()
    before = fc.weight.detach().clone()
    fc2, slerp2 = copy.deepcopy((fc, slerp))
    slerp2.step()
    assert torch.equal(fc.weight, before)
    assert not torch.equal(fc2.weight, before)
    assert (slerp.last_step, slerp2.last_step) == (1, 2)
    assert pickle.loads(pickle.dumps(slerp)).last_step == 1


def test_antipodal_rows_are_counted_and_stay() -> None:
    mean = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    p = nn.Parameter(torch.tensor([[-2.0, 0.0], [0.0, 1.0]]))
    tracker = spalign.ClassMeanTracker(2, 2)
    tracker.update(mean, torch.tensor([0, 1]))
    slerp = spalign.SpASlerp(p, tracker, total_steps=1, alpha_max=0.5, threshold=0.9)
    slerp.step()
    assert (int(slerp.num_rotated), int(slerp.num_antipodal)) == (1, 1)
    assert p[0].tolist() == [-2.0, 0.0]
    # Half of 90 degrees, exactly representable up to a rounding.
    torch.testing.assert_close(p[1].detach(), torch.tensor([-1.0, 1.0]) / 2**0.5, rtol=1e-6, atol=0)


def test_repr_names_the_settings() -> None:
    assert "total_steps=10, alpha_max=0.3, threshold=1.0, last_step=3" in repr(one_step(3, 10))
