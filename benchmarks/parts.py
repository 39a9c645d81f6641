"""Time of a pass forward and backward through parts of an auxiliary, each part computed in two ways.

    python benchmarks/parts.py

Batch 128, float32, channels_last. The two ways of a part take turns. Each time is the median of `repeats` rounds after
two warm-up rounds. Writes results/parts.csv, one row for each part and size of the map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from common import Table, keep_freed_memory, medians_in_turn, seconds_of
from torch import Tensor, nn

from localgrad.core.boundary import Boundary
from localgrad.core.decoder import Decoder
from localgrad.run.folder import environment

MAPS = ((16, 32), (32, 16), (64, 8))  # Channels and size of the maps in a CIFAR ResNet's three stages.


@dataclass(frozen=True)
class Settings:
    """Time each part."""

    batch_size: int = 128
    repeats: int = 21
    out: Path = Path("results/parts.csv")


class TwoBranches(nn.Module):
    """Two convolutions of one input, as two layers or joined in one layer with twice the channels."""

    def __init__(self, channels: int, *, joined: bool) -> None:
        super().__init__()
        count, out = (1, 2 * channels) if joined else (2, channels)
        self.layers = nn.ModuleList(nn.Conv2d(channels, out, 3, padding=1, bias=False) for _ in range(count))

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([layer(h).flatten() for layer in self.layers])


def head(channels: int, pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(channels, 10)
    )


def pairs(channels: int, size: int) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Each part with its two ways, for maps of `channels` x `size` x `size`."""
    fast = Decoder(Boundary((channels, size, size), "NCHW", 0), (3, 32, 32))
    plain = copy.deepcopy(fast)
    plain.fast = False
    yield "decoder: layer by layer, quickly", plain, fast
    adaptive, fixed = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(size)
    yield "pooling of a head: adaptive, plain", head(channels, adaptive), head(channels, fixed)
    two, one = TwoBranches(channels, joined=False), TwoBranches(channels, joined=True)
    yield "a convolution of both branches: two, joined", two, one


def forward_and_backward(part: nn.Module, h: Tensor) -> None:
    part(h).square().sum().backward()


def main(settings: Settings) -> None:
    keep_freed_memory()
    table = Table(settings.out, same={"batch_size": settings.batch_size, "repeats": settings.repeats, **environment()})
    for channels, size in MAPS:
        h = torch.randn(settings.batch_size, channels, size, size).contiguous(memory_format=torch.channels_last)
        h.requires_grad_()
        for name, *ways in pairs(channels, size):
            parts = [way.to(memory_format=torch.channels_last) for way in ways]  # pyright: ignore[reportCallIssue]
            timers = [partial(seconds_of, partial(forward_and_backward, part, h)) for part in parts]
            one, another = (1000 * median for median in medians_in_turn(timers, settings.repeats))
            table.add({
                "what: one way, another": name, "channels": channels, "size": size,
                "milliseconds_one": f"{one:.1f}", "milliseconds_another": f"{another:.1f}",
                "ratio": f"{another / one:.2f}",
            })  # fmt: skip
            print(f"{name}, {channels} x {size} x {size}: {one:.1f} ms, {another:.1f} ms", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
