"""torch.optim.swa_utils: averaged networks, their BatchNorm statistics, averaged buffers."""

from __future__ import annotations

from typing import Any

import integration_scripts as scripts
import pytest
import torch
from problems import same_state, state_of
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import spalign

scripts.available()


@pytest.fixture
def net() -> Any:
    from digits import Network

    return Network()


def loader() -> Any:
    from digits import train_loader

    return train_loader(shuffle=False)


@pytest.mark.parametrize("copied", [True, False])
def test_statistics_of_an_averaged_network_feed_nothing(net: Any, copied: bool) -> None:
    """C9, C10: `update_bn` passes the training set through in training mode; of the copy, or of the network itself."""
    spareg, features = spalign.SpARegLoss(net.fc), spalign.FeatureCapture(net.fc)
    images, labels = next(iter(loader()))
    net(images)
    spareg(features(), labels)
    before = state_of(spareg)
    update_bn(loader(), AveragedModel(net) if copied else net)
    assert same_state(spareg, before)
    with pytest.raises(RuntimeError, match="no features were captured"):
        features()


@pytest.mark.parametrize("ema", [False, True])
def test_a_tracker_in_the_model_is_averaged_with_it(net: Any, ema: bool) -> None:
    """C9: its counts are floats, so averaging them is exact, where an integer counter would be truncated."""
    net.spareg = spalign.SpARegLoss(net.fc)
    features = spalign.FeatureCapture(net.fc)
    averaged: Any = AveragedModel(net, use_buffers=True, **({"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if ema else {}))
    means, weights = [], []
    for images, labels in loader():
        net(images)
        net.spareg(features(), labels)
        averaged.update_parameters(net)
        means.append(net.spareg.tracker.mean.double().clone())
        weights.append(net.spareg.tracker.weight.double().clone())
    shares = torch.full((8,), 1 / 8, dtype=torch.float64)
    if ema:  # the first update copies
        shares = torch.tensor([0.5**7, *(0.5 ** (8 - k) for k in range(1, 8))], dtype=torch.float64)
    got = averaged.module.spareg.tracker
    for values, value in ((means, got.mean), (weights, got.weight)):
        want = torch.tensordot(shares, torch.stack(values), 1)
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)  # float32, a rounding per update
    assert 0 <= averaged.module.spareg().item() <= 2
    again: Any = AveragedModel(net, use_buffers=True)
    again.load_state_dict(averaged.state_dict())
    assert torch.equal(again.module.spareg(), averaged.module.spareg())


def test_swalr_moves_the_rate_that_is_used(net: Any) -> None:
    """A1, A13: built on the wrapper, together with another schedule."""
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = spalign.SpAProj(inner, net.fc, spalign.ClassMeanTracker.for_classifier(net.fc))
    scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear")
    rates = []
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        rates.append(inner.param_groups[0]["lr"])
    assert rates == pytest.approx([0.06, 0.02, 0.02])
