"""InfoPro's decoder, and the same result with less arithmetic on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.boundary import Boundary

VECTOR = 64  # The bytes of a processor's wide register.
WORTH = 3  # With less than so many times less arithmetic, small matrix products are slower than one convolution.


class Decoder(nn.Sequential):
    """Reconstructs the image from a boundary, as logits: [B, *boundary.shape] -> [B, *image].

    It resizes bilinearly to the image's size, then come a 3x3 convolution, batch norm, ReLU and a 3x3 convolution.
    Source: InfoPro (ICLR 2021), CIFAR auxiliary.

    Args:
        boundary: What it reads.
        image: Channels, height and width of the image.
        hidden: The number of channels between the convolutions.

    Attributes:
        fast: Whether `quickly` computes the same numbers up to rounding, on the CPU in full precision. By default True.
    """

    def __init__(self, boundary: Boundary, image: tuple[int, int, int], *, hidden: int = 12) -> None:
        channels, *size = image
        super().__init__(
            *boundary.to_map(),
            nn.Upsample(tuple(size), mode="bilinear", align_corners=True),
            nn.Conv2d(boundary.channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )
        self.fast = True

    def forward(self, h: Tensor) -> Tensor:
        suits = h.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and type(self[-3]) is nn.BatchNorm2d
        return self.quickly(h) if self.fast and suits else super().forward(h)

    def quickly(self, h: Tensor) -> Tensor:
        """Computes what the layers do, one after the other, with less work.

        `resized_convolution` takes the place of the first two layers where that saves much, and never makes the resized
        map. Between the convolutions, channels of zeros fill up a register of the processor: batch norm of 12 channels
        takes three times as long as that of 16.
        """
        *to_map, resize, first, norm, _, last = cast(Any, list(self))
        for module in to_map:
            h = module(h)
        more = -norm.num_features % (VECTOR // h.element_size())
        weight, bias = F.pad(first.weight, (0, 0, 0, 0, 0, 0, 0, more)), F.pad(first.bias, (0, more))
        quick = resized_convolution if is_worth_it(h, resize.size) else _one_by_one
        h = quick(h, weight, bias, resize.size)
        kept = (norm.running_mean, norm.running_var)
        mean, variance = (F.pad(statistic, (0, more)) for statistic in kept)
        scale, shift = (F.pad(parameter, (0, more)) for parameter in (norm.weight, norm.bias))
        h = F.batch_norm(h, mean, variance, scale, shift, norm.training, norm.momentum, norm.eps)
        if norm.training:
            norm.num_batches_tracked.add_(1)
            for statistic, moved in zip(kept, (mean, variance), strict=True):
                statistic.copy_(moved[: norm.num_features])
        return F.conv2d(F.relu_(h), F.pad(last.weight, (0, 0, 0, 0, 0, more)), last.bias, padding=1)


def is_worth_it(h: Tensor, size: tuple[int, int]) -> bool:
    """Whether `resized_convolution` needs `WORTH` times less arithmetic than the convolution of the resized map."""
    (channels, height, width), (rows, columns) = h.shape[1:], size
    together = 9 * height * width * (channels + columns) + 3 * height * rows * columns
    return 9 * channels * rows * columns > WORTH * together


def _one_by_one(h: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(h, size, mode="bilinear", align_corners=True)
    return F.conv2d(resized, weight, bias, padding=1)


def resized_convolution(h: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map bilinearly and convolves it: [B, C, height, width] -> [B, O, rows, columns], channels_last.

    Resizing keeps channels apart and the kernel's taps mix them, so the taps can go first, on the small map. What is
    left, resizing and shifting, is one matrix for the columns and one for the rows.

    Args:
        h: The map.
        weight: The kernel [O, C, 3, 3].
        bias: [O].
        size: Rows and columns of the result.
    """
    (batch, channels, height, width), (rows, columns), out = h.shape, size, len(weight)
    taps = weight.permute(1, 3, 2, 0).reshape(channels, 9 * out)
    z = h.permute(0, 2, 3, 1).reshape(-1, channels) @ taps
    z = _resize_and_shift(width, columns, h) @ z.view(batch * height, 3 * width, 3 * out)
    z = z.view(batch, height, columns, 3, out).transpose(2, 3).reshape(batch, 3 * height, columns * out)
    z = (_resize_and_shift(height, rows, h) @ z).view(batch, rows, columns, out)
    return (z + bias).permute(0, 3, 1, 2)


def _resize_and_shift(before: int, after: int, like: Tensor) -> Tensor:
    """A matrix [after, 3 * before]. For each of three taps, row i reads the resized line at i - 1, i and i + 1. Outside
    the line it reads 0."""
    eye = torch.eye(before, dtype=like.dtype, device=like.device)[None, None]
    line = F.interpolate(eye, (after, before), mode="bilinear", align_corners=True)[0, 0]
    return F.pad(line, (0, 0, 1, 1)).unfold(0, 3, 1).reshape(after, 3 * before)
