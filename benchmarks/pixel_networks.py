"""Two small networks for segmentation, which train in minutes on one core, for the part `segmentation` of study.py.

localgrad train --data fashion-scenes --model benchmarks.pixel_networks:unet --out runs/unet
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead


class Unit(nn.Module):
    """A residual unit of two 3x3 convolutions (He et al., CVPR 2016).

    The shortcut of a smaller map is pooled before its 1x1 convolution. Such a convolution with a stride of 2, and of
    fewer than 16 channels in channels_last, crashes in PyTorch 2.14.1 on a CPU.
    """

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else None
        self.shortcut = nn.Conv2d(channels, out, 1, bias=False) if channels != out else None

    def forward(self, h: Tensor) -> Tensor:
        short = h if self.pool is None else self.pool(h)
        short = short if self.shortcut is None else self.shortcut(short)
        return F.relu(short + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(h))))))


def _stem(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Fcn(nn.Module):
    """A fully convolutional network (Long et al., CVPR 2015): residual units, torchvision's head, logits resized.

    [B, in_channels, H, W] -> {"out": [B, classes, H, W]}, as torchvision's networks. The map of the last units has an
    eighth of the side.
    """

    def __init__(self, classes: int, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = _stem(in_channels, width)
        widths = [width] * depth + [2 * width] * depth + [4 * width] * depth
        pairs = zip([width, *widths], widths, strict=False)
        self.units = nn.ModuleList(Unit(a, b, 1 if a == b else 2) for a, b in pairs)
        self.head = FCNHead(4 * width, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        for unit in self.units:
            h = unit(h)
        return {"out": F.interpolate(self.head(h), x.shape[2:], mode="bilinear")}


class Unet(nn.Module):
    """A U-Net (Ronneberger et al., MICCAI 2015) of residual units, whose skips cross the cuts between its halves.

    [B, in_channels, H, W] -> [B, classes, H, W]. The sides are multiples of 16.
    """

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = _stem(in_channels, width)
        pairs = zip([width, *widths], widths, strict=False)
        self.down = nn.ModuleList(Unit(a, b, 1 if a == b else 2) for a, b in pairs)
        self.up = nn.ModuleList(Unit(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.readout = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        skips = []
        for unit in self.down:
            h = unit(h)
            skips.append(h)
        for unit, skip in zip(self.up, skips[-2::-1], strict=True):
            h = unit(torch.cat([F.interpolate(h, skip.shape[2:], mode="nearest"), skip], 1))
        return F.interpolate(self.readout(h), x.shape[2:], mode="bilinear")


def fcn(classes: int, in_channels: int, width: int = 16, depth: int = 3) -> nn.Module:
    """A stem and three stages of `depth` residual units; 16, 32 and 64 channels by default."""
    return Fcn(classes, in_channels, width, depth)


def unet(classes: int, in_channels: int, width: int = 16) -> nn.Module:
    """Four scales with 16, 32, 64 and 128 channels by default."""
    return Unet(classes, in_channels, width)
