"""Crop, flip and mixup against plain reference implementations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from longtail.augment import ImageSet, draw_epoch, mix
from longtail.data import MEAN, STD

CPU = torch.device("cpu")


def reference(image: npt.NDArray[np.uint8], top: int, left: int, flip: bool, padding: int) -> npt.NDArray[np.float64]:
    """RandomCrop(padding) at one corner, flip, ToTensor, Normalize, as torchvision defines them."""
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    crop = padded[:, top : top + size, left : left + size]
    if flip:
        crop = crop[:, :, ::-1]
    scaled: npt.NDArray[np.float64] = (crop / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    return scaled


def image_set(num_images: int, resolution: int) -> tuple[ImageSet, npt.NDArray[np.uint8]]:
    images = np.random.default_rng(0).integers(0, 256, (num_images, 3, resolution, resolution)).astype(np.uint8)
    labels = torch.arange(num_images)
    return ImageSet(torch.from_numpy(images), labels, device=CPU, mean=MEAN, std=STD), images


def test_every_crop_and_flip_equals_the_reference() -> None:
    images, pixels = image_set(3, 16)
    assert images.padding == 2  # 4 pixels at resolution 32
    cases = [(i, t, l, f) for i in range(3) for t in range(5) for l in range(5) for f in (False, True)]  # noqa: E741
    index, top, left, flip = (torch.tensor(column) for column in zip(*cases, strict=True))
    crops = images.crops(index, top, left, flip)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    for crop, (i, t, l, f) in zip(crops, cases, strict=True):  # noqa: E741
        # float32 against float64: three roundings of numbers below 3
        np.testing.assert_allclose(crop.numpy(), reference(pixels[i], t, l, f, 2), atol=1e-6)


def test_plain_images_are_only_normalised() -> None:
    images, pixels = image_set(4, 8)
    for row, plain in zip((2, 0), images.plain(torch.tensor([2, 0])), strict=True):
        np.testing.assert_allclose(plain.numpy(), reference(pixels[row], 1, 1, False, 1), atol=1e-6)


def test_draws_cover_every_corner_evenly() -> None:
    draws = draw_epoch(81_000, 4, torch.Generator().manual_seed(0), CPU)
    assert draws.order.sort().values.equal(torch.arange(81_000))
    cells = torch.bincount((draws.top * 9 + draws.left) * 2 + draws.flip, minlength=162)
    # 162 equally likely cells of 500 expected: chi-square has mean 161, standard deviation 18; the seed is fixed
    assert float(((cells - 500) ** 2 / 500).sum()) < 161 + 4 * 18


def test_draws_depend_on_the_generator_alone() -> None:
    first = draw_epoch(50, 2, torch.Generator().manual_seed(3), CPU)
    torch.manual_seed(7)
    again = draw_epoch(50, 2, torch.Generator().manual_seed(3), CPU)
    assert all(getattr(first, name).equal(getattr(again, name)) for name in ("order", "top", "left", "flip"))


def test_mix_weights_images_and_targets_alike() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    mixed, targets = mix(images, torch.eye(3), torch.tensor([1, 2, 0]), torch.tensor(0.75))
    assert mixed[:, 0, 0, 0].tolist() == [0.25, 1.25, 1.5]
    assert targets.tolist() == [[0.75, 0.25, 0], [0, 0.75, 0.25], [0.25, 0, 0.75]]
