"""timm: optimizers by name, schedules, Mixup's soft labels, EMA, loss scaler with clipping, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import integration_scripts as scripts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spalign

scripts.available("timm")

from timm.data import Mixup  # noqa: E402
from timm.models import resume_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler  # noqa: E402

pytestmark = scripts.FOREIGN_WARNINGS
C, D, N = 10, 64, 32


def network() -> Any:
    from digits import Network

    torch.manual_seed(3)
    return Network()


def batch(seed: int = 0, num_seen: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    """Return digits of the first `num_seen` classes, in random order."""
    from digits import digits

    images, labels = digits()[1].tensors
    rng = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 70 * num_seen, (N,), generator=rng)
    return images[index].clone(), labels[index].clone()


@pytest.mark.parametrize("opt", ["adamw", "lamb", "lion", "adafactor", "muon", "lookahead_momentum"])
def test_projection_acts_once_per_step_of_every_optimizer(opt: str) -> None:
    """A1, A2: of timm's own, of one that splits parameters by kind, and of a wrapper that runs no hooks itself."""
    if opt.removeprefix("lookahead_") not in list_optimizers():
        pytest.skip(f"this timm has no {opt}")
    train = scripts.script("timm_loop").train
    options: dict[str, Any] = {"opt": opt, "lr": 0.01}
    want = scripts.seeded(scripts.plain("timm_loop").train, scripts.strengths("all"), 2, **options)
    off = scripts.seeded(train, scripts.strengths("off"), 2, **options)
    assert scripts.same_weights(off, want), "gamma 1 changes no bit"
    with scripts.counting() as counts:
        projected = scripts.seeded(train, scripts.strengths("proj"), 2, **options)
    assert counts.projected == 16
    assert not scripts.same_weights(projected, off)


@pytest.mark.parametrize("sched", ["cosine", "step", "multistep", "poly", "tanh"])
def test_schedules_move_the_rate_that_is_used(sched: str) -> None:
    """A1, A3: built on the wrapper and after a checkpoint was loaded, they set what an unwrapped twin's set."""
    rates: list[list[float]] = []
    for wrap in (False, True):
        net = network()
        inner = optimizer = create_optimizer_v2(net, opt="momentum", lr=0.1)
        if wrap:
            optimizer = spalign.SpAProj(inner, net.fc, spalign.ClassMeanTracker.for_classifier(net.fc))
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=sched, num_epochs=6, warmup_epochs=2, decay_epochs=2, decay_milestones=[3]
        )
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        rates.append([])
        for epoch in range(6):
            scheduler.step_update(epoch)
            scheduler.step(epoch + 1)
            rates[-1].append(inner.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[1])) > 1


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_leaves_absent_classes_unseen(mode: str, smoothing: float) -> None:
    """D8: dense soft labels with an off value; each mixed image counts for its two classes by weight."""
    mix = Mixup(mixup_alpha=1.0, mode=mode, label_smoothing=smoothing, num_classes=C)
    np.random.seed(1)  # noqa: NPY002 (what Mixup draws from)
    x, y = batch(num_seen=6)
    h = torch.randn(N, D)
    _, soft = mix(x, y)
    tracker = spalign.ClassMeanTracker(C, D, momentum=None)
    tracker.update(h, soft)
    assert tracker.seen.tolist() == [bool((y == c).any()) for c in range(C)]
    assert tracker.weight.sum().item() == pytest.approx(N, rel=1e-5)

    # Independent: what each image contributes, before timm smooths it.
    np.random.seed(1)  # noqa: NPY002
    _, plain = Mixup(mixup_alpha=1.0, mode=mode, label_smoothing=0.0, num_classes=C)(*batch(num_seen=6))
    q = plain.double().numpy()
    weight = q.sum(0)
    mean = (q.T @ h.double().numpy()) / np.where(weight > 0, weight, 1.0)[:, None]
    # Smoothed labels are float32 numbers near 0.9 minus 0.01: some 1e-7 of weights that may be small.
    np.testing.assert_allclose(tracker.mean.double().numpy(), mean, rtol=1e-4, atol=1e-4)


def test_an_averaged_network_leaves_the_training_alone() -> None:
    """C9, C10: ModelEmaV3 copies capture and hook; its passes reach neither the capture nor the means of training."""
    net = network()
    spareg, features = spalign.SpARegLoss(net.fc), spalign.FeatureCapture(net.fc)
    ema = ModelEmaV3(net, decay=0.5)
    x, y = batch()
    net.eval()(x[:4])  # validation, gradients or not
    net.train()(x)
    ema.module.train()
    ema.module(x[:4])
    ema.module.eval()(x[:4])
    spareg(features(), y).backward()
    assert spareg.tracker.weight.sum() == N, "the training batch alone"
    keys = list(ema.module.state_dict())
    assert keys == list(net.state_dict()), "nothing to average beside the model's own"


def test_a_tracker_in_the_model_is_averaged_with_it() -> None:
    """C9: put there before the EMA exists; the average is finite, equals the formula, and survives a reload."""
    net = network()
    net.spareg = spalign.SpARegLoss(net.fc)
    features = spalign.FeatureCapture(net.fc)
    ema = ModelEmaV3(net, decay=0.5)
    want = torch.zeros(C, D)
    for seed in range(3):
        x, y = batch(seed)
        net(x)
        net.spareg(features(), y)
        ema.update(net)
        want = 0.5 * want + 0.5 * net.spareg.tracker.mean
    tracker = ema.module.spareg.tracker
    torch.testing.assert_close(tracker.mean, want, rtol=1e-5, atol=1e-6)  # a rounding per update
    for name, value in ema.module.state_dict().items():
        assert torch.isfinite(value).all(), name
    again = copy.deepcopy(net)
    again.load_state_dict(ema.module.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), ema.module.eval()(x))
        # The global mean of averages is the averaged one to a rounding of float32; evaluating has formed it afresh.
        torch.testing.assert_close(again.spareg(), ema.module.spareg(), rtol=1e-6, atol=0)


def test_the_loss_scaler_unscales_and_clips_before_the_projection() -> None:
    """A4, A6, A18: timm clips within its scaler; scaled training equals unscaled, to a rounding of the division."""
    norms: list[float] = []
    weights = []
    for scale in (1.0, 65536.0):
        net = network()
        tracker, features = spalign.ClassMeanTracker.for_classifier(net.fc), spalign.FeatureCapture(net.fc)
        optimizer = spalign.SpAProj(create_optimizer_v2(net, opt="momentum", lr=0.1), net.fc, tracker, gamma=0.3)
        scaler = NativeScaler(device="cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for seed in range(3):
            x, y = batch(seed)
            loss = F.cross_entropy(net(x), y)
            tracker.update(features(), y)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=0.5, parameters=list(net.parameters()))
            norms.append(torch.stack([p.grad.norm() for p in net.parameters()]).norm().item())
        weights.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    assert max(norms) <= 0.5 * (1 + 1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_timms_checkpoints_hold_no_means_and_go_on_without(tmp_path: Path) -> None:
    """C12: model and optimizer come back; every term is exactly 0 until classes are seen again."""
    net = network()
    spareg, features = spalign.SpARegLoss(net.fc), spalign.FeatureCapture(net.fc)
    optimizer = spalign.SpAProj(create_optimizer_v2(net, opt="momentum", lr=0.1), net.fc, spareg.tracker, gamma=0.3)

    def step(seed: int) -> float:
        x, y = batch(seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y) + spareg(features(), y)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    step(0)
    CheckpointSaver(net, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0, 1.0)

    net = network()
    spareg, features = spalign.SpARegLoss(net.fc), spalign.FeatureCapture(net.fc)
    inner = create_optimizer_v2(net, opt="momentum", lr=0.1)
    optimizer = spalign.SpAProj(inner, net.fc, spareg.tracker, gamma=0.3)
    resume_checkpoint(net, str(tmp_path / "last.pth.tar"), optimizer, log_info=False)
    assert inner.state[net.fc.weight]["momentum_buffer"].any()
    assert spareg() == 0
    weight = net.fc.weight.detach().clone()
    spalign.SpASlerp(net.fc, spareg.tracker, total_steps=1, alpha_max=1.0, threshold=1.0).step()
    assert torch.equal(net.fc.weight, weight)
    net.fc.weight.grad = torch.ones_like(weight)
    optimizer._project(inner)
    assert (net.fc.weight.grad == 1).all()
    assert all(np.isfinite(step(seed)) for seed in range(3))
