"""Time of a pass forward and back through parts of an auxiliary, done one way and another. Writes results/parts.csv.

    python benchmarks/parts.py

Both ways take turns; median of `repeats` after two warm-ups. Batch 128, float32, channels_last.
"""

from __future__ import annotations

import copy
import csv
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from frontier import WARM_UP, keep_freed_memory
from torch import Tensor, nn

from localgrad.core.blocks import Boundary
from localgrad.core.decoder import Decoder
from localgrad.run.runlog import environment

MAPS = ((16, 32), (32, 16), (64, 8))  # channels and size in a CIFAR ResNet's three stages


@dataclass(frozen=True)
class Settings:
    """Time each part."""

    batch_size: int = 128
    repeats: int = 21
    out: Path = Path("results/parts.csv")


class Both(nn.Module):
    """Two convolutions of one input, one after the other or joined in one."""

    def __init__(self, channels: int, *, joined: bool) -> None:
        super().__init__()
        each = 2 * channels if joined else channels
        self.layers = nn.ModuleList(
            nn.Conv2d(channels, each, 3, padding=1, bias=False) for _ in range(1 if joined else 2)
        )

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([layer(h).flatten() for layer in self.layers])


def head(channels: int, pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(channels, 10)
    )


def pairs() -> Iterator[tuple[str, nn.Module, nn.Module, int, int]]:
    for channels, size in MAPS:
        quick = Decoder(Boundary((channels, size, size), "NCHW", 0), (3, 32, 32))
        plain = copy.deepcopy(quick)
        plain.fast = False
        yield "decoder: layer by layer, quickly", plain, quick, channels, size
        adaptive, fixed = head(channels, nn.AdaptiveAvgPool2d(1)), head(channels, nn.AvgPool2d(size))
        yield "pooling of a head: adaptive, plain", adaptive, fixed, channels, size
        two, one = Both(channels, joined=False), Both(channels, joined=True)
        yield "a convolution of both branches: two, joined", two, one, channels, size


def seconds(part: nn.Module, h: Tensor) -> float:
    began = time.perf_counter()
    part(h).square().sum().backward()
    return time.perf_counter() - began


def main(settings: Settings) -> None:
    keep_freed_memory()
    env = environment()
    with settings.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ("what: one way, another", "channels", "size", "milliseconds_one", "milliseconds_another", "ratio")
        writer.writerow([*columns, "batch_size", "repeats", *env])
        for name, one, another, channels, size in pairs():
            h = torch.randn(settings.batch_size, channels, size, size).contiguous(memory_format=torch.channels_last)
            parts = [part.to(memory_format=torch.channels_last) for part in (one, another)]  # pyright: ignore[reportCallIssue]
            times = [[seconds(part, h.requires_grad_()) for part in parts] for _ in range(WARM_UP + settings.repeats)]
            first, second = (1000 * statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
            told = [f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}"]
            writer.writerow([name, channels, size, *told, settings.batch_size, settings.repeats, *env.values()])
            print(f"{name}, {channels} x {size} x {size}: {' ms, '.join(told[:2])} ms", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
