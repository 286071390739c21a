"""torchvision's residual networks as backbones.

Shapes: N images, H x W pixels, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet


def _wide_resnet50() -> resnet.ResNet:
    """ResNet-50 with 1024 planes instead of 512 in its last stage: D = 4096, 63.1 M parameters below it."""
    network = resnet.resnet50()
    network.inplanes = 1024
    network.layer4 = network._make_layer(resnet.Bottleneck, 1024, 3, stride=2)
    for module in network.layer4.modules():  # as torchvision starts all stages
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    network.fc = nn.Linear(4096, 1000)
    return network


NETWORKS: dict[str, Callable[[], resnet.ResNet]] = {
    "resnet50": resnet.resnet50,
    # ETF-DR's network for itself and for its cross-entropy.
    "resnet50-etfdr": _wide_resnet50,
    "resnext50": resnet.resnext50_32x4d,
    # For trials and tests, published nowhere.
    "resnet10": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]),
}


class TorchvisionBackbone(nn.Module):
    """A network of torchvision without its classifier: images (N, 3, H, W) to features (N, D).

    Raises:
        ValueError: there is no network of this name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"--network is {name}; expected one of {', '.join(NETWORKS)}")
        network: Any = NETWORKS[name]()
        self.feature_dim = network.fc.in_features
        network.fc = nn.Identity()
        self.network = network

    def forward(self, images_N3HW: Tensor) -> Tensor:
        features_ND: Tensor = self.network(images_N3HW)
        return features_ND

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks, the parts that a sharded network gathers one after the other."""
        stages = (self.network.layer1, self.network.layer2, self.network.layer3, self.network.layer4)
        return [block for stage in stages for block in stage]
