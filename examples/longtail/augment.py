"""Crop, flip, mixup and normalisation of whole batches on the device that holds the images.

The data set stays on the device as one uint8 tensor; a batch is one gather from it. All random numbers of an epoch are
drawn at its beginning from one CPU generator, so every device sees the same batches and nothing waits for the host.

Shapes: N images of the set, B of a batch, R resolution, S = R + 2 * padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EpochDraws:
    """One epoch's random numbers, by position in the epoch.

    Attributes:
        order: (N,) int64, which image comes at each position.
        top, left: (N,) int64 in 0 .. 2 * padding, the corner of the crop in the padded image.
        flip: (N,) bool, whether the crop is mirrored.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


def draw_epoch(num_images: int, padding: int, generator: torch.Generator, device: torch.device) -> EpochDraws:
    """Draw an epoch's order, crops and flips from a CPU generator and move them to the device."""
    order = torch.randperm(num_images, generator=generator)
    corners = torch.randint(2 * padding + 1, (2, num_images), generator=generator)
    flip = torch.rand(num_images, generator=generator) < 0.5
    return EpochDraws(order.to(device), corners[0].to(device), corners[1].to(device), flip.to(device))


class ImageSet:
    """Images kept on a device as uint8, padded with black, read in augmented or plain batches.

    Args:
        images: (N, 3, R, R) uint8.
        labels: (N,) int64.
        device: where to keep them.
        mean, std: of the normalisation, for pixels in 0 .. 1.
        padding: for random crops; the published 4 pixels are for R = 32, so the default is R / 8.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int | None = None,
    ) -> None:
        self.device = device
        self.labels_N = labels.to(device)
        self.resolution = images.shape[-1]
        self.padding = self.resolution // 8 if padding is None else padding
        # Pixels are rows of one (N * S * S, 3) table: a crop is a gather of rows, and comes out channels last.
        padded = torch.nn.functional.pad(images.to(device), [self.padding] * 4)
        self._size = padded.shape[-1]
        self._pixels = padded.permute(0, 2, 3, 1).reshape(-1, 3).contiguous()
        self._range = torch.arange(self.resolution, device=device)
        mean_3, std_3 = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self._scale_3, self._shift_3 = 1 / (255 * std_3), -mean_3 / std_3

    def __len__(self) -> int:
        return len(self.labels_N)

    def crops(self, index_B: Tensor, top_B: Tensor, left_B: Tensor, flip_B: Tensor) -> Tensor:
        """Return crops as float32 (B, 3, R, R), normalised, channels last in memory.

        Args:
            index_B: (B,) int64, which images.
            top_B, left_B: (B,) int64, the crop's corner in the padded image.
            flip_B: (B,) bool, whether to mirror the crop.
        """
        rows_BR = top_B[:, None] + self._range
        # Mirrored, column r of the crop is column R - 1 - r: arithmetic instead of a mask.
        mirrored_BR = torch.where(flip_B[:, None], self.resolution - 1 - self._range, self._range)
        columns_BR = left_B[:, None] + mirrored_BR
        row_start_BR = (index_B[:, None] * self._size + rows_BR) * self._size
        index_BRR = row_start_BR[:, :, None] + columns_BR[:, None, :]
        pixels = self._pixels.index_select(0, index_BRR.flatten())
        images_BRR3 = pixels.to(torch.float32).mul_(self._scale_3).add_(self._shift_3)
        shape = (len(index_B), self.resolution, self.resolution, 3)
        return images_BRR3.view(shape).permute(0, 3, 1, 2)

    def plain(self, index_B: Tensor) -> Tensor:
        """Return the images themselves as float32 (B, 3, R, R), normalised, channels last in memory."""
        corner_B = torch.full_like(index_B, self.padding)
        return self.crops(index_B, corner_B, corner_B, torch.zeros_like(index_B, dtype=torch.bool))


def mix(images_B3RR: Tensor, targets_BC: Tensor, partner_B: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup: `share` of each image and target plus 1 - `share` of its partner's.

    Args:
        images_B3RR: (B, 3, R, R) float.
        targets_BC: (B, C) float, one-hot.
        partner_B: (B,) int64, a permutation of the batch.
        share: one float32 in 0 .. 1.
    """
    images = torch.lerp(images_B3RR[partner_B], images_B3RR, share)
    return images, torch.lerp(targets_BC[partner_B], targets_BC, share)
