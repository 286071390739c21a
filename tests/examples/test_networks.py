"""The CIFAR networks: sizes, shortcuts, initial values."""

from __future__ import annotations

import pytest
import torch
from longtail.networks import BasicBlock, CifarResNet, num_parameters, store_channels_last


@pytest.mark.parametrize(("width", "backbone"), [(1, 463_504), (2, 1_848_608), (4, 7_383_616)])
def test_parameter_counts_are_the_published_ones(width: int, backbone: int) -> None:
    model = CifarResNet(100, width=width)
    assert num_parameters(model.backbone) == backbone
    assert num_parameters(model.classifier) == 100 * (64 * width + 1)


@pytest.mark.parametrize("depth", [8, 14, 32])
def test_shapes(depth: int) -> None:
    model = CifarResNet(7, depth=depth, width=2).eval()
    images = torch.randn(2, 3, 16, 16)
    features = model.forward_features(images)
    assert features.shape == (2, 128)
    assert torch.equal(model(images), model.classifier(features))
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == depth - 1


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels() -> None:
    block = BasicBlock(16, 32, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 6, 6)
    y = block(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_initial_values_are_kaiming_normal() -> None:
    torch.manual_seed(0)
    model = CifarResNet(100, width=4)
    for module in (model.classifier, model.backbone.conv1):
        fan_in = module.weight[0].numel()
        # 1,728 numbers or more: their standard deviation is known to 1.7 %, and four times that is allowed
        assert float(module.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.07)
    assert float(model.classifier.bias.detach().abs().max()) <= 256**-0.5


def test_channels_last_changes_layout_alone() -> None:
    model = CifarResNet(10, depth=8)
    values = [parameter.clone() for parameter in model.parameters()]
    store_channels_last(model)
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("depth", "width", "message"), [(9, 1, "depth is 9"), (2, 1, "depth is 2"), (8, 0, "width is 0")]
)
def test_impossible_sizes_are_refused(depth: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarResNet(10, depth=depth, width=width)
