"""How fast a device is, found by running a few units: predicted times are arithmetic and bytes moved at that speed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.core.blocks import Unit, trace_units
from localgrad.core.copies import duplicate
from localgrad.core.engine import autocasting
from localgrad.scale.costs import Work, WorkMeter, looks

REPEATS = 3  # after a warm-up
ENOUGH = 5e9  # floating-point operations of one timed pass; more samples would tell no more


@dataclass(frozen=True)
class Speed:
    """Of a device: floating-point operations and bytes a second, as if it did the one after the other. The defaults are
    of no particular device: good enough to rank plans, not to tell seconds."""

    flops: float = 150e9
    moved: float = 15e9

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.moved / self.moved


def calibrate(backbone: nn.Module, example: Tensor, *, autocast: torch.dtype | None = None) -> Speed:
    """The speed at which this device trains `backbone`: a copy of each unit that looks different is run forward and
    backward on as many samples of `example` [B, C, H, W] as give the device enough to do, and two speeds are fitted to
    the times. Seconds."""
    from sklearn.linear_model import LinearRegression  # a second, which only those who plan shall wait

    units = trace_units(duplicate(backbone).train(), example).units
    different = {f"{looks(unit.module)} {unit.input.shape}": unit for unit in units}
    runs = [_timed(unit, example, autocast) for unit in different.values()]
    # Relative errors count, so each row is divided by its time. Neither speed can be negative.
    rows = np.array([[work.flops / seconds, work.moved / seconds] for work, seconds in runs])
    scale = rows.max(axis=0)
    best = LinearRegression(fit_intercept=False, positive=True).fit(rows / scale, np.ones(len(rows))).coef_
    flops, moved = (1 / value if value > 0 else float("inf") for value in (best / scale).tolist())
    return Speed(flops, moved)


def _timed(unit: Unit, example: Tensor, autocast: torch.dtype | None) -> tuple[Work, float]:
    """What a pass forward and back through one unit computes and moves, and the median of its seconds."""
    last = example.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last and len(unit.input.shape) == 3 else torch.contiguous_format

    def run(h: Tensor) -> None:
        with autocasting(h, autocast):
            out = unit.module(h)
        out.backward(torch.ones_like(out))
        if h.device.type == "cuda":
            torch.cuda.synchronize(h.device)

    def batch(size: int) -> Tensor:
        h = torch.randn(size, *unit.input.shape, device=example.device, dtype=example.dtype)
        return h.contiguous(memory_format=layout).requires_grad_()

    with WorkMeter() as one:
        run(batch(2))
    size = max(2, min(len(example), int(2 * ENOUGH / max(one.work.flops, 1.0))))
    h = batch(size)
    with WorkMeter() as meter:
        run(h)  # which is the warm-up too
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run(h)
        times.append(time.perf_counter() - began)
    return meter.work, statistics.median(times)
