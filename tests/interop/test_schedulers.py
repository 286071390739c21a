"""Learning rate schedulers around the facade: pitfalls A1, A3 and A13.

A scheduler keeps the optimizer that it was given and patches ``step`` on it. It may be the facade or, built earlier,
the optimizer that is wrapped afterwards; checkpoints replace the groups whose rates it sets. Warnings are errors here.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interop.optimizer_runs import CLASSES, ROWS, Row, Run, close, far, same
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

import spalign

STEPS = 4


def one_cycle(o: Optimizer) -> lr_scheduler.OneCycleLR:
    momentum = "momentum" in o.defaults or "betas" in o.defaults
    return lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=3 * STEPS, cycle_momentum=momentum)


THREE: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "OneCycleLR": one_cycle,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}
MORE: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.StepLR(o, 1)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
}


def train(s: Run, scheduler: Any, start: int, steps: int = STEPS) -> list[float]:
    """Train with one scheduler step after each optimizer step. Return the rates that the optimizer used."""
    rates = []
    for seed in range(start, start + steps):
        rates.append(float(s.inner.param_groups[0]["lr"]))
        s.train(1, seed)
        scheduler.step(*((1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()))
    return rates


def resume(s: Run, scheduler: Any, row: Row, make: Callable[[Optimizer], Any], attach: str) -> tuple[Run, Any]:
    """Return a fresh run and scheduler that go on from a checkpoint of others."""
    other, other_scheduler = start(row, make, attach)
    other.model.load_state_dict(copy.deepcopy(s.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(s.optimizer.state_dict()))
    other_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    return other, other_scheduler


def start(row: Row, make: Callable[[Optimizer], Any], attach: str) -> tuple[Run, Any]:
    """Return a run and its scheduler; ``attach`` is when SpAProj came, or that gradients are projected by hand."""
    s = Run(row, "by hand" if attach == "by hand" else "plain")
    if attach == "before":
        s.optimizer = s.wrap(s.inner)
    scheduler = make(s.optimizer)
    if attach == "after":
        s.optimizer = s.wrap(s.inner)
    return s, scheduler


def check(row: Row, make: Callable[[Optimizer], Any], attach: str) -> None:
    """Compare a scheduled run, its continuation from a checkpoint included, with one projected by hand."""
    runs = []
    for how in (attach, "by hand"):
        s, scheduler = start(row, make, how)
        rates = train(s, scheduler, 0)
        first = s.weights()
        s, scheduler = resume(s, scheduler, row, make, how)
        runs.append((rates + train(s, scheduler, STEPS), first, s.weights()))
        assert s.optimizer.param_groups is s.inner.param_groups
    (rates, *weights), (want_rates, *want) = runs
    assert rates == want_rates
    assert len(set(rates)) > 1, "the scheduler moved the rate that is used"
    for a, b in zip(weights, want, strict=True):
        assert close(a, b)
    plain = Run(row, "plain")
    train(plain, make(plain.optimizer), 0)
    assert far(weights[0], plain.weights())


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("scheduler", THREE)
@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_under_the_usual_schedulers(name: str, scheduler: str, attach: str) -> None:
    """A1, A3, A13: attached before and after the scheduler is built, and after a checkpoint was loaded."""
    check(CLASSES[name], THREE[scheduler], attach)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR passes it in torch 2.6
@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("scheduler", MORE)
def test_every_scheduler(scheduler: str, attach: str) -> None:
    """A1, A13: on SGD with momentum."""
    check(CLASSES["SGD"], MORE[scheduler], attach)


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
@pytest.mark.parametrize("name", ["SGD tensor lr", "Adam tensor lr", "AdamW fused"])
def test_rates_in_tensors_and_fused_optimizers(name: str, scheduler: str, attach: str) -> None:
    """A3: schedulers fill a rate that is a tensor in place."""
    check(ROWS[name], THREE[scheduler], attach)


def test_a_scheduler_still_moves_the_rate_after_a_checkpoint_was_loaded_behind_its_back() -> None:
    """A3: ``load_state_dict`` replaces the list of groups; the facade shows the new one to the old scheduler."""
    for loader in ("optimizer", "inner"):
        s = Run(CLASSES["SGD"])
        scheduler = THREE["StepLR"](s.optimizer)
        s.train(1)
        groups = s.inner.param_groups
        getattr(s, loader).load_state_dict(copy.deepcopy(s.inner.state_dict()))
        assert s.inner.param_groups is not groups
        scheduler.step()
        assert s.optimizer.param_groups is s.inner.param_groups
        assert s.inner.param_groups[0]["lr"] == 0.01


def test_a_scheduler_made_before_is_not_told_to_step_late() -> None:
    """A13: it warns where it believes that no optimizer step came first; also when the wrapped optimizer is stepped."""
    s = Run(CLASSES["SGD"])
    scheduler = THREE["StepLR"](s.inner)
    s.closure(0)()
    s.inner.step()
    scheduler.step()
    assert s.inner.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("attach", ["before", "after"])
def test_removing_and_copying_under_a_scheduler(attach: str, how: str) -> None:
    """A12, A13: the patched ``step`` of the instance goes with neither the copy nor ``remove()``."""
    s, scheduler = start(CLASSES["SGD"], THREE["StepLR"], attach)
    train(s, scheduler, 0, 2)
    other = copy.deepcopy(s) if how == "deepcopy" else pickle.loads(pickle.dumps(s))
    before = s.weights()
    other.train(2, 2)
    assert same(s.weights(), before)
    assert same(s.train(2, 2).weights(), other.weights())
    facade = s.optimizer
    assert isinstance(facade, spalign.SpAProj)
    facade.remove()
    scheduler.step()
    s.closure(9)()
    grad: Any = s.fc.weight.grad.clone()
    s.optimizer.step()
    assert torch.equal(s.fc.weight.grad, grad)
