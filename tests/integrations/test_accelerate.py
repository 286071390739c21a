"""Accelerate: before and after `prepare`, accumulation, clipping, precision, schedules of many processes, resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import integration_scripts as scripts
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spalign

scripts.available("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

pytestmark = scripts.FOREIGN_WARNINGS
C, D = 10, 64


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings in singletons."""
    yield
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()


def train(*args: Any, **options: Any) -> Any:
    return scripts.seeded(scripts.script("accelerate_loop").train, *args, cpu=True, **options)


@pytest.mark.parametrize("strategy", ["reg", "slerp", "proj", "all"])
def test_resume_is_bit_equal(strategy: str, tmp_path: Path) -> None:
    """16 steps, `save_state`, `load_state` into fresh objects, 16 more: 32 uninterrupted (C12)."""
    amounts = scripts.strengths(strategy)
    with scripts.counting() as straight:
        want = train(amounts, 4, folder=tmp_path)
    with scripts.counting() as resumed:
        torch.manual_seed(99)  # a fresh network that shares nothing with the first
        got = scripts.script("accelerate_loop").train(amounts, 4, folder=tmp_path, resume=2, cpu=True)
    assert (straight.steps, resumed.steps) == (32, 16)
    assert scripts.same_weights(got, want)
    for a, b in zip(straight.trackers[0].buffers(), resumed.trackers[0].buffers(), strict=True):
        assert torch.equal(a, b)
    assert resumed.slerps[0].last_step == straight.slerps[0].last_step == 4


def test_accumulation_and_clipping() -> None:
    """A16, A18: `step()` is called per micro-batch; projection runs when it acts, on what clipping left."""
    with scripts.counting() as counts:
        train(scripts.strengths("all"), 2, clip=0.05, gradient_accumulation_steps=2)
    assert (counts.fed, counts.projected, counts.steps, counts.rotated) == (16, 8, 8, 2)
    # Clipping divides by the norm plus 1e-6, and projecting only shrinks.
    assert max(counts.gradient_norms) <= 0.05 * (1 + 1e-5)


def test_bf16_mixed_precision() -> None:
    """D4: single-precision state, the same acts, and alignment over the plain twin's."""
    from digits import evaluate

    networks = []
    for strategy in ("off", "all"):
        with scripts.counting() as counts:
            networks.append(train(scripts.strengths(strategy), 3, mixed_precision="bf16"))
        _fresh()
        assert (counts.fed, counts.projected, counts.rotated) == (24, 24, 3)
        assert counts.trackers[0].mean.dtype == torch.float32
    for network in networks:  # prepare() gave it an autocasting forward
        network.forward = type(network).forward.__get__(network)
    off, aligned = (evaluate(network) for network in networks)
    assert aligned[1] > off[1]


def _fresh() -> None:
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()


class Setup:
    """A classifier on given features, and means of its classes."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(1)
        self.h, self.y = torch.randn(40, D, generator=rng), torch.arange(40) % C
        torch.manual_seed(2)
        self.fc = nn.Linear(D, C)
        self.tracker = spalign.ClassMeanTracker.for_classifier(self.fc)
        self.tracker.update(self.h, self.y)
        self.inner = torch.optim.SGD(self.fc.parameters(), lr=0.1, momentum=0.9)

    def train(self, accelerator: Accelerator, model: Any, optimizer: Any, steps: int = 4) -> Tensor:
        """Take micro-batches, two to a step."""
        for k in range(2 * steps):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(self.h[k::8]), self.y[k::8])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return self.fc.weight.detach().clone()


@pytest.mark.parametrize("when", ["before", "after", "after, inside"])
def test_wrapped_before_or_after_prepare(when: str) -> None:
    """A1, A2: either way once per optimizer step, bit for bit the loop without Accelerate."""
    want = Setup()
    facade = spalign.SpAProj(want.inner, want.fc, want.tracker, gamma=0.3)
    for k in range(4):
        for part in (2 * k, 2 * k + 1):
            (F.cross_entropy(want.fc(want.h[part::8]), want.y[part::8]) / 2).backward()
        facade.step()
        facade.zero_grad()

    s = Setup()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if when == "before":
        model, optimizer = accelerator.prepare(s.fc, spalign.SpAProj(s.inner, s.fc, s.tracker, gamma=0.3))
        assert isinstance(optimizer, AcceleratedOptimizer), "not handed back untouched"
        assert isinstance(optimizer.optimizer, spalign.SpAProj)
    else:
        model, optimizer = accelerator.prepare(s.fc, s.inner)
        if when == "after":
            optimizer = spalign.SpAProj(optimizer, s.fc, s.tracker, gamma=0.3)
            assert torch.optim.lr_scheduler.StepLR(optimizer, 100).optimizer is optimizer
        else:
            spalign.SpAProj(optimizer.optimizer, s.fc, s.tracker, gamma=0.3)
    with scripts.counting() as counts:
        got = s.train(accelerator, model, optimizer)
    assert (counts.projected, counts.steps) == (4, 4)
    assert torch.equal(got, want.fc.weight)


def test_the_rotation_keeps_its_pace_with_four_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """B11: a prepared scheduler steps once per process and call; the rotation comes back untouched and steps once."""
    s = Setup()
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(AcceleratorState, "num_processes", property(lambda self: 4), raising=False)
    slerp = spalign.SpASlerp(s.fc, s.tracker, total_steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(s.inner, 100)
    optimizer, prepared, prepared_slerp = accelerator.prepare(
        spalign.SpAProj(s.inner, s.fc, s.tracker), scheduler, slerp
    )
    assert prepared_slerp is slerp
    optimizer.step()  # an epoch of one batch
    prepared.step()
    prepared_slerp.step()
    assert scheduler.last_epoch == 4, "the trap that the rotation must not be in"
    assert slerp.last_step == 1


def test_a_plain_checkpoint_goes_on_aligned(tmp_path: Path) -> None:
    """C12: loaded before the strategies are registered, a plain checkpoint leaves every term at exactly 0."""
    scripts.seeded(scripts.plain("accelerate_loop").train, scripts.strengths("all"), 1, folder=tmp_path, cpu=True)
    _fresh()
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        train(scripts.strengths("all"), 2, folder=tmp_path, resume=1)
    _fresh()
    module = scripts.script("accelerate_loop")
    terms: list[float] = []

    class Late(Accelerator):
        def register_for_checkpointing(self, spareg: Any, slerp: Any) -> None:
            self.load_state(str(tmp_path / "epoch-1"))
            terms.append(spareg().item())
            super().register_for_checkpointing(spareg, slerp)

    module.Accelerator = Late
    with scripts.counting() as counts:
        network = module.train(scripts.strengths("all"), 1, cpu=True)
    assert terms == [0.0]
    assert counts.seen_at_first == [0]
    assert all(torch.isfinite(p).all() for p in network.parameters())
