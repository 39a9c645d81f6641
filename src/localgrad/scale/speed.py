"""How fast a device is, found by running a few units: predicted times are work at that speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.core.blocks import Unit, trace_units
from localgrad.core.boundary import with_main
from localgrad.core.copies import duplicate, undisturbed
from localgrad.core.engine import autocasting
from localgrad.core.inputs import main_input
from localgrad.scale.costs import Cost, Costs, Work, WorkMeter, looks

REPEATS = 3  # after a warm-up
ENOUGH = 5e9  # floating-point operations of one timed pass; more samples would tell no more
FEWER = 4  # Each unit is also timed on a batch smaller by this, to tell what an operation costs whatever its size.

Ways = tuple[float, float]  # of the forward and of the backward pass


@dataclass(frozen=True)
class Speed:
    """The speed of a device, as if it did one thing after another.

    The defaults are those of no particular device: good enough to rank plans, not to tell seconds.

    Attributes:
        flops: floating-point operations a second.
        moved: bytes read and written a second.
        call: seconds that an operation takes whatever its size.
        factors: by the name of a unit, its measured time over what the three numbers above say, forward and backward.
    """

    flops: float = 150e9
    moved: float = 15e9
    call: float = 1e-5
    factors: Mapping[str, Ways] = field(default_factory=dict, repr=False)

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.moved / self.moved + work.calls * self.call

    def timed(self, costs: Costs) -> Costs:
        """`costs` with the time of each unit and auxiliary filled in."""

        def filled(own: Sequence[Cost], names: Sequence[str] = ()) -> list[Cost]:
            factors = [self.factors.get(name, (1.0, 1.0)) for name in names] or [(1.0, 1.0)] * len(own)
            ways = [(self.seconds(cost.forward) * f, self.seconds(cost.backward) * b)
                    for cost, (f, b) in zip(own, factors, strict=True)]  # fmt: skip
            return [replace(cost, seconds=seconds) for cost, seconds in zip(own, ways, strict=True)]

        units = (filled(costs.units[0], costs.names), filled(costs.units[1], costs.names))
        return replace(costs, units=units, auxiliaries=(filled(costs.auxiliaries[0]), filled(costs.auxiliaries[1])))


def calibrate(backbone: nn.Module, example: Any, *, autocast: torch.dtype | None = None) -> Speed:
    """The speed at which this device trains `backbone`. It takes seconds.

    A copy of each unit that looks different is run forward and backward, on as many samples as give the device enough
    to do and on a quarter of them. Three speeds are fitted to the times, and what is left is each unit's own factor.
    PyTorch's random generators are left as they were.

    Args:
        backbone: the network.
        example: a batch [B, ...], as for `localize`.
        autocast: the dtype in which forward passes are computed. By default the network's own.
    """
    from scipy.optimize import nnls

    main = main_input(example)
    with undisturbed(main.device), torch.enable_grad():
        units = trace_units(duplicate(backbone).train(), example).units
        keys = [f"{looks(unit.module)} {unit.input.shape}" for unit in units]
        timed = {key: _timed(unit, main, autocast) for key, unit in dict(zip(keys, units, strict=True)).items()}
    # Relative errors count, so each row is divided by its time. No speed can be negative.
    runs = [run for passes in timed.values() for ways in passes for run in ways if run[0].calls]
    rows = np.array([[work.flops, work.moved, work.calls] for work, _ in runs]) / [[seconds] for _, seconds in runs]
    scale = rows.max(axis=0)
    costs = nnls(rows / scale, np.ones(len(rows)))[0] / scale
    flops, moved = (1 / cost if cost > 0 else float("inf") for cost in costs[:2].tolist())
    speed = Speed(flops, moved, float(costs[2]))
    factors = {key: _factors(speed, passes[0]) for key, passes in timed.items()}
    return replace(speed, factors={unit.name: factors[key] for unit, key in zip(units, keys, strict=True)})


def _factors(speed: Speed, ways: Sequence[tuple[Work, float]]) -> Ways:
    forward, backward = (seconds / speed.seconds(work) if work.calls else 1.0 for work, seconds in ways)
    return forward, backward


def _timed(unit: Unit, example: Tensor, autocast: torch.dtype | None) -> list[list[tuple[Work, float]]]:
    """Work and seconds of the forward and the backward pass of one unit, on a large batch and on a small one."""
    last = example.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last and len(unit.input.shape) == 3 else torch.contiguous_format

    def batch(size: int) -> Any:
        h = with_main(unit.input.random(size, example.device), lambda main: main.contiguous(memory_format=layout))
        return tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), h)

    def back(out: Any) -> None:
        trained = [t for t in tree_leaves(out) if t.requires_grad and not t.is_leaf]
        if trained:  # A frozen unit that reads numbers of words has nothing to compute.
            torch.autograd.backward(trained, [torch.ones_like(t) for t in trained])

    def run(h: Any) -> list[float]:
        times = [time.perf_counter()]
        with autocasting(h, autocast):
            out = unit.module(h)
        _wait(example)
        times.append(time.perf_counter())
        back(out)
        _wait(example)
        return [times[1] - times[0], time.perf_counter() - times[1]]

    def measured(size: int) -> list[tuple[Work, float]]:
        h = batch(size)
        forward, backward = WorkMeter(), WorkMeter()
        with forward, autocasting(h, autocast):
            out = unit.module(h)
        with backward:
            back(out)
        run(h)
        times = [run(h) for _ in range(REPEATS)]
        medians = [statistics.median(way) for way in zip(*times, strict=True)]
        return list(zip((forward.work, backward.work), medians, strict=True))

    with WorkMeter() as one, autocasting(example, autocast):
        unit.module(batch(2))
    size = max(2, min(len(example), int(2 * ENOUGH / max(3 * one.work.flops, 1.0))))
    return [measured(size), measured(max(1, size // FEWER) if size // FEWER > 1 else size)]


def _wait(example: Tensor) -> None:
    if example.device.type == "cuda":
        torch.cuda.synchronize(example.device)
