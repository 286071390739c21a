"""Ten steps, a checkpoint, fresh objects, ten more: every bit is that of twenty steps without a stop.

The loop is the raw one of a user: an encoder with BatchNorm and dropout, an optimizer with momentum, a learning rate
schedule, an averaged model, and for some a GradScaler; the checkpoint goes through a file, by ``torch.save`` and
``torch.load(weights_only=True)`` or by ``torch.distributed.checkpoint``. Resuming over several ranks and under trainers
is tested with those.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import make_batch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spalign

C, D, N = 5, 6, 16
STEPS_PER_EPOCH = 2
STRATEGIES = {"none": "", "loss": "loss", "rotation": "rotation", "projection": "projection"}
STRATEGIES["all"] = "loss rotation projection"
HEADS = ("linear", "weight_norm", "old_weight_norm")


class Run:
    """Everything that a training script builds anew when it starts again."""

    def __init__(
        self,
        strategies: str,
        *,
        seed: int,
        head: str = "linear",
        momentum: float | None = 0.1,
        soft: bool = False,
        scaled: bool = False,
        make: Callable[..., Optimizer] = SGD,
        total_steps: int = 10,
        batch: int = N,
    ) -> None:
        torch.manual_seed(seed)
        self.strategies, self.soft, self.batch = strategies.split(), soft, batch
        self.fc = nn.Linear(D, C)
        if head == "weight_norm":
            nn.utils.parametrizations.weight_norm(self.fc)
        elif head == "old_weight_norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated by torch, still in use
                nn.utils.weight_norm(self.fc)
        self.encoder = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D), nn.Dropout(0.2), nn.Tanh())
        self.model = nn.Sequential(self.encoder, self.fc)
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if make is SGD else {"amsgrad": True}
        self.optimizer: Optimizer = make(self.model.parameters(), lr=0.05, weight_decay=1e-3, **options)
        self.tracker = spalign.ClassMeanTracker.for_classifier(self.fc, momentum=momentum)
        self.spareg = spalign.SpARegLoss(self.fc, self.tracker)
        self.slerp = spalign.SpASlerp(self.fc, self.tracker, total_steps=total_steps, alpha_max=0.3, threshold=0.95)
        if "projection" in self.strategies:
            self.optimizer = spalign.SpAProj(self.optimizer, self.fc, self.tracker, gamma=0.3)
        self.cosine = CosineAnnealingLR(self.optimizer, 12)
        self.plateau = ReduceLROnPlateau(self.optimizer, patience=1, factor=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3, enabled=scaled)
        # The old weight norm keeps its product as a tensor inside the graph, which torch cannot copy: no average of it.
        averaged = self.encoder if head == "old_weight_norm" else self.model
        self.averaged: nn.Module = averaged
        self.average = AveragedModel(averaged, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        self.losses: list[Tensor] = []

    def train(self, first: int, last: int) -> None:
        """Train steps first to last - 1; every second one ends an epoch."""
        for step in range(first, last):
            x, y = make_batch(step, self.batch, C, 4)
            torch.manual_seed(step)  # of the dropout, which a script restores in its own way
            targets = y
            if self.soft:
                q = 0.9 * nn.functional.one_hot(y, C) + 0.1 / C
                targets, x = 0.7 * q + 0.3 * q.flip(0), 0.7 * x + 0.3 * x.flip(0)
            self.model.train()
            self.spareg.train()
            h = self.encoder(x)
            loss: Tensor = nn.functional.cross_entropy(self.fc(h), targets)
            term = torch.zeros(())
            if "loss" in self.strategies:
                term = self.spareg(h, targets)
            elif self.strategies:
                self.tracker.update(h, targets)
            self.optimizer.zero_grad()
            if step == 7:  # an overflow, which the scaler skips; without one, as with it, the means must live through
                self.tracker.update(torch.full_like(h.detach(), torch.inf), targets)
            self.scaler.scale(loss + 0.3 * term).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.average.update_parameters(self.averaged)
            self.losses += [loss.detach(), term.detach()]
            self.cosine.step()
            if step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1:
                if "rotation" in self.strategies:
                    self.slerp.step()
                self.model.eval()
                self.spareg.eval()
                with torch.no_grad():
                    validation = nn.functional.cross_entropy(self.model(x), targets)
                self.plateau.step(validation.item())

    def others(self) -> dict[str, Any]:
        """Return what is neither model nor optimizer."""
        return {
            "tracker": self.tracker,
            "slerp": self.slerp,
            "cosine": self.cosine,
            "plateau": self.plateau,
            "scaler": self.scaler,
            "average": self.average,
        }

    def state(self) -> dict[str, Any]:
        """Return every number of the run."""
        parts = {"model": self.model, "optimizer": self.optimizer, **self.others()}
        return {name: part.state_dict() for name, part in parts.items()} | {"losses": self.losses[-20:]}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Walk two states; every tensor and every number must be equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{k}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def by_torch(run: Run, fresh: Run, folder: Path) -> None:
    """``torch.save``, and ``torch.load`` of nothing but weights."""
    parts = {"model": run.model, "optimizer": run.optimizer, **run.others()}
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "checkpoint.pt")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name, part in {"model": fresh.model, "optimizer": fresh.optimizer, **fresh.others()}.items():
        part.load_state_dict(saved[name])


def by_dcp(run: Run, fresh: Run, folder: Path) -> None:
    """``torch.distributed.checkpoint`` in one process, which steps the fresh optimizer to learn its state (A10)."""

    def collect(r: Run) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(r.model),
            "optimizer": get_optimizer_state_dict(r.model, r.optimizer),
            "tracker": r.tracker.state_dict(),
            "average": r.average.state_dict(),
            **{name: part.state_dict() for name, part in r.others().items() if name not in ("tracker", "average")},
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group exists
        save(collect(run), checkpoint_id=folder)
        before = [p.detach().clone() for p in fresh.model.parameters()]
        saved = collect(fresh)
        assert fresh.slerp.last_step == 0
        assert not fresh.tracker.seen.any()
        assert all(torch.equal(p, b) for p, b in zip(fresh.model.parameters(), before, strict=True))
        load(saved, checkpoint_id=folder)
    set_model_state_dict(fresh.model, saved["model"])
    set_optimizer_state_dict(fresh.model, fresh.optimizer, saved["optimizer"])
    for name, part in fresh.others().items():
        part.load_state_dict(saved[name])


CHECKPOINTS: dict[str, Callable[[Run, Run, Path], None]] = {"torch": by_torch, "dcp": by_dcp}


def check(tmp_path: Path, checkpoint: str, strategies: str, stop: int = 10, **options: Any) -> None:
    """Compare a run of twenty steps with one that starts again after ten, or after another number."""
    whole, first = Run(strategies, seed=1, **options), Run(strategies, seed=1, **options)
    whole.train(0, 20)
    first.train(0, stop)
    second = Run(strategies, seed=2, **options)
    CHECKPOINTS[checkpoint](first, second, tmp_path)
    second.train(stop, 20)
    assert_same(second.state() | {"losses": second.losses[-18:]}, whole.state() | {"losses": whole.losses[-18:]})
    # The comparison is of something: the halves differ, and so do the strategies' traces.
    assert not torch.equal(first.fc.weight, second.fc.weight)
    if strategies:
        assert second.tracker.seen.all()
    if "rotation" in strategies:
        assert second.slerp.last_step == 10


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("strategies", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("make", [SGD, AdamW])
def test_resuming_equals_not_stopping(make: type[Optimizer], strategies: str, checkpoint: str, tmp_path: Path) -> None:
    """Pitfalls A9, A10, C13: nothing that matters is anywhere but in the state dicts, and saving changes nothing."""
    check(tmp_path, checkpoint, strategies, make=make)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_resuming_with_every_kind_of_mean_and_label(
    soft: bool, momentum: float | None, checkpoint: str, tmp_path: Path
) -> None:
    """Pitfall C13: the counts of a cumulative mean, and the fractional ones of mixed labels, are in buffers."""
    check(tmp_path, checkpoint, STRATEGIES["all"], momentum=momentum, soft=soft)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("strategies", ["rotation", "projection", STRATEGIES["all"]])
def test_resuming_with_weight_norm(strategies: str, head: str, tmp_path: Path) -> None:
    """Pitfall B5: direction and length are in the model's state, and what the old kind keeps beside them is not."""
    check(tmp_path, "torch", strategies, head=head)


@pytest.mark.parametrize("strategies", STRATEGIES.values(), ids=STRATEGIES)
def test_resuming_with_a_grad_scaler(strategies: str, tmp_path: Path) -> None:
    """Pitfalls A4, A6: the scale goes on growing where it was."""
    check(tmp_path, "torch", strategies, scaled=True)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_resuming_in_the_middle_of_an_epoch_where_sums_are_kept_incrementally(
    momentum: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pitfall C13: fewer samples than classes, on the way of other devices: the running sum is state, roundings too."""
    monkeypatch.setattr("spalign.host.can_read", lambda features: False)
    check(tmp_path, "torch", STRATEGIES["all"], stop=11, momentum=momentum, batch=C - 1)


def test_loading_does_not_reassign_the_buffers(tmp_path: Path) -> None:
    """Pitfall C8: what knows the means by their address, as a captured graph does, reads the loaded ones."""
    first, second = Run("loss", seed=1), Run("loss", seed=2)
    first.train(0, 4)
    pointers = [b.data_ptr() for b in second.tracker.buffers()]
    by_torch(first, second, tmp_path)
    assert [b.data_ptr() for b in second.tracker.buffers()] == pointers


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("strategies", list(STRATEGIES.values())[1:], ids=list(STRATEGIES)[1:])
def test_without_the_trackers_state_every_part_is_off_until_classes_are_seen(
    strategies: str, momentum: float | None, tmp_path: Path
) -> None:
    """Pitfall C12: trainers save model and optimizer alone; the term is exactly 0, gradients and rows keep their bits.

    The first step after such a resume is bit-equal to one of the same checkpoint without spalign, up to where its batch
    is seen; then the means are re-estimated from the first batch on, and all stays finite.
    """
    first = Run(strategies, seed=1, momentum=momentum)
    first.train(0, 10)
    second = Run(strategies, seed=2, momentum=momentum)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    twin = Run("", seed=3)
    twin.model.load_state_dict(first.model.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))

    before = [p.detach().clone() for p in second.model.parameters()]
    assert second.spareg() == 0
    grads = torch.autograd.grad(second.spareg(), list(second.fc.parameters()), allow_unused=True)
    assert not any(g is not None and g.any() for g in grads)
    second.slerp.step()
    second.slerp.load_state_dict({"last_step": 0})
    assert all(torch.equal(p, b) for p, b in zip(second.model.parameters(), before, strict=True))
    x, y = make_batch(99, N, C, 4)
    for run in (second, twin):
        run.model.eval()
        run.optimizer.zero_grad()
        (nn.functional.cross_entropy(run.model(x), y) + 0.3 * run.spareg()).backward()
        run.optimizer.step()
    for p, q in zip(second.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)

    second.train(10, 13)
    assert second.tracker.seen.any()
    assert all(torch.isfinite(t).all() for t in [*second.model.state_dict().values(), *second.losses])
    if "loss" in strategies:
        assert all(term > 0 for term in second.losses[1::2]), "re-estimated from the first batch on"
    # What it re-estimates is what a fresh tracker makes of the same batches, nothing of before.
    assert second.tracker.weight.sum() == 3 * N


def test_a_checkpoint_from_before_spalign_loads_strictly() -> None:
    """Pitfall C12: none of the objects adds keys to model or optimizer; old checkpoints fit, and so do new ones."""
    plain, aligned = Run("", seed=1), Run(STRATEGIES["all"], seed=2)
    assert list(plain.model.state_dict()) == list(aligned.model.state_dict())
    aligned.model.load_state_dict(plain.model.state_dict(), strict=True)
    plain.train(0, 2)
    aligned.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    aligned.train(2, 4)
    plain.optimizer.load_state_dict(aligned.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        # A tracker that the user puts into the model is part of it; such a checkpoint says so.
        nn.ModuleDict({"model": plain.model, "tracker": plain.tracker}).load_state_dict(
            {f"model.{k}": v for k, v in plain.model.state_dict().items()}
        )


def test_resuming_the_rotation_with_more_steps_follows_the_new_schedule(tmp_path: Path) -> None:
    """Pitfall B12: the count alone is saved; alpha is that of the new total, from the first resumed call on."""
    first, second = Run("rotation", seed=1, total_steps=10), Run("rotation", seed=2, total_steps=40)
    first.train(0, 10)
    by_torch(first, second, tmp_path)
    assert (first.slerp.last_step, second.slerp.last_step) == (5, 5)
    alphas = []
    for _ in range(3):
        second.slerp.step()
        alphas.append(second.slerp.alpha)
    want = [0.3 * (1 - torch.cos(torch.tensor(torch.pi * t / 40, dtype=torch.float64)).item()) / 2 for t in (6, 7, 8)]
    assert alphas == pytest.approx(want, rel=1e-12)
    assert list(first.slerp.state_dict()) == ["last_step"]
