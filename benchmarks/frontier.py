"""Time and memory of one training step of ResNet-110: BP, activation checkpointing, and the plans of localgrad.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --precision bf16

Random images of 3x32x32. All rows run in one process and take turns. Each time is the median of `repeats` rounds after
two warm-up rounds. The planner's prediction stands beside each measurement. Freed memory stays with the process
(`keep_freed_memory`). This favours BP: otherwise the system would map BP's gigabyte anew in each step, and local plans
would look faster. Writes results/frontier_MODEL_PRECISION.csv, one row for each plan.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from common import Table, keep_freed_memory, medians_in_turn, seconds_of
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.sizes import mib
from localgrad.run.folder import environment
from localgrad.scale.memory import optimizers_for, training_step
from localgrad.scale.plan import Plan, Planner
from localgrad.scale.speed import calibrate


@dataclass(frozen=True)
class Settings:
    """Measure each row of the frontier."""

    model: str = "resnet110"
    batch_size: int = 128
    precision: Literal["float32", "bf16"] = "float32"
    repeats: int = 7
    allocator: Literal["keep", "system"] = "keep"
    """Whether freed memory stays with the process, or goes back whenever the system's allocator returns it."""
    out: Path = Path("results")

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def file(self) -> Path:
        tail = "" if self.allocator == "keep" else "_system_allocator"
        return self.out / f"frontier_{self.model}_{self.precision}{tail}.csv"


@dataclass(frozen=True, eq=False)
class Way:
    """A method with a coupling, and the planner of both."""

    method: lg.Method
    coupling: lg.MAN | None
    planner: Planner


def network(settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    return lg.build(settings.model, classes=10).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def plans(settings: Settings, x: Tensor) -> list[tuple[str, Way, Plan]]:
    """The name of each row, its way and its plan. The first is BP."""
    speed = calibrate(network(settings), x, autocast=settings.autocast)
    print(f"calibrated: {speed.flops / 1e9:.0f} GFLOP/s, {speed.moved / 1e9:.1f} GB/s", flush=True)

    def way(method: lg.Method, coupling: lg.MAN | None) -> Way:
        how = {"method": method, "coupling": coupling, "autocast": settings.autocast, "speed": speed}
        return Way(method, coupling, Planner(network(settings), x, **how))

    dgl, man = way(lg.dgl("1c2f"), None), way(lg.dgl("1c2f"), lg.MAN())
    infopro, deep = way(lg.infopro(), lg.MAN()), way(lg.dgl("0c1f"), lg.DeepMAN())
    planner = man.planner
    bp, units = planner.bp, len(planner.costs.names)
    checkpointing = planner.exactly(planner.checkpointing).peak
    found = [("BP", man, bp), ("checkpointing", man, planner.checkpointing)]
    budgets = [
        ("half of BP's", bp.peak // 2), ("checkpointing's", checkpointing),
        ("0.65 of checkpointing's", int(0.65 * checkpointing)), ("half of checkpointing's", checkpointing // 2),
    ]  # fmt: skip
    kinds = [("BP", man, 1), ("DGL", dgl, None), ("MAN", man, None), ("deep MAN", deep, None)]
    wanted = [(f"{kind}, in {told} memory", one, b, blocks) for told, b in budgets for kind, one, blocks in kinds]
    counts = [k for k in (4, 8, 16) if k < units]
    for k in counts:
        budget = deep.planner.exactly(deep.planner.even(k)).peak
        wanted.append((f"deep MAN, K={k}, in the memory of even cuts", deep, budget, k))
    for name, one, budget, blocks in wanted:
        try:
            found.append((name, one, one.planner.fastest(budget, blocks)))
        except UserError as error:
            print(f"{name}: {error}", flush=True)
    found += [(f"MAN, K={k}, balanced", man, planner.balanced(k)) for k in counts[:2]]
    found += [
        (f"{n}, K={k}, even", w, w.planner.even(k)) for n, w in (("MAN", man), ("deep MAN", deep)) for k in counts
    ]
    found += [(f"{n}, K={units}", w, w.planner.even(units)) for n, w in (("MAN", man), ("InfoPro + MAN", infopro))]
    return found


def ready(way: Way, plan: Plan, settings: Settings, x: Tensor, y: Tensor) -> tuple[Plan, Callable[[], object]]:
    """The plan with the exact peak that is predicted for it, and its training step."""
    coupling = way.coupling if len(plan.blocks) > 1 else None
    model = lg.localize(network(settings), blocks=list(plan.blocks), method=way.method, coupling=coupling, example=x)
    plan.apply(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
    groups, as_you_go = lg.param_groups(model, weight_decay=1e-4), plan.step_as_you_go
    optimizers = optimizers_for(groups, sgd, as_you_go=as_you_go)
    step = partial(training_step, model, optimizers, x, y, step_as_you_go=as_you_go, autocast=settings.autocast)
    return way.planner.exactly(plan), step


def main(settings: Settings) -> None:
    if settings.allocator == "keep":
        keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(settings.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (settings.batch_size,))
    rows = [(name, *ready(way, plan, settings, x, y)) for name, way, plan in plans(settings, x)]
    medians = medians_in_turn([partial(seconds_of, step) for _, _, step in rows], settings.repeats)
    same = {"batch_size": settings.batch_size, "precision": settings.precision, "allocator": settings.allocator}
    table = Table(settings.file, same={**same, "repeats": settings.repeats, **environment()})
    bp, off = rows[0][1], []
    for (name, plan, step), median in zip(rows, medians, strict=True):
        peak = lg.measure_peak(step).total
        times, predicted = f"{median / medians[0]:.3f}", f"{plan.seconds / bp.seconds:.3f}"
        table.add({
            "row": name, "blocks": len(plan.blocks), "times_bp": times, "predicted_times_bp": predicted,
            "milliseconds": f"{1000 * median:.0f}", "predicted_milliseconds": f"{1000 * plan.seconds:.0f}",
            "peak_bytes": peak, "predicted_peak_bytes": plan.peak, "as_you_go": plan.step_as_you_go,
            "units_recomputed": len(plan.units), "couplings_recomputed": len(plan.couplings),
            "cuts": " ".join(plan.blocks[:-1]),
        })  # fmt: skip
        off.append(100 * abs(plan.seconds / median - 1))
        print(f"{name:45} K={len(plan.blocks):2} {times}x (predicted {predicted}x) {mib(peak)}", flush=True)
    print(f"predicted seconds are off by {max(off):.1f}% at most, {statistics.median(off):.1f}% in the median")


if __name__ == "__main__":
    main(tyro.cli(Settings))
