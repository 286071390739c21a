"""Optimizers and optimizer wrappers of other packages, and what stands around an optimizer in a trainer.

Which order is right: either, where the wrapper is an ``Optimizer``. The projection goes to the innermost optimizer, the
one that moves the parameters, so ``SpAProj(Wrapper(sgd))`` and ``Wrapper(SpAProj(sgd))`` are the same run:

===================================  ===================================================================================
schedulefree's optimizers            plain optimizers with two modes; ``train()`` and ``eval()`` go through
schedulefree's ScheduleFreeWrapper   no ``Optimizer``: ``ScheduleFreeWrapper(SpAProj(sgd))``, the other way raises
Lookahead (timm, pytorch_optimizer)  either; the fast weights' steps are projected; timm's runs no step hooks itself
SAM and its kin                      either; the second gradient, against the rows it moves, not the perturbed ones
===================================  ===================================================================================

The reference is the wrapper around an SGD that projects its gradients by hand in its own ``step``.
"""

import copy
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.optimizer_runs import CLASSES, Row, Run, close, far, keys, same
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

import spalign

SGD_ROW = CLASSES["SGD"]


def package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def timm_lookahead() -> Any:
    """Return timm's own class, from its own file alone where torchvision, which timm imports, does not import."""
    try:
        return importlib.import_module("timm.optim").Lookahead
    except (ImportError, RuntimeError):
        found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed")
    path = Path(found.origin).parent / "optim" / "lookahead.py"
    spec = importlib.util.spec_from_file_location("timm_lookahead", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


class ProjectsByHand(SGD):
    """SGD whose step starts with the reference projection."""

    def __init__(self, params: Any, run: Run, **options: Any) -> None:
        super().__init__(params, **options)
        self.run = run

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.run.fc.weight.grad is not None:
            self.run.project_by_hand()
        super().step()
        return loss


def build(make: Callable[[Run], Any]) -> Run:
    """Return a run with an optimizer made around its model."""
    s = Run(SGD_ROW, "plain")
    s.optimizer = make(s)
    return s


def by_hand(s: Run, params: Any = None, **options: Any) -> Optimizer:
    return ProjectsByHand(s.model.parameters() if params is None else params, s, **(options or SGD_ROW.options))


# ----------------------------------------------------------------------------------------------------------------------
# schedulefree: optimizers with modes
# ----------------------------------------------------------------------------------------------------------------------

SCHEDULE_FREE = ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "AdamWScheduleFreePaper"]
SCHEDULE_FREE += ["AdamWScheduleFreeReference", "SGDScheduleFreeReference"]
SCHEDULE_FREE += ["AdamWScheduleFreeClosure", "SGDScheduleFreeClosure", "RAdamScheduleFreeClosure"]


def schedule_free(name: str) -> Row:
    options = {"silent_sgd_phase": False} if name.startswith("RAdam") else {}  # else it skips its first steps
    return Row(getattr(package("schedulefree"), name), {"lr": 0.02, "weight_decay": 0.01, **options})


def mode(optimizer: Any, name: str) -> None:
    """Switch the mode of an optimizer that has one: those with a closure evaluate it at the right place themselves."""
    getattr(optimizer, name, lambda: None)()


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_optimizers(name: str) -> None:
    """Trained, evaluated in between, and resumed: equal to projecting by hand, bit-equal with nothing to remove."""

    def run(kind: Any, gamma: float = 0.3) -> list[list[torch.Tensor]]:
        s, weights = Run(row, kind, gamma), []
        for start in (0, 2):
            mode(s.optimizer, "train")
            s.train(2, start)
            mode(s.optimizer, "eval")
            weights.append(s.weights())
            state = copy.deepcopy(s.optimizer.state_dict())
            other = Run(row, kind, gamma)
            other.model.load_state_dict(s.model.state_dict())
            other.optimizer.load_state_dict(state)
            s = other
        return weights

    row = schedule_free(name)
    for a, b in zip(run("wrapped"), run("by hand"), strict=True):
        assert close(a, b)
    assert same(run("wrapped", 1.0), run("plain"))
    assert far(run("wrapped")[-1], run("plain")[-1])
    assert keys(Run(row).train_mode().train(1).optimizer.state_dict()) == keys(
        Run(row, "plain").train_mode().train(1).optimizer.state_dict()
    )


def test_schedule_free_optimizers_say_when_they_are_in_no_mode_to_step() -> None:
    """A facade without ``train`` leaves them there: trainers call it only where an optimizer has it."""
    s = Run(schedule_free("AdamWScheduleFree"))
    with pytest.raises(Exception, match="not in train mode"):
        s.train(1)
    facade: Any = s.optimizer
    facade.train()
    s.train(1)
    facade.eval()
    with pytest.raises(Exception, match="not in train mode"):
        s.train(1)


def test_modes_of_other_optimizers_are_none() -> None:
    """As Accelerate's, the facade takes ``train()`` and ``eval()`` whatever it wraps."""
    s = Run(SGD_ROW)
    facade: Any = s.optimizer
    facade.eval()
    facade.train()
    assert same(s.train(2).weights(), Run(SGD_ROW).train(2).weights())


@pytest.mark.parametrize("name", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
def test_schedule_free_wrapper_goes_around(name: str) -> None:
    """It is no ``Optimizer``, so only this order exists. The rows are those that the step moves (its z, not its y)."""
    wrapper = functools.partial(getattr(package("schedulefree"), name), momentum=0.9)
    runs = {
        "around": build(lambda s: wrapper(s.wrap(s.inner))),
        "attached later": build(lambda s: attach_later(s, wrapper(s.inner))),
        "by hand": build(lambda s: wrapper(by_hand(s))),
        "plain": build(lambda s: wrapper(s.inner)),
    }
    for s in runs.values():
        mode(s.optimizer, "train")
        s.train(4)
        mode(s.optimizer, "eval")
    assert close(runs["around"].weights(), runs["by hand"].weights())
    assert same(runs["around"].weights(), runs["attached later"].weights())
    assert far(runs["around"].weights(), runs["plain"].weights())
    assert keys(runs["around"].optimizer.state_dict()) == keys(runs["plain"].optimizer.state_dict())


def attach_later(s: Run, wrapper: Any) -> Any:
    """Attach to the optimizer that a wrapper holds, and go on with the wrapper: hooks need no facade."""
    s.wrap(s.inner)
    return wrapper


def test_around_the_schedule_free_wrapper_raises_and_attaches_nothing() -> None:
    """The message says which order is right."""
    s = Run(SGD_ROW, "plain")
    wrapper = package("schedulefree").ScheduleFreeWrapper(s.inner)
    with pytest.raises(ValueError, match=r"is a ScheduleFreeWrapper, expected a torch.optim.Optimizer.*that it steps"):
        s.wrap(wrapper)
    assert not s.inner._optimizer_step_pre_hooks


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers that are optimizers: either order
# ----------------------------------------------------------------------------------------------------------------------


def from_pytorch_optimizer(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: functools.partial(getattr(package("pytorch_optimizer"), name), **options)


WRAPPERS: dict[str, Callable[[], Any]] = {
    "timm Lookahead": lambda: functools.partial(timm_lookahead(), k=2),
    "Lookahead": from_pytorch_optimizer("Lookahead", k=2),
    "ScheduleFreeWrapper": from_pytorch_optimizer("ScheduleFreeWrapper"),
    "OrthoGrad": from_pytorch_optimizer("OrthoGrad"),
}


def take_steps(s: Run, steps: int = 5, closure: bool = False, start: int = 0) -> Run:
    mode(s.optimizer, "train")
    for seed in range(start, start + steps):
        if closure:
            s.optimizer.step(s.closure(seed))
        else:
            s.train(1, seed)
    return s


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("closure", [False, True])
def test_either_order_of_wrapping_is_the_same_run(name: str, closure: bool) -> None:
    """A2: timm's Lookahead has hook tables that nothing runs; the innermost optimizer is where hooks run once."""
    wrapper = WRAPPERS[name]()
    run = functools.partial(take_steps, closure=closure)
    inside, outside = run(build(lambda s: wrapper(s.wrap(s.inner)))), run(build(lambda s: s.wrap(wrapper(s.inner))))
    hand, plain = run(build(lambda s: wrapper(by_hand(s)))), run(build(lambda s: wrapper(s.inner)))
    assert same(inside.weights(), outside.weights())
    assert close(inside.weights(), hand.weights())
    assert far(inside.weights(), plain.weights())
    assert keys(outside.optimizer.state_dict()) == keys(plain.optimizer.state_dict())
    assert keys(inside.optimizer.state_dict()) == keys(plain.optimizer.state_dict())


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_with_nothing_to_remove_are_bit_equal_to_the_plain_run(name: str) -> None:
    """gamma = 1 in either order, states included."""
    wrapper = WRAPPERS[name]()
    plain = take_steps(build(lambda s: wrapper(s.inner)))
    for make in (
        lambda s: wrapper(spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=1.0)),
        lambda s: spalign.SpAProj(wrapper(s.inner), s.fc, s.tracker, gamma=1.0),
    ):
        s = take_steps(build(make))
        assert same(s.weights(), plain.weights())
        assert same(s.optimizer.state_dict(), plain.optimizer.state_dict())


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_wrapper_is_attached_once(name: str) -> None:
    """A14: whatever shell of it is handed over."""
    s = Run(SGD_ROW, "plain")
    wrapper = WRAPPERS[name]()(s.inner)
    facade = s.wrap(wrapper)
    for shell in (s.inner, wrapper, facade):
        with pytest.raises(ValueError, match=r"this SGD projects .* already.*remove"):
            s.wrap(shell)
    facade.remove()
    assert not s.inner._optimizer_step_pre_hooks


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_lookahead_resumes_and_is_scheduled(inside: bool) -> None:
    """A1, A3: the usual companions around timm's wrapper."""
    lookahead = functools.partial(timm_lookahead(), k=2)

    def start(reference: bool = False) -> tuple[Run, StepLR]:
        s = build(
            lambda s: (
                lookahead(by_hand(s))
                if reference
                else lookahead(s.wrap(s.inner))
                if inside
                else s.wrap(lookahead(s.inner))
            )
        )
        return s, StepLR(s.optimizer, 1, gamma=0.5)

    def train(reference: bool) -> Run:
        s, scheduler = start(reference)
        for seed in range(3):
            s.train(1, seed)
            scheduler.step()
        other, other_scheduler = start(reference)
        other.model.load_state_dict(copy.deepcopy(s.model.state_dict()))
        other.optimizer.load_state_dict(copy.deepcopy(s.optimizer.state_dict()))
        other_scheduler.load_state_dict(scheduler.state_dict())
        for seed in range(3, 6):
            other.train(1, seed)
            other_scheduler.step()
        assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**6)
        return other

    assert close(train(False).weights(), train(True).weights())


# ----------------------------------------------------------------------------------------------------------------------
# SAM
# ----------------------------------------------------------------------------------------------------------------------

SAMS = {"SAM": {"rho": 0.5}, "FriendlySAM": {"rho": 0.5}, "LookSAM": {"rho": 0.5, "k": 2}}


def sam_steps(s: Run, two_calls: bool = False) -> Run:
    optimizer: Any = s.optimizer
    for seed in range(4):
        closure = s.closure(seed)
        closure()
        if two_calls:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
    return s


@pytest.mark.parametrize("name", SAMS)
def test_sam_projects_the_gradient_of_the_update_at_the_rows_it_moves(name: str) -> None:
    """A2, A7: not the first gradient, and not against the perturbed rows, wherever the projection is put."""
    sam = functools.partial(getattr(package("pytorch_optimizer"), name), **SAMS[name])
    options = SGD_ROW.options

    def around(s: Run) -> Any:
        return s.wrap(sam(s.model.parameters(), SGD, **options))

    def around_the_base(s: Run) -> Any:
        optimizer = sam(s.model.parameters(), SGD, **options)
        s.wrap(optimizer.base_optimizer)
        return optimizer

    def inside(s: Run) -> Any:
        return sam(s.model.parameters(), lambda groups, **kw: s.wrap(SGD(groups, **kw)), **options)

    runs = [sam_steps(build(make)) for make in (around, around_the_base, inside)]
    runs.append(sam_steps(build(around_the_base), two_calls=True))
    hand = sam_steps(build(lambda s: sam(s.model.parameters(), functools.partial(by_hand, s), **options)))
    plain = sam_steps(build(lambda s: sam(s.model.parameters(), SGD, **options)))
    for s in runs:
        assert same(s.weights(), runs[0].weights())
    assert close(runs[0].weights(), hand.weights())
    assert far(runs[0].weights(), plain.weights())
    assert keys(runs[0].optimizer.state_dict()) == keys(plain.optimizer.state_dict())


@pytest.mark.parametrize("name", ["Lion", "AdamP", "Yogi"])
def test_maximizing_kept_outside_of_the_groups(name: str) -> None:
    """These optimizers keep ``maximize`` as an attribute."""
    make = getattr(package("pytorch_optimizer"), name)
    up = Run(Row(make, {"lr": 0.02, "maximize": True})).train(3)
    down = Run(Row(make, {"lr": 0.02})).train(3)
    assert close(up.weights(), down.weights())
    assert far(down.weights(), Run(Row(make, {"lr": 0.02}), "plain").train(3).weights())


# ----------------------------------------------------------------------------------------------------------------------
# What a trainer's prepare() returns (A2)
# ----------------------------------------------------------------------------------------------------------------------


class Prepared(Optimizer):
    """An optimizer that never ran ``Optimizer.__init__``, built as Accelerate's is, without scaler."""

    def __init__(self, optimizer: Optimizer, attribute: str = "optimizer") -> None:
        self.__dict__.update({attribute: optimizer, "attribute": attribute})

    @property
    def held(self) -> Optimizer:
        """The optimizer that is stepped."""
        found: Optimizer = self.__dict__[self.attribute]
        return found

    attribute: str
    param_groups = property(lambda self: self.held.param_groups)
    state = property(lambda self: self.held.state)
    defaults = property(lambda self: self.held.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.held.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.held.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.held.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# Accelerate and many more, Lightning Fabric, SAM and its kin, timm, opacus.
@pytest.mark.parametrize("name", ["optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "original_optimizer"])
@pytest.mark.parametrize("closure", [False, True])
def test_attaching_before_and_after_prepare_is_the_same_run(closure: bool, name: str) -> None:
    """A2: the hook runs once per step in both cases; Accelerate passes a closure by position, also None."""
    before = build(lambda s: Prepared(s.wrap(s.inner), name))
    after = build(lambda s: s.wrap(Prepared(s.inner, name)))
    calls: list[int] = []
    for s in (before, after):
        if s is after:
            s.optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        take_steps(s, 3, closure)
    want = Run(SGD_ROW, "by hand").train(3)
    assert same(before.weights(), after.weights())
    assert close(after.weights(), want.weights())
    assert calls == [1, 1, 1]
    assert isinstance(after.optimizer, Optimizer)
    assert StepLR(after.optimizer, 1).optimizer is after.optimizer


def test_an_optimizer_whose_step_runs_no_hooks_is_refused() -> None:
    """A2: with hook tables but an unpatched ``step``, the projection would be left out without a word."""

    class Silent(Optimizer):
        def __init__(self, params: Any) -> None:
            self._optimizer_step_pre_hooks = {}
            self.params = params

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    fc = nn.Linear(4, 3)
    tracker = spalign.ClassMeanTracker.for_classifier(fc)
    for wrong in (Silent(fc.parameters()), Prepared(Silent(fc.parameters()))):
        with pytest.raises(ValueError, match=r"is a Silent, expected .* runs step hooks"):
            spalign.SpAProj(wrong, fc, tracker, gamma=0.3)


def test_copies_of_a_wrapped_wrapper_attach_again() -> None:
    """A12: to the innermost optimizer of the copy."""
    s = take_steps(build(lambda s: s.wrap(Prepared(s.inner))), 2)
    other = copy.deepcopy(s)
    assert same(take_steps(other, 2, start=2).weights(), take_steps(s, 2, start=2).weights())
    assert len(list(itertools.chain(other.inner._optimizer_step_pre_hooks))) == 1
