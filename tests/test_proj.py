"""SpAProj: the projection in front of an optimizer, and an honest optimizer to everything around it.

Every optimizer, scheduler, checkpoint, scaler and copy: interop/test_optimizers.py and its neighbours.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import HEADS, Head, make_batch, make_problem, same_state, state_of, to_bools, to_numpy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import spalign
from spalign.classifier import ClassifierLike
from spalign.functional import Radial

C, D = 5, 6
# float32 row dots of length 6 on O(1) values.
SINGLE: dict[str, Any] = {"rtol": 5e-6, "atol": 1e-6}
every_head = pytest.mark.parametrize("kind", HEADS)


def fed(
    classifier: ClassifierLike, num_seen: int = C - 1, dtype: torch.dtype = torch.float32
) -> spalign.ClassMeanTracker:
    tracker = spalign.ClassMeanTracker.for_classifier(classifier).to(dtype)
    tracker.update(*make_batch(1, 40, num_seen, D, dtype))
    return tracker


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return make_problem(1, num_classes=C, dim=D, dtype=dtype).w


def expected(g: Tensor, w: Tensor, tracker: spalign.ClassMeanTracker) -> reference.Array:
    """Return Eq. 20 with gamma = 0.3."""
    mean, seen = to_numpy(tracker.mean), to_bools(tracker.seen)
    return reference.project_gradient(to_numpy(g), to_numpy(w), mean, seen, 0.3)


def logit_loss(head: Head, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a loss whose gradient by the rows is about O(1) and has radial and tangential parts."""
    h, y = make_batch(seed, 16, C, D, dtype)
    return nn.functional.cross_entropy(head.logits(h), y)


class Setup:
    """A two-layer model, its tracker, and a step of training."""

    def __init__(self, make: Callable[..., Optimizer], wrap: bool = True, gamma: float = 0.3, **options: Any) -> None:
        torch.manual_seed(7)
        self.encoder, self.fc = nn.Linear(4, D), nn.Linear(D, C)
        self.model = nn.Sequential(self.encoder, nn.Tanh(), self.fc)
        self.tracker = fed(self.fc)
        self.inner = make(self.model.parameters(), **options)
        self.optimizer: Optimizer = (
            spalign.SpAProj(self.inner, self.fc, self.tracker, gamma=gamma) if wrap else self.inner
        )

    def loss(self, seed: int) -> Tensor:
        x, y = make_batch(seed, 8, C, 4)
        loss: Tensor = nn.functional.cross_entropy(self.model(x), y)
        return loss

    def closure(self, seed: int) -> Callable[[], float]:
        def run() -> float:
            self.optimizer.zero_grad()
            loss = self.loss(seed)
            loss.backward()
            return loss.item()

        return run

    def train(self, steps: int, start: int = 0) -> None:
        for seed in range(start, start + steps):
            self.closure(seed)()
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The projection
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radial", ["paper", "keep"])
@pytest.mark.parametrize(
    ("kind", "sign"), [*((kind, 1.0) for kind in HEADS), ("weight_norm", -1.0), ("old_weight_norm", -1.0)]
)
def test_gradient_of_the_rows_is_that_of_eq_20(kind: str, radial: Radial, sign: float) -> None:
    """Weight norm splits the row gradient into two leaves; put together they are projected as a plain row is.

    With a negative norm (sign -1) the row points against v.
    """
    w = rows(torch.float64)
    head = HEADS[kind](w)
    magnitude = spalign.Classifier.of(head.classifier).leaves().magnitude
    if magnitude is not None:
        with torch.no_grad():
            magnitude.mul_(sign)
    w = head.rows()
    tracker = fed(head.classifier, dtype=torch.float64)
    optimizer = spalign.SpAProj(SGD(head.parameters, lr=0.0), head.classifier, tracker, gamma=0.3, radial=radial)
    row_head = HEADS["parameter"](w)
    logit_loss(head, dtype=torch.float64).backward()
    logit_loss(row_head, dtype=torch.float64).backward()
    g = row_head.parameters[0].grad
    assert g is not None
    optimizer.step()

    mean, seen = to_numpy(tracker.mean), to_bools(tracker.seen)
    want = torch.from_numpy(reference.project_gradient(to_numpy(g), to_numpy(w), mean, seen, 0.3, radial))
    assert not torch.allclose(want, g)
    # What each leaf should hold: the wanted row gradient, pulled back through the head by autograd.
    by_hand = (head.logits(torch.eye(D, dtype=torch.float64)).t() * want).sum()
    for p, by_p in zip(head.parameters, torch.autograd.grad(by_hand, head.parameters), strict=True):
        # float64 throughout.
        torch.testing.assert_close(p.grad, by_p, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_of_weight(dtype: torch.dtype) -> None:
    p = nn.Parameter(rows(dtype))
    tracker = fed(p)
    optimizer = spalign.SpAProj(SGD([p], lr=0.0), p, tracker, gamma=0.3)
    p.grad = make_problem(2, num_classes=C, dim=D, dtype=dtype).g.clone()
    want = expected(p.grad, p, tracker)
    optimizer.step()
    assert p.grad is not None
    assert p.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(p.grad), want, rtol=5e-6 + eps, atol=2e-6 + eps * 1e-2)


def test_only_the_classifier_is_touched() -> None:
    plain, wrapped = Setup(SGD, wrap=False, lr=0.1), Setup(SGD, lr=0.1)
    before = state_of(wrapped.tracker)
    plain.train(1)
    wrapped.train(1)
    assert torch.equal(plain.encoder.weight, wrapped.encoder.weight)
    assert torch.equal(plain.fc.bias, wrapped.fc.bias)
    assert not torch.equal(plain.fc.weight, wrapped.fc.weight)
    assert same_state(wrapped.tracker, before)


@every_head
def test_without_means_a_run_is_bit_equal_to_no_wrapper(kind: str) -> None:
    results = []
    for wrap in (False, True):
        head = HEADS[kind](rows())
        optimizer: Optimizer = AdamW(head.parameters, lr=0.1)
        if wrap:
            tracker = spalign.ClassMeanTracker.for_classifier(head.classifier)
            optimizer = spalign.SpAProj(optimizer, head.classifier, tracker, gamma=0.0)
        for seed in range(5):
            optimizer.zero_grad()
            logit_loss(head, seed).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in head.parameters])
    assert same(*results)


def test_rows_of_unseen_classes_keep_their_gradient_bit_for_bit() -> None:
    p = nn.Parameter(rows())
    optimizer = spalign.SpAProj(SGD([p], lr=0.0), p, fed(p, 3), gamma=0.0)
    g = torch.randn(C, D)
    p.grad = g.clone()
    optimizer.step()
    assert p.grad is not None
    assert torch.equal(p.grad[3:], g[3:])
    assert not (p.grad[:3] == g[:3]).all(1).any()


@every_head
def test_gamma_1_changes_no_bit(kind: str) -> None:
    head = HEADS[kind](rows())
    optimizer = spalign.SpAProj(SGD(head.parameters, lr=0.0), head.classifier, fed(head.classifier), gamma=1.0)
    logit_loss(head).backward()
    before = [p.grad.clone() for p in head.parameters if p.grad is not None]
    optimizer.step()
    assert same([p.grad for p in head.parameters if p.grad is not None], before)


def test_zero_gradients_stay_zero() -> None:
    p = nn.Parameter(rows())
    optimizer = spalign.SpAProj(SGD([p], lr=1.0), p, fed(p), gamma=0.5)
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def test_projection_is_applied_once_per_step_after_accumulation_and_clipping() -> None:
    """Pitfalls A16 and A18: k micro-batches give what one batch gives, and the clipped norm is not exceeded."""
    one, many = Setup(SGD, lr=0.1), Setup(SGD, lr=0.1)
    xs, ys = zip(*(make_batch(s, 8, C, 4) for s in range(4)), strict=True)
    nn.functional.cross_entropy(one.model(torch.cat(xs)), torch.cat(ys)).backward()
    for x, y in zip(xs, ys, strict=True):
        (nn.functional.cross_entropy(many.model(x), y) / 4).backward()
    for s in (one, many):
        nn.utils.clip_grad_norm_(s.model.parameters(), 0.1)
        s.optimizer.step()
        norm = torch.cat([p.grad.flatten() for p in s.model.parameters() if p.grad is not None]).norm()
        assert norm <= 0.1 * (1 + 1e-6)
    for a, b in zip(one.weights(), many.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the two sum the batch in different orders


def test_two_classifiers_on_one_optimizer() -> None:
    """Heads of one model are projected by one wrapper each; wrapping a wrapper adds a second projection."""
    heads = [nn.Parameter(rows()), nn.Parameter(rows().flip(0))]
    trackers = [fed(p) for p in heads]
    inner = SGD(heads, lr=0.0)
    first = spalign.SpAProj(inner, heads[0], trackers[0], gamma=0.3)
    second = spalign.SpAProj(first, heads[1], trackers[1], gamma=0.3)
    want = []
    for p, t in zip(heads, trackers, strict=True):
        p.grad = torch.randn(C, D)
        want.append(expected(p.grad, p, t))
    second.step()
    for p, w in zip(heads, want, strict=True):
        assert p.grad is not None
        np.testing.assert_allclose(to_numpy(p.grad), w, **SINGLE)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters that the optimizer does not hold
# ----------------------------------------------------------------------------------------------------------------------


def test_a_classifier_that_the_optimizer_does_not_hold_raises_at_the_first_step() -> None:
    """Pitfall A15."""
    s = Setup(SGD, lr=0.1)
    other = SGD(s.encoder.parameters(), lr=0.1)
    optimizer = spalign.SpAProj(other, s.fc, s.tracker, gamma=0.3)
    s.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"does not hold the parameter"):
        optimizer.step()


def test_a_classifier_frozen_on_the_way_is_named_and_can_be_let_go() -> None:
    s = Setup(SGD, wrap=False, lr=0.1)
    optimizer = spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=0.3)
    s.fc.weight.requires_grad_(False)
    s.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"was frozen after SpAProj was built.*call remove\(\)"):
        optimizer.step()
    optimizer.remove()
    optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# Closures (pitfall A7)
# ----------------------------------------------------------------------------------------------------------------------


def test_a_closure_runs_with_gradients_enabled_and_its_loss_comes_back() -> None:
    s = Setup(SGD, lr=0.1)
    seen: list[bool] = []

    def closure() -> float:
        seen.append(torch.is_grad_enabled())
        return s.closure(0)()

    want = s.loss(0).item()
    with torch.no_grad():
        loss = s.optimizer.step(closure)
    assert seen == [True]
    assert loss == want


# ----------------------------------------------------------------------------------------------------------------------
# The facade
# ----------------------------------------------------------------------------------------------------------------------


def test_is_an_optimizer_that_reads_through() -> None:
    s = Setup(SGD, lr=0.1, momentum=0.9)
    facade = s.optimizer
    assert isinstance(facade, Optimizer)
    assert facade.param_groups is s.inner.param_groups
    assert facade.state is s.inner.state
    assert facade.defaults is s.inner.defaults
    s.train(1)
    assert facade.state is s.inner.state
    s.inner.load_state_dict(s.inner.state_dict())
    assert facade.param_groups is s.inner.param_groups
    assert facade.state is s.inner.state
    facade.load_state_dict(facade.state_dict())
    assert facade.param_groups is s.inner.param_groups
    assert "SGD" in repr(facade)


OVERRIDDEN = [
    name for name, value in vars(spalign.SpAProj).items() if inspect.isfunction(value) and name in vars(Optimizer)
]


@pytest.mark.parametrize("name", [name for name in OVERRIDDEN if not name.startswith("_")])
def test_signatures_are_those_of_torch(name: str) -> None:
    """Pitfall A11: callers pass these by keyword."""
    ours = inspect.signature(getattr(spalign.SpAProj, name)).parameters.values()
    theirs = inspect.signature(getattr(Optimizer, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_add_param_group_and_zero_grad_reach_the_wrapped_optimizer() -> None:
    s = Setup(SGD, lr=0.1)
    extra = nn.Parameter(torch.ones(2))
    s.optimizer.add_param_group({"params": [extra], "lr": 7.0})
    assert s.inner.param_groups[-1]["params"] == [extra]
    extra.grad = torch.ones(2)
    s.optimizer.zero_grad(set_to_none=False)
    assert extra.grad is not None
    assert not extra.grad.any()
    s.optimizer.zero_grad()
    assert extra.grad is None


def test_step_hooks_registered_on_the_facade_run_once_per_step() -> None:
    """Pitfall A2."""
    s = Setup(SGD, lr=0.1)
    calls: list[str] = []
    s.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    s.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    s.optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    s.train(2)
    assert calls == ["pre", "post"] * 2
    s.optimizer.state_dict()
    assert calls[-1] == "state"
    assert len(calls) == 5


# ----------------------------------------------------------------------------------------------------------------------
# Attaching and copying
# ----------------------------------------------------------------------------------------------------------------------


def test_after_remove_a_run_is_bit_equal_to_no_wrapper() -> None:
    plain, removed = Setup(AdamW, wrap=False, lr=0.1), Setup(AdamW, lr=0.1)
    assert isinstance(removed.optimizer, spalign.SpAProj)
    removed.optimizer.remove()
    removed.optimizer.remove()
    plain.train(3)
    removed.train(3)
    assert same(plain.weights(), removed.weights())


def copied(s: Setup, how: str) -> Setup:
    other = copy.copy(s)
    parts = (s.model, s.tracker, s.optimizer)
    other.model, other.tracker, other.optimizer = (
        copy.deepcopy(parts) if how == "deepcopy" else pickle.loads(pickle.dumps(parts))
    )
    return other


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_removed_wrapper_stays_removed_in_copies(how: str) -> None:
    s, plain = Setup(SGD, lr=0.1), Setup(SGD, wrap=False, lr=0.1)
    assert isinstance(s.optimizer, spalign.SpAProj)
    s.optimizer.remove()
    other = copied(s, how)
    other.train(2)
    plain.train(2)
    assert same(other.weights(), plain.weights())


def test_gradient_is_written_in_place() -> None:
    """Pitfall A17, through closures too."""
    s = Setup(SGD, lr=0.1)
    s.loss(0).backward()
    g = s.fc.weight.grad
    assert g is not None
    pointer, before = g.data_ptr(), g.clone()
    s.optimizer.step()
    assert s.fc.weight.grad is g
    assert g.data_ptr() == pointer
    assert not torch.equal(g, before)


@pytest.mark.parametrize("radial", ["paper", "keep"])
def test_training_with_the_projection_keeps_rows_closer_to_their_means(radial: Radial) -> None:
    """The point of it all: of the update nothing is left that points away from the means."""
    x, y = make_batch(1, 64, C, D)
    cosines = []
    for gamma in (1.0, 0.0):
        torch.manual_seed(3)
        fc = nn.Linear(D, C)
        tracker = spalign.ClassMeanTracker.for_classifier(fc)
        tracker.update(x, y)
        with torch.no_grad():  # start close to the means: plain training leads away from them
            fc.weight.copy_(tracker.directions() + 0.05 * fc.weight)
        optimizer = spalign.SpAProj(SGD(fc.parameters(), lr=0.5), fc, tracker, gamma=gamma, radial=radial)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(fc(x), y).backward()
            optimizer.step()
        cosines.append(spalign.functional.alignment(fc.weight, tracker.mean, tracker.seen).mean().item())
    assert cosines[1] > cosines[0]
