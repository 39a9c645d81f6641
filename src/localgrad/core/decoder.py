"""InfoPro's decoder, and the same with less arithmetic."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.blocks import Boundary

WORTH = 3  # times less arithmetic: below it, small products are slower than one convolution


class Decoder(nn.Sequential):
    """Bilinear resize to the image's size, 3x3 to `hidden`, norm, ReLU, 3x3 to the image's channels: logits of the
    image, [B, *boundary.shape] -> [B, *image]. Source: InfoPro (ICLR 2021), CIFAR auxiliary.

    fast: on the CPU in full precision, `resized_convolution` does the first two at once where that is much less to
    compute; the same numbers up to rounding, and the resized map is never made.
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
        (rows, columns), (height, width) = size, boundary.size
        together = 9 * height * width * (boundary.channels + columns) + 3 * height * rows * columns
        self.fast = 9 * boundary.channels * rows * columns > WORTH * together

    def forward(self, h: Tensor) -> Tensor:
        if not self.fast or h.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(h)
        *to_map, resize, convolution, norm, relu, last = self
        for module in to_map:
            h = module(h)
        size, convolution = cast(nn.Upsample, resize).size, cast(nn.Conv2d, convolution)
        h = resized_convolution(h, convolution.weight, cast(Tensor, convolution.bias), cast(tuple[int, int], size))
        return last(relu(norm(h)))


def resized_convolution(h: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """`conv2d(interpolate(h, size, "bilinear", align_corners=True), weight, bias, padding=1)` for a 3x3 kernel:
    [B, C, height, width] -> [B, O, rows, columns], channels_last.

    Resizing keeps channels apart and the kernel's taps mix them, so the taps can go first, on the small map. What is
    left, resizing and shifting, is one matrix for the columns and one for the rows.
    """
    (batch, channels, height, width), (rows, columns), out = h.shape, size, len(weight)
    taps = weight.permute(1, 3, 2, 0).reshape(channels, 9 * out)
    z = h.permute(0, 2, 3, 1).reshape(-1, channels) @ taps
    z = _resize_and_shift(width, columns, h) @ z.view(batch * height, 3 * width, 3 * out)
    z = z.view(batch, height, columns, 3, out).transpose(2, 3).reshape(batch, 3 * height, columns * out)
    z = (_resize_and_shift(height, rows, h) @ z).view(batch, rows, columns, out)
    return (z + bias).permute(0, 3, 1, 2)


def _resize_and_shift(before: int, after: int, like: Tensor) -> Tensor:
    """[after, 3 * before]: row i reads, for each of three taps, the resized line at i - 1, i and i + 1, 0 outside."""
    eye = torch.eye(before, dtype=like.dtype, device=like.device)[None, None]
    line = F.interpolate(eye, (after, before), mode="bilinear", align_corners=True)[0, 0]
    return F.pad(line, (0, 0, 1, 1)).unfold(0, 3, 1).reshape(after, 3 * before)
