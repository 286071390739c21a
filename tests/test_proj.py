"""SpAProj: the projection in front of any optimizer, and an honest optimizer to everything around it."""

import copy
import inspect
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import HEADS, Head, make_batch, make_problem, same_state, state_of, to_bools, to_numpy
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

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


def test_stepping_the_wrapped_optimizer_itself_projects_once_too() -> None:
    a, b = Setup(SGD, lr=0.1), Setup(SGD, lr=0.1)
    a.train(3)
    b.optimizer, facade = b.inner, b.optimizer
    b.train(3)
    assert same(a.weights(), b.weights())
    assert isinstance(facade, spalign.SpAProj)


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
# Missing gradients
# ----------------------------------------------------------------------------------------------------------------------


def test_all_gradients_missing_is_a_step_that_does_nothing() -> None:
    s = Setup(AdamW, lr=0.1)
    before = s.weights()
    s.optimizer.step()
    assert same(s.weights(), before)


def test_only_the_classifiers_gradient_missing_raises_and_says_how_to_proceed() -> None:
    s = Setup(SGD, lr=0.1)
    s.loss(0).backward()
    s.fc.weight.grad = None
    before = s.weights()
    with pytest.raises(RuntimeError, match=r"has no gradient.*DeepSpeed.*project_gradient"):
        s.optimizer.step()
    assert same(s.weights(), before)


def test_a_classifier_that_the_optimizer_does_not_hold_raises_at_the_first_step() -> None:
    """Pitfall A15."""
    s = Setup(SGD, lr=0.1)
    other = SGD(s.encoder.parameters(), lr=0.1)
    optimizer = spalign.SpAProj(other, s.fc, s.tracker, gamma=0.3)
    s.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"does not hold the parameter"):
        optimizer.step()


def test_a_replaced_parameter_raises_until_the_optimizer_holds_it() -> None:
    """Pitfalls A15 and B1: ``assign=True`` replaces the parameter; the optimizer has to be told."""
    s = Setup(SGD, lr=0.1)
    s.train(1)
    s.fc.load_state_dict(copy.deepcopy(s.fc.state_dict()), assign=True)
    s.loss(1).backward()
    with pytest.raises(RuntimeError, match=r"does not hold the parameter"):
        s.optimizer.step()
    s.inner.param_groups[0]["params"] = list(s.model.parameters())
    s.inner.state.clear()
    g = s.fc.weight.grad
    assert g is not None
    want = expected(g, s.fc.weight, s.tracker)
    s.optimizer.step()
    np.testing.assert_allclose(to_numpy(g), want, **SINGLE)


# ----------------------------------------------------------------------------------------------------------------------
# Closures (pitfall A7)
# ----------------------------------------------------------------------------------------------------------------------


def run_form(make: Callable[..., Optimizer], form: str, inner: bool, **options: Any) -> list[Tensor]:
    s = Setup(make, **options)
    stepper = s.inner if inner else s.optimizer
    for seed in range(4):
        closure = s.closure(seed)
        if form in ("step()", "step(None)"):
            value: float | None = closure()
            if form == "step()":
                stepper.step()
            else:
                stepper.step(None)
        else:
            value = stepper.step(closure) if form == "step(closure)" else stepper.step(closure=closure)
        assert isinstance(value, float)
    return s.weights()


@pytest.mark.parametrize("inner", [False, True], ids=["facade", "wrapped"])
@pytest.mark.parametrize(
    ("make", "options"),
    [(SGD, {"lr": 0.1, "momentum": 0.9}), (AdamW, {"lr": 0.01}), (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3})],
    ids=["SGD", "AdamW", "LBFGS"],
)
def test_all_forms_of_step_are_bit_equal(make: Callable[..., Optimizer], options: dict[str, Any], inner: bool) -> None:
    forms = ["step(closure)", "step(closure=closure)"]
    if make is not torch.optim.LBFGS:  # needs its closure
        forms += ["step()", "step(None)"]
    results = [run_form(make, form, inner, **options) for form in forms]
    assert all(same(r, results[0]) for r in results)
    unprojected = Setup(make, wrap=False, **options)
    for seed in range(4):
        unprojected.optimizer.step(unprojected.closure(seed))
    assert not torch.equal(unprojected.weights()[2], results[0][2]), "the projection was in effect"


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


@pytest.mark.parametrize("name", ["step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"])
def test_signatures_are_those_of_torch(name: str) -> None:
    """Pitfall A11: callers pass these by keyword."""
    ours = inspect.signature(getattr(spalign.SpAProj, name)).parameters.values()
    theirs = inspect.signature(getattr(Optimizer, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: StepLR(o, 1, gamma=0.5),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=10),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("attach", ["before", "after"])
def test_schedulers_move_the_learning_rate_that_is_used(name: str, attach: str) -> None:
    """Pitfalls A1, A13: built on the facade, or on the inner optimizer before it is wrapped; no warning either way."""
    s = Setup(SGD, wrap=False, lr=0.1, momentum=0.9)
    twin = Setup(SGD, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if attach == "before":
            s.optimizer = spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=0.3)
            scheduler = SCHEDULERS[name](s.optimizer)
        else:
            scheduler = SCHEDULERS[name](s.inner)
            s.optimizer = spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=0.3)
        want = SCHEDULERS[name](twin.inner)
        rates = []
        for step in range(4):
            for run, sched in ((s, scheduler), (twin, want)):
                run.train(1, start=step)
                sched.step(*((1.0,) if name == "ReduceLROnPlateau" else ()))
            rates.append(s.inner.param_groups[0]["lr"])
            assert rates[-1] == twin.inner.param_groups[0]["lr"]
    assert len(set(rates)) > 1
    assert same(s.weights(), twin.weights())


def test_a_scheduler_still_moves_the_rate_after_a_checkpoint_was_loaded() -> None:
    """Pitfall A3."""
    s = Setup(SGD, lr=0.1)
    scheduler = StepLR(s.optimizer, 1, gamma=0.5)
    s.train(1)
    s.optimizer.load_state_dict(copy.deepcopy(s.optimizer.state_dict()))
    scheduler.step()
    assert s.optimizer.param_groups is s.inner.param_groups
    assert s.inner.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_state_dict_is_key_for_key_that_of_an_unwrapped_twin_and_loads_into_it(make: Callable[..., Optimizer]) -> None:
    """Pitfalls A8, A9."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if make is SGD else {"lr": 0.1}
    plain, wrapped = Setup(make, wrap=False, **options), Setup(make, **options)
    plain.train(2)
    wrapped.train(2)
    a, b = plain.optimizer.state_dict(), wrapped.optimizer.state_dict()

    def keys(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: keys(v) for k, v in x.items()}
        return [keys(v) for v in x] if isinstance(x, list) else type(x)

    assert keys(a) == keys(b)
    plain.optimizer.load_state_dict(state_dict=copy.deepcopy(b))
    wrapped.optimizer.load_state_dict(state_dict=copy.deepcopy(a))
    plain.train(1)
    wrapped.train(1)


def test_resuming_from_a_checkpoint_equals_not_stopping() -> None:
    a, b = Setup(AdamW, lr=0.1), Setup(AdamW, lr=0.1)
    a.train(3)
    b.model.load_state_dict(copy.deepcopy(a.model.state_dict()))
    b.optimizer.load_state_dict(copy.deepcopy(a.optimizer.state_dict()))
    a.train(3, start=3)
    b.train(3, start=3)
    assert same(a.weights(), b.weights())


def test_saving_a_distributed_checkpoint_of_a_fresh_optimizer_changes_nothing() -> None:
    """Pitfall A10: it takes a step with zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    s = Setup(AdamW, lr=0.1)
    before, tracked = s.weights(), state_of(s.tracker)
    get_optimizer_state_dict(s.model, s.optimizer)
    assert same(s.weights(), before)
    assert same_state(s.tracker, tracked)


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


class Delegating(Optimizer):
    """A wrapper that never ran ``Optimizer.__init__``; with hook tables as timm's Lookahead, or without."""

    def __init__(self, inner: Optimizer, name: str, tables: bool) -> None:
        setattr(self, name, inner)
        self.inner, self.tables = inner, tables
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        if tables:
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.tables:
            super().zero_grad(set_to_none)  # from here on the class's step() does run hooks
        else:
            self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("name", ["optimizer", "_optimizer", "base_optimizer", "_base_optimizer"])
def test_around_a_wrapper_that_runs_no_hooks_the_optimizer_in_it_projects(name: str, tables: bool) -> None:
    """Pitfall A2: once per step, bit for bit as without the wrapper; a hook on the wrapper would never run."""
    wrapper = type("Wrapper", (Delegating,), {})  # torch patches the class, and the next case needs an untouched one
    want, s = Setup(SGD, lr=0.1), Setup(SGD, wrap=False, lr=0.1)
    s.optimizer = spalign.SpAProj(wrapper(s.inner, name, tables), s.fc, s.tracker, gamma=0.3)
    assert len(s.inner._optimizer_step_pre_hooks) == 1
    assert s.optimizer._optimizer_step_pre_hooks is s.inner._optimizer_step_pre_hooks
    want.train(3)
    s.train(3)
    assert same(s.weights(), want.weights())
    with pytest.raises(ValueError, match=r"projects .* already"):
        spalign.SpAProj(s.inner, s.fc, s.tracker)
    s.optimizer.remove()
    assert not s.inner._optimizer_step_pre_hooks


def test_hook_tables_without_anything_that_runs_them_are_refused() -> None:
    """Pitfall A2."""
    s = Setup(SGD, wrap=False, lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer is a Delegating, expected .* that runs step hooks"):
        spalign.SpAProj(Delegating(s.inner, "hidden", tables=True), s.fc, s.tracker)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [SGD, AdamW])
def test_grad_scaler_equals_the_unscaled_run_and_skips_inf(make: Callable[..., Optimizer], fused: bool) -> None:
    """Pitfalls A4, A6: through the facade, unscale_ and clipping included."""
    plain, scaled = (Setup(make, lr=0.01, fused=fused) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for seed in range(3):
        plain.closure(seed)()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        plain.optimizer.step()
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss(seed)).backward()
        scaler.unscale_(scaled.optimizer)
        nn.utils.clip_grad_norm_(scaled.model.parameters(), 0.5)
        scaler.step(scaled.optimizer)
        scaler.update()
    # The scale is a power of two: scaling and unscaling are exact.
    assert same(plain.weights(), scaled.weights())

    plain.closure(9)()
    plain.optimizer.step()
    scaled.optimizer.zero_grad()
    scaler.scale(scaled.loss(9)).backward()
    scaler.step(scaled.optimizer)  # without unscale_
    scaler.update()
    assert same(plain.weights(), scaled.weights())

    before = scaled.weights()
    scaled.optimizer.zero_grad()
    scaler.scale(scaled.loss(5) * torch.inf).backward()
    scaler.step(scaled.optimizer)
    scaler.update()
    assert same(scaled.weights(), before)
    assert scaler.get_scale() == 32768.0


def test_a_scaler_that_steps_the_wrapped_fused_optimizer_equals_the_unscaled_run() -> None:
    """Pitfall A5: the hook of a fused optimizer sees scaled gradients, which the projection does not mind."""
    plain, scaled = Setup(SGD, lr=0.01, fused=True), Setup(SGD, lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    seen: list[float] = []
    scaled.inner.register_step_pre_hook(lambda *_: seen.append(grad_norm(scaled)))
    for seed in range(3):
        plain.train(1, start=seed)
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss(seed)).backward()
        scaler.step(scaled.inner)
        scaler.update()
    assert min(seen) > 1000 * grad_norm(plain), "the gradients were scaled where the hook met them"
    # Scaling by a power of two is exact; the fused kernel may unscale within a multiply-add.
    for a, b in zip(plain.weights(), scaled.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    before = scaled.weights()
    scaled.optimizer.zero_grad()
    scaler.scale(scaled.loss(5) * torch.inf).backward()
    scaler.step(scaled.inner)
    assert same(scaled.weights(), before)


def grad_norm(s: Setup) -> float:
    assert s.fc.weight.grad is not None
    return float(s.fc.weight.grad.norm())


def test_fused_optimizer_without_scaler() -> None:
    a, b = Setup(SGD, lr=0.1, fused=False), Setup(SGD, lr=0.1, fused=True)
    a.train(3)
    b.train(3)
    for x, y in zip(a.weights(), b.weights(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # the fused kernel may use one multiply-add


# ----------------------------------------------------------------------------------------------------------------------
# Attaching and copying
# ----------------------------------------------------------------------------------------------------------------------


def test_double_attach_raises_and_remove_makes_room() -> None:
    """Pitfall A14."""
    s = Setup(SGD, lr=0.1)
    facade = s.optimizer
    assert isinstance(facade, spalign.SpAProj)
    hooks = len(s.inner._optimizer_step_pre_hooks)
    for optimizer in (s.inner, facade):
        for classifier in (s.fc, s.fc.weight, spalign.Classifier(s.fc)):
            with pytest.raises(ValueError, match=r"projects .* already.*remove"):
                spalign.SpAProj(optimizer, classifier, s.tracker, gamma=0.3)
    assert len(s.inner._optimizer_step_pre_hooks) == hooks
    facade.remove()
    s.optimizer = spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=0.3)
    twin = Setup(SGD, lr=0.1)
    s.train(2)
    twin.train(2)
    assert same(s.weights(), twin.weights())


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
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_attach_again_and_step_their_own_parameters(how: str, scheduled: bool) -> None:
    """Pitfall A12."""
    s = Setup(SGD, lr=0.1, momentum=0.9)
    if scheduled:  # a scheduler patches step on the instance
        StepLR(s.optimizer, 1)
    s.train(2)
    other = copied(s, how)
    assert isinstance(other.optimizer, spalign.SpAProj)
    before = s.weights()
    other.train(2, start=2)
    assert same(s.weights(), before)
    s.train(2, start=2)
    assert same(s.weights(), other.weights())
    again = copied(other, how)
    other.optimizer.remove()
    again.train(1, start=4)
    s.train(1, start=4)
    assert same(s.weights(), again.weights())


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
