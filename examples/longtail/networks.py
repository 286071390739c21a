"""CIFAR residual networks with parameter-free (option A) shortcuts.

Shapes: N images, P planes (channels), H x W pixels, D feature dimensions, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and an option-A shortcut.

    The shortcut has no parameters: where the block changes the shape, it takes every second pixel and pads the
    missing channels with zeros, a quarter of the new planes on each side.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = planes // 4 if in_planes != planes else 0
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x_NPHW: Tensor) -> Tensor:
        y_NPHW = F.relu(self.bn1(self.conv1(x_NPHW)), inplace=True)
        y_NPHW = self.bn2(self.conv2(y_NPHW))
        if self.padding:
            x_NPHW = F.pad(x_NPHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y_NPHW.add_(x_NPHW), inplace=True)


class Backbone(nn.Module):
    """Stem, three stages with strides 1, 2, 2, and global average pooling: (N, 3, H, W) to features (N, D)."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; a CIFAR ResNet has 6 n + 2 layers: use 8, 14, 20, 32, 44, 56 or 110")
        if width < 1:
            raise ValueError(f"width is {width}; it multiplies the planes 16-32-64: use 1, 2 or 4")
        planes = [16 * width, 32 * width, 64 * width]
        self.feature_dim = planes[-1]
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        blocks: list[nn.Module] = []
        in_planes = planes[0]
        for stage, out_planes in enumerate(planes):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(in_planes, out_planes, stride=2 if stage and not block else 1))
                in_planes = out_planes
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # nothing reads it, and counting costs a GPU a kernel per layer

    def forward(self, images_N3HW: Tensor) -> Tensor:
        x_NPHW = F.relu(self.bn1(self.conv1(images_N3HW)), inplace=True)
        features_ND: Tensor = self.blocks(x_NPHW).mean(dim=(2, 3))
        return features_ND


class LinearNet(nn.Module):
    """A `backbone`, a module with a `feature_dim` D that gives features (N, D), and a linear `classifier` with bias."""

    backbone: nn.Module

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim(backbone), num_classes)

    def forward_features(self, images_N3HW: Tensor) -> Tensor:
        """Return the classifier's input (N, D)."""
        features_ND: Tensor = self.backbone(images_N3HW)
        return features_ND

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Return the logits (N, C)."""
        logits_NC: Tensor = self.classifier(self.forward_features(images_N3HW))
        return logits_NC


class CifarResNet(LinearNet):
    """CIFAR ResNet of `depth` = 6 n + 2 layers: a `backbone` and a linear `classifier` with bias.

    With depth 32 the backbone has 463,504 / 1,848,608 / 7,383,616 parameters at width 1 / 2 / 4 (the three networks
    that long-tail papers all call "ResNet-32"). Convolutions and the classifier's weight start from
    `kaiming_normal_` with PyTorch's default arguments, the classifier's bias from PyTorch's own default.
    """

    backbone: Backbone

    def __init__(self, num_classes: int, *, depth: int = 32, width: int = 1) -> None:
        super().__init__(Backbone(depth, width), num_classes)
        initialize(self)


def feature_dim(backbone: nn.Module) -> int:
    """Return D of a backbone."""
    dim = backbone.feature_dim
    assert isinstance(dim, int)
    return dim


def initialize(model: nn.Module) -> None:
    """Start convolutions and linear weights as the CIFAR codes do: `kaiming_normal_` with its default arguments."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def num_parameters(module: nn.Module) -> int:
    """Return how many numbers the module's parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def store_channels_last(module: nn.Module) -> None:
    """Store the module's four-dimensional parameters channels last, in place."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
