"""Optimizers that move float32 copies of low-precision parameters and write them over the model's: pitfall B7.

What can be told, and by whom:

================================  ==================================================================================
SpAProj, at its first step        the optimizer does not hold the model's weight (apex O2, Megatron, by hand): raises
SpASlerp, at each step            DeepSpeed and Megatron mark the parameters that mirror masters: warns
nobody                            a mirror without a mark (apex O2, by hand; masters in the optimizer's own state, as
                                  those of apex's FusedAdam): SpASlerp gets a layer, no optimizer, and rows that were
                                  overwritten look like rows that were moved
================================  ==================================================================================

The frameworks need devices that are not here; an optimizer of a few lines does with the weights what they do.
"""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import make_batch, to_bools, to_numpy
from torch import Tensor, nn

import spalign

C, D, GAMMA, LR = 5, 6, 0.3, 0.1


class KeepsMasters(torch.optim.SGD):
    """SGD on float32 copies of a model's parameters."""

    def __init__(self, model: nn.Module, mark: str | None = None) -> None:
        self.mirrors = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().float()) for p in self.mirrors]
        for mirror, master in zip(self.mirrors, self.masters, strict=True):
            if mark is not None:
                setattr(mirror, mark, master)
        super().__init__(self.masters, lr=LR)

    def take_gradients(self) -> None:
        """Hand the model's gradients to the masters, as after a backward pass."""
        for mirror, master in zip(self.mirrors, self.masters, strict=True):
            assert mirror.grad is not None
            master.grad = mirror.grad.float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the masters, and the model's parameters to where they are."""
        super().step()
        for mirror, master in zip(self.mirrors, self.masters, strict=True):
            mirror.copy_(master)


class Setup:
    """A low-precision head, its class means, and an optimizer."""

    def __init__(self, mark: str | None = None, dtype: torch.dtype = torch.bfloat16, masters: bool = True) -> None:
        torch.manual_seed(1)
        self.fc = nn.Linear(D, C, bias=False, dtype=dtype)
        self.tracker = spalign.ClassMeanTracker.for_classifier(self.fc)
        self.tracker.update(*make_batch(1, 40, C - 1, D))
        self.inner: Any = KeepsMasters(self.fc, mark) if masters else torch.optim.SGD(self.fc.parameters(), lr=LR)

    def rotation(self, classifier: nn.Module | Tensor) -> spalign.SpASlerp:
        """Return a rotation of each row by most of its angle, which no step undoes by chance."""
        return spalign.SpASlerp(classifier, self.tracker, total_steps=1, alpha_max=0.9, threshold=1.0)

    def backward(self) -> None:
        """Leave gradients of a batch where the optimizer looks for them."""
        x, y = make_batch(2, 12, C, D, self.fc.weight.dtype)
        self.fc.zero_grad()
        nn.functional.cross_entropy(self.fc(x).float(), y).backward()
        if isinstance(self.inner, KeepsMasters):
            self.inner.take_gradients()

    def alignment(self) -> Tensor:
        """Return the cosine of each class seen."""
        problem = to_numpy(self.fc.weight), to_numpy(self.tracker.mean), to_bools(self.tracker.seen)
        return torch.from_numpy(reference.alignment(*problem)[:-1])


def test_projecting_a_mirror_raises_at_the_first_step() -> None:
    """A15, B7: before anything has moved."""
    s = Setup()
    optimizer = spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=GAMMA)
    before = [p.detach().clone() for p in (*s.inner.mirrors, *s.inner.masters)]
    s.backward()
    with pytest.raises(
        RuntimeError, match=r"does not hold the parameter.*give the master copy of the weight as the classifier"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, (*s.inner.mirrors, *s.inner.masters), strict=True))


def test_given_the_masters_everything_is_done_to_them_and_shown_by_the_model() -> None:
    """B7: projection and rotation in float32, and the model's rows are theirs, rounded."""
    s = Setup("main_param")
    (master,) = s.inner.masters
    optimizer = spalign.SpAProj(s.inner, master, s.tracker, gamma=GAMMA)
    slerp = s.rotation(master)
    mean, seen = to_numpy(s.tracker.mean), to_bools(s.tracker.seen)
    w = to_numpy(master)
    for _ in range(3):
        s.backward()
        w -= LR * reference.project_gradient(to_numpy(master.grad), w, mean, seen, GAMMA)
        optimizer.step()
        np.testing.assert_allclose(to_numpy(master), w, rtol=0, atol=1e-5)  # float32 maths on values of O(1)
        assert torch.equal(s.fc.weight, master.bfloat16())
        w = reference.slerp(w, mean, seen, slerp.alpha_max, 1.0)
        slerp.step()
        np.testing.assert_allclose(to_numpy(master), w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mark", ["main_param", "get_full_hp_param"])
def test_rotating_a_marked_mirror_warns(mark: str) -> None:
    """B7: of what the next step does."""
    s = Setup(mark)
    slerp = s.rotation(s.fc)
    with pytest.warns(
        UserWarning, match=r"mirrors master weights.*build SpASlerp for the master.*safe_set_full"
    ) as seen:
        slerp.step()
    assert seen[0].filename == __file__
    assert slerp.last_step == 1


def test_rotating_an_unmarked_mirror_is_lost_without_a_word() -> None:
    """B7: nothing tells it from a weight that the optimizer moves; a warning would be one for any bfloat16 head."""
    for masters in (True, False):
        s = Setup(masters=masters)
        s.inner.param_groups[0]["lr"] = 0.0
        before = s.alignment()
        s.rotation(s.fc).step()
        rotated = s.alignment()
        assert (rotated - before > 0.1).all()
        s.backward()
        s.inner.step()
        assert torch.equal(s.alignment(), before if masters else rotated)
