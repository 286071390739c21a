"""Decoding and augmentation of single images, in the workers, and normalisation of batches on the device.

A worker keeps images in PIL's form until they are augmented: cropping before anything else touches the other pixels is
the quickest, and its Gaussian blur is both what the published codes use and several times quicker than a convolution.
The same transforms take uint8 tensors (3, H, W), which is what images decoded on a GPU are.

Shapes: N images of a batch, R pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

Kind = Literal["standard", "glmc"]
Transform = Callable[[Any], Tensor]
"""From a PIL image or a uint8 tensor (3, H, W) to a uint8 tensor (3, R, R)."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def decode(file: Any) -> Image.Image:
    """Decode a JPEG or PNG, given by path or open file, to RGB, whatever its colours are (grey, CMYK, with alpha).

    Raises:
        OSError: the file is missing, damaged or of another kind.
    """
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL says of some damaged headers
        raise OSError(str(error)) from error


class GaussianBlur(nn.Module):
    """Blur with a standard deviation drawn from 0.1 .. 2 pixels.

    Args:
        resolution: R. Tensors are blurred with a kernel of about a tenth of it.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.kernel_size = resolution // 10 // 2 * 2 + 1

    def forward(self, image: Any) -> Any:
        sigma = float(torch.empty(()).uniform_(0.1, 2.0))
        if isinstance(image, Image.Image):
            return image.filter(ImageFilter.GaussianBlur(sigma))
        return v2.functional.gaussian_blur(image, [self.kernel_size] * 2, [sigma] * 2)


def training_transform(kind: Kind, resolution: int) -> Transform:
    """Return the published augmentation: `standard` of CE, ETF-DR and ARB, or `glmc`.

    All its random numbers come from PyTorch's global CPU generator, see `seeded`.
    """
    crop = v2.RandomResizedCrop(resolution, antialias=True)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0)
    flip = v2.RandomHorizontalFlip()
    if kind == "standard":
        steps = [crop, flip, jitter]
    else:
        blur = v2.RandomApply([GaussianBlur(resolution)], p=0.5)
        steps = [crop, jitter, v2.RandomGrayscale(p=0.2), blur, flip]
    return v2.Compose([*steps, v2.PILToTensor()])  # type: ignore[no-any-return]


def test_transform(resolution: int) -> Transform:
    """Return the published preparation at test time: shorter side to R 256 / 224, then the middle (R, R)."""
    resize = v2.Resize(round(resolution * 256 / 224), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(resolution), v2.PILToTensor()])  # type: ignore[no-any-return]


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


@contextmanager
def seeded(seed: int, *key: int) -> Iterator[None]:
    """Set PyTorch's global CPU generator to a state that depends on `seed` and `key` alone, and put it back after."""
    generator = torch.default_generator  # torch.manual_seed would also seed the GPUs
    state = generator.get_state()
    generator.manual_seed(draw_seed(seed, *key))
    try:
        yield
    finally:
        generator.set_state(state)


def draw_seed(seed: int, *key: int) -> int:
    """Return a hash of `seed` and `key`, all of them 0 or more, in 0 .. 2^63 - 1."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Normalise(nn.Module):
    """From uint8 (N, 3, R, R) to float32 with ImageNet's mean 0 and deviation 1, channels last in memory.

    Nothing waits for the device.

    Args:
        device: where the images are.
    """

    scale_311: Tensor
    shift_311: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("scale_311", 1 / (255 * std), persistent=False)
        self.register_buffer("shift_311", -mean / std, persistent=False)

    def forward(self, images_N3RR: Tensor) -> Tensor:
        images = images_N3RR.to(torch.float32, memory_format=torch.channels_last)
        return images.mul_(self.scale_311).add_(self.shift_311)
